"""Where a run of PPO stands: what is resumed, the best policy so far, and what is written in the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from pipeline.config.stages import PPO
from pipeline.core.advantages import next_kl_coef
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.heads import Critic, ValueHead
from pipeline.models.loading import full_precision_base, unwrap_peft
from pipeline.models.multi_adapter import CRITIC, REFERENCE, hash_trunk
from pipeline.models.saving import save_policy
from pipeline.models.sharding import full_state_dict, load_full_state_dict
from pipeline.rl.monitor import Evaluation, evaluate_policy, reason_to_stop
from pipeline.rl.setup import Setup
from pipeline.runtime.checkpoints import load_training, save_training, trained_numbers, training_bytes, weight_bytes
from pipeline.runtime.console import print_main
from pipeline.runtime.finite import check_finite
from pipeline.runtime.process import is_main
from pipeline.runtime.stage_run import StageRun

BEST = "best.safetensors"


@dataclass
class Progress:
    """The state of a run beside its weights, its optimiser and its random states."""

    kl_coef: float  # of the next rollout; the dial's value until `adaptive_kl` steers it
    rollouts: int = 0  # done
    skipped: int = 0  # optimiser steps in a row whose gradient was not finite
    history: list[Evaluation] = field(default_factory=list)

    def advance(self, kl: float, config: PPO) -> None:
        """One rollout more, of so many nats per response: with `adaptive_kl` the coefficient is steered."""
        self.rollouts += 1
        if config.adaptive_kl is not None:
            self.kl_coef = next_kl_coef(
                self.kl_coef, kl, config.adaptive_kl, config.rollout_batch, config.adaptive_kl_horizon
            )


def start_or_resume(setup: Setup) -> Progress:
    """A fresh run's progress; or the checkpoint's, with module, optimiser, scheduler and random states put back."""
    stage, checkpoint = setup.stage, setup.stage.resume_from
    stage.check_disk(*disk_needs(setup))
    stage.interrupts.phase = "stepping"
    if checkpoint is None:
        return Progress(setup.config.kl_coef)
    accelerator, state = setup.accelerator, checkpoint.facts["state"]
    load_training(accelerator, setup.prepared, setup.optimizer, checkpoint.folder)
    setup.scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(setup.optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    sft_scores = torch.tensor(state["sft_scores"][accelerator.process_index :: accelerator.num_processes])
    history = [
        Evaluation(row["step"], row["metrics"], [], torch.empty(0) if n else sft_scores.to(accelerator.device))
        for n, row in enumerate(state["history"])
    ]
    if is_main():
        best = max(history, key=lambda evaluation: evaluation.reward)
        best.weights.update(load_file(checkpoint.folder / BEST))
    return Progress(state["kl_coef"], checkpoint.step, state["skipped"], history)


def disk_needs(setup: Setup) -> tuple[int, int, int]:
    """Bytes of a checkpoint, with the best weights so far in it; how many the run writes; bytes of `final/`.

    A critic that is a head or an adapter on the policy's base is written with a copy of that base.
    """
    config, module = setup.config, setup.actor_critic
    best, every = 4 * trained_numbers(module), config.run.save_steps
    critic = module.critic if isinstance(module.critic, Critic) else module.policy
    final = weight_bytes(module.policy) + weight_bytes(critic)
    return training_bytes(module) + best, (config.rollouts - 1) // every if every else 0, final


def save_progress_if_due(setup: Setup, progress: Progress) -> None:
    """Every `save_steps` rollouts, writes all that decides how the run goes on, so that it goes on to the bit.

    Not after the last rollout: its work is in `final/`. Also when the stage is told to stop, which ends it here.
    """
    every, is_last = setup.config.run.save_steps, progress.rollouts == setup.config.rollouts
    is_told_to_stop = setup.stage.interrupts.asked_to_stop()
    if every and (is_told_to_stop or (progress.rollouts % every == 0 and not is_last)):
        save_progress(setup, progress)
    if is_told_to_stop:
        setup.stage.stop(progress.rollouts)


def save_progress(setup: Setup, progress: Progress) -> None:
    """A checkpoint of the rollouts done; FloatingPointError for a weight that is not finite."""
    trained = ((name, p) for name, p in setup.actor_critic.named_parameters() if p.requires_grad)
    check_finite("ppo", trained, f"after rollout {progress.rollouts}")
    # Prompt i is process i mod n's.
    sft_scores = zip(*gather_object([progress.history[0].scores.tolist()]), strict=True)
    state = {
        "history": [{"step": evaluation.step, "metrics": evaluation.metrics} for evaluation in progress.history],
        "sft_scores": [score for row in sft_scores for score in row],
        "skipped": progress.skipped,
        "kl_coef": progress.kl_coef,
        "scheduler": setup.scheduler.state_dict(),
    }

    def write(folder: Path) -> None:
        save_training(setup.accelerator, setup.prepared, setup.optimizer, folder)
        if is_main():
            best = max(progress.history, key=lambda evaluation: evaluation.reward)
            save_file({name: weight.contiguous() for name, weight in best.weights.items()}, folder / BEST)

    setup.stage.save_checkpoint(progress.rollouts, write, state)


def evaluate_and_record(setup: Setup, progress: Progress) -> None:
    """Evaluates the policy after the rollouts done, and appends what was found to the history."""
    setup.stage.heartbeat.enter(f"evaluation {progress.rollouts}")
    evaluation = evaluate_policy(setup, progress.rollouts, progress.history)
    record_evaluation(setup.stage, evaluation, setup.actor_critic, progress.history)


def record_evaluation(
    stage: StageRun, evaluation: Evaluation, actor_critic: ActorCritic, history: list[Evaluation]
) -> None:
    """Logs an evaluation and eight of its samples, and appends it to the history, with the weights if it is the best.

    Then those of the best before it are let go. The weights are in ordinary memory, of the main process alone.
    """
    step, metrics = evaluation.step, evaluation.metrics
    if not all(math.isfinite(value) for value in metrics.values()):
        raise FloatingPointError(f"ppo: evaluation at rollout {step} is not finite: {metrics}")
    stage.log(step, metrics)
    if metrics["eval_eos_share"] == 0:
        print_main(
            f"ppo: no response of the evaluation at rollout {step} ended by itself: all were cut at max_new_tokens and "
            "have missing_eos_score for their score, unless that is none. Raise max_new_tokens, or train SFT on "
            "completions that end"
        )
    stage.log_samples([{"step": step, **row} for row in evaluation.samples[:8]], step)
    if all(evaluation.reward > before.reward for before in history):
        trained = {name for name, p in actor_critic.named_parameters() if p.requires_grad}
        weights = full_state_dict(actor_critic, trained, "cpu")  # by all processes together
        evaluation = replace(evaluation, weights=weights if is_main() else {})
        history[:] = [replace(before, weights={}) for before in history]
    history.append(evaluation)


def finish(setup: Setup, progress: Progress) -> Path:
    """Writes the policy to be kept, and returns the stage's `final` directory."""
    kept, metrics = restore_kept(progress.history, setup.actor_critic, setup.meta, setup.config)
    return setup.stage.finish(
        partial(save_actor_critic, kept, setup.tokenizer), metrics | {"roles": role_origins(kept)}
    )


def restore_kept(
    history: Sequence[Evaluation], actor_critic: ActorCritic, meta: ActorCritic | None, config: PPO
) -> tuple[ActorCritic, dict[str, Any]]:
    """The module with the weights to be kept, unsharded, and the metrics of their evaluation.

    Those of the best evaluation by reward, or of the last rollout when `keep` says so and there is no reason to stop.
    """
    if meta is not None:
        actor_critic = load_full_state_dict(meta, full_state_dict(actor_critic))
    reason, last = reason_to_stop(history, config), history[-1]
    best = max(history, key=lambda evaluation: evaluation.reward)
    kept = best if reason or config.keep == "best" else last
    if reason:
        print_main(f"ppo: stopped at rollout {last.step}: {reason}; back to rollout {kept.step}, the best so far")
    if kept is not last and is_main():  # which alone will write them
        actor_critic.load_state_dict(kept.weights, strict=False)
    score, kl = kept.metrics["eval_score"], kept.metrics["eval_kl"]
    print_main(f"ppo: kept rollout {kept.step}: validation score {score:+.2f}, KL {kl:.2f} nats per response")
    return actor_critic, {**kept.metrics, "kept_rollout": kept.step, "stopped": reason}


def role_origins(actor_critic: ActorCritic) -> dict[str, str]:
    """What each role started from and stands on, for DONE.json."""
    policy, critic = actor_critic.policy, actor_critic.critic
    is_adapter = isinstance(critic, ValueHead) and critic.adapter == CRITIC
    origins = {
        "policy": "all of SFT's weights",
        "reference": "a frozen copy",
        "critic": "a model of its own" if isinstance(critic, Critic) else "a head on the policy",
        "reward": "a model or function of its own",
    }
    if not isinstance(policy, PeftModel):
        return origins
    is_copy, on_base = REFERENCE in policy.peft_config, "an adapter on the base"
    return origins | {
        "base": hash_trunk(full_precision_base(unwrap_peft(policy))),
        "policy": "a copy of SFT's adapter" if is_copy else "a new adapter on SFT",
        "reference": "SFT's adapter" if is_copy else "the base",
        "critic": on_base if is_adapter else origins["critic"],
        "reward": origins["reward"] if actor_critic.reward is None else on_base,
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
