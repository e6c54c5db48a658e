"""Stage 3: a Bradley-Terry reward model on pairs of whole texts, centred on the SFT policy, beside a linear one."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from pipeline.config.stages import Reward
from pipeline.data.formats import full_text, read_rows
from pipeline.data.prompts import read_prompts
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import (
    IGNORE_INDEX,
    ensure_chat_template,
    length_batches,
    pad_rows,
    preference_rows,
    show_example,
)
from pipeline.data.tokenizer import ModelError, load_shared_tokenizer
from pipeline.evaluation.judges import linear_pair_baseline, longer_wins
from pipeline.evaluation.statistics import accuracy_by_bucket, pair_accuracy, share_ci
from pipeline.models.heads import load_reward_model_with_adapter, new_reward_model
from pipeline.models.loading import (
    Policy,
    cast_trained_to_fp32_,
    check_model,
    disable_dropout_,
    freeze,
    is_4bit,
    load_language_model,
    unwrap_peft,
    wrap_with_adapter,
)
from pipeline.models.saving import save_with_base
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import respond_and_score
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun
from pipeline.training.trainer import HeadTrainer, run_training, training_arguments

PROBES = 8  # texts whose scores must be the same after loading
TOLERANCE = 1e-5
MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)  # rating points; pairs from binary labels have margin 0


def train(config: Reward) -> Path:
    """Trains the reward model and returns its `final` directory: a sequence classifier with its shift in the config."""
    silence_libraries()
    config.optim.accumulation(processes().num_processes)  # a batch that does not divide is refused before any work
    base, sft = config.run.final("pretrain", config.base), config.run.final("sft", config.sft)
    files = [config.train_file, config.validation_file, config.test_file, config.prompts_file]
    stage = StageRun("reward", config, {"base": base, "sft": sft}, hash_sources(files))
    if stage.is_finished():
        return stage.final
    with stage:
        set_seed(config.run.seed)
        tokenizer = load_shared_tokenizer({"sft": sft, "base": base})
        model: Policy = new_reward_model(base, tokenizer, config.adapter.load_in_4bit)
        if config.adapter.adapter != "none":
            model = wrap_with_adapter(unwrap_peft(model), config.adapter, TaskType.SEQ_CLS)
        pairs = read_rows(config.train_file, "pair", config.train_rows, config.run.bad_rows, config.run.seed)
        ensure_chat_template(tokenizer, pairs)
        rows, longer = preference_rows(tokenizer, pairs, config.max_length, config.too_long)
        print_main(
            f"reward: {len(rows):,} pairs; {longer:,} were longer than {config.max_length} tokens ({config.too_long})"
        )
        sampled = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
        check_model(unwrap_peft(model), tokenizer, max(sampled, *pair_lengths(rows)), base)
        first = rows[0]["chosen_ids"]
        show_example(tokenizer, first, [IGNORE_INDEX] * (len(first) - 1) + first[-1:], "chosen, scored at")
        trainer = new_trainer(model, tokenizer, rows, config, stage.folder)
        cast_trained_to_fp32_(model)
        trained_model = run_training(trainer, model, stage).eval()
        model = unwrap_peft(trained_model)
        model.config.score_shift = mean_score_of_samples(model, tokenizer, sft, config)
        metrics: dict[str, Any] = {
            "pairs": len(rows),
            "pairs_too_long": longer,
            "score_shift": model.config.score_shift,
        }
        metrics["validation"] = held_out_accuracy(model, tokenizer, config.validation_file, config, pairs=None)
        metrics["test"] = held_out_accuracy(model, tokenizer, config.test_file, config, pairs=pairs)
        test = metrics["test"]
        print_main(
            f"reward: held-out pair accuracy {test['accuracy']['value']:.3f} "
            f"[{test['accuracy']['low']:.3f}, {test['accuracy']['high']:.3f}] on {test['accuracy']['n']:,} pairs; "
            f"TF-IDF + ridge {test['linear_baseline']['value']:.3f}; longer wins {test['longer_wins']['value']:.3f}"
        )
        return stage.finish(partial(save_reward_model, trained_model, tokenizer, rows["chosen_ids"][:PROBES]), metrics)


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


def mean_score_of_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sft: Path, config: Reward
) -> float:
    """Mean score of responses sampled from the SFT policy, whole or cut off alike: the zero point of the scale."""
    policy = freeze(load_language_model(sft)).to(processes().device)
    prompts = read_prompts(config.prompts_file, config.centre_prompts, tokenizer, config)
    torch.manual_seed(config.run.seed)
    responses = respond_and_score(
        policy, tokenizer, prompts, config.sampling,
        lambda rollout: {"score": reward_model_scores(model, rollout.input_ids, rollout.attention_mask)},
        batch_size=config.optim.micro_batch,
    )  # fmt: skip
    return responses.measures["score"].mean().item()


def held_out_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str, config: Reward, pairs: list[dict] | None
) -> dict[str, Any]:
    """Pair accuracy (ties count one half) with its 95 % interval, by source and margin, beside 'the longer text wins'.

    With the training `pairs` also a linear baseline fitted on them and tested on the same held-out pairs.
    """
    rows = read_rows(file, "pair", config.validation_rows, config.run.bad_rows)
    ensure_chat_template(tokenizer, rows)
    tokens, _ = preference_rows(tokenizer, rows, 10**9, "error")
    chosen, rejected = (score_rows(model, tokenizer, tokens[side], config) for side in ("chosen_ids", "rejected_ids"))
    correct = pair_accuracy(chosen - rejected)
    margins = np.array(tokens["margin"])
    texts = [[full_text(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    lengths = np.array([len(ids) for side in ("chosen_ids", "rejected_ids") for ids in tokens[side]])
    report: dict[str, Any] = {
        "accuracy": asdict(share_ci(correct)),
        "by_margin": [asdict(bucket) for bucket in accuracy_by_bucket(correct, margins, MARGIN_EDGES)],
        "by_source": {
            source: asdict(share_ci(correct[[row.get("source") == source for row in rows]]))
            for source in sorted({row["source"] for row in rows if "source" in row})
        },
        "longer_wins": asdict(share_ci(longer_wins(*texts))),
        "score_std": float(np.std(np.concatenate([chosen, rejected]))),
        "score_length_correlation": float(np.corrcoef(np.concatenate([chosen, rejected]), lengths)[0, 1]),
    }
    if pairs is not None:
        train = [[full_text(row["prompt"], row[side]) for row in pairs] for side in ("chosen", "rejected")]
        baseline = linear_pair_baseline(train[0], train[1], [row["margin"] for row in pairs], texts[0], texts[1])
        report["linear_baseline"] = asdict(share_ci(baseline))
    return report
