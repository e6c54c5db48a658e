"""What tells one content from another: sha256 of files, folders and values."""

import hashlib
import json
from pathlib import Path
from typing import Any


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_value(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_folder(path: Path) -> str:
    """Of the names and contents of every file below."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return of_value([[str(file.relative_to(path)), of_file(file)] for file in files])
