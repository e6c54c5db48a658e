"""sha256 of files, folders and JSON values; manifests of folders; what is known already; fsync."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
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


def first_changed_file(
    folder: Path, files: Mapping[str, Mapping[str, Any]], hash_of: Callable[[Path], str] = hash_file
) -> str:
    """The first file of a `file_manifest` that is missing or has changed; '' if there is none."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or hash_of(file) != expected["sha256"]:
            return name
    return ""


class HashCache:
    """sha256 of files, read again only where size or times have changed; kept in a JSON file where that can be written.

    The times are those of content and of inode: no program can set the latter, and a copy has its own.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, list] = {}  # by path from the cache's folder: size, two times in ns, sha256
        with contextlib.suppress(OSError, ValueError):
            self.known = dict(json.loads(file.read_text(encoding="utf-8")))

    def hash_file(self, path: Path) -> str:
        entry = self.known.get(self._name(path), [])
        if entry[:-1] != stamp(path):
            entry = self.add({path: hash_file(path)})
        return entry[-1]

    def add(self, hashes: Mapping[Path, str]) -> list:
        """Takes what is known of files as they are now; returns the last one's entry."""
        entry: list = []
        for path, sha256 in hashes.items():
            self.known[self._name(path)] = entry = [*stamp(path), sha256]
        with contextlib.suppress(OSError):  # a folder that is read only: hashed again the next time
            temporary = self.file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self.known), encoding="utf-8")
            temporary.replace(self.file)
        return entry

    def _name(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self.file.parent.resolve())


def stamp(path: Path) -> list[int]:
    """Size in bytes, and times of content and of inode in ns."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def fsync_path(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flushes all files and folders below a folder, and the folder itself, to the disk."""
    for entry in [*path.rglob("*"), path]:
        fsync_path(entry)
