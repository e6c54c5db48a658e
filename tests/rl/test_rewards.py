import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.evaluation.judges import fit_judge
from pipeline.models.forward import head_outputs
from pipeline.rl import rewards
from pipeline.rl.rewards import reward_model_scores

IDS = torch.tensor([[1, 6, 4, 9, 12, 2], [1, 8, 5, 2, 0, 0], [1, 8, 2, 0, 0, 0]])
MASK = IDS != 0


@pytest.mark.parametrize("shift", [0.37, 0.0, -2.0])
def test_the_score_is_the_stock_classifiers_minus_the_shift(shift, reward_model, tmp_path):
    reward_model.config.score_shift = shift
    reward_model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = stock(input_ids=IDS, attention_mask=MASK.long()).logits.squeeze(-1) - shift
    scores = reward_model_scores(reward_model, IDS, MASK)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert scores.std() > 0.1
    assert not scores.requires_grad


@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (5, 3), (17, 0)])
def test_padding_on_either_side_changes_no_score(left, right, reward_model):
    expected = torch.cat(
        [reward_model_scores(reward_model, i[m][None], m[m][None]) for i, m in zip(IDS, MASK, strict=True)]
    )
    ids, mask = (torch.nn.functional.pad(x, (left, right)) for x in (IDS, MASK))
    torch.testing.assert_close(reward_model_scores(reward_model, ids, mask), expected, atol=1e-5, rtol=0)


def test_the_mask_says_what_is_padding_and_not_the_token(reward_model):
    expected = reward_model_scores(reward_model, IDS, MASK)
    assert torch.equal(reward_model_scores(reward_model, torch.where(MASK, IDS, 9), MASK), expected)
    counted = reward_model_scores(reward_model, IDS, torch.ones_like(MASK))  # padding that is told to be real
    assert (counted - expected)[1:].abs().min() > 1e-3


def test_the_score_is_read_at_the_last_real_token_by_hand(reward_model):
    """Of [pad, 5, 6 | 7, 9, pad, pad] at index 4, of [4, 5, 6 | 7, 8, 7, 8] at index 6."""
    ids = torch.tensor([[0, 5, 6, 7, 9, 0, 0], [4, 5, 6, 7, 8, 7, 8]])
    outputs = head_outputs(reward_model, ids, ids != 0, reward_model.config.score_shift)
    scores = reward_model_scores(reward_model, ids, ids != 0)
    assert torch.equal(scores, outputs[[0, 1], [4, 6]])


# judges

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
    seen = {}
    monkeypatch.setattr(rewards, "fit_classifier", lambda *given: seen.update(given=given))
    fit_judge(judge_file(tmp_path, key=True), seed=5)
    texts, labels, seed, groups = seen["given"]
    assert (seed, groups[:4]) == (5, ["d0", "d0", "d1", "d1"])
    assert labels[:4] == [1, 0, 1, 0]
    assert "lovely" in texts[0]
    fit_judge(judge_file(tmp_path, key=False), seed=5)
    assert seen["given"][3] is None
