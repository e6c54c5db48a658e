"""The precision of a stage, fp32, bf16 or fp16: the same under every strategy."""

import torch

from pipeline.runtime.process import processes


def resolve_precision(precision: str) -> str:
    """The precision itself, or what `auto` is on this machine: bf16 where its matrix products are fast, else fp32.

    A CPU without AVX-512 multiplies bf16 matrices one number at a time: thirty times as slow as fp32 (docs/log.md).
    """
    if precision != "auto":
        return precision
    kind = processes().device.type
    if kind == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bf16" if is_fast else "fp32"


def autocast(precision: str) -> torch.autocast:
    """The context in which models compute at a stage's precision."""
    kind, precision = processes().device.type, resolve_precision(precision)
    if precision == "fp32":
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, torch.float16 if precision == "fp16" else torch.bfloat16)
