"""From prompts to sampled responses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pipeline.config.dials import Sampling
from pipeline.core.tensors import response_length, response_mask
from pipeline.data.messages import Text
from pipeline.data.tokenize import decode, prompt_batch
from pipeline.models.loading import Policy, unwrap_peft
from pipeline.models.saving import sampling_config
from pipeline.runtime.precision import autocast


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
    def response_tokens(self) -> int:
        """T: slots of a response, padding included."""
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        return self.input_ids[:, -self.response_tokens :]


@dataclass(frozen=True)
class Responses:
    """What a policy wrote for n prompts, and what was measured on each response."""

    texts: list[str]
    measures: dict[str, Tensor]  # (n,) float32 in ordinary memory, by name


class SampledLogprobs(LogitsProcessor):
    """Takes the log-probability of each token as `generate` samples it, and keeps no more logits than one token's."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.logprobs: list[Tensor] = []
        self.log_p: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) as they are; input_ids (B, S) end with the token sampled from the scores before."""
        self.take(input_ids)
        self.log_p = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def take(self, input_ids: Tensor) -> None:
        if self.log_p is not None:
            self.logprobs.append(self.log_p.gather(1, input_ids[:, -1:]))


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
    model = unwrap_peft(policy)
    config = sampling_config(tokenizer, model)
    config.max_new_tokens, config.temperature = sampling.max_new_tokens, sampling.temperature
    model.generation_config = config  # a setting left open, such as min_new_tokens, would be taken from the model's own
    was_training = model.training
    model.eval()
    sampled_logprobs = SampledLogprobs(sampling.temperature)
    output = model.generate(  # type: ignore[operator]  # declared by a mixin that mypy does not see
        input_ids=ids,
        attention_mask=prompt_mask.long(),
        use_cache=True,
        streamer=streamer,
        logits_processor=[sampled_logprobs],
    )
    sampled_logprobs.take(output)
    model.train(was_training)
    responses = output[:, ids.shape[1] :]
    rest = (0, sampling.max_new_tokens - responses.shape[1])
    responses = nn.functional.pad(responses, rest, value=tokenizer.pad_token_id)
    logprobs = nn.functional.pad(torch.cat(sampled_logprobs.logprobs, 1), rest)
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


def rollouts(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], sampling: Sampling, batch_size: int
) -> Iterator[Rollout]:
    """One sampled response to each prompt, `batch_size` at a time."""
    for start in range(0, len(prompts), batch_size):
        yield generate(policy, tokenizer, prompts[start : start + batch_size], sampling)


@torch.no_grad()
def respond_and_score(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    sampling: Sampling,
    measure: Callable[[Rollout], Mapping[str, Tensor]],
    batch_size: int,
    precision: str = "fp32",
) -> Responses:
    """One sampled response to each prompt, `batch_size` at a time, and what `measure` gives of each, (B,) by name.

    Draws from torch's global generator: with the seed set before, the same noise for every policy.
    """
    texts: list[str] = []
    measures: dict[str, list[Tensor]] = {}
    with autocast(precision):
        for rollout in rollouts(policy, tokenizer, prompts, sampling, batch_size):
            for name, values in measure(rollout).items():
                measures.setdefault(name, []).append(values.float().cpu())
            texts += [decode(tokenizer, ids) for ids in rollout.responses.tolist()]
    return Responses(texts, {name: torch.cat(parts) for name, parts in measures.items()})
