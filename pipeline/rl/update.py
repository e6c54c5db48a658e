"""One optimiser step of PPO on a minibatch: loss, gradients over micro-batches and processes, the step, its figures."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.config.stages import PPO
from pipeline.core.losses import policy_loss, value_loss
from pipeline.core.tensors import masked_mean
from pipeline.rl.experience import Experience
from pipeline.runtime.launch import uses_deepspeed
from pipeline.runtime.precision import autocast

EXTREMES = {"ratio_min": torch.amin, "ratio_max": torch.amax}  # of an update, where all else is a mean
MAX_SKIPPED_STEPS = 5  # in a row without a finite gradient, before the run is stopped


def ppo_loss(
    actor_critic: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]],
    batch: Experience,
    config: PPO,
    tokens: Tensor,
    update_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of L = L_policy + vf_coef * L_value - entropy_coef * H, and of each logged mean.

    `tokens` is the number of response tokens in the optimiser step, over all its micro-batches and processes.
    """
    mask = batch.response_mask
    logprobs, entropies, values = actor_critic(
        batch.input_ids, batch.attention_mask, batch.response_tokens, update_policy
    )
    if config.entropy_coef == 0:
        entropies = entropies.detach()  # logged all the same, without the cost of its gradient
    per_token, policy_stats = policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, config.cliprange)
    value_per_token, value_stats = value_loss(values, batch.old_values, batch.returns, mask, config.cliprange_value)

    def mean(x: Tensor) -> Tensor:
        return masked_mean(x, mask, tokens)

    policy, value, entropy = mean(per_token), mean(value_per_token), mean(entropies)
    loss = config.vf_coef * value + float(update_policy) * (policy - config.entropy_coef * entropy)
    means = {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": entropy}
    means |= {
        "approx_kl": mean(policy_stats["approx_kl"]),
        "clip_fraction": mean(policy_stats["clipped"].float()),
        "value_clip_fraction": mean(value_stats["clipped"].float()),
        "ratio": mean(policy_stats["ratio"]),
        "ratio_min": policy_stats["ratio"].masked_fill(~mask, torch.inf).min(),
        "ratio_max": policy_stats["ratio"].masked_fill(~mask, 0).max(),
    }
    return loss, {name: value.detach() for name, value in means.items()}


def minibatch_step(
    actor_critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    minibatch: Experience,
    config: PPO,
    accelerator: Accelerator,
    update_policy: bool,
) -> dict[str, Tensor]:
    """One optimiser step on this process's share of a minibatch; its parts of the logged means, and `grad_norm`.

    The step is skipped, on every process, where the gradient's norm is not finite.
    """
    tokens = accelerator.reduce(minibatch.response_mask.sum(), "sum")
    figures: dict[str, Tensor] = {}
    parts = minibatch.micro_batches(torch.arange(len(minibatch)), config.micro_batch)
    for number, part in enumerate(parts):
        accelerator.sync_gradients = last = number == len(parts) - 1
        with nullcontext() if last or uses_deepspeed(accelerator) else accelerator.no_sync(actor_critic):
            with autocast(config.run.precision):
                loss, sums = ppo_loss(actor_critic, part, config, tokens, update_policy)
            # DDP averages gradients over processes; the sum over tokens wants their total.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in sums.items():
            combine = EXTREMES.get(name, torch.sum)
            figures[name] = combine(torch.stack([figures[name], value]), 0) if name in figures else value
    figures |= clip_and_step(actor_critic, optimizer, accelerator, config.max_grad_norm)
    if not update_policy:
        restart_policy_moments_(optimizer, accelerator)
    return figures


def clip_and_step(
    actor_critic: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float
) -> dict[str, Tensor]:
    """Clips the gradients of policy and of critic, each to max_norm, and steps, unless one of them is not finite.

    Returns `grad_norm`, over both, and `policy_grad_norm`, `critic_grad_norm`. The same on every process, since
    gradients are averaged over processes before. Gradients are gone afterwards.
    """
    if uses_deepspeed(accelerator):  # it has done all that in the last backward, see `clip_partitions_`
        not_stepped = torch.tensor(torch.inf, device=accelerator.device)
        policy, critic = (group.pop("norm", not_stepped) for group in optimizer.param_groups)
        both = torch.tensor(float(actor_critic.get_global_grad_norm()), device=accelerator.device)  # type: ignore[operator]
    else:
        accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(group["params"], max_norm) for group in optimizer.param_groups]
        policy, critic = (norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms)
        both = torch.hypot(policy, critic)
        if both.isfinite() or accelerator.scaler is not None:  # a scaler skips by itself, and lowers its scale for it
            optimizer.step()
        optimizer.zero_grad()
    return {"grad_norm": both, "policy_grad_norm": policy, "critic_grad_norm": critic}


def clip_partitions_(
    optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, *, accelerator: Accelerator, max_norm: float
) -> None:
    """Before a step under DeepSpeed: clips each group's gradient, of which this process has a part, and notes its norm.

    DeepSpeed itself would clip by one norm over both groups. ZeRO-3 steps a group in parts where it has more than 1e9
    weights; each is then clipped by its own norm.
    """
    for group in optimizer.param_groups:
        if group["params"]:
            part = nn.utils.get_total_norm([parameter.grad for parameter in group["params"]])
            group["norm"] = accelerator.reduce(part.square(), "sum").sqrt()
            nn.utils.clip_grads_with_norm_(group["params"], max_norm, group["norm"])


def restart_policy_moments_(optimizer: Any, accelerator: Accelerator) -> None:
    """Sets back Adam's count of steps for the policy, whose moments are still zero while only the critic learns.

    Its bias correction (Kingma & Ba, arXiv 1412.6980, algorithm 1) then starts with the first gradient: counted from
    the critic's first step, the policy's first steps are too long (docs/log.md).
    """
    if uses_deepspeed(accelerator):  # whose states are of whole groups, under tensors of its own
        states = [state for state in optimizer.state.values() if not state["exp_avg_sq"].any()]
    else:
        states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"] if p in optimizer.state]
    for state in states:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0


class UpdateStatistics:
    """The figures of one update, and how many optimiser steps in a row had no finite gradient."""

    def __init__(self, accelerator: Accelerator, skipped_in_a_row: int) -> None:
        """`skipped_in_a_row` came before this update."""
        self.accelerator = accelerator
        self.epochs = self.skipped = 0
        self.skipped_in_a_row = skipped_in_a_row
        self.steps: dict[str, list[Tensor]] = {}

    def add(self, figures: dict[str, Tensor]) -> None:
        """Takes a step's figures. Raises FloatingPointError when too many in a row were not finite."""
        norm = figures["grad_norm"]
        if norm.isfinite():
            self.skipped_in_a_row = 0
            for name, value in figures.items():
                value = value / self.accelerator.num_processes if "grad_norm" in name else value  # summed over them
                self.steps.setdefault(name, []).append(value)
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row > MAX_SKIPPED_STEPS:
            causes = [
                name for name, value in sorted(figures.items()) if "grad_norm" not in name and not value.isfinite()
            ]
            raise FloatingPointError(
                f"ppo: {self.skipped_in_a_row} optimiser steps in a row have no finite gradient; not finite here: "
                f"{', '.join(causes) or 'only the gradient'}. Nothing was written: lower the learning rates, or "
                "look at the last lines of metrics.jsonl"
            )

    def recent_kl(self, steps: int) -> float:
        """Mean `approx_kl` of the last steps over all processes, nats per token; 0 before the first."""
        recent = self.steps.get("approx_kl", [])[-steps:]
        return self.accelerator.reduce(torch.stack(recent).mean(), "sum").item() if recent else 0.0

    def means(self) -> dict[str, float]:
        """Masked global means over the steps; extremes where the name says so."""
        metrics: dict[str, float] = {"update_epochs": self.epochs, "skipped_updates": self.skipped}
        for name, values in sorted(self.steps.items()):
            if name in EXTREMES:
                metrics[name] = EXTREMES[name](self.accelerator.gather(torch.stack(values)), 0).item()
            else:
                metrics[name] = self.accelerator.reduce(torch.stack(values).mean(), "sum").item()
        return metrics
