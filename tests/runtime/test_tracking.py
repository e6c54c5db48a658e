"""What reaches wandb and TensorBoard, read back from what they wrote; and that no tracker decides a run's result."""

import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tensorboardX.proto import event_pb2
from wandb.proto import wandb_internal_pb2

from pipeline.config.errors import UserError
from pipeline.config.parse import parse
from pipeline.config.stages import SFT, Merge
from pipeline.data.sources import hash_sources
from pipeline.runtime.finished import verify_files
from pipeline.runtime.stage_run import StageRun
from pipeline.runtime.tracking import PACKAGES, Tracking

ROOT = Path(__file__).resolve().parent.parent.parent

RUN = """
import torch
from safetensors.torch import save_file
from pipeline.config.parse import parse
from pipeline.config.stages import SFT, Pretrain
from pipeline.data.sources import hash_sources
from pipeline.runtime.stage_run import StageRun
dials = ["--config", "empty.yaml", "--recipe", "r", "--seed", "7", "--report_to", "wandb"]
def write(folder):
    save_file({"weights": torch.ones(2)}, folder / "model.safetensors")
with StageRun("pretrain", parse(Pretrain, dials), {}, hash_sources(["train.jsonl"])) as run:
    base = run.finish(write, {"loss": 3.0})
with StageRun("sft", parse(SFT, dials), {"base": base}, hash_sources(["train.jsonl"])) as run:
    for step in (1, 2):
        run.log(step, {"loss": 2.0 - step, "grad_norm": 0.5})
        run.log_samples([{"step": step, "prompt": "größe", "response": "a | b", "score": step / 2}], step)
    run.finish(write, {"loss": 0.25})
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("{}\n")
    Path("train.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    return tmp_path


def start(project, **env):
    """RUN in a process of its own, with no wandb setting but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    kept |= {"HOME": str(project), "NETRC": str(project / "none"), "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    return subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=project, env=kept | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def records(folder: Path) -> dict[str, list]:
    """The records of an offline run's one .wandb file (LevelDB's log format), by kind."""
    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, offset, whole = file.read_bytes(), 7, b""
    by_kind = defaultdict(list)
    while offset + 7 <= len(data):
        if (rest := 32768 - offset % 32768) < 7:
            offset += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, offset)
        whole += data[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            name = record.WhichOneof("record_type")
            by_kind[name].append(getattr(record, name))
            whole = b""
    return by_kind


def values(items) -> dict:
    """A history record's values; a table is several items of one name."""
    result: dict = {}
    for item in items:
        name, *field = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if field:
            result.setdefault(name, {})[field[0]] = value
        else:
            result[name] = value
    return result


def test_an_offline_run_holds_names_config_tables_and_linked_artifacts(project):
    done = start(project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb: offline; upload with `wandb sync ") == 2
    base, sft = records(project / "runs/r/pretrain"), records(project / "runs/r/sft")

    [run] = sft["run"]
    assert (run.project, run.run_group, run.job_type) == ("rlhf-pipeline", "r", "sft")
    assert run.display_name.startswith("r-sft-seed7-")
    config = {item.key: json.loads(item.value_json) for part in sft["config"] for item in part.update}
    config |= {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["seed"], config["recipe"], config["label_smoothing"]) == (7, "r", 0.0)

    history = [values(row.item) for row in sft["history"]]
    metrics = [row["sft/loss"] for row in history if "sft/loss" in row]
    assert metrics == [1.0, 0.0]
    assert {name for row in history for name in row if not name.startswith("_")} == {
        "sft/loss",
        "sft/grad_norm",
        "sft/samples",
    }
    tables = [row["sft/samples"] for row in history if "sft/samples" in row]
    assert len(tables) == 2
    [folder] = (project / "runs/r/sft/wandb").glob("offline-run-*")
    table = json.loads((folder / "files" / tables[1]["path"]).read_text())
    assert table == {"columns": ["step", "prompt", "response", "score"], "data": [[2, "größe", "a | b", 1.0]]} | {
        name: value for name, value in table.items() if name not in ("columns", "data")
    }
    summary = {item.key: item.value_json for part in sft["summary"] for item in part.update}
    assert summary["sft/loss"] == "0.25"

    prints = {stage: verify_files(project / "runs/r" / stage / "final")["fingerprint"] for stage in ("pretrain", "sft")}
    [artifact] = [entry for entry in base["artifact"] if entry.type == "model"]
    assert (artifact.name, json.loads(artifact.metadata)["fingerprint"]) == ("r-pretrain", prints["pretrain"])
    [artifact] = [entry for entry in sft["artifact"] if entry.type == "model"]
    assert (artifact.name, set(artifact.aliases)) == ("r-sft", {"latest", prints["sft"][:12]})
    assert json.loads(artifact.metadata) == {
        "fingerprint": prints["sft"], "made_from": {"base": f"r-pretrain:{prints['pretrain'][:12]}"},
    }  # fmt: skip
    [weights] = [entry for entry in artifact.manifest.contents if entry.path == "model.safetensors"]
    assert weights.ref.endswith("runs/r/sft/final/model.safetensors")


def test_with_wandb_unreachable_the_result_is_the_same_with_one_warning(project):
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = start(project, **key)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb: warning: logged offline, since") == 2  # one per stage
    assert "Traceback" not in done.stderr
    content = {f.name: f.read_bytes() for f in (project / "runs/r/sft/final").iterdir() if f.name != "DONE.json"}
    assert content == {"model.safetensors": save({"weights": torch.ones(2)})}
    assert records(project / "runs/r/sft")["history"]
    fingerprint = verify_files(project / "runs/r/sft/final")["fingerprint"]
    (project / "runs").rename(project / "first")
    assert start(project).returncode == 0
    assert verify_files(project / "runs/r/sft/final")["fingerprint"] == fingerprint


@pytest.mark.parametrize("mode", ["offline", None], ids=["WANDB_MODE=offline", "no key, no mode"])
def test_wandb_runs_offline_without_asking(project, mode):
    """Without a key and without a terminal: the run finishes, and says how to upload it later."""
    script = """
from pathlib import Path
from pipeline.config.parse import parse
from pipeline.config.stages import Merge
from pipeline.data.sources import hash_sources
from pipeline.runtime.stage_run import StageRun
config = parse(Merge, ["--config", "empty.yaml", "--report_to", "wandb"])
with StageRun("merge", config, {}, hash_sources(["train.jsonl"])) as run:
    run.log(1, {"loss": 2.0})
    run.finish(lambda folder: (folder / "a.txt").write_text("a"), {"loss": 2.0})
"""
    dropped = ("WANDB_API_KEY", "WANDB_MODE")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"HOME": str(project), "NETRC": str(project / "no-netrc"), "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    env |= {"WANDB_MODE": mode} if mode else {}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = done.stdout.split("`wandb sync ")[1].split("`")[0]
    assert list((project / command).glob("run-*.wandb"))
    assert verify_files(project / "runs/imdb/merge/final")["metrics"] == {"loss": 2.0}
    assert "wandb" in {path.name for path in (project / "runs/imdb/merge").iterdir()}


def events(folder: Path) -> list:
    """The values of TensorBoard's event files: each record is its length, a checksum, the data, a checksum."""
    result = []
    for file in sorted(folder.rglob("events.*")):
        data, offset = file.read_bytes(), 0
        while offset < len(data):
            [size] = struct.unpack_from("<Q", data, offset)
            event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + size])
            result += [(event.step, value) for value in event.summary.value]
            offset += size + 16
    return result


def test_tensorboard_gets_metrics_config_and_samples(project):
    dials = ["--config", "empty.yaml", "--recipe", "r", "--report_to", "tensorboard"]
    with StageRun("merge", parse(Merge, dials), {}, hash_sources(["train.jsonl"])) as run:
        run.log(1, {"loss": 2.0})
        run.log(2, {"loss": 1.0})
        run.log_samples([{"prompt": "a", "response": "b | c\nd"}], 2)
        run.finish(lambda folder: (folder / "a.txt").write_text("a"), {"loss": 1.0})
    logged = events(project / "runs/r/merge/tensorboard")
    assert [(step, value.simple_value) for step, value in logged if value.tag == "merge/loss"] == [(1, 2.0), (2, 1.0)]
    [table] = [value.tensor.string_val[0] for _, value in logged if value.tag.startswith("merge/samples")]
    assert table.decode().splitlines() == ["| prompt | response |", "| --- | --- |", "| a | b \\| c d |"]
    assert any("hparams" in value.tag for _, value in logged)


def test_a_missing_package_is_named_before_anything_is_written(project, monkeypatch):
    monkeypatch.setitem(PACKAGES, "trackio", ("no_such_package",))
    with pytest.raises(UserError, match="report_to trackio needs a package: `pip install no_such_package`"):
        Tracking("trackio", "sft", "r", 0, project, {}, "1")


def test_none_does_nothing(project):
    tracking = Tracking("none", "sft", "r", 0, project, vars(parse(SFT, ["--config", "empty.yaml"]).run), "1")
    tracking.log({"loss": 1.0}, 1)
    tracking.log_table([{"a": 1}], 1)
    tracking.log_model({}, project, "", {})
    tracking.close(failed=True)
    assert {path.name for path in project.iterdir()} == {"empty.yaml", "train.jsonl"}


def test_a_stage_that_goes_on_is_the_same_run_in_wandb(project):
    done = subprocess.run(
        [sys.executable, "-c", """
from pathlib import Path
from pipeline.config.parse import parse
from pipeline.config.stages import Pretrain
from pipeline.data.sources import hash_sources
from pipeline.runtime.stage_run import StageRun
config = parse(Pretrain, ["--config", "empty.yaml", "--recipe", "r"])
for step in (1, 2):
    run = StageRun("pretrain", config, {}, hash_sources(["train.jsonl"]))
    try:
        with run:
            print("run id", run._tracking.tracker.run.id, run.resume_from and run.resume_from.step)
            run.save_checkpoint(step, lambda folder: (folder / "weights").write_text("w"), {})
            raise KeyError
    except KeyError:
        pass
"""],
        cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    first, second = [line.split() for line in done.stdout.splitlines() if line.startswith("run id")]
    assert first[2] == second[2]
    assert (first[3], second[3]) == ("None", "1")
