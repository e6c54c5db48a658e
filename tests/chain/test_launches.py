"""Launches that are not what they seem, processes that are lost, and two machines."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from tiny import saved_weights
from warm import ENVIRONMENT, ROOT, Done, launch

BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def accelerate(backend: str, *command: str) -> subprocess.Popen[str]:
    """`accelerate launch` itself, and torchrun with it, which ends all processes when one has failed."""
    given = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{backend}.yaml", *command]
    return subprocess.Popen(
        [sys.executable, *given],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def busy_port():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        yield str(busy.getsockname()[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_launch_files_first_line_is_its_command(backend):
    file = ROOT / f"configs/accelerate/{backend}.yaml"
    assert f"configs/accelerate/{backend}.yaml" in file.read_text(encoding="utf-8").splitlines()[0]
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["num_processes"] == 2


def refused(
    backend: str, says: str, folder: Path, tmp_path: Path, *dials: str, launch_with: Sequence[str] = (),
    **environment: str,
) -> str:  # fmt: skip
    """SFT ends with one sentence, of the process that was the first to stop, and leaves nothing; what it printed."""
    file, base = str(folder / "demonstrations.jsonl"), str(folder / "parents/pretrain/final")
    files = ["--train_file", file, "--validation_file", file, "--base", base]
    given = [*files, "--runs", str(tmp_path), "--precision", "fp32", *dials]
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


def test_a_batch_that_does_not_divide_is_refused(folder, tmp_path):
    says = re.escape("batch_size / processes: 7 does not divide by 2; choose a multiple")
    printed = refused("ddp", says, folder, tmp_path, "--batch_size", "7")
    assert len(re.findall(f"error: {says}", printed)) == 2  # every process says so, be it on one line


def test_deepspeed_that_became_ddp_is_refused(folder, tmp_path):
    says = "asks for DEEPSPEED on 2 processes, but Accelerate has started MULTI_CPU"
    refused("zero2", says, folder, tmp_path, ACCELERATE_USE_CPU="true")


def test_processes_that_were_started_differently_are_refused(folder):
    done = launch("ddp", "tests/faults.py", str(folder), "ddp", "differ")
    says = r"error: ppo: process 1 was started with other dials than process 0 \(\w{8}, not \w{8}\)"
    assert done.returncode != 0
    assert re.search(says, done.stderr), done.stderr[-3000:]
    assert not (folder / "ddp_differ").exists()


def test_a_port_in_use_is_named(busy_port):
    """The launcher takes another where it can, on one machine; two machines have to agree on one."""
    nodes = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
    done = ended(accelerate("ddp", *nodes, "--main_process_port", busy_port, "stages/sft.py"))
    assert done.returncode != 0
    assert f"on port `{busy_port}`, but another process is utilizing it" in done.stderr


# processes that are lost


@pytest.mark.parametrize(
    ("backend", "fault", "says"),
    [
        ("ddp", "kill", r"process 1 \(pid \d+ on .*\) died in rollout 1; process 0 stops in rollout 1"),
        pytest.param(
            "ddp", "raise", r"process 1 .* failed in rollout 1: ZeroDivisionError: the reward broke; process 0 stops",
            marks=pytest.mark.every,
        ),
        pytest.param("zero2", "kill", r"process 1 .* died in rollout 1; process 0 stops in", marks=pytest.mark.every),
        pytest.param(
            "zero2", "stop", r"process 1 .* has given no sign of life for 6 s, in rollout 1; process 0 stops in",
            marks=pytest.mark.every,
        ),
    ],
)  # fmt: skip
def test_a_process_that_is_lost_is_named_and_the_others_end(backend, fault, says, folder):
    done = ended(accelerate(backend, "--main_process_port", "0", "tests/faults.py", str(folder), backend, fault))
    seconds = time.time() - float((folder / f"{backend}_{fault}.lost").read_text())
    assert done.returncode != 0
    assert re.search(f"^error: ppo: {says}", done.stderr, re.MULTILINE), done.stderr[-3000:]
    assert seconds < 60
    assert not list((folder / f"{backend}_{fault}").rglob("DONE.json"))


@pytest.mark.every
def test_two_machines_are_two_processes(folder):
    """Two launchers that meet at one address, each with one process: what one launcher with two gives, to the bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    items = ("sft_lora", "reward", "ppo_full", "ppo_roles")
    address = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    command = ["--main_process_port", port, "tests/ranks.py", str(folder), "machines", *items]
    nodes = [accelerate("ddp", *address, "--machine_rank", str(rank), *command) for rank in range(2)]
    for rank, done in enumerate([ended(node) for node in nodes]):
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"rank {rank}: all done" in done.stdout
    assert launch("ddp", "tests/ranks.py", str(folder), "machine", *items).returncode == 0
    for final in ("tiny_lora/sft", "tiny/reward", "tiny_full/ppo", "tiny_roles/ppo"):
        ours, theirs = (saved_weights(folder / run / final / "final") for run in ("machine", "machines"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), final
