"""From a rollout to what PPO learns from: scores, KL, token rewards, advantages.

    Rollout -> score_rollout (score, policy, reference, critic) -> token rewards -> GAE -> whiten -> Experience

All of it is computed once per rollout, without gradient, and is never refreshed between epochs. The log-probabilities
that PPO calls old come from the same forward that training uses, so the first ratio is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.stages import PPO
from pipeline.core.advantages import clip_scores, gae, kl_k1, replace_missing_eos, token_rewards
from pipeline.core.tensors import Reduce, whiten
from pipeline.data.tokenize import length_batches
from pipeline.rl.rollout import Rollout

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""Scores (B,) of token rows: input_ids (B, S) and attention_mask (B, S) boolean, prompt + response + EOS."""

Forward = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""(B, T) tensors of the last T tokens: of input_ids (B, S), attention_mask (B, S) boolean, T."""


@dataclass(frozen=True)
class ScoredRollout:
    """What the four models say of a rollout; masked slots may hold anything."""

    old_logprobs: Tensor  # (B, T) nats, by the forward that trains
    old_values: Tensor  # (B, T) reward units
    kl: Tensor  # (B, T) nats, k1 estimate against the reference, zero where masked
    scores: Tensor  # (B,) as the reward says


@dataclass(frozen=True)
class Experience:
    """One rollout with all that the losses need; every tensor is detached."""

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S) boolean
    response_mask: Tensor  # (B, T) boolean
    has_eos: Tensor  # (B,) boolean
    sampled_logprobs: Tensor  # (B, T) nats, by the sampler's own forwards
    old_logprobs: Tensor  # (B, T) nats, by the forward that trains
    old_values: Tensor  # (B, T) reward units
    kl: Tensor  # (B, T) nats, k1 estimate against the reference
    scores: Tensor  # (B,) as the reward says, before they are clipped and a missing EOS replaces them
    rewards: Tensor  # (B, T) reward units
    returns: Tensor  # (B, T) reward units
    advantages: Tensor  # (B, T) whitened over all processes

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def response_tokens(self) -> int:
        """T: slots of a response, padding included."""
        return self.response_mask.shape[1]

    def __getitem__(self, rows: Tensor) -> "Experience":
        return Experience(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def micro_batches(self, rows: Tensor, size: int) -> list["Experience"]:
        """The given rows in parts of at most `size` rows of like lengths, without columns of nothing but padding."""
        lengths = self.attention_mask[rows].sum(1).tolist()
        return [self[rows[part]]._trim() for part in length_batches(lengths, size)]

    def _trim(self) -> "Experience":
        columns = self.attention_mask.any(0)  # one run: prompts are padded on the left, responses on the right
        per_token = self.response_mask.any(0)
        masks = {len(columns): columns, len(per_token): per_token}
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Experience(**{name: x[:, masks[x.shape[1]]] if x.ndim == 2 else x for name, x in tensors.items()})


@torch.no_grad()
def score_rollout(
    rollout: Rollout, actor_critic: Forward, reference: Forward, score: ScoreFunction, micro_batch: int
) -> ScoredRollout:
    """Old log-probabilities, values, KL and scores of a rollout.

    `actor_critic` gives (logprobs, entropies, values), `reference` gives (logprobs, entropies); both are called on
    micro-batches of the size that training uses.
    """
    logprobs, values, ref_logprobs, scores = [], [], [], []
    for ids, mask in zip(rollout.input_ids.split(micro_batch), rollout.attention_mask.split(micro_batch), strict=True):
        logp, _, value = actor_critic(ids, mask, rollout.response_tokens)
        logprobs.append(logp)
        values.append(value)
        ref_logprobs.append(reference(ids, mask, rollout.response_tokens)[0])
        scores.append(score(ids, mask))
    old_logprobs = torch.cat(logprobs)
    return ScoredRollout(
        old_logprobs=old_logprobs,
        old_values=torch.cat(values),
        kl=kl_k1(old_logprobs, torch.cat(ref_logprobs)).masked_fill(~rollout.response_mask, 0),
        scores=validate_scores(scores, len(rollout.response_mask)),
    )


def validate_scores(parts: Sequence[Tensor], count: int) -> Tensor:
    """The micro-batches' scores (B,) as one; UserError for another shape, or a score that is no finite number."""
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) != 1 for shape in shapes) or sum(shape[0] for shape in shapes) != count:
        raise UserError(f"the score function gave shapes {shapes} for {count} responses; expected one number for each")
    scores = torch.cat(list(parts)).float()
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"the score of response {row} is {scores[row].item()}; a score must be a finite number")
    return scores


@torch.no_grad()
def make_experience(rollout: Rollout, scored: ScoredRollout, config: PPO, kl_coef: float, reduce: Reduce) -> Experience:
    """The rollout with token rewards, returns and globally whitened advantages; `reduce` sums over processes.

    `kl_coef` is what a nat of KL costs now: the dial's value, or where `adaptive_kl` has steered it.
    """
    mask = rollout.response_mask
    scores = clip_scores(scored.scores, config.score_clip)
    scores = replace_missing_eos(scores, rollout.has_eos, config.missing_eos_score)
    rewards = token_rewards(scores, scored.kl, mask, kl_coef)
    advantages = gae(rewards, scored.old_values, mask, config.gamma, config.lam)
    return Experience(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        response_mask=mask,
        has_eos=rollout.has_eos,
        sampled_logprobs=rollout.sampled_logprobs,
        old_logprobs=scored.old_logprobs,
        old_values=scored.old_values,
        kl=scored.kl,
        scores=scored.scores,
        rewards=rewards,
        returns=(advantages + scored.old_values).masked_fill(~mask, 0),
        advantages=whiten(advantages, mask, reduce),
    )
