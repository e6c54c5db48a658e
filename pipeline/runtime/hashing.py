"""sha256 of files, folders and JSON values; manifests of folders; fsync of folders."""

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
    """sha256 of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_folder(path: Path) -> str:
    """sha256 of the names and contents of all files in a folder and below."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_value([[str(file.relative_to(path)), hash_file(file)] for file in files])


def file_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of all files in a folder and below, by their path in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files}


def first_changed_file(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The first file of a `file_manifest` that is missing or has changed; '' if there is none."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
            return name
    return ""


def fsync_folder(path: Path) -> None:
    """Flushes all files in a folder and below, and the folder itself, to the disk."""
    for entry in [*(file for file in path.rglob("*") if file.is_file()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
