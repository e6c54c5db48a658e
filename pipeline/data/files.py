"""Rows of one file: JSON lines or an array, CSV, parquet, or the folder that `save_to_disk` of datasets writes.

Rows come one by one, so a file may be larger than memory. What cannot be read is named with its file and row.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.parquet

from pipeline.config.errors import UserError
from pipeline.runtime.console import print_main

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
KINDS = "a .jsonl, .json, .csv, .tsv or .parquet file"

Row = tuple[str, dict[str, Any]]
"""The row's place, for error messages, and its fields."""


class DataError(UserError):
    """A row or a file that cannot be used; the message names file, row and field, what is expected, and a fix."""


def is_rows_file(path: Path) -> bool:
    """Whether a file's name says that rows are in it; hidden files, and what describes a dataset, are not rows."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.name not in DESCRIPTIONS


DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What datasets writes beside rows."""


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` has written."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of one file; DataError for bytes that are not its format, or a file without rows."""
    kind = file.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        "jsonl": _json_lines,
        "json": _json_lines,
        "csv": _csv_rows,
        "tsv": _csv_rows,
        "parquet": _parquet_rows,
    }
    where = ""
    for number, row in _saved_rows(file) if file.is_dir() else readers[kind](file):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of fields, got {type(row).__name__}; mend or remove the row")
        yield where, row
    if not where:
        raise DataError(f"{file}: no rows in it")


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """One JSON object per line, numbered by its line, or one array of objects."""
    with _open(file) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if number == 1 and text.lstrip().startswith("["):
                    yield from enumerate(json.loads(text + lines.read().decode(), object_pairs_hook=_as_row), 1)
                    return
                if text.strip():
                    yield number, json.loads(text, object_pairs_hook=_as_row)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number}: not JSON ({error}); expected one object per line") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: not readable after line {number}: {error}") from None
        except RecursionError:
            raise DataError(f"{file}: line {number}: nested too deeply to be a row") from None
        except RepeatedName as error:
            raise DataError(f"{file}: line {number}: {error} stands twice in one object; keep one of them") from None


class RepeatedName(ValueError):
    """A name that one JSON object has twice, of which `json` would keep the last."""


def _as_row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise RepeatedName(_repeated([name for name, _ in pairs]))
    return row


def _repeated(names: Sequence[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows under a header of names, separated as the header is: by commas, or where it has none by ; or tabs.

    Blank lines are no rows. A column without a name may hold row numbers (pandas' index) or nothing.
    """
    csv.field_size_limit(2**31 - 1)
    with _open(file) as data:
        try:
            lines = io.TextIOWrapper(data, "utf-8-sig", newline="")  # line ends are the csv module's to read
            header = next((line for line in lines if line.strip()), "")
            separator = next((mark for mark in (",", "\t", ";") if mark in header), ",")
            if file.name.lower().removesuffix(".gz").endswith(".tsv"):
                separator = "\t"
            records = csv.reader(
                _check_quotes(file, separator, chain([header], lines)), delimiter=separator, strict=True
            )
            names = [name.strip() for name in next(records, [])]
            _check_header(file, [*filter(None, names)])
            if "" in names:
                print_main(
                    f"{file}: column {names.index('') + 1} has no name and is not read (row numbers, or nothing)"
                )
            for number, cells in enumerate(filter(None, records), 1):
                if len(cells) != len(names):
                    raise DataError(
                        f"{file}: row {number}: expected {len(names)} cells ({', '.join(names)}), got {len(cells)}; "
                        f"put quotes round a cell that holds a {'comma' if separator == ',' else repr(separator)} or a "
                        "line break"
                    )
                _check_unnamed(file, number, names, cells)
                yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name and cell}
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{file}: line {records.line_num}: not CSV ({error})") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: not readable: {error}") from None


def _check_header(file: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{file}: {_repeated(names)} heads two columns; name each once")


def _check_quotes(file: Path, separator: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines; DataError for a cell like ` "a"`: `csv` would leave the quotes in it, and split it at a comma."""
    stray = re.compile(f'(^|{separator}) +"[^"{separator}\r\n]')  # inside quotes one stands before a separator or twice
    for line in lines:
        if stray.search(line):
            raise DataError(f"{file}: a blank before the quotes of a cell: {line.strip()!r:.60}; take such blanks out")
        yield line


def _check_unnamed(file: Path, number: int, names: Sequence[str], cells: Sequence[str]) -> None:
    for column, (name, cell) in enumerate(zip(names, cells, strict=True), 1):
        if not name and cell.strip() and not cell.strip().isdigit():
            raise DataError(f"{file}: row {number}: column {column} has no name and holds {cell!r:.40}; name it")


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_header(file, table.schema_arrow.names)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in table.iter_batches()), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: not readable as parquet: {' '.join(str(error).split())}") from None


def _saved_rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = datasets.load_from_disk(str(folder)).with_format(None)  # all columns, whatever `set_format` has chosen
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not readable as a saved dataset: {' '.join(str(error).split())[:200]}") from None
    yield from enumerate(rows, 1)
