"""Two processes under each file of configs/accelerate, against one process: the same mathematics.

Every launch runs tests/ranks.py. CI has of each strategy what it alone may break; `make test-all` has everything.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import CUT, ITEMS, WHOLE
from safetensors.torch import load_file
from tiny import saved_weights as weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from warm import Done, launch
from warm import run as run_alone

from pipeline.runtime.finished import verify_files

IN_CI = {
    "ddp": ("fixed_full", "fixed_roles", "fixed_nan", "fixed_bf16", "sft", "ppo_full", "cut_ppo_full"),
    "zero1": ("fixed_full",),
    "zero2": ("fixed_roles", "sft", "cut_sft"),
    "zero3": ("fixed_full", "fixed_bf16", "sft_lora", "ppo_full", "cut_ppo_full"),
    "fsdp2": ("fixed_roles", "sft_lora", "ppo_full", "cut_ppo_full"),
}
"""Items of tests/ranks.py; `cut_x` is compared with `x`, `fixed_nan` and `fixed_bf16` with `fixed_full`."""
SMALL = 2e-5  # of a metric


def on(*items: str, backends: Sequence[str] = tuple(IN_CI)) -> pytest.MarkDecorator:
    """A test of each of these items under each strategy."""
    marks = {(b, item): () if item in IN_CI[b] else pytest.mark.every for b in backends for item in items}
    return pytest.mark.parametrize(
        ("backend", "item"),
        [pytest.param(*case, marks=mark, id="-".join(case)) for case, mark in marks.items()],
    )


@pytest.fixture(scope="module")
def made(request, folder):
    """made("zero3"): what tests/ranks.py leaves there, launched once, with all that the chosen tests want of it."""
    is_every = any(test.get_closest_marker("every") for test in request.session.items)

    def make(backend: str) -> Path:
        if not (folder / backend).exists():
            done = ranks(backend, folder, backend, *(ITEMS if is_every else dict.fromkeys(IN_CI[backend])))
            assert done.returncode == 0, done.stderr[-6000:]
            assert sorted(re.findall(r"rank (\d): all done", done.stdout)) == ["0", "1"]
        return folder / backend

    return make


@pytest.fixture(scope="module")
def one(request, folder) -> Path:
    """The same on one process, but for what is cut off."""
    is_every = any(test.get_closest_marker("every") for test in request.session.items)
    items = [item for item in ITEMS if is_every or any(item in items for items in IN_CI.values())]
    done = run_alone("tests/ranks.py", str(folder), "one", *(item for item in items if item not in CUT))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one"


def ranks(backend: str, folder: Path, name: str, *items: str, launch_with: Sequence[str] = ()) -> Done:
    """FSDP is told that its CPU processes are GPU's, which only a test may do."""
    wrapper = ["tests/fsdp_on_cpu.py"] if backend == "fsdp2" else []
    return launch(backend, *wrapper, "tests/ranks.py", str(folder), name, *items, launch_with=launch_with)


def place(item: str) -> str:
    """Where a stage among the items leaves its work: `ppo_full` in tiny_full/ppo, `cut_ppo_full` in cut_full/ppo."""
    recipe, rest = ("cut", item.removeprefix("cut_")) if item in CUT else ("tiny", item)
    stage, _, variant = rest.partition("_")
    return f"{recipe}{'_' if variant else ''}{variant}/{stage}"


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines]


def moved(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> float:
    return max((end[name] - start[name]).abs().max().item() for name in end if name in start)


# one update on given rollouts


@on("fixed", "fixed_full", "fixed_roles", "fixed_roles_again")
def test_a_ppo_update_on_given_rollouts_is_that_of_one_process(backend, item, one, made):
    """Statistics, whitening, losses, gradients and weights: global, and equal to rounding."""
    ours, theirs = (json.loads((run / f"{item}.json").read_text()) for run in (one, made(backend)))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=2e-4, abs=SMALL), name
    alone, together = (load_file(run / f"{item}.safetensors") for run in (one, made(backend)))
    assert alone.keys() == together.keys()
    step = 3 * 3e-3  # Adam moves a weight by at most about the learning rate in each of three steps
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() < 1e-3 * step, name
    assert ours["grad_norm"] > 1e-2


@on("fixed_roles_again")
def test_four_roles_learn_the_same_when_activations_are_computed_again(backend, item, one, made):
    for run in (one, made(backend)):
        kept, again = (load_file(run / f"{kind}.safetensors") for kind in ("fixed_roles", item))
        assert kept.keys() == again.keys()
        assert all((again[name] - weight).abs().max() < 1e-5 for name, weight in kept.items())


@on("fixed_nan")
def test_a_step_that_is_no_number_on_one_process_is_skipped_by_all_and_leaves_no_trace(backend, item, made):
    ours, theirs = (load_file(made(backend) / f"{kind}.safetensors") for kind in ("fixed_full", item))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@on("fixed_bf16")
def test_bf16_is_the_same_under_every_strategy(backend, item, made):
    """It is arithmetic alone: the weights themselves are not rounded, and move as under DDP."""
    ours, theirs = (load_file(made(name) / f"{item}.safetensors") for name in ("ddp", backend))
    exact = load_file(made("ddp") / "fixed_full.safetensors")
    for name, weight in ours.items():
        assert (theirs[name] - weight).abs().max() < 1e-5, name
    assert max((exact[name] - weight).abs().max().item() for name, weight in ours.items()) > 1e-5
    assert any((weight != weight.bfloat16().float()).any() for name, weight in theirs.items() if "policy" in name)


@pytest.mark.every
def test_offloaded_weights_and_optimiser_give_the_same(folder, made):
    """Kept in the CPU's memory between uses: the optimiser stays the one that was given, with its two rates."""
    offload = ["--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"]
    kinds = ("fixed", "fixed_full")
    done = ranks("zero3", folder, "offload", *kinds, launch_with=offload)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in kinds:
        ours, theirs = (load_file(run / f"{kind}.safetensors") for run in (made("zero3"), folder / "offload"))
        for name, weight in ours.items():
            assert (theirs[name] - weight).abs().max() < 1e-5, name


# whole stages


@on("pretrain", "sft", "sft_lora", "reward", "reward_lora")
def test_a_trainers_stage_is_the_same_mathematics_on_one_process_and_on_two(backend, item, one, made, folder):
    alone, together = (weights(run / place(item) / "final") for run in (one, made(backend)))
    assert alone.keys() == together.keys()
    adapter = [weight.abs().max().item() for name, weight in alone.items() if "lora_B" in name]  # zero at the start
    assert max(adapter or [moved(weights(folder / "parents/pretrain/final"), alone)]) > 1e-3
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() < 1e-2 * 1e-2, name  # a hundredth of a step
    rows = [metrics(run / place(item)) for run in (one, made(backend))]
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, rel=2e-3, abs=SMALL)


@on(*WHOLE)
def test_what_is_written_is_whole_and_loads_on_one_process(backend, item, made):
    final = made(backend) / place(item) / "final"
    verify_files(final)
    kind = AutoModelForSequenceClassification if "reward" in item else AutoModelForCausalLM
    model, info = kind.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(p.numel() and p.isfinite().all() for p in model.parameters())
    if "ppo" in item:
        critic, info = AutoModelForSequenceClassification.from_pretrained(final / "critic", output_loading_info=True)
        assert not info["missing_keys"]
        assert critic.score.weight.abs().sum() > 0
    assert json.loads((final.parent / "run.json").read_text())["processes"] == 2


@on("ppo", "ppo_full", "ppo_roles", backends=("zero1", "zero2", "zero3", "fsdp2"))
def test_ppo_is_the_same_under_every_strategy(backend, item, made):
    """A run over sampling, updates and evaluations, to rounding: 1e-6 under ZeRO-1 and ZeRO-2, else 1e-5.

    Not to the bit: DeepSpeed lays all weights end to end, where other alignments round differently, and sums the
    norm by which gradients are clipped (in `ppo_full`) in another order.
    """
    ddp, other = (made(name) / place(item) for name in ("ddp", backend))
    assert [row["step"] for row in metrics(ddp) if "ratio" in row] == [0, 1, 2]
    ours, theirs = weights(ddp / "final"), weights(other / "final")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < (1e-6 if backend in ("zero1", "zero2") else 1e-5), name
    for first, second in zip(metrics(ddp), metrics(other), strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=SMALL)


# cut off


@on(*CUT)
def test_a_stage_that_was_cut_off_goes_on_to_the_bit(backend, item, made):
    whole, resumed = (made(backend) / place(name) for name in (item.removeprefix("cut_"), item))
    ours, theirs = weights(whole / "final"), weights(resumed / "final")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert metrics(whole) == metrics(resumed)
    assert not (resumed / "attempts").exists()  # it did not start again


def on_one_process(folder: Path, backend: str, item: str) -> Done:
    """Goes on, alone, with what a launch of two processes left."""
    name = f"{backend}_alone_{item}"
    shutil.copytree(folder / backend / "left" / place(item), folder / name / place(item))
    return run_alone("tests/ranks.py", str(folder), name, item.replace("cut", "resume"))


@on(*CUT, backends=("ddp",))
def test_one_process_goes_on_with_what_two_began(backend, item, folder, made, one):
    whole = item.removeprefix("cut_")
    before, alone = made(backend) / place(whole), folder / f"{backend}_alone_{item}" / place(item)
    done = on_one_process(folder, backend, item)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on after step 2" in done.stdout
    if item == "cut_sft":
        ours, theirs = weights(one / place(whole) / "final"), weights(alone / "final")
        for name, weight in ours.items():
            assert (theirs[name] - weight).abs().max() < 1e-2 * 1e-2, name
    else:  # its own random numbers from there on, the same run before
        assert [row["step"] for row in metrics(before)] == [row["step"] for row in metrics(alone)]
        assert metrics(before)[:3] == metrics(alone)[:3]


@on("cut_sft", backends=("zero2",))
def test_one_process_cannot_go_on_with_pieces(backend, item, folder, made):
    made(backend)
    done = on_one_process(folder, backend, item)
    assert done.returncode != 0
    says = "made under ZeRO-2 on 2 processes, this launch is DDP on 1: go on with `accelerate launch --config_file "
    assert says + "configs/accelerate/zero2.yaml --num_processes 2 stages/sft.py" in done.stderr
