"""The files that are written: plain, as PEFT's own, and never over others."""

import json

import pytest
import torch
from adapter_factory import CONFIGS, adapter_logits, logits
from safetensors.torch import load_file

from pipeline.adapters.merge import merge
from pipeline.config.commands import MergeAdapter
from pipeline.config.errors import UserError


def test_the_file_is_plain(factory):
    folders = {"a": factory.adapter("patterns"), "b": factory.adapter("rslora", 2)}
    out = factory.compose("a + b", folders=folders)
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
def test_the_config_says_how_the_weights_lie(factory, name, is_stored_in_by_out):
    """PEFT mends a wrong fan_in_fan_out with a warning; other loaders may not."""
    out = factory.compose("a", CONFIGS[name][0], folders={"a": factory.adapter(name)})
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is is_stored_in_by_out


def test_nothing_is_a_rank_1_adapter_of_zeros(factory):
    for text in ("a - a", "base", "0*a"):
        out = factory.compose(text, folders={"a": factory.adapter("plain")})
        tensors = load_file(out / "adapter_model.safetensors")
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 1
        assert len(tensors) == 8
        assert not any(tensor.any() for tensor in tensors.values())
        assert torch.equal(adapter_logits(factory, "llama", out), logits(factory.base("llama")))


def test_what_is_there_is_never_overwritten(factory, tmp_path):
    for there in (tmp_path / "file", tmp_path / "folder"):
        there.mkdir() if there.name == "folder" else there.write_text("mine")
        with pytest.raises(UserError, match="there is something already, and it is not overwritten"):
            factory.compose("a", folders={"a": factory.adapter("plain")}, out=str(there))
        with pytest.raises(UserError, match="there is something already"):
            merge(MergeAdapter(adapter=str(factory.adapter("plain")), out=str(there)))
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []
