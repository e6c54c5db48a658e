"""README and docs keep their word: each command in them resolves, each function and linked file they name is there."""

import importlib
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import planted_bugs
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The lines of its shell blocks; a command over several lines is one."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [
        line
        for block in blocks
        for line in re.sub(r'"[^"]*"', lambda text: text[0].replace("\n", " "), block).splitlines()
    ]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
COMMANDS = commands(README)
MAKE = [line for page in (README, *PAGES.values()) for line in commands(page) if line.startswith("make")]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", MAKE)
def test_a_make_command_resolves_to_stages(command):
    done = run([*shlex.split(command), "--dry-run"])
    assert done.returncode == 0, done.stderr
    for stage, config in re.findall(r"stages/(\w+)\.py --config (\S+)", done.stdout):
        assert (ROOT / "stages" / f"{stage}.py").is_file()
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "stages/" in c and not c.startswith("make")])
def test_a_stage_command_parses(command):
    stage = command[command.index("stages/") :]
    done = run([sys.executable, *shlex.split(stage), "--help"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [["make", "help"], *([sys.executable, f"stages/{s}.py", "--help"] for s in ("sft", "ppo"))]
)
def test_help_answers_within_a_second(command):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert run(command).returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1


def test_every_command_is_looked_at():
    rest = [c for c in COMMANDS if not c.startswith("make") and "stages/" not in c]
    assert rest == [".venv/bin/pip install torch==2.13.0"]


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make run", "make test"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w.]+\.\w+)` ?\(|`([\w.]+\.\w+)` \|", README))), ids=str)
def test_a_function_is_where_the_readme_says(name):
    module, _, function = next(filter(None, name)).rpartition(".")
    assert callable(getattr(importlib.import_module(f"pipeline.{module}"), function))


MODULES = {
    path.relative_to(ROOT / "pipeline").with_suffix("").as_posix()
    for path in (ROOT / "pipeline").rglob("*.py")
    if path.stem != "__init__"
}


def test_the_map_names_every_module():
    """Each package in a row of its own, each module in its package's row, and nothing that is not there."""
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|$", README.split("## Finding one's way")[1].split("to change")[0], re.M)
    )
    named = {f"{package}/{module}" for package, row in rows.items() for module in re.findall(r"`(\w+)`", row)}
    assert named == {module for module in MODULES if "/" in module}


def test_the_readers_guide_opens_files_that_are_there():
    guide = README.split("| to change | open |")[1].split("```")[0]
    files = re.findall(r"`(\w+/\w+)\.py`", guide)
    assert len(files) > 15
    assert set(files) <= MODULES


def test_the_planted_bugs_are_counted():
    assert f"of {len(planted_bugs.PLANTED) + len(planted_bugs.TWO_PROCESSES)} bugs" in " ".join(README.split())


def test_linked_files_exist():
    pages = {"README.md": README} | {f"docs/{name}": page for name, page in PAGES.items()}
    links = [
        (Path(name).parent / link) for name, page in pages.items() for link in re.findall(r"\]\(([^)#: ]+)\)", page)
    ]
    assert len(links) > 15
    assert [str(link) for link in links if not (ROOT / link).exists()] == []
