"""What a finished stage says of itself: `final/DONE.json`, which lists its inputs, its metrics and every file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.runtime.hashing import HashCache, first_changed_file, hash_value


class StageError(UserError):
    """A stage that cannot start or finish; the message says why, and what to do."""


def read_done(final: Path) -> dict[str, Any]:
    """DONE.json of a finished stage output; a StageError names the stage to run where there is none."""
    file = final / "DONE.json"
    if not file.is_file():
        what = "not finished (no DONE.json there)" if final.exists() else "not there"
        stage = final.parent.name
        how = (
            f"run {stage} first, for example `make {stage}`" if final.name == "final" else "a stage's final/ is needed"
        )
        raise StageError(f"{final}: {what}: {how}")
    try:
        done = json.loads(file.read_text(encoding="utf-8"))
        is_whole = done["fingerprint"] == hash_value([done["identity"], done["files"]])
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise StageError(f"{file}: not as it was written: {how_to_renew(final, final.parent.name)}")
    return done


def recorded_form(final: Path) -> str:
    """Whether a stage was trained on text or on conversations; '' where that is not recorded."""
    return str(read_done(final).get("form", "")) if (final / "DONE.json").is_file() else ""


def verify_files(final: Path) -> dict[str, Any]:
    """DONE.json, after comparing every file listed in it by size and sha256; else a StageError names the file."""
    done = read_done(final)
    if changed := first_changed_file(final, done["files"], hash_cache(final).hash_file):
        raise StageError(
            f"{final / changed}: missing or not as it was written (sha256 differs): "
            f"{how_to_renew(final, done['stage'])}"
        )
    return done


def how_to_renew(final: Path, stage: str) -> str:
    """What to do about an output that is damaged."""
    folder = final.parent if final.name == "final" else final
    return f"put back the file as it was, or move {folder} away and run {stage} again"


def remember_files(final: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Saves the next stage from reading again what has just been read."""
    hash_cache(final).add({final / name: file["sha256"] for name, file in files.items()})


def hash_cache(final: Path) -> HashCache:
    return HashCache(final.resolve().parent / ".hashes.json")
