"""Several adapters side by side on one base, weighted without making or writing a tensor."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from pipeline.adapters.expressions import Expression, linear_weights
from pipeline.runtime.internals import set_active_adapters


class Mixture:
    """A base with several adapters loaded at once, their weights free to be set.

    LoRA: PEFT adds what all active adapters do, each times its scaling, which is set to its own times its weight. IA3:
    PEFT multiplies active vectors, so all layers read one scratch vector 1 + sum w (l - 1). Heads are not mixed.
    """

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        """Loads every folder by PEFT onto a copy of the base; the names are the expression's."""
        self.peft_names = {name: f"adapter{number}" for number, name in enumerate(folders)}  # PEFT takes no dots
        first, *rest = folders
        self.model = PeftModel.from_pretrained(
            copy.deepcopy(base), str(folders[first]), adapter_name=self.peft_names[first]
        ).eval()
        for name in rest:
            self.model.load_adapter(str(folders[name]), adapter_name=self.peft_names[name])
        layers: list[Any] = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        self.lora_layers = [(layer, dict(layer.scaling)) for layer in layers if isinstance(layer, LoraLayer)]
        self.ia3_layers = [layer for layer in layers if isinstance(layer, IA3Layer)]
        for lora, _ in self.lora_layers:
            set_active_adapters(lora, list(self.peft_names.values()))
        for layer in self.ia3_layers:
            layer.ia3_l["scratch"] = nn.Parameter(torch.ones_like(next(iter(layer.ia3_l.values()))))
            set_active_adapters(layer, ["scratch"])
        self.model.requires_grad_(False)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Gives each adapter its weight, by the expression's names; one that is not named gets 0."""
        by_peft_name = {peft_name: weights.get(name, 0.0) for name, peft_name in self.peft_names.items()}
        for lora, scaling in self.lora_layers:
            for peft_name, scale in scaling.items():
                lora.scaling[peft_name] = scale * by_peft_name[peft_name]
        for layer in self.ia3_layers:
            changes = [
                weight * (layer.ia3_l[peft_name].double() - 1)
                for peft_name, weight in by_peft_name.items()
                if peft_name in layer.ia3_l
            ]
            layer.ia3_l["scratch"].data.copy_(1 + torch.stack(changes).sum(0))


def mixture_weights(expression: Expression) -> dict[str, float]:
    """The expression as weights of what is loaded: adapters, and functions of adapters, by their text."""
    return {str(term): float(weight) for term, weight in linear_weights(expression).items()}
