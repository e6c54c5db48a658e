"""Text statistics by hand."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.text import (
    commonest_content_words,
    distinct_n,
    duplicate_share,
    most_risen_word,
    text_statistics,
    word_repetition,
    words,
)


def test_words() -> None:
    assert words("Don't STOP -- it's 10/10, naïve!") == ["don't", "stop", "it's", "10", "10", "naïve"]


@given(st.text(st.characters(max_codepoint=127)))
def test_in_ascii_words_are_letters_digits_and_apostrophes(text: str) -> None:
    assert words(text) == re.findall("[a-z0-9']+", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Größe, «Ёлка» — ξένος", ["größe", "ёлка", "ξένος"]),
        ("e\u0301te\u0301_été", ["e\u0301te\u0301", "été"]),  # an accent of its own is of its letter's word
        ("हिन्दी में किताब।", ["हिन्दी", "में", "किताब"]),
        ("영화는 좋다", ["영화는", "좋다"]),
        ("很好,OK吗？", ["很", "好", "ok", "吗"]),
        ("データ 10本", ["デ", "ー", "タ", "10", "本"]),
        ("น้ำดี", ["น้", "ำ", "ดี"]),
        ("❤️ … ½²", []),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize("word", ["прекрасно", "很好", "超好", "ดีมาก", "훌륭해", "शानदार", "رائع", "τέλειο"])
def test_one_word_again_and_again_is_repetition_in_any_script(word: str) -> None:
    assert word_repetition(" ".join([word] * 12)) > 0.75
    assert word_repetition(word * 12) > 0.75 or " ".join(words(word * 12)) == word * 12
    assert commonest_content_words([f"{word} {i}" for i in range(4)], [""] * 4, 9)[0][1] == 1.0


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


def test_content_words_of_other_scripts() -> None:
    assert commonest_content_words(["это да, «ёлка»"], [""], 9) == [("это", 1.0), ("ёлка", 1.0)]
    assert commonest_content_words(["영화 나"], [""], 9) == [("영화", 1.0)]  # five letters; "나" has two
    pairs = commonest_content_words(["很好看，好", "很好 film"], ["", "看"], 9)
    assert pairs == [("很好", 1.0), ("film", 0.5), ("好", 0.5), ("好看", 0.5)]


def test_the_most_risen_word_by_hand() -> None:
    before = ["и это дом", "и это лес", "и это сад", "и река"]  # "это" in 3 of 4, as function words are
    after = ["и это чудо", "и это чудо", "и это лес", "и это река"]
    assert most_risen_word(after, before, [""] * 4, 0.5) == ("чудо", 2 / 4)
    assert most_risen_word(after, before, [""] * 4, 0.75) == ("это", 1.0)  # not above it, so no usual word
    assert most_risen_word(after, before, ["чудо"] * 4, 0.5) == ("лес", 1 / 4)
    assert most_risen_word(["и"], ["это"], [""], 0.5) == ("none", 0.0)


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
    texts = [" ".join(row) for row in np.random.default_rng(18).choice(["superb", "plot", "not", "actor"], (40, 9))]
    prompts = [text.split()[0] for text in texts]
    order = np.random.default_rng(19).permutation(40)
    shuffled = text_statistics([texts[i].upper() for i in order], [prompts[i] for i in order])
    stats = text_statistics(texts, prompts)
    assert shuffled.commonest_content_words == stats.commonest_content_words
    numbers = [[v for v in dataclasses.astuple(s) if not isinstance(v, tuple)] for s in (stats, shuffled)]
    assert numbers[0] == pytest.approx(numbers[1])


@pytest.mark.parametrize(
    ("call", "why"),
    [
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
