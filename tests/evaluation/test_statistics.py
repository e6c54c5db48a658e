"""Intervals and pair accuracies: by hand, against scipy, and their coverage by simulation."""

import dataclasses
from collections.abc import Callable
from math import exp, inf, nan, sqrt

import numpy as np
import pytest
import scipy.stats

from pipeline.evaluation.statistics import (
    Estimate,
    accuracy_by_bucket,
    correlation,
    length_controlled_difference,
    mean_ci,
    pair_accuracy,
    paired_difference_ci,
    perplexity,
    share_ci,
    win_rate_ci,
)


def test_mean_ci_by_hand() -> None:
    estimate = mean_ci([1.0, 2.0, 3.0, 6.0])  # mean 3, s^2 = 14/3, t(3) at 97.5 % = 3.18245 (any printed table)
    half = 3.182446 * sqrt(14 / 3) / 2
    assert dataclasses.astuple(estimate) == pytest.approx((3.0, 3.0 - half, 3.0 + half, 4), abs=1e-5)


def test_mean_ci_agrees_with_scipys_one_sample_test() -> None:
    x = np.random.default_rng(1).gamma(2.0, size=23)
    oracle = scipy.stats.ttest_1samp(x, 0.0).confidence_interval(0.9)
    estimate = mean_ci(x, 0.9)
    assert (estimate.low, estimate.high) == pytest.approx((oracle.low, oracle.high))


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (3, 11), (180, 200)])
def test_share_ci_without_ties_is_scipys_wilson_interval(hits: int, n: int) -> None:
    oracle = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    estimate = share_ci([1.0] * hits + [0.0] * (n - hits))
    assert dataclasses.astuple(estimate) == pytest.approx((hits / n, oracle.low, oracle.high, n))


def test_share_ci_with_ties_counts_half_a_success_each() -> None:
    # Two ties weigh as one success and one failure; at 100 % the interval still has a width and ends at 1.
    assert share_ci([0.5, 0.5, 1.0]) == share_ci([1.0, 0.0, 1.0])
    everything = share_ci(np.ones(10))
    assert everything.high == 1.0
    assert 0.6 < everything.low < 0.8
    assert all(share_ci(np.zeros(n)).low == 0.0 for n in range(1, 100))  # and not -1e-18


def test_pairing_removes_the_spread_between_prompts() -> None:
    rng = np.random.default_rng(2)
    prompts = 10 * rng.normal(size=50)
    a, b = prompts + 0.5 + 0.1 * rng.normal(size=50), prompts + 0.1 * rng.normal(size=50)
    oracle = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    estimate = paired_difference_ci(a, b)
    assert (estimate.low, estimate.high) == pytest.approx((oracle.low, oracle.high))
    assert 0.4 < estimate.low < estimate.high < 0.6
    mirrored = paired_difference_ci(b, a)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx(
        (-estimate.value, -estimate.high, -estimate.low)
    )


def test_win_rate_by_hand_and_its_mirror() -> None:
    a, b = [3.0, 1.0, 2.0, 5.0], [1.0, 2.0, 2.0, 4.0]  # win, loss, tie, win
    assert win_rate_ci(a, b).value == 2.5 / 4
    assert win_rate_ci(b, a).value == 1.5 / 4
    assert win_rate_ci(b, a).low == pytest.approx(1 - win_rate_ci(a, b).high)


def test_length_controlled_difference_by_hand() -> None:
    # Differences (1, 2, 2, 5) on excess lengths (-1, 0, 1, 4): means 2.5 and 1, Sxx 14, Sxy 11, so the slope is 11/14
    # and the intercept 24/14; the squared residuals sum to 9 - 121/14 = 5/14, so its variance is (5/28) (1/4 + 1/14).
    estimate = length_controlled_difference([1, 2, 2, 5], [0, 0, 0, 0], [4, 5, 6, 9], [5, 5, 5, 5])
    half = 4.302653 * sqrt(5 / 28 * (1 / 4 + 1 / 14))  # t(2) at 97.5 %
    assert dataclasses.astuple(estimate) == pytest.approx((24 / 14, 24 / 14 - half, 24 / 14 + half, 4), abs=1e-5)


def test_a_gain_that_is_only_length_disappears_and_a_real_one_stays() -> None:
    rng = np.random.default_rng(3)
    length_b = rng.integers(5, 40, size=300)
    length_a = length_b + rng.integers(-5, 25, size=300)
    padding = 0.02 * length_a + 0.1 * rng.normal(size=300)
    judged_b = 0.02 * length_b + 0.1 * rng.normal(size=300)
    assert paired_difference_ci(padding, judged_b).low > 0.1
    only_length = length_controlled_difference(padding, judged_b, length_a, length_b)
    assert only_length.low < 0 < only_length.high
    real = length_controlled_difference(padding + 0.3, judged_b, length_a, length_b)
    assert real.low < 0.3 < real.high
    assert real.low > 0.2
    assert real.value == pytest.approx(only_length.value + 0.3)


def test_equal_lengths_leave_the_paired_difference_and_a_constant_excess_is_refused() -> None:
    a, b, length = [1.0, 2.0, 4.0], [0.0, 0.0, 1.0], np.array([3, 4, 5])
    assert length_controlled_difference(a, b, length, length) == paired_difference_ci(a, b)
    with pytest.raises(ValueError, match="told apart"):
        length_controlled_difference(a, b, length + 2, length)


def _normal_mean(rng: np.random.Generator) -> Estimate:
    return mean_ci(0.7 + rng.normal(size=6))


def _share_with_ties(rng: np.random.Generator) -> Estimate:
    return share_ci(rng.choice([0.0, 0.5, 1.0], p=[0.28, 0.04, 0.68], size=60))


def _intercept(rng: np.random.Generator) -> Estimate:
    length_a, length_b = rng.integers(10, 60, size=8), rng.integers(5, 40, size=8)
    judged_a = 0.7 + 0.05 * length_a + rng.normal(size=8)
    return length_controlled_difference(judged_a, 0.05 * length_b + rng.normal(size=8), length_a, length_b)


@pytest.mark.parametrize("simulate", [_normal_mean, _share_with_ties, _intercept])
def test_intervals_cover_the_truth_as_often_as_they_say(simulate: Callable[[np.random.Generator], Estimate]) -> None:
    """In all three the true value is 0.7; 2 standard errors of 400 simulations are 2.2 %.

    The samples are small on purpose: with a normal instead of a t quantile the first covers 89 % and the last 90 %.
    """
    rng = np.random.default_rng(4)
    estimates = [simulate(rng) for _ in range(400)]
    covered = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in estimates])
    assert 0.92 <= covered <= 0.98
    assert np.mean([estimate.value for estimate in estimates]) == pytest.approx(0.7, abs=0.08)


def test_pair_accuracy_gives_half_a_point_for_a_tie() -> None:
    assert pair_accuracy([2.0, -1e-9, 0.0, 1e-9]).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert pair_accuracy(np.zeros(9)).mean() == 0.5


def test_buckets_are_half_open_and_count_every_pair_once() -> None:
    buckets = accuracy_by_bucket([1, 0, 1, 0.5, 1], [1.0, 2.0, 2.5, 3.9, 8.0], [1, 2, 4, 6, 8])
    assert [(bucket.low, bucket.high) for bucket in buckets] == [(1, 2), (2, 4), (4, 6), (6, 8)]
    assert [bucket.accuracy and (bucket.accuracy.value, bucket.accuracy.n) for bucket in buckets] == [
        (1.0, 1),
        (0.5, 3),
        None,
        (1.0, 1),
    ]
    with pytest.raises(ValueError, match="outside the edges"):
        accuracy_by_bucket([1, 0], [0.5, 2.0], [1, 3])
    with pytest.raises(ValueError, match="increasing"):
        accuracy_by_bucket([1, 0], [1, 2.0], [1, 3, 3])


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: mean_ci([]), "non-empty vector"),
        (lambda: mean_ci([1.0]), "at least 2"),
        (lambda: mean_ci([1.0, float("nan")]), "1 of 2 numbers are not finite"),
        (lambda: mean_ci([[1.0, 2.0]]), "got shape"),
        (lambda: mean_ci([1.0, 2.0], confidence=95), "between 0 and 1"),
        (lambda: share_ci([0.5, 1.5]), r"in \[0, 1\]"),
        (lambda: share_ci([]), "non-empty vector"),
        (lambda: paired_difference_ci([1.0, 2.0], [1.0]), "differ in length: 2 and 1"),
        (lambda: win_rate_ci([1.0, float("inf")], [1.0, 2.0]), "not finite"),
        (lambda: length_controlled_difference([1.0, 2.0], [1.0, 1.0], [3, 4], [3, 3]), "at least 3 pairs"),
        (lambda: length_controlled_difference([1.0] * 3, [1.0] * 3, [3, 4], [3, 3]), "differ in length: 3 and 2"),
        (lambda: pair_accuracy([float("nan")]), "not finite"),
        (lambda: accuracy_by_bucket([1.0], [1.0, 2.0], [0, 3]), "differ in length: 1 and 2"),
        (lambda: accuracy_by_bucket([1.0], [1.0], [0]), "two or more"),
    ],
)
def test_empty_unequal_or_meaningless_input_is_refused(call: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()


def test_correlation_is_scipys_and_a_constant_has_none() -> None:
    a, b = np.random.default_rng(30).normal(size=(2, 40))
    assert correlation(a, a + b) == pytest.approx(scipy.stats.pearsonr(a, a + b).statistic)
    for pair in ((a, np.full(40, 0.1)), (np.full(40, 0.1), b)):
        with pytest.raises(ValueError, match="the same everywhere"):
            correlation(*pair)


def test_perplexity_is_of_a_token_and_has_an_end() -> None:
    assert perplexity(6.0, 3) == pytest.approx(exp(2))
    assert perplexity(0.0, 0) == 1.0
    with pytest.raises(OverflowError):
        perplexity(1e4, 2)
    for nll in (nan, inf):
        with pytest.raises(ValueError, match=f"is {nll}"):
            perplexity(nll, 2)
