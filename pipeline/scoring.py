"""Score functions: what a response is worth, as a function of its tokens."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models import head_outputs


@torch.no_grad()
def reward_model_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward model's head on the last real token, minus its shift: (B,) in reward units.

    input_ids (B, S), attention_mask (B, S) boolean, padded on either side or both. The last real token is EOS when
    the text is whole, as it was in reward training.
    """
    outputs = head_outputs(model, input_ids, attention_mask, model.config.score_shift)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask, positions, -1).amax(1)
    return outputs.gather(1, last[:, None]).squeeze(1)
