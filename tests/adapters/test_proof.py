"""The proof: drift of half precision, and what fails writes nothing."""

import copy
import json

import pytest
import torch
from adapter_factory import (
    weighted_changes,
)
from peft import PeftModel
from safetensors.torch import load_file

from pipeline.adapters import proof
from pipeline.adapters.merge import merge
from pipeline.adapters.mixture import Mixture
from pipeline.adapters.proof import probe_logits
from pipeline.adapters.reading import read_adapters
from pipeline.config.commands import MergeAdapter
from pipeline.config.errors import UserError


def test_rounding_that_drowns_the_adapter_is_refused(factory):
    folders = {"i": factory.adapter("ia3", 1, 0.002)}
    before = sorted(factory.folder.iterdir())
    with pytest.raises(UserError) as refused:
        factory.compose("i", folders=folders, dtype="bf16")
    assert "dtype: rounding changes" in str(refused.value)
    assert "--dtype fp32, or --allow_drift true" in str(refused.value)
    assert sorted(factory.folder.iterdir()) == before
    out = factory.compose("i", folders=folders, dtype="bf16", allow_drift=True)
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "composition.json").read_text())["proof"]["drift"] > 0.05


def test_the_drift_is_that_of_the_model_that_would_be_served(factory):
    folders = {"a": factory.adapter("plain", 1, 0.5)}
    out = factory.compose("0.5*a", folders=folders, dtype="fp16")
    drift = json.loads((out / "composition.json").read_text())["proof"]["drift"]
    rows = [json.loads(line)["prompt"] for line in factory.probes.read_text().splitlines()]

    def all_logits(model):
        _, base = read_adapters(folders, str(factory.bases["llama"]))
        return probe_logits(model, base.tokenizer, rows)

    def halved(model):
        return model.half().float()

    base = halved(factory.base("llama"))
    plain, exact = all_logits(base), copy.deepcopy(base)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(out)).merge_and_unload()
    with torch.no_grad():
        for module, change in weighted_changes({"a": 0.5}, folders).items():
            exact.get_submodule(module).weight.add_(change.float())
    expected = all_logits(exact)
    error = (all_logits(halved(merged)) - expected).abs().max() / (expected - plain).abs().max()
    assert drift == pytest.approx(error.item(), rel=0.05)
    assert 0 < drift < 0.05
    model = merge(
        MergeAdapter(adapter=str(out), out=str(factory.new_folder()), probe_file=str(factory.probes), dtype="fp16")
    )
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {torch.float16}


def test_a_proof_that_fails_writes_nothing(factory, monkeypatch):
    before = sorted(factory.folder.iterdir())
    monkeypatch.setattr(proof, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match="merging changes the logits by"):
        factory.compose("a", folders={"a": factory.adapter("plain")})
    monkeypatch.undo()
    scaled = Mixture.set_weights
    monkeypatch.setattr(Mixture, "set_weights", lambda self, w: scaled(self, {n: 1.01 * x for n, x in w.items()}))
    with pytest.raises(UserError, match="differs from its parents side by side"):
        factory.compose("a", folders={"a": factory.adapter("plain")})
    assert sorted(factory.folder.iterdir()) == before
