"""The rows that the findings of adapter arithmetic are tried on."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path("data/imdb")
ROWS = 3000  # texts that an adapter learns from
MAX_WORDS = 60  # words of a question and an answer: the base's context is 128 tokens


def read_labelled_texts(split: str, source: str, seed: int, limit: int, label: str = "") -> list[tuple[str, str]]:
    """(text, label) of distinct texts, five words or more, of one source of the preference pairs, in a drawn order."""
    labels: dict[str, set[str]] = {}
    for line in (DATA / "reward" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["source"] == source:
            labels.setdefault(row["chosen"], set()).add("positive")
            labels.setdefault(row["rejected"], set()).add("negative")
    rows = sorted((text, min(label)) for text, label in labels.items() if len(label) == 1 and len(text.split()) > 4)
    random.Random(seed).shuffle(rows)
    return [row for row in rows if label in ("", row[1])][:limit]


def to_completions(rows: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Each text as a prompt of three words and the completion that follows them."""
    completions = []
    for text, _ in rows:
        start = re.match(r"\s*(\S+\s+){2}\S+", text)
        assert start is not None
        completions.append({"prompt": text[: start.end()], "completion": text[start.end() :]})
    return completions


def split_in_halves(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rotten Tomatoes texts in two, four fifths of the negative ones in the first and of the positive in the second."""
    halves: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    count = {"positive": 0, "negative": 0}
    for text, label in read_labelled_texts("train", "rt", seed, ROWS):
        count[label] += 1
        halves[(count[label] % 5 == 0) == (label == "negative")].append((text, label))
    return halves


def shorten_dialogue(row: Mapping) -> dict[str, str] | None:
    """The last question of a pair with both answers, as plain text; None where one is too long for the base."""
    question = row["prompt"][-1]["content"]
    answers = {
        side: row[side][-1]["content"] if isinstance(row[side], list) else row[side] for side in ("chosen", "rejected")
    }
    if max(len(f"{question} {answer}".split()) for answer in answers.values()) > MAX_WORDS:
        return None
    return {"prompt": f"{question} Answer:"} | {side: f" {answer.strip()}" for side, answer in answers.items()}


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes JSON lines; returns the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)
