"""What a base and adapters on it write for the same prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.base import AdapterBase
from pipeline.adapters.proof import load_unmerged
from pipeline.config.commands import Verify
from pipeline.data.chat_template import ensure_chat_template
from pipeline.data.formats import read_rows
from pipeline.data.messages import Text, display_text
from pipeline.data.prompts import filter_prompts
from pipeline.evaluation.judges import Vader, fit_judge
from pipeline.evaluation.statistics import Array
from pipeline.evaluation.text import text_statistics
from pipeline.models.forward import response_logprobs
from pipeline.models.loading import Policy
from pipeline.rl.rollout import Rollout, respond_and_score
from pipeline.runtime.console import print_main

Judge = Callable[[Sequence[str]], Array]


def compare_generations(config: Verify, folders: Mapping[str, Path], base: AdapterBase) -> dict[str, dict[str, float]]:
    """Judges, repetition and perplexity of what base and adapters write, from the same noise; printed and returned."""
    prompts = read_generation_prompts(config, base)
    judges: dict[str, Judge] = {"vader": Vader()}
    if config.judge_file:
        judges["classifier"] = fit_judge(config.judge_file, config.seed)
    report: dict[str, dict[str, float]] = {}
    for name, folder in {"base": None, **folders}.items():
        model = load_unmerged(base.model, folder) if folder else base.model
        report[name] = measure_generations(model, prompts, judges, config, base)
        print_main("  ".join([f"{name}:", *(f"{measure} {figure:.4g}" for measure, figure in report[name].items())]))
    return report


def read_generation_prompts(config: Verify, base: AdapterBase) -> list[Text]:
    """The prompts of `prompts_file`, long ones treated as the dial says."""
    rows = read_rows(config.prompts_file, "prompt", config.prompts, config.reading, config.seed)
    ensure_chat_template(base.tokenizer, rows)
    return filter_prompts([row["prompt"] for row in rows], base.tokenizer, config.sampling, config.prompts_file)


def measure_generations(
    model: Policy, prompts: Sequence[Text], judges: Mapping[str, Judge], config: Verify, base: AdapterBase
) -> dict[str, float]:
    """Mean of each judge, repetition, share of duplicates and perplexity of one sampled response to each prompt.

    Perplexity is per token, EOS included, under the base: it rises where text is no longer the base's language, and
    falls where it repeats itself.
    """

    def likelihood(rollout: Rollout) -> dict[str, Tensor]:
        tokens = (rollout.input_ids, rollout.attention_mask, rollout.response_tokens)
        logprobs = response_logprobs(base.model, *tokens, 1.0, base.tokenizer.pad_token_id)[0]
        return {"logprob": logprobs.masked_fill(~rollout.response_mask, 0).sum(1), "tokens": rollout.length}

    torch.manual_seed(config.seed)
    responses = respond_and_score(model, base.tokenizer, prompts, config.sampling, likelihood, len(prompts))
    statistics = text_statistics(responses.texts, [display_text(prompt) for prompt in prompts])
    likelihoods = {name: values.sum().item() for name, values in responses.measures.items()}
    return {judge: float(np.mean(score(responses.texts))) for judge, score in judges.items()} | {
        "repetition": statistics.word_repetition,
        "duplicates": statistics.duplicate_share,
        "perplexity": math.exp(-likelihoods["logprob"] / likelihoods["tokens"]),
    }
