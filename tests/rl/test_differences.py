"""The numbers of docs/ppo-differences.md: the conventions of the peers beside ours, on examples that tell them apart.

A peer's convention is written here in a line or two; what it gives was compared with the peer's own code when the page
was written. That ours is right follows in each test from a definition, not from our code.
"""

import math
from pathlib import Path

import pytest
import torch

from pipeline.core.advantages import gae, kl_k1, kl_k3, next_kl_coef, replace_missing_eos, token_rewards
from pipeline.core.losses import policy_loss
from pipeline.core.tensors import (
    logprobs_and_entropy,
    masked_mean,
    position_ids,
    response_length,
    response_mask,
    whiten,
)
from pipeline.models.loading import disable_dropout_

PAGE = (Path(__file__).parent.parent.parent / "docs/ppo-differences.md").read_text(encoding="utf-8")


def close(actual, expected, atol=2e-6):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), atol=atol, rtol=0)


def shown(*numbers: float | str) -> None:
    """The page states these numbers."""
    for number in numbers:
        assert str(number) in PAGE, f"docs/ppo-differences.md does not say {number}"


# 1: the slot of the score

KL_PART, SCORE, VALUES = [-0.1, -0.1, -0.1], 1.0, [0.5, 0.4, 0.6]


def advantages_with_the_score_one_slot_late(value_after_the_end: float, kl_of_padding: float = 0.0) -> torch.Tensor:
    rewards = torch.tensor([[*KL_PART, SCORE - 0.1 * kl_of_padding]])
    values = torch.tensor([[*VALUES, value_after_the_end]])
    return gae(rewards, values, torch.ones(1, 4).bool(), gamma=1.0, lam=0.95)[0, :3]


def test_the_score_on_the_last_token_needs_no_value_after_it():
    mask = torch.tensor([[True, True, True, False]])
    kl = torch.ones(1, 4)
    for after in (0.7, 0.0, -2.0, math.nan):
        rewards = token_rewards(torch.tensor([SCORE]), kl, mask, 0.1)
        close(gae(rewards, torch.tensor([[*VALUES, after]]), mask, 1.0, 0.95)[0, :3], [0.16575, 0.385, 0.3])
    for after, expected in (
        (0.7, [0.152212, 0.37075, 0.285]), (0.0, [0.120625, 0.3375, 0.25]), (-2.0, [0.030375, 0.2425, 0.15]),
    ):  # fmt: skip
        close(advantages_with_the_score_one_slot_late(after), expected)
    # by definition, with lambda 1: what is paid from t on, minus V_t, whatever any later value is
    for t, value in enumerate(VALUES):
        ours = gae(token_rewards(torch.tensor([SCORE]), kl, mask, 0.1), torch.tensor([[*VALUES, 9.0]]), mask, 1.0, 1.0)
        close(ours[0, t], sum(KL_PART[t:]) + SCORE - value)
    shown("0.166", "0.152", "0.121", "0.030")


def test_padding_pays_kl_where_the_score_stands_behind_the_mask():
    """DeepSpeed-Chat, pad not EOS: the pad token's own log-ratio is charged in the slot of the score."""
    close(advantages_with_the_score_one_slot_late(0.0, kl_of_padding=3.0)[0], 0.120625 - 0.3 * 0.95**3)
    mask = torch.tensor([[True, True, True, False]])
    rewards = token_rewards(torch.tensor([SCORE]), torch.tensor([[1.0, 1.0, 1.0, 3.0]]), mask, 0.1)
    close(rewards.sum(), SCORE - 0.1 * 3)  # the row sums to score - beta KL
    assert rewards[0, 3] == 0


# 2: KL


def gradient_in_reward(estimator, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Gradient of the logits when the estimate is a (negative) reward: E[k grad log p], over all three actions."""
    logits = p.log().requires_grad_()
    log_p = logits.log_softmax(0)
    k = estimator(log_p.detach(), q.log())
    return torch.autograd.grad((p * k * log_p).sum(), logits)[0]


def test_k3_in_the_reward_moves_away_from_the_reference():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    logits = p.log().requires_grad_()
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - q.log())).sum(), logits)  # of KL(p | q) itself
    close(exact, [0.17594, -0.09812, -0.07783], 1e-5)
    close(gradient_in_reward(kl_k1, p, q), exact, 1e-6)
    k3 = gradient_in_reward(kl_k3, p, q)
    close(k3, [-0.0241, 0.0019, 0.0222], 5e-5)
    assert k3 @ exact < 0
    shown("(0.176, −0.098, −0.078)", "(−0.024, 0.002, 0.022)")


def test_a_target_per_token_is_not_a_target_per_response():
    """The controllers' formula is one; what they are fed is not: 12 nats in 40 tokens are 0.3 nats per token."""
    assert next_kl_coef(0.15, 12.0, 6.0, 512, 10_000) == pytest.approx(0.151536)
    assert next_kl_coef(0.15, 12.0 / 40, 6.0, 512, 10_000) == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000))
    shown("0.151536", "0.148464")


# 3: a missing EOS


def test_a_penalty_that_is_subtracted_can_leave_a_cut_off_text_the_best():
    scores, has_eos = torch.tensor([1.0, 0.6, 2.5]), torch.tensor([True, False, False])
    close(replace_missing_eos(scores, has_eos, -1.0), [1.0, -1.0, -1.0])
    subtracted = torch.where(has_eos, scores, scores - 1.0)
    close(subtracted, [1.0, -0.4, 1.5])
    assert subtracted.argmax() == 2  # a text that never ends
    assert replace_missing_eos(scores, has_eos, -1.0).argmax() == 0
    shown("leaves the cut-off one ahead (1.5)")


# 4: masks


def test_a_mask_by_token_loses_the_eos_when_it_is_also_the_padding():
    eos = 9
    response = torch.tensor([[7, 8, eos, eos, eos]])
    length, has_eos = response_length(response, eos)
    assert (length.item(), has_eos.item()) == (3, True)
    assert response_mask(length, 5).tolist() == [[True, True, True, False, False]]
    assert (response != eos).tolist() == [[True, True, False, False, False]]
    shown("[1, 1, 0, 0, 0]")


def test_a_product_with_the_mask_lets_nan_through():
    x, mask = torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])
    assert masked_mean(x, mask) == 1
    assert ((x * mask).sum() / mask.sum()).isnan()


def test_statistics_over_padding_are_diluted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    difference = torch.tensor([[0.3, -0.4, 0, 0], [0.05, -0.05, 0.25, -0.3]])
    _, statistics = policy_loss(difference, torch.zeros(2, 4), torch.zeros(2, 4), mask, 0.2)
    close(masked_mean(statistics["approx_kl"], mask), 0.033958)
    close((0.5 * difference.square()).mean(), 0.025469)
    shown("0.0340", "0.0255")


# 5: whitening


def test_processes_that_whiten_alone_disagree_about_one_advantage():
    first, second = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 12, 0]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    whole = whiten(torch.cat([first, second]), mask)
    close(whole[mask], [-1.022475, -0.800198, -0.57792, 0.978019, 1.422574])
    close(whiten(first, mask[:1]), [[-1.224745, 0, 1.224745]])
    close(whiten(second, mask[1:])[0, :2], [-1.0, 1.0], 1e-5)
    assert whole[1, 0] > 0 > whiten(second, mask[1:])[0, 0]  # the same token, rewarded or punished
    pair = torch.tensor([10.0, 12.0])
    close((pair - pair.mean()) / pair.std(), [-0.707107, 0.707107])
    shown("the 10 becomes +0.98; alone (and with TRL's unbiased variance) −0.71")


def test_one_token_has_a_variance_of_zero():
    assert whiten(torch.tensor([[5.0]]), torch.ones(1, 1).bool()).item() == 0
    assert torch.tensor([5.0]).var().isnan()  # unbiased


# 6: denominators


def test_a_mean_of_micro_batch_means_weighs_short_responses_more():
    """Six tokens of loss 1 in one micro-batch, two of loss 4 in the other."""
    losses = torch.tensor([[1.0] * 6, [4.0] * 2 + [0.0] * 4])
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    parts = [masked_mean(losses[i : i + 1], mask[i : i + 1], mask.sum()) for i in range(2)]
    assert sum(parts).item() == (6 * 1 + 2 * 4) / 8 == 1.75
    assert sum(masked_mean(losses[i : i + 1], mask[i : i + 1]) for i in range(2)).item() / 2 == 2.5
    shown("their mean is 1.75, the mean of the two means 2.5")


# 7: forwards


def test_without_position_ids_left_padding_changes_a_gpt2(make_model):
    model = make_model("gpt2", seed=3)
    ids = torch.tensor([[1, 6, 4, 9, 12]])
    padded = torch.nn.functional.pad(ids, (5, 0), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    with torch.no_grad():
        alone = model(ids).logits[:, -1].log_softmax(-1)
        ours = model(padded, attention_mask=mask, position_ids=position_ids(mask.bool())).logits[:, -1].log_softmax(-1)
        arange = torch.arange(10)[None]  # what a forward without position ids, and without a mask to make them of, uses
        theirs = model(padded, attention_mask=mask, position_ids=arange).logits[:, -1].log_softmax(-1)
    close(ours, alone, 1e-5)
    assert (theirs - alone).abs().max() > 0.5


def test_scores_at_another_temperature_are_no_ratio_of_one():
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(1, 3, 3)
    tokens = torch.arange(3)[None]
    old = logprobs_and_entropy(logits, tokens, 0.7)[0]
    close((logprobs_and_entropy(logits, tokens, 0.7)[0] - old).exp(), [[1.0, 1.0, 1.0]])
    close((logprobs_and_entropy(logits, tokens, 1.0)[0] - old).exp(), [[0.8629, 1.3246, 2.0333]], 5e-5)
    shown("0.86, 1.32, 2.03")


def test_dropout_in_the_forwards_is_no_ratio_of_one(make_model):
    ids = torch.tensor([[1, 6, 4, 9, 12]])
    model = make_model("gpt2", seed=3, dropout=0.1).train()

    def ratio() -> torch.Tensor:
        first, second = (model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]) for _ in range(2))
        return (second - first).exp()

    torch.manual_seed(0)
    assert (ratio() - 1).abs().max() > 0.2
    disable_dropout_(model)
    assert (ratio() - 1).abs().max() == 0


# 8: options that ours does not have


def test_a_dual_clip_caps_the_loss_of_a_bad_token_that_became_likely():
    """verl's default: what would be 10 is 3, and has no gradient: the token is not made less likely again."""
    logprobs = torch.tensor([[math.log(10.0)]], requires_grad=True)
    advantage, mask = torch.tensor([[-1.0]]), torch.ones(1, 1).bool()
    loss, _ = policy_loss(logprobs, torch.zeros(1, 1), advantage, mask, 0.2)
    close(loss.detach(), [[10.0]], 1e-5)
    capped = torch.minimum(loss, -3.0 * advantage)
    assert capped.item() == 3
    assert torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)[0].item() == pytest.approx(10)
    assert torch.autograd.grad(capped.sum(), logprobs)[0].item() == 0
