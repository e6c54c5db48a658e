"""Sources of rows: files, folders and hub datasets, alone or mixed.

    pairs.jsonl, ~/pairs.csv        .jsonl, .json, .csv, .tsv or .parquet; all but the last also as .gz
    shards/part-*.parquet           every file that the pattern matches, by name
    folder/                         every such file in it, by name; or what `save_to_disk` has written
    org/name/config:split@v1.0      a hub dataset, if need be its configuration, its split (train), its revision (main)
    a.jsonl, b.jsonl                one after the other
    a.jsonl*3, b.jsonl*1            mixed in these shares, until each was read through once

With each row comes its place, for error messages: `pairs.jsonl: row 3`. Rows are read one by one, so a source may be
larger than memory. Null is absent, and what a row is does not depend on the rows beside it.
"""

import glob
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pipeline.data.files import (
    DESCRIPTIONS,
    KINDS,
    SUFFIXES,
    DataError,
    Row,
    file_rows,
    is_rows_file,
    is_saved_dataset,
)
from pipeline.runtime.console import print_main
from pipeline.runtime.hashing import hash_file, hash_folder, hash_value

HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:-]+))?(@(?P<revision>[\w./-]+))?"
)
SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""The split that a word in a file's name stands for."""


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Within it a DataError of rows that were read is given the name of their source."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


@dataclass(frozen=True)
class Source:
    """Files of rows, or, where `files` is empty, a hub dataset."""

    name: str
    files: tuple[Path, ...] = ()
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    share: float | None = None
    passed_over: tuple[str, ...] = ()
    """What else is in the folder."""

    def rows(self) -> Iterator[Row]:
        if not self.files:
            return hub_rows(self)
        return chain.from_iterable(map(file_rows, self.files))

    def fingerprint(self) -> str:
        """sha256 of a file; of a folder's list of them; a hub dataset's commit."""
        if not self.files:
            return f"{hub_commit(self)}/{self.config}:{self.split}"
        hashes = [hash_folder(file) if file.is_dir() else hash_file(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hash_value([[file.name for file in self.files], hashes])


def parse_sources(text: str) -> list[Source]:
    """The sources that a dial names; DataError for one that is not there, or shares given to some of them only."""
    sources = [parse_source(part) for part in split_at_commas(text)]
    if len({source.share is None for source in sources}) > 1:
        raise DataError(f"{text}: give every source a share (`a.jsonl*3, b.jsonl*1`) or none")
    return sources


def hash_source(text: str) -> str:
    """A hash of the sources' content and shares; of one file its sha256."""
    sources = parse_sources(text)
    if len(sources) == 1:
        return sources[0].fingerprint()
    return hash_value([[source.fingerprint(), source.share] for source in sources])


def hash_sources(sources: Iterable[str]) -> list[tuple[str, str]]:
    """Each source with its hash, as `StageRun` records the data of a stage."""
    return [(source, hash_source(source)) for source in sources]


def iterate_sources(text: str, limit: int = 0, seed: int = 0) -> Iterator[Row]:
    """The rows of the sources, the first `limit` of them (0: all); `seed` draws the order of a mixture."""
    sources = parse_sources(text)
    rows: Iterator[Row] = chain.from_iterable(source.rows() for source in sources)
    if sources[0].share is not None and len(sources) > 1:
        rows = mix_sources(sources, seed)
    for source in sources:
        if source.passed_over:
            print_main(f"{source.name}: not read: {', '.join(source.passed_over)}")
    return map(row_without_nulls, islice(rows, limit or None))


def row_without_nulls(row: Row) -> Row:
    where, fields = row
    try:
        return where, without_nulls(fields)
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be a row") from None


def without_nulls(value: Any) -> Any:
    """A value of JSON's kinds without the fields that are null, as those that a row lacks are in a table."""
    if isinstance(value, dict):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def mix_sources(sources: Sequence[Source], seed: int) -> Iterator[Row]:
    """Rows of the sources in their shares, until each was read through; one that ends before begins again.

    Rows pass through as they are: `datasets.interleave_datasets` brings them all to the columns of the first.
    """
    shares, draw = [source.share or 0.0 for source in sources], random.Random(seed)
    readers = [source.rows() for source in sources]
    following = [next(reader, None) for reader in readers]  # the row that each gives next
    unread = set(range(len(sources)))
    while unread:
        (number,) = draw.choices(range(len(sources)), shares)
        row = following[number]
        assert row is not None  # a source without rows is an error
        yield row
        following[number] = next(readers[number], None)
        if following[number] is None:
            unread.discard(number)
            readers[number] = sources[number].rows()
            following[number] = next(readers[number])


def split_at_commas(text: str) -> list[str]:
    """The parts between commas, but for a comma in the name of a file that is there."""
    parts, found = text.split(","), list[str]()
    while parts:
        joined = {end: ",".join(parts[:end]).strip() for end in range(len(parts), 0, -1)}
        end = next((end for end, name in joined.items() if names_files(name) or names_files(split_share(name)[0])), 1)
        found.append(joined[end])
        parts = parts[end:]
    return found


def split_share(text: str) -> tuple[str, float | None]:
    """The name before the last '*' and the number after it, or the whole text and None."""
    name, _, share = text.rpartition("*")
    try:
        return name, float(share)
    except ValueError:
        return text, None


def parse_source(text: str) -> Source:
    """One source, with its share after a '*' if it has one."""
    if not text:
        raise DataError(f"'{text}': expected a file, folder or hub dataset before and after every comma")
    name, share = split_share(text)
    if exists(text) or (matching_files(text) and not exists(name)):
        return resolve(text, None)
    before, star, after = text.rpartition("*")
    if star and share is None and not os.path.isfile(os.path.expanduser(before)):
        raise DataError(f"{text}: no file matches")
    if star and not (share and 0 < share < float("inf")):
        raise DataError(f"{text}: expected a positive number after '*', got '{after}'")
    return resolve(name, share)


def exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # pathlib raises for a name that is too long, or an unknown ~user


def names_files(text: str) -> bool:
    return exists(text) or bool(matching_files(text))


def matching_files(pattern: str) -> list[Path]:
    """The files that a pattern matches, by name."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(path for path in map(Path, found) if path.is_file())


def resolve(name: str, share: float | None) -> Source:
    """The source of that name: a file, a folder, a pattern or a hub dataset."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        files = folder_files(path)
        return Source(name, files, share=share, passed_over=others(path, files))
    if os.path.isfile(path):
        return Source(name, (check_rows_file(path),), share=share)
    if matching := matching_files(name):
        return Source(name, one_split(name, list(map(check_rows_file, matching))), share=share)
    match = HUB.fullmatch(name)
    if not match or name.lower().endswith(SUFFIXES):
        hint = "; `make data` makes the default recipe's" if name.startswith("data/imdb/") else ""
        raise DataError(f"{name}: no such file or folder{hint}")
    return Source(match["name"], (), match["config"], match["split"] or "train", match["revision"] or "main", share)


def check_rows_file(path: Path) -> Path:
    """The path; DataError for a file that holds no rows by its name."""
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: expected {KINDS} (.gz for the text formats)")
    if path.name in DESCRIPTIONS:
        raise DataError(f"{path}: a description of a dataset, by its name; expected {KINDS} of rows")
    return path


def folder_files(folder: Path) -> tuple[Path, ...]:
    """The files of rows in a folder, by name, or a saved dataset; DataError where it is not clear which are meant."""
    if is_saved_dataset(folder):
        return (folder,)
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    saved = [path.name for path in inside if path.is_dir() and is_saved_dataset(path)]
    if saved:
        raise DataError(f"{folder}: saved datasets are in it ({', '.join(saved)}): name one, as in {folder / saved[0]}")
    files = [path for path in inside if path.is_file() and is_rows_file(path)]
    if not files:
        below = [path for path in inside if path.is_dir() and any(map(is_rows_file, path.iterdir()))]
        hint = f"; {below[0]} has some: name it, or a pattern such as '{below[0]}/train-*'" if below else ""
        raise DataError(f"{folder}: no {KINDS.removeprefix('a ')} in this folder{hint}")
    return one_split(str(folder), files)


def others(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """What in a folder is not among its files of rows, by name; of what is hidden only what looks like rows."""
    if folder in files:  # a saved dataset
        return ()
    rest = sorted(path for path in folder.iterdir() if path not in files)
    seen = [path for path in rest if not path.name.startswith(".") or path.name.lower().endswith(SUFFIXES)]
    return tuple(f"{path.name}/" if path.is_dir() else path.name for path in seen)


def split_of(file: Path) -> str:
    """The split that a file's name speaks of, or that of its folder."""
    words = re.findall(r"[a-z]+", f"{file.name}/{file.parent.name}".lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "no split")


def one_split(name: str, files: Sequence[Path]) -> tuple[Path, ...]:
    """The files; DataError unless all are of one split: else rows that test a model would be among those it learns."""
    splits: dict[str, Path] = {}
    for file in files:
        splits.setdefault(split_of(file), file)
    if len(splits) > 1:
        found = ", ".join(f"{split} ({file.name})" for split, file in splits.items())
        raise DataError(
            f"{name}: files of several splits are in it: {found}; name a file, or a pattern of one split, such "
            "as 'train-*', or, if all are meant, each between commas"
        )
    return tuple(files)


def hub_rows(source: Source) -> Iterator[Row]:
    """A hub dataset's rows, streamed at the commit that its revision names now."""
    where = f"{source.name}:{source.split}"
    commit = hub_commit(source)
    options = {"split": source.split, "revision": commit, "streaming": True}
    rows = call_hub(source, lambda: datasets.load_dataset(source.name, source.config, **options))
    number = 0
    for number, row in enumerate(rows, 1):
        yield f"{where}: row {number}", row
    if not number:
        raise DataError(f"{where}: no rows in it")


def hub_commit(source: Source) -> str:
    """The commit that a hub dataset's revision names now."""
    commit = call_hub(source, lambda: HfApi().dataset_info(source.name, revision=source.revision).sha)
    return str(commit)


def call_hub(source: Source, request: Callable[[], Any]) -> Any:
    """What the request returns; DataError, with the reason, where the hub gives no such dataset."""
    try:
        return request()
    except OfflineModeIsEnabled:
        why = "the hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        why = f"the hub answers {status} for it at revision '{source.revision}'; is the name right?"
    except (OSError, datasets.exceptions.DatasetsError) as error:
        why = f"the hub cannot be reached ({type(error).__name__})"
    except ValueError as error:  # an unknown split or configuration
        why = " ".join(str(error).split())[:200]
    raise DataError(f"{source.name}: no such file or folder, and as a hub dataset: {why}")
