"""Forwards that several roles share: hidden states, head outputs, log-probabilities of a response."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.core.tensors import logits_without, logprobs_and_entropy, position_ids
from pipeline.models.loading import Policy, unwrap_peft


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight (1, d) of the score head."""
    weight = model.get_submodule("score").weight
    assert isinstance(weight, Tensor)
    return weight


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The trunk's last hidden states (B, S, d); input_ids (B, S), attention_mask (B, S) boolean."""
    return model.base_model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state


def head_outputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, shift: Tensor | float) -> Tensor:
    """The head's output minus shift at every position, (B, S) fp32; input_ids (B, S), attention_mask (B, S) boolean."""
    hidden = last_hidden_states(model, input_ids, attention_mask)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head_weight(model).float()).squeeze(-1) - shift


MOST_LOGITS = 2**24
"""Logits turned into log-probabilities at a time (64 MiB in fp32), since that takes several copies of them. A larger
batch is split into parts, each recomputed in the backward pass, so that memory does not grow with the vocabulary."""


def response_logprobs(
    model: Policy,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_tokens: int,
    temperature: float,
    pad_id: int,
    with_hidden: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T), in nats, of the last T = response_tokens tokens at the sampling
    temperature.

    input_ids (B, S), attention_mask (B, S) boolean. The padding token is left out of the distribution, as in sampling.
    `with_hidden` gives a third: the trunk's last states (B, T, d), each the one from which its token is predicted.
    """
    states: list[Tensor] = []
    trunk = unwrap_peft(model).base_model
    hook = trunk.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    output = model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=response_tokens + 1,
    )
    hook.remove()
    logits, tokens = output.logits[:, :-1], input_ids[:, -response_tokens:]
    rows = max(1, MOST_LOGITS // logits[0].numel())
    if rows >= len(logits):
        columns = token_logprobs(logits, tokens, temperature, pad_id)
    else:
        parts = zip(logits.split(rows), tokens.split(rows), strict=True)
        made = [checkpoint(token_logprobs, *part, temperature, pad_id, use_reentrant=False) for part in parts]
        columns = tuple(torch.cat(column) for column in zip(*made, strict=True))
    return (*columns, states[0][:, -response_tokens - 1 : -1]) if with_hidden else columns


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float, pad_id: int) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T) of tokens (B, T) under logits (B, T, V) without the padding token."""
    return logprobs_and_entropy(logits_without(logits, [pad_id]), tokens, temperature)
