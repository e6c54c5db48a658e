"""The maths together: two rows computed by hand from tokens to loss, and two problems whose answer is known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.advantages import explained_variance, gae, kl_k1, replace_missing_eos, token_rewards
from pipeline.core.losses import policy_loss, value_loss
from pipeline.core.tensors import (
    logprobs_and_entropy,
    masked_mean,
    masked_moments,
    masked_sum,
    position_ids,
    response_length,
    response_mask,
    whiten,
)

PAD, EOS = 0, 9
NAN = math.nan
CLIP = 0.2


def close(actual: Tensor, expected: object, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


# Two rows, P = 3, T = 4. Every masked slot holds NaN.

PROMPT = torch.tensor([[PAD, 5, 6], [4, 5, 6]])
RAW = torch.tensor([[7, EOS, 3, EOS], [7, 8, 7, 8]])
OLD_LOGPROBS = torch.tensor([[-1.0, -0.5, NAN, NAN], [-0.7, -1.2, -0.3, -2.0]])
REF_LOGPROBS = torch.tensor([[-1.2, -0.4, NAN, NAN], [-0.5, -1.2, -0.8, -1.5]])
OLD_VALUES = torch.tensor([[0.2, 0.3, NAN, NAN], [0.1, 0.0, -0.1, -0.2]])
LOG_RATIO = torch.tensor([[0.3, -0.4, NAN, NAN], [0.05, -0.05, 0.25, -0.3]])
NEW_VALUES = torch.tensor([[0.5, 0.35, NAN, NAN], [0.1, -0.1, -0.4, -0.9]])
LENGTH, HAS_EOS = response_length(RAW, EOS)
MASK = response_mask(LENGTH, 4)


def test_golden_masks():
    assert LENGTH.tolist() == [2, 4]
    assert HAS_EOS.tolist() == [True, False]
    assert torch.where(MASK, RAW, PAD).tolist() == [[7, 9, 0, 0], [7, 8, 7, 8]]
    assert position_ids(torch.cat([PROMPT != PAD, MASK], dim=1)).tolist() == [[0, 0, 1, 2, 3, 4, 4], list(range(7))]
    assert (3 + LENGTH - 1).tolist() == [4, 6]


def golden_experience() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl = kl_k1(OLD_LOGPROBS, REF_LOGPROBS)
    scores = replace_missing_eos(torch.tensor([1.0, 0.6]), HAS_EOS, -1.0)
    rewards = token_rewards(scores, kl, MASK, 0.1)
    advantages = gae(rewards, OLD_VALUES, MASK, 1.0, 0.95)
    return kl, scores, rewards, advantages


def test_golden_experience():
    kl, scores, rewards, advantages = golden_experience()
    close(scores, [1.0, -1.0])
    close(kl[MASK], [0.2, -0.1, -0.2, 0, 0.5, -0.5])
    assert masked_sum(kl, MASK).item() / 2 == pytest.approx(-0.05, abs=1e-6)  # per sequence
    assert masked_mean(kl, MASK).item() == pytest.approx(-0.016667, abs=1e-6)  # per token
    close(rewards, [[-0.02, 1.01, 0, 0], [0.02, 0, -0.05, -0.95]])
    close(advantages, [[0.7545, 0.71, 0, 0], [-0.953406, -0.919375, -0.8625, -0.75]])
    returns = advantages + OLD_VALUES
    close(returns[MASK], [0.9545, 1.01, -0.853406, -0.919375, -0.9625, -0.95])
    mean, variance = masked_moments(advantages, MASK)
    close(mean, -0.336797)
    close(variance, 0.575570)
    close(variance * 6 / 5, 0.690684)
    r, v = returns[MASK].double().numpy(), OLD_VALUES[MASK].double().numpy()
    close(explained_variance(OLD_VALUES, returns, MASK), 1 - (r - v).var() / r.var())


UNBIASED = [[1.313117, 1.259572, NAN, NAN], [-0.741943, -0.700995, -0.632559, -0.497192]]
BIASED = [[1.438447, 1.379792, NAN, NAN], [-0.812758, -0.767901, -0.692934, -0.544646]]


def test_golden_whitening():
    *_, advantages = golden_experience()
    close(whiten(advantages, MASK), torch.tensor(BIASED).nan_to_num())


def test_golden_policy_loss_with_unbiased_whitening():
    loss, statistics = policy_loss(OLD_LOGPROBS + LOG_RATIO, OLD_LOGPROBS, torch.tensor(UNBIASED), MASK, CLIP)
    close(statistics["ratio"], [[1.349859, 0.670320, 1, 1], [1.051271, 0.951229, 1.284025, 0.740818]])
    close(loss, [[-1.575740, -0.844316, 0, 0], [0.779983, 0.666807, 0.812222, 0.397754]])
    close(masked_mean(loss, MASK), 0.039451)
    assert statistics["clipped"].tolist() == [[True, False, False, False], [False, False, False, True]]
    close(masked_mean(statistics["clipped"], MASK), 1 / 3)
    close(masked_mean(statistics["approx_kl"], MASK), 0.033958)


def test_golden_policy_loss():
    *_, advantages = golden_experience()
    loss, _ = policy_loss(OLD_LOGPROBS + LOG_RATIO, OLD_LOGPROBS, whiten(advantages, MASK), MASK, CLIP)
    a, r = np.array(BIASED)[MASK.numpy()], np.exp([0.3, -0.4, 0.05, -0.05, 0.25, -0.3])
    expected = [-min(x * y, x * min(max(y, 0.8), 1.2)) for x, y in zip(a, r, strict=True)]
    close(loss[MASK], expected)
    close(masked_mean(loss, MASK), sum(expected) / 6)
    assert loss[~MASK].eq(0).all()
    close(masked_mean(loss, MASK), 0.039451 * math.sqrt(6 / 5))  # the two whitenings differ by that factor


def test_golden_value_loss():
    *_, advantages = golden_experience()
    loss, statistics = value_loss(NEW_VALUES, OLD_VALUES, advantages + OLD_VALUES, MASK, CLIP)
    close(loss, [[0.153735, 0.2178, 0, 0], [0.454492, 0.335688, 0.219453, 0.15125]])
    close(masked_mean(loss, MASK), 0.255403)
    close(masked_mean(statistics["clipped"], MASK), 0.5)


# Every response of at most two tokens over {0, 1, EOS}: the expected PPO gradient is minus that of the objective.


@pytest.mark.parametrize(("kl_coef", "temperature", "lam"), [(0.3, 0.7, 0.8), (0.0, 1.0, 0.0), (1.5, 0.7, 1.0)])
def test_the_expected_gradient_is_exact_on_an_enumerable_problem(kl_coef, temperature, lam):
    eos = 2
    response = torch.tensor([y for y in itertools.product(range(3), repeat=2) if y[0] != eos or y[1] == 0])
    length, _ = response_length(response, eos)
    mask = response_mask(length, 2)
    assert (len(response), mask.sum().item()) == (7, 13)
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(4, 3, generator=g).requires_grad_()  # row 0: logits of y_0; row 1 + y_0: logits of y_1
    theta_ref, scores = torch.randn(4, 3, generator=g), torch.randn(7, generator=g)
    state = torch.stack([torch.zeros(7, dtype=torch.long), 1 + response[:, 0]], dim=1)

    def logprobs_under(table: Tensor) -> Tensor:
        return logprobs_and_entropy(table[state], response, temperature)[0]

    # the objective, written with probabilities alone
    log_p = (theta.double() / temperature).log_softmax(-1)
    log_q = (theta_ref.double() / temperature).log_softmax(-1)
    objective = torch.zeros((), dtype=torch.float64)
    for (a, b), score in zip(response.tolist(), scores.double(), strict=True):
        log_pi, log_ref = log_p[0, a], log_q[0, a]
        if a != eos:
            log_pi, log_ref = log_pi + log_p[1 + a, b], log_ref + log_q[1 + a, b]
        objective = objective + log_pi.exp() * (score - kl_coef * (log_pi - log_ref))
    (exact,) = torch.autograd.grad(objective, theta)

    # the same by one PPO step at ratio 1, with the exact value of each state
    logprobs = logprobs_under(theta)
    old = logprobs.detach()
    probability = (old * mask).sum(dim=1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    rewards = token_rewards(scores, kl_k1(old, logprobs_under(theta_ref)), mask, kl_coef)
    values = torch.full((7, 2), NAN)
    values[:, 0] = (probability * rewards.sum(dim=1)).sum()
    for a in (0, 1):
        same = response[:, 0] == a
        values[same, 1] = (probability * rewards[:, 1])[same].sum() / probability[same].sum()
    advantages = gae(rewards, values, mask, 1.0, lam)
    loss, _ = policy_loss(logprobs, old, advantages, mask, CLIP)
    masked_sum(loss * probability[:, None], mask).backward()
    close(-theta.grad, exact, atol=2e-6)
    assert exact.abs().max() > 0.05


# A bandit with a KL penalty: the optimum is pi_ref * exp(score / kl_coef), normalised.


def test_ppo_reaches_the_known_optimum_of_a_bandit():
    g = torch.Generator().manual_seed(0)
    scores, kl_coef, rollouts = torch.tensor([1.0, 0.0, 0.0]), 0.5, 150
    logits, value = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.05)
    mask = torch.ones(256, 1).bool()
    ref = torch.full((256, 1), -math.log(3))
    for u in range(rollouts):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - u / rollouts)
        with torch.no_grad():
            tokens = torch.multinomial(logits.softmax(0), 256, replacement=True, generator=g)[:, None]
            old = logprobs_and_entropy(logits.expand(256, 1, 3), tokens, 1.0)[0]
            old_values = value.expand(256, 1).clone()
            rewards = token_rewards(scores[tokens[:, 0]], kl_k1(old, ref), mask, kl_coef)
            advantages = gae(rewards, old_values, mask, 1.0, 0.95)
        for _ in range(2):
            logprobs = logprobs_and_entropy(logits.expand(256, 1, 3), tokens, 1.0)[0]
            pg, _ = policy_loss(logprobs, old, advantages, mask, CLIP)
            vf, _ = value_loss(value.expand(256, 1), old_values, advantages + old_values, mask, CLIP)
            optimizer.zero_grad()
            (masked_mean(pg, mask) + masked_mean(vf, mask)).backward()
            optimizer.step()
    policy = logits.detach().softmax(0)
    close(policy, [0.7870, 0.1065, 0.1065], atol=0.02)
    close((policy * (policy * 3).log()).sum(), 0.4331, atol=0.02)
    close(value.detach(), [0.5 * math.log((math.e**2 + 2) / 3)], atol=0.05)  # kl_coef * log E_ref exp(score / kl_coef)
