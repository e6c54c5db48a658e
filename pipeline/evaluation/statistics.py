"""Means, shares, paired differences and pair accuracies, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite, sqrt

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


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
    x = to_vector(x)
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
    x = to_vector(x)
    if x.min() < 0 or x.max() > 1:
        raise ValueError("a share is a mean of numbers in [0, 1]")
    n, p = len(x), float(x.mean())
    z = float(scipy.stats.norm.ppf(0.5 + _check_confidence(confidence) / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def paired_difference_ci(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of a - b with its paired t interval; a, b (n,) are scores of two systems on the same n prompts.

    Pairing removes the spread between prompts, which is far larger than the spread between systems.
    """
    a, b = to_paired_vectors(a, b)
    return mean_ci(a - b, confidence)


def win_rate_ci(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The share of prompts with a > b, ties 0.5, with its score interval; a, b (n,) are paired over prompts."""
    a, b = to_paired_vectors(a, b)
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
    judge_a, judge_b = to_paired_vectors(judge_a, judge_b)
    length_a, length_b = to_paired_vectors(length_a, length_b)
    difference, excess = to_paired_vectors(judge_a - judge_b, length_a - length_b)
    if not excess.any():
        return mean_ci(difference, confidence)
    if len(excess) < 3:
        raise ValueError("an interval for the intercept needs at least 3 pairs")
    if (excess == excess[0]).all():
        raise ValueError("every pair differs in length by the same amount: length and system cannot be told apart")
    line = scipy.stats.linregress(excess, difference)
    value, half = float(line.intercept), _t_quantile(confidence, len(excess) - 2) * float(line.intercept_stderr)
    return Estimate(value, value - half, value + half, len(excess))


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens), nll in nats over that many tokens; OverflowError where it is beyond the largest float, and
    ValueError where nll is not finite."""
    if not isfinite(nll):
        raise ValueError(f"the negative log-likelihood is {nll}")
    return exp(nll / max(1, tokens))


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of a and b (n,); ValueError where one of them is the same everywhere and has none."""
    a, b = to_paired_vectors(a, b)
    if (a == a[0]).all() or (b == b[0]).all():
        raise ValueError("one of the two is the same everywhere, so there is no correlation")
    return float(np.corrcoef(a, b)[0, 1])


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
    return 0.5 * (1.0 + np.sign(to_vector(score_margins)))


def accuracy_by_bucket(
    correct: ArrayLike, margins: ArrayLike, edges: Sequence[float], confidence: float = 0.95
) -> list[Bucket]:
    """Accuracy of the pairs in each of the buckets [edges[i], edges[i + 1]), the last one closed at its right end.

    correct (n,) from `pair_accuracy`, margins (n,) the human margins. A margin outside the edges raises `ValueError`,
    so that every pair is counted once.
    """
    correct, margins = to_paired_vectors(correct, margins)
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


def to_vector(x: ArrayLike) -> Array:
    """x as a float64 vector (n,); ValueError for an empty one, more dimensions, or non-finite entries."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a non-empty vector of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {len(x)} numbers are not finite")
    return x


def to_paired_vectors(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both as float64 vectors (n,); ValueError unless they have one length."""
    a, b = to_vector(a), to_vector(b)
    if len(a) != len(b):
        raise ValueError(f"paired vectors differ in length: {len(a)} and {len(b)}")
    return a, b


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, got {confidence}")
    return confidence


def _t_quantile(confidence: float, degrees: int) -> float:
    """t such that Student's distribution has probability `confidence` within [-t, t]."""
    return float(scipy.stats.t.ppf(0.5 + _check_confidence(confidence) / 2, degrees))
