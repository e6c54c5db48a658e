"""Adapters on disk: one in PEFT's format is read into what it does, or refused in a sentence; one is written.

    folder/  adapter_config.json, adapter_model.safetensors   and, in a stage's final/, the base and its tokenizer

PEFT loads an adapter onto any base with modules of the same shape, drops keys that fit nowhere and draws what is
missing. Here an adapter is read against its base: which modules it has, and at which rank and scale, is what PEFT makes
of its config on that base's architecture, and the file must hold exactly these tensors.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.algebra import Factors, Scales, Update, factors, has_bias, kind
from pipeline.config.errors import UserError
from pipeline.config.names import nearest
from pipeline.data.tokenizer import ModelError, first_line, hash_tokenizer, load_tokenizer
from pipeline.models.loading import ATTN_IMPLEMENTATION, disable_dropout_, freeze, load_language_model
from pipeline.models.multi_adapter import PREFIX, hash_weights
from pipeline.runtime.hashing import hash_file
from pipeline.runtime.stage_run import verify_files

CONFIG, WEIGHTS, LINEAGE = "adapter_config.json", "adapter_model.safetensors", "composition.json"
TASKS = ("CAUSAL_LM", "SEQ_CLS")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SHAPING = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "feedforward_modules", "fan_in_fan_out", "lora_bias", "modules_to_save"),
    "task_type",
}  # fmt: skip
"""Fields of adapter_config.json that say which modules have an update, and of what rank and scale."""
IDLE = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "init_ia3_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}  # fmt: skip
"""Fields that have no part in a finished update; any other, if it is set, makes the adapter another kind of thing."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA)
take a part of the base away at the start: their factors are an update of another base."""


class AdapterError(UserError):
    """An adapter or base that cannot be used as asked; the message names it, the field, and how to mend it."""


@dataclasses.dataclass(frozen=True)
class AdapterBase:
    """A base model that adapters stand on: fp32, without dropout, without an adapter, frozen."""

    path: str
    task: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    fresh: frozenset[str]  # parameters that are not counted as its own (a classifier's head); zero here

    def parameters(self) -> dict[str, Tensor]:
        """By name, those that it has."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.fresh}


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds: its update, by module, and its whole trained layers, by parameter."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    update: Update
    heads: Mapping[str, Tensor]
    sha256: Mapping[str, str]  # by file


# ------------------------------------------------------------------------------------------------- reading


def places(given: str) -> dict[str, Path]:
    """The folders by name of `name=folder,name=folder`; AdapterError for anything else."""
    found: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, equals, folder = part.partition("=")
        if not equals or not name.strip() or not folder.strip():
            raise AdapterError(f"adapters: expected name=folder,name=folder, got '{part}'")
        if name.strip() in found:
            raise AdapterError(f"adapters: '{name.strip()}' is given twice; give each adapter its own name")
        found[name.strip()] = Path(folder.strip())
    if not found:
        raise AdapterError("adapters: expected name=folder,name=folder, got none")
    return found


def read_adapters(folders: Mapping[str, Path], base: str = "") -> tuple[dict[str, SavedAdapter], AdapterBase]:
    """All the adapters, on the one base that they share: `base`, or the one that lies in their folders.

    Raises AdapterError for whatever keeps them from being added (docs/adapter-arithmetic.md has the list).
    """
    configs = {name: read_config(name, folder) for name, folder in folders.items()}
    first = next(iter(configs))
    for name, config in configs.items():
        for field in ("peft_type", "task_type"):
            if config[field] != configs[first][field]:
                raise AdapterError(
                    f"adapter '{name}': {field}: {config[field]}, but '{first}' is {configs[first][field]}; only "
                    "adapters of one kind, for one task, can be combined"
                )
    labels = {name: _labels(folder / WEIGHTS) for name, folder in folders.items()}
    task = configs[first]["task_type"]
    own = {name: place for name, folder in folders.items() if (place := own_base(name, folder, configs[name]))}
    for name in folders:
        if not base and name not in own:
            raise AdapterError(f"adapter '{name}': its folder holds no base model and names none; say --base")
    lies = base or own[next(iter(own))]
    ground = read_ground(lies, task, labels[first])
    for name, place in own.items():
        if place == lies or Path(place).resolve() == Path(lies).resolve():
            continue
        other = read_ground(place, task, labels[name])
        what = f"adapter '{name}': base_model: it was trained on {place}"
        kinds = [each.model.config.model_type for each in (other, ground)]
        if kinds[0] != kinds[1]:
            raise AdapterError(
                f"{what}, a {kinds[0]}, but {lies} is a {kinds[1]}; give the base that all were trained on"
            )
        if other.fingerprint != ground.fingerprint:
            raise AdapterError(
                f"{what} (weights {other.fingerprint[:12]}), which is not {lies} ({ground.fingerprint[:12]}): an "
                "update means something on its own base only; give the base that all were trained on"
            )
    for name, folder in folders.items():
        _check_lineage(name, folder, ground)
        _check_tokenizer(name, folder, ground)
    return {name: read_adapter(name, folder, configs[name], ground) for name, folder in folders.items()}, ground


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused (AdapterError) if it says anything that this arithmetic does not know."""
    if folder.name == "final" or (folder / "DONE.json").is_file():
        verify_files(folder)
    if not (folder / CONFIG).is_file():
        what = "no such folder" if not folder.is_dir() else f"it holds no {CONFIG}"
        raise AdapterError(f"adapter '{name}': {folder}: {what}; give the folder that PEFT or a stage wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"adapter '{name}': {folder / CONFIG}: not readable as JSON: {first_line(error)}") from None
    if not (folder / WEIGHTS).is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise AdapterError(
                f"adapter '{name}': {pickled}: a pickle can run any code when it is read; save the adapter again with "
                "safe_serialization=True"
            )
        raise AdapterError(f"adapter '{name}': {folder}: it holds no {WEIGHTS}")
    config = {"task_type": None, "peft_type": None, **config}
    config["task_type"] = config["task_type"] or TASKS[0]
    for field, allowed in (("peft_type", ("LORA", "IA3")), ("task_type", TASKS)):
        if config[field] not in allowed:
            raise AdapterError(f"adapter '{name}': {field}: {config[field]}; expected one of {', '.join(allowed)}")
    if config.get("init_lora_weights", True) not in STARTS:
        raise AdapterError(
            f"adapter '{name}': init_lora_weights: {config['init_lora_weights']} took a part of the base's weights "
            "away when training began; save it with PEFT's path_initial_model_for_weight_conversion: then it is LoRA"
        )
    plain = (LoraConfig() if config["peft_type"] == "LORA" else IA3Config()).to_dict()
    for field, setting in config.items():
        if field not in SHAPING | IDLE and setting and setting != plain.get(field):
            raise AdapterError(
                f"adapter '{name}': {field}: {setting}: no plain {config['peft_type']} update; convert it with PEFT's "
                "save_as_lora, or train it without"
            )
    return config


def own_base(name: str, folder: Path, config: Mapping[str, Any]) -> str:
    """Where the base lies that the adapter was trained on: in its folder, or as lineage or config say; '' unknown."""
    if (folder / "config.json").is_file():
        return str(folder)
    lineage = read_lineage(folder)
    for place in ((folder / lineage["base"]["path"]) if lineage else None, config.get("base_model_name_or_path")):
        if place and (Path(place) / "config.json").is_file():
            return os.path.normpath(place)
    return ""


def read_lineage(folder: Path) -> dict[str, Any]:
    """composition.json of a composed adapter; {} where there is none."""
    file = folder / LINEAGE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_ground(path: str | Path, task: str, labels: int = 0) -> AdapterBase:
    """The base model in a folder, without the adapter that may lie beside it; `labels`: outputs of a classifier.

    Raises AdapterError for a quantised base, ModelError for a folder that holds no whole model.
    """
    with _without_adapter(Path(path)) as folder:
        if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) if folder.is_dir() else None:
            raise AdapterError(
                f"{path}: quantization_config: its weights are quantised, and a sum with them would be rounded again; "
                "give the base in fp32 or bf16"
            )
        place = folder if folder.is_dir() else path
        if task == "CAUSAL_LM":
            model, fresh = load_language_model(place), frozenset[str]()
        else:
            model, fresh = _classifier(place, labels)
        tokenizer = load_tokenizer(place)
    freeze(model)
    for name in fresh:
        model.get_parameter(name).data.zero_()  # transformers drew it at random
    known = {name: tensor for name, tensor in model.state_dict().items() if name not in fresh}
    return AdapterBase(str(path), task, model, tokenizer, hash_weights(known), fresh)


def read_adapter(name: str, folder: Path, config: Mapping[str, Any], ground: AdapterBase) -> SavedAdapter:
    """The adapter's update and heads, its file holding just what its config says on this base, all of it finite."""
    skeleton = _skeleton(name, config, ground)
    expected = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(skeleton).items()}
    _check_targets(name, skeleton, ground)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"adapter '{name}': {folder / WEIGHTS}: not readable: {first_line(error)}") from None
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for keys, what in ((expected.keys() - found, "missing"), (found.keys() - expected, "surplus")):
        if keys:
            key = min(keys)
            close = nearest(key, sorted(found if what == "missing" else expected))
            raise AdapterError(
                f"adapter '{name}': {key}: {what} in {WEIGHTS} ({len(keys)} such), by its config and the base "
                f"{ground.path}{close}; give the base and the config that it was trained with"
            )
    for key, tensor in tensors.items():
        if found[key] != expected[key]:
            raise AdapterError(
                f"adapter '{name}': {key}: shape {found[key]}, but {expected[key]} on {ground.path}; give the base "
                "that it was trained on"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"adapter '{name}': {key}: has NaN or infinite numbers; train it again")
    update: dict[str, Factors | Scales] = {}
    for module, layer in _layers(skeleton):
        key = f"{PREFIX}{module}."
        if isinstance(layer, LoraLayer):
            a, b = tensors.pop(f"{key}lora_A.weight"), tensors.pop(f"{key}lora_B.weight")
            update[module] = factors(b, a, layer.scaling["default"], tensors.pop(f"{key}lora_B.bias", None))
        elif isinstance(layer, IA3Layer):
            update[module] = Scales(tensors.pop(f"{key}ia3_l").double().flatten(), layer.is_feedforward)
    heads = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return SavedAdapter(name, folder, dict(config), update, heads, file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of the two files that make an adapter."""
    return {file: hash_file(folder / file) for file in (CONFIG, WEIGHTS)}


# ------------------------------------------------------------------------------------------------- writing


def to_tensors(update: Update, heads: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a plain PEFT adapter: LoRA factors filled up with zeros to one rank, the scale inside B."""
    rank = max((part.rank for part in update.values() if isinstance(part, Factors)), default=0)
    found: dict[str, Tensor] = {}
    for module, part in update.items():
        key = f"{PREFIX}{module}."
        if isinstance(part, Factors):
            found[f"{key}lora_A.weight"] = nn.functional.pad(part.a, (0, 0, 0, rank - part.rank))
            found[f"{key}lora_B.weight"] = nn.functional.pad(part.b, (0, rank - part.rank))
            if part.bias is not None:
                found[f"{key}lora_B.bias"] = part.bias
        else:
            found[f"{key}ia3_l"] = part.l.reshape(1, -1) if part.feedforward else part.l.reshape(-1, 1)
    found |= {f"{PREFIX}{parameter}": head for parameter, head in heads.items()}
    return {key: tensor.to(DTYPES[dtype]).contiguous() for key, tensor in sorted(found.items())}


def to_config(update: Update, heads: Mapping[str, Tensor], ground: AdapterBase) -> dict[str, Any]:
    """adapter_config.json of a plain PEFT adapter: alpha = rank, so scale 1; modules by full names; no pattern."""
    modules = sorted(update)
    common: dict[str, Any] = {
        "task_type": ground.task,
        "target_modules": modules,
        "modules_to_save": sorted({parameter.rpartition(".")[0] for parameter in heads}) or None,
        "fan_in_fan_out": any(isinstance(ground.model.get_submodule(module), Conv1D) for module in modules),
        "inference_mode": True,
    }
    if kind(update) == "LoRA":
        rank = max(part.rank for part in update.values() if isinstance(part, Factors))
        config: PeftConfig = LoraConfig(r=rank, lora_alpha=rank, lora_bias=has_bias(update), **common)
    else:
        inputs = [m for m, part in update.items() if isinstance(part, Scales) and part.feedforward]
        config = IA3Config(feedforward_modules=inputs, **common)
    rows = config.to_dict()
    return {key: sorted(row) if isinstance(row, set) else row for key, row in sorted(rows.items())}


def write_adapter(folder: Path, update: Update, heads: Mapping[str, Tensor], ground: AdapterBase, dtype: str) -> None:
    """Writes an adapter that PEFT, TRL and vLLM load, tokenizer included, into an existing folder."""
    text = json.dumps(to_config(update, heads, ground), indent=2, default=str)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(to_tensors(update, heads, dtype), folder / WEIGHTS, metadata={"format": "pt"})
    ground.tokenizer.save_pretrained(folder)


def refuse_existing(out: str) -> Path:
    """The folder to write; AdapterError if it is not given, or there already."""
    if not out:
        raise AdapterError("out: say where to write, a folder that is not there yet")
    if Path(out).exists():
        raise AdapterError(f"{out}: there is something already, and it is not overwritten; give --out another folder")
    return Path(out)


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or is removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- private


def _layers(model: PeftModel) -> list[tuple[str, BaseTunerLayer]]:
    """The adapter's layers, by their module's name in the base."""
    inside = model.get_base_model()
    return [(name, layer) for name, layer in inside.named_modules() if isinstance(layer, BaseTunerLayer)]


def _skeleton(name: str, config: Mapping[str, Any], ground: AdapterBase) -> PeftModel:
    """The base without numbers, under an adapter that PEFT makes from the config: its modules, ranks and scales."""
    kinds: dict[str, Any] = {"LORA": LoraConfig, "IA3": IA3Config}
    fields = {field.name for field in dataclasses.fields(kinds[config["peft_type"]])} & SHAPING
    settings = {field: setting for field, setting in config.items() if field in fields}
    with torch.device("meta"):
        model = type(ground.model)(ground.model.config)
        try:
            return get_peft_model(model, kinds[config["peft_type"]](**settings))
        except (ValueError, TypeError) as error:
            raise AdapterError(
                f"adapter '{name}': target_modules: PEFT cannot put it on {ground.path}, a "
                f"{ground.model.config.model_type}: {first_line(error)}"
            ) from None


def _check_targets(name: str, skeleton: PeftModel, ground: AdapterBase) -> None:
    """AdapterError for targets whose update is no matrix added to one module's weight."""
    shared: dict[int, list[str]] = {}
    for parameter, tensor in ground.model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(tensor), []).append(parameter)
    tied = {parameter for group in shared.values() if len(group) > 1 for parameter in group}
    for module, layer in _layers(skeleton):
        inside = layer.get_base_layer()
        if not isinstance(inside, (nn.Linear, Conv1D)):
            raise AdapterError(
                f"adapter '{name}': target_modules: {module} is a {type(inside).__name__}; only linear layers can be "
                "combined: train it without"
            )
        if f"{module}.weight" in tied:
            raise AdapterError(
                f"adapter '{name}': target_modules: {module} shares its weight with another module (tied embeddings), "
                "which a merge would change as well; train it without"
            )
        if isinstance(layer, LoraLayer) and layer.lora_bias["default"] and inside.bias is None:
            raise AdapterError(f"adapter '{name}': lora_bias: {module} has no bias to add it to; train it without")
    settings: Any = skeleton.peft_config["default"]
    for module in settings.modules_to_save or []:
        if any(module in parameter.split(".")[:-1] for parameter in tied):
            raise AdapterError(
                f"adapter '{name}': modules_to_save: {module} shares its weight with another module (tied embeddings); "
                "train it without"
            )


def _check_lineage(name: str, folder: Path, ground: AdapterBase) -> None:
    lineage = read_lineage(folder)
    if lineage and lineage["base"]["fingerprint"] != ground.fingerprint:
        raise AdapterError(
            f"adapter '{name}': base_model: it was composed on another base (weights "
            f"{lineage['base']['fingerprint'][:12]}) than {ground.path} ({ground.fingerprint[:12]}); give its "
            "own by --base"
        )


def _check_tokenizer(name: str, folder: Path, ground: AdapterBase) -> None:
    if not (folder / "tokenizer_config.json").is_file():
        return
    own, of_base = (hash_tokenizer(t) for t in (load_tokenizer(folder), ground.tokenizer))
    if own != of_base:
        raise AdapterError(
            f"adapter '{name}': tokenizer: {own} in its folder, {of_base} in {ground.path}: a text has other ids; "
            "train both with one tokenizer"
        )


def _labels(weights: Path) -> int:
    """Outputs of the score head that lies in the file; 0 without one."""
    try:
        with safe_open(weights, "pt") as file:
            heads = [file.get_slice(k).get_shape()[0] for k in file.keys() if k.endswith("score.weight")]  # noqa: SIM118
    except SafetensorError:
        return 0  # said with its reason when it is read
    return heads[0] if heads else 0


def _classifier(path: str | Path, labels: int) -> tuple[PreTrainedModel, frozenset[str]]:
    """A sequence classifier in fp32, and the parameters of its head, which are its adapters' to bring."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation=ATTN_IMPLEMENTATION,
            **({"num_labels": labels} if labels else {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no model can be loaded from it: {first_line(error)}") from None
    lost = [name for name in info["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    if lost:
        raise ModelError(f"{path}: not a whole model: missing {', '.join(sorted(lost)[:5])}")
    # A head that lies with the base was trained with one of its adapters (a reward stage's final/) and is in that too.
    trunk = f"{model.base_model_prefix}."
    return disable_dropout_(model), frozenset(name for name in model.state_dict() if not name.startswith(trunk))


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder as it would be without an adapter in it, which transformers would load unasked."""
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        yield Path(view)
