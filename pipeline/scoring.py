"""What a response is worth: to the policy, as a function of its tokens; to a judge, as a function of its text."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config import UserError
from pipeline.formats import read_rows
from pipeline.judges import Classifier, fit_classifier
from pipeline.models import head_outputs
from pipeline.roles import REWARD

LABELS = {"negative": 0, "positive": 1}


@torch.no_grad()
def reward_model_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward model's head on the last real token, minus its shift: (B,) in reward units.

    input_ids (B, S), attention_mask (B, S) boolean, padded on either side or both. The last real token is EOS when
    the text is whole, as it was in reward training.
    """
    return at_last_token(head_outputs(model, input_ids, attention_mask, model.config.score_shift), attention_mask)


@torch.no_grad()
def role_scores(actor_critic: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The same of a reward model that is an adapter on the policy's base."""
    return at_last_token(actor_critic(input_ids, attention_mask, as_role=REWARD)[0], attention_mask)


def at_last_token(outputs: Tensor, attention_mask: Tensor) -> Tensor:
    """outputs (B, S) at the last real token of each row, (B,)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask, positions, -1).amax(1)
    return outputs.gather(1, last[:, None]).squeeze(1)


def fitted_judge(file: str, seed: int) -> Classifier:
    """P(positive) of a text, by a classifier fitted to human labels that no stage has seen."""
    rows = read_rows(file, "text")
    groups = [row["key"] for row in rows] if all("key" in row for row in rows) else None
    for row in rows:
        if row.get("label") not in LABELS:
            raise UserError(f"{file}: label: expected {' or '.join(LABELS)}, got {row.get('label')!r:.40}")
    return fit_classifier([row["text"] for row in rows], [LABELS[row["label"]] for row in rows], seed, groups)
