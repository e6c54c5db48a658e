"""Every YAML of every recipe parses, and says in its first two lines how to run it and what to expect."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.dials import Run
from pipeline.config.parse import Config, flat, parse
from pipeline.config.stages import PPO

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = {kind.__name__.lower(): kind for kind in Config.__constraints__}
COMMANDS = {"compose": Compose, "verify": Verify, "inspect": Inspect, "merge": MergeAdapter, "search": Search}
FILES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "accelerate")


def test_the_kinds_are_the_stages():
    assert set(KINDS) == {path.stem for path in (ROOT / "stages").glob("*.py")} - {"data"}


@pytest.mark.parametrize("recipe", ["imdb", "smoke"])
def test_a_recipe_has_a_file_for_every_stage(recipe):
    assert {path.stem for path in FILES if path.parent.name == recipe} == set(KINDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_config_parses_and_is_its_recipes(file):
    parsed = parse(KINDS[file.stem], ["--config", str(file)])
    assert parsed.run.recipe == file.parent.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_config_opens_with_its_command_and_what_to_expect(file):
    command, expectation = file.read_text(encoding="utf-8").splitlines()[:2]
    recipe = "" if file.parent.name == Run().recipe else f" RECIPE={file.parent.name}"
    command = command.split(" ARGS=")[0]
    assert command in (f"# make {file.stem}{recipe}", f"# make {file.stem} RECIPE={file.parent.name}")
    assert expectation.startswith("# ")
    assert len(expectation) > len("# ")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_config_gives_each_dial_once(file):
    keys = [line.split(":")[0] for line in file.read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")]
    assert len(keys) == len(set(keys))
    assert keys == list(yaml.safe_load(file.read_text(encoding="utf-8")) or {})


def test_the_smoke_recipe_is_small_and_reports_nowhere():
    for stage, kind in KINDS.items():
        parsed = parse(kind, ["--config", str(ROOT / "configs" / "smoke" / f"{stage}.yaml")])
        assert parsed.run.report_to == "none"


def mentioned(page: str) -> list[tuple[type, str]]:
    """Each `--name` behind `stages/<stage>.py`, with the stage or the command whose dial it should be."""
    found = []
    for stage, rest in re.findall(r"stages/(\w+)\.py((?:\\\n|[^\n`#])*)", page):
        first = (rest.split() or [""])[0]
        kind = COMMANDS[first] if stage == "merge" and first in COMMANDS else KINDS.get(stage)
        found += [(kind, name) for name in re.findall(r"(?<=\s)--(\w+)", rest) if kind]
    return found


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_dial_on_a_command_line_of_the_documentation_is_one(page):
    for kind, name in mentioned(page.read_text(encoding="utf-8")):
        assert name in {"config", "help", *flat(kind())}, kind.__name__


@pytest.mark.parametrize("number", [0, 1])
def test_the_yaml_of_the_page_for_those_who_come_from_trl_parses(number, tmp_path):
    page = (ROOT / "docs/from-trl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    file = tmp_path / "ppo.yaml"
    file.write_text(blocks[number], encoding="utf-8")
    config = parse(PPO, ["--config", str(file)])
    assert config.micro_batches(processes=1) > 0


def test_the_page_for_those_who_come_from_trl_names_dials_that_are_there():
    """In the column "here" of its first two tables each name in backticks is a dial of PPO, or of no stage at all."""
    page = (ROOT / "docs/from-trl.md").read_text(encoding="utf-8").split("## PPOTrainer's arguments")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert named - flat(PPO()).keys() == set()
