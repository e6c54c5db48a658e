"""Files and lengths are checked before a stage trains; what is measured after it cannot take the weights away."""

import dataclasses
import json

import pytest
from tiny import configs

from pipeline import pretrain, sft
from pipeline.config.errors import UserError
from pipeline.models.loading import load_language_model
from pipeline.runtime.finished import read_done
from pipeline.training.validation import validation_loss

STAGES = {"pretrain": pretrain, "sft": sft}


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_written_before_anything_is_measured(stage, folder, tmp_path, monkeypatch, capsys):
    partial, calls = tmp_path / f"runs/tiny/{stage}/final.partial", []

    def loss(*arguments):
        calls.append(partial.exists())
        if partial.exists():
            load_language_model(partial)
            raise MemoryError
        return validation_loss(*arguments)

    monkeypatch.setattr(STAGES[stage], "validation_loss", loss)
    final = STAGES[stage].train(configs(folder, tmp_path / "runs", "tiny")[stage])
    assert calls == {"pretrain": [True], "sft": [False, True]}[stage]
    metrics = read_done(final)["metrics"]
    assert [metrics[name] for name in ("validation_loss", "perplexity", "validation_tokens")] == [None] * 3
    printed = capsys.readouterr().out
    assert f"{stage}: validation loss: not measured: MemoryError" in printed
    assert "perplexity not measured" in " ".join(printed.split())


def test_a_perplexity_beyond_all_numbers_is_not_measured(folder, tmp_path, monkeypatch):
    """As of a model whose learning rate was far too high."""
    monkeypatch.setattr(sft, "validation_loss", lambda *_: (1000.0, 7))
    metrics = read_done(sft.train(configs(folder, tmp_path / "runs", "tiny")["sft"]))["metrics"]
    assert (metrics["validation_loss"], metrics["perplexity"]) == (1000.0, None)


ROW, LONG = {"prompt": "the", "completion": " cat."}, {"prompt": "a", "completion": " cat and the dog." * 3}


@pytest.mark.parametrize(
    ("stage", "rows", "dials", "says"),
    [
        ("sft", [ROW, LONG], {}, r"its context is 48 tokens, rows of \S+held\.jsonl have up to 54; lower max_length"),
        ("sft", [LONG], {"max_length": 40}, r"held\.jsonl: every row is longer than max_length = 40"),
        (
            "pretrain",
            [{"text": "the cat."}],
            {"context": 64},
            r"its context is 48 tokens, the dial context is 64; lower it",
        ),
    ],
)
def test_held_out_rows_are_checked_before_anything_is_trained(stage, rows, dials, says, folder, tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    init = {"init": str(folder / "parents/pretrain/final")} if stage == "pretrain" else {}
    config = configs(folder, tmp_path / "runs", "tiny")[stage]
    config = dataclasses.replace(config, validation_file=str(file), **init, **dials)
    with pytest.raises(UserError, match=says):
        STAGES[stage].train(config)
    assert not (tmp_path / f"runs/tiny/{stage}/metrics.jsonl").exists()
