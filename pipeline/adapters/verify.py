"""Command verify: a composed adapter made anew from its parents and compared; and what each of them writes."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.compose import combine
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.generations import compare_generations
from pipeline.adapters.lineage import LINEAGE_FILE, read_lineage
from pipeline.adapters.reading import SavedAdapter, hash_adapter_files, parse_adapter_folders, read_adapters
from pipeline.adapters.writing import to_tensors
from pipeline.config.commands import Verify
from pipeline.runtime.console import print_main, silence_libraries

REBUILD_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
"""Relative error that a compressed result may have when it is made anew: an SVD is not the same on every machine."""


def verify(config: Verify) -> dict[str, Any]:
    """The composed adapter made anew from its parents and compared, tensor by tensor; then what they and it write.

    Bit-identical where nothing was compressed, else within REBUILD_TOLERANCE; AdapterError where it is neither, or
    where a parent, the base or the adapter itself is not what its lineage says. A merge inherits its parents' faults:
    the report, printed and returned, has judge, repetition and perplexity of each.
    """
    silence_libraries()
    folder = Path(config.adapter)
    lineage = read_composition(folder)
    moved = parse_adapter_folders(config.adapters) if config.adapters else {}
    parents = {
        name: moved.get(name) or Path(os.path.normpath(folder / parent["path"]))
        for name, parent in lineage["parents"].items()
    }
    base_path = config.base or os.path.normpath(folder / lineage["base"]["path"])
    adapters, base = read_adapters(parents, base_path)
    check_sources(folder, lineage, adapters, base)
    expression = parse(lineage["expression"], parents)
    update, heads, _ = combine(expression, adapters, base, lineage["rank_asked"], lineage["heads"] or "refuse")
    rebuilt = to_tensors(update, heads, lineage["dtype"])
    error = rebuild_error(rebuilt, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
    tolerance = 0.0 if lineage["method"] == "exact" else REBUILD_TOLERANCE[lineage["dtype"]]
    if not error <= tolerance:
        raise AdapterError(
            f"{folder}: made anew from its parents it differs by {error:.2g}, more than {tolerance:g}: compose it again"
        )
    agreement = f"within {error:.1e}" if error else "identical to the bit"
    print_main(f"verify: {lineage['expression']} made anew: {agreement}")
    report: dict[str, Any] = {"error": error, "method": lineage["method"], "writes": {}}
    if config.prompts_file and base.task == "CAUSAL_LM":
        report["writes"] = compare_generations(config, parents | {"result": folder}, base)
    return report


def read_composition(folder: Path) -> dict[str, Any]:
    """The lineage of an adapter made by compose; AdapterError without one, or if the adapter is not as written."""
    lineage = read_lineage(folder)
    if not lineage or "merged" in lineage:
        raise AdapterError(
            f"{folder}: no adapter made by compose ({LINEAGE_FILE} is not there, or is a merged model's)"
        )
    if hash_adapter_files(folder) != lineage["files"]:
        raise AdapterError(
            f"{folder}: {CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME} is not as it was written (sha256 differs): compose "
            "it again"
        )
    return lineage


def check_sources(
    folder: Path, lineage: Mapping[str, Any], adapters: Mapping[str, SavedAdapter], base: AdapterBase
) -> None:
    """AdapterError unless parents and base are those that the lineage names."""
    for name, adapter in adapters.items():
        if adapter.sha256 != lineage["parents"][name]["sha256"]:
            raise AdapterError(
                f"adapter '{name}': {adapter.folder}: not the file that {folder} was made from (sha256 differs): give "
                f"that one by --adapters {name}=folder, or compose again"
            )
    if base.fingerprint != lineage["base"]["fingerprint"]:
        raise AdapterError(
            f"{base.path}: not the base that {folder} was made on (weights differ): give that one by --base"
        )


def rebuild_error(rebuilt: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> float:
    """0 for the same bits and only for these; else the largest relative error (Frobenius) of a dW, or other tensor."""
    if rebuilt.keys() != written.keys() or any(rebuilt[key].shape != written[key].shape for key in rebuilt):
        return math.inf
    if all(torch.equal(rebuilt[key], written[key]) for key in rebuilt):
        return 0.0
    errors = [sys.float_info.min]
    for key in rebuilt:
        if key.endswith("lora_A.weight"):
            continue  # compared as a part of dW
        new, old = (change_or_tensor(tensors, key) for tensors in (rebuilt, written))
        errors.append((new - old).norm().item() / (old.norm().item() or 1.0))
    return max(errors)


def change_or_tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """In float64 the dW (out, in) that a lora_B belongs to, or another tensor as it is."""
    tensor = tensors[key].double()
    if not key.endswith("lora_B.weight"):
        return tensor
    return tensor @ tensors[key.replace("lora_B", "lora_A")].double()
