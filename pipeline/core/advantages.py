"""From scores to advantages: KL estimators, per-token rewards, generalised advantage estimation.

    scores (B,), kl (B, T)  --token_rewards-->  rewards (B, T)  --gae-->  advantages (B, T)
                                                                         returns = advantages + values, before whitening

An episode is one response: one token is one step, and it ends after the last real token, whether that is an EOS or the
length limit. Masks are those of `tensors.response_mask`: True on a prefix of each row.
"""

import torch
from torch import Tensor

from pipeline.core.tensors import Reduce, identity, masked_moments


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Returns log pi - log pi_ref (B, T), in nats: k1 of joschu.net/blog/kl-approx.

    Signed, with the right mean and, in the reward, the right gradient; k2 and k3 in the reward have a biased one
    (arXiv 2506.09477). Masked slots may hold NaN: whoever reads this applies the mask.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Returns exp(-d) - 1 + d with d = log pi - log pi_ref (B, T), in nats: k3 of joschu.net/blog/kl-approx.

    Never negative and less noisy than k1, so it is the one to log; not for the reward (see `kl_k1`). Masked slots may
    hold NaN; to differentiate it, mask the inputs and not the result.
    """
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def replace_missing_eos(scores: Tensor, has_eos: Tensor, missing_eos_score: float | None) -> Tensor:
    """Returns scores (B,) with those of responses without EOS replaced (Ziegler et al. 2019, arXiv 1909.08593).

    has_eos (B,) boolean. Replaced and not lowered: a truncated text has no score worth keeping. None changes nothing.
    """
    return scores if missing_eos_score is None else torch.where(has_eos, scores, missing_eos_score)


def clip_scores(scores: Tensor, bound: float | None) -> Tensor:
    """Returns scores (B,) cut to -bound..bound, in score units; None changes nothing.

    Scores have mean 0 on the SFT policy's samples, so a bound near their standard deviation pays a good response in
    full and leaves nothing to gain from making it better still by the one word the reward model likes most.
    """
    return scores if bound is None else scores.clamp(-bound, bound)


def next_kl_coef(kl_coef: float, kl: float, target: float, sequences: int, horizon: int) -> float:
    """Returns the coefficient that steers KL to its target: kl_coef (1 + e n / horizon) (Ziegler et al. 2019, eq. 4).

    kl, target in nats per response; e = kl / target - 1, cut to +-0.2; n sequences were sampled with kl_coef, over all
    processes. Saturated, 100 rollouts of 512 at horizon 10,000 multiply it by 2.77.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * sequences / horizon)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Returns -kl_coef * kl, plus the score on the last real token (Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

    scores (B,), kl (B, T) by `kl_k1`, mask (B, T) -> rewards (B, T), zero where masked. Each row sums to
    score - kl_coef * (its KL). Raises ValueError for a row without a real token, which has no place for its score.
    """
    slots = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = slots.masked_fill(~mask, -1).amax(dim=1)
    if bool((last < 0).any()):
        raise ValueError(f"no real token in rows {(last < 0).nonzero().flatten().tolist()}")
    penalty = -kl_coef * kl.masked_fill(~mask, 0)
    return penalty.scatter_add(1, last[:, None], scores[:, None].to(penalty.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Returns A_t = sum over k >= t of (gamma lam)^(k-t) delta_k (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    rewards, values, mask (B, T) -> advantages (B, T), zero where masked; delta_t = r_t + gamma V_{t+1} - V_t, where
    V_t is the value before token t and the value after the last real token is 0. Rewards and values are zeroed beyond
    the response first, so nothing stored there can enter through the recursion.
    """
    rewards = rewards.masked_fill(~mask, 0)
    values = values.masked_fill(~mask, 0)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    backwards = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        backwards.append(next_advantage)
    return torch.stack(backwards[::-1], dim=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Returns 1 - Var(R - V) / Var(R) over mask and all processes, float64 scalar: 1 is perfect, 0 a constant guess.

    values, returns, mask (B, T). Not finite when all returns are equal: there is then nothing to explain.
    """
    _, unexplained = masked_moments(returns - values, mask, reduce)
    _, total = masked_moments(returns, mask, reduce)
    return 1 - unexplained / total
