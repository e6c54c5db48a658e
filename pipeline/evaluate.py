"""Stage 6: base, SFT and PPO on the same held-out prompts. Is PPO better by the judges, and is its text still text?"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.dials import Sampling
from pipeline.config.stages import Evaluate
from pipeline.data.form import forms_of
from pipeline.data.messages import Text, display_text
from pipeline.data.prompts import read_prompts
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import show_prompt
from pipeline.data.tokenizer import load_shared_tokenizer
from pipeline.evaluation.judges import Classifier, Vader, fit_judge
from pipeline.evaluation.report import VADER_KNOWS_NO_WORD, print_report, write_report
from pipeline.evaluation.side_figures import NOT_MEASURED, side_figure
from pipeline.evaluation.statistics import (
    Estimate,
    correlation,
    length_controlled_difference,
    mean_ci,
    paired_difference_ci,
    perplexity,
    share_ci,
    win_rate_ci,
)
from pipeline.evaluation.text import most_risen_word, text_statistics
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import load_reward_model
from pipeline.models.loading import check_model, freeze, load_language_model
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import Rollout, respond_and_score
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.launch import new_accelerator
from pipeline.runtime.logs import finite_or_null
from pipeline.runtime.stage_run import StageRun

COMMON = 0.20  # share of responses that one content word may be in


@dataclass(frozen=True)
class PolicyResponses:
    """What one policy wrote for the prompts, and what was measured on each response; arrays are (prompts,)."""

    texts: list[str]
    score: np.ndarray  # reward model, units of its scale, mean 0 on SFT samples
    kl: np.ndarray  # nats per response against SFT, k1 estimate
    length: np.ndarray  # tokens, EOS included
    has_eos: np.ndarray  # bool
    base_nll: np.ndarray  # nats per response under the pretrained model, EOS aside
    vader: np.ndarray | None = None  # compound, -1..1
    classifier: np.ndarray | None = None  # P(positive)

    @property
    def perplexity(self) -> float:
        """Per token under the pretrained model, without EOS, which that model has seen only after whole texts."""
        return perplexity(float(self.base_nll.sum()), float((self.length - self.has_eos).sum()))


def train(config: Evaluate) -> Path:
    """Writes evaluation.json, evaluation.md and samples, prints the table, and returns the `final` directory."""
    silence_libraries()
    names = {"base": ("pretrain", config.base), "sft": ("sft", config.sft), "ppo": ("merge", config.policy)}
    paths = {name: config.run.final(*place) for name, place in names.items()}
    reward = config.run.final("reward", config.reward)
    stage = StageRun(
        "evaluate",
        config,
        {**paths, "reward": reward},
        hash_sources(file for file in (config.prompts_file, config.judge_file) if file),
    )
    if stage.is_finished():
        report = json.loads((stage.final / "evaluation.json").read_text(encoding="utf-8"))
        print_report(report, stage.final, paths["ppo"])
        return stage.final
    with stage:
        tokenizer = load_shared_tokenizer({"sft": paths["sft"], **paths, "reward": reward})
        forms = forms_of({"sft": paths["sft"], "ppo": paths["ppo"], "reward": reward})
        prompts = read_prompts(config.prompts_file, config.prompts, tokenizer, config, forms)
        show_prompt(tokenizer, prompts[0], config.sampling.max_prompt_tokens)
        classifier = fit_judge(config.judge_file, config.run.seed, config.run.reading) if config.judge_file else None
        measured = measure(prompts, tokenizer, paths, reward, classifier, config, stage)
        prompt_texts = [display_text(prompt) for prompt in prompts]
        report = finite_or_null(compare(measured, prompt_texts, classifier))
        rows = [
            {"prompt": prompt} | {name: measured[name].texts[i] for name in measured}
            | {f"{name}_score": round(float(measured[name].score[i]), 3) for name in measured}
            for i, prompt in enumerate(prompt_texts)
        ]  # fmt: skip
        stage.log_samples(rows)
        final = stage.finish(partial(write_report, report, rows[: config.show]), headline(report))
    print_report(report, final, paths["ppo"])
    return final


def measure(
    prompts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    paths: dict[str, Path],
    reward: Path,
    classifier: Classifier | None,
    config: Evaluate,
    stage: StageRun,
) -> dict[str, PolicyResponses]:
    """One response per prompt from each policy, from the same noise, with every measurement."""
    accelerator = new_accelerator(config.run.precision)
    models = {name: freeze(load_language_model(path)).to(accelerator.device) for name, path in paths.items()}
    reward_model = freeze(load_reward_model(reward)).to(accelerator.device)
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    for model, path in [*((models[name], paths[name]) for name in models), (reward_model, reward)]:
        check_model(model, tokenizer, longest, path)
    vader = Vader()
    measured = {}
    for number, (name, model) in enumerate(models.items(), 1):
        torch.manual_seed(config.run.seed)
        measure_tokens = partial(
            token_measures, model=model, models=models, reward_model=reward_model, sampling=config.sampling,
            tokenizer=tokenizer,
        )  # fmt: skip
        responses = respond_and_score(
            model, tokenizer, prompts, config.sampling, measure_tokens, config.batch_size, config.run.precision
        )
        arrays = {key: values.numpy() for key, values in responses.measures.items()}
        if classifier is not None:
            arrays |= {"vader": vader(responses.texts), "classifier": classifier(responses.texts)}
        measured[name] = PolicyResponses(texts=responses.texts, **arrays)
        stage.show_progress(len(models), number, policy=name, score=f"{arrays['score'].mean():+.2f}")
    return without_silent_vader(measured)


def without_silent_vader(measured: dict[str, PolicyResponses]) -> dict[str, PolicyResponses]:
    """The same without VADER's compounds where all are 0: a list of English words says nothing of another language."""
    if all(responses.vader is None or not responses.vader.any() for responses in measured.values()):
        if any(responses.vader is not None for responses in measured.values()):
            print_main(f"evaluate: judge 1: {NOT_MEASURED}: {VADER_KNOWS_NO_WORD}")
        return {name: replace(responses, vader=None) for name, responses in measured.items()}
    return measured


def token_measures(
    rollout: Rollout,
    model: PreTrainedModel,
    models: dict[str, PreTrainedModel],
    reward_model: PreTrainedModel,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, torch.Tensor]:
    """Per response, (B,): score, KL to SFT, length, EOS, and negative log-likelihood under the base."""
    mask = rollout.response_mask
    words = mask & (rollout.responses != tokenizer.eos_token_id)

    @cache  # a policy may be the SFT policy or the base itself
    def logprobs(of: PreTrainedModel, temperature: float) -> torch.Tensor:
        ids = (rollout.input_ids, rollout.attention_mask, rollout.response_tokens)
        return response_logprobs(of, *ids, temperature, tokenizer.pad_token_id)[0]

    log_ratio = logprobs(model, sampling.temperature) - logprobs(models["sft"], sampling.temperature)
    return {
        "score": reward_model_scores(reward_model, rollout.input_ids, rollout.attention_mask),
        "kl": log_ratio.masked_fill(~mask, 0).sum(1),
        "length": rollout.length,
        "has_eos": rollout.has_eos,
        "base_nll": -logprobs(models["base"], 1.0).masked_fill(~words, 0).sum(1),
    }


def compare(
    measured: dict[str, PolicyResponses], prompts: Sequence[str], classifier: Classifier | None
) -> dict[str, Any]:
    """All figures of the page: each policy's, and PPO against SFT on the same prompts."""
    sft, ppo = measured["sft"], measured["ppo"]
    policies = {name: policy_report(name, responses, prompts) for name, responses in measured.items()}
    differences = {}
    for name in ("score", "vader", "classifier"):
        pair = getattr(ppo, name), getattr(sft, name)
        if pair[1] is not None:
            differences[name] = {
                "difference": estimate(f"{name}, difference", paired_difference_ci, *pair),
                "win_rate": estimate(f"{name}, win rate", win_rate_ci, *pair),
                "at_equal_length": estimate(
                    f"{name}, difference at equal length", length_controlled_difference, *pair, ppo.length, sft.length
                ),
            }
    return {
        "prompts": len(prompts),
        "judge_accuracy": asdict(classifier.holdout_accuracy) if classifier is not None else None,
        "policies": policies,
        "ppo_against_sft": differences,
        "health": health(policies["sft"], policies["ppo"], most_risen_word(ppo.texts, sft.texts, prompts, COMMON)),
    }


def estimate(what: str, compute: Callable[..., Estimate], *arguments: Any) -> dict[str, Any] | None:
    """The fields of an estimate, or None where it cannot be computed."""
    found = side_figure(f"evaluate: {what}", compute, *arguments)
    return None if found is None else asdict(found)


def policy_report(name: str, responses: PolicyResponses, prompts: Sequence[str]) -> dict[str, Any]:
    figures = {figure: getattr(responses, figure) for figure in ("score", "vader", "classifier", "kl", "length")}
    return {
        **{
            figure: estimate(f"{name}: {figure}", mean_ci, values)
            for figure, values in figures.items()
            if values is not None
        },
        "eos_share": estimate(f"{name}: share ended by EOS", share_ci, responses.has_eos.astype(float)),
        "perplexity_under_base": side_figure(
            f"evaluate: {name}: perplexity under the base", lambda: responses.perplexity
        ),
        "score_length_correlation": side_figure(
            f"evaluate: {name}: score_length_correlation", correlation, responses.score, responses.length
        ),
        "text": asdict(text_statistics(responses.texts, prompts)),
    }


def health(sft: dict[str, Any], ppo: dict[str, Any], commonest: tuple[str, float]) -> list[dict[str, Any]]:
    """Signs that the policy still writes text: each figure, its bounds (None: no bound), and whether it is inside.

    A figure that was not measured, or is no number, is not inside.
    `commonest`: PPO's content word and the share of responses with it (`most_risen_word`).
    """
    before, after = sft["text"], ppo["text"]
    word, share = commonest
    perplexity = ratio(ppo["perplexity_under_base"], sft["perplexity_under_base"])
    rows = [
        ("KL to SFT, nats per response", value_of(ppo["kl"]), None, 10.0),
        ("word repetition, over SFT's", ratio(after["word_repetition"], before["word_repetition"]), None, 1.5),
        (f"share of responses with the commonest content word ({word})", share, None, COMMON),
        ("distinct-4 across responses, over SFT's", ratio(after["distinct_4"], before["distinct_4"]), 0.8, None),
        ("exact duplicates", after["duplicate_share"], None, 0.02),
        ("perplexity under the base, over SFT's", perplexity, 0.7, 1.3),
    ]
    return [
        {"name": name, "value": value, "low": low, "high": high}
        | {"healthy": value is not None and (low is None or value >= low) and (high is None or value <= high)}
        for name, value, low, high in rows
    ]


def ratio(value: float | None, reference: float | None) -> float | None:
    """value / reference; where the reference is 0: 1 if the value is 0 too, else the largest float; None of None."""
    if value is None or reference is None:
        return None
    return value / reference if reference else 1.0 if value == 0 else sys.float_info.max


def value_of(estimate: dict[str, Any] | None) -> float | None:
    return None if estimate is None else estimate["value"]


def headline(report: dict[str, Any]) -> dict[str, float | None]:
    """The metrics that go into run.json and the tracker."""
    policies, differences = report["policies"], report["ppo_against_sft"]
    metrics = {f"{policy}_{name}": value_of(policies[policy][name]) for policy in policies for name in differences}
    metrics |= {f"{name}_difference": value_of(differences[name]["difference"]) for name in differences}
    return metrics | {
        "kl": value_of(policies["ppo"]["kl"]),
        "healthy": float(all(row["healthy"] for row in report["health"])),
    }
