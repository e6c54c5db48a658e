"""Stage 3: a Bradley-Terry reward model on pairs of whole texts, centred on the SFT policy, beside a linear one."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor
from transformers import CONFIG_NAME, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from pipeline.config.stages import Reward
from pipeline.data.chat_template import conversation_check
from pipeline.data.files import DataError
from pipeline.data.form import check_form, forms_of
from pipeline.data.formats import read_rows
from pipeline.data.messages import Text, full_text
from pipeline.data.prompts import read_prompts
from pipeline.data.sources import hash_sources, naming
from pipeline.data.tokenize import (
    IGNORE_INDEX,
    length_batches,
    pad_rows,
    preference_rows,
    show_example,
)
from pipeline.data.tokenizer import ModelError, hash_template, load_shared_tokenizer
from pipeline.evaluation.judges import linear_pair_baseline, longer_wins
from pipeline.evaluation.side_figures import NOT_MEASURED, show, side_figure
from pipeline.evaluation.statistics import accuracy_by_bucket, correlation, pair_accuracy, share_ci
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import load_reward_model_with_adapter, new_reward_model
from pipeline.models.loading import (
    Policy,
    cast_trained_to_fp32_,
    check_model,
    context_length,
    disable_dropout_,
    freeze,
    is_4bit,
    load_language_model,
    unwrap_peft,
)
from pipeline.models.saving import save_with_base
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import rollouts
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import is_main, processes
from pipeline.runtime.stage_run import StageRun
from pipeline.training.trainer import HeadTrainer, run_training, training_arguments

SAMPLING_DIALS = "max_prompt_tokens or max_new_tokens"
SAMPLED = 16  # prompts at a time, whatever `micro_batch` is: what is drawn depends on it
PROBES = 8  # texts whose scores must be the same after loading
TOLERANCE = 1e-5
MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)  # rating points; pairs from binary labels have margin 0


def train(config: Reward) -> Path:
    """Trains the reward model and returns its `final` directory: a sequence classifier with its shift in the config."""
    silence_libraries()
    config.optim.accumulation(processes().num_processes)  # a batch that does not divide is refused before any work
    base, sft = config.run.final("pretrain", config.base), config.run.final("sft", config.sft)
    files = [config.train_file, config.validation_file, config.test_file, config.prompts_file]
    stage = StageRun("reward", config, {"base": base, "sft": sft}, hash_sources(files) + hash_template(config.tokens))
    if stage.is_finished():
        return stage.final
    with stage:
        set_seed(config.run.seed)
        tokenizer = load_shared_tokenizer({"sft": sft, "base": base}, config.tokens)
        model: Policy = new_reward_model(base, tokenizer, config.adapter.load_in_4bit)
        if config.adapter.adapter != "none":
            model = wrap_with_adapter(unwrap_peft(model), config.adapter, TaskType.SEQ_CLS)
        check = conversation_check(tokenizer, "chosen", "rejected")
        pairs = read_rows(config.train_file, "pair", config.train_rows, config.run.reading, config.run.seed, check)
        stage.form = check_form(pairs, config.train_file, forms_of({"sft": sft}))
        with naming(config.train_file):
            rows, longer = preference_rows(tokenizer, pairs, config.max_length, config.too_long)
        print_main(
            f"reward: {len(rows):,} pairs; {longer:,} were longer than {config.max_length} tokens ({config.too_long})"
        )
        longest = max(pair_lengths(rows))
        what = f"texts of {config.train_file} have up to"
        check_model(unwrap_peft(model), tokenizer, longest, base, what, "max_length")
        forms = {config.train_file: stage.form}
        validation, test = (
            read_held_out(file, tokenizer, config, forms, context_length(unwrap_peft(model)))
            for file in (config.validation_file, config.test_file)
        )
        prompts = read_prompts(config.prompts_file, config.centre_prompts, tokenizer, config, forms)
        stage.heartbeat.enter("samples of the SFT policy")
        samples = sample_responses(unwrap_peft(model), tokenizer, prompts, {"base": base, "sft": sft}, config)
        first = rows[0]["chosen_ids"]
        show_example(tokenizer, first, [IGNORE_INDEX] * (len(first) - 1) + first[-1:], "chosen, scored at")
        trainer = new_trainer(model, tokenizer, rows, config, stage.folder)
        cast_trained_to_fp32_(model)
        trained_model = run_training(trainer, model, stage).eval()
        stage.write(partial(save_reward_model, trained_model, tokenizer, rows["chosen_ids"][:PROBES]))
        model = unwrap_peft(trained_model)
        shift = mean_score(model, samples)
        if is_main():
            write_score_shift(stage.partial, shift)
        metrics: dict[str, Any] = {"pairs": len(rows), "pairs_too_long": longer, "score_shift": shift}
        for name, held_out, fitted in (("validation", validation, None), ("test", test, pairs)):
            metrics[name] = side_figure(
                f"reward: {name}", held_out_figures, model, tokenizer, held_out, config, fitted
            )  # fmt: skip
        print_main(describe_accuracy(metrics["test"]))
        return stage.complete(metrics)


def new_trainer(
    model: Policy, tokenizer: PreTrainedTokenizerBase, rows: Dataset, config: Reward, folder: Path
) -> HeadTrainer:
    """The trainer of the pairs, in batches of like lengths."""
    return HeadTrainer(
        head_learning_rate=config.head_learning_rate,
        model=model,
        args=RewardConfig(
            **training_arguments(config.run, config.optim, folder),
            max_length=None,
        ),
        train_dataset=rows,
        lengths=pair_lengths(rows),
        processing_class=tokenizer,
    )


def pair_lengths(rows: Dataset) -> list[int]:
    """Tokens of each pair's longer text, by which batches are grouped so that they pad little.

    It must not tell chosen from rejected: batches grouped by the chosen text's length hold chosen texts of one length
    beside rejected ones of any, and the model learns that shortcut first (docs/log.md).
    """
    return [max(map(len, pair)) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]


def save_reward_model(
    model: Policy, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Sequence[int]], folder: Path
) -> None:
    """Writes a directory that `AutoModelForSequenceClassification.from_pretrained` loads, tokenizer included.

    Raises ModelError, and so nothing is finished, unless the directory loads as a model that scores the probes alike.
    """
    ids, mask = (x.to(model.device) for x in pad_rows(probes, tokenizer.pad_token_id, "right"))
    expected = reward_model_scores(unwrap_peft(model), ids, mask)
    save_with_base(model, folder)
    tokenizer.save_pretrained(folder)
    loaded = freeze(disable_dropout_(load_reward_model_with_adapter(folder, is_4bit(model)))).to(processes().device)
    error = (reward_model_scores(loaded, ids, mask) - expected).abs().max().item()
    if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ModelError(f"reward: what was saved scores texts otherwise than what was trained, by up to {error:.2g}")


def score_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], config: Reward
) -> np.ndarray:
    """Scores (n,) of token rows, in batches of like lengths, each process computing all of them."""
    scores = np.zeros(len(rows))
    for part in length_batches(list(map(len, rows)), 2 * config.optim.micro_batch):
        ids, mask = pad_rows([rows[row] for row in part], tokenizer.pad_token_id, "right")
        with autocast(config.run.precision):
            scores[part] = reward_model_scores(model, ids.to(model.device), mask.to(model.device)).cpu().numpy()
    return scores


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    parents: Mapping[str, Path],
    config: Reward,
) -> list[tuple[Tensor, Tensor]]:
    """Prompts with a response of the SFT policy to each, in batches of ids and mask (B, S), mask boolean.

    ModelError where they would not fit into the context of that policy or of the reward `model`.
    """
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    with torch.random.fork_rng():
        policy = freeze(load_language_model(parents["sft"])).to(processes().device)
        for sampler, path in ((policy, parents["sft"]), (model, parents["base"])):
            check_model(sampler, tokenizer, longest, path, "sampled texts may have", SAMPLING_DIALS)
        torch.manual_seed(config.run.seed)
        return [
            (rollout.input_ids.cpu(), rollout.attention_mask.cpu())
            for rollout in rollouts(policy, tokenizer, prompts, config.sampling, SAMPLED)
        ]


def mean_score(model: PreTrainedModel, samples: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean score of sampled texts, whole or cut off alike: the zero point of the scale. ModelError if it has none."""
    scores = [reward_model_scores(model, ids.to(model.device), mask.to(model.device)).cpu() for ids, mask in samples]
    shift = torch.cat(scores).mean().item()
    if not math.isfinite(shift):
        raise ModelError("reward: the scores of the SFT policy's samples have no finite mean: lower the learning rate")
    return shift


def write_score_shift(folder: Path, shift: float) -> None:
    """Puts the zero point of the scale into the config of a reward model that was written without it."""
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) | {"score_shift": shift}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs of a file, none longer than the model's context, and how many were."""

    file: str
    rows: list[dict[str, Any]]
    tokens: Dataset
    longer: int


def read_held_out(
    file: str, tokenizer: PreTrainedTokenizerBase, config: Reward, forms: Mapping[str, str], context: int | None
) -> HeldOut:
    """The pairs of a file, whole; those longer than the model's context are left out, unless `too_long` says error.

    A pair that was cut would not be the one that was judged.
    """
    check = conversation_check(tokenizer, "chosen", "rejected")
    rows = read_rows(file, "pair", config.validation_rows, config.run.reading, check=check)
    check_form(rows, file, forms)
    tokens, _ = preference_rows(tokenizer, rows, 10**9, "error")
    lengths = pair_lengths(tokens)
    fits = [number for number, length in enumerate(lengths) if context is None or length <= context]
    longer = len(rows) - len(fits)
    if longer:
        message = (
            f"{file}: {longer:,} of {len(rows):,} pairs are longer than the model's context of {context} tokens (up "
            f"to {max(lengths):,})"
        )
        if config.too_long == "error" or not fits:
            raise DataError(f"{message}: shorten them, or have some fit and leave out the others with --too_long drop")
        print_main(f"{message}: left out")
    return HeldOut(file, [rows[number] for number in fits], tokens.select(fits), longer)


def held_out_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    config: Reward,
    pairs: Sequence[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Pair accuracy (ties count one half) with its 95 % interval, by source and margin, beside 'the longer text wins'.

    With the training `pairs` also a linear baseline fitted on them and tested on the same held-out pairs. None for what
    cannot be computed.
    """
    rows, tokens = held_out.rows, held_out.tokens
    chosen, rejected = (score_rows(model, tokenizer, tokens[side], config) for side in ("chosen_ids", "rejected_ids"))
    correct, scores = pair_accuracy(chosen - rejected), np.concatenate([chosen, rejected])
    texts = [[full_text(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    lengths = np.array([len(ids) for side in ("chosen_ids", "rejected_ids") for ids in tokens[side]])
    sources = [None if row.get("source") is None else str(row["source"]) for row in rows]

    def figure(name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        return side_figure(f"reward: {name} on {held_out.file}", compute, *arguments)

    report: dict[str, Any] = {
        "pairs_too_long": held_out.longer,
        "accuracy": asdict(share_ci(correct)),
        "by_margin": figure("accuracy by margin", accuracy_by_margin, correct, tokens["margin"]),
        "by_source": {
            source: asdict(share_ci(correct[[other == source for other in sources]]))
            for source in sorted(set(filter(None, sources)))
        },
        "longer_wins": figure("longer_wins", lambda: asdict(share_ci(longer_wins(*texts)))),
        "score_std": float(np.std(scores)),
        "score_length_correlation": figure("score_length_correlation", correlation, scores, lengths),
    }
    if pairs is not None:
        train = [[full_text(row["prompt"], row[side]) for row in pairs] for side in ("chosen", "rejected")]
        margins = [row["margin"] for row in pairs]
        report["linear_baseline"] = figure(
            "linear_baseline",
            lambda: asdict(share_ci(linear_pair_baseline(train[0], train[1], margins, texts[0], texts[1]))),
        )
    return report


def accuracy_by_margin(correct: np.ndarray, margins: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy of the pairs by the size of their margin; negative ones have a bucket of their own, where there are."""
    edges = MARGIN_EDGES if min(margins) >= 0 else (-math.inf, *MARGIN_EDGES)
    return [asdict(bucket) for bucket in accuracy_by_bucket(correct, margins, edges)]


def describe_accuracy(test: dict[str, Any] | None) -> str:
    """A sentence on the held-out pairs."""
    if test is None:
        return f"reward: held-out pair accuracy {NOT_MEASURED}"
    accuracy = test["accuracy"]
    return (
        f"reward: held-out pair accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] on "
        f"{accuracy['n']:,} pairs; TF-IDF + ridge {show(test['linear_baseline'], '.3f')}; longer wins "
        f"{show(test['longer_wins'], '.3f')}"
    )
