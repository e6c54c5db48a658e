"""The README keeps its word: each command in it resolves, each function and linked file it names is there."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
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


def test_every_command_is_looked_at():
    rest = [c for c in COMMANDS if not c.startswith("make") and "stages/" not in c]
    assert rest == [".venv/bin/pip install torch==2.13.0"]


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make run", "make test"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.\w+)` ?\(|`(\w+\.\w+)` \|", README))), ids=str)
def test_a_function_is_where_the_readme_says(name):
    module, function = next(filter(None, name)).split(".")
    assert callable(getattr(importlib.import_module(f"pipeline.{module}"), function))


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
