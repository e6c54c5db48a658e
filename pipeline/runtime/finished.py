"""What a finished stage says of itself: `final/DONE.json`, which lists its inputs, its metrics and every file."""

import json
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.runtime.hashing import first_changed_file


class StageError(UserError):
    """A stage that cannot start or finish; the message says why, and what to do."""


def read_done(final: Path) -> dict[str, Any]:
    """DONE.json of a finished stage output; a StageError names the stage to run where there is none."""
    if not (final / "DONE.json").is_file():
        what = "not finished (no DONE.json there)" if final.exists() else "not there"
        stage = final.parent.name
        how = (
            f"run {stage} first, for example `make {stage}`" if final.name == "final" else "a stage's final/ is needed"
        )
        raise StageError(f"{final}: {what}: {how}")
    return json.loads((final / "DONE.json").read_text(encoding="utf-8"))


def verify_files(final: Path) -> dict[str, Any]:
    """DONE.json, after comparing every file listed in it by size and sha256; else a StageError names the file."""
    done = read_done(final)
    if changed := first_changed_file(final, done["files"]):
        raise StageError(
            f"{final / changed}: missing or not as it was written (sha256 differs): run {done['stage']} again"
        )
    return done
