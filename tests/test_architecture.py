"""Imports go only downwards, between packages and inside them, and the maths imports torch alone: one table says so."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS: Mapping[str, tuple[str, ...]] = {
    "config": ("errors names", "columns", "dials", "commands stages", "values", "help", "parse"),
    "core": ("tensors losses", "advantages"),
    "runtime": (
        "hashing internals limits process",
        "console precision finite interrupts whole",
        "launch tracking progress finished logs watchdog",
        "checkpoints provenance lock disk",
        "stage_run",
    ),
    "data": (
        "near_duplicates imdb_texts",
        "imdb_rows",
        "imdb files tokenizer",
        "sources",
        "messages bad_rows",
        "transcripts",
        "answers columns",
        "formats",
        "chat_template form",
        "tokenize",
        "prompts",
    ),
    "evaluation": ("statistics side_figures", "text report", "judges"),
    "models": ("multi_adapter sharding", "fresh_adapter", "loading", "saving", "forward", "heads", "actor_critic"),
    "rl": ("rollout rewards", "experience", "update", "setup", "monitor", "progress"),
    "training": ("batches callbacks validation", "trainer"),
    "adapters": (
        "expressions updates lineage search_dials optimise",
        "expression_parser compression operators base",
        "algebra reading writing mixture eval_rows search_plot",
        "proof inspect",
        "compose merge generations metrics",
        "verify search",
    ),
    "": ("pretrain sft reward ppo merge evaluate chat",),
}
"""Packages from the ground up ("": the stages), and in each its modules from the ground up; a line holds equals."""
HEIGHT = {
    ".".join(filter(None, (package, module))): (floor, step)
    for floor, (package, steps) in enumerate(FLOORS.items())
    for step, modules in enumerate(steps)
    for module in modules.split()
}
FILES = {
    ".".join(path.relative_to(ROOT / "pipeline").with_suffix("").parts): path
    for path in sorted((ROOT / "pipeline").rglob("*.py"))
    if path.stem != "__init__"
}
STAGES = sorted((ROOT / "stages").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that the file imports, inside functions too; `from a import b` is `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_used(path: Path) -> set[str]:
    """The project's modules that a file imports, by their names without `pipeline`."""
    names = {name.removeprefix("pipeline.") for name in imported(path) if name.startswith("pipeline.")}
    return {name if name in FILES else name.rpartition(".")[0] for name in names}


def test_the_table_names_every_module():
    assert HEIGHT.keys() == FILES.keys()


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_only_downwards(module):
    assert {used for used in modules_used(FILES[module]) if HEIGHT[used] >= HEIGHT[module]} == set()


@pytest.mark.parametrize("package", [package for package in FLOORS if package])
def test_a_package_exports_nothing(package):
    """Its `__init__` says what it is for, in at most five lines: everything has one path."""
    text = (ROOT / "pipeline" / package / "__init__.py").read_text(encoding="utf-8")
    [node] = ast.parse(text).body
    assert isinstance(node, ast.Expr)
    assert len(text.splitlines()) <= 6


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_an_entry_imports_its_own_stage_alone(path):
    assert "stages" not in {name.split(".")[0] for name in imported(path)}
    assert {module for module in modules_used(path) if "." not in module} <= {path.stem}


@pytest.mark.parametrize("module", [module for module in sorted(FILES) if module.startswith("core.")])
def test_maths_imports_torch_alone(module):
    others = {name.split(".")[0] for name in imported(FILES[module])} - sys.stdlib_module_names
    assert others <= {"torch", "pipeline"}
    assert all(used.startswith("core.") for used in modules_used(FILES[module]))


@pytest.mark.parametrize("module", [module for module in sorted(FILES) if module.startswith("config.")])
def test_dials_import_no_library_that_is_slow_to_load(module):
    others = {name.split(".")[0] for name in imported(FILES[module])} - sys.stdlib_module_names
    assert others <= {"yaml", "pipeline"}


def test_ppos_loop_fits_on_one_screen():
    """At most 60 lines, made of at most 25 imported names."""
    tree = ast.parse(FILES["ppo"].read_text(encoding="utf-8"))
    [loop] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert loop.end_lineno - loop.lineno < 60
    assert sum(len(node.names) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)) <= 25
