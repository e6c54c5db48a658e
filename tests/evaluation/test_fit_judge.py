import json

import pytest

from pipeline.evaluation import judges
from pipeline.evaluation.judges import fit_judge

SUBJECTS = ("dragon", "kitchen", "planet", "violin", "harbour", "lantern", "meadow", "teapot")


def judge_file(tmp_path, key: bool) -> str:
    words = {"positive": ("lovely", "great", "warm"), "negative": ("dull", "awful", "cold")}
    lines = [
        {"text": f"a {words[label][i % 3]} {SUBJECTS[i % 8]}", "label": label} | ({"key": f"d{i % 12}"} if key else {})
        for i in range(48)
        for label in words
    ]
    (tmp_path / "judge.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(tmp_path / "judge.jsonl")


@pytest.mark.parametrize("key", [True, False])
def test_the_judge_learns_what_its_labels_say(tmp_path, key):
    classifier = fit_judge(judge_file(tmp_path, key), seed=0)
    bad, good = classifier(["an awful dull cold teapot", "a lovely warm great teapot"])
    assert bad < 0.4 < 0.6 < good
    assert classifier.holdout_accuracy.value == 1.0


def test_the_judge_keeps_a_documents_texts_on_one_side(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(judges, "fit_classifier", lambda *arguments: calls.append(arguments))
    fit_judge(judge_file(tmp_path, key=True), seed=5)
    texts, labels, seed, groups = calls[0]
    assert (seed, groups[:4]) == (5, ["d0", "d0", "d1", "d1"])
    assert labels[:4] == [1, 0, 1, 0]
    assert "lovely" in texts[0]
    fit_judge(judge_file(tmp_path, key=False), seed=5)
    assert calls[1][3] is None
