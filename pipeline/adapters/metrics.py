"""What weights of adapters side by side are worth on rows: how likely they find text, and what they write.

loss and perplexity are per token, EOS included; accuracy is the share of pairs whose chosen completion is the likelier;
reward, vader, classifier, repetition and kl are of one response to each prompt, sampled from the same noise whatever
the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters.algebra import evaluate
from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.compression import compress_update
from pipeline.adapters.eval_rows import EvalRows, LabelledRow
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.expressions import Call, Expression, subexpressions, variables
from pipeline.adapters.mixture import Mixture, mixture_weights
from pipeline.adapters.reading import SavedAdapter
from pipeline.adapters.search_dials import SearchError
from pipeline.adapters.updates import check_addable
from pipeline.adapters.writing import write_adapter
from pipeline.config.commands import Search
from pipeline.core.losses import next_token_loss
from pipeline.data.messages import Text
from pipeline.data.tokenize import IGNORE_INDEX, length_batches, pad_rows
from pipeline.data.tokenizer import load_shared_tokenizer
from pipeline.evaluation.judges import Classifier, Vader, fit_judge
from pipeline.evaluation.statistics import Array, Estimate, mean_ci, pair_accuracy, share_ci
from pipeline.evaluation.text import word_repetition
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import load_reward_model
from pipeline.models.loading import Policy, freeze
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import Rollout, respond_and_score
from pipeline.runtime.launch import new_accelerator

Weights = Mapping[str, float]
"""Of adapters, and of functions of adapters, by their text in the expression; one that is not named has 0."""


@dataclass(frozen=True)
class EvalContext:
    """The loaded adapters, what is measured of them, and the judges that it takes."""

    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase
    measures: set[str]
    reference: Weights
    reward_model: PreTrainedModel | None
    classifier: Classifier | None
    config: Search


def make_eval_context(
    config: Search,
    expressions: Sequence[Expression],
    adapters: Mapping[str, SavedAdapter],
    base: AdapterBase,
    measures: set[str],
    folder: Path,
) -> EvalContext:
    """All adapters loaded, functions of adapters among them, which are written into `folder`; and the judges."""
    reference = parse(config.reference, adapters)
    if free := variables(reference):
        raise SearchError(f"reference: ${free[0]} has no value")
    folders = {name: adapter.folder for name, adapter in adapters.items()}
    folders |= write_function_adapters([*expressions, reference], adapters, base, folder)
    device = new_accelerator("fp32").device
    reward_model, classifier = None, None
    if "reward" in measures:
        if not config.reward:
            raise SearchError("reward: say which reward model")
        scored = load_shared_tokenizer({"base": base.path, "reward": config.reward})
        if scored.eos_token_id != base.tokenizer.eos_token_id:
            raise SearchError(
                f"reward: {config.reward} scores texts that end with '{scored.eos_token}', {base.path} ends them with "
                f"'{base.tokenizer.eos_token}'; give a reward model of the same SFT policy"
            )
        reward_model = freeze(load_reward_model(config.reward)).to(device)
    if "classifier" in measures:
        if not config.judge_file:
            raise SearchError("judge_file: say which rows the classifier is fitted to")
        classifier = fit_judge(config.judge_file, config.seed)
    mixture = Mixture(base.model, folders)
    mixture.model.to(device)
    return EvalContext(mixture, base.tokenizer, measures, mixture_weights(reference), reward_model, classifier, config)


def write_function_adapters(
    expressions: Sequence[Expression], adapters: Mapping[str, SavedAdapter], base: AdapterBase, folder: Path
) -> dict[str, Path]:
    """Writes what each ties, dare or paper in the expressions gives as an adapter; the folders by the call's text."""
    updates = {name: adapter.update for name, adapter in adapters.items()}
    calls = [node for whole in expressions for node in subexpressions(whole) if isinstance(node, Call)]
    folders: dict[str, Path] = {}
    for call in dict.fromkeys(call for call in calls if call.function not in ("avg", "lerp")):
        if free := variables(call):
            raise SearchError(
                f"expression: ${free[0]} stands in {call}, which is made anew for each number of it: a search finds "
                "weights only; put the variable before the function"
            )
        folders[str(call)] = folder / str(len(folders))
        folders[str(call)].mkdir()
        write_adapter(folders[str(call)], compress_update(evaluate(call, updates))[0], {}, base, "fp32")
    return folders


def check_mixable(adapters: Mapping[str, SavedAdapter], base: AdapterBase) -> None:
    """AdapterError for what side by side is not the sum, AlgebraError for adapters that cannot be added at all."""
    if base.task != "CAUSAL_LM":
        raise AdapterError(f"adapters: task_type: {base.task}; a search measures language models")
    for name, adapter in adapters.items():
        if adapter.heads:
            raise AdapterError(
                f"adapter '{name}': modules_to_save: it has whole trained layers ({', '.join(adapter.heads)}), which "
                "have no weight to search for"
            )
    check_addable([(name, adapter.update) for name, adapter in adapters.items()])


def measure(weights: Weights, rows: EvalRows, context: EvalContext) -> dict[str, Array]:
    """Numbers (n,) of each measure, one a row, whose mean is the figure (perplexity: its logarithm)."""
    context.mixture.set_weights(weights)

    def likelihoods(labelled_rows: Sequence[LabelledRow]) -> tuple[Array, Array]:
        return log_likelihoods(context.mixture.model, context.tokenizer, labelled_rows, context.config.batch_size)

    numbers: dict[str, Array] = {}
    if rows.completions:
        numbers["loss"] = token_losses(*likelihoods(rows.completions))
    if rows.chosen:
        numbers["accuracy"] = pair_accuracy(likelihoods(rows.chosen)[0] - likelihoods(rows.rejected)[0])
    if rows.retained:
        numbers["perplexity"] = token_losses(*likelihoods(rows.retained))
    if rows.prompts:
        numbers |= measure_samples(weights, rows.prompts, context)
    for name, values in numbers.items():
        if not np.isfinite(values).all():
            raise SearchError(f"{name}: not a finite number at weights {format_figures(weights)}; narrow the range")
    return numbers


@torch.no_grad()
def log_likelihoods(
    model: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[LabelledRow], batch_size: int
) -> tuple[Array, Array]:
    """Log-likelihood (n,) of each row's labelled tokens, nats, and their number (n,)."""
    likelihood, count = np.zeros(len(rows)), np.zeros(len(rows))
    for batch in length_batches([len(ids) for ids, _ in rows], batch_size):
        ids, mask = pad_rows([rows[row][0] for row in batch], tokenizer.pad_token_id, "right")
        labels, _ = pad_rows([rows[row][1] for row in batch], IGNORE_INDEX, "right")
        ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        losses, is_counted = next_token_loss(logits, labels, 0.0)
        likelihood[batch], count[batch] = -losses.double().sum(1).cpu().numpy(), is_counted.sum(1).cpu().numpy()
    return likelihood, count


def token_losses(likelihood: Array, count: Array) -> Array:
    """Numbers (n,) whose mean is the mean loss of a token and whose spread is that mean's, by linearisation.

    A ratio of two sums over rows, r = sum l / sum c, has the standard error of the mean of r + (l - r c) / mean(c).
    """
    ratio = -likelihood.sum() / count.sum()
    return np.asarray(ratio + (-likelihood - ratio * count) / count.mean())


def measure_samples(weights: Weights, prompts: Sequence[Text], context: EvalContext) -> dict[str, Array]:
    """What is measured of one response to each prompt, sampled from the same noise at all weights; kl is k1, nats."""
    config, mixture, tokenizer = context.config, context.mixture, context.tokenizer

    def score(rollout: Rollout) -> dict[str, Tensor]:
        tokens = (rollout.input_ids, rollout.attention_mask, rollout.response_tokens, config.sampling.temperature)
        logprobs = response_logprobs(mixture.model, *tokens, tokenizer.pad_token_id)[0]
        mixture.set_weights(context.reference)
        log_ratio = logprobs - response_logprobs(mixture.model, *tokens, tokenizer.pad_token_id)[0]
        mixture.set_weights(weights)  # the next batch is sampled at these
        scores = {"kl": log_ratio.masked_fill(~rollout.response_mask, 0).sum(1)}
        if context.reward_model is not None:
            scores["reward"] = reward_model_scores(context.reward_model, rollout.input_ids, rollout.attention_mask)
        return scores

    mixture.set_weights(weights)
    torch.manual_seed(config.seed)
    responses = respond_and_score(mixture.model, tokenizer, prompts, config.sampling, score, config.batch_size)
    numbers: dict[str, Array] = {name: values.double().numpy() for name, values in responses.measures.items()}
    if "vader" in context.measures:
        numbers["vader"] = Vader()(responses.texts)
    if context.classifier is not None:
        numbers["classifier"] = context.classifier(responses.texts)
    if "repetition" in context.measures:
        numbers["repetition"] = np.array([word_repetition(text) for text in responses.texts])
    return numbers


def mean_figures(numbers: Mapping[str, Array]) -> dict[str, float]:
    """The figure of each measure: its mean over rows, of perplexity the exponential of that."""
    return {name: float(np.exp(x.mean()) if name == "perplexity" else x.mean()) for name, x in numbers.items()}


def estimate(name: str, numbers: Array) -> Estimate:
    """The figure of a measure with its 95 % interval over rows."""
    if name == "accuracy":
        return share_ci(numbers)
    mean = mean_ci(numbers)
    if name != "perplexity":
        return mean
    return Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)


def format_figures(figures: Mapping[str, float]) -> str:
    """The figures with their names, four digits each."""
    return ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
