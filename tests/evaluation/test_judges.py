"""The evidence room: hand-computed numbers, scipy and dense algebra as oracles, coverage of intervals by simulation."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import scipy.stats

from pipeline.evaluation import judges
from pipeline.evaluation.judges import Vader, fit_classifier, linear_pair_baseline, longer_wins
from pipeline.evaluation.statistics import (
    Estimate,
    accuracy_by_bucket,
    length_controlled_difference,
    mean_ci,
    pair_accuracy,
    paired_difference_ci,
    share_ci,
    win_rate_ci,
)
from pipeline.evaluation.text import (
    commonest_content_words,
    distinct_n,
    duplicate_share,
    text_statistics,
    word_repetition,
    words,
)

# ---------------------------------------------------------------------------------------------- intervals


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


# ---------------------------------------------------------------------------------------------- judges


def test_vader_knows_the_sentence_of_its_own_documentation() -> None:
    vader = Vader()
    plain, loud, mixed, none = vader(
        [
            "VADER is smart, handsome, and funny.",
            "VADER is VERY SMART, handsome, and FUNNY!!!",
            "The book was good.",
            "the of and",
        ]
    )
    assert (plain, loud, mixed, none) == (0.8316, 0.9342, 0.4404, 0.0)  # the package's README
    assert vader(["great", "awful"]).tolist() == vader(["awful", "great"])[::-1].tolist()
    assert vader([""]).tolist() == [0.0]


def _reviews(n: int, seed: int) -> tuple[list[str], list[int]]:
    """n texts of neutral words around one telling word; "not" before it turns the label, so bigrams are needed."""
    rng = np.random.default_rng(seed)
    neutral = [f"word{i}" for i in range(30)]
    texts, labels = [], []
    for _ in range(n):
        good, turned = rng.integers(2), rng.integers(2)
        telling = ("not " if turned else "so ") + ("superb" if good else "dreadful")
        before, after = (" ".join(rng.choice(neutral, size=4)) for _ in range(2))
        texts.append(f"{before} {telling} {after}")
        labels.append(int(good ^ turned))
    return texts, labels


def test_classifier_learns_a_known_rule_and_reports_its_accuracy() -> None:
    texts, labels = _reviews(600, seed=5)
    judge = fit_classifier(texts, labels, seed=6)
    unseen, truth = _reviews(200, seed=7)
    positive = judge(unseen)
    assert positive.shape == (200,)
    assert positive.dtype == np.float64
    assert positive.min() >= 0
    assert positive.max() <= 1
    assert ((positive > 0.5) == np.array(truth)).mean() > 0.97
    assert judge.holdout_accuracy.n == 60
    assert judge.holdout_accuracy.value > 0.95
    assert judge(["so SUPERB", "so superb"])[0] == judge(["so superb"])[0] > 0.5 > judge(["not superb"])[0]
    again = fit_classifier(texts, labels, seed=6)
    assert (again(unseen) == positive).all()
    assert again.holdout_accuracy == judge.holdout_accuracy


def test_holdout_accuracy_of_meaningless_labels_is_chance() -> None:
    """Were the 10 % among the fitted texts, a bag of words would know most of these labels by heart."""
    texts, _ = _reviews(2000, seed=8)
    labels = np.random.default_rng(9).integers(2, size=2000)
    judge = fit_classifier(texts, labels.tolist(), seed=10)
    assert judge.holdout_accuracy.low < 0.5 < judge.holdout_accuracy.high
    assert ((judge(texts) > 0.5) == labels).mean() > 0.6  # by heart, on what it was fitted to


def test_no_group_is_on_both_sides_of_the_holdout() -> None:
    """Each meaningless label belongs to a text said ten times over: only a group on both sides could be known."""
    rng = np.random.default_rng(11)
    names = [f"name{i} title{i}" for i in range(100)]
    labels = np.tile(rng.integers(2, size=100), 10)
    repeated = fit_classifier(names * 10, labels.tolist(), seed=12)
    assert repeated.holdout_accuracy.n == 100
    assert repeated.holdout_accuracy.value < 0.8
    distinct = [f"{name} copy{i}" for i in range(10) for name in names]
    assert fit_classifier(distinct, labels.tolist(), seed=12).holdout_accuracy.value > 0.95  # the leak, if not named
    assert fit_classifier(distinct, labels.tolist(), seed=12, groups=names * 10).holdout_accuracy.value < 0.8


@pytest.mark.parametrize("labels", [[1] * 8, [0, 2] * 4, [-1, 1] * 4, [0, 1] * 3, ["0", "1"] * 4])
def test_classifier_refuses_other_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="label"):
        fit_classifier(["some text"] * 8, labels, seed=0)


# ---------------------------------------------------------------------------------------------- pairs


def test_pair_accuracy_gives_half_a_point_for_a_tie() -> None:
    assert pair_accuracy([2.0, -1e-9, 0.0, 1e-9]).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert pair_accuracy(np.zeros(9)).mean() == 0.5


def test_longer_wins_counts_words_not_letters() -> None:
    chosen = ["a b c", "incomprehensible", "don't -- go!", "yes"]
    rejected = ["extraordinary length", "a b", "two words", ""]
    assert longer_wins(chosen, rejected).tolist() == [1.0, 0.0, 0.5, 1.0]


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


PRAISE, BLAME, FILLER = ["superb", "tender", "witty"], ["dull", "crass", "limp"], ["plot", "cast", "score", "scene"]


def _pairs(n: int, seed: int, noise: float = 0.0) -> tuple[list[str], list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    chosen, rejected = (
        [" ".join([*rng.choice(FILLER, size=3), *rng.choice(tone, size=2)]) for _ in range(n)]
        for tone in (PRAISE, BLAME)
    )
    swap = rng.random(n) < noise
    pairs = [(b, a) if s else (a, b) for a, b, s in zip(chosen, rejected, swap, strict=True)]
    return [a for a, _ in pairs], [b for _, b in pairs], rng.uniform(0, 4, size=n)


def test_linear_pair_baseline_is_ridge_on_mirrored_differences() -> None:
    """Against dense normal equations on a hand-made TF-IDF (ln tf + 1, smooth idf, unit rows), both signs."""
    chosen, rejected, margins = _pairs(60, seed=13, noise=0.3)
    test_chosen, test_rejected, _ = _pairs(80, seed=14, noise=0.3)

    def grams(text: str) -> list[str]:
        tokens = text.split()
        return tokens + [f"{a} {b}" for a, b in pairwise(tokens)]

    unique = sorted(set(chosen + rejected))
    df: dict[str, int] = {}
    for text in unique:
        for gram in set(grams(text)):
            df[gram] = df.get(gram, 0) + 1
    vocabulary = [gram for gram in sorted(df) if df[gram] >= 3]
    idf = np.array([np.log((1 + len(unique)) / (1 + df[gram])) + 1 for gram in vocabulary])

    def vector(text: str) -> np.ndarray:
        tf = np.array([grams(text).count(gram) for gram in vocabulary], dtype=float)
        row = np.where(tf > 0, 1 + np.log(np.maximum(tf, 1)), 0) * idf
        return row / np.linalg.norm(row)

    def difference(left: list[str], right: list[str]) -> np.ndarray:
        return np.array([vector(a) - vector(b) for a, b in zip(left, right, strict=True)])

    d, y = difference(chosen, rejected), np.maximum(margins, 1)
    d, y = np.concatenate([d, -d]), np.concatenate([y, -y])
    weight = np.linalg.solve(d.T @ d + 2 * judges.PAIR_ALPHA * np.eye(d.shape[1]), d.T @ y)
    oracle = difference(test_chosen, test_rejected) @ weight
    assert 0.1 < (oracle > 0).mean() < 0.9
    assert np.abs(oracle).min() > 1e-4
    correct = linear_pair_baseline(chosen, rejected, margins, test_chosen, test_rejected)
    assert correct.tolist() == (oracle > 0).astype(float).tolist()


def test_linear_pair_baseline_learns_mirrors_and_ties() -> None:
    chosen, rejected, margins = _pairs(200, seed=15)
    good, bad, _ = _pairs(50, seed=16)
    assert linear_pair_baseline(chosen, rejected, margins, good, bad).tolist() == [1.0] * 50
    assert linear_pair_baseline(chosen, rejected, margins, bad, good).tolist() == [0.0] * 50
    assert linear_pair_baseline(chosen, rejected, margins, good, good).tolist() == [0.5] * 50
    upper = [text.upper() for text in good]
    assert linear_pair_baseline(chosen, rejected, margins, upper, bad).tolist() == [1.0] * 50


def test_validation_pairs_choose_the_penalty() -> None:
    """ "usual" is praised in 400 pairs, "rare" blamed in 8: only a heavy penalty, which shrinks a rare word most, lets
    praise win where both stand in one text."""
    chosen = [f"usual filler{i % 40}" for i in range(400)] + [f"filler{i}" for i in range(8)]
    rejected = [f"filler{i % 40}" for i in range(400)] + [f"rare filler{i}" for i in range(8)]
    margins, test = np.ones(408), (["usual rare"], ["unknown"])
    answers = {}
    for alpha in judges.PAIR_ALPHAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judges, "PAIR_ALPHA", alpha)
            answers[alpha] = float(linear_pair_baseline(chosen, rejected, margins, *test)[0])
    assert answers[min(answers)] == 0.0
    assert answers[max(answers)] == 1.0
    tied = (["unknown"], ["unknown"])  # leaves all penalties equal: the heaviest
    for validation, answer in ((test, 1.0), (test[::-1], 0.0), (tied, 1.0)):
        assert linear_pair_baseline(chosen, rejected, margins, *test, validation=validation).tolist() == [answer]


# ---------------------------------------------------------------------------------------------- text statistics


def test_words() -> None:
    assert words("Don't STOP -- it's 10/10, naïve!") == ["don't", "stop", "it's", "10", "10", "na", "ve"]


def test_distinct_n_by_hand() -> None:
    texts = ["The cat the cat", "the dog"]  # words: the cat the cat the dog; bigrams: the-cat cat-the the-cat | the-dog
    assert distinct_n(texts, 1) == 3 / 6
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(texts, 4) == 1.0
    assert distinct_n(texts, 5) == 0.0  # nothing that long was said
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert distinct_n(["a b", "b a", "a b"], 2) == 2 / 3
    with pytest.raises(ValueError, match="n >= 1"):
        distinct_n(texts, 0)


def test_distinct_n_falls_with_the_number_of_texts_alone() -> None:
    rng = np.random.default_rng(17)
    texts = [" ".join(rng.choice(list("abcdefghij"), size=6)) for _ in range(200)]
    assert distinct_n(texts, 2) < 0.5 * distinct_n(texts[:20], 2)


def test_word_repetition_by_hand() -> None:
    assert word_repetition("Good good GOOD film") == 1 - 2 / 4
    assert word_repetition("every word differs") == 0.0
    assert word_repetition("") == word_repetition("?!") == 0.0


def test_commonest_content_words_by_hand() -> None:
    responses = [
        "A superb, superb film!",  # counted once per response
        "It's 'superb' and I don't know why",  # quotation marks go; contractions and stop words do not count
        "the film is ok",  # "ok" has two letters
        "superb",  # in its own prompt
    ]
    prompts = ["I saw", "She said", "This Film", "A superb"]
    assert commonest_content_words(responses, prompts, 2) == [("superb", 2 / 4), ("film", 1 / 4)]
    assert commonest_content_words(responses, prompts, 9)[1:] == [("film", 1 / 4), ("know", 1 / 4)]
    assert commonest_content_words(["the of"], [""], 3) == []
    with pytest.raises(ValueError, match="prompt"):
        commonest_content_words(responses, prompts[:3], 2)


def test_duplicate_share_by_hand() -> None:
    assert duplicate_share(["one", " one\n", "One", "two", "one"]) == pytest.approx(2 / 5)
    assert duplicate_share(["one", "two"]) == 0.0


def test_text_statistics_by_hand() -> None:
    stats = text_statistics(["great great plot", "great great plot", "", "fine"], ["a", "b", "c", "d"], k=2)
    assert dataclasses.asdict(stats) == {
        "n": 4,
        "mean_words": 7 / 4,
        "distinct_1": pytest.approx(3 / 7),
        "distinct_2": pytest.approx(2 / 4),
        "distinct_4": 0.0,
        "word_repetition": pytest.approx((1 / 3 + 1 / 3) / 4),
        "duplicate_share": pytest.approx(1 / 4),
        "commonest_content_words": (("great", 0.5), ("plot", 0.5)),
    }


def test_text_statistics_do_not_depend_on_order_or_case() -> None:
    texts, _ = _reviews(40, seed=18)
    prompts = [text.split()[0] for text in texts]
    order = np.random.default_rng(19).permutation(40)
    shuffled = text_statistics([texts[i].upper() for i in order], [prompts[i] for i in order])
    stats = text_statistics(texts, prompts)
    assert shuffled.commonest_content_words == stats.commonest_content_words
    numbers = [[v for v in dataclasses.astuple(s) if not isinstance(v, tuple)] for s in (stats, shuffled)]
    assert numbers[0] == pytest.approx(numbers[1])


# ---------------------------------------------------------------------------------------------- errors


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
        (lambda: longer_wins(["a"], ["a", "b"]), "differ in length: 1 and 2"),
        (lambda: linear_pair_baseline(["a"], ["b"], [1.0, 2.0], ["a"], ["b"]), "one margin per pair"),
        (lambda: linear_pair_baseline(*_pairs(20, seed=20), ["a", "b"], ["a"]), "one rejected text"),
        (lambda: linear_pair_baseline(*_pairs(20, seed=20), [], []), "at least one text"),
        (lambda: fit_classifier(["some text"] * 3, [0, 1], seed=0), "one label"),
        (lambda: fit_classifier(["a", "b"], [0, 1], seed=0, groups=["a"]), "one group"),
        (lambda: Vader()([]), "at least one text"),
        (lambda: distinct_n([], 1), "at least one text"),
        (lambda: duplicate_share([]), "at least one text"),
        (lambda: commonest_content_words([], [], 3), "at least one text"),
        (lambda: text_statistics([], []), "at least one text"),
    ],
)
def test_empty_unequal_or_meaningless_input_is_refused(call: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()


def test_one_string_is_not_a_list_of_texts() -> None:
    with pytest.raises(TypeError, match="one string"):
        distinct_n("good", 1)
    with pytest.raises(TypeError, match="one string"):
        Vader()("good")
