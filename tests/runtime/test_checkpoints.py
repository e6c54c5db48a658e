"""A stage that is cut off goes on to the bit, from the newest checkpoint that is as it was written, or says why not."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import STAGES, changed, configs, cut_off

from pipeline.runtime import checkpoints
from pipeline.runtime.finished import StageError
from pipeline.runtime.hashing import file_manifest

NAMES = ("pretrain", "sft", "sft_lora", "reward", "ppo", "ppo_full")


def settings(name: str, folder: Path, runs: Path):
    """A run of four steps or rollouts with a checkpoint after each."""
    config = changed(configs(folder, runs, "tiny")[name], save_steps=1)
    return changed(config, rollouts=4, adaptive_kl=0.5, keep="best") if name.startswith("ppo") else config


def train(name: str, config) -> Path:
    return STAGES[name.split("_")[0]].train(config)


def lines(folder: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def content(final: Path) -> dict[str, str]:
    return {name: file["sha256"] for name, file in file_manifest(final).items() if name != "DONE.json"}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str, Path]:
    """Every stage, not cut off."""
    runs = tmp_path_factory.mktemp("whole")
    return {name: train(name, settings(name, folder, runs)) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "after"), [("pretrain", 1), ("sft", 4), *((name, after) for name in NAMES[1:] for after in (1, 3))]
)
def test_a_stage_that_was_cut_off_goes_on_to_the_bit(name, after, whole, folder, tmp_path, capsys):
    config = settings(name, folder, tmp_path)
    with cut_off(after):
        train(name, config)
    final = config.run.final(name.split("_")[0])
    assert not final.exists()
    capsys.readouterr()
    train(name, config)
    assert f"goes on after step {after}" in capsys.readouterr().out
    assert content(final) == content(whole[name])
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (whole[name].parent / log).exists():
            assert lines(final.parent, log) == lines(whole[name].parent, log)
    assert not (final.parent / "checkpoints").exists()
    assert not (final.parent / "attempts").exists()


@pytest.fixture
def interrupted(folder, tmp_path):
    """PPO that was cut off after three rollouts, two checkpoints kept."""
    config = settings("ppo", folder, tmp_path)
    with cut_off(3):
        train("ppo", config)
    assert sorted(path.name for path in (config.run.folder("ppo") / "checkpoints").iterdir()) == ["2", "3"]
    return config


def spoil_first_byte(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize("spoil", [spoil_first_byte, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["best.safetensors", "training/.metadata", "random_states_0.pkl", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(interrupted, name, spoil, whole, capsys):
    newest = interrupted.run.folder("ppo") / "checkpoints/3"
    spoil(newest / name)
    shutil.copytree(newest, newest.with_name("4.partial"))  # a write that was cut off is not even looked at
    final = train("ppo", interrupted)
    printed = capsys.readouterr().out
    assert f"{newest}: {name} is missing or not as it was written" in printed
    assert "goes on after step 2" in printed
    assert content(final) == content(whole["ppo"])
    for log in ("metrics.jsonl", "samples.jsonl"):  # what came after that checkpoint has come again, and stands once
        assert lines(final.parent, log) == lines(whole["ppo"].parent, log)


def test_without_a_whole_checkpoint_the_stage_starts_again(interrupted, whole, capsys):
    for step in ("2", "3"):
        (interrupted.run.folder("ppo") / "checkpoints" / step / "MANIFEST.json").unlink()
    final = train("ppo", interrupted)
    assert "goes on" not in capsys.readouterr().out
    assert content(final) == content(whole["ppo"])
    assert lines(final.parent, "metrics.jsonl") == lines(whole["ppo"].parent, "metrics.jsonl")


def test_a_checkpoint_of_other_dials_is_set_aside_with_its_attempt(interrupted, capsys):
    final = train("ppo", changed(interrupted, kl_coef=0.3))
    assert "of another run (kl_coef: 0.1 then, 0.3 now): set aside" in capsys.readouterr().out
    [attempt] = (final.parent / "attempts").iterdir()
    assert checkpoints.newest_checkpoint(attempt / "checkpoints").step == 3


@pytest.mark.parametrize(
    ("made_by", "says"),
    [
        ({"strategy": "ZeRO-2", "processes": 2}, "made under ZeRO-2 on 2 processes, this launch is DDP on 1: go on "
         "with `accelerate launch --config_file configs/accelerate/zero2.yaml --num_processes 2 stages/ppo.py"),
        ({"strategy": "FSDP2"}, "configs/accelerate/fsdp2.yaml --num_processes 1 stages/ppo.py"),
        ({"precision": "bf16"}, "was made in bf16, which --precision fp32 is not on this machine"),
    ],
)  # fmt: skip
def test_pieces_of_another_launch_are_refused_with_its_command(interrupted, made_by, says):
    manifest = interrupted.run.folder("ppo") / "checkpoints/3/MANIFEST.json"
    written = json.loads(manifest.read_text())
    written["facts"]["launch"] |= made_by
    manifest.write_text(json.dumps(written))
    before = file_manifest(interrupted.run.folder("ppo"))
    with pytest.raises(StageError, match=says):
        train("ppo", interrupted)
    assert file_manifest(interrupted.run.folder("ppo")) == before


def test_none_are_made_when_none_are_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_checkpoint", None)
    for name in ("sft", "ppo"):
        train(name, changed(settings(name, folder, tmp_path), save_steps=0))
