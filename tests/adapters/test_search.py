"""The search: a known optimum found, constraints kept, splits apart, and what it measures is what compose writes."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters import compose, metrics, search
from pipeline.adapters.expressions import parse, substitute
from pipeline.adapters.files import AdapterError, read_ground
from pipeline.adapters.search import Constraint, minimise, read_constraints, read_ranges
from pipeline.config.commands import Compose, Search
from pipeline.config.dials import Sampling
from pipeline.config.errors import UserError
from pipeline.data.tokenize import completion_rows
from pipeline.evaluation.statistics import mean_ci
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import load_reward_model, new_reward_model
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import generate
from pipeline.runtime.hashing import of_file
from pipeline.training.validation import validation_loss

ROWS = [
    {"prompt": f"the {who} {did}", "chosen": f" a {better}.", "rejected": f" a {worse}.", "completion": f" a {better}."}
    for who in ("cat", "dog", "hat")
    for did in ("sat on", "ate", "had", "chased")
    for better, worse in (("cake", "sea"), ("tea", "mat"), ("dog", "oats"))
]


# ------------------------------------------------------------------------------------------------- optimising


@pytest.mark.parametrize("optimum", [0.3, 1.234, -0.5, 2.0])
def test_one_variable_finds_the_optimum_of_a_parabola(optimum):
    calls = []

    def trial(point):
        calls.append(point)
        return (point[0] - optimum) ** 2 + 7, 0.0

    best = minimise(trial, [(-1.0, 2.0)], grid=7, budget=20, seed=0)
    assert best == pytest.approx((optimum,), abs=2e-3)
    assert len(calls) <= 20
    assert len(set(calls)) == len(calls)  # nothing is measured twice


def test_two_variables_find_the_optimum_of_a_tilted_bowl():
    def trial(point):
        x, y = point[0] - 0.37, point[1] + 0.61
        return 2 * x * x + y * y + x * y, 0.0

    assert minimise(trial, [(0, 1.5), (-1, 1)], grid=16, budget=100, seed=0) == pytest.approx((0.37, -0.61), abs=5e-3)


def test_a_constraint_moves_the_optimum_to_its_edge():
    best = minimise(lambda p: (-p[0], max(0.0, p[0] ** 2 - 0.5)), [(0, 1)], grid=5, budget=30, seed=0)
    assert best[0] ** 2 <= 0.5
    assert best[0] == pytest.approx(math.sqrt(0.5), abs=2e-3)


def test_where_nothing_is_allowed_the_nearest_is_given():
    assert minimise(lambda p: (0.0, 1 + p[0]), [(0, 1)], grid=3, budget=3, seed=0) == (0.0,)


def test_many_variables_start_from_a_draw_by_the_seed():
    ranges = [(0.0, 1.0)] * 4
    first, again, other = (search.start_points(ranges, 10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 10


# ------------------------------------------------------------------------------------------------- reading


def test_constraints_are_read():
    figures, base = {"perplexity": 12.0, "kl": 3.0}, {"perplexity": 10.0, "kl": 0.0}
    of_base, kl, least = read_constraints("perplexity <= 1.05*base, kl<=6, perplexity >= 13")
    assert of_base == Constraint("perplexity", "<=", 1.05, True)
    assert of_base.excess(figures, base) == pytest.approx(1.5 / 10.5)
    assert kl.excess(figures, base) == 0
    assert least.excess(figures, base) == pytest.approx(1 / 13)


@pytest.mark.parametrize("text", ["perplexity < 3", "perplexity <= base*2", "ppl <= 3", "kl <= -", "kl"])
def test_other_constraints_are_refused(text):
    with pytest.raises(UserError, match="constraints: "):
        read_constraints(text)


@pytest.mark.parametrize("text", ["", "x=0:1", "x=0:1,y=1:0", "x=0:1,y=0:inf", "x=0:1,z=0:1", "x=0-1,y=0:1", "x=0:a"])
def test_other_ranges_are_refused(text):
    with pytest.raises(UserError, match="range: "):
        read_ranges(text, ["x", "y"])
    assert read_ranges("y=-1:2, $x=0:1.5", ["x", "y"]) == {"x": (0, 1.5), "y": (-1, 2)}


# ------------------------------------------------------------------------------------------------- measuring


@pytest.fixture(scope="module", params=["lora", "ia3"])
def places(request, saved, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of one kind on the saved Llama, of other ranks and scales, far from nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    for number, name in enumerate(("good", "bad")):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(saved["llama"])
        if request.param == "lora":
            kind = LoraConfig(r=2 + number, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        else:
            kind = IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
            )
        model = get_peft_model(base, kind)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(str(folder / name))
    return {"base": saved["llama"], "good": folder / "good", "bad": folder / "bad"}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Validation and test rows that share none; retained texts."""
    written = {}
    rows = {"validation_file": ROWS[:18], "test_file": ROWS[18:]}
    texts = [{"text": row["prompt"] + row["rejected"]} for row in ROWS]
    for name, part in {**rows, "retain_file": texts[:18], "retain_test_file": texts[18:]}.items():
        written[name] = str(tmp_path / f"{name}.jsonl")
        Path(written[name]).write_text("".join(json.dumps(row) + "\n" for row in part))
    return written


def asked(places, files, tmp_path, **dials) -> Search:
    given = {
        "expression": "$x*good - 0.5*bad", "range": "x=-1:2", "base": str(places["base"]), "out": str(tmp_path / "out"),
        "adapters": f"good={places['good']},bad={places['bad']}", "budget": 6, "max_length": 64,
        "sampling": Sampling(max_prompt_tokens=32, max_new_tokens=8), **files,
    }  # fmt: skip
    return Search(**{**given, **dials})


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_the_whole_command(places, files, tmp_path):
    hashes = {name: of_file(places[name] / "adapter_model.safetensors") for name in ("good", "bad")}
    out = search.search(asked(places, files, tmp_path, constraints="perplexity <= 3*base", budget=9))
    result = json.loads((out / "result.json").read_text())
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == result["trials"] <= 9
    kept = [
        trial for trial in trials if trial["figures"]["perplexity"] <= 3 * result["validation"]["base"]["perplexity"]
    ]
    assert kept == [trial for trial in trials if not trial["excess"]]
    assert result["chosen"] == min(kept, key=lambda trial: trial["figures"]["loss"])["values"]
    assert set(result["test"]) == {
        *("chosen", "all variables 0", "all variables 1", "average", "good alone", "bad alone", "base"),
    }  # fmt: skip
    assert result["test"]["all variables 1"]["expression"] == "1*good - 0.5*bad"
    assert (out / "curve.png").stat().st_size > 1000
    assert str(substitute(parse("$x*good - 0.5*bad"), result["chosen"])) in result["compose"]
    for name, before in hashes.items():
        assert of_file(places[name] / "adapter_model.safetensors") == before
    with pytest.raises(AdapterError, match="not overwritten"):
        search.search(asked(places, files, tmp_path))


def test_a_trial_measures_the_adapter_that_compose_writes(places, files, tmp_path, tokenizer):
    config = asked(places, files, tmp_path, grid=2, budget=2, range="x=0:0.7")
    out = search.search(config)
    trial = json.loads((out / "trials.jsonl").read_text().splitlines()[1])
    assert trial["values"] == {"x": 0.7}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS[:4]))
    composed = compose.compose(
        Compose(
            expression="0.7*good - 0.5*bad", adapters=config.adapters, base=config.base, out=str(tmp_path / "composed"),
            probe_file=str(prompts),
        )
    )  # fmt: skip
    ground = read_ground(config.base, "CAUSAL_LM")
    rows, _ = completion_rows(tokenizer, ROWS[:18], 64, "error")
    loss, _ = validation_loss(compose.on_the_fly(ground.model, composed), tokenizer, rows, 4, "fp32")
    assert trial["figures"]["loss"] == pytest.approx(loss, rel=1e-5)
    mixture = compose.Mixture(ground.model, {name: places[name] for name in ("good", "bad")})
    mixture.set({"good": 0.7, "bad": -0.5})
    found, expected = (
        compose.probe(model, tokenizer, [row["prompt"] for row in ROWS[:4]])
        for model in (mixture.model, compose.on_the_fly(ground.model, composed))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_functions_of_adapters_are_loaded_as_adapters(places, files, tmp_path):
    dials = {"expression": "$x*ties(good, bad, density=0.5)", "range": "x=0:1", "grid": 2, "budget": 2}
    assert (
        json.loads((search.search(asked(places, files, tmp_path, **dials)) / "result.json").read_text())["trials"] == 2
    )
    with pytest.raises(UserError, match=r"\$x stands in dare\(good"):
        search.search(asked(places, files, tmp_path, expression="dare(good, $x)", out=str(tmp_path / "other")))


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_samples_are_drawn_from_the_same_noise_and_kl_from_itself_is_zero(places, files, tmp_path):
    dials = {
        "objective": "vader",
        "expression": "$x*good",
        "range": "x=0:1",
        "constraints": "repetition <= 2, kl <= 99",
    }
    trials = []
    for name in ("one", "two"):
        out = search.search(asked(places, files, tmp_path, **dials, grid=3, budget=3, out=str(tmp_path / name)))
        trials.append([json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()])
    assert trials[0] == trials[1]
    assert trials[0][0]["values"] == {"x": 0.0}
    assert trials[0][0]["figures"]["kl"] == 0
    assert trials[0][2]["figures"]["kl"] > 0.5


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_reward_and_kl_are_those_of_the_adapter_alone(places, files, tmp_path, saved, tokenizer):
    torch.manual_seed(7)
    model = new_reward_model(saved["gpt2"], tokenizer)
    model.config.score_shift = 0.37
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    dials = {"objective": "reward", "reward": str(tmp_path / "reward"), "reference": "bad", "expression": "$x*good"}
    config = asked(places, files, tmp_path, **dials, range="x=0:1", grid=2, budget=2, seed=4)
    trial = json.loads((search.search(config) / "trials.jsonl").read_text().splitlines()[1])
    base = read_ground(config.base, "CAUSAL_LM").model
    good, bad = (compose.on_the_fly(base, places[name]) for name in ("good", "bad"))
    torch.manual_seed(4)
    rollout = generate(good, tokenizer, [row["prompt"] for row in ROWS[:18]], config.sampling)
    rows = (rollout.input_ids, rollout.attention_mask)
    with torch.no_grad():
        scores = reward_model_scores(load_reward_model(tmp_path / "reward"), *rows)
        own, other = (response_logprobs(m, *rows, 8, 1.0, tokenizer.pad_token_id)[0] for m in (good, bad))
    kl = (own - other).masked_fill(~rollout.response_mask, 0).sum(1)
    expected = {"reward": scores.mean().item(), "kl": kl.mean().item()}
    assert {name: trial["figures"][name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_accuracy_is_the_share_of_pairs_whose_right_completion_is_likelier(places, files, tmp_path, tokenizer):
    out = search.search(asked(places, files, tmp_path, objective="accuracy", expression="$x*good", grid=2, budget=2))
    trial = json.loads((out / "trials.jsonl").read_text().splitlines()[0])
    model = compose.on_the_fly(read_ground(str(places["base"]), "CAUSAL_LM").model, places["good"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= trial["values"]["x"]
    right = 0
    for row in ROWS[:18]:
        likelihood = {}
        for side in ("chosen", "rejected"):
            rows, _ = completion_rows(tokenizer, [{"prompt": row["prompt"], "completion": row[side]}], 64, "error")
            loss, tokens = validation_loss(model, tokenizer, rows, 1, "fp32")
            likelihood[side] = -loss * tokens
        right += likelihood["chosen"] > likelihood["rejected"]
    assert trial["figures"]["accuracy"] == pytest.approx(right / len(ROWS[:18]))


@pytest.mark.parametrize("places", ["lora"], indirect=True)
def test_the_test_rows_are_read_once_and_measured_after_the_choice(places, files, tmp_path, monkeypatch):
    read, seen = [], []
    own, rows_of = search.measured, metrics.read_rows

    def measured(weights, rows, bench):
        seen.append((json.dumps(weights, sort_keys=True), rows))
        return own(weights, rows, bench)

    monkeypatch.setattr(metrics, "read_rows", lambda file, *rest: (read.append(file), rows_of(file, *rest))[1])
    monkeypatch.setattr(search, "measured", measured)
    search.search(asked(places, files, tmp_path, constraints="perplexity <= 100*base"))
    assert sorted(read) == sorted(files.values())
    tests = [number for number, (_, rows) in enumerate(seen) if rows is seen[-1][1]]
    assert tests == list(range(tests[0], len(seen)))
    weights = [seen[number][0] for number in tests]
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("places", ["lora"], indirect=True)
@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"test_file": "validation_file"}, "test_file: 18 of its rows are in validation_file too"),
        ({"retain_test_file": "retain_file"}, "retain_test_file: 18 of its rows"),
        ({"constraints": "loss <= 0.001"}, "none of 6 trials keeps"),
        ({"retain_file": ""}, "retain_file: perplexity is asked for"),
        ({"test_file": ""}, "test_file: say which rows"),
        ({"expression": "good"}, r"no \$variable"),
        ({"range": "y=0:1"}, r"has no \$y"),
        ({"max_length": 5}, "raise it"),
        ({"max_length": 65}, "its context is 64 tokens"),
        ({"objective": "reward"}, "say which reward model"),
        (
            {"objective": "vader", "sampling": Sampling(max_prompt_tokens=9, long_prompts="error")},
            "longer than 9 tokens",
        ),
        ({"objective": "classifier"}, "judge_file: say which rows"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_is_written(places, files, tmp_path, dials, message):
    given = {name: files.get(text, text) if name.endswith("file") else text for name, text in dials.items()}
    with pytest.raises(UserError, match=message):
        search.search(asked(places, files, tmp_path, **{"constraints": "perplexity <= 9*base", **given}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("places", ["ia3"], indirect=True)
def test_vectors_of_different_places_are_refused(places, files, tmp_path):
    folder = tmp_path / "outputs"
    shutil.copytree(places["bad"], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["k_proj"]}
    tensors = {key: x for key, x in load_file(folder / "adapter_model.safetensors").items() if "k_proj" in key}
    save_file({key: x.flatten().reshape(1, -1) for key, x in tensors.items()}, folder / "adapter_model.safetensors")
    config |= {"feedforward_modules": ["k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter 'bad': .*k_proj: .*its input"):
        search.search(asked({**places, "bad": folder}, files, tmp_path))


def test_the_interval_of_a_loss_per_token_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    count = rng.integers(3, 30, 400).astype(float)
    nats = rng.normal(4 * count, np.sqrt(count))
    found = mean_ci(metrics.per_token(-nats, count))
    assert found.value == pytest.approx(nats.sum() / count.sum())
    draws = rng.integers(0, 400, (2000, 400))
    spread = (nats[draws].sum(1) / count[draws].sum(1)).std()  # the bootstrap's
    assert (found.high - found.value) / 1.96 == pytest.approx(spread, rel=0.1)
