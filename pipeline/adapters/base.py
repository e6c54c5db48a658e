"""The base model that adapters were trained on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters.lineage import read_lineage
from pipeline.config.errors import UserError
from pipeline.data.tokenizer import ModelError, load_tokenizer, loading_error
from pipeline.models.loading import disable_dropout_, freeze, hide_adapter, load_language_model, load_pretrained
from pipeline.models.multi_adapter import hash_weights


class AdapterError(UserError):
    """An adapter or base that cannot be used as asked; the message names it, the field, and how to mend it."""


@dataclass(frozen=True)
class AdapterBase:
    """A base model that adapters stand on: fp32, without dropout, without an adapter, frozen."""

    path: str
    task: str  # CAUSAL_LM or SEQ_CLS
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    head_parameters: frozenset[str]  # of a classifier: its adapters bring them; zero here, not in the fingerprint

    def parameters(self) -> dict[str, Tensor]:
        """By name, all but the classifier's head."""
        return {name: x for name, x in self.model.state_dict().items() if name not in self.head_parameters}


def find_base(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the base lies that the adapter was trained on: in its folder, or as lineage or config say; '' unknown."""
    if (folder / "config.json").is_file():
        return str(folder)
    lineage = read_lineage(folder)
    for path in ((folder / lineage["base"]["path"]) if lineage else None, config.get("base_model_name_or_path")):
        if path and (Path(path) / "config.json").is_file():
            return os.path.normpath(path)
    return ""


def read_base(path: str | Path, task: str, num_labels: int = 0) -> AdapterBase:
    """The base model in a folder, without the adapter that may lie beside it; `num_labels`: outputs of a classifier.

    Raises AdapterError for a quantised base, ModelError for a folder that does not hold a whole model.
    """
    with hide_adapter(Path(path)) as folder:
        if folder.is_dir() and is_quantized(folder):
            raise AdapterError(
                f"{path}: quantization_config: its weights are quantised, and a sum with them would be rounded again; "
                "give the base in fp32 or bf16"
            )
        source = folder if folder.is_dir() else path
        if task == "CAUSAL_LM":
            model, head_parameters = load_language_model(source), frozenset[str]()
        else:
            model, head_parameters = load_classifier(source, num_labels)
        tokenizer = load_tokenizer(source)
    freeze(model)
    for name in head_parameters:
        model.get_parameter(name).data.zero_()  # transformers drew it at random
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in head_parameters}
    return AdapterBase(str(path), task, model, tokenizer, hash_weights(weights), head_parameters)


def is_quantized(folder: Path) -> bool:
    """Whether the config says that the weights are quantised; ModelError for one that cannot be read."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise loading_error(folder, "model", error) from None
    return bool(getattr(config, "quantization_config", None))


def load_classifier(path: str | Path, num_labels: int) -> tuple[PreTrainedModel, frozenset[str]]:
    """A sequence classifier in fp32, and the parameters of its head, which its adapters bring.

    A head that lies with the base was trained with one of its adapters (a reward stage's final/) and is in that too.
    """
    labels: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    model, info = load_pretrained(AutoModelForSequenceClassification, path, **labels)
    trunk = f"{model.base_model_prefix}."
    missing = [name for name in info["missing_keys"] if name.startswith(trunk)]
    if missing:
        raise ModelError(f"{path}: not a whole model: missing {', '.join(sorted(missing)[:5])}")
    return disable_dropout_(model), frozenset(name for name in model.state_dict() if not name.startswith(trunk))
