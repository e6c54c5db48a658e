"""All that PPO trains as one module: the policy, and a critic that is a model, an adapter or a head on its trunk."""

from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.data.tokenizer import ModelError
from pipeline.models.forward import head_weight, last_hidden_states, response_logprobs
from pipeline.models.heads import Critic, ValueHead, load_reward_model_with_adapter
from pipeline.models.loading import Policy, disable_dropout_, freeze, full_precision_base, merge_adapter, unwrap_peft
from pipeline.models.multi_adapter import (
    POLICY,
    PREFIX,
    REFERENCE,
    REWARD,
    adapter_config,
    adapter_layers,
    adapter_type,
    add_adapter,
    detach_adapter,
    hash_trunk,
    recompute_contexts,
    use_adapter,
)
from pipeline.runtime.internals import enable_activation_checkpointing, layers_kept_whole


def add_reward_model(path: str | Path, policy: Policy) -> PreTrainedModel | ValueHead:
    """The frozen reward model. Where it and the policy are adapters, its adapter is added to the policy's base, and
    its head is what is returned.

    Raises ModelError for another type of adapter than the policy's, or one on another base.
    """
    model = load_reward_model_with_adapter(path)
    if not isinstance(policy, PeftModel) or not adapter_layers(model):
        return freeze(disable_dropout_(merge_adapter(model)))
    shift, weight = model.config.score_shift, head_weight(model)
    saved = detach_adapter(model)
    assert saved is not None
    theirs, ours = adapter_type(saved.config), adapter_type(adapter_config(policy))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is {theirs} and the policy {ours}: adapters on one base have one type; train "
            f"one of them again with the other's"
        )
    theirs, ours = hash_trunk(model), hash_trunk(full_precision_base(unwrap_peft(policy)))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is an adapter on another base ({theirs}) than the policy's ({ours}): train the reward model "
            "with --base of SFT's final/ or, where SFT is an adapter itself, of the model that SFT started from"
        )
    head = ValueHead(weight.shape[1], REWARD)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(-shift)
    weights = {key: value for key, value in saved.weights.items() if key != f"{PREFIX}score.weight"}
    add_adapter(policy, REWARD, saved.config, weights)
    return freeze(head)


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
        self._no_split_modules = layers_kept_whole(unwrap_peft(policy))

    def checkpoint_activations(self) -> None:
        """Has the layers keep only their input in train mode; dropout is 0, so both modes compute the same."""
        self.recomputes_layers = True
        for model in (unwrap_peft(self.policy), *([self.critic.model] if isinstance(self.critic, Critic) else [])):
            contexts = partial(recompute_contexts, adapter_layers(model))
            enable_activation_checkpointing(model, context_fn=contexts)

    def tie_weights(self) -> None:
        """Makes tied weights one again, after FSDP has loaded them one by one."""
        unwrap_peft(self.policy).tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_tokens: int = 0,
        update_policy: bool = True,
        as_adapter: str = POLICY,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities, entropies and values, each (B, T), of the last T = response_tokens tokens of (B, S) rows.

        values[:, t] is read before token t is emitted, as the log-probability of token t is. Without `update_policy`
        the values have no gradient in the policy's trunk. `as_adapter`: of the reference, without values; or the reward
        model's scores (B, S) of what ends at each token, alone.
        """
        rows = (input_ids, attention_mask, response_tokens, self.temperature, self.pad_id)
        if as_adapter == REWARD:
            assert self.reward is not None
            return (self.adapter_outputs(self.reward, input_ids, attention_mask),)
        if as_adapter == REFERENCE:
            assert isinstance(self.policy, PeftModel)
            with use_adapter(self.policy, REFERENCE if REFERENCE in self.policy.peft_config else None):
                return response_logprobs(self.policy, *rows)
        if isinstance(self.critic, ValueHead) and self.critic.adapter == POLICY:
            logprobs, entropies, hidden = response_logprobs(self.policy, *rows, with_hidden=True)
            return logprobs, entropies, self.critic(hidden if update_policy else hidden.detach())
        if isinstance(self.critic, Critic):
            values = self.critic(input_ids, attention_mask)
        else:
            values = self.adapter_outputs(self.critic, input_ids, attention_mask)
        logprobs, entropies = response_logprobs(self.policy, *rows)
        return logprobs, entropies, values[:, -response_tokens - 1 : -1]

    def adapter_outputs(self, head: ValueHead, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A head on the hidden states of its adapter, (B, S) fp32.

        For a gradient the trunk keeps its input alone. Called before the policy's forward it is computed again after
        the policy's backward, which frees what that has kept: there are never two roles' activations at a time.
        """

        def states() -> Tensor:
            with use_adapter(self.policy, head.adapter):
                return last_hidden_states(unwrap_peft(self.policy), input_ids, attention_mask)

        if not torch.is_grad_enabled() or (self.recomputes_layers and self.training):
            return head(states())
        return head(checkpoint(states, use_reentrant=False))

    def save_critic(self, folder: Path) -> None:
        """A directory from which `load_reward_model` gives these values."""
        if isinstance(self.critic, ValueHead):
            self.critic.save(folder, self.policy, self.pad_id)
        else:
            self.critic.save(folder)
