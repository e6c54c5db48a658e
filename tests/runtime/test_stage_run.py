"""A stage's output appears whole or not at all, is identified by content, and is never silently reused or replaced."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.config.parse import identity, parse
from pipeline.config.stages import PPO, SFT
from pipeline.data.files import DataError
from pipeline.data.sources import hash_sources
from pipeline.runtime import hashing
from pipeline.runtime.finished import StageError, read_done, verify_files
from pipeline.runtime.hashing import hash_value
from pipeline.runtime.lock import lock_folder, unlock
from pipeline.runtime.process import Interrupted
from pipeline.runtime.stage_run import StageRun

ROOT = Path(__file__).resolve().parent.parent.parent


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below with its content and its time of change."""
    return {
        str(file.relative_to(folder)): (sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project: a default config per stage and two data files; the working folder is there."""
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("report_to: none\n")
    Path("train.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    Path("validation.jsonl").write_text('{"prompt": "c", "completion": " d"}\n')
    return tmp_path


def config(kind, *argv):
    return parse(kind, ["--config", "empty.yaml", "--recipe", "r", *argv])


def finished(stage: str, kind, parents: dict[str, Path], *argv, content: str = "weights") -> Path:
    """A stage run to its end, whose final/ holds one file and one in a folder below."""

    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(content)
        (folder / "below").mkdir()
        (folder / "below" / "more.bin").write_text("more")
        (folder / "tokenizer.json").write_text("{}")

    with StageRun(stage, config(kind, *argv), parents, hash_sources(["train.jsonl", "validation.jsonl"])) as run:
        run.log(3, {"loss": 1.5, "accuracy": 0.25})
        run.log(4, {"loss": 1.25})
        run.log_samples([{"text": "größer"}])
        return run.finish(write, {"loss": 1.25})


def chain(*argv) -> tuple[Path, Path]:
    base = finished("pretrain", SFT, {})
    return base, finished("sft", SFT, {"base": base}, *argv)


def test_a_finished_stage_lists_what_it_is_and_what_it_was_made_from(project):
    base, final = chain("--max_length", "50")
    assert final == Path("runs/r/sft/final")
    done = read_done(final)
    expected = {"model.bin": b"weights", "below/more.bin": b"more", "tokenizer.json": b"{}"}
    assert done["files"] == {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()} for name, content in expected.items()
    }
    assert done["stage"] == "sft"
    assert done["identity"]["dials"]["max_length"] == 50
    assert done["config"] == hash_value(done["identity"]["dials"])
    assert done["identity"]["data"] == [
        sha256(Path(f).read_bytes()).hexdigest() for f in ("train.jsonl", "validation.jsonl")
    ]
    assert done["tokenizer"] == sha256(b"{}").hexdigest()
    assert done["base"] == {"base": read_done(base)["fingerprint"]}
    assert done["metrics"] == {"loss": 1.25}
    assert sorted(path.name for path in final.parent.iterdir()) == [
        ".hashes.json", ".lock", "config.yaml", "final", "metrics.jsonl", "run.json", "samples.jsonl"
    ]  # fmt: skip


def test_the_fingerprint_follows_dials_data_parents_and_files(project):
    def fingerprint(*argv, content="weights", parents=None) -> str:
        shutil.rmtree("runs/r/sft", ignore_errors=True)
        return read_done(finished("sft", SFT, parents or {}, *argv, content=content))["fingerprint"]

    first = fingerprint()
    assert fingerprint() == first  # times, folders and machines do not matter
    others = {
        fingerprint("--max_length", "50"),
        fingerprint(content="other"),
        fingerprint(parents={"base": finished("pretrain", SFT, {})}),
    }
    Path("train.jsonl").write_text("{}\n")
    others.add(fingerprint())
    assert len(others) == 4
    assert first not in others


def test_metrics_samples_and_config_are_kept_as_given(project):
    final = finished("sft", SFT, {}, "--learning_rate", "2e-4")
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 1.5, "accuracy": 0.25}, {"step": 4, "loss": 1.25}]
    assert (final.parent / "samples.jsonl").read_text(encoding="utf-8") == '{"text": "größer"}\n'
    assert parse(SFT, ["--config", str(final.parent / "config.yaml")]) == config(SFT, "--learning_rate", "2e-4")
    assert yaml.safe_load((final.parent / "config.yaml").read_text())["recipe"] == "r"
    run = json.loads((final.parent / "run.json").read_text())
    assert run["metrics"] == {"loss": 1.25}
    assert run["processes"] == 1
    assert set(run["data"]) == {"train.jsonl", "validation.jsonl"}
    assert "torch" in run["versions"]


def test_a_write_that_fails_leaves_no_final_and_keeps_what_was_there(project):
    def half(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        raise OSError("disk full")

    base = finished("pretrain", SFT, {})
    before = snapshot(base)
    run = StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl"]))
    with run:
        run.log(1, {"loss": 2.0})
        with pytest.raises(OSError, match="disk full"):
            run.finish(half, {})
    assert not run.final.exists()
    assert not run.is_finished()
    with pytest.raises(StageError, match="make sft"):
        read_done(run.final)
    assert (run.folder / "metrics.jsonl").exists()
    assert snapshot(base) == before


def test_what_is_no_number_is_null_in_every_file(project):
    """NaN and Infinity are no JSON."""
    with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])) as run:
        run.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "kl": 0.5})
        metrics = {"perplexity": float("inf"), "by_margin": [{"low": -float("inf"), "high": 0.0}]}
        final = run.finish(lambda folder: (folder / "a").write_text("a"), metrics)

    def read(text: str) -> dict:
        return json.loads(text, parse_constant=pytest.fail)

    assert read((run.folder / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None, "kl": 0.5}
    for file in (final / "DONE.json", run.folder / "run.json"):
        assert read(file.read_text())["metrics"] == {"perplexity": None, "by_margin": [{"low": None, "high": 0.0}]}


def test_weights_are_whole_on_disk_while_they_are_measured(project, capsys):
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text("weights")

    def attempt(error: bool) -> Path:
        with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])) as run:
            run.write(write)
            assert (run.partial / "model.bin").read_text() == "weights"
            assert not run.final.exists()
            if error:
                raise RuntimeError("out of memory")
            return run.complete({"loss": 1.0})

    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(error=True)
    assert "sft: the weights are whole in runs/r/sft/final.partial" in " ".join(capsys.readouterr().out.split())
    assert Path("runs/r/sft/final.partial/model.bin").exists()
    final = attempt(error=False)
    assert verify_files(final)["metrics"] == {"loss": 1.0}
    assert not (final.parent / "final.partial").exists()


def test_an_unfinished_attempt_is_put_aside_and_kept(project):
    for number in range(3):  # also within one second
        with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])) as run:
            run.log(number, {"loss": float(number)})
    final = finished("sft", SFT, {})
    kept = [json.loads(file.read_text())["step"] for file in (final.parent / "attempts").glob("*/metrics.jsonl")]
    assert sorted(kept) == [0, 1, 2]
    assert len((final.parent / "metrics.jsonl").read_text().splitlines()) == 2  # this attempt's alone


def test_the_same_inputs_are_skipped_and_nothing_changes(project, capsys):
    base, final = chain()
    before = snapshot(project)
    places = ("--report_to", "wandb")
    assert StageRun(
        "sft", config(SFT, *places), {"base": base}, hash_sources(["train.jsonl", "validation.jsonl"])
    ).is_finished()
    assert f"sft: finished already, skipped ({final})" in capsys.readouterr().out.replace("\n", "")
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--max_length", "50"], "max_length: 128 then, 50 now"),
        (["--use_rslora", "true"], "use_rslora: False then, True now"),
        (["--seed", "1"], "seed: 0 then, 1 now"),
    ],
)
def test_another_dial_is_refused_by_name_and_nothing_changes(project, argv, names):
    base, final = chain()
    before = snapshot(project)
    run = StageRun("sft", config(SFT, *argv), {"base": base}, hash_sources(["train.jsonl", "validation.jsonl"]))
    with pytest.raises(StageError, match=names) as raised:
        run.is_finished()
    assert str(final) in str(raised.value)
    assert snapshot(project) == before


def test_other_data_or_swapped_data_is_refused(project):
    finished("sft", SFT, {})
    before = snapshot(project / "runs")
    with pytest.raises(StageError, match="data"):
        StageRun("sft", config(SFT), {}, hash_sources(["validation.jsonl", "train.jsonl"])).is_finished()
    Path("moved.jsonl").write_bytes(Path("train.jsonl").read_bytes())  # data are identified by content, not by name
    assert StageRun("sft", config(SFT), {}, hash_sources(["moved.jsonl", "validation.jsonl"])).is_finished()
    Path("train.jsonl").write_text("{}\n")
    with pytest.raises(StageError, match="data files differ"):
        StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl", "validation.jsonl"])).is_finished()
    assert snapshot(project / "runs") == before


def test_a_parent_made_anew_is_noticed(project):
    base, _ = chain()
    shutil.rmtree(base.parent)
    finished("pretrain", SFT, {}, content="retrained")
    with pytest.raises(StageError, match="parent base was made anew"):
        StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl", "validation.jsonl"])).is_finished()


def test_a_missing_or_unfinished_parent_names_the_command(project):
    base = Path("runs/r/pretrain/final")
    with pytest.raises(StageError, match=r"not there: run pretrain first, for example `make pretrain`"):
        StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl"]))
    base.mkdir(parents=True)
    with pytest.raises(StageError, match=r"not finished .*`make pretrain`"):
        StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl"]))
    with pytest.raises(StageError, match=r"gpt2: not there: a stage's final/ is needed"):
        StageRun("sft", config(SFT), {"base": Path("gpt2")}, hash_sources(["train.jsonl"]))
    assert not Path("runs/r/sft").exists()


def test_missing_data_names_the_file_and_the_command(project):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl", "absent.jsonl"]))


def test_a_foreign_final_is_never_overwritten(project):
    foreign = Path("runs/r/sft/final")
    foreign.mkdir(parents=True)
    (foreign / "other.txt").write_text("other")
    with pytest.raises(StageError, match=r"no DONE\.json"):
        StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])).is_finished()
    assert (foreign / "other.txt").read_text() == "other"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.bin", "below/more.bin"])
@pytest.mark.parametrize("spoil", [flip, lambda file: os.truncate(file, 3), Path.unlink], ids=["flip", "cut", "unlink"])
def test_verify_finds_a_spoilt_file(project, name, spoil):
    final = finished("sft", SFT, {})
    assert verify_files(final) == read_done(final)
    spoil(final / name)
    with pytest.raises(StageError, match=name):
        verify_files(final)


def test_runs_may_move(project, monkeypatch):
    """Parents are written relative to final/, and a model in it loads from another place and another folder."""
    base, _ = chain()
    tiny = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    shutil.rmtree("runs/r/sft")
    with StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl"])) as run:
        final = run.finish(LlamaForCausalLM(tiny).save_pretrained, {})
    Path("elsewhere").mkdir()
    moved = Path("runs").rename("elsewhere/kept").resolve() / "r" / "sft" / "final"
    monkeypatch.chdir("/")
    assert AutoModelForCausalLM.from_pretrained(moved).config.hidden_size == 8
    done = verify_files(moved)
    parent = moved / done["parents"]["base"]["path"]
    assert parent.resolve() == moved.parent.parent / "pretrain" / "final"
    assert read_done(parent)["fingerprint"] == done["base"]["base"]
    assert not (project / final).exists()


def sft_from(base, data="train.jsonl"):
    return StageRun("sft", config(SFT), {"base": Path(base)}, hash_sources([data]))


def test_a_parent_may_be_any_model_and_is_identified_by_content(project):
    tiny = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(tiny).save_pretrained("models/tiny")
    first = sft_from("models/tiny").identity
    shutil.copytree("models/tiny", "elsewhere")
    assert sft_from("elsewhere").identity == first
    (project / "elsewhere/model.safetensors").write_bytes(b"other")
    assert sft_from("elsewhere").identity != first


@pytest.mark.parametrize(
    ("parent", "says"),
    [
        ("org/name", r"org/name: no such folder, and the hub does not give a model of that name"),
        ("nowhere", r"nowhere: not there: a stage's final/ is needed"),
        ("runs/r/pretrain/final", r"final: not there: run pretrain first, for example `make pretrain`"),
        ("empty", r"empty: not finished \(no DONE\.json there\)"),
    ],
)
def test_a_parent_that_is_not_there_is_named(project, parent, says):
    Path("empty").mkdir()
    with pytest.raises(StageError, match=says):
        sft_from(parent)


def test_a_hub_model_is_identified_by_its_commit(project, monkeypatch):
    class Api:
        def model_info(self, name):
            return type("Info", (), {"sha": f"commit of {name}"})

    monkeypatch.setattr("pipeline.runtime.provenance.HfApi", Api)
    run = sft_from("org/name")
    assert run.identity["parents"] == {"base": "commit of org/name"}
    assert run.parents["base"]["path"] == "org/name"


def test_data_of_several_sources_belong_to_what_a_stage_is(project):
    base, _ = chain()
    shutil.copy("train.jsonl", "copy.jsonl")
    one, same, other = (
        sft_from(base, data).identity for data in ("train.jsonl", "copy.jsonl", "train.jsonl,copy.jsonl")
    )
    assert one == same
    assert one != other


def of_size(free: int):
    return lambda _: shutil._ntuple_diskusage(2**40, 2**40, free)


def test_a_full_disk_is_found_before_training(project, monkeypatch):
    base, _ = chain()
    shutil.rmtree("runs/r/sft")
    monkeypatch.setattr(shutil, "disk_usage", of_size(10 * 2**20))
    before = snapshot(project)
    with (
        pytest.raises(StageError, match=r"runs/r/sft: the disk has 10 MiB free, sft needs about 50: make room"),
        sft_from(base),
    ):
        pass
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("written", "there", "needed"),
    [
        (0, 0, 50 + 70),  # final/ alone
        (1, 0, 50 + 30 + 70),  # a checkpoint, and final/ beside it
        (9, 0, 50 + 60 + 70),  # two are kept
        (9, 5, 50 + 60 + 70 - 5),  # of a run that is gone on from
    ],
)
def test_space_is_wanted_for_what_a_run_holds_at_its_fullest(written, there, needed, project, monkeypatch):
    size = 2**20
    with sft_from(finished("pretrain", SFT, {})) as run:
        if there:
            run.checkpoints.mkdir()
            (run.checkpoints / "weights").write_bytes(bytes(there * size))
        monkeypatch.setattr(shutil, "disk_usage", of_size(needed * size))
        run.check_disk(30 * size, written, 70 * size)
        monkeypatch.setattr(shutil, "disk_usage", of_size(needed * size - 1))
        with pytest.raises(StageError, match=rf"sft needs about {needed} \(.* checkpoints of 30, or .* final/ of 70\)"):
            run.check_disk(30 * size, written, 70 * size)


FULL = {
    "python": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch's writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "torch's checkpoints": CheckpointException("save", {0: (OSError(errno.ENOSPC, "No space left on device"), None)}),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("what", ["final", "checkpoint"])
def test_a_disk_that_is_full_in_the_middle_is_one_sentence_and_nothing_is_lost(project, what, error):
    def half(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        raise error

    def start():
        return StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"]))

    def train(run):
        with run:
            run.log(1, {"loss": 2.0})
            run.save_checkpoint(1, lambda folder: (folder / "w").write_text("whole"), {"at": 1})
            run.finish(half, {}) if what == "final" else run.save_checkpoint(2, half, {})

    run = start()
    with pytest.raises(StageError, match=r"^runs/r/sft: no space left on its disk; .*: make room"):
        train(run)
    assert sorted(path.name for path in run.folder.iterdir() if path.name[0] != ".") == [
        "checkpoints", "config.yaml", "metrics.jsonl", "run.json"
    ]  # fmt: skip
    assert [path.name for path in run.checkpoints.iterdir()] == ["1"]
    with start() as again:
        assert again.resume_from.facts["state"] == {"at": 1}


# parents and outputs are whole


@pytest.mark.parametrize("name", ["model.bin", "below/more.bin", "DONE.json"])
@pytest.mark.parametrize("spoil", [flip, lambda file: os.truncate(file, 3)], ids=["flip", "cut"])
def test_a_damaged_parent_or_output_is_named(project, name, spoil):
    base, final = chain()
    for spoilt, stage in ((final, "sft"), (base, "pretrain")):
        spoil(spoilt / name)
        way = f"move {spoilt.parent} away and run {stage} again"
        with pytest.raises(StageError, match=rf"^{spoilt / name}: (missing or )?not as it was written.*{way}$"):
            StageRun(
                "sft", config(SFT), {"base": base}, hash_sources(["train.jsonl", "validation.jsonl"])
            ).is_finished()


def test_a_file_is_read_again_only_where_it_has_changed(project, monkeypatch):
    base, _ = chain()
    read = []
    monkeypatch.setattr(
        hashing, "hash_file", lambda path, whole=hashing.hash_file: read.append(path.name) or whole(path)
    )
    sft_from(base)
    assert "model.bin" not in read
    content, found = (base / "model.bin").read_bytes(), (base / "model.bin").stat()
    flip(base / "model.bin")
    os.utime(base / "model.bin", ns=(found.st_atime_ns, found.st_mtime_ns))  # the time of the inode has changed
    with pytest.raises(StageError, match=r"model\.bin"):
        sft_from(base)
    (base / "model.bin").write_bytes(content)
    sft_from(base)
    assert read.count("model.bin") == 2
    cache = base.parent / ".hashes.json"
    for spoil in (lambda: cache.write_text("[1"), lambda: (cache.unlink(), cache.mkdir())):  # then it is of no use
        spoil()
        sft_from(base)
    assert read.count("model.bin") == 4


# one run per folder


def test_a_second_run_is_refused_by_the_name_of_the_first_and_changes_nothing(project):
    with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])) as run:
        run.log(1, {"loss": 2.0})
        before = snapshot(project)
        holder = rf"process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with (
            pytest.raises(StageError, match=f"^runs/r/sft: {holder}, is running in it: wait until it has ended"),
            StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])),
        ):
            pass
        assert snapshot(project) == before
    with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])):  # the first has ended
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    hold = f"import fcntl; f = open('{tmp_path / '.lock'}', 'a+'); fcntl.flock(f, 2); f.write('pid 7,'); f.flush()"
    child = subprocess.Popen([sys.executable, "-c", f"{hold}; print(flush=True); input()"], stdin=-1, stdout=-1)
    child.stdout.readline()
    with pytest.raises(StageError, match="pid 7, is running in it"):
        lock_folder(tmp_path)
    child.kill()
    child.communicate()
    unlock(lock_folder(tmp_path))
    assert (tmp_path / ".lock").read_text() == ""


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert lock_folder(tmp_path) is None
    assert "warning: not locked (No locks available)" in capsys.readouterr().out


def test_a_stage_that_another_process_has_finished_meanwhile_is_left_alone(project):
    run = StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl", "validation.jsonl"]))
    assert not run.is_finished()
    final = finished("sft", SFT, {})
    before = snapshot(final)
    with pytest.raises(StageError, match="another process has just finished it: give the same command again"), run:
        pass
    assert snapshot(final) == before
    assert run.is_finished()


# what is left


def test_checkpoints_left_by_a_kill_are_removed_by_the_next_call(project):
    _, final = chain()
    left = final.parent / "checkpoints/100"
    left.mkdir(parents=True)
    (left / "weights.bin").write_text("large")
    base = final.parent.parent / "pretrain/final"
    assert StageRun("sft", config(SFT), {"base": base}, hash_sources(["train.jsonl", "validation.jsonl"])).is_finished()
    assert not left.parent.exists()


@pytest.mark.parametrize(("dial", "value"), [("micro_batch", "4"), ("gradient_checkpointing", "true")])
def test_how_the_work_is_cut_up_has_no_part_in_what_a_stage_is(project, dial, value):
    for kind in (SFT, PPO):
        assert identity(config(kind, f"--{dial}", value)) == identity(config(kind))
    finished("sft", SFT, {})
    run = StageRun("sft", config(SFT, f"--{dial}", value), {}, hash_sources(["train.jsonl", "validation.jsonl"]))
    assert run.is_finished()


def test_every_name_is_on_the_disk_before_done_is(project, monkeypatch):
    """Files, and the folders that hold their names: those of `final/` before it is renamed, and all above it."""
    synced, events = set(), []
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.readlink(f"/proc/self/fd/{number}")))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda old, new: events.append(set(synced)) or rename(old, new))
    final = finished("sft", SFT, {}).resolve()
    temporary = final.with_name("final.partial")
    names = ("model.bin", "below", "below/more.bin", "DONE.json", ".")
    assert {str((temporary / name).resolve()) for name in names} <= events[-1]
    assert {str(final.parent / name) for name in ("metrics.jsonl", "samples.jsonl")} <= events[-1]
    assert {str(folder) for folder in (project, project / "runs", project / "runs/r")} <= events[-1]
    assert str(final.parent) in synced


# weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_finished(project, dtype):
    def write(folder: Path) -> None:
        (folder / "below").mkdir()
        save_file({"good": torch.ones(2), "ids": torch.ones(2).int()}, folder / "a.safetensors")
        save_file({"spoilt": torch.tensor([1, torch.nan]).to(dtype)}, folder / "below/b.safetensors")

    with StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])) as run:
        with pytest.raises(FloatingPointError, match=r"sft: spoilt in below/b\.safetensors is not finite"):
            run.finish(write, {})
        assert not list(run.folder.glob("final*"))


# interruptions


def test_final_is_finished_before_a_stage_stops(project):
    def write(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        (folder / "model.bin").write_text("whole")

    before = signal.getsignal(signal.SIGTERM)
    run = StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"]))
    with pytest.raises(Interrupted, match="sft: stopped by SIGTERM once runs/r/sft/final was finished"), run:
        run.finish(write, {})
    assert verify_files(run.final)
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_models_are_loaded_a_signal_stops_at_once(project):
    with (
        pytest.raises(Interrupted, match="sft: stopped at once by Ctrl-C, while loading"),
        StageRun("sft", config(SFT), {}, hash_sources(["train.jsonl"])),
    ):
        os.kill(os.getpid(), signal.SIGINT)
