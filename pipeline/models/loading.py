"""Language models: made, loaded, put under an adapter."""

import importlib.util
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config.dials import Adapter
from pipeline.config.stages import Pretrain
from pipeline.data.tokenizer import ModelError, first_line, hash_tokenizer
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


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, path: str | Path) -> None:
    """ModelError if an id has no embedding, or `longest` tokens do not fit into the model's context."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"{path}: its tokenizer ({hash_tokenizer(tokenizer)}) has ids up to {highest}, the model has {rows} "
            "embeddings; give the model its own tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ModelError(
            f"{path}: its context is {context} tokens, rows may have {longest}; lower max_length, or "
            "max_prompt_tokens + max_new_tokens"
        )


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
    """A transformers model in fp32 and its loading info (missing and unexpected keys); ModelError if there is none.

    `overrides` go into the model's configuration.
    """
    quantization = quantization_kwargs() if in_4bit else {}
    try:
        return kind.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            attn_implementation=ATTN_IMPLEMENTATION, **quantization, **overrides,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no model can be loaded from it: {first_line(error)}") from None


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
    if info["missing_keys"]:
        raise ModelError(f"{path}: not a whole language model: missing {', '.join(sorted(info['missing_keys'])[:5])}")
    heads = [name for name in sorted(info["unexpected_keys"]) if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise ModelError(f"{path}: not a language model: it has a head that would not be used: {', '.join(heads[:5])}")
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


def wrap_with_adapter(model: PreTrainedModel, dials: Adapter, task: TaskType = TaskType.CAUSAL_LM) -> PeftModel:
    """The model frozen, under a fresh trainable adapter that changes nothing yet; a classifier's head is trained."""
    targets: Any = dials.target_modules.split(",") if dials.target_modules else None
    if dials.adapter == "lora":
        config: Any = LoraConfig(
            task_type=task,
            r=dials.lora_r,
            lora_alpha=dials.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
            use_rslora=dials.use_rslora,
            use_dora=dials.use_dora,
            target_modules=targets or "all-linear",
        )
    elif dials.adapter == "ia3":
        config = IA3Config(task_type=task, target_modules=targets)
    else:
        raise ModelError(f"adapter: expected lora or ia3, got {dials.adapter}")
    return get_peft_model(model, config)


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
    policy = get_peft_model(base, causal_lm_config(sft.config))
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
    targets = sorted(config.target_modules or ())
    if dials.target_modules and sorted(dials.target_modules.split(",")) != targets:
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
