"""Statistics of responses as text: length, variety, repetition, duplicates."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import regex
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from pipeline.evaluation.statistics import Array

LETTER = r"\p{L}\p{Nd}\p{Nl}"
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30FC\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # no spaces between words
CHARACTER = rf"[[{UNSPACED}]&&[{LETTER}]]\p{{M}}*"  # with its vowel signs and accents
WORD = regex.compile(rf"[[{LETTER}']--[{UNSPACED}]][[{LETTER}\p{{M}}']--[{UNSPACED}]]*|{CHARACTER}", regex.VERSION1)
RUN = regex.compile(rf"(?:{CHARACTER})+", regex.VERSION1)  # what stands between spaces or signs in such a script


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
    """The words of a lower-cased text in order: letters, digits and apostrophes of any script between other signs;
    where a script puts no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character."""
    return WORD.findall(text.lower())


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

    A content word has 3 letters and accents or more (a Korean syllable is 2 or 3), is neither an English stop word nor
    a contraction or possessive, and does not occur in the response's own prompt; quotation marks round it are dropped.
    In a script without spaces it is each two neighbouring characters, or one that stands alone. A policy that puts one
    well-paid word everywhere shows here. Domain words ("movie"), and function words of other languages, count as any
    other, so compare with the list of the policy before PPO (`most_risen_word`).
    """
    return sorted(_content_word_shares(texts, prompts).items(), key=lambda item: (-item[1], item[0]))[:k]


def most_risen_word(
    after: Sequence[str], before: Sequence[str], prompts: Sequence[str], usual: float
) -> tuple[str, float]:
    """The content word in most of the responses `after`, and the share of them that contain it; ("none", 0) if none.

    Of a word that is in more than the share `usual` of the responses `before`, as function words are in languages
    whose stop words are not known here, counts only by how much that share rose.
    """
    earlier = {word: share for word, share in _content_word_shares(before, prompts).items() if share > usual}
    shares = {word: share - earlier.get(word, 0.0) for word, share in _content_word_shares(after, prompts).items()}
    return min(shares.items(), key=lambda item: (-item[1], item[0]), default=("none", 0.0))


def _content_word_shares(texts: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
    """Each content word of the texts with the share of them that contain it."""
    texts, prompts = to_text_list(texts), to_text_list(prompts)
    if len(texts) != len(prompts):
        raise ValueError("every response needs its prompt")
    counts: Counter[str] = Counter()
    for text, prompt in zip(texts, prompts, strict=True):
        counts.update(_content_words(text) - _content_words(prompt))
    return {word: count / len(texts) for word, count in counts.items()}


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
    text = text.lower()
    bare = {word.strip("'") for word in WORD.findall(RUN.sub(" ", text))}
    spaced = {
        word
        for word in bare
        if len(unicodedata.normalize("NFD", word)) >= 3 and "'" not in word and word not in ENGLISH_STOP_WORDS
    }
    runs = (WORD.findall(run) for run in RUN.findall(text))
    return spaced | {pair for run in runs for pair in (map("".join, pairwise(run)) if len(run) > 1 else run)}
