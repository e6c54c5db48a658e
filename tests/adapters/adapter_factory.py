"""Adapters made on demand, and what they do to weights and logits, worked out without the code under test.

What is right comes from elsewhere: alpha / r * B A worked out by hand from the raw files, and PEFT's own forward and
merge. Every case has a fresh model.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.adapters.compose import compose
from pipeline.config.commands import Compose
from pipeline.config.errors import UserError

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
PAIRS = (("plain", "rslora"), ("patterns", "one layer"), ("ia3", "ia3 keys"), ("gpt2", "gpt2 rslora"),
         ("gpt2 bias", "gpt2 bias too"), ("gpt2 ia3", "gpt2 ia3 attention"))  # fmt: skip


class AdapterFactory:
    """A folder with two bases, and adapters that are made on demand, each once."""

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
            self.make_peft_model(config(), kind, seed, size).save_pretrained(str(folder))
        return folder

    def make_peft_model(self, config, kind: str, seed: int = 1, size: float = 0.1) -> PeftModel:
        model = get_peft_model(self.make_model(kind), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn_like(parameter))
        return model.eval()

    def new_folder(self) -> Path:
        """A folder that is not there yet."""
        self.made += 1
        return self.folder / f"out{self.made}"

    def compose(self, text: str, kind: str = "llama", **more) -> Path:
        """compose with the adapters of CONFIGS by letter: p=plain, …"""
        folders = more.pop("folders")
        dials = {"expression": text, "adapters": ",".join(f"{n}={f}" for n, f in folders.items())}
        dials |= {"base": str(self.bases[kind]), "out": str(self.new_folder()), "probe_file": str(self.probes)}
        return compose(Compose(**dials | more))

    def base(self, kind: str):
        return AutoModelForCausalLM.from_pretrained(self.bases[kind], dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits.double()


def adapter_logits(factory: AdapterFactory, kind: str, folder: Path):
    """What PEFT computes from base and adapter file."""
    return logits(PeftModel.from_pretrained(factory.base(kind), str(folder)))


def assert_logits(actual, expected, share=1e-5):
    assert (actual - expected).abs().max() <= share * expected.abs().max()


def dense_changes(folder: Path) -> dict[str, torch.Tensor]:
    """By module: alpha / r (rsLoRA: alpha / sqrt(r)) * B A of the raw file, or l - 1; a bias: <module>.bias."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            r = tensor.shape[0]
            patterns = [alpha for name, alpha in config["alpha_pattern"].items() if module.endswith(name)]
            alpha = patterns[0] if patterns else config["lora_alpha"]
            scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
            changes[module] = scale * b.double() @ tensor.double()
            if (bias := tensors.get(key.replace("lora_A.weight", "lora_B.bias"))) is not None:
                changes[f"{module}.bias"] = scale * bias.double()
        elif key.endswith(".ia3_l"):
            changes[key.removeprefix("base_model.model.").removesuffix(".ia3_l")] = tensor.double() - 1
    return changes


def weighted_changes(terms: dict[str, float], folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The weighted sum of dense changes, from the raw files."""
    total: dict[str, torch.Tensor] = {}
    for name, weight in terms.items():
        for module, change in dense_changes(folders[name]).items():
            total[module] = total.get(module, 0) + weight * change
    return total


def logits_by_hand(factory: AdapterFactory, kind: str, change: dict[str, torch.Tensor], is_ia3: bool):
    """Logits of a plain model, in float64, with the change put into its weights by hand."""
    model = factory.base(kind).double()
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
    changes = dense_changes(folder)
    assert changes.keys() >= expected.keys()
    for module, change in changes.items():
        wanted = expected.get(module, torch.zeros_like(change))
        assert (change - wanted).abs().max() <= tolerance * max(1e-3, float(wanted.abs().max()))


def classifier_logits(factory, folder, tokenizer):
    base = AutoModelForSequenceClassification.from_pretrained(factory.bases["llama"], num_labels=1)
    return logits(PeftModel.from_pretrained(base, str(folder)))


def assert_refused(
    factory: AdapterFactory, tmp_path: Path, message: str, text: str = "a + b", kind: str = "llama", **more
) -> None:
    """The command ends with this message, one sentence, and leaves nothing behind."""
    made = tmp_path / "made"
    with pytest.raises(UserError) as refusal:
        factory.compose(text, kind, **{"out": str(made / "here"), **more})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value) or "^" in str(refusal.value)
    assert not made.exists()


def edit_config(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def q_proj(layer: int, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"


def change_one_bit(tensors):
    first = tensors[q_proj(0, "A")]
    first[0, 0] = first[0, 0].nextafter(torch.tensor(9.0))
