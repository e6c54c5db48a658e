"""From files of text to rows of token ids: one place where text becomes tokens, for every stage.

    prompt      [bos] Just saw this with my
    completion                              dad and we both loved it. [eos]
    score input [bos] Just saw this with my dad and we both loved it. [eos]

A prompt and its completion are tokenized apart and joined as ids, in SFT, in reward training and in PPO alike, so the
reward model reads in PPO exactly the ids it was trained on. Nothing here looks for padding by its id.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.config import UserError

IGNORED = -100  # the label of a token that carries no loss (PyTorch's convention)


class DataError(UserError):
    """A row that cannot be used; the message names file, row and field, what was expected and how to mend it."""


def read_rows(file: str, fields: Sequence[str], limit: int = 0) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with the given text fields; the first `limit` of them, 0 for all.

    Raises DataError for a row that is not a JSON object, or lacks a field, or holds another type or no text in it;
    the optional `prompt` and `margin` may be absent, not wrong.
    """
    rows: list[dict[str, Any]] = []
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit and len(rows) == limit:
                break
            rows.append(_checked(file, number, line, fields))
    if not rows:
        raise DataError(f"{file}: no rows; expected one JSON object per line with {', '.join(fields)}")
    return rows


def _checked(file: str, number: int, line: bytes, fields: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: row {number}: not JSON ({error}); expected one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}: row {number}: expected a JSON object, got {type(row).__name__}")
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            got = repr(row[field])[:40] if field in row else "no such field"
            raise DataError(f"{file}: row {number}: {field}: expected text, got {got}; mend or remove the row")
    if not isinstance(row.get("prompt", ""), str):
        raise DataError(f"{file}: row {number}: prompt: expected text or no such field, got {row['prompt']!r:.40}")
    margin = row.get("margin", 0)
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"{file}: row {number}: margin: expected a finite number or no such field, got {margin!r:.40}")
    return row


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt, opened by what the tokenizer puts before a text (bos)."""
    return tokenizer(list(prompts))["input_ids"]


def completion_ids(tokenizer: PreTrainedTokenizerBase, completions: Sequence[str]) -> list[list[int]]:
    """Ids of each completion, closed by EOS."""
    return [
        [*ids, tokenizer.eos_token_id] for ids in tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    ]


def text_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt + completion + EOS: what SFT trains on and what the reward model scores."""
    parts = prompt_ids(tokenizer, prompts), completion_ids(tokenizer, completions)
    return [prompt + completion for prompt, completion in zip(*parts, strict=True)]


def language_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Dataset:
    """`input_ids` of whole texts, each opened by bos and closed by EOS."""
    return Dataset.from_list([{"input_ids": ids} for ids in text_ids(tokenizer, [""] * len(texts), texts)])


def completion_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_tokens: int) -> tuple[Dataset, int]:
    """`input_ids` and `labels` (IGNORED on the prompt) of prompt + completion + EOS; how many rows were too long."""
    prompts = prompt_ids(tokenizer, [row["prompt"] for row in rows])
    completions = completion_ids(tokenizer, [row["completion"] for row in rows])
    kept = [
        {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
        for prompt, completion in zip(prompts, completions, strict=True)
        if len(prompt) + len(completion) <= max_tokens
    ]
    return _not_empty(kept, max_tokens), len(prompts) - len(kept)


def preference_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_tokens: int) -> tuple[Dataset, int]:
    """`chosen_ids`, `rejected_ids` and `margin` of pairs of whole texts, and how many pairs were too long."""
    prompts = [row.get("prompt", "") for row in rows]
    chosen, rejected = (text_ids(tokenizer, prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    kept = [
        {"chosen_ids": better, "rejected_ids": worse, "margin": float(row.get("margin", 0.0))}
        for row, better, worse in zip(rows, chosen, rejected, strict=True)
        if max(len(better), len(worse)) <= max_tokens
    ]
    return _not_empty(kept, max_tokens), len(prompts) - len(kept)


def _not_empty(rows: list[dict], max_tokens: int) -> Dataset:
    if not rows:
        raise DataError(f"every row is longer than max_tokens = {max_tokens}; raise max_tokens or shorten the texts")
    return Dataset.from_list(rows)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out, spaces as they were."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """(B, S) ids padded on one side, and the boolean mask of the real ones, made from the lengths."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side),
        pad_sequence(real, batch_first=True, padding_value=False, padding_side=side),
    )


def length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size` rows of like lengths, so that they pad little; short ones first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P) and their mask; a longer prompt keeps its end (the part that asks)."""
    return pad([ids[-max_tokens:] for ids in prompt_ids(tokenizer, prompts)], tokenizer.pad_token_id, "left")
