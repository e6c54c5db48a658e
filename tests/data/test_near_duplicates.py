"""Near duplicates planted by hand find their group. tests/data/test_imdb.py searches the real data another way."""

import re

import pytest

from pipeline.data.imdb_texts import clean
from pipeline.data.near_duplicates import group_keys, near_duplicates, normalise

LONG = (
    "The harbour town wakes slowly in the first half hour, and nobody in the cast seems to be in any hurry to tell us "
    "why the lighthouse keeper left. By the time his daughter returns with the letters, the film has earned our "
    "patience twice."
)


@pytest.mark.parametrize(
    "variant",
    [
        LONG.upper(),
        re.sub(r"[.,]", " !", LONG),
        LONG.replace("why the", "why<br /><br />the"),
        LONG.replace("daughter", "sister"),
        "I saw this on a plane. " + LONG + " Seven out of ten, and my wife would say eight out of ten.",
        "by the time his daughter returns with the letters, the film has earned our patience",
    ],
)
def test_a_planted_duplicate_joins_its_original(variant: str) -> None:
    other = (
        "A harbour, a lighthouse, a daughter and some letters: all the film needs, and it has earned our patience too."
    )
    texts = [clean(text) for text in (other, variant, LONG)]
    assert group_keys(texts, ["x/0", "x/1", "x/2"]) == ["x/0", "x/1", "x/1"]


def test_a_group_is_joined_through_its_members_and_named_by_the_smallest_key() -> None:
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(words[start : start + 30]) for start in (0, 10, 20, 40)]
    assert group_keys(texts, ["c", "b", "a", "d"]) == ["a", "a", "a", "d"]


@pytest.mark.parametrize(("shared", "near"), [(21, False), (22, True)])
def test_half_the_windows_of_the_shorter_text_are_enough(shared: int, near: bool) -> None:
    """36 words have 29 windows of eight; the first 22 shared words give 15 of them, 21 give 14."""
    short = [f"w{i}" for i in range(36)]
    longer = short[:shared] + [f"v{i}" for i in range(80)]
    assert near_duplicates([" ".join(longer), " ".join(short)]).tolist() == ([[0, 1]] if near else [])


def test_a_short_text_joins_only_what_holds_all_of_it_in_one_run() -> None:
    texts = [
        "a gem of a movie",
        "truly a gem of a movie, that",
        "a gem of what a movie",
        "of a movie",
        "oh, of a movie yes",
    ]
    assert near_duplicates(texts).tolist() == [[0, 1]]


def test_normalise_keeps_letters_and_digits_of_any_script() -> None:
    for text in ("It's_a *9*-Année!", "ça n' t . ", "\u0394elta (2)", "..."):
        assert normalise(text) == "".join(letter for letter in text.lower() if letter.isalnum())
