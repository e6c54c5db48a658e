"""What adapters side by side are worth on rows: how likely they find text, and what becomes of what they write.

    rows -> tokens, once -> weights of the loaded adapters -> numbers, one a row -> a figure with its interval

loss and perplexity are per token, EOS included; accuracy is the share of pairs whose chosen completion is the likelier;
reward, vader, classifier, repetition and kl are of one response to each prompt, sampled from the same noise whatever
the weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters import algebra
from pipeline.adapters.compose import Mixture
from pipeline.adapters.expressions import Call, Expression, parse, parts, variables, weighted
from pipeline.adapters.files import AdapterBase, AdapterError, SavedAdapter, write_adapter
from pipeline.config.commands import Search
from pipeline.config.errors import UserError
from pipeline.core.losses import next_token_loss
from pipeline.data.formats import Text, read_rows
from pipeline.data.tokenize import (
    IGNORE_INDEX,
    decode,
    ensure_chat_template,
    flatten_pieces,
    length_batches,
    pad_rows,
    row_pieces,
)
from pipeline.data.tokenizer import load_shared_tokenizer
from pipeline.evaluation.judges import Classifier, Vader, fit_judge
from pipeline.evaluation.statistics import Estimate, mean_ci, pair_accuracy, share_ci
from pipeline.evaluation.text import word_repetition
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import load_reward_model
from pipeline.models.loading import Policy, freeze
from pipeline.rl.rewards import reward_model_scores
from pipeline.data.prompts import filter_prompts
from pipeline.rl.rollout import generate
from pipeline.runtime.console import print_main
from pipeline.runtime.launch import new_accelerator

Array = NDArray[np.float64]
Weights = Mapping[str, float]
"""Of adapters, and of functions of adapters, by their text in the expression; one that is not named has 0."""
Labelled = tuple[list[int], list[int]]
"""Ids of a row, and its labels: IGNORED where nothing is predicted."""

SAMPLED = ("reward", "vader", "classifier", "repetition", "kl")
MEASURED = ("loss", "accuracy", "perplexity", *SAMPLED)
FIELDS = {
    "prompt": ("prompt",),
    "completion": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
"""By what a row is known."""


class SearchError(UserError):
    """A search that cannot be made as asked; the message names the dial and what was expected."""


@dataclass(frozen=True)
class Rows:
    """One split, made tokens once: what is not measured is empty."""

    prompts: list[Text]
    completions: list[Labelled]
    chosen: list[Labelled]
    rejected: list[Labelled]
    retained: list[Labelled]
    keys: set[str]  # of its rows
    retained_keys: set[str]


@dataclass(frozen=True)
class EvalContext:
    """What measures: the loaded adapters and the judges that are asked."""

    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase
    asked: set[str]
    reference: Weights
    reward_model: PreTrainedModel | None
    classifier: Classifier | None
    config: Search


# ------------------------------------------------------------------------------------------------- measuring


def measured(weights: Weights, rows: Rows, bench: EvalContext) -> dict[str, Array]:
    """Numbers (n,) of each measure, one a row, whose mean is the figure (perplexity: its logarithm)."""
    bench.mixture.set(weights)
    likelihoods = {
        name: log_likelihoods(bench.mixture.model, bench.tokenizer, part, bench.config.batch_size)
        for name in ("completions", "chosen", "rejected", "retained")
        if (part := getattr(rows, name))
    }
    found: dict[str, Array] = {}
    if rows.completions:
        found["loss"] = per_token(*likelihoods["completions"])
    if rows.chosen:
        found["accuracy"] = pair_accuracy(likelihoods["chosen"][0] - likelihoods["rejected"][0])
    if rows.retained:
        found["perplexity"] = per_token(*likelihoods["retained"])
    if rows.prompts:
        found |= sampled(weights, rows.prompts, bench)
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise SearchError(f"{name}: not a finite number at weights {told(weights)}; narrow the range")
    return found


@torch.no_grad()
def log_likelihoods(
    model: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Labelled], batch_size: int
) -> tuple[Array, Array]:
    """Log-likelihood (n,) of each row's labelled tokens, nats, and their number (n,)."""
    likelihood, count = np.zeros(len(rows)), np.zeros(len(rows))
    for part in length_batches([len(ids) for ids, _ in rows], batch_size):
        ids, mask = pad_rows([rows[row][0] for row in part], tokenizer.pad_token_id, "right")
        labels, _ = pad_rows([rows[row][1] for row in part], IGNORE_INDEX, "right")
        ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        losses, counted = next_token_loss(logits, labels, 0.0)
        likelihood[part], count[part] = -losses.double().sum(1).cpu().numpy(), counted.sum(1).cpu().numpy()
    return likelihood, count


def per_token(likelihood: Array, count: Array) -> Array:
    """Numbers (n,) whose mean is the mean loss of a token and whose spread is that mean's, by linearisation.

    A ratio of two sums over rows, r = sum l / sum c, has the standard error of the mean of r + (l - r c) / mean(c).
    """
    ratio = -likelihood.sum() / count.sum()
    return np.asarray(ratio + (-likelihood - ratio * count) / count.mean())


@torch.no_grad()
def sampled(weights: Weights, prompts: Sequence[Text], bench: EvalContext) -> dict[str, Array]:
    """What is asked of one response to each prompt, sampled from the same noise at all weights; kl is k1, nats."""
    config, model, tokenizer = bench.config, bench.mixture.model, bench.tokenizer
    texts: list[str] = []
    scores: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    torch.manual_seed(config.seed)
    for start in range(0, len(prompts), config.batch_size):
        bench.mixture.set(weights)
        rollout = generate(model, tokenizer, prompts[start : start + config.batch_size], config.sampling)
        texts += [decode(tokenizer, ids) for ids in rollout.responses.tolist()]
        if bench.reward_model is not None:
            scores.append(reward_model_scores(bench.reward_model, rollout.input_ids, rollout.attention_mask))
        ids = (rollout.input_ids, rollout.attention_mask, rollout.response_tokens, config.sampling.temperature)
        own = response_logprobs(model, *ids, tokenizer.pad_token_id)[0]
        bench.mixture.set(bench.reference)
        log_ratio = own - response_logprobs(model, *ids, tokenizer.pad_token_id)[0]
        kl.append(log_ratio.masked_fill(~rollout.response_mask, 0).sum(1))
    found: dict[str, Array] = {"kl": torch.cat(kl).double().cpu().numpy()}
    if scores:
        found["reward"] = torch.cat(scores).double().cpu().numpy()
    if "vader" in bench.asked:
        found["vader"] = Vader()(texts)
    if bench.classifier is not None:
        found["classifier"] = bench.classifier(texts)
    if "repetition" in bench.asked:
        found["repetition"] = np.array([word_repetition(text) for text in texts])
    return found


def figures(rows: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.exp(x.mean()) if name == "perplexity" else x.mean()) for name, x in rows.items()}


def estimate(name: str, values: Array) -> Estimate:
    """The figure with its 95 % interval over rows."""
    if name == "accuracy":
        return share_ci(values)
    found = mean_ci(values)
    if name != "perplexity":
        return found
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def told(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())


# ------------------------------------------------------------------------------------------------- making


def read_split(file: str, retained: str, config: Search, asked: set[str], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of one split, each file read once, as tokens for what is asked."""
    kind = "pair" if "accuracy" in asked else "completion" if "loss" in asked else "prompt"
    rows = read_rows(file, kind, config.rows, config.bad_rows, config.seed)
    ensure_chat_template(tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (
        labelled(tokenizer, prompts, [row[side] for row in rows]) if "accuracy" in asked else []
        for side in ("chosen", "rejected")
    )
    completion = "chosen" if kind == "pair" else "completion"
    completions = labelled(tokenizer, prompts, [row[completion] for row in rows]) if "loss" in asked else []
    short = [row for row in zip(chosen, rejected, strict=True) if max(len(ids) for ids, _ in row) <= config.max_length]
    fitting = [row for row in completions if len(row[0]) <= config.max_length]
    for kept, given in ((short, chosen), (fitting, completions)):
        if len(kept) < min(2, len(given)):
            raise SearchError(f"{file}: fewer than 2 rows have at most max_length = {config.max_length}: raise it")
        if len(kept) < len(given):
            print_main(f"{file}: {len(given) - len(kept):,} rows are longer than {config.max_length} tokens (left out)")
    texts = read_rows(retained, "text", config.rows, config.bad_rows, config.seed) if retained else []
    whole = labelled(tokenizer, [""] * len(texts), [row["text"] for row in texts]) if texts else []
    return Rows(
        prompts=filter_prompts(prompts, tokenizer, config.sampling, file) if asked & set(SAMPLED) else [],
        completions=fitting,
        chosen=[row[0] for row in short],
        rejected=[row[1] for row in short],
        retained=[(ids[: config.max_length], labels[: config.max_length]) for ids, labels in whole],
        keys={key(row, kind) for row in rows},
        retained_keys={key(row, "text") for row in texts},
    )


def key(row: Mapping[str, Any], kind: str) -> str:
    """A row's content."""
    return json.dumps([row[field] for field in FIELDS[kind]], ensure_ascii=False)


def labelled(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[Labelled]:
    """Rows whose labels are the completion and its EOS."""
    rows = []
    for pieces in row_pieces(tokenizer, prompts, completions):
        before, completion = flatten_pieces(pieces[:-1]), pieces[-1][0]
        rows.append((before + completion, [IGNORE_INDEX] * len(before) + completion))
    return rows


def refuse_unmixable(adapters: Mapping[str, SavedAdapter], ground: AdapterBase) -> None:
    """AdapterError for what side by side is not the sum, AlgebraError for adapters that cannot be added at all."""
    if ground.task != "CAUSAL_LM":
        raise AdapterError(f"adapters: task_type: {ground.task}; a search measures language models")
    for name, adapter in adapters.items():
        if adapter.heads:
            raise AdapterError(
                f"adapter '{name}': modules_to_save: it has whole trained layers ({', '.join(adapter.heads)}), which "
                "have no weight to search for"
            )
    algebra.add([(name, 1.0, adapter.update) for name, adapter in adapters.items()])


def new_bench(
    config: Search,
    expressions: Sequence[Expression],
    adapters: Mapping[str, SavedAdapter],
    ground: AdapterBase,
    asked: set[str],
    made: Path,
) -> EvalContext:
    """All adapters loaded, functions of adapters among them, written into the folder `made`; and the judges asked."""
    reference = parse(config.reference, adapters)
    if free := variables(reference):
        raise SearchError(f"reference: ${free[0]} has no value")
    folders = {name: adapter.folder for name, adapter in adapters.items()}
    updates = {name: adapter.update for name, adapter in adapters.items()}
    functions = {part: None for whole in (*expressions, reference) for part in parts(whole) if isinstance(part, Call)}
    for number, call in enumerate(call for call in functions if call.function not in ("avg", "lerp")):
        if free := variables(call):
            raise SearchError(
                f"expression: ${free[0]} stands in {call}, which is made anew for each number of it: a search finds "
                "weights only; put the variable before the function"
            )
        folders[str(call)] = made / str(number)
        folders[str(call)].mkdir()
        write_adapter(folders[str(call)], algebra.compress(algebra.evaluate(call, updates))[0], {}, ground, "fp32")
    device = new_accelerator("fp32").device
    reward_model, classifier = None, None
    if "reward" in asked:
        if not config.reward:
            raise SearchError("reward: say which reward model")
        load_shared_tokenizer({"base": ground.path, "reward": config.reward})
        reward_model = freeze(load_reward_model(config.reward)).to(device)
    if "classifier" in asked:
        if not config.judge_file:
            raise SearchError("judge_file: say which rows the classifier is fitted to")
        classifier = fit_judge(config.judge_file, config.seed)
    mixture = Mixture(ground.model, folders)
    mixture.model.to(device)
    return EvalContext(mixture, ground.tokenizer, asked, weights_of(reference), reward_model, classifier, config)


def weights_of(expression: Expression) -> dict[str, float]:
    """The expression as weights of what is loaded."""
    return {str(atom): float(weight) for atom, weight in weighted(expression).items()}
