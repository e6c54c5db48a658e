"""Judges of text that no stage has trained on, and baselines for pairs of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupShuffleSplit
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from pipeline.config.dials import Reading
from pipeline.data.files import DataError
from pipeline.data.formats import read_rows
from pipeline.evaluation.statistics import Array, Estimate, pair_accuracy, share_ci, to_paired_vectors, to_vector
from pipeline.evaluation.text import to_text_list, word_counts, words

Judge = Callable[[Sequence[str]], Array]
"""One number for each text."""

LABELS = {"negative": 0, "positive": 1}
HOLDOUT = 0.1  # share of a classifier's texts that it is tested on and never fitted to
INVERSE_PENALTY = 3.0  # C of the logistic regression
LEAST_TEXTS = 3  # that a word or a pair of words stands in, to be counted (min_df)
PAIR_ALPHA = 3.0  # ridge penalty of the pair baseline


def fit_judge(file: str, seed: int, reading: Reading = Reading()) -> Classifier:
    """P(positive) of a text, by a classifier fitted to human labels that no stage has seen.

    Texts with one `key` are of one document (`fit_classifier`'s group); a text without is one by itself. DataError for
    a row without a label, and for labels to which nothing can be fitted. `reading` says what becomes of bad rows; its
    columns are those of other files.
    """
    rows = read_rows(file, "text", reading=replace(reading, columns=""), check=check_label)
    texts, labels = [row["text"] for row in rows], [LABELS[row["label"].lower()] for row in rows]
    groups = [row["text"] if row.get("key") is None else str(row["key"]) for row in rows]
    try:
        return fit_classifier(texts, labels, seed, groups)
    except ValueError as error:
        raise DataError(
            f"{file}: no judge can be fitted to its {len(rows):,} texts ({str(error).rstrip('.')}): give more labelled "
            "texts of both kinds, or no judge_file"
        ) from None


def check_label(row: Mapping[str, Any]) -> None:
    """DataError unless the row has one of LABELS."""
    label = row.get("label")
    if not isinstance(label, str) or label.lower() not in LABELS:
        raise DataError(f"label: expected {' or '.join(LABELS)}, got {label!r:.40}; write one of the two words")


# ---------------------------------------------------------------------------------------------- judges


class Vader:
    """The VADER lexicon judge (Hutto & Gilbert 2014, ICWSM): calling it returns each text's compound in [-1, 1].

    Hand-written rules over a word list that people rated word by word: no labelled text was fitted. The rules read
    capitals and punctuation, so texts go in as they are; a text without a listed word has compound 0.
    """

    def __init__(self) -> None:
        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, texts: Sequence[str]) -> Array:
        return np.array(
            [self.analyzer.polarity_scores(text)["compound"] for text in to_text_list(texts)], dtype=np.float64
        )


@dataclass(frozen=True)
class Classifier:
    """A bag-of-words judge made by `fit_classifier`: calling it returns P(positive) of each text.

    `holdout_accuracy` is its accuracy on texts that it was not fitted to.
    """

    vectorizer: TfidfVectorizer
    model: LogisticRegression
    holdout_accuracy: Estimate

    def __call__(self, texts: Sequence[str]) -> Array:
        return _positive(self.model, self.vectorizer.transform(to_text_list(texts)))


def fit_classifier(
    texts: Sequence[str], labels: Sequence[int], seed: int, groups: Sequence[str] | None = None
) -> Classifier:
    """Logistic regression on TF-IDF of word 1-2-grams (sublinear tf, min_df 3), fitted to 90 % of the labels and
    tested on the other 10 %; labels are 0 and 1, 1 is positive.

    The split is drawn from `seed` over `groups` (by default over distinct texts), so no group is on both sides: name
    the source document there if the texts hold a document and also its sentences, or the accuracy is flattered.
    """
    texts, y = to_text_list(texts), np.asarray(labels)
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
    vectorizer, tfidf = _fit_tfidf([texts[i] for i in fitted])
    model = LogisticRegression(C=INVERSE_PENALTY, solver="liblinear", random_state=seed)
    model.fit(tfidf, y[fitted])
    positive = _positive(model, vectorizer.transform([texts[i] for i in held]))
    return Classifier(vectorizer, model, share_ci(pair_accuracy((positive - 0.5) * np.where(y[held] == 1, 1, -1))))


def longer_wins(chosen: Sequence[str], rejected: Sequence[str]) -> Array:
    """Correctness (n,) of the rule "the text with more words is the chosen one", ties 0.5.

    What a reward model must beat before its accuracy says anything about content.
    """
    chosen_words, rejected_words = to_paired_vectors(word_counts(chosen), word_counts(rejected))
    return pair_accuracy(chosen_words - rejected_words)


def linear_pair_baseline(
    train_chosen: Sequence[str],
    train_rejected: Sequence[str],
    margins: ArrayLike,
    test_chosen: Sequence[str],
    test_rejected: Sequence[str],
) -> Array:
    """Correctness (n_test,) of a bag of words: ridge regression of max(margin, 1) on tfidf(chosen) - tfidf(rejected).

    One TF-IDF (word 1-2-grams, sublinear tf, min_df 3), fitted to the distinct training texts. No intercept, so
    swapping a pair negates its score; adding each pair mirrored (-difference, -target) would double each squared error
    and so change nothing but the scale of the penalty. The penalty is PAIR_ALPHA.
    Its accuracy is what the words alone are worth; what a reward model adds to it came from their order.
    """
    train_chosen, train_rejected = to_text_list(train_chosen), to_text_list(train_rejected)
    target = np.maximum(to_vector(margins), 1.0)
    if not len(train_chosen) == len(train_rejected) == len(target):
        raise ValueError("training needs one chosen text, one rejected text and one margin per pair")
    rows = {text: i for i, text in enumerate(dict.fromkeys(train_chosen + train_rejected))}
    vectorizer, tfidf = _fit_tfidf(list(rows))
    train = tfidf[[rows[text] for text in train_chosen]] - tfidf[[rows[text] for text in train_rejected]]

    def differences(chosen: Sequence[str], rejected: Sequence[str]) -> csr_matrix:  # (n, features)
        if len(chosen) != len(rejected):
            raise ValueError("a pair needs one chosen and one rejected text")
        return vectorizer.transform(to_text_list(chosen)) - vectorizer.transform(to_text_list(rejected))

    ridge = Ridge(alpha=PAIR_ALPHA, fit_intercept=False, solver="lsqr").fit(train, target)
    return pair_accuracy(ridge.predict(differences(test_chosen, test_rejected)))


def _fit_tfidf(texts: Sequence[str]) -> tuple[TfidfVectorizer, csr_matrix]:
    """TF-IDF of word 1-2-grams (sublinear tf) fitted to texts, and theirs; ValueError if no word is in LEAST_TEXTS."""
    vectorizer = TfidfVectorizer(
        tokenizer=words, token_pattern=None, ngram_range=(1, 2), sublinear_tf=True, min_df=LEAST_TEXTS
    )
    try:
        return vectorizer, vectorizer.fit_transform(texts)
    except ValueError:
        raise ValueError(f"no word is in {LEAST_TEXTS} of the {len(texts):,} texts") from None


def _positive(model: LogisticRegression, features: csr_matrix) -> Array:
    """P(label 1) of each row."""
    return np.asarray(model.predict_proba(features)[:, 1], dtype=np.float64)
