"""Score and value heads: sequence classifiers with one label, and linear heads on a policy's own trunk.

A reward model and a critic are one kind of thing: transformers' sequence classifier with one label, whose head is read
at the last token (score) or before every response token (values). The constant that gives the SFT policy mean score 0
is `config.score_shift`; scoring subtracts it and a critic made from the reward model starts from it, so that before
training the critic predicts just what the reward model would pay.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.tokenizer import ModelError
from pipeline.models.forward import head_outputs, head_weight
from pipeline.models.loading import (
    ATTN_IMPLEMENTATION,
    Policy,
    disable_dropout_,
    full_precision_base,
    is_4bit,
    load_language_model,
    load_pretrained,
    merge_adapter,
    unwrap_peft,
)
from pipeline.models.multi_adapter import POLICY, PREFIX, adapter_state_dict, base_state_dict, load_adapter_weights
from pipeline.models.saving import save_with_base


def new_classifier(language_model: PreTrainedModel, pad_id: int) -> PreTrainedModel:
    """A sequence classifier with one label on a copy of the language model's trunk; its head is zero, its shift too.

    A trunk in 4 bits is not copied.
    """
    config = copy.deepcopy(language_model.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    config.score_shift = 0.0
    device = torch.device("meta") if is_4bit(language_model) else nullcontext()
    with device:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=ATTN_IMPLEMENTATION
        )
    if is_4bit(language_model):  # the trunk itself: PEFT and bitsandbytes know its layers
        setattr(model, model.base_model_prefix, language_model.base_model)
        model.score = nn.Linear(config.hidden_size, 1, bias=False, device=language_model.device)
        model.is_loaded_in_4bit, model.name_or_path = True, language_model.name_or_path
    else:
        model.base_model.load_state_dict(base_state_dict(language_model.base_model))
    nn.init.zeros_(head_weight(model))
    return disable_dropout_(model)


def new_reward_model(path: str | Path, tokenizer: PreTrainedTokenizerBase, in_4bit: bool = False) -> PreTrainedModel:
    """A language model's classifier with its head drawn from N(0, 1/(d+1)).

    The head's scale is that of Stiennon et al. (arXiv 2009.01325); its score starts near unit variance.
    """
    model = new_classifier(load_language_model(path, in_4bit), tokenizer.pad_token_id)
    nn.init.normal_(head_weight(model), std=(model.config.hidden_size + 1) ** -0.5)
    return model


def load_reward_model(path: str | Path) -> PreTrainedModel:
    """A reward model or critic with its head, an adapter merged into it.

    Raises ModelError if the head or the shift was not saved with it, or another head that would not be used.
    """
    return disable_dropout_(merge_adapter(load_reward_model_with_adapter(path)))


def load_reward_model_with_adapter(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """As `load_reward_model`, but an adapter saved in the directory stays on the model, and dropout stays."""
    model, info = load_pretrained(AutoModelForSequenceClassification, path, in_4bit)
    if info["missing_keys"] or info["unexpected_keys"]:
        keys = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise ModelError(f"{path}: not a whole reward model: missing or unused weights {', '.join(keys[:5])}")
    if model.config.num_labels != 1 or not hasattr(model.config, "score_shift"):
        raise ModelError(f"{path}: expected a reward model with one label and a score_shift, made by stages/reward.py")
    return model


class Critic(nn.Module):
    """State values of a backbone of its own, started from a classifier: the reward model (Ouyang et al., arXiv
    2203.02155, C.4), or the SFT policy under a head of zeros.

    `shift` starts as the classifier's and is trained: the value head's bias, negated.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier).requires_grad_(True)
        self.shift = nn.Parameter(
            torch.tensor([float(classifier.config.score_shift)])
        )  # ZeRO-3 and FSDP shard no scalar

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, S) of the states after each token."""
        return head_outputs(self.model, input_ids, attention_mask, self.shift)

    def save(self, folder: Path) -> None:
        self.model.config.score_shift = self.shift.item()
        self.model.save_pretrained(folder)


class ValueHead(nn.Linear):
    """A linear function of the last hidden states of one adapter on the policy's base.

    State values of the policy's own states, zero at first (Ziegler et al., arXiv 1909.08593): one trunk, one forward,
    and the value loss trains the policy's trunk too. Or those of the critic's adapter, or the score of the reward's:
    then weight and bias are a classifier's head and its shift, negated.
    """

    def __init__(self, width: int, adapter: str = POLICY) -> None:
        super().__init__(width, 1)
        self.adapter = adapter
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, T) fp32 of hidden states (B, T, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def save(self, folder: Path, policy: Policy, pad_id: int) -> None:
        """Writes the classifier that gives these values: the policy's trunk, its adapter merged, or the critic's
        adapter on the base, in the form of a reward model that is an adapter."""
        base = full_precision_base(unwrap_peft(policy))
        if self.adapter == POLICY:
            base = merge_adapter(copy.deepcopy(base))
        classifier: Policy = new_classifier(base, pad_id)
        head_weight(unwrap_peft(classifier)).copy_(self.weight)
        classifier.config.score_shift = -self.bias.item()
        if self.adapter != POLICY:
            assert isinstance(policy, PeftModel)
            config = copy.deepcopy(policy.peft_config[self.adapter])
            config.task_type = TaskType.SEQ_CLS
            weights = adapter_state_dict(policy, self.adapter)
            classifier = get_peft_model(unwrap_peft(classifier), config)
            load_adapter_weights(classifier, POLICY, weights | {f"{PREFIX}score.weight": self.weight})
        save_with_base(classifier, folder)
