"""What happened (`Rollout`) and what to learn from it (`Experience`): from prompts to advantages.

    prompts -> generate -> Rollout -> score, policy, reference, critic -> token rewards -> GAE -> whiten -> Experience

Everything in an Experience is computed once per rollout, without gradient, and is never refreshed between epochs. The
log-probabilities that PPO calls old come from the same forward that training uses, so the first ratio is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pipeline.advantages import clip_scores, gae, kl_k1, replace_missing_eos, token_rewards
from pipeline.config import PPO, Evaluate, Reward, Sampling, UserError
from pipeline.data import length_batches, prompt_batch, prompt_ids, with_chat_template
from pipeline.formats import Text, read_rows
from pipeline.models import Policy, base_of, sampling_config
from pipeline.process import say
from pipeline.sources import DataError
from pipeline.tensors import Reduce, response_length, response_mask, whiten

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""Scores (B,) of token rows: input_ids (B, S) and attention_mask (B, S) boolean, prompt + response + EOS."""

Forward = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""(B, T) tensors of the last T tokens: of input_ids (B, S), attention_mask (B, S) boolean, T."""


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses sampled for them; S = P + T."""

    input_ids: Tensor  # (B, S) prompts left-padded, responses right-padded
    attention_mask: Tensor  # (B, S) boolean
    response_mask: Tensor  # (B, T) boolean, EOS included
    length: Tensor  # (B,) response tokens, EOS included
    has_eos: Tensor  # (B,) boolean
    sampled_logprobs: Tensor  # (B, T) nats, by the sampler's own forwards

    @property
    def size(self) -> int:
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        return self.input_ids[:, -self.size :]


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


class SampledLogprobs(LogitsProcessor):
    """Takes the log-probability of each token as `generate` samples it, and keeps no more logits than one token's."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.found: list[Tensor] = []
        self.log_p: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) as they are; input_ids (B, S) end with the token sampled from the scores before."""
        self.take(input_ids)
        self.log_p = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def take(self, input_ids: Tensor) -> None:
        if self.log_p is not None:
            self.found.append(self.log_p.gather(1, input_ids[:, -1:]))


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> Rollout:
    """Samples one response per prompt from exactly the distribution that is scored: temperature, and no other warping.

    Draws from torch's global generator. Responses are padded to max_new_tokens. A streamer sees one prompt's tokens as
    they come.
    """
    ids, prompt_mask = prompt_batch(tokenizer, prompts, sampling.max_prompt_tokens)
    ids, prompt_mask = ids.to(policy.device), prompt_mask.to(policy.device)
    model = base_of(policy)
    config = sampling_config(tokenizer, model)
    config.max_new_tokens, config.temperature = sampling.max_new_tokens, sampling.temperature
    model.generation_config = config  # a setting left open, such as min_new_tokens, would be taken from the model's own
    was_training = model.training
    model.eval()
    sampled = SampledLogprobs(sampling.temperature)
    output = model.generate(  # type: ignore[operator]  # declared by a mixin that mypy does not see
        input_ids=ids,
        attention_mask=prompt_mask.long(),
        use_cache=True,
        streamer=streamer,
        logits_processor=[sampled],
    )
    sampled.take(output)
    model.train(was_training)
    responses = output[:, ids.shape[1] :]
    rest = (0, sampling.max_new_tokens - responses.shape[1])
    responses = nn.functional.pad(responses, rest, value=tokenizer.pad_token_id)
    logprobs = nn.functional.pad(torch.cat(sampled.found, 1), rest)
    length, has_eos = response_length(responses, tokenizer.eos_token_id)
    mask = response_mask(length, sampling.max_new_tokens)
    return Rollout(
        input_ids=torch.cat([ids, responses], 1),
        attention_mask=torch.cat([prompt_mask, mask], 1),
        response_mask=mask,
        length=length,
        has_eos=has_eos,
        sampled_logprobs=logprobs,
    )


def read_prompts(
    source: str, limit: int, tokenizer: PreTrainedTokenizerBase, config: PPO | Reward | Evaluate
) -> list[Text]:
    """The sources' prompts; those longer than max_prompt_tokens treated as `long_prompts` says, and counted."""
    rows = read_rows(source, "prompt", limit, config.run.bad_rows, config.run.seed)
    with_chat_template(tokenizer, rows)
    return fitting_prompts([row["prompt"] for row in rows], tokenizer, config.sampling, source)


def fitting_prompts(
    prompts: list[Text], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, source: str
) -> list[Text]:
    """The prompts, those longer than max_prompt_tokens treated as `long_prompts` says."""
    most, policy = sampling.max_prompt_tokens, sampling.long_prompts
    longer = [len(ids) > most for ids in prompt_ids(tokenizer, prompts)]
    if not any(longer):
        return prompts
    told = f"{source}: {sum(longer):,} of {len(prompts):,} prompts are longer than {most} tokens"
    if policy == "error" or (policy == "drop" and all(longer)):
        raise DataError(f"{told}: raise max_prompt_tokens, or say --long_prompts cut")
    say(f"{told} ({policy})")
    return [prompt for prompt, is_longer in zip(prompts, longer, strict=True) if policy == "cut" or not is_longer]


def checked_scores(parts: Sequence[Tensor], mask: Tensor) -> Tensor:
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
    old_logprobs, old_values, all_scores = torch.cat(logprobs), torch.cat(values), checked_scores(scores, mask)
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
