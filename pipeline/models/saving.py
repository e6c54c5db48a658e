"""Directories that `from_pretrained` loads from anywhere."""

import json
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.loading import Policy, full_precision_base, is_4bit, unwrap_peft
from pipeline.models.multi_adapter import POLICY, AdapterConfig, adapter_config, base_state_dict
from pipeline.runtime.internals import forget_quantization


def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads from anywhere, tokenizer included."""
    base = unwrap_peft(policy)
    base.config.eos_token_id, base.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
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
    base = unwrap_peft(model)
    weights = base_state_dict(base)
    if is_4bit(base):
        trunk = f"{base.base_model_prefix}."
        heads = {name: weight for name, weight in weights.items() if not name.startswith(trunk)}
        weights = {n: w for n, w in base_state_dict(full_precision_base(base)).items() if n.startswith(trunk)} | heads
        forget_quantization(base)
    config = adapter_config(model)
    config.base_model_name_or_path = None
    source, base.name_or_path = base.name_or_path, None  # else PEFT writes this path again
    model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)
    base.name_or_path = source
    (folder / "README.md").unlink()  # a model card with empty headings
    sort_sets_(folder / CONFIG_NAME, config)
    if isinstance(config, LoraConfig) and config.use_dora:
        # PEFT writes DoRA's magnitudes without `.weight`; transformers wants it, and would load none of them.
        file = folder / "adapter_model.safetensors"
        named = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: w for k, w in load_file(file).items()}
        save_file(named, file, metadata={"format": "pt"})
    base.save_pretrained(folder, state_dict=weights)


def sort_sets_(file: Path, config: AdapterConfig) -> None:
    """Sorts in the adapter's file what the config has as sets: PEFT writes them in an order that no two runs share."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved |= {field: sorted(value) for field, value in vars(config).items() if isinstance(value, set)}
    file.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")


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
