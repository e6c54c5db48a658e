"""What a stage prints, and what libraries do not."""

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


def print_main(text: str) -> None:
    """Prints one line, on the main process only."""
    if is_main():
        console.print(text, markup=False)
