"""What PPO keeps: the best policy so far, what a run that was cut off goes on with, and what is written in the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.stages import PPO
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.heads import Critic, ValueHead
from pipeline.models.loading import full_precision_base, unwrap_peft
from pipeline.models.multi_adapter import CRITIC, REFERENCE, hash_trunk
from pipeline.models.saving import save_policy
from pipeline.models.sharding import full_state_dict, load_full_state_dict
from pipeline.rl.monitor import Evaluation, reason_to_stop
from pipeline.runtime.checkpoints import Checkpoint, load_training, save_training
from pipeline.runtime.console import print_main
from pipeline.runtime.process import is_main
from pipeline.runtime.stage_run import StageRun

BEST = "best.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights, its optimiser and its random states."""

    rollouts: int  # done
    history: list[Evaluation]
    skipped: int  # optimiser steps in a row whose gradient was not finite
    kl_coef: float  # of the next rollout


def record_evaluation(
    stage: StageRun, step: int, found: Evaluation, actor_critic: ActorCritic, history: list[Evaluation]
) -> Evaluation:
    """Logs an evaluation and eight of its samples; returns it with the weights when it is the best so far.

    Then those of the best before it are let go. The weights are in ordinary memory, of the main process alone.
    """
    if not all(math.isfinite(value) for value in found.metrics.values()):
        raise FloatingPointError(f"ppo: evaluation at rollout {step} is not finite: {found.metrics}")
    stage.log(step, found.metrics)
    if found.metrics["eval_eos_share"] == 0:
        print_main(
            f"ppo: no response of the evaluation at rollout {step} ended by itself: all were cut at max_new_tokens and "
            "have missing_eos_score for their score, unless that is none. Raise max_new_tokens, or train SFT on "
            "completions that end"
        )
    stage.sample([{"step": step, **row} for row in found.samples[:8]], step)
    is_best = all(found.reward > before.reward for before in history)
    trained = {name for name, p in actor_critic.named_parameters() if p.requires_grad}
    weights = full_state_dict(actor_critic, trained, "cpu") if is_best else {}
    if is_best:
        history[:] = [replace(before, weights={}) for before in history]
    return replace(found, step=step, weights=weights if is_main() else {})


def save_progress(
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


def load_progress(
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


def restore_kept(
    history: Sequence[Evaluation], actor_critic: ActorCritic, empty: ActorCritic | None, config: PPO
) -> tuple[ActorCritic, dict[str, Any]]:
    """The module with the weights to be kept, whole, and the metrics of their evaluation.

    Those of the best evaluation by reward, or of the last rollout when `keep` says so and no alarm was raised.
    """
    if empty is not None:
        actor_critic = load_full_state_dict(empty, full_state_dict(actor_critic))
    wrong, last = reason_to_stop(history, config), history[-1]
    kept = max(history, key=lambda found: found.reward) if wrong or config.keep == "best" else last
    if wrong:
        print_main(f"ppo: stopped at rollout {last.step}: {wrong}; back to rollout {kept.step}, the best so far")
    if kept is not last and is_main():  # which alone will write them
        actor_critic.load_state_dict(kept.weights, strict=False)
    score, kl = kept.metrics["eval_score"], kept.metrics["eval_kl"]
    print_main(f"ppo: kept rollout {kept.step}: validation score {score:+.2f}, KL {kl:.2f} nats per response")
    return actor_critic, {**kept.metrics, "kept_rollout": kept.step, "stopped": wrong}


def role_origins(actor_critic: ActorCritic) -> dict[str, str]:
    """What each role started from and stands on, for DONE.json."""
    policy, critic = actor_critic.policy, actor_critic.critic
    is_adapter = isinstance(critic, ValueHead) and critic.role == CRITIC
    found = {
        "policy": "all of SFT's weights",
        "reference": "a frozen copy",
        "critic": "a model of its own" if isinstance(critic, Critic) else "a head on the policy",
        "reward": "a model or function of its own",
    }
    if not isinstance(policy, PeftModel):
        return found
    is_copy, on_base = REFERENCE in policy.peft_config, "an adapter on the base"
    return found | {
        "base": hash_trunk(full_precision_base(unwrap_peft(policy))),
        "policy": "a copy of SFT's adapter" if is_copy else "a new adapter on SFT",
        "reference": "SFT's adapter" if is_copy else "the base",
        "critic": on_base if is_adapter else found["critic"],
        "reward": found["reward"] if actor_critic.reward is None else on_base,
    }


def save_actor_critic(actor_critic: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The policy at the top of the folder and the critic in `critic/`; both load with `from_pretrained`.

    Raises FloatingPointError for a weight that is not finite: nothing of it is ever finished.
    """
    for name, parameter in actor_critic.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"ppo: {name} is not finite after training; nothing was written")
    save_policy(actor_critic.policy, tokenizer, folder)
    actor_critic.save_critic(folder / "critic")
