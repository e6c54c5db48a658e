"""This process: its rank in the launch, its memory, its exit status."""

import ctypes
import errno
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.config.errors import UserError

Result = TypeVar("Result")
SECONDS_BETWEEN_SIGNS = 10.0
FULL = ("no space left", "disk quota exceeded", "pytorchstreamwriter failed", "file write failed", "unexpected pos")
"""What safetensors and torch say, in errors of their own, where a file cannot be written to its end."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C has ended the stage."""

    def __init__(self, number: int, what: str) -> None:
        """`number` is the signal's; `what` says in one sentence where the stage was left."""
        super().__init__(what)
        self.number = number


def processes() -> PartialState:
    """Accelerate's state of this launch; the first call joins the process group, on CPUs with gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main() -> bool:
    return processes().is_main_process


def run_once(work: Callable[[], Result], on_each_machine: bool = False) -> Result:
    """What `work` gives, or raises, on the main process (or on one of each machine), on every process.

    The others do not wait in one collective, which would time out: they meet every ten seconds until it is done.
    """
    state = processes()
    if state.num_processes == 1:
        return work()
    works = state.is_local_main_process if on_each_machine else state.is_main_process
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if works else None
        while True:
            if future is not None:
                wait([future], SECONDS_BETWEEN_SIGNS)
            found = gather_object([_outcome(future)])
            if not any(kind == "pending" for kind, _ in found):
                break
    for kind, value in found:
        if kind == "failed":
            raise value
    return [value for kind, value in found[: state.process_index + 1] if kind == "done"][-1]


def _outcome(future: Future | None) -> tuple[str, Any]:
    if future is None:
        return "idle", None
    if not future.done():
        return "pending", None
    error = future.exception()
    return ("done", future.result()) if error is None else ("failed", error)


def keep_freed_memory() -> None:
    """Lets glibc reuse a large tensor's memory instead of giving its pages back and faulting them in again.

    On a CPU a pretraining step is 1.5 times as fast (docs/log.md). Nothing happens where there is no glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a file could not be written for want of space: as an OSError, or in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error).lower() for words in FULL)


def run_stage(train: Callable[[Any], object], config: Any) -> None:
    """Runs a stage from the shell: a UserError, a number that is not finite, a full disk or an interruption is printed
    as one sentence; the exit status is 1, or 128 and the signal's number."""
    keep_freed_memory()
    try:
        train(config)
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        if not isinstance(error, Interrupted) or is_main():
            print(error if isinstance(error, Interrupted) else "interrupted", file=sys.stderr)
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not is_full_disk(error):
            raise
        path = getattr(error, "filename", None) or "the disk"
        sys.exit(f"error: {path}: no space left; what was finished is untouched: make room, run again")
