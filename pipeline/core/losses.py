"""The losses of the pipeline, each a function of tensors: next token, clipped policy, clipped value.

Per-token losses come back unreduced, with their statistics in the same shape: `tensors.masked_mean` then applies one
mask and one denominator (the token count of the whole optimiser step) to all of them alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""The log-ratio is clamped to this before exp: e^20 is far outside any clip range, e^89 is infinite in float32."""


def next_token_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Returns (1 - e) * -log p_y + e / (V - 1) * sum over v != y of -log p_v (Goodfellow et al. 2016, section 7.5.1).

    logits (B, S, V), labels (B, S) with -100 where nothing is to be learnt -> loss (B, S-1) float32, zero where
    masked, and its mask (B, S-1). The shift is inside: logits at s predict labels at s + 1. The smoothing e spreads
    over the V - 1 wrong tokens, so the right one keeps exactly 1 - e.

    PyTorch spreads its smoothing over all V, so e V / (V - 1) there is e here. Only the counted rows are copied to
    float32: no cost for prompt and padding, and nothing that stands there reaches the gradient.
    """
    targets = labels[:, 1:]
    mask = targets != -100
    sequence, step = mask.nonzero(as_tuple=True)
    z = logits.flatten(0, 1).index_select(0, sequence * logits.shape[1] + step).float()
    over_all = label_smoothing * z.shape[1] / (z.shape[1] - 1)
    loss = F.cross_entropy(z, targets[mask], reduction="none", label_smoothing=over_all)
    return loss.new_zeros(mask.shape).masked_scatter(mask, loss), mask


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns max(-A r, -A clip(r, 1 - e, 1 + e)), r = pi / pi_old, e = cliprange (Schulman et al., arXiv 1707.06347,
    eq. 7).

    All (B, T); the loss is zero where masked. Statistics, detached: `ratio` (1 where masked), `approx_kl` = half the
    squared log-ratio, before its clamp, and boolean `clipped`, True where the clipped branch is the larger one, which
    is where the token has no gradient (|r - 1| > cliprange alone does not stop it).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    advantages = torch.where(mask, advantages, 0)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    statistics = {
        "ratio": ratio.detach(),
        "approx_kl": 0.5 * log_ratio.detach().square(),
        "clipped": bound > free,
    }
    return torch.maximum(free, bound), statistics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns half of max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2), e = cliprange_value (Engstrom et al.,
    arXiv 2005.12729).

    All (B, T); the loss is zero where masked. `cliprange_value` is absolute, in score units. Statistics: boolean
    `clipped`, True where the clipped branch is the larger one, which is where the token has no gradient.
    """
    values = torch.where(mask, values, 0)
    old_values = torch.where(mask, old_values, 0)
    returns = torch.where(mask, returns, 0)
    free = (values - returns).square()
    bound = (values.clamp(old_values - cliprange_value, old_values + cliprange_value) - returns).square()
    return 0.5 * torch.maximum(free, bound), {"clipped": bound > free}
