"""All that PPO trains as one module: the policy, and a critic that is a model, a role or a head on its trunk."""

import copy
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
)

from pipeline.models import (
    Policy,
    base_of,
    frozen,
    head_outputs,
    head_weight,
    in_full,
    last_states,
    loaded_reward_model,
    merge_adapter,
    new_classifier,
    save_with_base,
    without_dropout,
)
from pipeline.roles import (
    POLICY,
    PREFIX,
    REFERENCE,
    REWARD,
    adapter_layers,
    add_role,
    config_of,
    fill,
    in_the_same_role,
    kind,
    role,
    taken_off,
    trunk_fingerprint,
)
from pipeline.tensors import logits_without, logprobs_and_entropy, position_ids
from pipeline.tokenizing import ModelError

MOST_LOGITS = 2**24
"""How many are made into log-probabilities at a time, 64 MiB in fp32: that takes several copies of them, and with a
vocabulary of 50,000 more memory than the model. Of more, the parts are computed again in the backward pass."""


class Critic(nn.Module):
    """State values of a backbone of its own, started from a classifier: the reward model (Ouyang et al., arXiv
    2203.02155, C.4), or the SFT policy under a head of zeros.

    `shift` starts as the classifier's and is trained: the value head's bias, negated.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier).requires_grad_(True)
        self.shift = nn.Parameter(torch.tensor([float(classifier.config.score_shift)]))  # ZeRO-3 and FSDP cut no scalar

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, S) of the states after each token."""
        return head_outputs(self.model, input_ids, attention_mask, self.shift)

    def save(self, folder: Path) -> None:
        self.model.config.score_shift = self.shift.item()
        self.model.save_pretrained(folder)


class ValueHead(nn.Linear):
    """A linear function of the last hidden states of one role on the policy's base.

    State values of the policy's own states, zero at first (Ziegler et al., arXiv 1909.08593): one trunk, one forward,
    and the value loss trains the policy's trunk too. Or those of the critic's adapter, or the score of the reward's:
    then weight and bias are a classifier's head and its shift, negated.
    """

    def __init__(self, width: int, role: str = POLICY) -> None:
        super().__init__(width, 1)
        self.role = role
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, T) fp32 of hidden states (B, T, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def save(self, folder: Path, policy: Policy, pad_id: int) -> None:
        """Writes the classifier that gives these values: the policy's trunk, its adapter merged, or the critic's role
        on the base, in the form of a reward model that is an adapter."""
        own = in_full(base_of(policy))
        if self.role == POLICY:
            own = merge_adapter(copy.deepcopy(own))
        classifier: Policy = new_classifier(own, pad_id)
        head_weight(base_of(classifier)).copy_(self.weight)
        classifier.config.score_shift = -self.bias.item()
        if self.role != POLICY:
            assert isinstance(policy, PeftModel)
            config = copy.deepcopy(policy.peft_config[self.role])
            config.task_type = TaskType.SEQ_CLS
            weights = get_peft_model_state_dict(policy, adapter_name=self.role)
            classifier = get_peft_model(base_of(classifier), config)
            fill(classifier, POLICY, weights | {f"{PREFIX}score.weight": self.weight})
        save_with_base(classifier, folder)


def load_reward(path: str | Path, policy: Policy) -> PreTrainedModel | ValueHead:
    """The frozen reward model; where it and the policy are adapters its head, its adapter then on the policy's base.

    Raises ModelError where it cannot be a role there: another type of adapter than the policy's, or another base.
    """
    model = loaded_reward_model(path)
    if not isinstance(policy, PeftModel) or not adapter_layers(model):
        return frozen(without_dropout(merge_adapter(model)))
    shift, weight = model.config.score_shift, head_weight(model)
    saved = taken_off(model)
    assert saved is not None
    theirs, ours = kind(saved.config), kind(config_of(policy))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is {theirs} and the policy {ours}: roles on one base have one type of adapter; train "
            f"one of them again with the other's"
        )
    theirs, ours = trunk_fingerprint(model), trunk_fingerprint(in_full(base_of(policy)))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is an adapter on another base ({theirs}) than the policy's ({ours}): train the reward model "
            "with --base of SFT's final/ or, where SFT is an adapter itself, of the model that SFT started from"
        )
    head = ValueHead(weight.shape[1], REWARD)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(-shift)
    own = {key: value for key, value in saved.weights.items() if key != f"{PREFIX}score.weight"}
    add_role(policy, REWARD, saved.config, own)
    return frozen(head)


class ActorCritic(nn.Module):
    """All that PPO trains, as one module: policy and critic, one forward, one optimiser.

    And what is frozen on the policy's base: the reference, and the reward model if `reward` is its head.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic | ValueHead,
        temperature: float,
        pad_id: int,
        reward: ValueHead | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.critic, self.reward = policy, critic, reward
        self.temperature, self.pad_id = temperature, pad_id
        self.recomputes_layers = False
        self._no_split_modules = base_of(policy)._no_split_modules  # the layers that FSDP gathers one at a time

    def checkpoint_activations(self) -> None:
        """In train mode the layers then keep their input alone; dropout is 0, so both modes compute the same."""
        self.recomputes_layers = True
        for model in (base_of(self.policy), *([self.critic.model] if isinstance(self.critic, Critic) else [])):
            in_role = partial(in_the_same_role, adapter_layers(model))
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": in_role})

    def tie_weights(self) -> None:
        """Makes tied weights one again, after FSDP has loaded them one by one."""
        base_of(self.policy).tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        size: int = 0,
        trains_policy: bool = True,
        as_role: str = POLICY,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities, entropies and values, each (B, T), of the last T = size tokens of (B, S) rows.

        values[:, t] is read before token t is emitted, as the log-probability of token t is. Without `trains_policy`
        the values have no gradient in the policy's trunk. `as_role`: of the reference, without values; or the reward
        role's scores (B, S) of what ends at each token, alone.
        """
        rows = (input_ids, attention_mask, size, self.temperature, self.pad_id)
        if as_role == REWARD:
            assert self.reward is not None
            return (self.role_outputs(self.reward, input_ids, attention_mask),)
        if as_role == REFERENCE:
            assert isinstance(self.policy, PeftModel)
            with role(self.policy, REFERENCE if REFERENCE in self.policy.peft_config else None):
                return response_logprobs(self.policy, *rows)
        if isinstance(self.critic, ValueHead) and self.critic.role == POLICY:
            logprobs, entropies, hidden = response_logprobs(self.policy, *rows, with_hidden=True)
            return logprobs, entropies, self.critic(hidden if trains_policy else hidden.detach())
        if isinstance(self.critic, Critic):
            values = self.critic(input_ids, attention_mask)
        else:
            values = self.role_outputs(self.critic, input_ids, attention_mask)
        logprobs, entropies = response_logprobs(self.policy, *rows)
        return logprobs, entropies, values[:, -size - 1 : -1]

    def role_outputs(self, head: ValueHead, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A head on the states of its role, (B, S) fp32.

        For a gradient the trunk keeps its input alone. Called before the policy's forward it is computed again after
        the policy's backward, which frees what that has kept: there are never two roles' activations at a time.
        """

        def states() -> Tensor:
            with role(self.policy, head.role):
                return last_states(base_of(self.policy), input_ids, attention_mask)

        if not torch.is_grad_enabled() or (self.recomputes_layers and self.training):
            return head(states())
        return head(checkpoint(states, use_reentrant=False))

    def save_critic(self, folder: Path) -> None:
        """A directory from which `load_reward_model` gives these values."""
        if isinstance(self.critic, ValueHead):
            self.critic.save(folder, self.policy, self.pad_id)
        else:
            self.critic.save(folder)


def response_logprobs(
    model: Policy,
    input_ids: Tensor,
    attention_mask: Tensor,
    size: int,
    temperature: float,
    pad_id: int,
    with_hidden: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T), in nats, of the last T = size tokens at the sampling temperature.

    input_ids (B, S), attention_mask (B, S) boolean. The padding token is left out of the distribution, as in sampling.
    `with_hidden` gives a third: the trunk's last states (B, T, d), each the one from which its token is predicted.
    """
    states: list[Tensor] = []
    trunk = base_of(model).base_model
    hook = trunk.register_forward_hook(lambda *given: states.append(given[2].last_hidden_state))
    output = model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=size + 1,
    )
    hook.remove()
    logits, tokens = output.logits[:, :-1], input_ids[:, -size:]
    rows = max(1, MOST_LOGITS // logits[0].numel())
    if rows >= len(logits):
        found = token_logprobs(logits, tokens, temperature, pad_id)
    else:
        parts = zip(logits.split(rows), tokens.split(rows), strict=True)
        made = [checkpoint(token_logprobs, *part, temperature, pad_id, use_reentrant=False) for part in parts]
        found = tuple(torch.cat(column) for column in zip(*made, strict=True))
    return (*found, states[0][:, -size - 1 : -1]) if with_hidden else found


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float, pad_id: int) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T) of tokens (B, T) under logits (B, T, V) without the padding token."""
    return logprobs_and_entropy(logits_without(logits, [pad_id]), tokens, temperature)
