import json

import pytest

from pipeline.config.dials import Reading
from pipeline.data.files import DataError
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
    assert calls[1][3] == calls[1][0]  # each text by itself


def judge_rows(tmp_path, *rows: dict) -> str:
    file = tmp_path / "judge.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("label", [0, 1, "pos", None, ["positive"], ""])
def test_another_label_is_refused_with_its_row(tmp_path, label):
    rows = [{"text": "a fine film", "label": "Positive"}, {"text": "a dull film", "label": label}]
    with pytest.raises(DataError, match=r"judge\.jsonl: row 2: label: expected negative or positive, got "):
        fit_judge(judge_rows(tmp_path, *rows), seed=0)


def test_labels_may_be_capitalised_and_keys_missing(tmp_path):
    rows = [
        {"text": f"a {word} film, number {i}", "label": label, "key": f"d{i}" if i % 2 else None}
        for i in range(12)
        for word, label in (("lovely", "Positive"), ("dull", "NEGATIVE"))
    ]
    bad, good = fit_judge(judge_rows(tmp_path, *rows), seed=0)(["dull", "lovely"])
    assert bad < 0.5 < good


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("good", "positive"), ("bad", "negative")], "2 texts .*"),
        ([(f"a fine film, number {i}", "positive") for i in range(9)], "9 texts .*both must occur"),
        ([(f"one{i}", ("positive", "negative")[i % 2]) for i in range(30)], "30 texts .no word is in 3 of the 27"),
        ([("a film", ("positive", "negative")[i % 2]) for i in range(30)], "30 texts "),
    ],
)
def test_too_few_labels_are_refused_by_name(tmp_path, rows, why):
    file = judge_rows(tmp_path, *({"text": text, "label": label} for text, label in rows))
    with pytest.raises(
        DataError, match=rf"judge\.jsonl: no judge can be fitted to its {why}.*give more labelled texts"
    ):
        fit_judge(file, seed=0)


def test_a_judge_of_a_language_without_spaces_knows_its_words(tmp_path):
    rows = [
        {"text": f"这部电影{word}第{i}次", "label": label}
        for i in range(20)
        for word, label in (("很好看", "positive"), ("不好看", "negative"))
    ]
    bad, good = fit_judge(judge_rows(tmp_path, *rows), seed=0)(["真的不好看", "真的很好看"])
    assert bad < 0.4 < 0.6 < good


def test_rows_without_a_label_are_left_out_where_they_may_be(tmp_path):
    rows = [
        {"text": f"a {word} film, number {i}", "label": label}
        for i in range(12)
        for word, label in (("lovely", "positive"), ("dull", "negative"))
    ]
    file = judge_rows(tmp_path, *rows, {"text": "a film"})
    bad, good = fit_judge(file, 0, Reading(columns="prompt=other", bad_rows="drop"))(["dull", "lovely"])
    assert bad < 0.5 < good
