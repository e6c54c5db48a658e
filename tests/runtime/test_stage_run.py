"""A stage's output appears whole or not at all, is identified by content, and is never silently reused or replaced."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.config.parse import parse
from pipeline.config.stages import SFT
from pipeline.data.sources import DataError, hash_sources
from pipeline.runtime.finished import StageError, read_done, verify_files
from pipeline.runtime.hashing import hash_value
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
        "config.yaml", "final", "metrics.jsonl", "run.json", "samples.jsonl"
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


def test_a_full_disk_is_found_before_training(project, monkeypatch):
    base, _ = chain()
    shutil.rmtree("runs/r/sft")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 10 * 2**20))
    before = snapshot(project)
    with (
        pytest.raises(StageError, match=r"runs/r/sft: the disk has 10 MiB free, sft needs about 50: make room"),
        sft_from(base),
    ):
        pass
    assert snapshot(project) == before
