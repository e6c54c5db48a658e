"""Language models: made, or loaded from whatever directory they lie in."""

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from pipeline.config.dials import Adapter
from pipeline.config.errors import UserError
from pipeline.config.stages import Pretrain
from pipeline.data.tokenizer import ModelError, first_line, hash_tokenizer, loading_error
from pipeline.models.fresh_adapter import describe_adapter, target_names, wrap_with_adapter
from pipeline.models.multi_adapter import (
    POLICY,
    REFERENCE,
    AdapterConfig,
    adapter_layers,
    adapter_type,
    add_adapter,
    causal_lm_config,
    detach_adapter,
    load_adapter_weights,
    remove_adapter_,
)
from pipeline.runtime.process import processes

Policy = PreTrainedModel | PeftModel
Model = TypeVar("Model", bound=nn.Module)

ATTN_IMPLEMENTATION = None if torch.accelerator.is_available() else "eager"
"""Attention kernel: transformers' own choice on an accelerator. On CPUs the plain one is the faster at the lengths of
preference data (docs/log.md); it keeps T x T numbers per head and layer."""


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model has positions for; None if its positions have no end."""
    return getattr(model.config, "max_position_embeddings", None)


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    path: str | Path,
    what: str = "rows may have",
    dials: str = "max_length, or max_prompt_tokens + max_new_tokens",
) -> None:
    """ModelError if an id has no embedding, or `longest` tokens, which `what` has, do not fit into its context; `dials`
    are what to lower then."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"{path}: its tokenizer ({hash_tokenizer(tokenizer)}) has ids up to {highest}, the model has {rows} "
            "embeddings; give the model its own tokenizer"
        )
    context = context_length(model)
    if context is not None and longest > context:
        raise ModelError(f"{path}: its context is {context} tokens, {what} {longest}; lower {dials}")


def new_language_model(config: Pretrain, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama (Touvron et al., arXiv 2302.13971) with tied embeddings and fresh weights."""
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation=ATTN_IMPLEMENTATION)


def load_pretrained(
    kind: Any, path: str | Path, in_4bit: bool = False, **overrides: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A transformers model in fp32, with the adapter that lies in its directory; and what both lacked or had unused.

    Of an adapter alone the base is the one that it names. `overrides` go into the model's configuration. Raises
    ModelError where nothing can be loaded: for code of the model's own, pickled weights, shapes that differ from the
    config's, an adapter of another base.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True}  # they are refused below
    quantization = quantization_kwargs() if in_4bit else {}
    try:
        is_adapter = find_adapter_config_file(str(path)) is not None
        with base_of_adapter(path) if is_adapter else contextlib.nullcontext(path) as base:
            check_not_pickled(base, "model.safetensors", "pytorch_model.bin")
            model, info = kind.from_pretrained(
                base, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                attn_implementation=ATTN_IMPLEMENTATION, **options, **quantization, **overrides,
            )  # fmt: skip
        if is_adapter:
            model.name_or_path = str(path)
            load_adapter_on_(model, path, info, options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise loading_error(path, "model", error) from None
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{path}: {name} has shape {tuple(found)} in its weights, {tuple(expected)} by its config: give "
            "weights and config that belong together"
        )
    return model, info


def load_adapter_on_(model: PreTrainedModel, path: str | Path, info: dict[str, Any], options: dict[str, Any]) -> None:
    """Loads an adapter onto its base, in place, and adds to the base's loading info what the adapter's says.

    Raises ModelError for weights of modules that the base does not have, which transformers would drop.
    """
    check_not_pickled(path, SAFETENSORS_WEIGHTS_NAME, "adapter_model.bin")
    found = model.load_adapter(str(path), hf_quantizer=getattr(model, "hf_quantizer", None), **options).to_dict()
    surplus = sorted(key for key in found["unexpected_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if surplus:
        raise ModelError(
            f"{path}: its adapter has weights of modules that the base does not have: {', '.join(surplus[:5])}; give "
            "it the base that it was trained on"
        )
    whole = {f"{name}." for name, layer in model.named_modules() if isinstance(layer, ModulesToSaveWrapper)}
    info["missing_keys"] = {key for key in info["missing_keys"] if not key.startswith(tuple(whole))}  # it brings them
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        info[kind] = {*info[kind], *found[kind]}


def check_not_pickled(path: str | Path, wanted: str, pickled: str) -> None:
    """ModelError for a directory whose weights are a pickle alone, which can run code when it is read."""
    folder = Path(path)
    if not any(folder.glob(f"{wanted}*")) and any(folder.glob(f"{Path(pickled).stem}*.bin*")):
        raise ModelError(
            f"{folder / pickled}: a pickle can run any code when it is read, and only safetensors are: load it where "
            "you trust it and save it again (save_pretrained)"
        )


@contextlib.contextmanager
def base_of_adapter(path: str | Path) -> Iterator[str | Path]:
    """Where the base of an adapter is read from: its own directory with the adapter hidden, or what it names.

    Raises ModelError for an adapter that names none, or one that cannot be found.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        with hide_adapter(folder) as view:
            yield view
        return
    file = find_adapter_config_file(str(path))
    assert file is not None
    named = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    merge = f"python stages/merge.py merge {path} --base … --out …"
    if not named:
        raise ModelError(f"{path}: an adapter that names no base: run `{merge}`, start from what that writes")
    try:
        yield named
    except UserError:
        raise
    except OSError as error:
        raise ModelError(
            f"{path}: an adapter, and its base {named} (base_model_name_or_path) cannot be loaded: "
            f"{first_line(error).rstrip('.')}; put it there, or run `{merge}` and start from what that writes"
        ) from None


@contextlib.contextmanager
def hide_adapter(folder: Path) -> Iterator[Path]:
    """The folder as it would be without an adapter in it, which transformers would load unasked.

    Errors name the folder, not the view of it.
    """
    if not (folder / CONFIG_NAME).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        try:
            yield Path(view)
        except UserError as error:
            raise type(error)(str(error).replace(view, str(folder))) from None


def quantization_kwargs() -> dict[str, Any]:
    """What `from_pretrained` wants for linear layers of 4 bits, NF4 (Dettmers et al., arXiv 2305.14314)."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("load_in_4bit: it needs a CUDA GPU and the package bitsandbytes; leave it out here")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": processes().device}}


def is_4bit(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def cast_trained_to_fp32_(model: nn.Module) -> None:
    """Gives trained parameters fp32 again: TRL's trainers cast them to bfloat16 where the base has 4 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def full_precision_base(base: PreTrainedModel) -> PreTrainedModel:
    """The base as it is; where it is in 4 bits, the same language model loaded again in fp32."""
    return remove_adapter_(load_language_model_with_adapter(str(base.name_or_path))) if is_4bit(base) else base


def load_language_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """A causal language model in fp32, without dropout; an adapter saved in the same directory is merged into it.

    Raises ModelError for a checkpoint that lacks weights, which transformers would draw at random, or that has a head
    of another kind, which it would drop: a reward model or critic with tied embeddings loads as a policy otherwise.
    """
    model = load_language_model_with_adapter(path, in_4bit)
    if in_4bit and adapter_layers(model):
        raise ModelError(f"{path}: its adapter cannot be merged into 4 bits; run merge on it, start from that")
    return disable_dropout_(merge_adapter(model))


def load_language_model_with_adapter(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """As `load_language_model`, but an adapter saved in the directory stays on the model, and dropout stays."""
    model, info = load_pretrained(AutoModelForCausalLM, path, in_4bit)
    heads = [name for name in sorted(info["unexpected_keys"]) if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise ModelError(f"{path}: not a language model: it has a head that would not be used: {', '.join(heads[:5])}")
    if info["missing_keys"]:
        raise ModelError(f"{path}: not a whole language model: missing {', '.join(sorted(info['missing_keys'])[:5])}")
    return model


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter added into its weights, every adapter layer gone and all trainable; in place."""
    for layer in adapter_layers(model):
        layer.merge(safe_merge=True)
    return remove_adapter_(model)


def disable_dropout_(model: Model) -> Model:
    """The model with every dropout and router noise at 0: a log-probability must be the same whenever it is computed.

    Modules hold a rate as an `nn.Dropout`, as a number of their own (OPT, Bloom) or in their config; so does what is
    saved afterwards.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    vars(holder)[name] = 0.0
    return model


def load_policy(path: str | Path, dials: Adapter) -> Policy:
    """The SFT policy, to be trained: all of it, or an adapter on it, fresh and without effect.

    Where SFT is an adapter itself, that is what is trained further, on SFT's own base: the policy starts as its copy,
    and a frozen one is the reference. ModelError for dials that ask for another adapter than SFT's.
    """
    if dials.adapter == "none":
        return load_language_model(path)
    base = load_language_model_with_adapter(path, dials.load_in_4bit)
    sft = detach_adapter(base)
    if sft is None:
        return wrap_with_adapter(disable_dropout_(base), dials)
    check_adapter_dials(dials, sft.config, path)
    policy = describe_adapter(get_peft_model(base, causal_lm_config(sft.config)))
    load_adapter_weights(policy, POLICY, sft.weights)
    add_adapter(policy, REFERENCE, sft.config, sft.weights)
    return disable_dropout_(policy)


def check_adapter_dials(dials: Adapter, config: AdapterConfig, path: str | Path) -> None:
    """ModelError if a dial contradicts the adapter at `path`, which is trained further; names it and both values."""
    saved: dict[str, Any] = {"adapter": adapter_type(config)}
    if isinstance(config, LoraConfig):
        saved |= {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        saved |= {"use_rslora": config.use_rslora, "use_dora": config.use_dora}
    for name, value in saved.items():
        if getattr(dials, name) != value:
            raise ModelError(
                f"{path}: it is an adapter, which PPO trains further, and its {name} is {value}, not "
                f"{getattr(dials, name)}: say --{name} {value}, or --adapter none to train all weights"
            )
    modules = config.target_modules or ()  # PEFT takes a string for a regular expression
    targets = [modules] if isinstance(modules, str) else sorted(modules)
    if dials.target_modules and target_names(dials.target_modules) != targets:
        raise ModelError(
            f"{path}: it is an adapter, which PPO trains further, and its target_modules are {','.join(targets)}, not "
            f"{dials.target_modules}: leave target_modules empty"
        )


def unwrap_peft(policy: Policy) -> PreTrainedModel:
    """The transformers model inside a policy; under an adapter its linear layers are the adapter's."""
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    assert isinstance(model, PreTrainedModel)
    return model


def freeze(model: Model) -> Model:
    """The model in eval mode, none of its parameters trainable."""
    model.requires_grad_(False)
    return model.eval()
