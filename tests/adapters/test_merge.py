"""Merged models: as PEFT merges to the bit, as the adapter computes, reloaded."""

import json
import shutil

import pytest
import torch
from adapter_factory import (
    CONFIGS,
    PAIRS,
    adapter_logits,
    assert_logits,
    classifier_logits,
    logits,
    logits_by_hand,
    weighted_changes,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline import merge as merge_stage
from pipeline.adapters import proof
from pipeline.adapters.merge import merge
from pipeline.adapters.proof import load_unmerged, probe_logits
from pipeline.config.commands import MergeAdapter
from pipeline.config.dials import Run
from pipeline.config.errors import UserError
from pipeline.config.stages import Merge
from pipeline.models.loading import merge_adapter, unwrap_peft


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_adapter_merged_and_reloaded_are_one(factory, first, second):
    kind = CONFIGS[first][0]
    folders = {"a": factory.adapter(first), "b": factory.adapter(second, 2)}
    out = factory.compose("a - 0.4*b", kind, folders=folders)
    model = merge(MergeAdapter(adapter=str(out), out=str(factory.new_folder()), probe_file=str(factory.probes)))
    expected = logits_by_hand(factory, kind, weighted_changes({"a": 1, "b": -0.4}, folders), "ia3" in first)
    assert not list(model.glob("adapter*"))
    assert_logits(logits(AutoModelForCausalLM.from_pretrained(model)), expected)
    assert_logits(adapter_logits(factory, kind, out), expected)
    again = factory.compose("a", kind, folders={"a": out})
    assert_logits(adapter_logits(factory, kind, again), expected)


@pytest.mark.parametrize("rule", ["first", "sum"])
def test_a_classifier_keeps_its_head(factory, classifiers, tokenizer, rule):
    out = factory.compose("b", folders=classifiers, heads=rule)
    assert_logits(classifier_logits(factory, out, tokenizer), classifier_logits(factory, classifiers["b"], tokenizer))
    model = merge(MergeAdapter(adapter=str(out), out=str(factory.new_folder()), probe_file=str(factory.probes)))
    merged = AutoModelForSequenceClassification.from_pretrained(model)
    assert_logits(logits(merged), classifier_logits(factory, classifiers["b"], tokenizer))


def assert_same_weights(model, expected):
    actual, expected = model.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_is_pefts_to_the_bit(factory, tmp_path, name):
    """However the adapter was put onto its base: by PEFT, or by transformers from the base's own folder."""
    kind, folder = CONFIGS[name][0], factory.adapter(name)
    merged = merge_adapter(unwrap_peft(load_unmerged(factory.base(kind), folder)))
    peft_model = PeftModel.from_pretrained(factory.base(kind), str(folder))
    expected = peft_model.merge_and_unload(safe_merge=True)
    assert_same_weights(merged, expected)
    for source in (factory.bases[kind], folder):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    assert_same_weights(merge_adapter(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_a_classifiers_merge_is_pefts_to_the_bit(factory, classifiers):
    def load():
        base = AutoModelForSequenceClassification.from_pretrained(factory.bases["llama"], num_labels=1)
        return PeftModel.from_pretrained(base, str(classifiers["a"]))

    assert_same_weights(merge_adapter(unwrap_peft(load())), load().merge_and_unload(safe_merge=True))


def test_a_merge_that_changes_the_logits_is_refused_with_its_name(factory, monkeypatch):
    base, folder = factory.base("llama"), factory.adapter("plain")
    tokenizer = AutoTokenizer.from_pretrained(factory.bases["llama"])
    merge = proof.prove_merge(load_unmerged(base, folder), tokenizer, ["the cat"], "some/folder")
    assert 0 <= merge.error < 1e-5
    torch.testing.assert_close(merge.unmerged_logits, probe_logits(load_unmerged(base, folder), tokenizer, ["the cat"]))
    monkeypatch.setattr(proof, "merge_adapter", lambda model: factory.base("llama"))
    with pytest.raises(UserError, match="some/folder: merging changes the logits by"):
        proof.prove_merge(load_unmerged(base, folder), tokenizer, ["the cat"], "some/folder")


def test_the_stage_writes_what_peft_merges_and_its_error(factory, tmp_path):
    for source in (factory.bases["llama"], factory.adapter("plain")):
        shutil.copytree(source, tmp_path / "policy", dirs_exist_ok=True)
    run = Run(recipe="merged", runs=str(tmp_path), report_to="none")
    final = merge_stage.train(Merge(run=run, policy=str(tmp_path / "policy"), probe_file=str(factory.probes)))
    peft_model = PeftModel.from_pretrained(factory.base("llama"), str(factory.adapter("plain")))
    expected = peft_model.merge_and_unload(safe_merge=True)
    assert not list(final.glob("adapter*"))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(final), expected)
    assert 0 < json.loads((final.parent / "run.json").read_text())["metrics"]["relative_error"] < 1e-5
