"""Reads adapters in PEFT's format: each as an update of its base, or refused in a sentence.

    folder/  adapter_config.json, adapter_model.safetensors   and, in a stage's final/, the base and its tokenizer

PEFT loads an adapter onto any base with modules of the same shape, drops keys that fit nowhere and draws what is
missing. Here an adapter is read against its base: which modules it has, and at which rank and scale, is what PEFT makes
of its config on that base's architecture, and the file must hold exactly these tensors.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.base import AdapterBase, AdapterError, find_base, read_base
from pipeline.adapters.lineage import read_lineage
from pipeline.adapters.updates import ModuleUpdate, Scales, Update, scaled_factors
from pipeline.config.names import nearest
from pipeline.data.tokenizer import first_line, hash_tokenizer, load_tokenizer
from pipeline.models.multi_adapter import PREFIX
from pipeline.runtime.finished import verify_files
from pipeline.runtime.hashing import hash_file

TASKS = ("CAUSAL_LM", "SEQ_CLS")
SHAPE_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "feedforward_modules", "fan_in_fan_out", "lora_bias", "modules_to_save"),
    "task_type",
}  # fmt: skip
"""Fields of adapter_config.json that say which modules have an update, and of what rank and scale."""
IGNORED_FIELDS = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "init_ia3_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}  # fmt: skip
"""Fields that have no part in a finished update; any other, if it is set, makes the adapter another kind of thing."""
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA)
take a part of the base away at the start: their factors are an update of another base."""


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds: its update, by module, and its whole trained layers, by parameter."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    update: Update
    heads: Mapping[str, Tensor]
    sha256: Mapping[str, str]  # by file


def parse_adapter_folders(text: str) -> dict[str, Path]:
    """The folders by name of `name=folder,name=folder`; AdapterError for anything else."""
    folders: dict[str, Path] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        name, equals, folder = (field.strip() for field in entry.partition("="))
        if not equals or not name or not folder:
            raise AdapterError(f"adapters: expected name=folder,name=folder, got '{entry}'")
        if name in folders:
            raise AdapterError(f"adapters: '{name}' is given twice; give each adapter its own name")
        folders[name] = Path(folder)
    if not folders:
        raise AdapterError("adapters: expected name=folder,name=folder, got none")
    return folders


def read_adapters(folders: Mapping[str, Path], base_path: str = "") -> tuple[dict[str, SavedAdapter], AdapterBase]:
    """All the adapters, on the one base that they share: `base_path`, or the one that lies in their folders.

    Raises AdapterError for whatever keeps them from being added (docs/adapter-arithmetic.md has the list).
    """
    configs = {name: read_config(name, folder) for name, folder in folders.items()}
    check_same_kind(configs)
    base = read_shared_base(folders, configs, base_path)
    for name, folder in folders.items():
        check_lineage(name, folder, base)
        check_tokenizer(name, folder, base)
    return {name: read_adapter(name, folder, configs[name], base) for name, folder in folders.items()}, base


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused (AdapterError) if it says anything that this arithmetic does not know."""
    if folder.name == "final" or (folder / "DONE.json").is_file():
        verify_files(folder)
    if not (folder / CONFIG_NAME).is_file():
        what = "no such folder" if not folder.is_dir() else f"it holds no {CONFIG_NAME}"
        raise AdapterError(f"adapter '{name}': {folder}: {what}; give the folder that PEFT or a stage wrote")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"adapter '{name}': {folder / CONFIG_NAME}: not readable as JSON: {first_line(error)}"
        ) from None
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickle_file = folder / "adapter_model.bin"
        if pickle_file.is_file():
            raise AdapterError(
                f"adapter '{name}': {pickle_file}: a pickle can run any code when it is read; save the adapter again "
                "with safe_serialization=True"
            )
        raise AdapterError(f"adapter '{name}': {folder}: it holds no {SAFETENSORS_WEIGHTS_NAME}")
    config = {"task_type": None, "peft_type": None, **config}
    config["task_type"] = config["task_type"] or TASKS[0]
    check_config(name, config)
    return config


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """AdapterError unless the config is that of a plain LoRA or IA3 adapter for one of TASKS."""
    for field, allowed in (("peft_type", ("LORA", "IA3")), ("task_type", TASKS)):
        if config[field] not in allowed:
            raise AdapterError(f"adapter '{name}': {field}: {config[field]}; expected one of {', '.join(allowed)}")
    if config.get("init_lora_weights", True) not in INITIALISATIONS:
        raise AdapterError(
            f"adapter '{name}': init_lora_weights: {config['init_lora_weights']} took a part of the base's weights "
            "away when training began; save it with PEFT's path_initial_model_for_weight_conversion: then it is LoRA"
        )
    plain = (LoraConfig() if config["peft_type"] == "LORA" else IA3Config()).to_dict()
    for field, setting in config.items():
        if field not in SHAPE_FIELDS | IGNORED_FIELDS and setting and setting != plain.get(field):
            raise AdapterError(
                f"adapter '{name}': {field}: {setting}: no plain {config['peft_type']} update; convert it with PEFT's "
                "save_as_lora, or train it without"
            )


def check_same_kind(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """AdapterError unless all are LoRA or all IA3, for one task."""
    first = next(iter(configs))
    for name, config in configs.items():
        for field in ("peft_type", "task_type"):
            if config[field] != configs[first][field]:
                raise AdapterError(
                    f"adapter '{name}': {field}: {config[field]}, but '{first}' is {configs[first][field]}; only "
                    "adapters of one kind, for one task, can be combined"
                )


def read_shared_base(
    folders: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]], base_path: str
) -> AdapterBase:
    """The base at `base_path`, or where the adapters say; AdapterError if one was trained on other weights."""
    labels = {name: count_labels(folder / SAFETENSORS_WEIGHTS_NAME) for name, folder in folders.items()}
    first = next(iter(folders))
    task = configs[first]["task_type"]
    trained_on = {name: path for name, folder in folders.items() if (path := find_base(folder, configs[name]))}
    for name in folders:
        if not base_path and name not in trained_on:
            raise AdapterError(f"adapter '{name}': its folder holds no base model and names none; say --base")
    base_path = base_path or next(iter(trained_on.values()))
    base = read_base(base_path, task, labels[first])
    for name, path in trained_on.items():
        if path == base_path or Path(path).resolve() == Path(base_path).resolve():
            continue
        other = read_base(path, task, labels[name])
        what = f"adapter '{name}': base_model: it was trained on {path}"
        architecture, expected = other.model.config.model_type, base.model.config.model_type
        if architecture != expected:
            raise AdapterError(
                f"{what}, a {architecture}, but {base_path} is a {expected}; give the base that all were trained on"
            )
        if other.fingerprint != base.fingerprint:
            raise AdapterError(
                f"{what} (weights {other.fingerprint[:12]}), which is not {base_path} ({base.fingerprint[:12]}): an "
                "update means something on its own base only; give the base that all were trained on"
            )
    return base


def count_labels(file: Path) -> int:
    """Outputs of the score head that lies in the file; 0 without one, or if it is not readable."""
    try:
        with safe_open(file, "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys() if key.endswith("score.weight")]  # noqa: SIM118
    except SafetensorError:
        return 0  # read_adapter says why it is not readable
    return shapes[0][0] if shapes else 0


def read_adapter(name: str, folder: Path, config: Mapping[str, Any], base: AdapterBase) -> SavedAdapter:
    """The adapter's update and heads, its file holding just what its config says on this base, all of it finite."""
    skeleton = make_skeleton(name, config, base)
    check_targets(name, skeleton, base)
    try:
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"adapter '{name}': {folder / SAFETENSORS_WEIGHTS_NAME}: not readable: {first_line(error)}"
        ) from None
    check_tensors(name, tensors, get_peft_model_state_dict(skeleton), base)
    update: dict[str, ModuleUpdate] = {}
    for module, layer in named_adapter_layers(skeleton):
        key = f"{PREFIX}{module}."
        if isinstance(layer, LoraLayer):
            a, b = tensors.pop(f"{key}lora_A.weight"), tensors.pop(f"{key}lora_B.weight")
            update[module] = scaled_factors(b, a, layer.scaling["default"], tensors.pop(f"{key}lora_B.bias", None))
        elif isinstance(layer, IA3Layer):
            update[module] = Scales(tensors.pop(f"{key}ia3_l").double().flatten(), layer.is_feedforward)
    heads = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return SavedAdapter(name, folder, dict(config), update, heads, hash_adapter_files(folder))


def hash_adapter_files(folder: Path) -> dict[str, str]:
    """sha256 of the two files that make an adapter."""
    return {file: hash_file(folder / file) for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)}


def make_skeleton(name: str, config: Mapping[str, Any], base: AdapterBase) -> PeftModel:
    """The base on the meta device, under an adapter that PEFT makes from the config: its modules, ranks and scales."""
    kinds: dict[str, Any] = {"LORA": LoraConfig, "IA3": IA3Config}
    fields = {field.name for field in dataclasses.fields(kinds[config["peft_type"]])} & SHAPE_FIELDS
    settings = {field: setting for field, setting in config.items() if field in fields}
    with torch.device("meta"):
        model = type(base.model)(base.model.config)
        try:
            return get_peft_model(model, kinds[config["peft_type"]](**settings))
        except (ValueError, TypeError) as error:
            raise AdapterError(
                f"adapter '{name}': target_modules: PEFT cannot put it on {base.path}, a "
                f"{base.model.config.model_type}: {first_line(error)}"
            ) from None


def named_adapter_layers(model: PeftModel) -> list[tuple[str, BaseTunerLayer]]:
    """The adapter's layers, by their module's name in the base."""
    modules = model.get_base_model().named_modules()
    return [(name, layer) for name, layer in modules if isinstance(layer, BaseTunerLayer)]


def check_targets(name: str, skeleton: PeftModel, base: AdapterBase) -> None:
    """AdapterError for targets whose update is not a matrix added to one module's weight."""
    tied = tied_parameters(base.model)
    for module, layer in named_adapter_layers(skeleton):
        target = layer.get_base_layer()
        if not isinstance(target, (nn.Linear, Conv1D)):
            raise AdapterError(
                f"adapter '{name}': target_modules: {module} is a {type(target).__name__}; only linear layers can be "
                "combined: train it without"
            )
        if f"{module}.weight" in tied:
            raise AdapterError(
                f"adapter '{name}': target_modules: {module} shares its weight with another module (tied embeddings), "
                "which a merge would change as well; train it without"
            )
        if isinstance(layer, LoraLayer) and layer.lora_bias["default"] and target.bias is None:
            raise AdapterError(f"adapter '{name}': lora_bias: {module} has no bias to add it to; train it without")
    settings: Any = skeleton.peft_config["default"]
    for module in settings.modules_to_save or []:
        if any(module in parameter.split(".")[:-1] for parameter in tied):
            raise AdapterError(
                f"adapter '{name}': modules_to_save: {module} shares its weight with another module (tied embeddings); "
                "train it without"
            )


def tied_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that are one tensor under several names."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def check_tensors(name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: AdapterBase) -> None:
    """AdapterError unless the file's tensors are just the expected ones, by name and shape, and finite."""
    for keys, what in ((expected.keys() - tensors.keys(), "missing"), (tensors.keys() - expected.keys(), "surplus")):
        if keys:
            key = min(keys)
            hint = nearest(key, sorted(tensors if what == "missing" else expected))
            raise AdapterError(
                f"adapter '{name}': {key}: {what} in {SAFETENSORS_WEIGHTS_NAME} ({len(keys)} such), by its config and "
                f"the base {base.path}{hint}; give the base and the config that it was trained with"
            )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise AdapterError(
                f"adapter '{name}': {key}: shape {tuple(tensor.shape)}, but {tuple(expected[key].shape)} on "
                f"{base.path}; give the base that it was trained on"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"adapter '{name}': {key}: has NaN or infinite numbers; train it again")


def check_lineage(name: str, folder: Path, base: AdapterBase) -> None:
    """AdapterError for a composed adapter whose lineage names other base weights."""
    lineage = read_lineage(folder)
    if lineage and lineage["base"]["fingerprint"] != base.fingerprint:
        raise AdapterError(
            f"adapter '{name}': base_model: it was composed on another base (weights "
            f"{lineage['base']['fingerprint'][:12]}) than {base.path} ({base.fingerprint[:12]}); give its "
            "own by --base"
        )


def check_tokenizer(name: str, folder: Path, base: AdapterBase) -> None:
    """AdapterError for a tokenizer in the adapter's folder that is not the base's."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    actual, expected = (hash_tokenizer(tokenizer) for tokenizer in (load_tokenizer(folder), base.tokenizer))
    if actual != expected:
        raise AdapterError(
            f"adapter '{name}': tokenizer: {actual} in its folder, {expected} in {base.path}: a text has other ids; "
            "train both with one tokenizer"
        )
