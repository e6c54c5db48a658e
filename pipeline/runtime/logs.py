"""The lines that a stage logs: appended, on the disk as far as a checkpoint counts them, cut back to it afterwards."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.console import print_main
from pipeline.runtime.hashing import fsync_path

LOGS = ("metrics.jsonl", "samples.jsonl")


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False) + "\n")


def finite_or_null(value: Any) -> Any:
    """A value of JSON's kinds with None for each number that is not finite, which JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_logs(folder: Path) -> dict[str, int]:
    """Flushes the logs to the disk; the size in bytes of each that there is."""
    files = [folder / name for name in LOGS if (folder / name).exists()]
    for path in (*files, folder):
        fsync_path(path)
    return {file.name: file.stat().st_size for file in files}


def cut_logs(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cuts the logs back to what they were at a checkpoint: the steps after it are logged again.

    A log that has lost lines since keeps those that are whole, with a printed line: the weights do not depend on it.
    """
    for name in LOGS:
        file, size = folder / name, sizes.get(name, 0)
        there = file.stat().st_size if file.exists() else 0
        if there < size:
            there = file.read_bytes().rfind(b"\n") + 1 if there else 0
            print_main(
                f"{file}: warning: the checkpoint counts {size:,} bytes, of which {there:,} are left in whole lines: "
                "the steps between are missing from it"
            )
        if file.exists():
            os.truncate(file, min(there, size))
