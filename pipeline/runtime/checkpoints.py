"""Checkpoints of a stage that is not finished: each appears whole or not at all.

    <stage>/checkpoints/<step>/   weights, optimiser, random states; MANIFEST.json, written last, has their sha256

The main process renames a checkpoint into place. A stage resumes from the newest one whose files are as they were
written.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from pipeline.runtime.console import print_main
from pipeline.runtime.hashing import first_changed_file
from pipeline.runtime.launch import requested_backend, uses_deepspeed
from pipeline.runtime.process import processes
from pipeline.runtime.whole import appear, make_folder, removed_on_error

CHECKPOINTS_KEPT = 2  # the newest, and the one before it in case the newest is damaged
TRAINER = "trainer"  # folder beside them into which a trainer writes its own
TRAINED_WEIGHTS = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Frozen weights are not saved: they are loaded from the parents again, whose hashes the run's identity holds."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int  # steps done
    facts: dict[str, Any]  # identity, launch and state of the run


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Has every process `write` into a temporary folder, then renames it to `folder/<step>`.

    The newest CHECKPOINTS_KEPT checkpoints stay, older ones are deleted.
    """
    state = processes()
    temporary = folder / f"{step}.partial"
    with removed_on_error(temporary):
        if state.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            make_folder(temporary)
        state.wait_for_everyone()
        write(temporary)
        state.wait_for_everyone()
        if state.is_main_process:
            appear(
                temporary, folder / str(step), "MANIFEST.json",
                lambda files: {"step": step, "facts": facts, "files": files},
            )  # fmt: skip
            for old in _by_step(folder)[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)
    state.wait_for_everyone()


def remove_partial(folder: Path) -> None:
    """Removes what is no whole checkpoint: what an attempt that ended was writing. Damaged ones stay."""
    for path in folder.glob("*"):
        if path.suffix == ".partial" or path.name == TRAINER:
            shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; damaged ones are renamed, with a printed line."""
    for path in reversed(_by_step(folder)):
        damaged = "MANIFEST.json"
        try:
            manifest = json.loads((path / damaged).read_text(encoding="utf-8"))
            damaged = first_changed_file(path, manifest["files"])
        except (OSError, ValueError, KeyError):
            pass
        if not damaged:
            return Checkpoint(path, manifest["step"], manifest["facts"])
        path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:4]}"))
        print_main(
            f"{path}: {damaged} is missing or not as it was written: set aside, the checkpoint before it is used"
        )
    return None


def _by_step(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all its weights, of those that are sharded too."""
    return sum(_numel(p) * p.element_size() for p in module.parameters())


def training_bytes(module: nn.Module) -> int:
    """Bytes of what a checkpoint has of its trained weights: in fp32 themselves and Adam's two moments.

    DeepSpeed writes the weights twice, as the model's and as the optimiser's.
    """
    return (16 if requested_backend() == "DEEPSPEED" else 12) * trained_numbers(module)


def trained_numbers(module: nn.Module) -> int:
    return sum(_numel(p) for p in module.parameters() if p.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # which ZeRO-3 gives what it has sharded


def save_training(accelerator: Accelerator, prepared: nn.Module, optimizer: Any, folder: Path) -> None:
    """Writes the trained weights, the optimiser and each process's random state; all processes call it together."""
    if uses_deepspeed(accelerator):
        prepared.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)  # type: ignore[operator]
    else:
        weights, moments = get_state_dict(prepared, optimizer.optimizer, options=TRAINED_WEIGHTS)
        dcp.save({"weights": weights, "optimizer": moments}, checkpoint_id=folder / "training")
    save_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, 0, accelerator.scaler)


def load_training(accelerator: Accelerator, prepared: nn.Module, optimizer: Any, folder: Path) -> None:
    """Loads what `save_training` wrote. A process that did not take part then keeps its random state."""
    if uses_deepspeed(accelerator):
        prepared.load_checkpoint(str(folder), tag="engine", load_module_strict=False)  # type: ignore[operator]
    else:
        weights, moments = get_state_dict(prepared, optimizer.optimizer, options=TRAINED_WEIGHTS)
        dcp.load({"weights": weights, "optimizer": moments}, checkpoint_id=folder / "training")  # in place
        set_state_dict(
            prepared, optimizer.optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED_WEIGHTS
        )
    load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler)
