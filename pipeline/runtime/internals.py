"""What of libraries is private, or has another name from one release to the next: each in one function, only here.

`tests/runtime/test_internals.py` holds each against the installed release, and names the one that has changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainingArguments

# PEFT: which adapters a layer reads. Its public `set_adapter` and `disable_adapter` change `requires_grad` as well.


def active_adapters(layer: Any) -> tuple[list[str], bool]:
    """The names of the adapters that a PEFT layer reads, and whether it passes its base through instead."""
    return layer._active_adapter, layer._disable_adapters


def set_active_adapters(layer: Any, names: Sequence[str], disabled: bool = False) -> None:
    """Has a PEFT layer read these adapters, or (`disabled`) pass its base through."""
    layer._active_adapter, layer._disable_adapters = list(names), disabled


# transformers


def forget_adapter(model: Any) -> None:
    """Undoes what loading an adapter has left on a transformers model whose adapter layers are gone.

    `save_pretrained` would otherwise write an adapter alone, and convert the name of every weight.
    """
    model._hf_peft_config_loaded = False
    del model.peft_config
    vars(model).pop("_weight_conversions", None)


def forget_quantization(model: Any) -> None:
    """Has `save_pretrained` write the weights that it is given; a quantised model's own would choose others."""
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)


def layers_kept_whole(model: Any) -> Any:
    """Class names of the layers that FSDP gathers one at a time."""
    return model._no_split_modules


def forward_override(module: Any) -> Callable[..., Any] | None:
    """The `forward` that was set on the instance itself, or None."""
    return vars(module).get("forward")


def remove_forward_override(module: Any) -> None:
    vars(module).pop("forward", None)


def checkpointing_arguments(is_on: bool) -> dict[str, Any]:
    """Arguments of a trainer that say whether layers keep their input alone and are computed again.

    transformers 5.23 calls them activation_checkpointing*, and transformers 6 will know no other name.
    """
    has_new_name = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if has_new_name else "gradient_checkpointing"
    return {name: is_on, f"{name}_kwargs": {"use_reentrant": False}}


def enable_activation_checkpointing(model: Any, **arguments: Any) -> None:
    """The same of a model; `arguments` are those of torch's checkpoint."""
    has_new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if has_new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False} | arguments)


# TRL's trainers


def tokens_trained(trainer: Any) -> float:
    """Tokens that an SFTTrainer or RewardTrainer has counted."""
    return trainer._total_train_tokens


def set_tokens_trained(trainer: Any, tokens: float) -> None:
    trainer._total_train_tokens = tokens


def log_tokens(trainer: Any) -> None:
    """Puts the count of tokens into the trainer's next log line."""
    trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]


def log_metrics(trainer: Any, **values: float) -> None:
    """Adds to the averages of the trainer's next log line."""
    for name, value in values.items():
        trainer._metrics["train"][name].append(value)


def running_averages(trainer: Any) -> dict[str, Any]:
    """What a trainer has summed up since its last log line; the loss is this process's alone."""
    return {
        "loss": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
    }


def set_running_averages(trainer: Any, averages: Mapping[str, Any]) -> None:
    """Goes on from what `running_averages` gave; once training has begun, which sets them to zero."""
    trainer._tr_loss.fill_(averages["loss"])
    trainer._globalstep_last_logged = averages["last_logged"]
    trainer._metrics["train"].update({name: list(values) for name, values in averages["metrics"].items()})


# Accelerate and wandb


def reset_accelerator_state() -> None:
    """Forgets the precision and plugins of an earlier stage in the same process; the process group stays."""
    AcceleratorState._reset_state()


def is_offline(wandb_run: Any) -> bool:
    return wandb_run.settings._offline
