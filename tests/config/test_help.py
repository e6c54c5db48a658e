"""`--help` shows about ten dials and says how many others there are; `--help all` shows every one, by concern."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.parse import Config, flat, parse, parse_command
from pipeline.config.stages import PPO, SFT, Pretrain, Reward
from pipeline.config.values import dials

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = Config.__constraints__
COMMANDS = (Compose, Verify, Inspect, MergeAdapter, Search)


@pytest.fixture
def helped(capsys):
    """What is printed where help is asked for."""

    def helped(kind, *argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse(kind, argv) if kind in STAGES else parse_command(kind, "x", argv)
        assert stopped.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return helped


def shown(page: str) -> list[str]:
    return re.findall(r"^  --(\w+) ", page, re.MULTILINE)


@pytest.mark.parametrize("kind", [Pretrain, SFT, Reward, PPO])
def test_a_training_stage_shows_about_ten_dials_and_says_how_many_others_there_are(kind, helped):
    page = helped(kind, "--help")
    config, *usual = shown(page)
    assert config == "config"
    assert 8 <= len(usual) <= 12
    assert {"recipe", "seed", "train_file", "learning_rate", "micro_batch"} <= set(usual)
    assert page.endswith(f"\n--help all: the other {len(flat(kind())) - len(usual)} dials, grouped by concern\n")


@pytest.mark.parametrize("kind", STAGES + COMMANDS)
def test_all_of_help_names_every_dial_once_the_usual_first(kind, helped):
    page = helped(kind, "--help", "all")
    names = shown(page)
    assert sorted(names) == sorted(["config", *flat(kind())])
    usual = [dial.name for dial in dials(kind()) if dial.meta["usual"]]
    assert names[1 : 1 + len(usual)] == usual
    assert "--help all" not in page


def test_all_of_help_is_grouped_by_concern(helped):
    page = helped(PPO, "--help", "all")
    groups = re.findall(r"^([A-Za-z ]+):$", page, re.MULTILINE)
    assert groups == [
        "file", "usual", "run", "data", "adapter", "sampling", "PPO", "optimiser", "KL and score", "critic",
        "evaluation and stopping", "tokens",
    ]  # fmt: skip
    assert shown(page.split("\nadapter:\n")[1].split("\nsampling:\n")[0]) == [
        "lora_r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "load_in_4bit",
    ]  # fmt: skip


def test_a_command_with_few_dials_shows_them_all(helped):
    assert helped(Compose, "--help") == helped(Compose, "--help", "all")


@pytest.mark.parametrize(
    ("argv", "everything"),
    [
        (["-h"], False), (["--help"], False), (["--seed", "1", "-h"], False), (["--seed", "x", "--help"], False),
        (["--config", "nowhere.yaml", "--help"], False), (["--help", "--no_dial", "1"], False),
        (["-h", "all"], True), (["--help=all"], True), (["--seed", "--help", "all"], True),
    ],
)  # fmt: skip
def test_help_answers_wherever_it_is_asked(helped, argv, everything):
    assert helped(SFT, *argv) == helped(SFT, *(["--help", "all"] if everything else ["--help"]))


def test_help_of_a_command_answers_before_and_after_its_first_dial(helped):
    assert helped(Search, "-h") == helped(Search, "a + $x*b", "--help") == helped(Search, "--help")


@pytest.mark.parametrize("kind", STAGES)
def test_help_of_an_entry_answers_and_names_every_dial(kind, tmp_path):
    """From another folder, where no config file lies, and without torch or transformers."""
    stage = kind.__name__.lower()
    script = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--help", "all"]
try:
    runpy.run_path({str(ROOT / "stages" / f"{stage}.py")!r}, run_name="__main__")
except SystemExit as stopped:
    heavy = {{"torch", "transformers", "accelerate", "datasets", "numpy"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in flat(kind()):
        assert f"--{name} " in done.stdout


@pytest.mark.parametrize(
    ("word", "status", "says"),
    [
        ("vrify", 2, "error: unknown command 'vrify'; did you mean 'verify'?"),
        ("other", 2, "error: unknown command 'other'; expected one of compose, verify, inspect, merge, search"),
        ("--help", 0, "Commands: compose, verify, inspect, merge, search; each has a --help of its own"),
    ],
)
def test_merge_names_its_commands(word, status, says):
    done = subprocess.run(
        [sys.executable, "stages/merge.py", word], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert (done.stdout if status == 0 else done.stderr).startswith(says)
