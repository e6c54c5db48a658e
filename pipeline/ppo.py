"""Stage 4: PPO (Schulman et al., arXiv 1707.06347) on a language model, against a reward model and a frozen reference.

Each rollout is one iteration of the paper's algorithm 1; an episode is one response, an action one token:

    1. collect      the policy answers a batch of prompts
    2. score        reward, values, log-probabilities of policy and reference: once, without gradient
    3. advantages   score and KL as token rewards, GAE, whitening
    4. update       epochs of minibatches of  L = L_policy + vf_coef * L_value - entropy_coef * H
    5. keep         log, steer the KL coefficient, checkpoint; now and then evaluate on held-out prompts

Each mean divides by one number of tokens, counted over all micro-batches and processes of the optimiser step, so
neither changes the mathematics. Models, optimiser and prompts are made in `pipeline.rl.setup`.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from pipeline.config.stages import PPO
from pipeline.evaluation.judges import Judge
from pipeline.rl.experience import Experience, ScoreFunction, make_experience, score_rollout
from pipeline.rl.monitor import check_first_rollout, log_rollout, reason_to_stop
from pipeline.rl.progress import evaluate_and_record, finish, save_progress_if_due, start_or_resume
from pipeline.rl.setup import open_stage, set_up
from pipeline.rl.update import UpdateStatistics, minibatch_step
from pipeline.runtime.console import silence_libraries
from pipeline.runtime.precision import autocast


def train(config: PPO, score: ScoreFunction | None = None, judges: Mapping[str, Judge] | None = None) -> Path:
    """Trains the policy and returns its `final` directory.

    `score` replaces the reward model's score when given (with a critic that is not made from it, no reward model is
    read); `judges` give each text a number for the evaluations, as `judge_file` does, and have no part in training.
    A finished stage is told apart by their names, not by what they compute.
    """
    silence_libraries()
    stage = open_stage(config, score, judges)
    if stage.is_finished():
        return stage.final
    with stage:
        setup = set_up(stage, config, score, judges)
        progress = start_or_resume(setup)
        steps = range(progress.rollouts, config.rollouts)
        for step, prompts in zip(steps, setup.prompt_batches(skip=progress.rollouts), strict=False):
            if step % config.eval_steps == 0:
                evaluate_and_record(setup, progress)
                if reason_to_stop(progress.history, config):
                    break
            stage.heartbeat.enter(f"rollout {step}")
            started = time.monotonic()
            with autocast(config.run.precision):
                # 1. Collect
                rollout = setup.sample(prompts)
                sampled = time.monotonic()
                # 2. Score
                scored = score_rollout(rollout, setup.prepared, setup.reference, setup.score, config.micro_batch)
                # 3. Advantages
                experience = make_experience(rollout, scored, config, progress.kl_coef, setup.reduce)
            check_first_rollout(step, experience, setup.accelerator)
            # 4. Update
            stage.heartbeat.enter(f"update {step}")
            metrics, progress.skipped = update(
                setup.prepared, setup.optimizer, experience, config, setup.accelerator,
                update_policy=step >= config.critic_warmup, skipped=progress.skipped,
            )  # fmt: skip
            # 5. Keep
            metrics |= log_rollout(setup, step, experience, metrics, progress.kl_coef, started, sampled)
            setup.scheduler.step()
            progress.advance(metrics["kl"], config)
            save_progress_if_due(setup, progress)
        else:
            evaluate_and_record(setup, progress)
        return finish(setup, progress)


def update(
    actor_critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPO,
    accelerator: Accelerator,
    update_policy: bool,
    skipped: int = 0,
) -> tuple[dict[str, float], int]:
    """Epochs of minibatches on one experience; returns the masked global means of what happened in them.

    Without `update_policy` only the critic learns: the policy's gradient is zero, and Adam leaves it where it is. A
    step whose gradient is not finite is skipped on every process and counted; `skipped` of them in a row came before,
    and how many there are in a row now is returned. Raises FloatingPointError when they are too many.
    """
    actor_critic.train(config.gradient_checkpointing)
    statistics = UpdateStatistics(accelerator, skipped)
    for _ in range(config.num_ppo_epochs):
        for rows in torch.randperm(len(experience)).split(len(experience) // config.num_mini_batches):
            minibatch = experience[rows]
            statistics.add(minibatch_step(actor_critic, optimizer, minibatch, config, accelerator, update_policy))
        statistics.epochs += 1
        if config.target_kl is not None and statistics.recent_kl(config.num_mini_batches) > 1.5 * config.target_kl:
            break
    actor_critic.eval()
    return statistics.means(), statistics.skipped_in_a_row
