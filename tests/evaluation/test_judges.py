"""Judges and baselines on texts whose right answers are known, against dense algebra."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from pipeline.evaluation import judges
from pipeline.evaluation.judges import Vader, fit_classifier, linear_pair_baseline, longer_wins


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
    """If the 10 % were among the fitted texts, a bag of words would have most of their labels right."""
    texts, _ = _reviews(2000, seed=8)
    labels = np.random.default_rng(9).integers(2, size=2000)
    judge = fit_classifier(texts, labels.tolist(), seed=10)
    assert judge.holdout_accuracy.low < 0.5 < judge.holdout_accuracy.high
    assert ((judge(texts) > 0.5) == labels).mean() > 0.6  # memorised, on what it was fitted to


def test_no_group_is_on_both_sides_of_the_holdout() -> None:
    """Each meaningless label belongs to ten copies of a text: only a group on both sides could be predicted."""
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


def test_longer_wins_counts_words_not_letters() -> None:
    chosen = ["a b c", "incomprehensible", "don't -- go!", "yes"]
    rejected = ["extraordinary length", "a b", "two words", ""]
    assert longer_wins(chosen, rejected).tolist() == [1.0, 0.0, 0.5, 1.0]


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


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: longer_wins(["a"], ["a", "b"]), "differ in length: 1 and 2"),
        (lambda: linear_pair_baseline(["a"], ["b"], [1.0, 2.0], ["a"], ["b"]), "one margin per pair"),
        (lambda: linear_pair_baseline(*_pairs(20, seed=20), ["a", "b"], ["a"]), "one rejected text"),
        (lambda: linear_pair_baseline(*_pairs(20, seed=20), [], []), "at least one text"),
        (lambda: fit_classifier(["some text"] * 3, [0, 1], seed=0), "one label"),
        (lambda: fit_classifier(["a", "b"], [0, 1], seed=0, groups=["a"]), "one group"),
        (lambda: Vader()([]), "at least one text"),
    ],
)
def test_empty_unequal_or_meaningless_input_is_refused(call: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()


def test_one_string_is_not_a_list_of_texts() -> None:
    with pytest.raises(TypeError, match="one string"):
        Vader()("good")
