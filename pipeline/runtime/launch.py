"""Which strategy `accelerate launch` asks for, and whether it is the one that runs: DDP, DeepSpeed or FSDP."""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.config.errors import UserError
from pipeline.runtime.precision import resolve_precision
from pipeline.runtime.process import processes

LAUNCH_PRECISION = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
"""Read at import, since transformers' trainers overwrite the variable."""


def new_accelerator(precision: str) -> Accelerator:
    """Accelerate for this launch; a loss scale for fp16. bf16 is `precision.autocast`'s, and weights stay fp32.

    DeepSpeed and FSDP are given no precision: they would round the weights themselves. UserError for a launch that runs
    another strategy than it asks for, or that contradicts the dials.
    """
    device, precision = processes().device.type, resolve_precision(precision)
    if precision == "fp16" and (requested_backend() != "DDP" or device != "cuda"):
        where = requested_backend() if device == "cuda" else "a CPU"
        raise UserError(
            f"precision: fp16 wants a loss scale, which CUDA GPUs have under DDP; on {where} say --precision bf16"
        )
    if LAUNCH_PRECISION not in ("no", precision):
        raise UserError(
            f"the launch says mixed_precision: {LAUNCH_PRECISION}, the recipe precision: {precision}: change one "
            '(mixed_precision: "no" leaves it to the recipe)'
        )
    accelerator = validate_launch(Accelerator(mixed_precision="fp16" if precision == "fp16" else "no"))
    keep_torch_optimizer(accelerator)
    unset_hf_deepspeed_config()  # else from_pretrained would shard every model as it is loaded
    return accelerator


def check_deepspeed(deepspeed: dict[str, Any]) -> None:
    """UserError for a setting of DeepSpeed's config that is for the dials to decide."""
    for key, dials in (
        (
            "gradient_accumulation_steps",
            "batch_size / micro_batch (PPO: rollout_batch / num_mini_batches / micro_batch)",
        ),
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


def keep_torch_optimizer(accelerator: Accelerator) -> None:
    """Keeps DeepSpeed from replacing an optimiser that it offloads to the CPU, which would lose the groups' rates."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def requested_backend() -> str:
    """DEEPSPEED, FSDP or DDP: what the launch asks of Accelerate, in its environment variables."""
    return next((kind for kind in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"), "DDP")


def parallel_strategy() -> str:
    """DDP (also for one process), ZeRO-1, ZeRO-2, ZeRO-3 or FSDP2."""
    if requested_backend() == "DEEPSPEED":
        return f"ZeRO-{AcceleratorState().deepspeed_plugin.zero_stage}"
    return "FSDP2" if requested_backend() == "FSDP" else "DDP"


def validate_launch(accelerator: Accelerator) -> Accelerator:
    """The accelerator, if it has the strategy and the processes that the launch asks for; else UserError names both.

    Accelerate falls back without a word: an environment variable turns DeepSpeed into DDP, and FSDP on CPUs becomes
    separate copies, each trained alone.
    """
    world, started = int(os.environ.get("WORLD_SIZE", 1)), accelerator.distributed_type.value
    is_other = (started if started in ("DEEPSPEED", "FSDP") else "DDP") != requested_backend()
    if is_other or accelerator.num_processes != world:
        why = (
            ": FSDP cuts models on GPUs only"
            if requested_backend() == "FSDP" and accelerator.device.type == "cpu"
            else ""
        )
        raise UserError(
            f"the launch asks for {requested_backend()} on {world} processes, but Accelerate has started {started} "
            f"with {accelerator.num_processes}{why}; look at the file given to --config_file, and for "
            "ACCELERATE_USE_CPU in the environment"
        )
    return accelerator


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed's engine does the accumulation, clipping and steps; `sync_gradients` says when it steps."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED
