"""Whether the disk has space for what a stage will write."""

import shutil
from pathlib import Path

from pipeline.runtime.finished import StageError

LEAST_DISK = 50 * 2**20  # bytes, for logs and samples


def require_free(stage: str, folder: Path, needed: int, what: str = "") -> None:
    """StageError where the disk of a folder, which need not be there yet, has fewer bytes free; `what` they are for."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise StageError(
            f"{folder}: the disk has {free / 2**20:,.0f} MiB free, {stage} needs about "
            f"{needed / 2**20:,.0f}{what}: make room, or give --runs a folder on another disk"
        )


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
