"""Stage 4: PPO (Schulman et al., arXiv 1707.06347) on a language model, against a reward model and a frozen reference.

    for each rollout:
        generate         prompts -> responses sampled from the policy
        to_experience    old log-probabilities, values, k1 KL, token rewards, GAE, whitening: once, without gradient
        update           epochs x minibatches of   L = L_policy + vf_coef * L_value - entropy_coef * H

Policy and critic are one module with one optimiser, prepared once. Each mean divides by one number of tokens, counted
over all micro-batches and processes of the optimiser step, so neither changes the mathematics.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.dials import Sampling, exact
from pipeline.config.errors import UserError
from pipeline.config.stages import PPO
from pipeline.core.advantages import next_kl_coef
from pipeline.core.losses import policy_loss, value_loss
from pipeline.core.tensors import masked_mean
from pipeline.data.formats import Text
from pipeline.data.sources import hash_sources
from pipeline.data.tokenizer import load_shared_tokenizer
from pipeline.evaluation.judges import Vader, fit_judge
from pipeline.models.actor_critic import ActorCritic, add_reward_model
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import Critic, ValueHead, new_classifier
from pipeline.models.loading import Policy, check_model, freeze, load_policy, unwrap_peft
from pipeline.models.multi_adapter import CRITIC, REFERENCE, REWARD, adapter_config, add_adapter, copy_adapter
from pipeline.models.sharding import gathered, gathering_cost, is_sharded, meta_copy
from pipeline.rl.experience import Experience, Forward, ScoreFunction, to_experience
from pipeline.rl.monitor import EVALUATED, Judge, check_first_rollout, evaluate_policy, reason_to_stop, rollout_metrics
from pipeline.rl.progress import (
    Progress,
    load_progress,
    record_evaluation,
    restore_kept,
    role_origins,
    save_actor_critic,
    save_progress,
)
from pipeline.rl.rewards import adapter_reward_scores, reward_model_scores
from pipeline.rl.rollout import Rollout, generate, read_prompts
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.launch import new_accelerator, uses_deepspeed
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun

EXTREMES = {"ratio_min": torch.amin, "ratio_max": torch.amax}  # of an update, where all else is a mean
MOST_SKIPPED = 5  # optimiser steps in a row without a finite gradient before the run is stopped


def train(config: PPO, score: ScoreFunction | None = None, judges: Mapping[str, Judge] | None = None) -> Path:
    """Trains the policy and returns its `final` directory.

    `score` replaces the reward model's score when given (with a critic that is not made from it, no reward model is
    read); `judges` give each text a number for the evaluations, as `judge_file` does, and have no part in training.
    A finished stage is told apart by their names, not by what they compute.
    """
    silence_libraries()
    config.micro_batches(processes().num_processes)  # a batch that does not divide is refused before any work
    exact(config.eval_prompts, processes().num_processes, "eval_prompts / processes")
    parents = {"sft": config.run.final("sft", config.sft)}
    if score is None or config.critic == "reward":
        parents["reward"] = config.run.final("reward", config.reward)
    files = [file for file in (config.train_file, config.validation_file, config.judge_file) if file]
    given = {} if score is None else {"score": getattr(score, "__name__", type(score).__name__)}
    given |= {} if judges is None else {"judges": ",".join(judges)}
    if names := set(judges or {}) & set(EVALUATED):
        raise UserError(f"judges: {', '.join(sorted(names))}: figures of that name are measured already; choose others")
    stage = StageRun("ppo", config, parents, hash_sources(files), given)
    if stage.is_finished():
        return stage.final
    with stage:
        accelerator = new_accelerator(config.run.precision)
        set_seed(config.run.seed)  # the same weights on every process
        tokenizer = load_shared_tokenizer(parents)
        longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
        policy = load_policy(parents["sft"], config.adapter)
        check_model(unwrap_peft(policy), tokenizer, longest, parents["sft"])
        reward_model = add_reward_model(parents["reward"], policy) if "reward" in parents else None
        critic = add_critic(config.critic, policy, reward_model, tokenizer.pad_token_id)
        reward_head = reward_model if isinstance(reward_model, ValueHead) else None
        pad_id, temperature = tokenizer.pad_token_id, config.sampling.temperature
        actor_critic = ActorCritic(policy, critic, temperature, pad_id, reward_head).eval()
        reference_model = None if isinstance(policy, PeftModel) else freeze(deepcopy(policy)).to(accelerator.device)
        if config.gradient_checkpointing:
            actor_critic.checkpoint_activations()
        empty = meta_copy(actor_critic) if is_sharded(accelerator) else None
        optimizer, scheduler = make_optimizer(actor_critic, config)
        prepared, optimizer = prepare(accelerator, actor_critic, optimizer, config)
        # Other samples on every process; not seed + 1, which is another run's.
        set_seed(config.run.seed + 100_003 * accelerator.process_index)

        prompts = read_prompts(config.train_file, 0, tokenizer, config)
        held_out = read_prompts(config.validation_file, config.eval_prompts, tokenizer, config)
        exact(len(held_out), accelerator.num_processes, f"prompts of {config.validation_file} / processes")
        batches = prompt_batches(len(prompts), config.rollout_batch, config.run.seed)
        if score is None:
            score = make_score(prepared, reward_model, accelerator.device)
        if judges is None and config.judge_file and accelerator.is_main_process:
            judges = {"vader": Vader(), "classifier": fit_judge(config.judge_file, config.run.seed)}
        reference = make_reference(prepared, reference_model, actor_critic.temperature, actor_critic.pad_id)
        experience_of = partial(
            to_experience, actor_critic=prepared, reference=reference, score=score,
            reduce=partial(accelerator.reduce, reduction="sum"),
        )  # fmt: skip
        sample = partial(sampled, actor_critic, empty, tokenizer, config.sampling)
        evaluate = partial(evaluate_policy, held_out, sample, tokenizer, experience_of, accelerator, judges or {})
        if empty is not None:
            print_main(gathering_cost("ppo", actor_critic.policy, empty.policy))
        progress = Progress(0, [], 0, config.kl_coef)
        if stage.resumed:
            progress = load_progress(stage.resumed, accelerator, prepared, optimizer, scheduler)
            config = replace(config, kl_coef=progress.kl_coef)
        history, skipped = progress.history, progress.skipped
        for _ in range(progress.rollouts):
            next(batches)
        for step in range(progress.rollouts, config.rollouts):
            if step % config.eval_steps == 0:
                stage.heartbeat.enter(f"evaluation {step}")
                history.append(record_evaluation(stage, step, evaluate(config, history), actor_critic, history))
                if reason_to_stop(history, config):
                    break
            started = time.monotonic()
            stage.heartbeat.enter(f"rollout {step}")
            mine = next(batches)[accelerator.process_index :: accelerator.num_processes]
            with autocast(config.run.precision):
                rollout = sample([prompts[row] for row in mine])
                sampling_seconds = time.monotonic() - started
                experience = experience_of(rollout, config=config)
            check_first_rollout(step, experience, accelerator)
            stage.heartbeat.enter(f"update {step}")
            trains_policy = step >= config.critic_warmup
            metrics, skipped = update(prepared, optimizer, experience, config, accelerator, trains_policy, skipped)
            metrics |= rollout_metrics(experience, accelerator, config)
            metrics |= {
                "learning_rate": optimizer.param_groups[0]["lr"],
                "sampling_seconds": sampling_seconds,
                "seconds": time.monotonic() - started,
                "tokens_per_second": metrics["length"] * config.rollout_batch / (time.monotonic() - started),
            }
            scheduler.step()
            config = adapted(config, metrics["kl"])
            stage.log(step, metrics)
            stage.progress(
                config.rollouts, step + 1,
                score=f"{metrics['score']:+.2f}", kl=f"{metrics['kl']:.2f}", length=f"{metrics['length']:.0f}",
                **{"tokens/s": f"{metrics['tokens_per_second']:,.0f}"},
            )  # fmt: skip
            if due(step + 1, config):
                progress = Progress(step + 1, history, skipped, config.kl_coef)
                save_progress(stage, progress, accelerator, prepared, optimizer, scheduler)
        else:
            history.append(record_evaluation(stage, config.rollouts, evaluate(config, history), actor_critic, history))
        kept, summary = restore_kept(history, actor_critic, empty, config)
        return stage.finish(partial(save_actor_critic, kept, tokenizer), summary | {"roles": role_origins(kept)})


def due(done: int, config: PPO) -> bool:
    """Whether a checkpoint is made after so many rollouts; the last one's work is in `final/`."""
    return bool(config.run.save_steps) and done % config.run.save_steps == 0 and done < config.rollouts


def add_critic(
    kind: str, policy: Policy, reward_model: PreTrainedModel | ValueHead | None, pad_id: int
) -> Critic | ValueHead:
    """What `critic` names: a model of its own or a role on the policy's base, from the reward model or from SFT, or a
    head on the policy's trunk.

    A role where what it is made from is one, and from SFT where the policy is an adapter.
    """
    width = unwrap_peft(policy).config.hidden_size
    if kind == "head":
        return ValueHead(width)
    if kind == "reward" and isinstance(reward_model, PreTrainedModel):
        return Critic(reward_model)
    if not isinstance(policy, PeftModel):
        return Critic(new_classifier(policy, pad_id))
    critic = ValueHead(width, CRITIC)
    if kind == "reward":
        assert isinstance(reward_model, ValueHead)
        copy_adapter(policy, REWARD, CRITIC)
        critic.load_state_dict(reward_model.state_dict())
    elif REFERENCE in policy.peft_config:
        copy_adapter(policy, REFERENCE, CRITIC)
    else:
        add_adapter(policy, CRITIC, adapter_config(policy))
    return critic


def prepare(
    accelerator: Accelerator, actor_critic: ActorCritic, optimizer: torch.optim.Optimizer, config: PPO
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Module and optimiser as the launch asks: DDP, a DeepSpeed engine or FSDP around them, or nothing."""
    plugin = accelerator.state.deepspeed_plugin if uses_deepspeed(accelerator) else None
    if plugin is not None:  # what its engine wants to know beforehand
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": min(config.micro_batch, config.per_process(accelerator.num_processes)),
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator.prepare(actor_critic, optimizer)


def sampled(
    actor_critic: ActorCritic,
    empty: ActorCritic | None,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    prompts: Sequence[Text],
) -> Rollout:
    """A response to each prompt by the policy; where its weights lie in pieces they are gathered once, for all tokens.

    No process waits for another while it samples, so rows may end where they like.
    """
    with gathered(actor_critic.policy, None if empty is None else empty.policy) as policy:
        return generate(policy, tokenizer, prompts, sampling)


def make_reference(prepared: nn.Module, model: Policy | None, temperature: float, pad_id: int) -> Forward:
    """Log-probabilities of the frozen SFT policy: a model of its own, or (None) a role on the policy's base."""
    if model is None:
        return partial(prepared, as_role=REFERENCE)
    return partial(response_logprobs, model, temperature=temperature, pad_id=pad_id)


def make_score(prepared: nn.Module, reward_model: PreTrainedModel | ValueHead | None, device: Any) -> ScoreFunction:
    """The reward model's score: of a model of its own, or of the reward role on the policy's base."""
    if isinstance(reward_model, PreTrainedModel):
        return partial(reward_model_scores, reward_model.to(device))
    return partial(adapter_reward_scores, prepared)


def make_optimizer(
    actor_critic: ActorCritic, config: PPO
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over policy and critic, each with its learning rate, falling linearly to zero just after the last.

    The critic's weights have its name in theirs, as a module of its own or as an adapter on the policy's base.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": config.learning_rate},
        {"params": [], "lr": config.critic_learning_rate},
    ]
    for name, parameter in actor_critic.named_parameters():
        if parameter.requires_grad:
            groups[CRITIC in name.split(".")]["params"].append(parameter)
    optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.rollouts)


def prompt_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of row numbers, the same on every process: each pass in a new order, no row twice in a batch."""
    if size > count:
        raise UserError(f"rollout_batch is {size}, but there are {count} prompts; lower it or give more prompts")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def update(
    actor_critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPO,
    accelerator: Accelerator,
    trains_policy: bool,
    skipped: int = 0,
) -> tuple[dict[str, float], int]:
    """Epochs of optimiser steps on one experience; returns the masked global means of what happened in them.

    Without `trains_policy` only the critic learns: the policy's gradient is zero, and Adam leaves it where it is. A
    step whose gradient is not finite is skipped on every process and counted; `skipped` of them in a row came before,
    and how many there are in a row now is returned. Raises FloatingPointError when they are too many.
    """
    actor_critic.train(config.gradient_checkpointing)
    own = len(experience) // config.num_mini_batches
    statistics: dict[str, list[Tensor]] = {}
    skips = epochs = 0
    for _ in range(config.num_ppo_epochs):
        epochs += 1
        for rows in torch.randperm(len(experience)).split(own):
            tokens = accelerator.reduce(experience.response_mask[rows].sum(), "sum")
            step: dict[str, Tensor] = {}
            parts = experience.micro_batches(rows, config.micro_batch)
            for number, part in enumerate(parts):
                accelerator.sync_gradients = last = number == len(parts) - 1
                with nullcontext() if last or uses_deepspeed(accelerator) else accelerator.no_sync(actor_critic):
                    with autocast(config.run.precision):
                        loss, sums = ppo_loss(actor_critic, part, config, tokens, trains_policy)
                    # DDP averages gradients over processes; the sum over tokens wants their total.
                    accelerator.backward(loss * accelerator.num_processes)
                step = {
                    name: EXTREMES.get(name, torch.sum)(torch.stack([step[name], value]), 0) if step else value
                    for name, value in sums.items()
                }
            norm = optimiser_step(actor_critic, optimizer, accelerator, config.max_grad_norm)
            if norm.isfinite():  # the same on every process, since gradients are averaged before
                skipped = 0
                step |= {"grad_norm": norm / accelerator.num_processes}
                for name, value in step.items():
                    statistics.setdefault(name, []).append(value)
            else:
                skips, skipped = skips + 1, skipped + 1
                if skipped > MOST_SKIPPED:
                    wrong = [name for name, value in sorted(step.items()) if not value.isfinite()]
                    raise FloatingPointError(
                        f"ppo: {skipped} optimiser steps in a row have no finite gradient; not finite here: "
                        f"{', '.join(wrong) or 'only the gradient'}. Nothing was written: lower the learning rates, or "
                        "look at the last lines of metrics.jsonl"
                    )
        if config.target_kl is not None and statistics:
            steps = statistics["approx_kl"][-config.num_mini_batches :]
            if accelerator.reduce(torch.stack(steps).mean(), "sum") > 1.5 * config.target_kl:
                break
    actor_critic.eval()
    metrics: dict[str, float] = {"update_epochs": epochs, "skipped_updates": skips}
    for name, values in sorted(statistics.items()):
        if name in EXTREMES:
            metrics[name] = EXTREMES[name](accelerator.gather(torch.stack(values)), 0).item()
        else:
            metrics[name] = accelerator.reduce(torch.stack(values).mean(), "sum").item()
    return metrics, skipped


def optimiser_step(
    actor_critic: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float
) -> Tensor:
    """The global norm of the gradient before it was clipped to max_norm; a step, unless that is not finite.

    The same on every process, since gradients are averaged over processes before. Gradients are gone afterwards.
    """
    if uses_deepspeed(accelerator):  # it has done all that in the last backward
        norm = actor_critic.get_global_grad_norm()  # type: ignore[operator]  # a method of DeepSpeed's engine
        return torch.tensor(float(norm), device=accelerator.device)
    norm = accelerator.clip_grad_norm_(actor_critic.parameters(), max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if norm.isfinite() or accelerator.scaler is not None:  # a scaler skips by itself, and lowers its scale for it
        optimizer.step()
    optimizer.zero_grad()
    return norm


def adapted(config: PPO, kl: float) -> PPO:
    """The config with kl_coef moved towards where KL is `adaptive_kl`; the same config when there is none."""
    if config.adaptive_kl is None:
        return config
    kl_coef = next_kl_coef(config.kl_coef, kl, config.adaptive_kl, config.rollout_batch, config.adaptive_kl_horizon)
    return replace(config, kl_coef=kl_coef)


def ppo_loss(
    actor_critic: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]],
    batch: Experience,
    config: PPO,
    tokens: Tensor,
    trains_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of L = L_policy + vf_coef * L_value - entropy_coef * H, and of each logged mean.

    `tokens` is the number of response tokens in the optimiser step, over all its micro-batches and processes.
    """
    mask = batch.response_mask
    logprobs, entropies, values = actor_critic(batch.input_ids, batch.attention_mask, batch.size, trains_policy)
    if config.entropy_coef == 0:
        entropies = entropies.detach()  # logged all the same, without the cost of its gradient
    per_token, policy_stats = policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, config.cliprange)
    value_per_token, value_stats = value_loss(values, batch.old_values, batch.returns, mask, config.cliprange_value)

    def mean(x: Tensor) -> Tensor:
        return masked_mean(x, mask, tokens)

    policy, value, entropy = mean(per_token), mean(value_per_token), mean(entropies)
    loss = config.vf_coef * value + float(trains_policy) * (policy - config.entropy_coef * entropy)
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
