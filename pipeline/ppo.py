"""Stage 4: PPO (Schulman et al., arXiv 1707.06347) on a language model, against a reward model and a frozen reference.

    for each rollout:
        generate         prompts -> responses sampled from the policy
        to_experience    old log-probabilities, values, k1 KL, token rewards, GAE, whitening: once, without gradient
        update           epochs x minibatches of   L = L_policy + value_coef * L_value - entropy_coef * H

Policy and critic are one module with one optimiser, prepared once. Each mean divides by one number of tokens, counted
over all micro-batches and processes of the optimiser step, so neither changes the mathematics.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.advantages import adapted_kl_coef, explained_variance, kl_k3
from pipeline.config import PPO, UserError
from pipeline.data import decode
from pipeline.formats import Text, shown
from pipeline.judges import duplicate_share, word_repetition
from pipeline.losses import policy_loss, value_loss
from pipeline.models import (
    ActorCritic,
    Critic,
    Policy,
    base_of,
    check_model,
    frozen,
    load_language_model,
    load_reward_model,
    reference_role,
    response_logprobs,
    same_tokenizer,
    save_policy,
    with_adapter,
)
from pipeline.process import new_accelerator, processes, quiet, say
from pipeline.rollout import Experience, Forward, ScoreFunction, generate, read_prompts, to_experience
from pipeline.run import StageRun
from pipeline.scoring import reward_model_scores
from pipeline.tensors import masked_mean, masked_sum

EVALUATED = (
    "score", "kl", "reward", "length", "eos_share", "entropy", "win_rate", "repetition", "duplicates",
)  # fmt: skip
MOST_SKIPPED = 5  # optimiser steps in a row without a finite gradient before the run is stopped


def train(config: PPO, score: ScoreFunction | None = None) -> Path:
    """Trains the policy and returns its `final` directory; `score` replaces the reward model's score when given."""
    quiet()
    config.micro_batches(processes().num_processes)  # a batch that does not divide is refused before any work
    sft, reward = config.run.final("sft", config.sft), config.run.final("reward", config.reward)
    stage = StageRun("ppo", config, {"sft": sft, "reward": reward}, [config.train_file, config.validation_file])
    if stage.is_finished():
        return stage.final
    with stage:
        accelerator = new_accelerator(config.run.precision)
        set_seed(config.run.seed)  # the same weights on every process
        tokenizer = same_tokenizer({"sft": sft, "reward": reward})
        policy: Policy = load_language_model(sft)
        check_model(base_of(policy), tokenizer, config.sampling.max_prompt_tokens + config.sampling.max_new_tokens, sft)
        if config.adapter.adapter != "none":
            policy = with_adapter(base_of(policy), config.adapter)
        reward_model = frozen(load_reward_model(reward)).to(accelerator.device)
        actor_critic = ActorCritic(policy, Critic(reward_model), config.sampling.temperature, tokenizer.pad_token_id)
        reference = make_reference(actor_critic, accelerator)
        optimizer, scheduler = make_optimizer(actor_critic, config)
        prepared, optimizer = accelerator.prepare(actor_critic.eval(), optimizer)
        set_seed(config.run.seed, device_specific=True)  # other samples on every process

        prompts = read_prompts(config.train_file, 0, tokenizer, config)
        held_out = read_prompts(config.validation_file, config.eval_prompts, tokenizer, config)
        batches = prompt_batches(len(prompts), config.rollout_batch, config.run.seed)
        score = score or partial(reward_model_scores, reward_model)
        experience_of = partial(
            to_experience, actor_critic=prepared, reference=reference, score=score,
            reduce=partial(accelerator.reduce, reduction="sum"),
        )  # fmt: skip
        evaluate = partial(evaluate_policy, held_out, actor_critic.policy, tokenizer, experience_of, accelerator)
        history: list[Evaluation] = []
        skipped = 0  # optimiser steps in a row whose gradient was not finite
        for step in range(config.rollouts):
            if step % config.eval_every == 0:
                history.append(evaluated(stage, step, evaluate(config, history), actor_critic, history))
                if alarm(history, config):
                    break
            started = time.monotonic()
            mine = next(batches)[accelerator.process_index :: accelerator.num_processes]
            with accelerator.autocast():
                rollout = generate(actor_critic.policy, tokenizer, [prompts[row] for row in mine], config.sampling)
                sampled = time.monotonic()
                experience = experience_of(rollout, config=config)
            check_first_rollout(step, experience, accelerator)
            trains_policy = step >= config.critic_warmup
            metrics, skipped = update(prepared, optimizer, experience, config, accelerator, trains_policy, skipped)
            metrics |= rollout_metrics(experience, accelerator, config)
            metrics |= {
                "learning_rate": optimizer.param_groups[0]["lr"],
                "sampling_seconds": sampled - started,
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
        else:
            history.append(evaluated(stage, config.rollouts, evaluate(config, history), actor_critic, history))
        summary = keep(history, actor_critic, config)
        return stage.finish(partial(save, actor_critic, tokenizer), summary)


def make_reference(actor_critic: ActorCritic, accelerator: Accelerator) -> Forward:
    """Log-probabilities of the frozen SFT policy: the adapter policy without its adapter, else a frozen copy."""
    temperature, pad_id = actor_critic.temperature, actor_critic.pad_id
    if isinstance(actor_critic.policy, PeftModel):

        def reference(ids: Tensor, mask: Tensor, size: int) -> tuple[Tensor, ...]:
            with reference_role(actor_critic.policy):
                return response_logprobs(actor_critic.policy, ids, mask, size, temperature, pad_id)

        return reference
    copy = frozen(deepcopy(actor_critic.policy)).to(accelerator.device)
    return lambda ids, mask, size: response_logprobs(copy, ids, mask, size, temperature, pad_id)


def make_optimizer(
    actor_critic: ActorCritic, config: PPO
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over policy and critic, each with its learning rate, falling linearly to zero just after the last."""
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr": rate}
        for part, rate in (
            (actor_critic.policy, config.learning_rate),
            (actor_critic.critic, config.critic_learning_rate),
        )
    ]
    optimizer = torch.optim.Adam(groups, eps=config.adam_eps)
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
    own = len(experience) // config.minibatches
    statistics: dict[str, list[Tensor]] = {}
    skips = epochs = 0
    for _ in range(config.epochs):
        epochs += 1
        for rows in torch.randperm(len(experience)).split(own):
            tokens = accelerator.reduce(experience.response_mask[rows].sum(), "sum")
            step: dict[str, Tensor] = {}
            parts = experience.micro_batches(rows, config.micro_batch)
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                with nullcontext() if last else accelerator.no_sync(actor_critic):
                    loss, sums = ppo_loss(actor_critic, part, config, tokens, trains_policy)
                    # DDP averages gradients over processes; the sum over tokens wants their total.
                    accelerator.backward(loss * accelerator.num_processes)
                step = {name: step.get(name, torch.zeros(())) + value for name, value in sums.items()}
            norm = accelerator.clip_grad_norm_(actor_critic.parameters(), config.max_grad_norm)
            if norm.isfinite():  # the same on every process, since gradients are averaged before
                optimizer.step()
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
            optimizer.zero_grad()
        if config.target_kl is not None and statistics:
            steps = statistics["approx_kl"][-config.minibatches :]
            if accelerator.reduce(torch.stack(steps).mean(), "sum") > 1.5 * config.target_kl:
                break
    names = sorted(statistics)
    means = torch.stack([torch.stack(statistics[name]).mean() for name in names]) if names else torch.zeros(0)
    metrics = dict(zip(names, accelerator.reduce(means, "sum").tolist(), strict=True))
    return metrics | {"update_epochs": epochs, "skipped_updates": skips}, skipped


def adapted(config: PPO, kl: float) -> PPO:
    """The config with kl_coef moved towards where KL is `adaptive_kl`; the same config when there is none."""
    if config.adaptive_kl is None:
        return config
    kl_coef = adapted_kl_coef(config.kl_coef, kl, config.adaptive_kl, config.rollout_batch, config.adaptive_kl_horizon)
    return replace(config, kl_coef=kl_coef)


def ppo_loss(
    actor_critic: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]],
    batch: Experience,
    config: PPO,
    tokens: Tensor,
    trains_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of L = L_policy + value_coef * L_value - entropy_coef * H, and of each logged mean.

    `tokens` is the number of response tokens in the optimiser step, over all its micro-batches and processes.
    """
    mask = batch.response_mask
    logprobs, entropies, values = actor_critic(batch.input_ids, batch.attention_mask, batch.size)
    if config.entropy_coef == 0:
        entropies = entropies.detach()  # logged all the same, without the cost of its gradient
    per_token, policy_stats = policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, config.clip)
    value_per_token, value_stats = value_loss(values, batch.old_values, batch.returns, mask, config.value_clip)

    def mean(x: Tensor) -> Tensor:
        return masked_mean(x, mask, tokens)

    policy, value, entropy = mean(per_token), mean(value_per_token), mean(entropies)
    loss = config.value_coef * value + float(trains_policy) * (policy - config.entropy_coef * entropy)
    means = {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": entropy}
    means |= {
        "approx_kl": mean(policy_stats["approx_kl"]),
        "clip_fraction": mean(policy_stats["clipped"].float()),
        "value_clip_fraction": mean(value_stats["clipped"].float()),
        "ratio": mean(policy_stats["ratio"]),
    }
    return loss, {name: value.detach() for name, value in means.items()}


def check_first_rollout(step: int, experience: Experience, accelerator: Accelerator) -> None:
    """Before any update the policy is the reference, so a KL that is not zero is a bug: stop and say so."""
    if step == 0:
        largest = accelerator.gather(experience.kl.abs().max()).max().item()
        if largest > 1e-4:
            raise RuntimeError(
                f"ppo: before training the policy differs from its reference by {largest:.2g} nats on a token, "
                "expected 0: the two are not computed by the same forward"
            )


@torch.no_grad()
def rollout_metrics(experience: Experience, accelerator: Accelerator, config: PPO) -> dict[str, float]:
    """What one rollout looked like, over all processes; names and units are in the README's glossary."""
    mask, reduce = experience.response_mask, partial(accelerator.reduce, reduction="sum")
    tokens, sequences = reduce(mask.sum()), reduce(torch.tensor(len(experience), device=mask.device))
    score_mean = reduce(experience.scores.sum()) / sequences
    kl = masked_sum(experience.kl, mask)
    k3 = masked_sum(kl_k3(experience.kl, torch.zeros_like(experience.kl)), mask)
    metrics = {
        "score": score_mean,
        "score_std": (reduce((experience.scores - score_mean).square().sum()) / sequences).sqrt(),
        "kl": reduce(kl) / sequences,
        "kl_per_token": reduce(kl) / tokens,
        "kl_k3_per_token": reduce(k3) / tokens,
        "reward": reduce(masked_sum(experience.rewards, mask)) / sequences,
        "length": tokens / sequences,
        "eos_share": reduce(experience.has_eos.float().sum()) / sequences,
        "return": reduce(masked_sum(experience.returns, mask)) / tokens,
        "explained_variance": explained_variance(experience.old_values, experience.returns, mask, reduce),
    }
    return {name: float(value) for name, value in metrics.items()} | {"kl_coef": config.kl_coef}


@dataclass(frozen=True)
class Evaluation:
    """The policy at one rollout on the fixed validation prompts, and its weights if none before had a higher reward."""

    step: int
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    scores: Tensor  # (B,) of this process's share
    weights: dict[str, Tensor] | None = None

    @property
    def reward(self) -> float:
        return self.metrics["eval_reward"]


def evaluate_policy(
    prompts: list[Text],
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    experience_of: Callable[..., Experience],
    accelerator: Accelerator,
    config: PPO,
    history: Sequence[Evaluation],
) -> Evaluation:
    """Metrics and samples on fixed held-out prompts with fixed noise; the training's random state is left untouched.

    The first evaluation is of the SFT policy itself, so its scores are what `eval_win_rate` compares with.
    """
    share = prompts[accelerator.process_index :: accelerator.num_processes]
    share = share[: len(prompts) // accelerator.num_processes]
    with torch.random.fork_rng(), accelerator.autocast():
        torch.manual_seed(accelerator.process_index)
        experience = experience_of(generate(policy, tokenizer, share, config.sampling), config=config)
    metrics = rollout_metrics(experience, accelerator, config)
    texts = [decode(tokenizer, ids) for ids in experience.input_ids[:, -experience.size :].tolist()]
    sft = history[0].scores if history else experience.scores
    wins = (experience.scores > sft).float() + 0.5 * (experience.scores == sft).float()
    tokens = accelerator.reduce(experience.response_mask.sum(), "sum")
    surprise = accelerator.reduce(-masked_sum(experience.old_logprobs, experience.response_mask), "sum")
    all_texts = gather_object(texts)
    metrics |= {
        "win_rate": accelerator.reduce(wins.mean(), "mean").item(),
        "entropy": (surprise / tokens).item(),
        "repetition": sum(map(word_repetition, all_texts)) / len(all_texts),
        "duplicates": duplicate_share(all_texts),
    }
    rows = zip(share, texts, experience.scores.tolist(), experience.kl.sum(1).tolist(), strict=True)
    samples = [{"prompt": shown(p), "response": r, "score": round(s, 3), "kl": round(k, 2)} for p, r, s, k in rows]
    return Evaluation(-1, {f"eval_{name}": metrics[name] for name in EVALUATED}, samples, experience.scores)


def evaluated(
    stage: StageRun, step: int, found: Evaluation, actor_critic: ActorCritic, history: Sequence[Evaluation]
) -> Evaluation:
    """Logs an evaluation and eight of its samples; returns it with the weights when it is the best so far."""
    if not all(math.isfinite(value) for value in found.metrics.values()):
        raise FloatingPointError(f"ppo: evaluation at rollout {step} is not finite: {found.metrics}")
    stage.log(step, found.metrics)
    stage.sample([{"step": step, **row} for row in found.samples[:8]], step)
    is_best = all(found.reward > before.reward for before in history)
    trained = {name: p for name, p in actor_critic.named_parameters() if p.requires_grad} if is_best else None
    weights = {name: p.detach().cpu().clone() for name, p in trained.items()} if trained is not None else None
    return replace(found, step=step, weights=weights)


def alarm(history: Sequence[Evaluation], config: PPO) -> str:
    """What is wrong with the last evaluation, in words, or '': KL over its budget, or text that has collapsed.

    Collapse, against the first evaluation, which is SFT's: entropy under a half, a word repetition of more than 1.5
    times and 0.05, or a tenth more of the responses equal to another.
    """
    first, last = history[0].metrics, history[-1].metrics
    if config.kl_budget is not None and last["eval_kl"] > config.kl_budget:
        return f"KL is {last['eval_kl']:.1f} nats per response, kl_budget is {config.kl_budget:g}"
    if not config.collapse_alarm:
        return ""
    for name, bound in (
        ("repetition", max(1.5 * first["eval_repetition"], first["eval_repetition"] + 0.05)),
        ("duplicates", first["eval_duplicates"] + 0.1),
    ):
        if last[f"eval_{name}"] > bound:
            return f"{name} rose from {first[f'eval_{name}']:.3f} to {last[f'eval_{name}']:.3f}, above {bound:.3f}"
    if last["eval_entropy"] < 0.5 * first["eval_entropy"]:
        return f"entropy fell from {first['eval_entropy']:.2f} to {last['eval_entropy']:.2f} nats per token"
    return ""


def keep(history: Sequence[Evaluation], actor_critic: ActorCritic, config: PPO) -> dict[str, Any]:
    """Puts the weights to be kept into the module and returns the metrics of their evaluation.

    Those of the best evaluation by reward, or of the last rollout when `keep` says so and no alarm was raised.
    """
    wrong, last = alarm(history, config), history[-1]
    kept = max(history, key=lambda found: found.reward) if wrong or config.keep == "best" else last
    if wrong:
        say(f"ppo: stopped at rollout {last.step}: {wrong}; back to rollout {kept.step}, the best so far")
    if kept is not last:
        assert kept.weights is not None
        actor_critic.load_state_dict(kept.weights, strict=False)
    score, kl = kept.metrics["eval_score"], kept.metrics["eval_kl"]
    say(f"ppo: kept rollout {kept.step}: validation score {score:+.2f}, KL {kl:.2f} nats per response")
    return {**kept.metrics, "kept_rollout": kept.step, "stopped": wrong}


def save(actor_critic: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The policy at the top of the folder and the critic in `critic/`; both load with `from_pretrained`.

    Raises FloatingPointError for a weight that is not finite: nothing of it is ever finished.
    """
    for name, parameter in actor_critic.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"ppo: {name} is not finite after training; nothing was written")
    save_policy(actor_critic.policy, tokenizer, folder)
    actor_critic.critic.save(folder / "critic")
