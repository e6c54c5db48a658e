"""The evidence room: judges that the policy was not trained against, and how sure we are of what they say.

    texts -> judge -> one number per text -> paired differences -> Estimate(value, low, high, n)

A reward model's own score shows only that PPO climbed it. Whether the text got better is for judges that never touched
the training signal (a lexicon; a classifier of held-out human labels; rules as simple as "longer wins"), and text
statistics show what was paid for it: repetition, one favourite word, duplicates, length. Nothing here imports torch.

Conventions: a word is a match of `[a-z0-9']+` in the lower-cased text; a tie counts 0.5 everywhere; every interval is
two-sided and 95 % unless told otherwise; an empty list, unequal lengths or a non-finite number raise `ValueError`.
Every interval takes its observations as independent: pairs that share a text, or several responses to one prompt, are
fewer observations than they look.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupShuffleSplit
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

Array = NDArray[np.float64]

WORD = r"[a-z0-9']+"
HOLDOUT = 0.1  # share of a classifier's texts that it is tested on and never fitted to
INVERSE_PENALTY = 3.0  # C of the logistic regression
PAIR_ALPHA = 3.0  # ridge penalty of the pair baseline when no validation pairs choose one
PAIR_ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0)  # and what validation pairs choose from


# ---------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its confidence interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int


def mean_ci(x: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of x with its Student t interval, mean +- t(n - 1) s / sqrt(n) (Student 1908, Biometrika 6).

    x (n,) in any unit, n >= 2. For unbounded or many-valued scores. A share or an accuracy belongs in `share_ci`: at
    100 % observed the t interval has width 0 however few the observations.
    """
    x = _numbers(x)
    if len(x) < 2:
        raise ValueError("an interval for a mean needs at least 2 observations")
    half = _t_quantile(confidence, len(x) - 1) * float(x.std(ddof=1)) / sqrt(len(x))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def share_ci(x: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of x in [0, 1] with its score interval (Wilson 1927, JASA 22), the sum of x standing for the successes.

    x (n,): 0 or 1, and 0.5 for a tie. The interval stays inside [0, 1] and keeps a width when every observation agrees.
    Ties make x not binomial, but only less variable (its variance is p(1 - p) less a quarter of the share of ties), so
    with them the interval errs on the wide side.
    """
    x = _numbers(x)
    if x.min() < 0 or x.max() > 1:
        raise ValueError("a share is a mean of numbers in [0, 1]")
    n, p = len(x), float(x.mean())
    z = float(scipy.stats.norm.ppf(0.5 + _checked(confidence) / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def paired_difference_ci(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of a - b with its paired t interval; a, b (n,) are scores of two systems on the same n prompts.

    Pairing removes the spread between prompts, which is far larger than the spread between systems.
    """
    a, b = _paired(a, b)
    return mean_ci(a - b, confidence)


def win_rate_ci(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The share of prompts with a > b, ties 0.5, with its score interval; a, b (n,) are paired over prompts."""
    a, b = _paired(a, b)
    return share_ci(pair_accuracy(a - b), confidence)


def length_controlled_difference(
    judge_a: ArrayLike, judge_b: ArrayLike, length_a: ArrayLike, length_b: ArrayLike, confidence: float = 0.95
) -> Estimate:
    """The difference a - b that a judge would give to responses of equal length, by a straight line, with its t(n - 2)
    interval: the intercept of least squares of judge_a - judge_b on length_a - length_b (the idea of Dubois et al.
    2024, arXiv 2404.04475, without their logistic link).

    All (n,), paired over prompts, n >= 3; lengths in any one unit. A gain that is only length has an intercept near 0.
    If no length differs this is `paired_difference_ci`; if all differ by the same amount, length and system cannot be
    told apart, which raises `ValueError`. Where few pairs are near equal length the line extrapolates: read it beside
    the mean lengths.
    """
    judge_a, judge_b = _paired(judge_a, judge_b)
    length_a, length_b = _paired(length_a, length_b)
    difference, excess = _paired(judge_a - judge_b, length_a - length_b)
    if not excess.any():
        return mean_ci(difference, confidence)
    if len(excess) < 3:
        raise ValueError("an interval for the intercept needs at least 3 pairs")
    if (excess == excess[0]).all():
        raise ValueError("every pair differs in length by the same amount: length and system cannot be told apart")
    line = scipy.stats.linregress(excess, difference)
    value, half = float(line.intercept), _t_quantile(confidence, len(excess) - 2) * float(line.intercept_stderr)
    return Estimate(value, value - half, value + half, len(excess))


# ---------------------------------------------------------------------------------------------- judges


class Vader:
    """The VADER lexicon judge (Hutto & Gilbert 2014, ICWSM): calling it returns each text's compound in [-1, 1].

    Hand-written rules over a word list that people rated word by word: no labelled text was fitted. The rules read
    capitals and punctuation, so texts go in as they are; a text without a listed word has compound 0.
    """

    def __init__(self) -> None:
        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, texts: Sequence[str]) -> Array:
        return np.array([self.analyzer.polarity_scores(text)["compound"] for text in _texts(texts)], dtype=np.float64)


@dataclass(frozen=True)
class Classifier:
    """A bag-of-words judge made by `fit_classifier`: calling it returns P(positive) of each text.

    `holdout_accuracy` is of this very classifier, on texts that it was not fitted to.
    """

    vectorizer: TfidfVectorizer
    model: LogisticRegression
    holdout_accuracy: Estimate

    def __call__(self, texts: Sequence[str]) -> Array:
        return _positive(self.model, self.vectorizer.transform(_texts(texts)))


def fit_classifier(
    texts: Sequence[str], labels: Sequence[int], seed: int, groups: Sequence[str] | None = None
) -> Classifier:
    """Logistic regression on TF-IDF of word 1-2-grams (sublinear tf, min_df 3), fitted to 90 % of the labels and
    tested on the other 10 %; labels are 0 and 1, 1 is positive.

    The split is drawn from `seed` over `groups` (by default over distinct texts), so no group is on both sides: name
    the source document there if the texts hold a document and also its sentences, or the accuracy is flattered.
    """
    texts, y = _texts(texts), np.asarray(labels)
    if len(y) != len(texts) or (groups is not None and len(groups) != len(texts)):
        raise ValueError("a classifier needs one label, and one group if any, per text")
    if set(np.unique(y).tolist()) != {0, 1}:
        raise ValueError("labels are 0 (negative) and 1 (positive), and both must occur")
    fitted, held = next(
        GroupShuffleSplit(n_splits=1, test_size=HOLDOUT, random_state=seed).split(
            texts, y, texts if groups is None else groups
        )
    )
    if len(set(y[fitted].tolist())) < 2:
        raise ValueError("the texts left to fit have only one label")
    vectorizer = _vectorizer()
    model = LogisticRegression(C=INVERSE_PENALTY, solver="liblinear", random_state=seed)
    model.fit(vectorizer.fit_transform([texts[i] for i in fitted]), y[fitted])
    positive = _positive(model, vectorizer.transform([texts[i] for i in held]))
    return Classifier(vectorizer, model, share_ci(pair_accuracy((positive - 0.5) * np.where(y[held] == 1, 1, -1))))


# ---------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Bucket:
    """Accuracy of the pairs whose human margin lies between low and high; None where there is no such pair."""

    low: float
    high: float
    accuracy: Estimate | None


def pair_accuracy(score_margins: ArrayLike) -> Array:
    """Correctness (n,) of n pairs from score(chosen) - score(rejected): 1 if positive, 0 if negative, a tie 0.5.

    Half a point for a tie is what a coin would earn: a constant scorer gets 0.5, neither 0 nor 1.
    """
    return 0.5 * (1.0 + np.sign(_numbers(score_margins)))


def by_bucket(correct: ArrayLike, margins: ArrayLike, edges: Sequence[float], confidence: float = 0.95) -> list[Bucket]:
    """Accuracy of the pairs in each of the buckets [edges[i], edges[i + 1]), the last one closed at its right end.

    correct (n,) from `pair_accuracy`, margins (n,) the human margins. A margin outside the edges raises `ValueError`,
    so that every pair is counted once.
    """
    correct, margins = _paired(correct, margins)
    if len(edges) < 2 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError("bucket edges must be two or more increasing numbers")
    if margins.min() < edges[0] or margins.max() > edges[-1]:
        raise ValueError(f"margins reach from {margins.min()} to {margins.max()}, outside the edges {list(edges)}")
    index = np.minimum(np.searchsorted(edges, margins, side="right") - 1, len(edges) - 2)
    inside = [correct[index == i] for i in range(len(edges) - 1)]
    return [
        Bucket(float(low), float(high), share_ci(x, confidence) if len(x) else None)
        for (low, high), x in zip(pairwise(edges), inside, strict=True)
    ]


def longer_wins(chosen: Sequence[str], rejected: Sequence[str]) -> Array:
    """Correctness (n,) of the rule "the text with more words is the chosen one", ties 0.5.

    What a reward model must beat before its accuracy says anything about content.
    """
    a, b = _paired(_word_counts(chosen), _word_counts(rejected))
    return pair_accuracy(a - b)


def linear_pair_baseline(
    train_chosen: Sequence[str],
    train_rejected: Sequence[str],
    margins: ArrayLike,
    test_chosen: Sequence[str],
    test_rejected: Sequence[str],
    validation: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Array:
    """Correctness (n_test,) of a bag of words: ridge regression of max(margin, 1) on tfidf(chosen) - tfidf(rejected).

    One TF-IDF (word 1-2-grams, sublinear tf, min_df 3), fitted to the distinct training texts. No intercept, so
    swapping a pair negates its score; adding each pair mirrored (-difference, -target) would double each squared error
    and so change nothing but the scale of the penalty. The penalty is PAIR_ALPHA, or with `validation` = (chosen,
    rejected) the one of PAIR_ALPHAS with the best accuracy there, the larger if two tie; the test pairs choose nothing.
    Its accuracy is what the words alone are worth; what a reward model adds to it came from their order.
    """
    train_chosen, train_rejected = _texts(train_chosen), _texts(train_rejected)
    target = np.maximum(_numbers(margins), 1.0)
    if not len(train_chosen) == len(train_rejected) == len(target):
        raise ValueError("training needs one chosen text, one rejected text and one margin per pair")
    row = {text: i for i, text in enumerate(dict.fromkeys(train_chosen + train_rejected))}
    vectorizer = _vectorizer()
    tfidf = vectorizer.fit_transform(list(row))
    train = tfidf[[row[text] for text in train_chosen]] - tfidf[[row[text] for text in train_rejected]]

    def differences(chosen: Sequence[str], rejected: Sequence[str]) -> csr_matrix:  # (n, features)
        if len(chosen) != len(rejected):
            raise ValueError("a pair needs one chosen and one rejected text")
        return vectorizer.transform(_texts(chosen)) - vectorizer.transform(_texts(rejected))

    def ridge(alpha: float) -> Ridge:
        return Ridge(alpha=alpha, fit_intercept=False, solver="lsqr").fit(train, target)

    test = differences(test_chosen, test_rejected)
    if validation is None:
        return pair_accuracy(ridge(PAIR_ALPHA).predict(test))
    held = differences(*validation)
    models = {alpha: ridge(alpha) for alpha in PAIR_ALPHAS}
    best = max(PAIR_ALPHAS, key=lambda alpha: (pair_accuracy(models[alpha].predict(held)).mean(), alpha))
    return pair_accuracy(models[best].predict(test))


# ---------------------------------------------------------------------------------------------- text statistics


@dataclass(frozen=True)
class TextStatistics:
    """What n responses look like as text; shares and ratios in [0, 1]. Compare equal n only: see `distinct_n`."""

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
        mean_words=float(_word_counts(responses).mean()),
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
    grams = [gram for text in _texts(texts) for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def word_repetition(text: str) -> float:
    """1 - distinct words / words of one text, in [0, 1); 0 for a text without words. Longer texts repeat more."""
    found = words(text)
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def commonest_content_words(texts: Sequence[str], prompts: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The k content words that occur in most responses, each with the share of responses that contain it; ties A-Z.

    A content word has 3 letters or more, is neither a stop word nor a contraction or possessive, and does not occur in
    the response's own prompt; quotation marks round it are dropped. A policy that found one magic word shows it here.
    Domain words ("movie") count as any other, so read the list beside that of the policy before PPO.
    """
    texts, prompts = _texts(texts), _texts(prompts)
    if len(texts) != len(prompts):
        raise ValueError("every response needs its prompt")
    counts: Counter[str] = Counter()
    for text, prompt in zip(texts, prompts, strict=True):
        counts.update(_content_words(text) - _content_words(prompt))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(word, count / len(texts)) for word, count in ranked[:k]]


def duplicate_share(texts: Sequence[str]) -> float:
    """The share of texts that, stripped of surrounding white space, equal an earlier one; 0 if all differ."""
    texts = _texts(texts)
    return 1.0 - len({text.strip() for text in texts}) / len(texts)


# ---------------------------------------------------------------------------------------------- private


def _texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; refuses an empty one, and a single string, which is a sequence of letters."""
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one string")
    if not len(texts):
        raise ValueError("expected at least one text")
    return list(texts)


def _numbers(x: ArrayLike) -> Array:
    """x as a float64 vector; refuses an empty one, more dimensions, and non-finite entries."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a non-empty vector of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {len(x)} numbers are not finite")
    return x


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Two vectors of equal length."""
    a, b = _numbers(a), _numbers(b)
    if len(a) != len(b):
        raise ValueError(f"paired vectors differ in length: {len(a)} and {len(b)}")
    return a, b


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, got {confidence}")
    return confidence


def _t_quantile(confidence: float, degrees: int) -> float:
    """t such that Student's distribution has probability `confidence` within [-t, t]."""
    return float(scipy.stats.t.ppf(0.5 + _checked(confidence) / 2, degrees))


def _vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True, min_df=3)


def _positive(model: LogisticRegression, features: csr_matrix) -> Array:
    """P(label 1) of each row."""
    return np.asarray(model.predict_proba(features)[:, 1], dtype=np.float64)


def _word_counts(texts: Sequence[str]) -> Array:
    return np.array([len(words(text)) for text in _texts(texts)], dtype=np.float64)


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _content_words(text: str) -> set[str]:
    """The distinct content words of a text, quotation marks round them dropped."""
    bare = {word.strip("'") for word in words(text)}
    return {word for word in bare if len(word) >= 3 and "'" not in word and word not in ENGLISH_STOP_WORDS}
