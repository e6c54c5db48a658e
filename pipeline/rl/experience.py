"""From a rollout to what PPO learns from: scores, KL, token rewards, advantages.

    Rollout -> score, policy, reference, critic -> token rewards -> GAE -> whiten -> Experience

Everything in an Experience is computed once per rollout, without gradient, and is never refreshed between epochs. The
log-probabilities that PPO calls old come from the same forward that training uses, so the first ratio is 1.
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
    def size(self) -> int:
        return self.response_mask.shape[1]

    def __getitem__(self, rows: Tensor) -> "Experience":
        return Experience(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def micro_batches(self, rows: Tensor, size: int) -> list["Experience"]:
        """The given rows in parts of at most `size` rows of like lengths, without columns of nothing but padding."""
        lengths = self.attention_mask[rows].sum(1).tolist()
        return [self[rows[part]]._trimmed() for part in length_batches(lengths, size)]

    def _trimmed(self) -> "Experience":
        columns = self.attention_mask.any(0)  # one run: prompts are padded on the left, responses on the right
        per_token = self.response_mask.any(0)
        masks = {len(columns): columns, len(per_token): per_token}
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Experience(**{name: x[:, masks[x.shape[1]]] if x.ndim == 2 else x for name, x in tensors.items()})


def validate_scores(parts: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The micro-batches' scores (B,) as one; UserError for another shape, or a score that is no finite number."""
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) != 1 for shape in shapes) or sum(shape[0] for shape in shapes) != len(mask):
        raise UserError(
            f"the score function gave shapes {shapes} for {len(mask)} responses; expected one number for each"
        )
    scores = torch.cat(list(parts)).float()
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"the score of response {row} is {scores[row].item()}; a score must be a finite number")
    return scores


@torch.no_grad()
def to_experience(
    rollout: Rollout, actor_critic: Forward, reference: Forward, score: ScoreFunction, config: PPO, reduce: Reduce
) -> Experience:
    """The rollout with old log-probabilities, values, KL, rewards, returns and globally whitened advantages.

    `actor_critic` gives (logprobs, entropies, values), `reference` gives (logprobs, entropies); both are called on
    micro-batches of the size that training uses. `reduce` sums a tensor over processes.
    """
    logprobs, values, ref_logprobs, scores = [], [], [], []
    for ids, mask in zip(
        rollout.input_ids.split(config.micro_batch), rollout.attention_mask.split(config.micro_batch), strict=True
    ):
        logp, _, value = actor_critic(ids, mask, rollout.size)
        logprobs.append(logp)
        values.append(value)
        ref_logprobs.append(reference(ids, mask, rollout.size)[0])
        scores.append(score(ids, mask))
    mask = rollout.response_mask
    old_logprobs, old_values, all_scores = torch.cat(logprobs), torch.cat(values), validate_scores(scores, mask)
    kl = kl_k1(old_logprobs, torch.cat(ref_logprobs)).masked_fill(~mask, 0)
    used = replace_missing_eos(clip_scores(all_scores, config.score_clip), rollout.has_eos, config.missing_eos_score)
    rewards = token_rewards(used, kl, mask, config.kl_coef)
    advantages = gae(rewards, old_values, mask, config.gamma, config.lam)
    return Experience(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        response_mask=mask,
        has_eos=rollout.has_eos,
        sampled_logprobs=rollout.sampled_logprobs,
        old_logprobs=old_logprobs,
        old_values=old_values,
        kl=kl,
        scores=all_scores,
        rewards=rewards,
        returns=(advantages + old_values).masked_fill(~mask, 0),
        advantages=whiten(advantages, mask, reduce),
    )
