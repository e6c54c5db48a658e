"""composition.json: what a composed adapter or merged model was made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINEAGE_FILE = "composition.json"


def read_lineage(folder: Path) -> dict[str, Any]:
    """What the folder's adapter was made from; {} where that is not written."""
    file = folder / LINEAGE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_lineage(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Writes it beside the adapter or model."""
    (folder / LINEAGE_FILE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
