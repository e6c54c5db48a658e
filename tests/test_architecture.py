"""Imports go only downwards through the layers, no stage imports another, and the maths imports torch alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"tensors", "config", "fingerprints"},
    {"losses", "advantages", "process", "judges", "sources", "shards", "roles", "expressions"},
    {"formats", "tokenizing", "tracking", "corpus", "siblings", "checkpoints", "algebra"},
    {"data", "run", "models"},
    {"scoring", "rollout", "trainers", "report", "adapter_files", "actor_critic"},
    {"monitor", "adapters"},
    {"keeping", "measures"},
    {"search"},
    {"pretrain", "sft", "reward", "ppo", "merge", "evaluate", "chat"},
)
LAYER = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
ROOMS = sorted(path for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")
STAGES = sorted((ROOT / "stages").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that the file imports, inside functions too; `from pipeline import x` is `pipeline.x`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("pipeline" if node.level else "", node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_imports_go_only_downwards(path):
    assert path.stem in LAYER, f"pipeline/{path.name} stands in no layer"
    assert {room for room in rooms(path) if LAYER.get(room, len(LAYERS)) >= LAYER[path.stem]} == set()


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_no_stage_imports_another(path):
    assert "stages" not in {name.split(".")[0] for name in imported(path)}
    assert {room for room in rooms(path) if room in LAYERS[-1]} <= {path.stem}


@pytest.mark.parametrize("room", ["tensors", "losses", "advantages"])
def test_maths_imports_torch_alone(room):
    others = {name.split(".")[0] for name in imported(ROOT / "pipeline" / f"{room}.py")} - sys.stdlib_module_names
    assert others <= {"torch", "pipeline"}
    assert rooms(ROOT / "pipeline" / f"{room}.py") <= {"tensors", "losses", "advantages"}
