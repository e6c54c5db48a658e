"""Weights sharded over processes (ZeRO-3, FSDP2), gathered where one process needs all of them.

Sampling reads every weight once per token, so the policy is gathered once per rollout, into an ordinary module; so is
what is to be saved. Where nothing is sharded (one process, DDP, ZeRO-1, ZeRO-2) nothing is copied.
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
    """Whether a prepared module has only a shard of its weights on each process."""
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
    meta = copy.deepcopy(module, weights)
    for part in meta.modules():
        remove_forward_override(part)
    return meta


@torch.no_grad()
def full_state_dict(
    module: nn.Module, names: Container[str] | None = None, device: str | torch.device | None = None
) -> dict[str, Tensor]:
    """Unsharded copies of the named weights (None: of all) on every process; all processes call it together.

    They are gathered one by one and copied to `device` (None: where they were), so that no more than one lies there in
    full beside its shards. Tied weights share their memory here too.
    """
    full: dict[int, Tensor] = {}
    wanted = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if names is None or n in names]
    for _, parameter in wanted:
        if id(parameter) not in full:
            with _gathered(parameter):
                weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                full[id(parameter)] = weight.detach().to(device or weight.device, copy=True)
    return {name: full[id(parameter)] for name, parameter in wanted}


def _gathered(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):  # which ZeRO-3 gives each parameter that it has sharded
        return nullcontext()
    import deepspeed  # it takes seconds to import

    return deepspeed.zero.GatheredParameters([parameter])


@contextmanager
def gathered(module: Model, meta: Model | None) -> Iterator[Model]:
    """Within it `meta`, a `meta_copy`, with the module's gathered weights; the module itself where there is none."""
    if meta is None:
        yield module
        return
    try:
        yield load_full_state_dict(meta, full_state_dict(module))
    finally:
        nothing = {
            name: torch.empty_like(p, device="meta") for name, p in meta.named_parameters(remove_duplicate=False)
        }
        meta.load_state_dict(nothing, strict=False, assign=True)


def load_full_state_dict(meta: Model, weights: dict[str, Tensor]) -> Model:
    """The module of `meta_copy` with these weights, not copied; ValueError if they are another module's."""
    missing, unexpected = meta.load_state_dict(weights, strict=False, assign=True)
    lacking = set(missing) & {name for name, _ in meta.named_parameters(remove_duplicate=False)}
    if lacking or unexpected:
        raise ValueError(f"weights of another module: missing {sorted(lacking)}, unused {sorted(unexpected)}")
    return meta.to(next(iter(weights.values())).device)  # the buffers


def gathering_cost(stage: str, module: nn.Module, meta: nn.Module) -> str:
    """One line on what `gathered` takes, measured by doing it once; all processes have to call it together."""
    started = time.monotonic()
    with gathered(module, meta) as model:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        f"{stage}: the weights are sharded: gathering them for each rollout takes {size / 2**30:.2g} GiB more "
        f"on every process, and {time.monotonic() - started:.1f} s"
    )
