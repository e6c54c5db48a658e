"""Composed adapters from file to file: laws on weights and on logits, limits, heads, lineage, the command."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_factory import (
    CONFIGS,
    LM,
    PAIRS,
    adapter_logits,
    assert_change,
    assert_logits,
    assert_refused,
    dense_changes,
    logits,
    logits_by_hand,
    weighted_changes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pipeline.adapters.algebra import evaluate
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.expressions import linear_weights
from pipeline.adapters.reading import hash_adapter_files, read_adapters
from pipeline.adapters.verify import verify
from pipeline.config.commands import Compose, Verify
from pipeline.config.errors import UserError
from pipeline.config.parse import parse_command

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_alone_is_itself(factory, name):
    kind, folder = CONFIGS[name][0], factory.adapter(name)
    out = factory.compose("a", kind, folders={"a": folder})
    assert_change(out, dense_changes(folder))
    assert_logits(adapter_logits(factory, kind, out), adapter_logits(factory, kind, folder))


LAWS = {
    "0.5*a + 0.5*a": {"a": 1},
    "-(-a)": {"a": 1},
    "a - a": {},
    "(a + b) - b": {"a": 1},
    "-0.7*a": {"a": -0.7},
    "a + 0.5*b - 0.3*c": {"a": 1, "b": 0.5, "c": -0.3},
    "lerp(avg(a, c), b, 1.5)": {"a": -0.25, "c": -0.25, "b": 1.5},
}


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("text", LAWS)
def test_the_laws(factory, text, first, second):
    kind = CONFIGS[first][0]
    folders = {"a": factory.adapter(first), "b": factory.adapter(second, 2), "c": factory.adapter(first, 3)}
    out = factory.compose(text, kind, folders=folders)
    change = weighted_changes(LAWS[text], folders)
    assert_change(out, change)
    assert_logits(adapter_logits(factory, kind, out), logits_by_hand(factory, kind, change, "ia3" in first))
    if text == "a - a":
        assert torch.equal(adapter_logits(factory, kind, out), logits(factory.base(kind)))


@pytest.mark.parametrize("names", [("plain", "rslora", "regex"), ("ia3", "ia3 keys", "ia3")])
def test_the_order_changes_no_bit(factory, names):
    folders = {n: factory.adapter(name, seed) for seed, (n, name) in enumerate(zip("abc", names, strict=True), 1)}
    first, second = (factory.compose(text, folders=folders) for text in ("a + 2*b - c", "2*b - (c - a)"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


lora_configs = st.builds(
    lambda r, alpha, rslora, targets, layer: LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=sorted(targets), layers_to_transform=layer, **LM
    ),
    st.integers(1, 6),
    st.integers(1, 20),
    st.booleans(),
    st.sets(st.sampled_from(("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")), min_size=1),
    st.sampled_from((None, [0], [1])),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lora_configs, lora_configs, st.integers(-20, 20).map(lambda n: n / 10), st.integers(0, 10**6))
def test_any_two_adapters_add_up(factory, config_a, config_b, weight, seed):
    folders = {"a": factory.folder / "any-a", "b": factory.folder / "any-b"}
    for place, (name, config) in enumerate((("a", config_a), ("b", config_b))):
        factory.make_peft_model(copy.deepcopy(config), "llama", seed + place).save_pretrained(str(folders[name]))
    out = factory.compose(f"a + ({weight})*b", folders=folders)
    change = weighted_changes({"a": 1, "b": weight}, folders)
    assert_change(out, change, 3e-6)
    assert_logits(adapter_logits(factory, "llama", out), logits_by_hand(factory, "llama", change, False))


def test_equal_factors_need_no_more_ranks_than_one(factory):
    """The sum of an adapter and one with its A: Σr ranks side by side, half of them for nothing."""
    a = factory.adapter("plain")
    twin = factory.folder / "twin"
    shutil.copytree(a, twin, dirs_exist_ok=True)
    tensors = load_file(a / "adapter_model.safetensors")
    save_file({k: t * 2 - 1 if "lora_B" in k else t for k, t in tensors.items()}, twin / "adapter_model.safetensors")
    out = factory.compose("a - 0.3*t", folders={"a": a, "t": twin})
    lineage = json.loads((out / "composition.json").read_text())
    assert (lineage["rank"], lineage["method"]) == (3, "compressed")
    assert_change(out, weighted_changes({"a": 1, "t": -0.3}, {"a": a, "t": twin}))
    report = verify(Verify(adapter=str(out), prompts_file=""))
    assert report["error"] <= 1e-6


def test_a_rank_costs_the_tail_that_was_predicted(factory):
    folders = {"a": factory.adapter("plain"), "b": factory.adapter("rslora", 2)}
    out = factory.compose("a + b", folders=folders, rank=4, max_loss=1.0)
    lineage = json.loads((out / "composition.json").read_text())
    exact, actual = weighted_changes({"a": 1, "b": 1}, folders), dense_changes(out)
    assert lineage["discarded"].keys() == exact.keys()
    for module, change in exact.items():
        spectrum = torch.linalg.svdvals(change).square()
        tail = (spectrum[4:].sum() / spectrum.sum()).item()
        lost = ((actual[module] - change).norm() / change.norm()).item() ** 2
        assert lineage["discarded"][module] == pytest.approx(tail, rel=1e-6, abs=1e-14)
        assert lost == pytest.approx(tail, rel=1e-4, abs=1e-12)
    assert max(lineage["discarded"].values()) > 0.01
    before = sorted(factory.folder.iterdir())
    with pytest.raises(
        UserError, match=r"rank: 4 ranks lose 0\.\d+ of \|dW\|\^2 in model\.layers.*more than max_loss 0.01"
    ):
        factory.compose("a + b", folders=folders, rank=4)
    with pytest.raises(UserError, match=r"max_rank: the result has 7 ranks, more than 6"):
        factory.compose("a + b", folders=folders, max_rank=6)
    assert sorted(factory.folder.iterdir()) == before


@pytest.mark.parametrize("text", ["ties(a, -b, density=0.3)", "b - 0.5*dare(a, 0.9, seed=4)", "paper(0.5*a + 0.5*c)"])
def test_functions_of_whole_updates_are_written_as_they_are(factory, text):
    folders = {"a": factory.adapter("plain"), "b": factory.adapter("rslora", 2), "c": factory.adapter("plain", 3)}
    out = factory.compose(text, folders=folders)
    read, _ = read_adapters(folders, str(factory.bases["llama"]))
    update = evaluate(parse(text), {name: adapter.update for name, adapter in read.items()})
    assert_change(out, {module: part.b @ part.a for module, part in update.items()})
    report = verify(Verify(adapter=str(out), prompts_file=""))
    assert report["error"] <= (0 if "paper" in text else 1e-6)
    assert report["method"] == ("exact" if "paper" in text else "compressed")


def test_the_lineage_says_all_that_it_was_made_from(factory):
    folders = {"a": factory.adapter("plain"), "b": factory.adapter("rslora", 2), "unused": factory.folder / "nowhere"}
    out = factory.compose(".5*a+b", folders=folders)
    lineage = json.loads((out / "composition.json").read_text())
    assert (lineage["expression"], lineage["method"], lineage["rank"]) == ("0.5*a + b", "exact", 7)
    assert lineage["parents"].keys() == {"a", "b"}
    for name, parent in lineage["parents"].items():
        assert (out / parent["path"]).resolve() == folders[name].resolve()
        for file, digest in parent["sha256"].items():
            assert hash_adapter_files(folders[name])[file] == digest
    assert lineage["proof"]["merged"] < 1e-5
    assert lineage["proof"]["mixed"] < 1e-5
    assert lineage["proof"]["effect"] > 1e-3
    assert lineage["versions"].keys() == {"torch", "transformers", "peft"}
    again = factory.compose("2*c", folders={"c": out})
    assert json.loads((again / "composition.json").read_text())["parents"]["c"]["lineage"] == "0.5*a + b"


def test_heads_are_averaged_with_their_adapters(factory, classifiers):
    out = factory.compose("0.25*a + 0.75*b", folders=classifiers, heads="sum")
    a, b, both = (load_file(folder / "adapter_model.safetensors") for folder in (*classifiers.values(), out))
    key = "base_model.model.score.weight"
    torch.testing.assert_close(both[key], 0.25 * a[key] + 0.75 * b[key])
    assert_change(out, weighted_changes({"a": 0.25, "b": 0.75}, classifiers))


def test_reward_models_are_averaged_on_the_base_that_lies_with_each(factory, folder):
    """As the reward stage writes them: the base beside the adapter holds that adapter's own head."""
    final = folder / "parents_lora/reward/final"
    other = factory.folder / "another_reward"
    shutil.copytree(final, other)
    (other / "DONE.json").unlink()
    torch.manual_seed(3)
    head = torch.randn(1, 16)
    for file, key in (("model", "score.weight"), ("adapter_model", "base_model.model.score.weight")):
        tensors = load_file(other / f"{file}.safetensors")
        tensors = {k: w + 0.1 * torch.randn_like(w) if "lora_" in k else w for k, w in tensors.items()} | {key: head}
        save_file(tensors, other / f"{file}.safetensors", metadata={"format": "pt"})
    folders, prompts = {"a": final, "b": other}, str(folder / "prompts.jsonl")
    out = factory.compose("0.25*a + 0.75*b", folders=folders, heads="sum", base="", probe_file=prompts)
    first, second, both = (load_file(place / "adapter_model.safetensors") for place in (final, other, out))
    key = "base_model.model.score.weight"
    torch.testing.assert_close(both[key], 0.25 * first[key] + 0.75 * second[key])
    assert_change(out, weighted_changes({"a": 0.25, "b": 0.75}, folders))


def test_a_head_is_refused_unless_a_rule_is_given(factory, classifiers, tmp_path):
    assert_refused(
        factory, tmp_path, "modules_to_save: it has whole trained layers (score.weight)", folders=classifiers
    )
    assert_refused(factory, tmp_path, "heads can only be averaged", folders=classifiers, heads="sum")


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("a + toxik", {}, "no adapter is called 'toxik' (there are a, b)"),
        ("a + nan*b", {}, "nan: expected a finite number"),
        ("a * b", {}, "'*' stands between two adapters"),
        ("a + $x*b", {}, "expression: $x has no value"),
        ("a + b", {"adapters": "a"}, "adapters: expected name=folder,name=folder, got 'a'"),
        ("a + b", {"adapters": "a=x,a=y"}, "adapters: 'a' is given twice"),
        ("a + b", {"adapters": ""}, "adapters: expected name=folder,name=folder, got none"),
        ("a + b", {"out": ""}, "out: say where to write"),
        ("a + b", {"probe_file": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(factory, tmp_path, text, more, message):
    assert_refused(
        factory,
        tmp_path,
        message,
        text,
        folders={"a": factory.adapter("plain"), "b": factory.adapter("rslora", 2)},
        **more,
    )


def test_an_expression_stands_first_and_may_begin_with_a_sign():
    for text in ("a - b", "-a + b", "--a - b", "-(a)"):
        assert parse_command(Compose, "stages/merge.py compose", [text, "--out", "x"]).expression == text
    config = parse_command(Compose, "stages/merge.py compose", ["--expression=-a", "--rank", "4"])
    assert (config.expression, config.rank, config.dtype) == ("-a", 4, "fp32")
    assert list(linear_weights(parse(config.expression)).values()) == [-1]


def test_dials_of_a_command_are_checked(capsys):
    for argv, message in (
        (["a", "--dtype", "fp8"], "expected one of fp32, bf16, fp16"),
        (["a", "--rnak", "3"], "'rank'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_command(Compose, "stages/merge.py compose", argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_shell_says_one_sentence(factory):
    command = [
        sys.executable,
        "stages/merge.py",
        "compose",
        "a + b*b",
        "--adapters",
        f"a={factory.adapter('plain')},b=b",
    ]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["--out", str(factory.folder / "never")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expression: '*' stands between two adapters")
    assert not (factory.folder / "never").exists()
