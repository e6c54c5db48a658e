"""Models: made, loaded with their heads, given adapters, saved so that any directory loads anywhere.

A reward model and a critic are one kind of thing: transformers' sequence classifier with one label, whose head is read
at the last token (score) or before every response token (values). The constant that gives the SFT policy mean score 0
is `config.score_shift`; scoring subtracts it and a critic made from the reward model starts from it, so that before
training the critic predicts just what the reward model would pay.
"""

import copy
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config import Adapter, Pretrain
from pipeline.process import processes
from pipeline.roles import (
    POLICY,
    REFERENCE,
    AdapterConfig,
    adapter_layers,
    add_role,
    base_weights,
    config_of,
    fill,
    for_language_model,
    kind,
    taken_off,
    without_adapter,
)
from pipeline.tensors import position_ids
from pipeline.tokenizing import ModelError, first_line, tokenizer_fingerprint

Policy = PreTrainedModel | PeftModel
Model = TypeVar("Model", bound=nn.Module)

ATTENTION = None if torch.accelerator.is_available() else "eager"
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
            f"{path}: its tokenizer ({tokenizer_fingerprint(tokenizer)}) has ids up to {highest}, the model has {rows} "
            "embeddings; give the model its own tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ModelError(
            f"{path}: its context is {context} tokens, rows may have {longest}; lower max_tokens, or "
            "max_prompt_tokens + max_new_tokens"
        )


def new_language_model(config: Pretrain, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama (Touvron et al., arXiv 2302.13971) with tied embeddings and fresh weights."""
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation=ATTENTION)


def loaded(kind: Any, path: str | Path, in_4bit: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A transformers model in fp32 and what its loading left open; ModelError for a directory that holds none."""
    more = four_bits() if in_4bit else {}
    try:
        return kind.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            attn_implementation=ATTENTION, **more,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no model can be loaded from it: {first_line(error)}") from None


def four_bits() -> dict[str, Any]:
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


def keep_fp32(model: nn.Module) -> None:
    """Undoes that TRL's trainers round what is trained on a base of 4 bits to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def in_full(base: PreTrainedModel) -> PreTrainedModel:
    """The base; of one in 4 bits, the language model that it was loaded from."""
    return without_adapter(loaded_language_model(str(base.name_or_path))) if is_4bit(base) else base


def load_language_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """A causal language model in fp32, without dropout; an adapter saved in the same directory is merged into it.

    Raises ModelError for a checkpoint that lacks weights, which transformers would draw at random, or that has a head
    of another kind, which it would drop: a reward model or critic with tied embeddings loads as a policy otherwise.
    """
    model = loaded_language_model(path, in_4bit)
    if in_4bit and adapter_layers(model):
        raise ModelError(f"{path}: its adapter cannot be merged into 4 bits; run merge on it, start from that")
    return without_dropout(merge_adapter(model))


def loaded_language_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """The same with its adapter on it."""
    model, info = loaded(AutoModelForCausalLM, path, in_4bit)
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
    return without_adapter(model)


def without_dropout(model: Model) -> Model:
    """The model with every dropout at 0: a log-probability must be the same number whenever it is computed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0  # attention modules apply this attribute themselves
    return model


def with_adapter(model: PreTrainedModel, dials: Adapter, task: TaskType = TaskType.CAUSAL_LM) -> PeftModel:
    """The model frozen, under a fresh trainable adapter that changes nothing yet; a classifier's head is trained."""
    targets: Any = dials.adapter_targets.split(",") if dials.adapter_targets else None
    if dials.adapter == "lora":
        config: Any = LoraConfig(
            task_type=task,
            r=dials.lora_rank,
            lora_alpha=dials.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
            use_rslora=dials.rslora,
            use_dora=dials.dora,
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
    base = loaded_language_model(path, dials.load_in_4bit)
    sft = taken_off(base)
    if sft is None:
        return with_adapter(without_dropout(base), dials)
    check_dials(dials, sft.config, path)
    policy = get_peft_model(base, for_language_model(sft.config))
    fill(policy, POLICY, sft.weights)
    add_role(policy, REFERENCE, sft.config, sft.weights)
    return without_dropout(policy)


def check_dials(dials: Adapter, config: AdapterConfig, path: str | Path) -> None:
    """ModelError for a dial that is not as it was when the adapter at `path` was made; names it and both values."""
    made: dict[str, Any] = {"adapter": kind(config)}
    if isinstance(config, LoraConfig):
        made |= {"lora_rank": config.r, "lora_alpha": config.lora_alpha}
        made |= {"rslora": config.use_rslora, "dora": config.use_dora}
    for name, value in made.items():
        if getattr(dials, name) != value:
            raise ModelError(
                f"{path}: it is an adapter, which PPO trains further, and its {name} is {value}, not "
                f"{getattr(dials, name)}: say --{name} {value}, or --adapter none to train all weights"
            )
    targets = sorted(config.target_modules or ())
    if dials.adapter_targets and sorted(dials.adapter_targets.split(",")) != targets:
        raise ModelError(
            f"{path}: it is an adapter, which PPO trains further, and its adapter_targets are {','.join(targets)}, not "
            f"{dials.adapter_targets}: leave adapter_targets empty"
        )


def base_of(policy: Policy) -> PreTrainedModel:
    """The transformers model inside a policy; under an adapter its linear layers are the adapter's."""
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    assert isinstance(model, PreTrainedModel)
    return model


def frozen(model: Model) -> Model:
    """The model in eval mode, none of its parameters trainable."""
    model.requires_grad_(False)
    return model.eval()


def new_classifier(language_model: PreTrainedModel, pad_id: int) -> PreTrainedModel:
    """A sequence classifier with one label on a copy of the language model's trunk; its head is zero, its shift too.

    A trunk in 4 bits is not copied.
    """
    config = copy.deepcopy(language_model.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    config.score_shift = 0.0
    device = torch.device("meta") if is_4bit(language_model) else nullcontext()
    with device:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=ATTENTION
        )
    if is_4bit(language_model):  # the trunk itself: PEFT and bitsandbytes know its layers
        setattr(model, model.base_model_prefix, language_model.base_model)
        model.score = nn.Linear(config.hidden_size, 1, bias=False, device=language_model.device)
        model.is_loaded_in_4bit, model.name_or_path = True, language_model.name_or_path
    else:
        model.base_model.load_state_dict(base_weights(language_model.base_model))
    nn.init.zeros_(head_weight(model))
    return without_dropout(model)


def new_reward_model(path: str | Path, tokenizer: PreTrainedTokenizerBase, in_4bit: bool = False) -> PreTrainedModel:
    """A language model's classifier with its head drawn from N(0, 1/(d+1)).

    The head's scale is that of Stiennon et al. (arXiv 2009.01325); its score starts near unit variance.
    """
    model = new_classifier(load_language_model(path, in_4bit), tokenizer.pad_token_id)
    nn.init.normal_(head_weight(model), std=(model.config.hidden_size + 1) ** -0.5)
    return model


def load_reward_model(path: str | Path) -> PreTrainedModel:
    """A reward model or critic with its head, an adapter merged into it.

    Raises ModelError if the head or the shift was not saved with it, or another head that would not be used.
    """
    return without_dropout(merge_adapter(loaded_reward_model(path)))


def loaded_reward_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """The same with its adapter on it."""
    model, info = loaded(AutoModelForSequenceClassification, path, in_4bit)
    if info["missing_keys"] or info["unexpected_keys"]:
        keys = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise ModelError(f"{path}: not a whole reward model: missing or unused weights {', '.join(keys[:5])}")
    if model.config.num_labels != 1 or not hasattr(model.config, "score_shift"):
        raise ModelError(f"{path}: expected a reward model with one label and a score_shift, made by stages/reward.py")
    return model


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight (1, d) of the score head."""
    weight = model.get_submodule("score").weight
    assert isinstance(weight, Tensor)
    return weight


def last_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The trunk's last hidden states (B, S, d); input_ids (B, S), attention_mask (B, S) boolean."""
    return model.base_model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state


def head_outputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, shift: Tensor | float) -> Tensor:
    """The head's output minus shift at every position, (B, S) fp32; input_ids (B, S), attention_mask (B, S) boolean."""
    hidden = last_states(model, input_ids, attention_mask)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head_weight(model).float()).squeeze(-1) - shift


# saving


def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads from anywhere, tokenizer included."""
    base = base_of(policy)
    base.generation_config = sampling_config(tokenizer, base)
    save_with_base(policy, folder)
    tokenizer.save_pretrained(folder)


def save_with_base(model: Policy, folder: Path) -> None:
    """Writes a model so that `from_pretrained` loads it from anywhere; of several adapters the policy's alone.

    With an adapter the directory holds the base it was trained on as well: an adapter alone names its base by a path,
    which is wrong as soon as the directory moves.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    base = base_of(model)
    weights = base_weights(base)
    if is_4bit(base):
        trunk = f"{base.base_model_prefix}."
        heads = {name: weight for name, weight in weights.items() if not name.startswith(trunk)}
        weights = {n: w for n, w in base_weights(in_full(base)).items() if n.startswith(trunk)} | heads
        vars(base).pop("hf_quantizer", None)  # else it would write weights of its own choice
        vars(base.config).pop("quantization_config", None)
    config = config_of(model)
    config.base_model_name_or_path = None
    source, base.name_or_path = base.name_or_path, None  # else PEFT writes this path again
    model.save_pretrained(str(folder), selected_adapters=[POLICY])
    base.name_or_path = source
    (folder / "README.md").unlink()  # a model card with empty headings
    if isinstance(config, LoraConfig) and config.use_dora:
        # PEFT leaves `.weight` off DoRA's magnitudes, and transformers, which wants it, then has them at their start.
        file = folder / "adapter_model.safetensors"
        named = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: w for k, w in load_file(file).items()}
        save_file(named, file, metadata={"format": "pt"})
    base.save_pretrained(folder, state_dict=weights)


def sampling_config(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> GenerationConfig:
    """Pure sampling: nothing truncates the distribution (an unset top_k means 50), and padding is never sampled."""
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        suppress_tokens=[tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
