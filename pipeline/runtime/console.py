"""The console that a stage prints to, without the output of libraries."""

import logging
import os
import warnings

import datasets
import torch
import transformers
from rich.console import Console

from pipeline.runtime.process import is_main

console = Console(highlight=False, soft_wrap=True)


def silence_libraries() -> None:
    """Turns off the progress bars, warnings and advice of libraries; errors still show."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed detects it with a warning
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes over a minute
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("accelerate", "trl", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind, append=True)  # after `python -W error`, and the tests' own


def print_main(text: str) -> None:
    """Prints one line, on the main process only."""
    if is_main():
        console.print(text, markup=False)
