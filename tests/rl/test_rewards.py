import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.models.forward import head_outputs
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
