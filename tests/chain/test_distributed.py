"""Two processes by `accelerate launch` with each file of configs/accelerate, against one process: the same mathematics.

Every launch runs tests/ranks.py: one PPO update on given rollouts, and every stage, full and with an adapter.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from ranks import FIXED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.runtime.finished import verify_files

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
FINALS = (
    "tiny/pretrain", "tiny/sft", "tiny_lora/sft", "tiny/reward", "tiny_lora/reward", "tiny/ppo", "tiny_full/ppo",
    "tiny_roles/ppo",
)  # fmt: skip
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def launch(
    backend: str, *command: str, launch_with: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on two CPU processes; FSDP is told that they are GPU's, which only a test may do."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0",
         "--config_file", f"configs/accelerate/{backend}.yaml", *launch_with, *command],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(folder) -> Path:
    done = subprocess.run(
        [sys.executable, "tests/ranks.py", str(folder), "one"],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one"


def all_stages(backend: str, folder: Path) -> Path:
    """What tests/ranks.py leaves under a backend; it is launched once."""
    if not (folder / backend).exists():
        wrapper = ["tests/fsdp_on_cpu.py"] if backend == "fsdp2" else []
        done = launch(backend, *wrapper, "tests/ranks.py", str(folder), backend)
        assert done.returncode == 0, done.stderr[-6000:]
        assert sorted(re.findall(r"rank (\d): all done", done.stdout)) == ["0", "1"]
    return folder / backend


@pytest.fixture(scope="module", params=BACKENDS)
def two(request, folder) -> Path:
    return all_stages(request.param, folder)


@pytest.fixture(scope="module")
def ddp(folder) -> Path:
    return all_stages("ddp", folder)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines]


def weights(final: Path) -> dict[str, torch.Tensor]:
    return {
        str(f.relative_to(final)) + k: w for f in sorted(final.rglob("*.safetensors")) for k, w in load_file(f).items()
    }


def moved(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> float:
    return max((end[name] - start[name]).abs().max().item() for name in end if name in start)


@pytest.mark.parametrize("kind", FIXED)
def test_a_ppo_update_on_given_rollouts_is_that_of_one_process(kind, one, two):
    """Statistics, whitening, losses, gradients and weights: global, and equal to rounding."""
    ours, theirs = (json.loads((run / f"{kind}.json").read_text()) for run in (one, two))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    alone, together = (load_file(run / f"{kind}.safetensors") for run in (one, two))
    assert alone.keys() == together.keys()
    step = 3 * 3e-3  # Adam moves a weight by at most about the learning rate in each of three steps
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() < 1e-3 * step, name
    assert ours["grad_norm"] > 1e-2


def test_four_roles_learn_the_same_when_activations_are_computed_again(one, two):
    for run in (one, two):
        kept, again = (load_file(run / f"{kind}.safetensors") for kind in ("fixed_roles", "fixed_roles_again"))
        assert kept.keys() == again.keys()
        assert all((again[name] - weight).abs().max() < 1e-5 for name, weight in kept.items())


@pytest.mark.parametrize("stage", ["tiny/pretrain", "tiny/sft", "tiny_lora/sft", "tiny/reward", "tiny_lora/reward"])
def test_a_trainers_stage_is_the_same_mathematics_on_one_process_and_on_two(stage, one, two, folder):
    alone, together = (weights(run / stage / "final") for run in (one, two))
    assert alone.keys() == together.keys()
    adapter = [weight.abs().max().item() for name, weight in alone.items() if "lora_B" in name]  # zero at the start
    assert max(adapter or [moved(weights(folder / "parents/pretrain/final"), alone)]) > 1e-3
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() < 1e-2 * 1e-2, name  # a hundredth of a step
    rows = [metrics(run / stage) for run in (one, two)]
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("stage", FINALS)
def test_what_is_written_is_whole_and_loads_on_one_process(stage, two):
    final = two / stage / "final"
    verify_files(final)
    kind = AutoModelForSequenceClassification if "reward" in stage else AutoModelForCausalLM
    model, info = kind.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(p.numel() and p.isfinite().all() for p in model.parameters())
    if "ppo" in stage:
        critic, info = AutoModelForSequenceClassification.from_pretrained(final / "critic", output_loading_info=True)
        assert not info["missing_keys"]
        assert critic.score.weight.abs().sum() > 0
    assert json.loads((final.parent / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("recipe", ["tiny", "tiny_full", "tiny_roles"])
def test_ppo_is_the_same_under_every_strategy(recipe, two, ddp):
    """A run over sampling, updates and evaluations, to rounding: 1e-6 under ZeRO-1 and ZeRO-2, else 1e-5.

    Not to the bit: DeepSpeed lays all weights end to end, where other alignments round differently, and sums the
    norm by which gradients are clipped (in `tiny_full`) in another order.
    """
    if two.name == "ddp":
        assert [row["step"] for row in metrics(two / recipe / "ppo") if "ratio" in row] == [0, 1, 2]
        return
    ours, theirs = (weights(run / recipe / "ppo/final") for run in (ddp, two))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < (1e-6 if two.name in ("zero1", "zero2") else 1e-5), name
    for first, second in zip(metrics(ddp / recipe / "ppo"), metrics(two / recipe / "ppo"), strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=2e-5)


def test_offloaded_weights_and_optimiser_give_the_same(folder):
    """Kept in the CPU's memory between uses: the optimiser stays the one that was given, with its two rates."""
    offload = ["--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"]
    done = launch("zero3", "tests/ranks.py", str(folder), "offload", "updates", launch_with=offload)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("fixed", "fixed_full"):
        ours, theirs = (
            load_file(run / f"{kind}.safetensors") for run in (all_stages("zero3", folder), folder / "offload")
        )
        for name, weight in ours.items():
            assert (theirs[name] - weight).abs().max() < 1e-5, name


def test_a_step_that_is_no_number_on_one_process_is_skipped_by_all_and_leaves_no_trace(two):
    ours, theirs = (load_file(two / f"{kind}.safetensors") for kind in ("fixed_full", "fixed_nan"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_bf16_is_the_same_under_every_strategy(two, ddp):
    """It is arithmetic alone: the weights themselves are not rounded, and move as under DDP."""
    ours, theirs = (load_file(run / "fixed_bf16.safetensors") for run in (ddp, two))
    exact = load_file(ddp / "fixed_full.safetensors")
    for name, weight in ours.items():
        assert (theirs[name] - weight).abs().max() < 1e-5, name
    assert max((exact[name] - weight).abs().max().item() for name, weight in ours.items()) > 1e-5
    assert any((weight != weight.bfloat16().float()).any() for name, weight in theirs.items() if "policy" in name)


@pytest.mark.parametrize(("stage", "recipe"), [("sft", ""), ("ppo", "_full"), ("ppo", "_roles")])
def test_a_stage_that_was_cut_off_goes_on_to_the_bit(stage, recipe, two):
    whole, resumed = (two / f"{name}{recipe}" / stage for name in ("tiny", "cut"))
    ours, theirs = weights(whole / "final"), weights(resumed / "final")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert metrics(whole) == metrics(resumed)
    assert not (resumed / "attempts").exists()  # it did not start again


def on_one_process(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Goes on, alone, with what a launch of two processes left."""
    shutil.copytree(folder / name / "left", folder / f"{name}_alone")
    return subprocess.run(
        [sys.executable, "tests/ranks.py", str(folder), f"{name}_alone", "resume"],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_one_process_goes_on_with_what_two_began(folder, ddp, one):
    done = on_one_process(folder, "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("goes on after step 2", done.stdout)) == 3
    alone = folder / "ddp_alone"
    ours, theirs = weights(one / "tiny/sft/final"), weights(alone / "cut/sft/final")
    for name, weight in ours.items():
        assert (theirs[name] - weight).abs().max() < 1e-2 * 1e-2, name
    for recipe in ("_full", "_roles"):  # its own random numbers from there on, the same run before
        before, after = (metrics(run) for run in (ddp / f"tiny{recipe}/ppo", alone / f"cut{recipe}/ppo"))
        assert [row["step"] for row in before] == [row["step"] for row in after]
        assert before[:3] == after[:3]


def test_one_process_cannot_go_on_with_pieces(folder):
    all_stages("zero2", folder)
    done = on_one_process(folder, "zero2")
    assert done.returncode != 0
    says = "made under ZeRO-2 on 2 processes, this launch is DDP on 1: go on with `accelerate launch --config_file "
    assert says + "configs/accelerate/zero2.yaml --num_processes 2 stages/sft.py" in done.stderr


def test_two_machines_are_two_processes(folder, ddp):
    """Two launchers that meet at one address, each with one process: what one launcher with two gives, to the bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml",
             "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip",
             "127.0.0.1", "--main_process_port", port, "tests/ranks.py", str(folder), "machines",
             "stages"],
            cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-3000:]
    for rank, text in enumerate(printed):
        assert f"rank {rank}: all done" in text
    for final in FINALS:
        ours, theirs = (weights(run / final / "final") for run in (ddp, folder / "machines"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), final


# launches that are not what they seem


def refused(
    backend: str, says: str, folder: Path, tmp_path: Path, *dials: str, launch_with: Sequence[str] = (),
    **environment: str,
) -> str:  # fmt: skip
    """SFT ends with one sentence, of the process that was the first to stop, and leaves nothing; what it printed."""
    file, base = str(folder / "demonstrations.jsonl"), str(folder / "parents/pretrain/final")
    dials = dials or ("--precision", "fp32")
    files = ["--train_file", file, "--validation_file", file, "--base", base]
    given = [*files, "--runs", str(tmp_path), *dials]
    done = launch(backend, "stages/sft.py", *given, launch_with=launch_with, **environment)
    assert done.returncode != 0
    assert re.search(f"error: .{{0,40}}{says}", done.stderr), done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
    return done.stderr


def test_fsdp_on_cpus_is_refused(folder, tmp_path):
    says = "asks for FSDP on 2 processes, but Accelerate has started .*: FSDP cuts models on GPUs only"
    refused("fsdp2", says, folder, tmp_path)


def test_accumulation_that_the_launch_asks_for_is_refused(folder, tmp_path):
    says = "the launch's DeepSpeed config says gradient_accumulation_steps: 4; leave that to the dials"
    refused("zero2", says, folder, tmp_path, launch_with=["--gradient_accumulation_steps", "4"])


def test_a_batch_that_does_not_divide_is_refused_and_a_port_in_use_is_named(folder, tmp_path):
    """The launcher takes another port where it can, on one machine; two machines have to agree on one."""
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        says = re.escape("batch_size / processes: 7 does not divide by 2; choose a multiple")
        printed = refused("ddp", says, folder, tmp_path, "--batch_size", "7", launch_with=["--main_process_port", port])
        assert f"Port `{port}` is already in use" in printed
        assert len(re.findall(f"^error: {says}", printed, re.MULTILINE)) == 2  # every process says so
        nodes = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
        done = launch("ddp", "stages/sft.py", launch_with=[*nodes, "--main_process_port", port])
        assert done.returncode != 0
        assert f"on port `{port}`, but another process is utilizing it" in done.stderr


def test_deepspeed_that_became_ddp_is_refused(folder, tmp_path):
    says = "asks for DEEPSPEED on 2 processes, but Accelerate has started MULTI_CPU"
    refused("zero2", says, folder, tmp_path, ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_launch_files_first_line_is_its_command(backend):
    file = ROOT / f"configs/accelerate/{backend}.yaml"
    assert f"configs/accelerate/{backend}.yaml" in file.read_text(encoding="utf-8").splitlines()[0]
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["num_processes"] == 2


@pytest.mark.parametrize(
    ("backend", "fault", "says"),
    [
        ("ddp", "kill", r"process 1 \(pid \d+ on .*\) died in rollout 1; process 0 stops in rollout 1"),
        ("ddp", "raise", r"process 1 .* failed in rollout 1: ZeroDivisionError: the reward broke; process 0 stops in"),
        ("zero2", "kill", r"process 1 .* died in rollout 1; process 0 stops in"),
        ("zero2", "stop", r"process 1 .* has given no sign of life for 6 s, in rollout 1; process 0 stops in"),
    ],
)
def test_a_process_that_is_lost_is_named_and_the_others_end(backend, fault, says, folder):
    done = launch(backend, "tests/faults.py", str(folder), backend, fault)
    seconds = time.time() - float((folder / f"{backend}_{fault}.lost").read_text())
    assert done.returncode != 0
    assert re.search(f"^error: ppo: {says}", done.stderr, re.MULTILINE), done.stderr[-3000:]
    assert seconds < 60
    assert not list((folder / f"{backend}_{fault}").rglob("DONE.json"))


def test_processes_that_were_started_differently_are_refused(folder):
    done = launch("ddp", "tests/faults.py", str(folder), "ddp", "differ")
    says = r"error: ppo: process 1 was started with other dials than process 0 \(\w{8}, not \w{8}\)"
    assert done.returncode != 0
    assert re.search(says, done.stderr), done.stderr[-3000:]
    assert not (folder / "ddp_differ").exists()
