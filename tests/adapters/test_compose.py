"""Adapters from file to file: the laws on weight updates and on logits, the proof, the lineage, and what is refused.

What is right comes from elsewhere: alpha / r * B A worked out by hand from the raw files, and PEFT's own forward and
merge. Every case has a fresh model.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from pipeline import merge
from pipeline.adapters import compose
from pipeline.adapters.expressions import parse, weighted
from pipeline.adapters.files import read_adapters
from pipeline.config.commands import Compose, Inspect, MergeAdapter, Verify
from pipeline.config.dials import Sampling
from pipeline.config.errors import UserError
from pipeline.config.parse import parse_command
from pipeline.data.tokenizer import train_tokenizer
from pipeline.evaluation.text import word_repetition
from pipeline.models.saving import save_policy

ROOT = Path(__file__).resolve().parent.parent.parent
IDS = torch.tensor([[1, 6, 4, 9, 12, 5, 2], [1, 8, 8, 3, 7, 11, 10]])
LM = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, tuple[str, Callable]] = {
    "plain": ("llama", lambda: LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **LM)),
    "rslora": (
        "llama",
        lambda: LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], **LM),
    ),
    "patterns": (
        "llama",
        lambda: LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["q_proj", "k_proj", "v_proj"],
            rank_pattern={"q_proj": 5},
            alpha_pattern={"v_proj": 7},
            **LM,
        ),
    ),
    "one layer": ("llama", lambda: LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[1], **LM)),
    "regex": ("llama", lambda: LoraConfig(r=2, target_modules=r".*\.mlp\.(up|down)_proj", **LM)),
    "all but": ("llama", lambda: LoraConfig(r=1, target_modules="all-linear", exclude_modules=["o_proj"], **LM)),
    "ia3": ("llama", lambda: IA3Config(**LM)),
    "ia3 keys": ("llama", lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], **LM)),
    "gpt2": ("gpt2", lambda: LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True, **LM)),
    "gpt2 rslora": ("gpt2", lambda: LoraConfig(r=2, use_rslora=True, target_modules=["c_fc", "mlp.c_proj"], **LM)),
    "gpt2 bias": ("gpt2", lambda: LoraConfig(r=2, lora_bias=True, target_modules=["c_attn", "c_fc"], **LM)),
    "gpt2 bias too": ("gpt2", lambda: LoraConfig(r=1, lora_bias=True, target_modules=["c_attn"], **LM)),
    "gpt2 ia3": ("gpt2", lambda: IA3Config(**LM)),
    "gpt2 ia3 attention": ("gpt2", lambda: IA3Config(target_modules=["c_attn"], feedforward_modules=[], **LM)),
}


class Workshop:
    """A folder with two bases and adapters made on demand, each once; `out()` names a folder that is not there yet."""

    def __init__(self, folder: Path, saved: dict[str, Path], make_model: Callable) -> None:
        self.folder, self.bases, self.make_model = folder, saved, make_model
        self.probes = folder / "probes.jsonl"
        rows = [{"prompt": text.strip()} for text in SENTENCES]
        self.probes.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.made = 0

    def adapter(self, name: str, seed: int = 1, size: float = 0.1) -> Path:
        """The folder of an adapter as PEFT writes it, every trainable weight moved by `size` standard deviations."""
        kind, config = CONFIGS[name]
        folder = self.folder / f"{name.replace(' ', '-')}-{seed}-{size}"
        if not folder.is_dir():
            self.trained(config(), kind, seed, size).save_pretrained(str(folder))
        return folder

    def trained(self, config, kind: str, seed: int = 1, size: float = 0.1) -> PeftModel:
        model = get_peft_model(self.make_model(kind), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn_like(parameter))
        return model.eval()

    def out(self) -> Path:
        self.made += 1
        return self.folder / f"out{self.made}"

    def compose(self, text: str, kind: str = "llama", **more) -> Path:
        """compose with the adapters of CONFIGS by letter: p=plain, …"""
        folders = more.pop("folders")
        dials = {"expression": text, "adapters": ",".join(f"{n}={f}" for n, f in folders.items())}
        dials |= {"base": str(self.bases[kind]), "out": str(self.out()), "probe_file": str(self.probes)}
        return compose.compose(Compose(**dials | more))

    def base(self, kind: str):
        return AutoModelForCausalLM.from_pretrained(self.bases[kind], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shop(tmp_path_factory, saved, make_model) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("shop"), saved, make_model)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits.double()


def applied(shop: Workshop, kind: str, folder: Path):
    """What PEFT computes from base and adapter file."""
    return logits(PeftModel.from_pretrained(shop.base(kind), str(folder)))


def assert_logits(actual, expected, share=1e-5):
    assert (actual - expected).abs().max() <= share * expected.abs().max()


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """By module: alpha / r (rsLoRA: alpha / sqrt(r)) * B A of the raw file, or l - 1; a bias: <module>.bias."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            r = tensor.shape[0]
            patterns = [alpha for name, alpha in config["alpha_pattern"].items() if module.endswith(name)]
            alpha = patterns[0] if patterns else config["lora_alpha"]
            scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
            found[module] = scale * b.double() @ tensor.double()
            if (bias := tensors.get(key.replace("lora_A.weight", "lora_B.bias"))) is not None:
                found[f"{module}.bias"] = scale * bias.double()
        elif key.endswith(".ia3_l"):
            found[key.removeprefix("base_model.model.").removesuffix(".ia3_l")] = tensor.double() - 1
    return found


def weighed(terms: dict[str, float], folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The weighted sum of dense changes, from the raw files."""
    total: dict[str, torch.Tensor] = {}
    for name, weight in terms.items():
        for module, change in by_hand(folders[name]).items():
            total[module] = total.get(module, 0) + weight * change
    return total


def expected_logits(shop: Workshop, kind: str, change: dict[str, torch.Tensor], is_ia3: bool):
    """Logits of a plain model, in float64, with the change put into its weights by hand."""
    model = shop.base(kind).double()
    with torch.no_grad():
        for module, delta in change.items():
            name, is_bias = module.removesuffix(".bias"), module.endswith(".bias")
            layer = model.get_submodule(name)
            conv = kind == "gpt2"  # its weights are (in, out)
            if not is_ia3:
                target = layer.bias if is_bias else layer.weight
                target.add_(delta.T if conv and not is_bias else delta)
                continue
            l = 1 + delta  # noqa: E741  # (out, 1), or (1, in) of a feed-forward module
            layer.weight.mul_(l.T if conv else l)
            if l.shape[1] == 1 and layer.bias is not None:
                layer.bias.mul_(l[:, 0])
    return logits(model)


def assert_change(folder: Path, expected: dict[str, torch.Tensor], tolerance=1e-6):
    found = by_hand(folder)
    assert found.keys() >= expected.keys()
    for module, change in found.items():
        wanted = expected.get(module, torch.zeros_like(change))
        assert (change - wanted).abs().max() <= tolerance * max(1e-3, float(wanted.abs().max()))


# the laws, on updates and on logits; that an adapter alone is itself comes first


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_alone_is_itself(shop, name):
    kind, folder = CONFIGS[name][0], shop.adapter(name)
    out = shop.compose("a", kind, folders={"a": folder})
    assert_change(out, by_hand(folder))
    assert_logits(applied(shop, kind, out), applied(shop, kind, folder))


PAIRS = (("plain", "rslora"), ("patterns", "one layer"), ("ia3", "ia3 keys"), ("gpt2", "gpt2 rslora"),
         ("gpt2 bias", "gpt2 bias too"), ("gpt2 ia3", "gpt2 ia3 attention"))  # fmt: skip
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
def test_the_laws(shop, text, first, second):
    kind = CONFIGS[first][0]
    folders = {"a": shop.adapter(first), "b": shop.adapter(second, 2), "c": shop.adapter(first, 3)}
    out = shop.compose(text, kind, folders=folders)
    change = weighed(LAWS[text], folders)
    assert_change(out, change)
    assert_logits(applied(shop, kind, out), expected_logits(shop, kind, change, "ia3" in first))
    if text == "a - a":
        assert torch.equal(applied(shop, kind, out), logits(shop.base(kind)))


@pytest.mark.parametrize("names", [("plain", "rslora", "regex"), ("ia3", "ia3 keys", "ia3")])
def test_the_order_changes_no_bit(shop, names):
    folders = {n: shop.adapter(name, seed) for seed, (n, name) in enumerate(zip("abc", names, strict=True), 1)}
    first, second = (shop.compose(text, folders=folders) for text in ("a + 2*b - c", "2*b - (c - a)"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_adapter_merged_and_reloaded_are_one(shop, first, second):
    kind = CONFIGS[first][0]
    folders = {"a": shop.adapter(first), "b": shop.adapter(second, 2)}
    out = shop.compose("a - 0.4*b", kind, folders=folders)
    model = compose.merge(MergeAdapter(adapter=str(out), out=str(shop.out()), probe_file=str(shop.probes)))
    expected = expected_logits(shop, kind, weighed({"a": 1, "b": -0.4}, folders), "ia3" in first)
    assert not list(model.glob("adapter*"))
    assert_logits(logits(AutoModelForCausalLM.from_pretrained(model)), expected)
    assert_logits(applied(shop, kind, out), expected)
    again = shop.compose("a", kind, folders={"a": out})
    assert_logits(applied(shop, kind, again), expected)


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
def test_any_two_adapters_add_up(shop, config_a, config_b, weight, seed):
    folders = {"a": shop.folder / "any-a", "b": shop.folder / "any-b"}
    for place, (name, config) in enumerate((("a", config_a), ("b", config_b))):
        shop.trained(copy.deepcopy(config), "llama", seed + place).save_pretrained(str(folders[name]))
    out = shop.compose(f"a + ({weight})*b", folders=folders)
    change = weighed({"a": 1, "b": weight}, folders)
    assert_change(out, change, 3e-6)
    assert_logits(applied(shop, "llama", out), expected_logits(shop, "llama", change, False))


def test_a_mixture_is_every_sum_without_writing_one(shop):
    for kind, first, second in (
        ("llama", "plain", "rslora"),
        ("llama", "ia3", "ia3 keys"),
        ("gpt2", "gpt2", "gpt2 rslora"),
    ):
        folders = {"x.1": shop.adapter(first), "b": shop.adapter(second, 2)}
        base = shop.base(kind)
        mixture = compose.Mixture(base, folders)
        for weights in ({"x.1": 1.0, "b": 0.5}, {"x.1": -0.3}, {}, {"b": 2.0}):
            mixture.set(weights)
            expected = expected_logits(shop, kind, weighed(weights, folders), "ia3" in first)
            assert_logits(logits(mixture.model), expected)
        assert torch.equal(logits(base), logits(shop.base(kind)))


# the file that is written


def test_the_file_is_plain(shop):
    folders = {"a": shop.adapter("patterns"), "b": shop.adapter("rslora", 2)}
    out = shop.compose("a + b", folders=folders)
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 9  # 5 of the pattern + 4
    assert (config["use_rslora"], config["use_dora"], config["lora_bias"]) == (False, False, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["init_lora_weights"]) == ({}, {}, True)
    assert (config["modules_to_save"], config["base_model_name_or_path"]) == (None, None)
    modules = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}
    assert config["target_modules"] == sorted(modules)
    assert "model.layers.0.self_attn.q_proj" in modules
    assert {tensor.shape[0] if "lora_A" in key else tensor.shape[1] for key, tensor in tensors.items()} == {9}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "composition.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.parametrize(("name", "is_stored_in_by_out"), [("plain", False), ("gpt2", True), ("gpt2 ia3", True)])
def test_the_config_says_how_the_weights_lie(shop, name, is_stored_in_by_out):
    """PEFT mends a wrong fan_in_fan_out with a warning; other loaders may not."""
    out = shop.compose("a", CONFIGS[name][0], folders={"a": shop.adapter(name)})
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is is_stored_in_by_out


def test_nothing_is_a_rank_1_adapter_of_zeros(shop):
    for text in ("a - a", "base", "0*a"):
        out = shop.compose(text, folders={"a": shop.adapter("plain")})
        tensors = load_file(out / "adapter_model.safetensors")
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 1
        assert len(tensors) == 8
        assert not any(tensor.any() for tensor in tensors.values())
        assert torch.equal(applied(shop, "llama", out), logits(shop.base("llama")))


def test_equal_factors_need_no_more_ranks_than_one(shop):
    """The sum of an adapter and one with its A: Σr ranks side by side, half of them for nothing."""
    a = shop.adapter("plain")
    twin = shop.folder / "twin"
    shutil.copytree(a, twin, dirs_exist_ok=True)
    tensors = load_file(a / "adapter_model.safetensors")
    save_file({k: t * 2 - 1 if "lora_B" in k else t for k, t in tensors.items()}, twin / "adapter_model.safetensors")
    out = shop.compose("a - 0.3*t", folders={"a": a, "t": twin})
    lineage = json.loads((out / "composition.json").read_text())
    assert (lineage["rank"], lineage["method"]) == (3, "compressed")
    assert_change(out, weighed({"a": 1, "t": -0.3}, {"a": a, "t": twin}))
    report = compose.verify(Verify(adapter=str(out), prompts_file=""))
    assert report["error"] <= 1e-6


def test_a_rank_costs_the_tail_that_was_predicted(shop):
    folders = {"a": shop.adapter("plain"), "b": shop.adapter("rslora", 2)}
    out = shop.compose("a + b", folders=folders, rank=4, max_loss=1.0)
    lineage = json.loads((out / "composition.json").read_text())
    exact, found = weighed({"a": 1, "b": 1}, folders), by_hand(out)
    assert lineage["discarded"].keys() == exact.keys()
    for module, change in exact.items():
        spectrum = torch.linalg.svdvals(change).square()
        tail = (spectrum[4:].sum() / spectrum.sum()).item()
        lost = ((found[module] - change).norm() / change.norm()).item() ** 2
        assert lineage["discarded"][module] == pytest.approx(tail, rel=1e-6, abs=1e-14)
        assert lost == pytest.approx(tail, rel=1e-4, abs=1e-12)
    assert max(lineage["discarded"].values()) > 0.01
    before = sorted(shop.folder.iterdir())
    with pytest.raises(
        UserError, match=r"rank: 4 ranks lose 0\.\d+ of \|dW\|\^2 in model\.layers.*more than max_loss 0.01"
    ):
        shop.compose("a + b", folders=folders, rank=4)
    with pytest.raises(UserError, match=r"max_rank: the result has 7 ranks, more than 6"):
        shop.compose("a + b", folders=folders, max_rank=6)
    assert sorted(shop.folder.iterdir()) == before


@pytest.mark.parametrize("text", ["ties(a, -b, density=0.3)", "b - 0.5*dare(a, 0.9, seed=4)", "paper(0.5*a + 0.5*c)"])
def test_functions_of_whole_updates_are_written_as_they_are(shop, text):
    folders = {"a": shop.adapter("plain"), "b": shop.adapter("rslora", 2), "c": shop.adapter("plain", 3)}
    out = shop.compose(text, folders=folders)
    read, _ = read_adapters(folders, str(shop.bases["llama"]))
    update = compose.algebra.evaluate(parse(text), {name: adapter.update for name, adapter in read.items()})
    assert_change(out, {module: part.b @ part.a for module, part in update.items()})
    report = compose.verify(Verify(adapter=str(out), prompts_file=""))
    assert report["error"] <= (0 if "paper" in text else 1e-6)
    assert report["method"] == ("exact" if "paper" in text else "compressed")


# half precision


def test_rounding_that_drowns_the_adapter_is_refused(shop):
    folders = {"i": shop.adapter("ia3", 1, 0.002)}
    before = sorted(shop.folder.iterdir())
    with pytest.raises(UserError) as refused:
        shop.compose("i", folders=folders, dtype="bf16")
    assert "dtype: rounding changes" in str(refused.value)
    assert "--dtype fp32, or --allow_drift true" in str(refused.value)
    assert sorted(shop.folder.iterdir()) == before
    out = shop.compose("i", folders=folders, dtype="bf16", allow_drift=True)
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "composition.json").read_text())["proof"]["drift"] > 0.05


def test_the_drift_is_that_of_the_model_that_would_be_served(shop):
    folders = {"a": shop.adapter("plain", 1, 0.5)}
    out = shop.compose("0.5*a", folders=folders, dtype="fp16")
    drift = json.loads((out / "composition.json").read_text())["proof"]["drift"]
    rows = [json.loads(line)["prompt"] for line in shop.probes.read_text().splitlines()]

    def all_logits(model):
        _, ground = read_adapters(folders, str(shop.bases["llama"]))
        return compose.probe(model, ground.tokenizer, rows)

    def halved(model):
        return model.half().float()

    base = halved(shop.base("llama"))
    plain, exact = all_logits(base), copy.deepcopy(base)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(out)).merge_and_unload()
    with torch.no_grad():
        for module, change in weighed({"a": 0.5}, folders).items():
            exact.get_submodule(module).weight.add_(change.float())
    expected = all_logits(exact)
    error = (all_logits(halved(merged)) - expected).abs().max() / (expected - plain).abs().max()
    assert drift == pytest.approx(error.item(), rel=0.05)
    assert 0 < drift < 0.05
    model = compose.merge(
        MergeAdapter(adapter=str(out), out=str(shop.out()), probe_file=str(shop.probes), dtype="fp16")
    )
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {torch.float16}


def test_a_proof_that_fails_writes_nothing(shop, monkeypatch):
    before = sorted(shop.folder.iterdir())
    monkeypatch.setattr(compose, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match="merging changes the logits by"):
        shop.compose("a", folders={"a": shop.adapter("plain")})
    monkeypatch.undo()
    scaled = compose.Mixture.set
    monkeypatch.setattr(compose.Mixture, "set", lambda self, w: scaled(self, {n: 1.01 * x for n, x in w.items()}))
    with pytest.raises(UserError, match="differs from its parents side by side"):
        shop.compose("a", folders={"a": shop.adapter("plain")})
    assert sorted(shop.folder.iterdir()) == before


# lineage


def test_the_lineage_says_all_that_it_was_made_from(shop):
    folders = {"a": shop.adapter("plain"), "b": shop.adapter("rslora", 2), "unused": shop.folder / "nowhere"}
    out = shop.compose(".5*a+b", folders=folders)
    lineage = json.loads((out / "composition.json").read_text())
    assert (lineage["expression"], lineage["method"], lineage["rank"]) == ("0.5*a + b", "exact", 7)
    assert lineage["parents"].keys() == {"a", "b"}
    for name, parent in lineage["parents"].items():
        assert (out / parent["path"]).resolve() == folders[name].resolve()
        for file, digest in parent["sha256"].items():
            assert compose.file_hashes(folders[name])[file] == digest
    assert lineage["proof"]["merged"] < 1e-5
    assert lineage["proof"]["mixed"] < 1e-5
    assert lineage["proof"]["effect"] > 1e-3
    assert lineage["versions"].keys() == {"torch", "transformers", "peft"}
    again = shop.compose("2*c", folders={"c": out})
    assert json.loads((again / "composition.json").read_text())["parents"]["c"]["lineage"] == "0.5*a + b"


def test_verify_makes_it_anew_also_where_it_was_moved(shop, tmp_path):
    inside = tmp_path / "first"
    for name in ("plain", "rslora"):
        shutil.copytree(shop.adapter(name), inside / name)
    folders = {"a": inside / "plain", "b": inside / "rslora"}
    shutil.copytree(shop.bases["llama"], inside / "base")
    out = shop.compose("a - 0.1*b", folders=folders, base=str(inside / "base"), out=str(inside / "made"))
    assert compose.verify(Verify(adapter=str(out), prompts_file=""))["error"] == 0
    moved = inside.rename(tmp_path / "second")
    assert compose.verify(Verify(adapter=str(moved / "made"), prompts_file=""))["error"] == 0
    (moved / "plain").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"adapter 'a': .*no such folder"):
        compose.verify(Verify(adapter=str(moved / "made"), prompts_file=""))
    dials = {"adapter": str(moved / "made"), "prompts_file": "", "adapters": f"a={tmp_path / 'elsewhere'}"}
    assert compose.verify(Verify(**dials))["error"] == 0
    with pytest.raises(UserError, match=r"adapter 'a': .*not the file that .* was made from \(sha256 differs\)"):
        compose.verify(Verify(**dials | {"adapters": f"a={moved / 'rslora'}"}))
    retensor(moved / "made", by_one_bit)
    with pytest.raises(UserError, match="not as it was written"):
        compose.verify(Verify(**dials))
    lineage = json.loads((moved / "made" / "composition.json").read_text())
    lineage["files"] = compose.file_hashes(moved / "made")  # forged, so only making it anew can tell
    (moved / "made" / "composition.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match="made anew from its parents it differs by"):
        compose.verify(Verify(**dials))


def test_verify_treats_long_prompts_as_the_dial_says(shop):
    out = shop.compose("a", folders={"a": shop.adapter("plain")})
    short = Sampling(max_new_tokens=4, max_prompt_tokens=2, long_prompts="error")
    with pytest.raises(UserError, match="prompts are longer than 2 tokens: raise max_prompt_tokens"):
        compose.verify(Verify(adapter=str(out), prompts_file=str(shop.probes), prompts=4, sampling=short))


def test_verify_says_what_parents_and_result_write(shop, tokenizer, capsys):
    out = shop.compose("a + b", folders={"a": shop.adapter("plain"), "b": shop.adapter("rslora", 2)})
    report = compose.verify(Verify(adapter=str(out), prompts_file=str(shop.probes), prompts=4))
    assert report["writes"].keys() == {"base", "a", "b", "result"}
    for figures in report["writes"].values():
        assert figures.keys() == {"vader", "repetition", "duplicates", "perplexity"}
        assert math.isfinite(figures["perplexity"])
    assert report["writes"]["a"]["perplexity"] != report["writes"]["result"]["perplexity"]
    assert "identical to the bit" in capsys.readouterr().out
    # the result's own figures, from stock generation
    model = PeftModel.from_pretrained(shop.base("llama"), str(out)).eval()
    prompts = [json.loads(line)["prompt"] for line in shop.probes.read_text().splitlines()]
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    torch.manual_seed(0)
    made = model.generate(**ids, max_new_tokens=40, do_sample=True, top_k=0, top_p=1.0, suppress_tokens=[0])
    texts = tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    repetition = sum(map(word_repetition, texts)) / len(texts)
    assert report["writes"]["result"]["repetition"] == pytest.approx(repetition)


def test_inspect_measures_against_the_dense_update(shop, capsys):
    a, b = shop.adapter("plain"), shop.adapter("rslora", 2)
    found = compose.inspect(Inspect(adapter=str(a), against=str(b), base=str(shop.bases["llama"])))
    assert (found["kind"], found["rank"], found["alpha"], found["rslora"]) == ("LORA", 3, 5, False)
    x, y = by_hand(a), by_hand(b)
    for module, row in found["modules"].items():
        weight = shop.base("llama").get_submodule(module).weight
        assert row["norm"] == pytest.approx(x[module].norm().item())
        assert row["of_weight"] == pytest.approx((x[module].norm() / weight.norm()).item())
        if module in y:
            assert row["cosine"] == pytest.approx(
                ((x[module] * y[module]).sum() / x[module].norm() / y[module].norm()).item()
            )
    assert sum("cosine" in row for row in found["modules"].values()) == 2
    out = shop.compose("a + b", folders={"a": a, "b": b})
    compose.inspect(Inspect(adapter=str(out)))
    assert "made from a + b (exact)" in capsys.readouterr().out


# heads


@pytest.fixture(scope="module")
def classifiers(shop, tokenizer) -> dict[str, Path]:
    """Two adapters of a sequence classifier, each with its own score head, on the saved llama."""
    found = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification.from_pretrained(shop.bases["llama"], num_labels=1).eval()
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        found["ab"[seed - 1]] = shop.folder / f"classifier{seed}"
        peft.save_pretrained(str(found["ab"[seed - 1]]))
    return found


def scores(shop, folder, tokenizer):
    base = AutoModelForSequenceClassification.from_pretrained(shop.bases["llama"], num_labels=1)
    return logits(PeftModel.from_pretrained(base, str(folder)))


@pytest.mark.parametrize("rule", ["first", "sum"])
def test_a_classifier_keeps_its_head(shop, classifiers, tokenizer, rule):
    out = shop.compose("b", folders=classifiers, heads=rule)
    assert_logits(scores(shop, out, tokenizer), scores(shop, classifiers["b"], tokenizer))
    model = compose.merge(MergeAdapter(adapter=str(out), out=str(shop.out()), probe_file=str(shop.probes)))
    merged = AutoModelForSequenceClassification.from_pretrained(model)
    assert_logits(logits(merged), scores(shop, classifiers["b"], tokenizer))


def test_heads_are_averaged_with_their_adapters(shop, classifiers):
    out = shop.compose("0.25*a + 0.75*b", folders=classifiers, heads="sum")
    a, b, both = (load_file(folder / "adapter_model.safetensors") for folder in (*classifiers.values(), out))
    key = "base_model.model.score.weight"
    torch.testing.assert_close(both[key], 0.25 * a[key] + 0.75 * b[key])
    assert_change(out, weighed({"a": 0.25, "b": 0.75}, classifiers))


def test_reward_models_are_averaged_on_the_base_that_lies_with_each(shop, folder):
    """As the reward stage writes them: the base beside the adapter holds that adapter's own head."""
    own = folder / "parents_lora/reward/final"
    other = shop.folder / "another_reward"
    shutil.copytree(own, other)
    (other / "DONE.json").unlink()
    torch.manual_seed(3)
    head = torch.randn(1, 16)
    for file, key in (("model", "score.weight"), ("adapter_model", "base_model.model.score.weight")):
        tensors = load_file(other / f"{file}.safetensors")
        tensors = {k: w + 0.1 * torch.randn_like(w) if "lora_" in k else w for k, w in tensors.items()} | {key: head}
        save_file(tensors, other / f"{file}.safetensors", metadata={"format": "pt"})
    places, prompts = {"a": own, "b": other}, str(folder / "prompts.jsonl")
    out = shop.compose("0.25*a + 0.75*b", folders=places, heads="sum", base="", probe_file=prompts)
    first, second, both = (load_file(place / "adapter_model.safetensors") for place in (own, other, out))
    key = "base_model.model.score.weight"
    torch.testing.assert_close(both[key], 0.25 * first[key] + 0.75 * second[key])
    assert_change(out, weighed({"a": 0.25, "b": 0.75}, places))


# what is refused, in a sentence, and nothing is written


def edit(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def retensor(folder: Path, change: Callable) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def q_proj(layer: int, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"


def with_nan(tensors):
    tensors[q_proj(1, "B")][0, 0] = float("nan")


def with_inf(tensors):
    tensors[q_proj(0, "A")][1, 2] = float("inf")


def without_key(tensors):
    del tensors[q_proj(1, "A")]


def by_one_bit(tensors):
    first = tensors[q_proj(0, "A")]
    first[0, 0] = first[0, 0].nextafter(torch.tensor(9.0))


def with_key(tensors):
    tensors[q_proj(7, "A")] = torch.zeros(3, 16)


def wider(tensors):
    tensors[q_proj(0, "A")] = torch.zeros(3, 17)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


SPOILED = {
    "dora": (lambda f: edit(f, use_dora=True), "adapter 'b': use_dora: True: no plain LORA update"),
    "type": (lambda f: edit(f, peft_type="VERA"), "adapter 'b': peft_type: VERA; expected one of LORA, IA3"),
    "task": (lambda f: edit(f, task_type="SEQ_2_SEQ_LM"), "adapter 'b': task_type: SEQ_2_SEQ_LM; expected one of"),
    "other task": (lambda f: edit(f, task_type="SEQ_CLS"), "adapter 'b': task_type: SEQ_CLS, but 'a' is CAUSAL_LM"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), "adapter 'b': init_lora_weights: pissa took a part"),
    "olora": (lambda f: edit(f, init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "biases": (lambda f: edit(f, bias="all"), "adapter 'b': bias: all: no plain LORA update"),
    "tokens": (lambda f: edit(f, trainable_token_indices=[3]), "adapter 'b': trainable_token_indices: [3]"),
    "experts": (lambda f: edit(f, target_parameters=["w"]), "adapter 'b': target_parameters: ['w']"),
    "unheard of": (lambda f: edit(f, use_magic=True), "adapter 'b': use_magic: True: no plain LORA update"),
    "targets": (lambda f: edit(f, target_modules=["nowhere"]), "adapter 'b': target_modules: PEFT cannot put it on"),
    "embedding": (
        lambda f: edit(f, target_modules=["embed_tokens"]),
        "adapter 'b': target_modules: model.embed_tokens is a Embedding; only linear layers",
    ),
    "rank": (lambda f: edit(f, r=4), "shape (3, 16), but (4, 16) on"),
    "bias": (lambda f: edit(f, lora_bias=True), "adapter 'b': lora_bias: model.layers.0.self_attn.q_proj has no bias"),
    "nan": (lambda f: retensor(f, with_nan), f"adapter 'b': {q_proj(1, 'B')}: has NaN or infinite numbers"),
    "inf": (lambda f: retensor(f, with_inf), f"adapter 'b': {q_proj(0, 'A')}: has NaN or infinite numbers"),
    "missing": (lambda f: retensor(f, without_key), f"adapter 'b': {q_proj(1, 'A')}: missing in"),
    "surplus": (lambda f: retensor(f, with_key), f"adapter 'b': {q_proj(7, 'A')}: surplus in"),
    "shape": (lambda f: retensor(f, wider), f"adapter 'b': {q_proj(0, 'A')}: shape (3, 17), but (3, 16) on"),
    "pickle": (pickled, "a pickle can run any code when it is read; save the adapter again with safe_serialization"),
    "truncated": (truncated, "adapter_model.safetensors: not readable:"),
    "json": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not readable as JSON"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "it holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "it holds no adapter_model.safetensors"),
    "gone": (shutil.rmtree, "adapter 'b': "),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_adapter_is_refused(shop, tmp_path, how):
    spoil, message = SPOILED[how]
    spoiled = tmp_path / "spoiled"
    shutil.copytree(shop.adapter("plain"), spoiled)
    spoil(spoiled)
    refused(shop, tmp_path, message, folders={"a": shop.adapter("plain", 3), "b": spoiled})


def refused(shop: Workshop, tmp_path: Path, message: str, text: str = "a + b", kind: str = "llama", **more) -> None:
    """The command ends with this message, one sentence, and leaves nothing behind."""
    made = tmp_path / "made"
    with pytest.raises(UserError) as found:
        shop.compose(text, kind, **{"out": str(made / "here"), **more})
    assert message in str(found.value)
    assert "\n" not in str(found.value) or "^" in str(found.value)
    assert not made.exists()


def test_lora_and_ia3_are_not_added(shop, tmp_path):
    folders = {"a": shop.adapter("plain"), "b": shop.adapter("ia3")}
    refused(shop, tmp_path, "adapter 'b': peft_type: IA3, but 'a' is LORA", folders=folders)


def test_another_base_is_refused(shop, make_model, tokenizer, tmp_path):
    plain, own = shop.adapter("plain"), tmp_path / "own"
    save_policy(make_model("llama", seed=1), tokenizer, own)  # the same shapes
    for file in plain.iterdir():
        shutil.copy(file, own / file.name)
    refused(shop, tmp_path, "adapter 'b': base_model: it was trained on", folders={"a": plain, "b": own})
    refused(shop, tmp_path, "adapter 'a': its folder holds no base model", folders={"a": plain, "b": own}, base="")
    by_name = tmp_path / "by-name"
    shutil.copytree(plain, by_name)
    edit(by_name, base_model_name_or_path=str(own))
    refused(shop, tmp_path, f"it was trained on {own}", folders={"a": plain, "b": by_name})
    edit(by_name, base_model_name_or_path=str(shop.bases["gpt2"]))
    refused(shop, tmp_path, "a gpt2, but", folders={"a": plain, "b": by_name})
    composed = shop.compose("a", folders={"a": plain})
    shutil.rmtree(own)
    save_policy(make_model("llama", seed=1), tokenizer, own)
    refused(shop, tmp_path, "which is not", folders={"a": plain, "b": composed}, base=str(own))
    copied = tmp_path / "far" / "away"
    shutil.copytree(composed, copied)  # from there its lineage's path leads nowhere
    refused(shop, tmp_path, "it was composed on another base", folders={"a": plain, "b": copied}, base=str(own))


def test_the_same_base_elsewhere_is_the_same(shop, tmp_path):
    """Equal weights are one base, wherever they lie: a folder with its own base adds to one that is given it."""
    own = tmp_path / "own"
    shutil.copytree(shop.bases["llama"], own)
    for file in shop.adapter("rslora", 2).iterdir():
        shutil.copy(file, own / file.name)
    shutil.copytree(own, tmp_path / "copy")
    for base, first in (("", tmp_path / "copy"), (str(shop.bases["llama"]), shop.adapter("plain"))):
        folders = {"a": first, "b": own}
        out = shop.compose("a + b", folders=folders, base=base)
        assert_change(out, weighed({"a": 1, "b": 1}, folders))


def test_a_base_that_cannot_be_used_is_refused(shop, tmp_path):
    folders = {"a": shop.adapter("plain"), "b": shop.adapter("plain", 3)}
    refused(
        shop,
        tmp_path,
        "adapter 'a': its folder holds no base model and names none; say --base",
        folders=folders,
        base="",
    )
    refused(shop, tmp_path, "target_modules: PEFT cannot put it on", folders=folders, base=str(shop.bases["gpt2"]))
    quantised = tmp_path / "quantised"
    shutil.copytree(shop.bases["llama"], quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    refused(shop, tmp_path, "quantization_config: its weights are quantised", folders=folders, base=str(quantised))
    refused(shop, tmp_path, "no model can be loaded from it", folders=folders, base=str(tmp_path / "nothing"))


def test_tied_weights_are_refused(shop, tmp_path):
    for number, settings_of in enumerate(
        ({"target_modules": ["lm_head"]}, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]})
    ):
        folder = tmp_path / f"tied{number}"
        shop.trained(LoraConfig(r=2, **settings_of, **LM), "gpt2").save_pretrained(str(folder))
        field = list(settings_of)[-1]
        message = f"adapter 'a': {field}: lm_head shares its weight with another module (tied embeddings)"
        refused(shop, tmp_path, message, "a", "gpt2", folders={"a": folder})


def test_another_tokenizer_is_refused(shop, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(shop.adapter("plain"), folder)
    train_tokenizer("char", ["quite other letters: xyz"], 40).save_pretrained(folder)
    refused(shop, tmp_path, "adapter 'a': tokenizer: ", "a", folders={"a": folder})


def test_an_unfinished_stage_is_refused(shop, tmp_path):
    shutil.copytree(shop.adapter("plain"), tmp_path / "ppo" / "final")
    refused(
        shop, tmp_path, "not finished (no DONE.json there): run ppo first", "a", folders={"a": tmp_path / "ppo/final"}
    )


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
def test_a_command_that_cannot_be_run_is_refused(shop, tmp_path, text, more, message):
    refused(shop, tmp_path, message, text, folders={"a": shop.adapter("plain"), "b": shop.adapter("rslora", 2)}, **more)


def test_a_head_is_refused_unless_a_rule_is_given(shop, classifiers, tmp_path):
    refused(shop, tmp_path, "modules_to_save: it has whole trained layers (score.weight)", folders=classifiers)
    refused(shop, tmp_path, "heads can only be averaged", folders=classifiers, heads="sum")


def test_what_is_there_is_never_overwritten(shop, tmp_path):
    for there in (tmp_path / "file", tmp_path / "folder"):
        there.mkdir() if there.name == "folder" else there.write_text("mine")
        with pytest.raises(UserError, match="there is something already, and it is not overwritten"):
            shop.compose("a", folders={"a": shop.adapter("plain")}, out=str(there))
        with pytest.raises(UserError, match="there is something already"):
            compose.merge(MergeAdapter(adapter=str(shop.adapter("plain")), out=str(there)))
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []


def test_verify_wants_a_composed_adapter(shop):
    with pytest.raises(UserError, match="no adapter made by compose"):
        compose.verify(Verify(adapter=str(shop.adapter("plain"))))


# the command line


def test_an_expression_stands_first_and_may_begin_with_a_sign():
    for text in ("a - b", "-a + b", "--a - b", "-(a)"):
        assert parse_command(Compose, "stages/merge.py compose", [text, "--out", "x"]).expression == text
    config = parse_command(Compose, "stages/merge.py compose", ["--expression=-a", "--rank", "4"])
    assert (config.expression, config.rank, config.dtype) == ("-a", 4, "fp32")
    assert list(weighted(parse(config.expression)).values()) == [-1]


def test_dials_of_a_command_are_checked(capsys):
    for argv, message in (
        (["a", "--dtype", "fp8"], "expected one of fp32, bf16, fp16"),
        (["a", "--rnak", "3"], "'rank'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_command(Compose, "stages/merge.py compose", argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_shell_says_one_sentence(shop):
    command = [sys.executable, "stages/merge.py", "compose", "a + b*b", "--adapters", f"a={shop.adapter('plain')},b=b"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["--out", str(shop.folder / "never")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expression: '*' stands between two adapters")
    assert not (shop.folder / "never").exists()


def test_the_stage_without_a_command_probes_alike():
    assert merge.probe is compose.probe
