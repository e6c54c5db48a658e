"""What is watched while PPO trains: each rollout's figures, evaluations on held-out prompts, and the alarm.

Nothing here changes a weight. Names and units of all figures are in the README's glossary.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.stages import PPO
from pipeline.core.advantages import explained_variance, kl_k3
from pipeline.core.tensors import Reduce, masked_moments, masked_sum
from pipeline.data.messages import display_text
from pipeline.data.tokenize import decode
from pipeline.evaluation.judges import Judge
from pipeline.evaluation.side_figures import NOT_MEASURED
from pipeline.evaluation.text import duplicate_share, word_repetition
from pipeline.rl.experience import Experience, make_experience, score_rollout
from pipeline.rl.setup import EVALUATED, Setup
from pipeline.runtime.console import print_main
from pipeline.runtime.precision import autocast


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
def rollout_metrics(experience: Experience, accelerator: Accelerator, config: PPO, kl_coef: float) -> dict[str, float]:
    """What one rollout looked like, over all processes, at the KL coefficient that its rewards were made with."""
    mask, reduce = experience.response_mask, partial(accelerator.reduce, reduction="sum")
    tokens, sequences = reduce(mask.sum()), reduce(torch.tensor(len(experience), device=mask.device))
    score_mean = reduce(experience.scores.sum()) / sequences
    kl = reduce(masked_sum(experience.kl, mask))
    k3 = masked_sum(kl_k3(experience.kl, torch.zeros_like(experience.kl)), mask)
    reference = masked_sum(experience.old_logprobs - experience.kl, mask)
    difference = masked_sum((experience.old_logprobs - experience.sampled_logprobs).abs(), mask)
    clipped = experience.scores.abs() > (math.inf if config.score_clip is None else config.score_clip)
    metrics = {
        "score": score_mean,
        "score_std": (reduce((experience.scores - score_mean).square().sum()) / sequences).sqrt(),
        "score_clipped": reduce(clipped.float().sum()) / sequences,
        "score_length_correlation": correlation(experience.scores, mask.sum(1).float(), reduce),
        "kl": kl / sequences,
        "kl_per_token": kl / tokens,
        "kl_k3_per_token": reduce(k3) / tokens,
        "reference_perplexity": (-reduce(reference) / tokens).exp(),
        "sampling_difference": reduce(difference) / tokens,
        "reward": reduce(masked_sum(experience.rewards, mask)) / sequences,
        "length": tokens / sequences,
        "eos_share": reduce(experience.has_eos.float().sum()) / sequences,
        "return": reduce(masked_sum(experience.returns, mask)) / tokens,
        "explained_variance": explained_variance(experience.old_values, experience.returns, mask, reduce),
    }
    return {name: float(value) for name, value in metrics.items()} | {"kl_coef": kl_coef}


def log_rollout(
    setup: Setup,
    step: int,
    experience: Experience,
    update_metrics: Mapping[str, float],
    kl_coef: float,
    started: float,
    sampled: float,
) -> dict[str, float]:
    """Logs one rollout and its update, shows the numbers that matter, and returns all of it.

    `started` and `sampled` are the monotonic times at which the rollout began and its responses were there.
    """
    config, seconds = setup.config, time.monotonic() - started
    metrics = {**update_metrics, **rollout_metrics(experience, setup.accelerator, config, kl_coef)}
    metrics |= {
        "learning_rate": setup.optimizer.param_groups[0]["lr"],
        "sampling_seconds": sampled - started,
        "seconds": seconds,
        "tokens_per_second": metrics["length"] * config.rollout_batch / seconds,
    }
    setup.stage.log(step, metrics)
    setup.stage.show_progress(
        config.rollouts, step + 1,
        score=f"{metrics['score']:+.2f}", kl=f"{metrics['kl']:.2f}", length=f"{metrics['length']:.0f}",
        **{"tokens/s": f"{metrics['tokens_per_second']:,.0f}"},
    )  # fmt: skip
    return metrics


def correlation(a: Tensor, b: Tensor, reduce: Reduce) -> Tensor:
    """Pearson's correlation of a and b (B,) float32 over all processes; 0 where one is the same everywhere."""
    x, y = (v.double() - masked_moments(v[None], torch.ones_like(v[None]).bool(), reduce)[0] for v in (a, b))
    xx, yy, xy = reduce(torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()]))
    return xy / (xx * yy).sqrt().clamp(min=1e-300)


@dataclass(frozen=True)
class Evaluation:
    """The policy at one rollout on the fixed validation prompts, and its weights if none before had a higher reward."""

    step: int
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    scores: Tensor  # (B,) of this process's share
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        return self.metrics["eval_reward"]


def evaluate_policy(setup: Setup, step: int, history: Sequence[Evaluation]) -> Evaluation:
    """Metrics and samples on fixed held-out prompts with fixed noise; the training's random state is left untouched.

    The first evaluation is of the SFT policy itself, so its scores are what `eval_win_rate` compares with. Its reward
    charges the configured `kl_coef`, wherever `adaptive_kl` has steered training's: all evaluations of a run compare.
    """
    config, accelerator = setup.config, setup.accelerator
    prompts = setup.held_out[accelerator.process_index :: accelerator.num_processes]
    with torch.random.fork_rng(), autocast(config.run.precision):
        torch.manual_seed(accelerator.process_index)
        rollout = setup.sample(prompts)
        scored = score_rollout(rollout, setup.prepared, setup.reference, setup.score, config.micro_batch)
        experience = make_experience(rollout, scored, config, config.kl_coef, setup.reduce)
    metrics = rollout_metrics(experience, accelerator, config, config.kl_coef)
    texts = [decode(setup.tokenizer, ids) for ids in rollout.responses.tolist()]
    sft_scores = history[0].scores if history else experience.scores
    wins = (experience.scores > sft_scores).float() + 0.5 * (experience.scores == sft_scores).float()
    tokens = accelerator.reduce(experience.response_mask.sum(), "sum")
    surprise = accelerator.reduce(-masked_sum(experience.old_logprobs, experience.response_mask), "sum")
    all_texts = gather_object(texts)
    metrics |= {
        "win_rate": accelerator.reduce(wins.mean(), "mean").item(),
        "entropy": (surprise / tokens).item(),
        "repetition": sum(map(word_repetition, all_texts)) / len(all_texts),
        "duplicates": duplicate_share(all_texts),
    }
    rows = zip(prompts, texts, experience.scores.tolist(), experience.kl.sum(1).tolist(), strict=True)
    samples = [
        {"prompt": display_text(p), "response": r, "score": round(s, 3), "kl": round(k, 2)} for p, r, s, k in rows
    ]
    judged = mean_judgements(all_texts, setup.judges, accelerator, is_first=not history)
    figures = {name: metrics[name] for name in EVALUATED} | judged
    return Evaluation(step, {f"eval_{name}": value for name, value in figures.items()}, samples, experience.scores)


def mean_judgements(
    texts: Sequence[str], judges: Mapping[str, Judge], accelerator: Accelerator, is_first: bool
) -> dict[str, float]:
    """Each judge's mean over the texts. The main process alone asks them: a judge may be slow, or cost money.

    Raises UserError for a judge that does not give one finite number for each text at the first evaluation, before
    anything is trained. Later it is left out with a printed line: what was learnt is not lost to a judge.
    """
    means, failed = dict[str, float](), dict[str, str]()
    if accelerator.is_main_process:
        for name, judge in judges.items():
            try:
                means[name] = mean_judgement(judge, texts)
            except Exception as error:
                failed[name] = str(error) or type(error).__name__
    shared: list[Any] = [means, failed]
    broadcast_object_list(shared)
    means, failed = shared
    for name, why in failed.items():
        if is_first:
            raise UserError(f"judge {name}: {why}")
        print_main(f"ppo: judge {name}: {NOT_MEASURED}: {why}")
    return means


def mean_judgement(judge: Judge, texts: Sequence[str]) -> float:
    values = np.asarray(judge(texts), dtype=np.float64)
    if values.shape != (len(texts),) or not np.isfinite(values).all():
        raise ValueError(f"expected one finite number for each of {len(texts)} texts")
    return float(values.mean())


def reason_to_stop(history: Sequence[Evaluation], config: PPO) -> str:
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
