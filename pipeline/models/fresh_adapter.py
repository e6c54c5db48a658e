"""A fresh adapter on a language model or classifier: on which layers it may be, and on which it is."""

from collections.abc import Sequence
from typing import Any

from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config.dials import Adapter
from pipeline.config.names import nearest
from pipeline.data.tokenizer import ModelError
from pipeline.models.multi_adapter import adapter_config, adapter_type
from pipeline.runtime.console import print_main


def wrap_with_adapter(model: PreTrainedModel, dials: Adapter, task: TaskType = TaskType.CAUSAL_LM) -> PeftModel:
    """The model frozen, under a fresh trainable adapter that changes nothing yet; a classifier's head is trained.

    Prints which layers it is on. Raises ModelError for a name in `target_modules` that is on no layer.
    """
    targets: Any = target_names(dials.target_modules)
    check_targets(model, targets, task)
    if dials.adapter == "lora":
        config: Any = LoraConfig(
            task_type=task,
            r=dials.lora_r,
            lora_alpha=dials.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
            use_rslora=dials.use_rslora,
            use_dora=dials.use_dora,
            target_modules=targets or "all-linear",
        )
    elif dials.adapter == "ia3":
        config = IA3Config(task_type=task, target_modules=targets or None)
        if model.config.model_type not in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING:
            if not targets:
                raise ModelError(
                    f"adapter: PEFT does not know where IA3 belongs in {model.config.model_type}; say it with "
                    f"--target_modules: some of {', '.join(linear_names(model))} (keys, values and the feed-forward "
                    "layer's last), or --adapter lora"
                )
            config.feedforward_modules = []  # else PEFT asks for them: vectors on outputs alone
    else:
        raise ModelError(f"adapter: expected lora or ia3, got {dials.adapter}")
    return describe_adapter(get_peft_model(model, config))


def target_names(text: str) -> list[str]:
    """The names of a comma-separated list, sorted; ModelError for one of commas alone."""
    names = sorted({name.strip() for name in text.split(",")} - {""})
    if text.strip() and not names:
        raise ModelError(f"target_modules: expected names of modules between commas, got '{text}'")
    return names


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last names of the model's linear layers, its head aside."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    return sorted({name.rpartition(".")[2] for name, layer in linear_layers(model).items() if id(layer) not in heads})


def check_targets(model: PreTrainedModel, targets: Sequence[str], task: TaskType) -> None:
    """ModelError unless each name is that of one linear layer or several, by PEFT's rule: the end of its full name.

    A classifier's head is trained whole, and a layer tied to the embeddings would change these when it is merged.
    """
    layers, embeddings = linear_layers(model), model.get_input_embeddings()
    for target in targets:
        found = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found:
            raise ModelError(
                f"target_modules: no module of this {model.config.model_type} is called '{target}'"
                f"{nearest(target, linear_names(model))}; its linear layers are {', '.join(linear_names(model))} "
                "(leave target_modules empty for all of them)"
            )
        if others := [name for name in found if name not in layers]:
            kind = type(model.get_submodule(others[0])).__name__
            raise ModelError(
                f"target_modules: {target} is a {kind} ({others[0]}), and only linear layers can have an adapter: "
                f"{', '.join(linear_names(model))}"
            )
        if any(layers[name].weight is getattr(embeddings, "weight", None) for name in found):
            raise ModelError(
                f"target_modules: {target} shares its weight with the embeddings (tied), which merging would change "
                "as well; leave it out"
            )
        if task == TaskType.SEQ_CLS and "score" in found:
            raise ModelError(f"target_modules: {target} is the classifier's head, which is trained whole; leave it out")


def describe_adapter(model: PeftModel) -> PeftModel:
    """The model as it is, after one line on which layers its adapter is and how many weights it trains."""
    names = [name for name, layer in model.get_base_model().named_modules() if isinstance(layer, BaseTunerLayer)]
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print_main(
        f"adapter: {adapter_type(adapter_config(model))}, linear layers: {len(names)} "
        f"({', '.join(sorted({name.rpartition('.')[2] for name in names}))}), weights trained: {trained:,}"
    )
    return model
