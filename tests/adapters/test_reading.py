"""What is refused when adapters are read, in a sentence; nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_factory import LM, assert_change, assert_refused, edit_config, edit_tensors, q_proj, weighted_changes
from peft import LoraConfig

from pipeline.data.tokenizer import train_tokenizer
from pipeline.models.saving import save_policy


def add_nan(tensors):
    tensors[q_proj(1, "B")][0, 0] = float("nan")


def add_inf(tensors):
    tensors[q_proj(0, "A")][1, 2] = float("inf")


def remove_key(tensors):
    del tensors[q_proj(1, "A")]


def add_key(tensors):
    tensors[q_proj(7, "A")] = torch.zeros(3, 16)


def widen(tensors):
    tensors[q_proj(0, "A")] = torch.zeros(3, 17)


def with_config(**fields) -> Callable:
    return lambda folder: edit_config(folder, **fields)


def with_tensors(change: Callable) -> Callable:
    return lambda folder: edit_tensors(folder, change)


def pickle_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncate_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


SPOILERS = {
    "dora": (with_config(use_dora=True), "adapter 'b': use_dora: True: no plain LORA update"),
    "type": (with_config(peft_type="VERA"), "adapter 'b': peft_type: VERA; expected one of LORA, IA3"),
    "task": (with_config(task_type="SEQ_2_SEQ_LM"), "adapter 'b': task_type: SEQ_2_SEQ_LM; expected one of"),
    "other task": (with_config(task_type="SEQ_CLS"), "adapter 'b': task_type: SEQ_CLS, but 'a' is CAUSAL_LM"),
    "pissa": (with_config(init_lora_weights="pissa"), "adapter 'b': init_lora_weights: pissa took a part"),
    "olora": (with_config(init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "biases": (with_config(bias="all"), "adapter 'b': bias: all: no plain LORA update"),
    "tokens": (with_config(trainable_token_indices=[3]), "adapter 'b': trainable_token_indices: [3]"),
    "experts": (with_config(target_parameters=["w"]), "adapter 'b': target_parameters: ['w']"),
    "unheard of": (with_config(use_magic=True), "adapter 'b': use_magic: True: no plain LORA update"),
    "targets": (with_config(target_modules=["nowhere"]), "adapter 'b': target_modules: PEFT cannot put it on"),
    "embedding": (
        with_config(target_modules=["embed_tokens"]),
        "adapter 'b': target_modules: model.embed_tokens is a Embedding; only linear layers",
    ),
    "rank": (with_config(r=4), "shape (3, 16), but (4, 16) on"),
    "bias": (with_config(lora_bias=True), "adapter 'b': lora_bias: model.layers.0.self_attn.q_proj has no bias"),
    "nan": (with_tensors(add_nan), f"adapter 'b': {q_proj(1, 'B')}: has NaN or infinite numbers"),
    "inf": (with_tensors(add_inf), f"adapter 'b': {q_proj(0, 'A')}: has NaN or infinite numbers"),
    "missing": (with_tensors(remove_key), f"adapter 'b': {q_proj(1, 'A')}: missing in"),
    "surplus": (with_tensors(add_key), f"adapter 'b': {q_proj(7, 'A')}: surplus in"),
    "shape": (with_tensors(widen), f"adapter 'b': {q_proj(0, 'A')}: shape (3, 17), but (3, 16) on"),
    "pickle": (pickle_weights, "a pickle can run any code when it is read; save the adapter again with"),
    "truncated": (truncate_weights, "adapter_model.safetensors: not readable:"),
    "json": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not readable as JSON"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "it holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "it holds no adapter_model.safetensors"),
    "gone": (shutil.rmtree, "adapter 'b': "),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILERS)
def test_a_spoiled_adapter_is_refused(factory, tmp_path, how):
    spoil, message = SPOILERS[how]
    spoiled = tmp_path / "spoiled"
    shutil.copytree(factory.adapter("plain"), spoiled)
    spoil(spoiled)
    assert_refused(factory, tmp_path, message, folders={"a": factory.adapter("plain", 3), "b": spoiled})


def test_lora_and_ia3_are_not_added(factory, tmp_path):
    folders = {"a": factory.adapter("plain"), "b": factory.adapter("ia3")}
    assert_refused(factory, tmp_path, "adapter 'b': peft_type: IA3, but 'a' is LORA", folders=folders)


def test_another_base_is_refused(factory, make_model, tokenizer, tmp_path):
    plain, with_base = factory.adapter("plain"), tmp_path / "with_base"
    save_policy(make_model("llama", seed=1), tokenizer, with_base)  # the same shapes
    for file in plain.iterdir():
        shutil.copy(file, with_base / file.name)
    assert_refused(
        factory, tmp_path, "adapter 'b': base_model: it was trained on", folders={"a": plain, "b": with_base}
    )
    assert_refused(
        factory, tmp_path, "adapter 'a': its folder holds no base model", folders={"a": plain, "b": with_base}, base=""
    )
    by_name = tmp_path / "by-name"
    shutil.copytree(plain, by_name)
    edit_config(by_name, base_model_name_or_path=str(with_base))
    assert_refused(factory, tmp_path, f"it was trained on {with_base}", folders={"a": plain, "b": by_name})
    edit_config(by_name, base_model_name_or_path=str(factory.bases["gpt2"]))
    assert_refused(factory, tmp_path, "a gpt2, but", folders={"a": plain, "b": by_name})
    composed = factory.compose("a", folders={"a": plain})
    shutil.rmtree(with_base)
    save_policy(make_model("llama", seed=1), tokenizer, with_base)
    assert_refused(factory, tmp_path, "which is not", folders={"a": plain, "b": composed}, base=str(with_base))
    copied = tmp_path / "far" / "away"
    shutil.copytree(composed, copied)  # from there its lineage's path leads nowhere
    assert_refused(
        factory, tmp_path, "it was composed on another base", folders={"a": plain, "b": copied}, base=str(with_base)
    )


def test_the_same_base_elsewhere_is_the_same(factory, tmp_path):
    """Equal weights are one base, wherever they lie: a folder with its own base adds to one that is given it."""
    with_base = tmp_path / "with_base"
    shutil.copytree(factory.bases["llama"], with_base)
    for file in factory.adapter("rslora", 2).iterdir():
        shutil.copy(file, with_base / file.name)
    shutil.copytree(with_base, tmp_path / "copy")
    for base, first in (("", tmp_path / "copy"), (str(factory.bases["llama"]), factory.adapter("plain"))):
        folders = {"a": first, "b": with_base}
        out = factory.compose("a + b", folders=folders, base=base)
        assert_change(out, weighted_changes({"a": 1, "b": 1}, folders))


def test_a_base_that_cannot_be_used_is_refused(factory, tmp_path):
    folders = {"a": factory.adapter("plain"), "b": factory.adapter("plain", 3)}
    assert_refused(
        factory,
        tmp_path,
        "adapter 'a': its folder holds no base model and names none; say --base",
        folders=folders,
        base="",
    )
    assert_refused(
        factory, tmp_path, "target_modules: PEFT cannot put it on", folders=folders, base=str(factory.bases["gpt2"])
    )
    quantised = tmp_path / "quantised"
    shutil.copytree(factory.bases["llama"], quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert_refused(
        factory, tmp_path, "quantization_config: its weights are quantised", folders=folders, base=str(quantised)
    )
    assert_refused(factory, tmp_path, "no model can be loaded from it", folders=folders, base=str(tmp_path / "nothing"))


def test_tied_weights_are_refused(factory, tmp_path):
    for number, settings_of in enumerate(
        ({"target_modules": ["lm_head"]}, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]})
    ):
        folder = tmp_path / f"tied{number}"
        factory.make_peft_model(LoraConfig(r=2, **settings_of, **LM), "gpt2").save_pretrained(str(folder))
        field = list(settings_of)[-1]
        message = f"adapter 'a': {field}: lm_head shares its weight with another module (tied embeddings)"
        assert_refused(factory, tmp_path, message, "a", "gpt2", folders={"a": folder})


def test_another_tokenizer_is_refused(factory, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(factory.adapter("plain"), folder)
    train_tokenizer("char", ["quite other letters: xyz"], 40).save_pretrained(folder)
    assert_refused(factory, tmp_path, "adapter 'a': tokenizer: ", "a", folders={"a": folder})


def test_an_unfinished_stage_is_refused(factory, tmp_path):
    shutil.copytree(factory.adapter("plain"), tmp_path / "ppo" / "final")
    assert_refused(
        factory,
        tmp_path,
        "not finished (no DONE.json there): run ppo first",
        "a",
        folders={"a": tmp_path / "ppo/final"},
    )
