"""A stage that is cut off goes on to the bit, from the newest checkpoint that is as it was written, or says why not."""

import dataclasses
import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import STAGES, changed, configs, cut_off
from tiny import saved_weights

from pipeline.runtime import checkpoints
from pipeline.runtime.finished import StageError
from pipeline.runtime.hashing import file_manifest
from pipeline.runtime.process import Interrupted
from pipeline.runtime.stage_run import StageRun

NAMES = ("pretrain", "sft", "sft_lora", "reward", "ppo", "ppo_full")


def settings(name: str, folder: Path, runs: Path):
    """Four rollouts with a checkpoint after each; or twelve steps, logged at 1 and 10, with one after every fourth."""
    config = configs(folder, runs, "tiny")[name]
    if name.startswith("ppo"):
        return changed(config, rollouts=4, adaptive_kl=0.5, keep="best", save_steps=1)
    more = {"max_steps": 12} if name == "pretrain" else {}
    optim = dataclasses.replace(config.optim, num_train_epochs=3)
    return changed(config, optim=optim, save_steps=4, **more)


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
    ("name", "after"),
    [
        ("pretrain", 4), ("sft", 4), ("sft", 12), ("sft_lora", 8), ("reward", 4), ("reward", 8),
        *((name, after) for name in NAMES[-2:] for after in (1, 3)),
    ],
)  # fmt: skip
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


def test_of_a_run_of_other_dials_the_logs_are_kept(interrupted, capsys):
    final = train("ppo", changed(interrupted, kl_coef=0.3))
    assert "of another run (kl_coef: 0.1 then, 0.3 now): removed" in capsys.readouterr().out
    [attempt] = (final.parent / "attempts").iterdir()
    assert sorted(path.name for path in attempt.iterdir()) == [
        "config.yaml", "metrics.jsonl", "run.json", "samples.jsonl"
    ]  # fmt: skip


def test_a_run_goes_on_when_the_same_work_is_cut_up_otherwise(interrupted, whole, capsys):
    final = train("ppo", changed(interrupted, micro_batch=1, gradient_checkpointing=True))
    assert "goes on after step 3" in capsys.readouterr().out
    ours, theirs = saved_weights(final), saved_weights(whole["ppo"])
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


def test_a_log_that_lost_lines_keeps_those_that_are_whole(interrupted, whole, capsys):
    log = interrupted.run.folder("ppo") / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 20)
    (log.parent / "samples.jsonl").unlink()
    final = train("ppo", interrupted)
    printed = capsys.readouterr().out
    assert f"{log}: warning: the checkpoint counts" in printed
    assert "samples.jsonl: warning: the checkpoint counts" in printed
    assert content(final) == content(whole["ppo"])
    rows = lines(final.parent, "metrics.jsonl")
    complete = lines(whole["ppo"].parent, "metrics.jsonl")
    assert [row for row in complete if row not in rows] == [complete[-3]]  # rollout 2, whose line was cut
    assert rows == [row for row in complete if row in rows]


@pytest.mark.parametrize(
    ("name", "number", "after"), [("sft", signal.SIGINT, 3), ("reward", signal.SIGTERM, 11), ("ppo", signal.SIGTERM, 4)]
)
def test_a_stage_that_is_told_to_stop_ends_its_step_and_goes_on_to_the_bit(
    name, number, after, whole, folder, tmp_path, monkeypatch
):
    config = changed(settings(name, folder, tmp_path), save_steps=100)
    with (
        told_to_stop(monkeypatch, number, after),
        pytest.raises(Interrupted, match=f"after step {after}, with a") as it,
    ):
        train(name, config)
    assert it.value.number == number
    final = config.run.final(name)
    assert [path.name for path in (final.parent / "checkpoints").iterdir()] == [str(after)]
    train(name, config)
    assert content(final) == content(whole[name])
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (final.parent / log).exists():
            assert lines(final.parent, log) == lines(whole[name].parent, log)


@contextmanager
def told_to_stop(monkeypatch, number, step):
    """Within it the process sends itself a signal as a stage shows that many steps."""
    show = StageRun.show_progress

    def then_signal(run, total, done, **values):
        show(run, total, done, **values)
        if done == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "show_progress", then_signal)
        yield


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_without_save_steps_nothing_is_kept_of_a_stage_that_is_told_to_stop(name, folder, tmp_path, monkeypatch):
    config = changed(settings(name, folder, tmp_path), save_steps=0)
    with (
        told_to_stop(monkeypatch, signal.SIGTERM, 2),
        pytest.raises(Interrupted, match="by SIGTERM after step 2, without a checkpoint, since save_steps is 0"),
    ):
        train(name, config)
    assert not list(config.run.folder(name).glob("checkpoints/*"))


@pytest.mark.parametrize("save_steps", [0, 4])
def test_weights_that_are_not_finite_are_never_written(save_steps, folder, tmp_path):
    config = changed(settings("sft", folder, tmp_path), save_steps=save_steps)
    config = changed(config, optim=dataclasses.replace(config.optim, learning_rate=1e38, num_train_epochs=2))
    with pytest.raises(FloatingPointError, match=rf"sft: model\.\S+ is not finite after step {save_steps or 8}"):
        train("sft", config)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("DONE.json"))


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
