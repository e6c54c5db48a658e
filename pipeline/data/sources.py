"""Sources of rows: files, folders and hub datasets, alone or mixed.

    pairs.jsonl                     .jsonl, .json, .csv or .parquet; the first three also as .gz
    folder/                         every such file in it, by name
    org/name/config:split@v1.0      a hub dataset, if need be its configuration, its split (train), its revision (main)
    a.jsonl, b.jsonl                one after the other
    a.jsonl*3, b.jsonl*1            mixed in these shares, until each was read through once

With each row comes its place, for error messages: `pairs.jsonl: row 3`. Rows are read one by one, so a source may be
larger than memory.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pipeline.config.errors import UserError
from pipeline.runtime.hashing import hash_file, hash_value

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:-]+))?(@(?P<revision>[\w./-]+))?"
)

Row = tuple[str, dict[str, Any]]
"""The row's place, for error messages, and its fields."""


class DataError(UserError):
    """A row or a file that cannot be used; the message names file, row and field, what is expected, and a fix."""


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

    def rows(self) -> Iterator[Row]:
        if not self.files:
            return hub_rows(self)
        return chain.from_iterable(map(file_rows, self.files))

    def fingerprint(self) -> str:
        """sha256 of a file; of a folder's list of them; a hub dataset's commit."""
        if not self.files:
            return f"{hub_commit(self)}/{self.config}:{self.split}"
        hashes = [hash_file(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hash_value([[file.name for file in self.files], hashes])


def parse_sources(text: str) -> list[Source]:
    """The sources that a dial names; DataError for one that is not there, or shares given to some of them only."""
    sources = [parse_source(part.strip()) for part in text.split(",")]
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
    return islice(rows, limit or None)


def mix_sources(sources: Sequence[Source], seed: int) -> Iterator[Row]:
    """Rows of the sources in their shares, until each was read through; one that ends before begins again."""
    total = sum(source.share or 0.0 for source in sources)
    mixture = datasets.interleave_datasets(
        [datasets.IterableDataset.from_generator(partial(_rows_as_dicts, source)) for source in sources],
        [(source.share or 0.0) / total for source in sources],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
    return ((row["where"], row["fields"]) for row in mixture)


def _rows_as_dicts(source: Source) -> Iterator[dict[str, Any]]:
    return ({"where": where, "fields": fields} for where, fields in source.rows())


def parse_source(text: str) -> Source:
    """One source, with its share after a '*' if it has one."""
    name, star, share = text.rpartition("*")
    if not star or Path(text).exists():
        name, share = text, ""
    weight = None
    if share:
        try:
            weight = float(share)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise DataError(f"{text}: expected a positive number after '*', got '{share}'")
    if not name:
        raise DataError(f"'{text}': expected a file, folder or hub dataset before and after every comma")
    path = Path(name)
    if path.is_dir():
        files = tuple(file for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES[:4])} file in this folder")
        return Source(name, files, share=weight)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: expected a {', '.join(SUFFIXES[:4])} file (.gz for the text formats)")
        return Source(name, (path,), share=weight)
    match = HUB.fullmatch(name)
    if not match or name.endswith(SUFFIXES):
        hint = "; `make data` makes the default recipe's" if name.startswith("data/imdb/") else ""
        raise DataError(f"{name}: no such file or folder{hint}")
    return Source(match["name"], (), match["config"], match["split"] or "train", match["revision"] or "main", weight)


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of one file; DataError for bytes that are not its format, or a file without rows."""
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[1]
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        "jsonl": _json_lines,
        "json": _json_lines,
        "csv": _csv_rows,
        "parquet": _parquet_rows,
    }
    where = ""
    for number, row in readers[kind](file):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of fields, got {type(row).__name__}; mend or remove the row")
        yield where, row
    if not where:
        raise DataError(f"{file}: no rows in it")


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """One JSON object per line, numbered by its line, or one array of objects."""
    with _open(file) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if number == 1 and text.lstrip().startswith("["):
                    yield from enumerate(json.loads(text + lines.read().decode()), 1)
                    return
                if text.strip():
                    yield number, json.loads(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number}: not JSON ({error}); expected one object per line") from None
        except (OSError, EOFError) as error:
            raise DataError(f"{file}: not readable after line {number}: {error}") from None
        except RecursionError:
            raise DataError(f"{file}: line {number}: nested too deeply to be a row") from None


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with _open(file) as data:
        try:
            rows = csv.reader((line.decode() for line in data), strict=True)
            names = [name.removeprefix("\ufeff") for name in next(rows, [])]
            for number, cells in enumerate(rows, 1):
                if len(cells) != len(names):
                    raise DataError(
                        f"{file}: row {number}: expected {len(names)} cells ({', '.join(names)}), got {len(cells)}; "
                        "put quotes round a cell that holds a comma or a line break"
                    )
                yield number, dict(zip(names, cells, strict=True))
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{file}: line {rows.line_num}: not CSV ({error})") from None
        except (OSError, EOFError) as error:
            raise DataError(f"{file}: not readable: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: not readable as parquet: {' '.join(str(error).split())}") from None


def hub_rows(source: Source) -> Iterator[Row]:
    """A hub dataset's rows, streamed at the commit that its revision names now."""
    where = f"{source.name}:{source.split}"
    commit = hub_commit(source)
    options = {"split": source.split, "revision": commit, "streaming": True}
    rows = call_hub(source, lambda: datasets.load_dataset(source.name, source.config, **options))
    for number, row in enumerate(rows, 1):
        yield f"{where}: row {number}", row


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
