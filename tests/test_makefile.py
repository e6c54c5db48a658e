"""The Makefile's promises that can be read without installing anything."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["pretrain", "sft", "reward", "ppo", "merge", "evaluate"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_help_lists_every_target():
    listed = re.findall(r"^  make (\S+) +\S", make("help"), re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", text(), re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(phony[1].replace("$(STAGES)", " ".join(STAGES)).split())
    assert make() == make("help")


def test_a_run_is_the_stages_in_order():
    commands = re.findall(r"stages/(\w+)\.py --config configs/(\w+)/(\w+)\.yaml", make("-n", "run", "RECIPE=smoke"))
    assert commands == [(stage, "smoke", stage) for stage in STAGES]


def test_stages_never_run_at_once():
    assert re.search(r"^\.NOTPARALLEL:$", text(), re.MULTILINE)


def test_a_stage_gets_recipe_folder_seed_and_dials():
    command = make("-n", "sft", "RECIPE=smoke", "RUNS=/tmp/elsewhere", "SEED=3", "ARGS=--max_length 99")
    assert "stages/sft.py --config configs/smoke/sft.yaml --runs /tmp/elsewhere --seed 3 --max_length 99" in command
    assert "--seed" not in make("-n", "sft")
