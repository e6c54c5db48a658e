"""Weights that lie in pieces on several processes (ZeRO-3, FSDP2), made whole where one process needs all of them.

Sampling reads every weight once per token, so the policy is put together once per rollout, in an ordinary module; so is
what is to be saved. Where weights are whole already (one process, DDP, ZeRO-1, ZeRO-2) nothing is copied.
"""

import copy
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.runtime.internals import remove_forward_override
from pipeline.runtime.launch import uses_deepspeed

Model = TypeVar("Model", bound=nn.Module)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether preparing a module leaves each process with a piece of its weights."""
    if uses_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def meta_copy(module: Model) -> Model:
    """The module without its weights: they are on the meta device, its buffers are copies.

    A `forward` that a trainer has put on the instance is left behind: its copy would still call the original.
    """
    weights: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    empty = copy.deepcopy(module, weights)
    for part in empty.modules():
        remove_forward_override(part)
    return empty


@torch.no_grad()
def full_state_dict(
    module: nn.Module, names: Container[str] | None = None, device: str | torch.device | None = None
) -> dict[str, Tensor]:
    """Copies of the named weights (None: of all), whole, on every process; all processes have to call it together.

    They are on `device` (None: where they were), one after the other, so that no more than one is twice on the other.
    Weights that share their memory under several names share it here.
    """
    found: dict[int, Tensor] = {}
    wanted = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if names is None or n in names]
    for _, parameter in wanted:
        if id(parameter) not in found:
            with _gathered(parameter):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                found[id(parameter)] = whole.detach().to(device or whole.device, copy=True)
    return {name: found[id(parameter)] for name, parameter in wanted}


def _gathered(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):  # what ZeRO-3 gives each parameter that it has cut
        return nullcontext()
    import deepspeed  # takes seconds: only for whom it serves

    return deepspeed.zero.GatheredParameters([parameter])


@contextmanager
def gathered(module: Model, empty: Model | None) -> Iterator[Model]:
    """The module, or within the context `empty`, made by `meta_copy`, with its weights gathered."""
    if empty is None:
        yield module
        return
    try:
        yield load_full_state_dict(empty, full_state_dict(module))
    finally:
        nothing = {
            name: torch.empty_like(p, device="meta") for name, p in empty.named_parameters(remove_duplicate=False)
        }
        empty.load_state_dict(nothing, strict=False, assign=True)


def load_full_state_dict(empty: Model, weights: dict[str, Tensor]) -> Model:
    """The module of `meta_copy` with these weights, which it takes as they are."""
    missing, unexpected = empty.load_state_dict(weights, strict=False, assign=True)
    lacking = set(missing) & {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    if lacking or unexpected:
        raise ValueError(f"weights of another module: missing {sorted(lacking)}, unused {sorted(unexpected)}")
    return empty.to(next(iter(weights.values())).device)  # the buffers


def gathering_cost(stage: str, module: nn.Module, empty: nn.Module) -> str:
    """One line on what `gathered` takes, measured by doing it once; all processes have to call it together."""
    started = time.monotonic()
    with gathered(module, empty) as model:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        f"{stage}: the weights lie in pieces: to put them together for each rollout takes {size / 2**30:.2g} GiB more "
        f"on every process, and {time.monotonic() - started:.1f} s"
    )
