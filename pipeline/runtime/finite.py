"""No weight that is not finite is written: neither as a checkpoint nor in the end."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor


def check_finite(stage: str, weights: Iterable[tuple[str, Tensor]], when: str) -> None:
    """FloatingPointError on every process, naming the first weight that is not finite on any of them.

    All processes call it together, each with its own part of weights that are sharded.
    """
    mine = next((name for name, weight in weights if not is_finite(own_part(weight))), "")
    if name := next(filter(None, gather_object([mine])), ""):
        raise FloatingPointError(
            f"{stage}: {name} is not finite {when}, and no such weight is written: lower the learning rate, and look "
            "at the last lines of metrics.jsonl; checkpoints from before are untouched"
        )


def own_part(weight: Any) -> Tensor:
    """What this process holds of a weight: all of it, or its shard under FSDP2 or ZeRO-3."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return getattr(weight, "ds_tensor", weight)  # which ZeRO-3 gives each parameter that it has sharded


def is_finite(x: Tensor) -> bool:
    if not x.is_floating_point():
        return True
    return bool((x.float() if x.element_size() == 1 else x).isfinite().all())  # of 8 bits torch does not know it


def check_files_finite(stage: str, folder: Path) -> None:
    """FloatingPointError that names the file and the tensor, if a safetensors file below has one that is not finite."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if not is_finite(tensors.get_tensor(name)):
                    raise FloatingPointError(
                        f"{stage}: {name} in {file.relative_to(folder)} is not finite: nothing was finished; look for "
                        "what made it so in the weights that it started from, or in the last lines of metrics.jsonl"
                    )
