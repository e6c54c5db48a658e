"""The search: constraints kept, splits apart, and what it measures is what compose writes."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters import eval_rows
from pipeline.adapters import search as search_module
from pipeline.adapters.base import AdapterError, read_base
from pipeline.adapters.compose import compose
from pipeline.adapters.expression_parser import parse, substitute
from pipeline.adapters.mixture import Mixture
from pipeline.adapters.proof import load_unmerged, probe_logits
from pipeline.adapters.search import search
from pipeline.config.commands import Compose, Search
from pipeline.config.dials import Sampling
from pipeline.config.errors import UserError
from pipeline.data.tokenize import completion_rows
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import load_reward_model, new_reward_model
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import generate
from pipeline.runtime.hashing import hash_file
from pipeline.training.validation import validation_loss

ROWS = [
    {"prompt": f"the {who} {did}", "chosen": f" a {better}.", "rejected": f" a {worse}.", "completion": f" a {better}."}
    for who in ("cat", "dog", "hat")
    for did in ("sat on", "ate", "had", "chased")
    for better, worse in (("cake", "sea"), ("tea", "mat"), ("dog", "oats"))
]


@pytest.fixture(scope="module", params=["lora", "ia3"])
def folders(request, saved, tmp_path_factory) -> dict[str, Path]:
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


def make_config(folders, files, tmp_path, **dials) -> Search:
    defaults = {
        "expression": "$x*good - 0.5*bad", "range": "x=-1:2", "base": str(folders["base"]),
        "out": str(tmp_path / "out"), "adapters": f"good={folders['good']},bad={folders['bad']}",
        "budget": 6, "max_length": 64, "sampling": Sampling(max_prompt_tokens=32, max_new_tokens=8), **files,
    }  # fmt: skip
    return Search(**{**defaults, **dials})


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_the_whole_command(folders, files, tmp_path):
    hashes = {name: hash_file(folders[name] / "adapter_model.safetensors") for name in ("good", "bad")}
    out = search(make_config(folders, files, tmp_path, constraints="perplexity <= 3*base", budget=9))
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
        assert hash_file(folders[name] / "adapter_model.safetensors") == before
    with pytest.raises(AdapterError, match="not overwritten"):
        search(make_config(folders, files, tmp_path))


def test_a_trial_measures_the_adapter_that_compose_writes(folders, files, tmp_path, tokenizer):
    config = make_config(folders, files, tmp_path, grid=2, budget=2, range="x=0:0.7")
    out = search(config)
    trial = json.loads((out / "trials.jsonl").read_text().splitlines()[1])
    assert trial["values"] == {"x": 0.7}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS[:4]))
    composed = compose(
        Compose(
            expression="0.7*good - 0.5*bad", adapters=config.adapters, base=config.base, out=str(tmp_path / "composed"),
            probe_file=str(prompts),
        )
    )  # fmt: skip
    base = read_base(config.base, "CAUSAL_LM")
    rows, _ = completion_rows(tokenizer, ROWS[:18], 64, "error")
    loss, _ = validation_loss(load_unmerged(base.model, composed), tokenizer, rows, 4, "fp32")
    assert trial["figures"]["loss"] == pytest.approx(loss, rel=1e-5)
    mixture = Mixture(base.model, {name: folders[name] for name in ("good", "bad")})
    mixture.set_weights({"good": 0.7, "bad": -0.5})
    logits, expected = (
        probe_logits(model, tokenizer, [row["prompt"] for row in ROWS[:4]])
        for model in (mixture.model, load_unmerged(base.model, composed))
    )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_functions_of_adapters_are_loaded_as_adapters(folders, files, tmp_path):
    dials = {"expression": "$x*ties(good, bad, density=0.5)", "range": "x=0:1", "grid": 2, "budget": 2}
    assert (
        json.loads((search(make_config(folders, files, tmp_path, **dials)) / "result.json").read_text())["trials"] == 2
    )
    with pytest.raises(UserError, match=r"\$x stands in dare\(good"):
        search(make_config(folders, files, tmp_path, expression="dare(good, $x)", out=str(tmp_path / "other")))


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_samples_are_drawn_from_the_same_noise_and_kl_from_itself_is_zero(folders, files, tmp_path):
    dials = {
        "objective": "vader",
        "expression": "$x*good",
        "range": "x=0:1",
        "constraints": "repetition <= 2, kl <= 99",
    }
    trials = []
    for name in ("one", "two"):
        out = search(make_config(folders, files, tmp_path, **dials, grid=3, budget=3, out=str(tmp_path / name)))
        trials.append([json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()])
    assert trials[0] == trials[1]
    assert trials[0][0]["values"] == {"x": 0.0}
    assert trials[0][0]["figures"]["kl"] == 0
    assert trials[0][2]["figures"]["kl"] > 0.5


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_reward_and_kl_are_those_of_the_adapter_alone(folders, files, tmp_path, saved, tokenizer):
    torch.manual_seed(7)
    model = new_reward_model(saved["gpt2"], tokenizer)
    model.config.score_shift = 0.37
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    dials = {"objective": "reward", "reward": str(tmp_path / "reward"), "reference": "bad", "expression": "$x*good"}
    config = make_config(folders, files, tmp_path, **dials, range="x=0:1", grid=2, budget=2, seed=4)
    trial = json.loads((search(config) / "trials.jsonl").read_text().splitlines()[1])
    base = read_base(config.base, "CAUSAL_LM").model
    good, bad = (load_unmerged(base, folders[name]) for name in ("good", "bad"))
    torch.manual_seed(4)
    rollout = generate(good, tokenizer, [row["prompt"] for row in ROWS[:18]], config.sampling)
    rows = (rollout.input_ids, rollout.attention_mask)
    with torch.no_grad():
        scores = reward_model_scores(load_reward_model(tmp_path / "reward"), *rows)
        own, other = (response_logprobs(m, *rows, 8, 1.0, tokenizer.pad_token_id)[0] for m in (good, bad))
    kl = (own - other).masked_fill(~rollout.response_mask, 0).sum(1)
    expected = {"reward": scores.mean().item(), "kl": kl.mean().item()}
    assert {name: trial["figures"][name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_accuracy_is_the_share_of_pairs_whose_right_completion_is_likelier(folders, files, tmp_path, tokenizer):
    out = search(make_config(folders, files, tmp_path, objective="accuracy", expression="$x*good", grid=2, budget=2))
    trial = json.loads((out / "trials.jsonl").read_text().splitlines()[0])
    model = load_unmerged(read_base(str(folders["base"]), "CAUSAL_LM").model, folders["good"])
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


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_the_test_rows_are_read_once_and_measured_after_the_choice(folders, files, tmp_path, monkeypatch):
    files_read, measured = [], []
    measure, read_rows = search_module.measure, eval_rows.read_rows

    def record(weights, rows, context):
        measured.append((json.dumps(weights, sort_keys=True), rows))
        return measure(weights, rows, context)

    monkeypatch.setattr(
        eval_rows, "read_rows", lambda file, *rest: (files_read.append(file), read_rows(file, *rest))[1]
    )
    monkeypatch.setattr(search_module, "measure", record)
    search(make_config(folders, files, tmp_path, constraints="perplexity <= 100*base"))
    assert sorted(files_read) == sorted(files.values())
    on_test = [number for number, (_, rows) in enumerate(measured) if rows is measured[-1][1]]
    assert on_test == list(range(on_test[0], len(measured)))
    weights = [measured[number][0] for number in on_test]
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
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
def test_what_cannot_be_searched_is_refused_and_nothing_is_written(folders, files, tmp_path, dials, message):
    given = {name: files.get(text, text) if name.endswith("file") else text for name, text in dials.items()}
    with pytest.raises(UserError, match=message):
        search(make_config(folders, files, tmp_path, **{"constraints": "perplexity <= 9*base", **given}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("made", "says"), [(True, "scores texts that end with '<bos>'"), (False, "tokenizers differ")])
def test_a_reward_model_that_knows_another_end_is_refused(folders, files, tmp_path, tokenizer, made, says):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<bos>"
    other.save_pretrained(tmp_path / "reward")
    if made:
        (tmp_path / "reward/DONE.json").write_text("{}")
    dials = {"objective": "reward", "reward": str(tmp_path / "reward"), "expression": "$x*good"}
    with pytest.raises(UserError, match=says):
        search(make_config(folders, files, tmp_path, **dials))


@pytest.mark.parametrize("folders", ["ia3"], indirect=True)
def test_vectors_of_different_places_are_refused(folders, files, tmp_path):
    folder = tmp_path / "outputs"
    shutil.copytree(folders["bad"], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["k_proj"]}
    tensors = {key: x for key, x in load_file(folder / "adapter_model.safetensors").items() if "k_proj" in key}
    save_file({key: x.flatten().reshape(1, -1) for key, x in tensors.items()}, folder / "adapter_model.safetensors")
    config |= {"feedforward_modules": ["k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter 'bad': .*k_proj: .*its input"):
        search(make_config({**folders, "bad": folder}, files, tmp_path))
