"""Masks, positions, log-probabilities and masked moments: what every loss here is written in.

    prompt, left-padded          response, right-padded
    [PAD  PAD  p    p    p]      [y0   y1   EOS  PAD]         length 3, has_eos True
     0    0    0    1    2        3    4    5    6            position_ids (equal everywhere when nothing is padded)
    (False ...            )       True True True False        response_mask: the EOS is an action, so it counts

Masks are boolean and True counts. What stands at a masked position (a NaN, an infinity, the log-probability of a
padding token) reaches neither a result nor a gradient: it is replaced before any arithmetic, because both 0 * NaN and
the gradient of `where` around a NaN are NaN. Sizes: B sequences, T response tokens, S tokens in all, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes and returns the sum to each of them; `identity` is the one for a single process."""


def identity(x: Tensor) -> Tensor:
    """Returns x: the sum over one process."""
    return x


def position_ids(attention_mask: Tensor) -> Tensor:
    """Returns (B, S) long positions that start at 0 on the first real token of each row.

    attention_mask (B, S) boolean. The sum is exclusive, so left padding moves no real token: a model with absolute
    positions (GPT-2) gives the same logits alone and in a padded batch.
    """
    counts = attention_mask.long()
    return counts.cumsum(dim=1) - counts


def response_length(response: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Returns how many tokens each response has, up to and with its first EOS, and whether it has one.

    response (B, T) long -> length (B,) long, has_eos (B,) boolean; a response without EOS has length T. The first EOS
    decides and not the padding token, so that a tokenizer whose padding is its EOS loses no EOS.
    """
    is_eos = response == eos_id
    not_after_eos = is_eos.long().cumsum(dim=1) - is_eos.long() == 0
    return not_after_eos.sum(dim=1), is_eos.any(dim=1)


def response_mask(length: Tensor, size: int) -> Tensor:
    """Returns the (B, size) boolean mask whose row b is True in its first length[b] slots; length (B,) long."""
    return torch.arange(size, device=length.device) < length[:, None]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the scalar sum of x where mask is True; x numeric or boolean, of mask's shape, else ValueError."""
    if x.shape != mask.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and its mask {tuple(mask.shape)}")
    return torch.where(mask, x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | None = None) -> Tensor:
    """Returns the scalar sum of x over mask, divided by denominator (scalar; the mask's own count when None).

    Callers that accumulate over micro-batches or processes pass the count over all of them: means of means weigh a
    short batch's tokens more than a long one's. A mask that is all False has no mean of its own: NaN.
    """
    return masked_sum(x, mask) / (mask.sum() if denominator is None else denominator)


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor]:
    """Returns the float64 scalar mean and biased variance of x over mask and over all processes.

    x, mask (B, T); `reduce` is called twice, in the same order everywhere. Two passes, since the one-pass formula
    subtracts two large numbers; biased (divided by n), since a single token then has variance 0 and not NaN.
    """
    x_real = x.double().masked_fill(~mask, 0)
    total, count = reduce(torch.stack([masked_sum(x_real, mask), mask.sum().double()]))
    mean = total / count
    return mean, reduce(masked_sum((x_real - mean).square(), mask)) / count


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Returns x (B, T) shifted and scaled to mean 0 and variance 1 over mask and all processes; zero where masked.

    Computed in float64 (see `masked_moments`), returned in x's type. Moments of one process or one
    minibatch would scale the same advantage differently from one to the next.
    """
    mean, variance = masked_moments(x, mask, reduce)
    centred = x.double().masked_fill(~mask, 0) - mean
    return (centred * (variance + 1e-8).rsqrt()).masked_fill(~mask, 0).to(x.dtype)


def logits_without(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Returns a copy of logits (..., V) in which token_ids have -inf: tokens the policy can then never emit.

    Used for the padding token, in sampling and in every scoring forward alike, so that both see one distribution.
    """
    return logits.index_fill(-1, torch.tensor(token_ids, dtype=torch.long, device=logits.device), -torch.inf)


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log pi(token) and H = -sum_v p_v log p_v in nats, each (B, T) float32.

    p = softmax(logits / temperature); logits (B, T, V), tokens (B, T) long: row t of logits predicts token t (callers
    shift). A token whose logit is -inf has log-probability -inf, and contributes 0 to the entropy and its gradient,
    the limit of p log p. Computed in float32: bfloat16 would leave errors of e^.0125 in a ratio.
    """
    log_p = (logits.float() / temperature).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim=-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1), entropy
