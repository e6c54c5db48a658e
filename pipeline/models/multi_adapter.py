"""Several adapters on one frozen base: which of them the layers use, adding one, detaching one.

    base --+-- default     the policy: trained
           +-- reference   SFT's adapter, frozen; where SFT is a full model the reference is the base itself
           +-- critic      trained, under a value head
           +-- reward      frozen, under the score head

Policy, reference, critic and reward model differ only in the adapter that the layers use. It is switched without PEFT's
`set_adapter` and `disable_adapter`: these change `requires_grad` as well, which must stay as it is once the optimiser
and the process group know the parameters. Heads are no part of an adapter here, but linear layers (`models.heads`).
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.runtime.hashing import hash_value
from pipeline.runtime.internals import active_adapters, forget_adapter, set_active_adapters

POLICY, REFERENCE, CRITIC, REWARD = "default", "reference", "critic", "reward"
AdapterConfig = LoraConfig | IA3Config
PREFIX = "base_model.model."  # of PEFT's names of what is inside a PeftModel


@dataclass(frozen=True)
class DetachedAdapter:
    """An adapter without its model."""

    config: AdapterConfig
    weights: dict[str, Tensor]  # by PEFT's names, in which no adapter's name occurs; a classifier's head among them


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def use_adapter_in(layers: Sequence[BaseTunerLayer], name: str | None) -> Iterator[None]:
    """Within it the layers use the named adapter, or (None) their base alone, bit for bit."""
    before = [active_adapters(layer) for layer in layers]
    for layer in layers:
        set_active_adapters(layer, [] if name is None else [name], disabled=name is None)
    try:
        yield
    finally:
        for layer, (names, is_base) in zip(layers, before, strict=True):
            set_active_adapters(layer, names, is_base)


def use_adapter(model: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """Within it the model uses the named adapter, or (None) its base alone."""
    return use_adapter_in(adapter_layers(model), name)


def recompute_contexts(layers: Sequence[BaseTunerLayer]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch's checkpoint: a forward is recomputed under the adapter that it used.

    Recomputation takes place in the backward pass, when the layers use the policy's adapter again.
    """
    is_base = not layers or layers[0].disable_adapters  # all layers use the same one
    return nullcontext(), use_adapter_in(layers, None if is_base else layers[0].active_adapters[0])


def add_adapter(
    policy: PeftModel, name: str, config: AdapterConfig, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Adds an adapter to the policy's base, with these weights or fresh ones; the policy's stays the one in use.

    The policy's and the critic's are trainable, the others frozen. To be called before the model is prepared.
    """
    policy.add_adapter(name, causal_lm_config(config))
    if weights is not None:
        load_adapter_weights(policy, name, weights)
    policy.requires_grad_(False)
    for layer in adapter_layers(policy):
        for kind in layer.adapter_layer_names:
            for owner, part in getattr(layer, kind).items():
                part.requires_grad_(owner in (POLICY, CRITIC))


def copy_adapter(policy: PeftModel, source: str, name: str) -> None:
    """Adds a copy of the adapter `source` to the policy's base."""
    add_adapter(policy, name, adapter_config(policy, source), adapter_state_dict(policy, source))


def adapter_state_dict(model: PeftModel | PreTrainedModel, name: str = POLICY) -> dict[str, Tensor]:
    """The weights of one of a model's adapters, by PEFT's names; embeddings, which PEFT may add, are no part of it."""
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def adapter_config(model: PeftModel | PreTrainedModel, name: str = POLICY) -> AdapterConfig:
    """The configuration of one of a model's adapters; UserError for a kind that is not used here."""
    config = model.peft_config[name]
    if not isinstance(config, AdapterConfig):
        raise UserError(f"{model.name_or_path}: its adapter is {config.peft_type}; only LoRA and IA3 can be used here")
    return config


def adapter_type(config: AdapterConfig) -> str:
    """The value of the dial `adapter` that makes such an adapter."""
    return "lora" if isinstance(config, LoraConfig) else "ia3"


def causal_lm_config(config: AdapterConfig) -> AdapterConfig:
    """The adapter's configuration for a causal language model: no dropout, no head (`modules_to_save`)."""
    config = copy.deepcopy(config)
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, False
    if isinstance(config, LoraConfig):
        config.lora_dropout = 0.0
    return config


def load_adapter_weights(model: PeftModel, name: str, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into the named adapter; UserError if they are not exactly the adapter's."""
    result: Any = set_peft_model_state_dict(model, dict(weights), name)
    wrong = [key for key in result.missing_keys if name in key.split(".")] + result.unexpected_keys
    if wrong:
        raise UserError(f"adapter {name}: missing or unused weights {', '.join(sorted(wrong)[:5])}")


def detach_adapter(model: PreTrainedModel) -> DetachedAdapter | None:
    """Takes the adapter that `from_pretrained` has loaded off the model, in place, and returns it; None without one."""
    if not adapter_layers(model):
        return None
    config, weights = adapter_config(model), adapter_state_dict(model)
    remove_adapter_(model)
    return DetachedAdapter(config, {PREFIX + key: weight.detach() for key, weight in weights.items()})


def remove_adapter_(model: PreTrainedModel) -> PreTrainedModel:
    """The model without adapter layers, all its weights trainable, a classifier's trained head kept; in place."""
    modules = [*model.named_modules()]
    for name, layer in modules:
        if isinstance(layer, BaseTunerLayer):
            model.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, layer.modules_to_save[POLICY])
    if any(isinstance(layer, BaseTunerLayer) for _, layer in modules):
        forget_adapter(model)
        for parameter in model.parameters():  # the adapter's loading froze the base
            parameter.requires_grad_(parameter.is_floating_point())  # what has 4 bits cannot be trained
    return model


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have without its adapters, a classifier's trained head included."""
    return {
        name.replace(".base_layer.", ".").replace(f".modules_to_save.{POLICY}.", "."): weight
        for name, weight in model.state_dict().items()
        if not any(part.startswith(("lora_", "ia3_", "original_module")) for part in name.split("."))
    }


def hash_trunk(model: PreTrainedModel) -> str:
    """12 hex digits over the trunk's weights, whatever heads and adapters it has.

    A language model and a classifier on one trunk have the same.
    """
    return hash_weights(base_state_dict(model.base_model))[:12]


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """sha256 over the weights' sorted names, shapes, types and contents."""
    rows = []
    for name, tensor in sorted(weights.items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        rows.append([name, list(tensor.shape), str(tensor.dtype), hashlib.sha256(content).hexdigest()])
    return hash_value(rows)
