"""The rows that a search measures on, tokenized once: validation and test rows, which share none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.adapters.search_dials import SAMPLED_MEASURES, SearchError
from pipeline.config.commands import Search
from pipeline.data.chat_template import ensure_chat_template, join_segments
from pipeline.data.formats import read_rows
from pipeline.data.messages import Text
from pipeline.data.prompts import filter_prompts
from pipeline.data.tokenize import IGNORE_INDEX, row_segments
from pipeline.runtime.console import print_main

LabelledRow = tuple[list[int], list[int]]
"""Ids of a row, and its labels: IGNORE_INDEX where nothing is predicted."""
KEY_FIELDS = {
    "prompt": ("prompt",),
    "completion": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
"""Fields by which a row of each kind is known again."""


@dataclass(frozen=True)
class EvalRows:
    """One split; what is not measured is empty."""

    prompts: list[Text]
    completions: list[LabelledRow]
    chosen: list[LabelledRow]
    rejected: list[LabelledRow]
    retained: list[LabelledRow]
    keys: set[str]  # of its rows
    retained_keys: set[str]


def read_splits(config: Search, measures: set[str], tokenizer: PreTrainedTokenizerBase) -> tuple[EvalRows, EvalRows]:
    """Validation and test rows; SearchError where they share a row."""
    splits = []
    for name, file, retain_file in (
        ("validation_file", config.validation_file, config.retain_file),
        ("test_file", config.test_file, config.retain_test_file),
    ):
        if not file:
            raise SearchError(f"{name}: say which rows; the two splits must share none")
        if "perplexity" in measures and not retain_file:
            which = "retain_file" if name == "validation_file" else "retain_test_file"
            raise SearchError(f"{which}: perplexity is asked for: say of which text")
        splits.append(read_split(file, retain_file if "perplexity" in measures else "", config, measures, tokenizer))
    validation, test = splits
    for one, other, validation_keys, test_keys in (
        ("validation_file", "test_file", validation.keys, test.keys),
        ("retain_file", "retain_test_file", validation.retained_keys, test.retained_keys),
    ):
        if shared := validation_keys & test_keys:
            raise SearchError(
                f"{other}: {len(shared)} of its rows are in {one} too, first {min(shared)[:80]}: what is chosen on a "
                "row cannot be reported on it; give rows that the search does not see"
            )
    return validation, test


def read_split(
    file: str, retain_file: str, config: Search, measures: set[str], tokenizer: PreTrainedTokenizerBase
) -> EvalRows:
    """The rows of one split, each file read once, as tokens for what is measured."""
    kind = "pair" if "accuracy" in measures else "completion" if "loss" in measures else "prompt"
    rows = read_rows(file, kind, config.rows, config.reading, config.seed)
    ensure_chat_template(tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    completions: list[LabelledRow] = []
    pairs: list[tuple[LabelledRow, LabelledRow]] = []
    if "loss" in measures:
        field = "chosen" if kind == "pair" else "completion"
        completions = label_rows(tokenizer, prompts, [row[field] for row in rows])
    if "accuracy" in measures:
        chosen, rejected = (
            label_rows(tokenizer, prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")
        )
        pairs = list(zip(chosen, rejected, strict=True))
    short_pairs = [pair for pair in pairs if max(len(ids) for ids, _ in pair) <= config.max_length]
    short_completions = [row for row in completions if len(row[0]) <= config.max_length]
    for kept, total in ((len(short_pairs), len(pairs)), (len(short_completions), len(completions))):
        if kept < min(2, total):
            raise SearchError(f"{file}: fewer than 2 rows have at most max_length = {config.max_length}: raise it")
        if kept < total:
            print_main(f"{file}: {total - kept:,} rows are longer than {config.max_length} tokens (left out)")
    as_named = replace(config.reading, columns="")  # `columns` is of the rows above
    texts = read_rows(retain_file, "text", config.rows, as_named, config.seed) if retain_file else []
    retained = label_rows(tokenizer, [""] * len(texts), [row["text"] for row in texts]) if texts else []
    is_sampled = bool(measures & set(SAMPLED_MEASURES))
    return EvalRows(
        prompts=filter_prompts(prompts, tokenizer, config.sampling, file) if is_sampled else [],
        completions=short_completions,
        chosen=[chosen for chosen, _ in short_pairs],
        rejected=[rejected for _, rejected in short_pairs],
        retained=[(ids[: config.max_length], labels[: config.max_length]) for ids, labels in retained],
        keys={row_key(row, kind) for row in rows},
        retained_keys={row_key(row, "text") for row in texts},
    )


def row_key(row: Mapping[str, Any], kind: str) -> str:
    """The content by which a row is known again."""
    return json.dumps([row[field] for field in KEY_FIELDS[kind]], ensure_ascii=False)


def label_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[LabelledRow]:
    """Rows whose labels are the completion and its EOS."""
    rows = []
    for pieces in row_segments(tokenizer, prompts, completions):
        prompt, completion = join_segments(pieces[:-1]), pieces[-1][0]
        rows.append((prompt + completion, [IGNORE_INDEX] * len(prompt) + completion))
    return rows
