"""What tells one content from another: sha256 of files, folders and values; and that it is on the disk."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_folder(path: Path) -> str:
    """Of the names and contents of every file below."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_value([[str(file.relative_to(path)), hash_file(file)] for file in files])


def file_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below, by its path from the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files}


def first_changed_file(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The first of the files of `file_manifest` that is missing or has another content, or ''."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
            return name
    return ""


def fsync_folder(path: Path) -> None:
    """Has the disk write what it holds of a folder's files, and the folder itself."""
    for place in [*(file for file in path.rglob("*") if file.is_file()), path]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
