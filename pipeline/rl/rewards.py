"""What a response is worth to the policy: a function of its tokens."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.forward import head_outputs
from pipeline.models.multi_adapter import REWARD


@torch.no_grad()
def reward_model_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward model's head on the last real token, minus its shift: (B,) in reward units.

    input_ids (B, S), attention_mask (B, S) boolean, padded on either side or both. The last real token is EOS when
    the text is whole, as it was in reward training.
    """
    return at_last_token(head_outputs(model, input_ids, attention_mask, model.config.score_shift), attention_mask)


@torch.no_grad()
def adapter_reward_scores(actor_critic: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The same of a reward model that is an adapter on the policy's base."""
    return at_last_token(actor_critic(input_ids, attention_mask, as_adapter=REWARD)[0], attention_mask)


def at_last_token(outputs: Tensor, attention_mask: Tensor) -> Tensor:
    """outputs (B, S) at the last real token of each row, (B,)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask, positions, -1).amax(1)
    return outputs.gather(1, last[:, None]).squeeze(1)
