"""The process a stage runs in: its siblings under `accelerate launch`, its console, its memory."""

import ctypes
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.config import UserError

TOLD = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
"""What the launch says of precision; transformers' trainers write it anew."""

console = Console(highlight=False, soft_wrap=True)


def processes() -> PartialState:
    """The processes of this run, joined at the first call; Accelerate joins them on CPUs (gloo) only when told to."""
    return PartialState(cpu=not torch.accelerator.is_available())


def new_accelerator(precision: str) -> Accelerator:
    """Accelerate for these processes at a stage's precision, which is what `autocast` computes in; weights stay fp32.

    DeepSpeed and FSDP are told of no precision: they would round the weights themselves. UserError for a launch that
    is not what it seems, or that contradicts the dials.
    """
    everyone, precision = processes(), actual(precision)
    if precision == "fp16" and (asked() != "DDP" or everyone.device.type != "cuda"):
        where = asked() if everyone.device.type == "cuda" else "a CPU"
        raise UserError(
            f"precision: fp16 wants a loss scale, which CUDA GPUs have under DDP; on {where} say --precision bf16"
        )
    if TOLD not in ("no", precision):
        raise UserError(
            f"the launch says mixed_precision: {TOLD}, the recipe precision: {precision}: change one of them "
            '(mixed_precision: "no" leaves it to the recipe)'
        )
    accelerator = checked(Accelerator(mixed_precision="fp16" if precision == "fp16" else "no"))
    keep_torch_optimizer(accelerator)
    unset_hf_deepspeed_config()  # else from_pretrained would cut models as they are loaded, before they are one module
    return accelerator


def check_deepspeed(deepspeed: dict[str, Any]) -> None:
    """UserError for what DeepSpeed's config says of things that the dials decide, before a stage says it for them."""
    for key, dials in (
        ("gradient_accumulation_steps", "batch_size / micro_batch (PPO: rollout_batch / minibatches / micro_batch)"),
        ("gradient_clipping", "max_grad_norm"),
        ("optimizer", "the learning rates"),
        ("scheduler", "the learning rates"),
        ("bf16", "precision"),
        ("fp16", "precision"),
    ):
        value = deepspeed.get(key)
        is_off = isinstance(value, dict) and value.get("enabled") in (False, "auto")
        if value not in (None, "auto", 1) and not is_off:
            raise UserError(f"the launch's DeepSpeed config says {key}: {value}; leave that to the dials ({dials})")


def actual(precision: str) -> str:
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


def keep_torch_optimizer(accelerator: Accelerator) -> None:
    """Has an optimiser that DeepSpeed offloads to the CPU stay the one it was given, with each group's rate."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def autocast(precision: str) -> torch.autocast:
    """The context in which models compute at a stage's precision, the same under every strategy."""
    kind, precision = processes().device.type, actual(precision)
    if precision == "fp32":
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, torch.float16 if precision == "fp16" else torch.bfloat16)


def asked() -> str:
    """DEEPSPEED, FSDP or DDP: what the launch wants of Accelerate."""
    return next((kind for kind in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"), "DDP")


def strategy() -> str:
    """DDP (also of one process), ZeRO-1, ZeRO-2, ZeRO-3 or FSDP2: how the processes of this launch share the work."""
    if asked() == "DEEPSPEED":
        return f"ZeRO-{AcceleratorState().deepspeed_plugin.zero_stage}"
    return "FSDP2" if asked() == "FSDP" else "DDP"


def checked(accelerator: Accelerator) -> Accelerator:
    """The accelerator, if it is of the kind and has the processes that the launch asks for; else UserError names both.

    Accelerate falls back in silence: a variable in the environment turns DeepSpeed into DDP, and FSDP on CPUs into
    copies that train alone.
    """
    world, found = int(os.environ.get("WORLD_SIZE", 1)), accelerator.distributed_type.value
    is_other = (found if found in ("DEEPSPEED", "FSDP") else "DDP") != asked()
    if is_other or accelerator.num_processes != world:
        why = ": FSDP cuts models on GPUs only" if asked() == "FSDP" and accelerator.device.type == "cpu" else ""
        raise UserError(
            f"the launch asks for {asked()} on {world} processes, but Accelerate has started {found} with "
            f"{accelerator.num_processes}{why}; look at the file given to --config_file, and for ACCELERATE_USE_CPU in "
            "the environment"
        )
    return accelerator


def is_main() -> bool:
    return processes().is_main_process


def quiet() -> None:
    """Keeps dependencies' progress bars and advice out of the stage's own few lines; errors still show."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find that out itself
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes over a minute
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("accelerate", "trl", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def keep_freed_memory() -> None:
    """Lets glibc reuse a large tensor's memory instead of giving its pages back and faulting them in again.

    On a CPU a pretraining step is 1.5 times as fast (docs/log.md). Nothing happens where there is no glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def say(text: str) -> None:
    """Prints one line, on the main process only."""
    if is_main():
        console.print(text, markup=False)


def stage_main(train: Callable[[Any], object], config: Any) -> None:
    """Runs a stage from the shell: an error that the user can mend is one sentence and exit status 1."""
    keep_freed_memory()
    try:
        train(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "the disk"
        sys.exit(f"error: {place}: no space left; what was finished is untouched: make room, run again")
