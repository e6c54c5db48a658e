import math

import numpy as np
import pytest
import torch
from test_tensors import on_processes
from torch import Tensor

from pipeline.core.advantages import (
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    next_kl_coef,
    replace_missing_eos,
    token_rewards,
)
from pipeline.core.tensors import masked_mean, masked_sum, response_mask

NAN, INF = math.nan, math.inf


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


# KL

P, Q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)


def test_kl_values():
    logprobs, ref = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.2, -1.5, -0.5]])
    close(kl_k1(logprobs, ref), [[0.2, -0.5, 0]])
    close(kl_k3(logprobs, ref), [[0.018731, 0.148721, 0]])
    ratio = torch.tensor([1.3, 0.7, 1.1, 0.9])
    close(kl_k3(torch.zeros(4), ratio.log()).mean(), 0.02609, atol=5e-6)  # mean of (r - 1) - log r


def test_kl_expectations_on_three_letters():
    exact = sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))
    assert exact == pytest.approx(0.085123, abs=1e-6)
    close((P * kl_k1(P.log(), Q.log())).sum(), exact, atol=1e-12)
    close((P * kl_k3(P.log(), Q.log())).sum(), exact, atol=1e-12)
    close((P * kl_k1(P.log(), Q.log()).square() / 2).sum(), 0.080088)
    close((Q * kl_k1(Q.log(), P.log())).sum(), 0.092033)


def test_k3_keeps_its_small_values_and_its_sign():
    d = torch.tensor([1e-3, -1e-3, 3e-4])
    close(kl_k3(d, torch.zeros(3)) / d.square(), [0.5, 0.5, 0.5], atol=1e-3)
    assert (kl_k3(torch.linspace(-3, 3, 61), torch.zeros(61)) >= 0).all()


@pytest.mark.parametrize(
    ("estimator", "in_reward", "in_loss"),
    [
        (kl_k1, [0.17594, -0.09812, -0.07783], [0, 0, 0]),
        (lambda a, b: kl_k1(a, b).square() / 2, [-0.0164, 0.0004, 0.0160], [0.17594, -0.09812, -0.07783]),
        (kl_k3, [-0.0241, 0.0019, 0.0222], [0.2, -0.1, -0.1]),
    ],
)
def test_only_k1_has_the_gradient_of_the_kl_when_it_stands_in_the_reward(estimator, in_reward, in_loss):
    logits = P.log().requires_grad_()
    log_p = logits.log_softmax(0)
    (reward_gradient,) = torch.autograd.grad((P * estimator(log_p, Q.log()).detach() * log_p).sum(), logits)
    log_p = logits.log_softmax(0)
    (loss_gradient,) = torch.autograd.grad((P * estimator(log_p, Q.log())).sum(), logits)
    close(reward_gradient, in_reward, atol=5e-5)
    close(loss_gradient, in_loss, atol=5e-5)


# rewards


def test_a_missing_eos_replaces_the_score():
    scores, has_eos = torch.tensor([1.0, 0.6]), torch.tensor([True, False])
    close(replace_missing_eos(scores, has_eos, -1.0), [1.0, -1.0])
    assert replace_missing_eos(scores, has_eos, None) is scores
    assert replace_missing_eos(scores, has_eos, -1.0).dtype == scores.dtype
    close(replace_missing_eos(torch.tensor([1.0, NAN]), has_eos, -1.0), [1.0, -1.0])


def test_the_score_lands_on_the_last_real_token():
    mask = response_mask(torch.tensor([3, 1, 5]), 5)
    kl = torch.full((3, 5), 0.2).masked_fill(~mask, NAN)
    rewards = token_rewards(torch.tensor([1.0, -2.0, 3.0]), kl, mask, 0.5)
    close(rewards, [[-0.1, -0.1, 0.9, 0, 0], [-2.1, 0, 0, 0, 0], [-0.1, -0.1, -0.1, -0.1, 2.9]])


def test_rewards_sum_to_the_score_minus_the_kl_penalty():
    g = torch.Generator().manual_seed(0)
    length = torch.randint(1, 8, (50,), generator=g)
    mask, kl, scores = response_mask(length, 7), torch.randn(50, 7, generator=g), torch.randn(50, generator=g)
    expected = [float(s) - 0.3 * sum(k[:n]) for s, k, n in zip(scores, kl.tolist(), length.tolist(), strict=True)]
    close(token_rewards(scores, kl, mask, 0.3).sum(dim=1), expected, atol=1e-5)


def test_a_row_without_a_real_token_is_an_error():
    mask = response_mask(torch.tensor([2, 0, 1, 0]), 3)
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        token_rewards(torch.ones(4), torch.zeros(4, 3), mask, 0.1)


# generalised advantage estimation

VALUES = [0.5, 0.4, 0.6]


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "advantages"),
    [
        ([-0.1, -0.1, 0.9], VALUES, 1.0, 0.95, [0.16575, 0.385, 0.3]),
        ([-0.1, -0.1, 0.9], VALUES, 1.0, 1.0, [0.2, 0.4, 0.3]),
        ([-0.1, -0.1, 0.9], VALUES, 0.9, 0.5, [-0.16125, 0.175, 0.3]),
        ([-0.1, -0.1, 0.9], VALUES, 1.0, 0.0, [-0.2, 0.1, 0.3]),
        ([-0.1, -0.1, 1.2], VALUES, 1.0, 0.95, [0.4365, 0.67, 0.6]),  # a bootstrap of .3 is a reward of .3
        # one slot later, as some implementations place the score: four steps instead of three
        ([-0.1, -0.1, -0.1, 1.0], [*VALUES, 0.7], 1.0, 0.95, [0.152212, 0.37075, 0.285, 0.3]),
        ([-0.1, -0.1, -0.1, 1.0], [*VALUES, 0.0], 1.0, 0.95, [0.120625, 0.3375, 0.25, 1.0]),
        ([-0.1, -0.1, -0.1, 1.0], [*VALUES, -2.0], 1.0, 0.95, [0.030375, 0.2425, 0.15, 3.0]),
    ],
)
def test_gae_by_hand(rewards, values, gamma, lam, advantages):
    r, v = torch.tensor([rewards]), torch.tensor([values])
    close(gae(r, v, torch.ones_like(r).bool(), gamma, lam), [advantages])


def test_returns():
    r, v = torch.tensor([[-0.1, -0.1, 0.9]]), torch.tensor([VALUES])
    mask = torch.ones(1, 3).bool()
    close(gae(r, v, mask, 1.0, 0.95) + v, [[0.66575, 0.785, 0.9]])
    close(gae(r, v, mask, 1.0, 1.0) + v, [[0.7, 0.8, 0.9]])  # lam 1: the sum of what follows, whatever the values


def episodes(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask (5, 6) with ragged lengths, one of them 1 and one full."""
    g = torch.Generator().manual_seed(3)
    r, v = torch.randn(5, 6, generator=g).to(dtype), torch.randn(5, 6, generator=g).to(dtype)
    return r, v, response_mask(torch.tensor([1, 6, 3, 5, 2]), 6)


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    r, v, mask = episodes()
    expected = np.zeros((5, 6))
    for b, length in enumerate(mask.sum(dim=1).tolist()):
        for t in range(length):
            for k in range(t, length):
                next_value = v[b, k + 1].item() if k + 1 < length else 0.0
                delta = r[b, k].item() + gamma * next_value - v[b, k].item()
                expected[b, t] += (gamma * lam) ** (k - t) * delta
    close(gae(r, v, mask, gamma, lam), expected, atol=1e-12)


def test_nothing_beyond_the_response_enters_the_advantages():
    r, v = torch.tensor([[-0.1, -0.1, 0.9, 0, 0]]), torch.tensor([[*VALUES, 7.0, -3.0]])
    mask = response_mask(torch.tensor([3]), 5)
    close(gae(r, v, mask, 1.0, 0.95), [[0.16575, 0.385, 0.3, 0, 0]])


def test_a_reward_or_value_moves_its_own_advantage_and_earlier_ones_only():
    r, v, mask = episodes()
    before = gae(r, v, mask, 0.9, 0.8)
    for x in (r, v):
        changed = x.clone()
        changed[3, 2] += 1
        moved = (gae(changed if x is r else r, changed if x is v else v, mask, 0.9, 0.8) - before).ne(0)
        assert moved.nonzero().tolist() == [[3, 0], [3, 1], [3, 2]]


# explained variance


def test_explained_variance():
    r, v, mask = episodes(torch.float32)
    residual, returns = (r - v)[mask].double().numpy(), r[mask].double().numpy()
    close(explained_variance(v, r, mask), 1 - residual.var() / returns.var())
    close(explained_variance(r - 3, r, mask), 1.0)  # a constant error explains all the variance
    close(explained_variance(torch.full_like(r, 4.0), r, mask), 0.0)
    assert explained_variance(v, torch.ones_like(r), mask).isfinite().logical_not()


def test_explained_variance_on_two_processes_is_that_of_one():
    r, v, mask = episodes()
    shards = [(v[:1], r[:1], mask[:1]), (v[1:], r[1:], mask[1:])]
    for value in on_processes(explained_variance, shards):
        close(value, explained_variance(v, r, mask), atol=1e-12)


# masks


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_masked_positions_reach_no_result_and_no_gradient(poison):
    _, _, mask = episodes()
    weights = torch.linspace(-1, 2, 30).view(5, 6)
    results, gradients = [], []
    for fill in (0.0, poison):
        g = torch.Generator().manual_seed(5)
        x, y = (torch.randn(5, 6, generator=g).masked_fill(~mask, fill).requires_grad_() for _ in range(2))
        scores = torch.randn(5, generator=g)
        k3 = kl_k3(*(torch.where(mask, a, 0) for a in (x, y)))
        outputs = [
            masked_sum(kl_k1(x, y) * weights, mask),
            masked_mean(kl_k3(x, y), mask),
            token_rewards(scores, kl_k1(x, y), mask, 0.3),
            gae(x, y, mask, 0.9, 0.8),
            explained_variance(x, y, mask),
            k3,
        ]
        results.append([o.detach() for o in outputs])
        totals = [(o * (weights if o.ndim else 1)).sum() for o in outputs]
        del totals[1]  # k3 of unmasked inputs is a figure to log, not a loss
        gradients.append([torch.autograd.grad(total, [x, y], retain_graph=True) for total in totals])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    for pair in zip(*gradients, strict=True):
        for a, b in zip(*pair, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
            assert a[~mask].eq(0).all()
            assert a[mask].ne(0).any()
    assert results[0][2][~mask].eq(0).all()
    assert results[0][3][~mask].eq(0).all()


@pytest.mark.parametrize(
    ("kl", "expected"), [(12, 0.151536), (6.6, 0.150768), (0, 0.148464), (6, 0.15), (-3, 0.148464)]
)
def test_the_kl_coefficient_is_steered_to_its_target(kl, expected):
    """Ziegler et al. 2019, eq. 4, with 512 sequences and horizon 10,000; the error is cut to a fifth."""
    assert next_kl_coef(0.15, kl, 6, 512, 10_000) == pytest.approx(expected, abs=1e-9)


def test_a_hundred_saturated_updates_of_the_kl_coefficient():
    kl_coef = 1.0
    for _ in range(100):
        kl_coef = next_kl_coef(kl_coef, 99, 6, 512, 10_000)
    assert kl_coef == pytest.approx(2.76985, abs=1e-5)
