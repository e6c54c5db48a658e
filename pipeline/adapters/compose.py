"""Command compose: an expression over adapters becomes one plain adapter, with proof and lineage, or nothing does.

expression + parents -> exact sum -> fewest ranks -> written, loaded by PEFT, proved -> renamed into place
"""

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.adapters.algebra import combine_heads, evaluate
from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.compression import compress_update
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.expressions import Call, Expression, Name, adapter_names, linear_weights, variables
from pipeline.adapters.lineage import read_lineage, write_lineage
from pipeline.adapters.proof import check_proof, format_proof, mixture_error, prove_adapter, read_probes
from pipeline.adapters.reading import SavedAdapter, hash_adapter_files, parse_adapter_folders, read_adapters
from pipeline.adapters.updates import Factors, Update
from pipeline.adapters.writing import atomic_folder, require_new_folder, write_adapter
from pipeline.config.commands import Compose
from pipeline.data.tokenizer import hash_tokenizer
from pipeline.runtime.console import print_main, silence_libraries


def compose(config: Compose) -> Path:
    """Writes the adapter that the expression stands for, and returns its folder; nothing is written on any error."""
    silence_libraries()
    out = require_new_folder(config.out)
    folders = parse_adapter_folders(config.adapters)
    expression = parse(config.expression, folders)
    if free := variables(expression):
        raise AdapterError(f"expression: ${free[0]} has no value: write a number there, or let `search` find one")
    parents = {name: folders[name] for name in adapter_names(expression) or folders}
    adapters, base = read_adapters(parents, config.base)
    update, heads, losses = combine(expression, adapters, base, config.rank, config.heads)
    rank = max(lora_ranks(update).values(), default=0)
    check_limits(config, losses, rank)
    prompts = read_probes(config.probe_file, base.tokenizer)
    with atomic_folder(out) as folder:
        write_adapter(folder, update, heads, base, config.dtype)
        proof = prove_adapter(folder, base, update, heads, config.dtype, prompts, str(expression))
        if not heads and not any(losses.values()) and is_weighted_sum(expression):
            proof = replace(proof, mixed=mixture_error(expression, folder, parents, base, prompts))
        check_proof(proof, config.allow_drift)
        method = composition_method(expression, adapters, update)
        lineage = {
            "expression": str(expression),
            "method": method,
            "heads": config.heads if heads else None,
            "dtype": config.dtype,
            "rank": rank,
            "rank_asked": config.rank,
            "discarded": losses if any(losses.values()) else {},
            "proof": asdict(proof) | {"prompts": len(prompts)},
            "parents": {name: describe_parent(adapter, out) for name, adapter in adapters.items()},
            "base": describe_base(base, out),
            "files": hash_adapter_files(folder),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        }
        write_lineage(folder, lineage)
    print_main(f"compose: {expression} ({method}{f', rank {rank}' if rank else ''}) -> {out}")
    print_main(format_proof(proof))
    return out


def combine(
    expression: Expression,
    adapters: Mapping[str, SavedAdapter],
    base: AdapterBase,
    rank: int = 0,
    heads_rule: str = "refuse",
) -> tuple[Update, dict[str, Tensor], dict[str, float]]:
    """The update and heads of the expression, and the share of |dW|^2 that `rank` cost, by module; in float64."""
    update = evaluate(expression, {name: adapter.update for name, adapter in adapters.items()})
    compressed, losses = compress_update(update, rank)
    heads = {name: adapter.heads for name, adapter in adapters.items()}
    return compressed, combine_heads(expression, heads, base.parameters(), heads_rule), losses


def check_limits(config: Compose, losses: Mapping[str, float], rank: int) -> None:
    """AdapterError for a result that loses more than max_loss in a module, or has more than max_rank ranks."""
    worst = max(losses, key=lambda module: losses[module])
    if losses[worst] > config.max_loss:
        raise AdapterError(
            f"rank: {config.rank} ranks lose {losses[worst]:.3g} of |dW|^2 in {worst}, more than max_loss "
            f"{config.max_loss:g}: raise rank, or say --max_loss"
        )
    if rank > config.max_rank:
        raise AdapterError(
            f"max_rank: the result has {rank} ranks, more than {config.max_rank}: say --rank to compress it, or raise "
            "max_rank"
        )


def is_weighted_sum(expression: Expression) -> bool:
    """Whether it is a weighted sum of adapters and nothing else, so that scaling them side by side gives it."""
    return all(isinstance(term, Name) for term in linear_weights(expression))


def composition_method(expression: Expression, adapters: Mapping[str, SavedAdapter], result: Update) -> str:
    """exact: made without an SVD, so that it can be made again to the bit; compressed: with one."""
    if any(isinstance(term, Call) and term.function != "paper" for term in linear_weights(expression)):
        return "compressed"
    uncompressed = evaluate(expression, {name: adapter.update for name, adapter in adapters.items()})
    return "exact" if lora_ranks(uncompressed) == lora_ranks(result) else "compressed"


def lora_ranks(update: Update) -> dict[str, int]:
    """By module; empty for IA3."""
    return {module: part.rank for module, part in update.items() if isinstance(part, Factors)}


def describe_parent(adapter: SavedAdapter, out: Path) -> dict[str, Any]:
    """What a lineage says of a parent; its path from `out`, so that both may move together."""
    return {
        "path": os.path.relpath(adapter.folder.resolve(), out.resolve()),
        "sha256": adapter.sha256,
        "kind": adapter.config["peft_type"],
        "lineage": read_lineage(adapter.folder).get("expression"),
    }


def describe_base(base: AdapterBase, out: Path) -> dict[str, str]:
    """What a lineage says of the base."""
    return {
        "path": os.path.relpath(Path(base.path).resolve(), out.resolve()),
        "fingerprint": base.fingerprint,
        "tokenizer": hash_tokenizer(base.tokenizer),
    }
