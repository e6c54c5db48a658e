"""The smoke recipe from raw text to the page, as a user runs it; and SFT and PPO once more on two CPU processes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from warm import run

from pipeline import evaluate, merge, ppo, pretrain, reward, sft
from pipeline.config.parse import Config, flat, parse
from pipeline.config.stages import PPO, SFT
from pipeline.runtime.finished import read_done, verify_files
from pipeline.runtime.process import run_stage

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "merge": merge, "evaluate": evaluate}
KINDS = {kind.__name__.lower(): kind for kind in Config.__constraints__}
PROMPT = "Just saw this with my"
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    # What starts several processes is called multi_gpu; where no GPU is visible they are CPU processes joined by gloo.
    *("--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"),
)

pytestmark = pytest.mark.skipif(not (ROOT / "data/imdb/SOURCES.json").is_file(), reason="run make data")


@dataclass(frozen=True)
class Chain:
    runs: Path
    printed: dict[str, str]

    def final(self, stage: str) -> Path:
        return self.runs / "smoke" / stage / "final"

    def metrics(self, stage: str) -> list[dict[str, float]]:
        file = self.final(stage).parent / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the command leaves; run from the project's folder with one thread and nobody at the terminal."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def dials(stage: str, runs: Path, *more: str) -> list[str]:
    return ["--config", str(ROOT / f"configs/smoke/{stage}.yaml"), "--runs", str(runs), *more]


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """All stages, each its own process, in a folder that is then moved."""
    folder = tmp_path_factory.mktemp("chain")

    def printed(stage: str) -> str:
        more = ["--prompt", PROMPT] if stage == "chat" else []
        start = python if stage in ("pretrain", "chat") else run  # the others without the seconds of their imports
        done = start(f"stages/{stage}.py", *dials(stage, folder / "first", *more))
        assert done.returncode == 0, f"{stage}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    texts = {stage: printed(stage) for stage in ("pretrain", "sft", "reward", "ppo", "merge", "evaluate", "chat")}
    return Chain((folder / "first").rename(folder / "moved"), texts)


@pytest.fixture(autouse=True)
def project_folder(monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipes name data/imdb from there


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(file): (sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@torch.no_grad()
def logits(folder: Path, text: str = PROMPT) -> torch.Tensor:
    """What stock transformers computes from a folder alone."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", return_token_type_ids=False)).logits


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_finished_and_whole(chain, stage):
    done = verify_files(chain.final(stage))
    assert done["stage"] == stage
    assert {path.name for path in chain.final(stage).parent.iterdir()} >= {"config.yaml", "run.json", "final"}
    assert not (chain.final(stage).parent / "attempts").exists()
    for name, parent in done["parents"].items():  # relative: they stand where the moved folder stands
        folder = (chain.final(stage) / parent["path"]).resolve()
        assert folder.is_relative_to(chain.runs)
        assert read_done(folder)["fingerprint"] == done["base"][name]
    assert json.loads((chain.final(stage).parent / "run.json").read_text())["processes"] == 1


def test_stock_transformers_loads_every_policy_from_another_folder(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, tuned, aligned, merged = (logits(chain.final(stage)) for stage in ("pretrain", "sft", "ppo", "merge"))
    size = merged.abs().max()
    assert (aligned - merged).abs().max() < 1e-5 * size
    assert (tuned - base).abs().max() > 1e-3 * size
    assert (merged - tuned).abs().max() > 1e-4 * size  # PPO moved it


def test_stock_transformers_loads_reward_model_and_critic_with_their_heads(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (chain.final("reward"), chain.final("ppo") / "critic"):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.num_labels == 1
    assert read_done(chain.final("reward"))["metrics"]["score_shift"] == pytest.approx(
        AutoModelForSequenceClassification.from_pretrained(chain.final("reward")).config.score_shift
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_skips_and_leaves_every_file_untouched(chain, stage, capsys):
    before = snapshot(chain.runs)
    assert STAGES[stage].train(parse(KINDS[stage], dials(stage, chain.runs))) == chain.final(stage)
    assert f"{stage}: finished already, skipped" in capsys.readouterr().out
    assert snapshot(chain.runs) == before


@pytest.mark.parametrize(
    ("stage", "dial", "value"),
    [
        ("pretrain", "num_hidden_layers", "3"),
        ("sft", "label_smoothing", "0.2"),
        ("reward", "centre_prompts", "8"),
        ("ppo", "cliprange", "0.3"),
        ("merge", "seed", "1"),
        ("evaluate", "prompts", "30"),
    ],
)
def test_a_changed_dial_is_refused_by_name(chain, stage, dial, value):
    before = snapshot(chain.runs)
    with pytest.raises(SystemExit) as stopped:
        run_stage(STAGES[stage].train, parse(KINDS[stage], dials(stage, chain.runs, f"--{dial}", value)))
    assert stopped.value.code.startswith(f"error: {chain.final(stage)} was made from other inputs ({dial}: ")
    assert snapshot(chain.runs) == before


def test_a_refusal_ends_the_command_with_status_1(chain):
    done = python("stages/merge.py", *dials("merge", chain.runs, "--seed", "1"))
    assert done.returncode == 1
    assert "seed: 0 then, 1 now" in done.stderr
    assert "Traceback" not in done.stderr


def identities(rows: list[dict[str, float]], warmup: int, one_minibatch: bool) -> None:
    """What must hold of PPO's first lines whatever was learnt (vf_coef 0.5, entropy_coef 0)."""
    trained = [row for row in rows if "loss" in row]
    assert [row["eval_kl"] for row in rows if "eval_kl" in row and row["step"] <= warmup] == [0.0]
    for row in trained[: warmup + 1]:  # nothing has moved the policy before these rollouts
        assert (row["kl"], row["kl_per_token"], row["kl_k3_per_token"]) == (0.0, 0.0, 0.0)
    for row in trained[:warmup]:  # and nothing moves it in these updates
        assert (row["ratio"], row["approx_kl"], row["clip_fraction"]) == (1.0, 0.0, 0.0)
        assert row["loss"] == pytest.approx(0.5 * row["value_loss"], rel=1e-5)
        if one_minibatch:  # whitened advantages have mean 0
            assert row["policy_loss"] == pytest.approx(0.0, abs=1e-6)
    for row in trained[warmup:]:
        assert row["loss"] == pytest.approx(row["policy_loss"] + 0.5 * row["value_loss"], rel=1e-4)
    assert trained[-1]["kl"] != 0.0
    for row in trained:
        assert row["kl"] == pytest.approx(row["kl_per_token"] * row["length"], rel=1e-4, abs=1e-7)


def test_ppo_starts_from_its_reference(chain):
    rows = chain.metrics("ppo")
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval_score" in row] == [0, 2, 4]
    identities(rows, warmup=1, one_minibatch=False)


def test_pretraining_learns_and_reports_it(chain):
    rows = chain.metrics("pretrain")
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} == set(rows[0])
    assert rows[-1]["loss"] < rows[0]["loss"]
    metrics = read_done(chain.final("sft"))["metrics"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]


def test_the_page_compares_base_sft_and_ppo(chain):
    header = next(line for line in chain.printed["evaluate"].splitlines() if "measure" in line)
    assert re.findall(r"\b(base|SFT|PPO)\b", header)[:3] == ["base", "SFT", "PPO"]
    assert "40 held-out prompts" in chain.printed["evaluate"]
    page = (chain.final("evaluate") / "evaluation.md").read_text(encoding="utf-8")
    assert "| measure | base | SFT | PPO | PPO - SFT [95 % CI] |" in page
    report = json.loads((chain.final("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert report["policies"]["sft"]["kl"]["value"] == 0.0
    assert report["policies"]["ppo"]["kl"]["value"] != 0.0
    samples = (chain.final("evaluate").parent / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {tuple(json.loads(line)) for line in samples} == {
        ("prompt", "base", "sft", "ppo", "base_score", "sft_score", "ppo_score")
    }
    assert len(samples) == 40


def test_chat_answers_with_every_policy(chain):
    answers = re.findall(r"^ *(base|sft|ppo): (.*)$", chain.printed["chat"], re.MULTILINE)
    assert [name for name, _ in answers] == ["base", "sft", "ppo"]
    assert all(answer.startswith(PROMPT) and len(answer) > len(PROMPT) for _, answer in answers)


# two processes


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory) -> Path:
    """176 short rows: 11 whole batches of 16, so one process and two see the same batches."""
    rows = (ROOT / "data/imdb/sft/train.jsonl").read_text(encoding="utf-8").splitlines()
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    file.write_text("\n".join([row for row in rows if len(row.encode()) < 130][:176]) + "\n", encoding="utf-8")
    return file


def two_dials(stage: str, chain: Chain, runs: Path, *more: str) -> list[str]:
    own = {
        "sft": ("--base", str(chain.final("pretrain")), "--batch_size", "16"),
        "ppo": ("--sft", str(chain.final("sft")), "--reward", str(chain.final("reward")), "--num_mini_batches", "1"),
    }
    return dials(stage, runs, *own[stage], *more)


@pytest.fixture(scope="session")
def two(chain, short_rows, tmp_path_factory) -> Chain:
    """SFT and PPO on two CPU processes, on the chain's own base, SFT policy and reward model."""
    runs = tmp_path_factory.mktemp("two")
    printed = {}
    for stage, more in (("sft", ["--train_file", str(short_rows), "--micro_batch", "8"]), ("ppo", [])):
        command = [*LAUNCH, f"stages/{stage}.py", *two_dials(stage, chain, runs, *more)]
        done = python(*command, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, f"{stage}:\n{done.stdout}\n{done.stderr[-4000:]}"
        printed[stage] = done.stdout
    return Chain(runs, printed)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_processes_are_used_and_one_writes(two, stage):
    verify_files(two.final(stage))
    folder = two.final(stage).parent
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert not (folder / "attempts").exists()  # the second process would put the first one's files aside
    assert two.printed[stage].count(f"{stage}: {folder}") == 1
    assert two.printed[stage].count(f"{stage}: done") == 1
    kinds = [(row["step"], tuple(sorted(row))) for row in two.metrics(stage)]
    assert len(kinds) == len(set(kinds))


def test_ppo_on_two_processes_starts_from_its_reference(two):
    rows = two.metrics("ppo")
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3]
    identities(rows, warmup=1, one_minibatch=True)


def test_sft_is_the_same_mathematics_on_one_process_and_on_two(chain, two, short_rows, tmp_path):
    one = Chain(tmp_path, {})
    more = ("--train_file", str(short_rows), "--micro_batch", "16")
    sft.train(parse(SFT, two_dials("sft", chain, tmp_path, *more)))
    alone, together = (load_file(run.final("sft") / "model.safetensors") for run in (one, two))
    start = load_file(chain.final("pretrain") / "model.safetensors")
    for name, weight in alone.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 1e-4
        assert (together[name] - weight).abs().max() < 1e-2 * moved
    assert [row["step"] for row in two.metrics("sft")] == [1, 10]
    assert two.metrics("sft")[-1]["loss"] == pytest.approx(one.metrics("sft")[-1]["loss"], rel=1e-4)
    assert two.metrics("sft")[-1]["tokens"] == one.metrics("sft")[-1]["tokens"]


def test_how_many_processes_made_it_does_not_enter_what_a_stage_is(chain, two, capsys):
    before = snapshot(two.runs)
    assert ppo.train(parse(PPO, two_dials("ppo", chain, two.runs))) == two.final("ppo")
    assert "ppo: finished already, skipped" in capsys.readouterr().out
    assert snapshot(two.runs) == before


# docs/serving.md, run as it is written


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def served(chain, tmp_path, monkeypatch):
    """A folder in which runs/imdb is the smoke recipe's."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/imdb").symlink_to(chain.runs / "smoke")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_transformers_continues_a_text(served, capsys):
    names: dict = {}
    exec(BLOCKS[0], names)
    assert capsys.readouterr().out.startswith("I watched this with my sister and")
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    config = names["model"].generation_config
    assert (config.do_sample, config.top_k, config.top_p, config.temperature) == (True, 0, 1.0, 1.0)


def test_the_adapter_on_sft_is_the_merged_model(served):
    names: dict = {}
    exec(BLOCKS[1], names)
    merged = AutoModelForCausalLM.from_pretrained("runs/imdb/merge/final")
    both = AutoModelForCausalLM.from_pretrained("runs/imdb/ppo/final")
    ids = AutoTokenizer.from_pretrained("runs/imdb/merge/final")("Just saw this", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = merged(ids).logits
        for model in (names["policy"], both):
            torch.testing.assert_close(model.eval()(ids).logits, expected, atol=1e-5 * expected.abs().max(), rtol=0)


def test_there_is_no_other_block():
    assert len(BLOCKS) == 2


# what a user may get wrong: one sentence, nothing harmed


def damaged_stage(chain, folder: Path) -> str:
    shutil.copytree(chain.final("pretrain"), folder / "broken")
    (folder / "broken/model.safetensors").write_bytes(b"not weights")
    return f"--base={folder}/broken"


def broken_model(chain, folder: Path) -> str:
    """One's own: no stage has listed its files."""
    dials = damaged_stage(chain, folder)
    (folder / "broken/DONE.json").unlink()
    return dials


def other_tokenizer(chain, folder: Path) -> str:
    shutil.copytree(chain.final("pretrain"), folder / "other", ignore=shutil.ignore_patterns("DONE.json"))
    file = folder / "other/tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"--base={folder}/other"


def rows(name: str, content: bytes):
    def write(chain, folder: Path) -> str:
        (folder / name).write_bytes(content)
        return f"--train_file={folder / name}"

    return write


def given(*dials: str):
    return lambda chain, folder: " ".join(dials)


PAIR, TURNED = b'{"chosen": "a", "rejected": "b"}\n', b'{"chosen": "b", "rejected": "a"}\n'
GOOD = b'{"prompt": "a", "completion": " b"}\n'


@pytest.mark.parametrize(
    ("stage", "mistake", "says"),
    [
        ("sft", rows("a.jsonl", GOOD + b'{"prompt": "a"}\n'), r"a\.jsonl: row 2: completion: no such field"),
        ("sft", rows("a.csv", b"prompt,completion\na,b\nc\n"), r"a\.csv: row 2: expected 2 cells"),
        ("sft", rows("a.jsonl", GOOD + b"\xff\n"), r"a\.jsonl: line 2: not UTF-8"),
        ("sft", rows("a.jsonl", b""), r"a\.jsonl: no rows"),
        ("sft", rows("a.txt", GOOD), r"a\.txt: expected a \.jsonl"),
        ("sft", rows("a.jsonl", GOOD.replace(b"b", b"b? " * 999)), "every row is longer than max_length"),
        ("sft", given("--too_long=error", "--max_length=20"), "usable row 1 has .*--too_long drop or cut"),
        ("sft", given("--train_file=absent.jsonl"), r"absent\.jsonl: no such file"),
        ("sft", given("--train_file=org/name"), "as a hub dataset: the hub is switched off"),
        ("sft", given("--base=org/name"), "org/name: no such folder, and the hub does not give a model"),
        ("sft", damaged_stage, r"broken/model\.safetensors: missing or not as it was written .*run pretrain again"),
        ("sft", broken_model, "broken: no model can be loaded from it"),
        ("reward", other_tokenizer, "tokenizers differ: sft [0-9a-f]{12} .*, base [0-9a-f]{12}"),
        ("reward", given("--max_new_tokens=2000"), "its context is 128 tokens, sampled texts may have 2064"),
        ("reward", rows("a.jsonl", PAIR + TURNED), "row 2: chosen: contradicts"),
        ("ppo", given("--reward=nowhere/reward/final"), "nowhere/reward/final: not there: run reward first"),
        ("ppo", given("--rollout_batch=500000"), "rollout_batch is 500000, but there are [0-9]+ prompts"),
        ("evaluate", given("--long_prompts=error", "--max_prompt_tokens=3"), "prompts are longer than 3 tokens: raise"),
        ("sft", given("--report_to=trackio"), "report_to trackio needs a package"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_harms_nothing(chain, stage, mistake, says, tmp_path, monkeypatch):
    if "trackio" in says and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    parents = {"base": "pretrain", "sft": "sft", "reward": "reward", "policy": "merge"}
    known = {dial: chain.final(parents[dial]) for dial in parents if dial in flat(KINDS[stage]())}
    before = snapshot(chain.runs)
    more = [f"--{dial}={place}" for dial, place in known.items()] + mistake(chain, tmp_path).split()
    with pytest.raises(SystemExit, match="^error: .*" + says) as stopped:
        run_stage(STAGES[stage].train, parse(KINDS[stage], dials(stage, tmp_path / "runs", *more)))
    assert len(stopped.value.code) < 600
    assert not list(tmp_path.glob("runs/smoke/*/final*"))
    assert snapshot(chain.runs) == before


def test_a_wrong_dial_is_answered_at_once(tmp_path):
    """Less than 3 seconds on a busy machine, since nothing heavy is imported before the config is read."""
    started = time.monotonic()
    done = python("stages/ppo.py", "--kl_coeff", "0.1")
    assert time.monotonic() - started < 3
    assert (done.returncode, done.stderr) == (2, "error: unknown dial 'kl_coeff'; did you mean 'kl_coef'?\n")
