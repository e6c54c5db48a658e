"""Statistics of responses as text: length, variety, repetition, duplicates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from pipeline.evaluation.statistics import Array

WORD = r"[a-z0-9']+"


# ---------------------------------------------------------------------------------------------- text statistics


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of n responses; shares and ratios in [0, 1]. Compare equal n only: see `distinct_n`."""

    n: int
    mean_words: float
    distinct_1: float
    distinct_2: float
    distinct_4: float
    word_repetition: float
    duplicate_share: float
    commonest_content_words: tuple[tuple[str, float], ...]


def text_statistics(responses: Sequence[str], prompts: Sequence[str], k: int = 5) -> TextStatistics:
    """All the statistics below of n responses to n prompts; `word_repetition` is the mean over responses."""
    return TextStatistics(
        n=len(responses),
        mean_words=float(word_counts(responses).mean()),
        distinct_1=distinct_n(responses, 1),
        distinct_2=distinct_n(responses, 2),
        distinct_4=distinct_n(responses, 4),
        word_repetition=float(np.mean([word_repetition(text) for text in responses])),
        duplicate_share=duplicate_share(responses),
        commonest_content_words=tuple(commonest_content_words(responses, prompts, k)),
    )


def words(text: str) -> list[str]:
    """The words of a text: matches of `[a-z0-9']+` after lower-casing, in order."""
    return re.findall(WORD, text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams / all word n-grams over all texts together (after Li et al. 2016, arXiv 1510.03055, who
    divide by words).

    In [0, 1]; no n-gram crosses from one text to the next; 0 if no text has n words. It falls as texts are added even
    if they stay as varied, so compare it between lists of equal number (and similar length) only.
    """
    if n < 1:
        raise ValueError("n-grams need n >= 1")
    grams = [gram for text in to_text_list(texts) for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def word_repetition(text: str) -> float:
    """1 - distinct words / words of one text, in [0, 1); 0 for a text without words. Longer texts repeat more."""
    all_words = words(text)
    return 1.0 - len(set(all_words)) / len(all_words) if all_words else 0.0


def commonest_content_words(texts: Sequence[str], prompts: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The k content words that occur in most responses, each with the share of responses that contain it; ties A-Z.

    A content word has 3 letters or more, is neither a stop word nor a contraction or possessive, and does not occur in
    the response's own prompt; quotation marks round it are dropped. A policy that puts one well-paid word everywhere
    shows here. Domain words ("movie") count as any other, so compare with the list of the policy before PPO.
    """
    texts, prompts = to_text_list(texts), to_text_list(prompts)
    if len(texts) != len(prompts):
        raise ValueError("every response needs its prompt")
    counts: Counter[str] = Counter()
    for text, prompt in zip(texts, prompts, strict=True):
        counts.update(_content_words(text) - _content_words(prompt))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(word, count / len(texts)) for word, count in ranked[:k]]


def duplicate_share(texts: Sequence[str]) -> float:
    """The share of texts that, stripped of surrounding white space, equal an earlier one; 0 if all differ."""
    texts = to_text_list(texts)
    return 1.0 - len({text.strip() for text in texts}) / len(texts)


# ---------------------------------------------------------------------------------------------- private


def to_text_list(texts: Sequence[str]) -> list[str]:
    """The texts as a list; ValueError for no texts, TypeError for one string, which is a sequence of letters."""
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one string")
    if not len(texts):
        raise ValueError("expected at least one text")
    return list(texts)


def word_counts(texts: Sequence[str]) -> Array:
    return np.array([len(words(text)) for text in to_text_list(texts)], dtype=np.float64)


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _content_words(text: str) -> set[str]:
    """The distinct content words of a text, quotation marks round them dropped."""
    bare = {word.strip("'") for word in words(text)}
    return {word for word in bare if len(word) >= 3 and "'" not in word and word not in ENGLISH_STOP_WORDS}
