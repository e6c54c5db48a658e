"""Writes adapters in PEFT's format, whole or not at all."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.updates import Factors, Scales, Update, has_bias, update_kind
from pipeline.models.multi_adapter import PREFIX
from pipeline.runtime.finite import check_files_finite
from pipeline.runtime.hashing import fsync_folder, fsync_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_tensors(update: Update, heads: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a plain PEFT adapter: LoRA factors filled up with zeros to one rank, the scale inside B."""
    rank = max((part.rank for part in update.values() if isinstance(part, Factors)), default=0)
    tensors: dict[str, Tensor] = {}
    for module, part in update.items():
        key = f"{PREFIX}{module}."
        if isinstance(part, Factors):
            tensors[f"{key}lora_A.weight"] = nn.functional.pad(part.a, (0, 0, 0, rank - part.rank))
            tensors[f"{key}lora_B.weight"] = nn.functional.pad(part.b, (0, rank - part.rank))
            if part.bias is not None:
                tensors[f"{key}lora_B.bias"] = part.bias
        else:
            tensors[f"{key}ia3_l"] = part.l.reshape(1, -1) if part.feedforward else part.l.reshape(-1, 1)
    tensors |= {f"{PREFIX}{parameter}": head for parameter, head in heads.items()}
    return {key: tensor.to(DTYPES[dtype]).contiguous() for key, tensor in sorted(tensors.items())}


def to_config(update: Update, heads: Mapping[str, Tensor], base: AdapterBase) -> dict[str, Any]:
    """adapter_config.json of a plain PEFT adapter: alpha = rank, so scale 1; modules by full names; no pattern."""
    modules = sorted(update)
    common: dict[str, Any] = {
        "task_type": base.task,
        "target_modules": modules,
        "modules_to_save": sorted({parameter.rpartition(".")[0] for parameter in heads}) or None,
        "fan_in_fan_out": any(isinstance(base.model.get_submodule(module), Conv1D) for module in modules),
        "inference_mode": True,
    }
    if update_kind(update) == "LoRA":
        rank = max(part.rank for part in update.values() if isinstance(part, Factors))
        config: PeftConfig = LoraConfig(r=rank, lora_alpha=rank, lora_bias=has_bias(update), **common)
    else:
        feedforward = [m for m, part in update.items() if isinstance(part, Scales) and part.feedforward]
        config = IA3Config(feedforward_modules=feedforward, **common)
    fields = sorted(config.to_dict().items())
    return {field: sorted(setting) if isinstance(setting, set) else setting for field, setting in fields}


def write_adapter(folder: Path, update: Update, heads: Mapping[str, Tensor], base: AdapterBase, dtype: str) -> None:
    """Writes an adapter that PEFT, TRL and vLLM load, tokenizer included, into an existing folder."""
    config = json.dumps(to_config(update, heads, base), indent=2, default=str)
    (folder / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
    save_file(to_tensors(update, heads, dtype), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    base.tokenizer.save_pretrained(folder)


def require_new_folder(out: str) -> Path:
    """The folder to write; AdapterError if it is not given, or there already."""
    if not out:
        raise AdapterError("out: say where to write, a folder that is not there yet")
    if Path(out).exists():
        raise AdapterError(f"{out}: there is something already, and it is not overwritten; give --out another folder")
    return Path(out)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or is removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        check_files_finite(str(out), temporary)
        fsync_folder(temporary)
        temporary.rename(out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
