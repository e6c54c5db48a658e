"""What PPO keeps while it trains: what a run that was cut off goes on with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints import Checkpoint, load_training, save_training
from pipeline.monitor import Evaluation
from pipeline.process import is_main
from pipeline.run import StageRun

BEST = "best.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights, its optimiser and its random states."""

    rollouts: int  # done
    history: list[Evaluation]
    skipped: int  # optimiser steps in a row whose gradient was not finite
    kl_coef: float  # of the next rollout


def checkpoint(
    stage: StageRun, progress: Progress, accelerator: Accelerator, prepared: nn.Module, optimizer: Any, scheduler: Any
) -> None:
    """Writes all that decides how the run goes on, so that it goes on to the bit."""
    sft_scores = gather_object([progress.history[0].scores.tolist()])  # by process; prompt i is process i mod n's
    state = {
        "history": [{"step": found.step, "metrics": found.metrics} for found in progress.history],
        "sft_scores": [score for row in zip(*sft_scores, strict=True) for score in row],
        "skipped": progress.skipped,
        "kl_coef": progress.kl_coef,
        "scheduler": scheduler.state_dict(),
    }

    def write(folder: Path) -> None:
        save_training(accelerator, prepared, optimizer, folder)
        if is_main():
            best = max(progress.history, key=lambda found: found.reward)
            save_file({name: weight.contiguous() for name, weight in best.weights.items()}, folder / BEST)

    stage.checkpoint(progress.rollouts, write, state)


def resumed(
    found: Checkpoint, accelerator: Accelerator, prepared: nn.Module, optimizer: Any, scheduler: Any
) -> Progress:
    """Puts module, optimiser, scheduler and random states back to where the checkpoint was made."""
    load_training(accelerator, prepared, optimizer, found.folder)
    state = found.facts["state"]
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    own = torch.tensor(state["sft_scores"][accelerator.process_index :: accelerator.num_processes])
    history = [
        Evaluation(row["step"], row["metrics"], [], own.to(accelerator.device) if number == 0 else torch.empty(0))
        for number, row in enumerate(state["history"])
    ]
    if is_main():
        best = max(range(len(history)), key=lambda number: history[number].reward)
        history[best].weights.update(load_file(found.folder / BEST))
    return Progress(found.step, history, state["skipped"], state["kl_coef"])
