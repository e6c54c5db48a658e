"""This process: its rank in the launch, its memory, its exit status."""

import ctypes
import errno
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState

from pipeline.config.errors import UserError


def processes() -> PartialState:
    """Accelerate's state of this launch; the first call joins the process group, on CPUs with gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main() -> bool:
    return processes().is_main_process


def keep_freed_memory() -> None:
    """Lets glibc reuse a large tensor's memory instead of giving its pages back and faulting them in again.

    On a CPU a pretraining step is 1.5 times as fast (docs/log.md). Nothing happens where there is no glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def run_stage(train: Callable[[Any], object], config: Any) -> None:
    """Runs a stage from the shell: a UserError or a full disk is printed as one sentence, with exit status 1."""
    keep_freed_memory()
    try:
        train(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path = error.filename or "the disk"
        sys.exit(f"error: {path}: no space left; what was finished is untouched: make room, run again")
