"""A folder that appears whole or not at all: written beside its place, listed, flushed to the disk, then renamed."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.runtime.hashing import file_manifest, fsync_folder, fsync_path

Listing = Mapping[str, Any]


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Within it a folder is filled; after any error, an interruption included, nothing of it is left."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def appear(temporary: Path, place: Path, name: str, describe: Callable[[Listing], Listing]) -> Listing:
    """Renames a folder to its place, complete on the disk and with a list of its files in `name`, written last.

    `describe` makes that list of their sizes and hashes (`hashing.file_manifest`); it is returned.
    """
    listing = describe(file_manifest(temporary))
    fsync_folder(temporary)
    (temporary / name).write_text(json.dumps(listing, indent=1, default=str) + "\n", encoding="utf-8")
    fsync_path(temporary / name)
    fsync_path(temporary)
    temporary.rename(place)
    fsync_path(place.parent)
    return listing


def make_folder(folder: Path) -> None:
    """Makes a folder with all above it that are not there, each flushed to the disk by its name."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_path(path.parent)
