"""Adapter arithmetic, proved: an expression over adapters becomes one plain adapter, with its lineage, or nothing does.

    compose   expression + parents -> exact sum -> fewest ranks -> written, loaded by PEFT, proved -> renamed into place
    verify    the same again from the parents, compared; and what each of them writes
    inspect   ranks, scales, norms, cosines, lineage
    merge     adapter + base -> a plain model

The proof is at the level of logits on real text, by PEFT's own forward: the file just written, applied on the fly; the
same merged into the weights; and the parents' own files, loaded side by side and scaled as the expression says.
"""

import copy
import importlib.metadata
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters import algebra
from pipeline.adapters.algebra import Factors, Update
from pipeline.adapters.expressions import Call, Expression, Name, names, parse, variables, weighted
from pipeline.adapters.files import (
    CONFIG,
    DTYPES,
    LINEAGE,
    WEIGHTS,
    AdapterBase,
    AdapterError,
    SavedAdapter,
    file_hashes,
    places,
    read_adapters,
    read_lineage,
    refuse_existing,
    to_tensors,
    write_adapter,
    written_whole,
)
from pipeline.config.commands import Compose, Inspect, MergeAdapter, Verify
from pipeline.core.tensors import position_ids
from pipeline.data.formats import Text, display_text, read_rows
from pipeline.data.tokenize import decode, ensure_chat_template, prompt_batch
from pipeline.data.tokenizer import hash_tokenizer
from pipeline.evaluation.judges import Vader, fit_judge
from pipeline.evaluation.text import text_statistics
from pipeline.models.forward import response_logprobs
from pipeline.models.loading import Policy, freeze
from pipeline.models.saving import save_policy
from pipeline.rl.rollout import filter_prompts, generate
from pipeline.runtime.console import print_main, silence_libraries

PROBES = 32  # prompts
TOLERANCE = 1e-5  # of the largest logit, fp32
DRIFT = 0.05  # of the largest change of a logit by the adapter, half precision
REBUILT = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
"""Relative error that a compressed result may have when it is made anew: an SVD is not the same on every machine."""


@dataclass(frozen=True)
class Proof:
    """What the logits of the probes say; shares of the largest logit, drift a share of the adapter's effect."""

    effect: float  # adapter against base
    merged: float  # merged into the weights against on the fly
    mixed: float | None  # parents side by side against on the fly; None where no scales of parents give the result
    drift: float | None  # of rounding to the type that is written, base and merge included; None for fp32


# ------------------------------------------------------------------------------------------------- commands


def compose(config: Compose) -> Path:
    """Writes the adapter that the expression stands for, and returns its folder; nothing is written on any error."""
    silence_libraries()
    out = refuse_existing(config.out)
    folders = places(config.adapters)
    expression = parse(config.expression, folders)
    if free := variables(expression):
        raise AdapterError(f"expression: ${free[0]} has no value: write a number there, or let `search` find one")
    used = {name: folders[name] for name in names(expression) or folders}
    adapters, ground = read_adapters(used, config.base)
    update, heads, losses = combined(expression, adapters, ground, config.rank, config.heads)
    rank = max(ranks(update).values(), default=0)
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
    prompts = probe_prompts(config.probe_file, ground.tokenizer)
    with written_whole(out) as folder:
        write_adapter(folder, update, heads, ground, config.dtype)
        proof = proved(folder, ground, update, heads, config.dtype, prompts)
        if not heads and not any(losses.values()) and is_sum(expression):
            proof = replace(proof, mixed=mixed_error(expression, folder, used, ground, prompts))
        refuse_unproved(proof, config.allow_drift)
        lineage = {
            "expression": str(expression),
            "method": method(expression, adapters, update),
            "heads": config.heads if heads else None,
            "dtype": config.dtype,
            "rank": rank,
            "rank_asked": config.rank,
            "discarded": losses if any(losses.values()) else {},
            "proof": asdict(proof) | {"prompts": len(prompts)},
            "parents": {name: parent_of(adapter, out) for name, adapter in adapters.items()},
            "base": describe_base(ground, out),
            "files": file_hashes(folder),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        }
        (folder / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    print_main(f"compose: {expression} ({lineage['method']}{f', rank {rank}' if rank else ''}) -> {out}")
    print_main(told(proof))
    return out


def merge(config: MergeAdapter) -> Path:
    """Writes base and adapter as one plain model, merged as proved, and returns its folder."""
    silence_libraries()
    out = refuse_existing(config.out)
    if not config.adapter:
        raise AdapterError("adapter: say which folder to merge")
    folder = Path(config.adapter)
    adapters, ground = read_adapters({"adapter": folder}, config.base)
    adapter = adapters["adapter"]
    prompts = probe_prompts(config.probe_file, ground.tokenizer)
    proof = proved(folder, ground, adapter.update, adapter.heads, config.dtype, prompts)
    refuse_unproved(proof, config.allow_drift)
    model = merged(on_the_fly(ground.model, folder))
    nn.Module.to(model, DTYPES[config.dtype])
    with written_whole(out) as temporary:
        if ground.task == "CAUSAL_LM":
            save_policy(model, ground.tokenizer, temporary)
        else:
            model.save_pretrained(temporary)
            ground.tokenizer.save_pretrained(temporary)
        lineage = read_lineage(folder) | {
            "merged": {
                "path": os.path.relpath(folder.resolve(), out.resolve()),
                "sha256": adapter.sha256,
                "base": ground.fingerprint,
                "dtype": config.dtype,
                "proof": asdict(proof) | {"prompts": len(prompts)},
            }
        }
        (temporary / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    print_main(f"merge: {folder} -> {out}")
    print_main(told(proof))
    return out


def inspect(config: Inspect) -> dict[str, Any]:
    """Prints and returns what an adapter is: rank, norm and size beside its base's weight, by module; and its lineage.

    With `against`, the cosine between the two as well: near 1, they are one adapter twice.
    """
    silence_libraries()
    if not config.adapter:
        raise AdapterError("adapter: say which folder to look at")
    folders = {"adapter": Path(config.adapter)} | ({"against": Path(config.against)} if config.against else {})
    adapters, ground = read_adapters(folders, config.base)
    adapter = adapters["adapter"]
    found = {
        "kind": adapter.config["peft_type"],
        "rank": adapter.config.get("r"),
        "alpha": adapter.config.get("lora_alpha"),
        "rslora": adapter.config.get("use_rslora"),
        "base": ground.fingerprint,
        "heads": sorted(adapter.heads),
        "norm": algebra.length(adapter.update),
        "modules": {module: _module(part, ground, module) for module, part in adapter.update.items()},
        "lineage": read_lineage(adapter.folder),
    }
    print_main(
        f"{adapter.folder}: {found['kind']}, rank {found['rank']}, alpha {found['alpha']}, rslora {found['rslora']}"
    )
    print_main(f"base {ground.path} (weights {ground.fingerprint[:12]}); norm {found['norm']:.4g}")
    if found["lineage"]:
        print_main(f"made from {found['lineage']['expression']} ({found['lineage']['method']})")
    other = adapters["against"].update if config.against else {}
    if other:
        found["cosine"] = algebra.cosine(adapter.update, other)
        print_main(f"cosine with {config.against}: {found['cosine']:.4f}")
    for module, row in found["modules"].items():
        if module in other:
            row["cosine"] = algebra.cosine({module: adapter.update[module]}, {module: other[module]})
        print_main("  ".join([module, *(f"{name} {number:.4g}" for name, number in row.items())]))
    return found


def verify(config: Verify) -> dict[str, Any]:
    """The composed adapter made anew from its parents and compared, tensor by tensor; then what they and it write.

    Bit-identical where nothing was compressed, else within REBUILT; AdapterError where it is neither, or where a
    parent, the base or the adapter itself is not what its lineage says. A merge inherits its parents' faults: the
    report, printed and returned, has judge, repetition and perplexity of each.
    """
    silence_libraries()
    folder = Path(config.adapter)
    lineage = read_lineage(folder)
    if not lineage or "merged" in lineage:
        raise AdapterError(f"{folder}: no adapter made by compose ({LINEAGE} is not there, or is a merged model's)")
    if file_hashes(folder) != lineage["files"]:
        raise AdapterError(
            f"{folder}: {CONFIG} or {WEIGHTS} is not as it was written (sha256 differs): compose it again"
        )
    moved = places(config.adapters) if config.adapters else {}
    parents = {
        name: moved.get(name) or Path(os.path.normpath(folder / parent["path"]))
        for name, parent in lineage["parents"].items()
    }
    base = config.base or os.path.normpath(folder / lineage["base"]["path"])
    adapters, ground = read_adapters(parents, base)
    for name, adapter in adapters.items():
        if adapter.sha256 != lineage["parents"][name]["sha256"]:
            raise AdapterError(
                f"adapter '{name}': {parents[name]}: not the file that {folder} was made from (sha256 differs): give "
                f"that one by --adapters {name}=folder, or compose again"
            )
    if ground.fingerprint != lineage["base"]["fingerprint"]:
        raise AdapterError(f"{base}: not the base that {folder} was made on (weights differ): give that one by --base")
    expression = parse(lineage["expression"], parents)
    update, heads, _ = combined(expression, adapters, ground, lineage["rank_asked"], lineage["heads"] or "refuse")
    error = rebuilt_error(to_tensors(update, heads, lineage["dtype"]), load_file(folder / WEIGHTS))
    allowed = 0.0 if lineage["method"] == "exact" else REBUILT[lineage["dtype"]]
    if not error <= allowed:
        raise AdapterError(
            f"{folder}: made anew from its parents it differs by {error:.2g}, more than {allowed:g}: compose it again"
        )
    agreement = f"within {error:.1e}" if error else "identical to the bit"
    print_main(f"verify: {lineage['expression']} made anew: {agreement}")
    report: dict[str, Any] = {"error": error, "method": lineage["method"], "writes": {}}
    if config.prompts_file and ground.task == "CAUSAL_LM":
        report["writes"] = writings(config, parents | {"result": folder}, ground)
    return report


# ------------------------------------------------------------------------------------------------- making


def combined(
    expression: Expression,
    adapters: Mapping[str, SavedAdapter],
    ground: AdapterBase,
    rank: int = 0,
    heads: str = "refuse",
) -> tuple[Update, dict[str, Tensor], dict[str, float]]:
    """The update and heads of the expression, and the share of |dW|^2 that `rank` cost, by module; in float64."""
    update = algebra.evaluate(expression, {name: adapter.update for name, adapter in adapters.items()})
    kept, losses = algebra.compress(update, rank)
    parents = {name: adapter.heads for name, adapter in adapters.items()}
    return kept, algebra.combined_heads(expression, parents, ground.parameters(), heads), losses


def is_sum(expression: Expression) -> bool:
    """Whether it is a weighted sum of adapters and nothing else, so that scaling them side by side gives it."""
    return all(isinstance(atom, Name) for atom in weighted(expression))


def method(expression: Expression, adapters: Mapping[str, SavedAdapter], kept: Update) -> str:
    """exact: made without an SVD, so that it can be made again to the bit; compressed: with one."""
    if any(isinstance(atom, Call) and atom.function != "paper" for atom in weighted(expression)):
        return "compressed"
    whole = algebra.evaluate(expression, {name: adapter.update for name, adapter in adapters.items()})
    return "exact" if ranks(whole) == ranks(kept) else "compressed"


def ranks(update: Update) -> dict[str, int]:
    """By module; of IA3 there are none."""
    return {module: part.rank for module, part in update.items() if isinstance(part, Factors)}


def parent_of(adapter: SavedAdapter, out: Path) -> dict[str, Any]:
    """What a lineage says of a parent; its path from `out`, so that both may move together."""
    return {
        "path": os.path.relpath(adapter.folder.resolve(), out.resolve()),
        "sha256": adapter.sha256,
        "kind": adapter.config["peft_type"],
        "lineage": read_lineage(adapter.folder).get("expression"),
    }


def describe_base(ground: AdapterBase, out: Path) -> dict[str, str]:
    """What a lineage says of the base."""
    return {
        "path": os.path.relpath(Path(ground.path).resolve(), out.resolve()),
        "fingerprint": ground.fingerprint,
        "tokenizer": hash_tokenizer(ground.tokenizer),
    }


def rebuilt_error(tensors: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> float:
    """0 for the same bits and only for these; else the largest relative error (Frobenius) of a dW, or other tensor."""
    if tensors.keys() != written.keys() or any(tensors[key].shape != written[key].shape for key in tensors):
        return math.inf
    if all(torch.equal(tensors[key], written[key]) for key in tensors):
        return 0.0
    errors = [sys.float_info.min]
    for key in tensors:
        new, old = (rows[key].double() for rows in (tensors, written))
        if key.endswith("lora_A.weight"):
            continue
        if key.endswith("lora_B.weight"):
            other = key.replace("lora_B", "lora_A")
            new, old = new @ tensors[other].double(), old @ written[other].double()
        errors.append((new - old).norm().item() / (old.norm().item() or 1.0))
    return max(errors)


# ------------------------------------------------------------------------------------------------- proving


class Mixture:
    """A base with several adapters loaded at once, their weights free to be set: no tensor is made or written.

    LoRA: PEFT adds what all active adapters do, each times its scaling, which is set to its own times its weight. IA3:
    PEFT multiplies active vectors, so all layers read one scratch vector 1 + sum w (l - 1). Heads are not mixed.
    """

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        """Loads every folder by PEFT onto a copy of the base; the names are the expression's."""
        self.inside = {name: f"adapter{number}" for number, name in enumerate(folders)}  # PEFT takes no dots
        first, *rest = folders
        self.model = PeftModel.from_pretrained(
            copy.deepcopy(base), str(folders[first]), adapter_name=self.inside[first]
        ).eval()
        for name in rest:
            self.model.load_adapter(str(folders[name]), adapter_name=self.inside[name])
        layers: list[Any] = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        self.lora = [(layer, dict(layer.scaling)) for layer in layers if isinstance(layer, LoraLayer)]
        self.ia3 = [layer for layer in layers if isinstance(layer, IA3Layer)]
        for lora, _ in self.lora:
            lora._active_adapter = list(self.inside.values())
        for layer in self.ia3:
            layer.ia3_l["scratch"] = nn.Parameter(torch.ones_like(next(iter(layer.ia3_l.values()))))
            layer._active_adapter = ["scratch"]
        self.model.requires_grad_(False)

    def set(self, weights: Mapping[str, float]) -> None:
        """Gives each adapter its weight, by the expression's names; one that is not named gets 0."""
        given = {inside: weights.get(name, 0.0) for name, inside in self.inside.items()}
        for lora, scaling in self.lora:
            for inside, scale in scaling.items():
                lora.scaling[inside] = scale * given[inside]
        for layer in self.ia3:
            changes = [given[inside] * (layer.ia3_l[inside].double() - 1) for inside in given if inside in layer.ia3_l]
            layer.ia3_l["scratch"].data.copy_(1 + torch.stack(changes).sum(0))


def proved(
    folder: Path, ground: AdapterBase, update: Update, heads: Mapping[str, Tensor], dtype: str, prompts: Sequence[Text]
) -> Proof:
    """What the logits say of the adapter in `folder`, written in `dtype` from the unrounded update and heads."""
    tokenizer = ground.tokenizer
    plain = probe(ground.model, tokenizer, prompts)
    fly = on_the_fly(ground.model, folder)
    applied = probe(fly, tokenizer, prompts)
    together = probe(merged(fly), tokenizer, prompts)
    size = applied.abs().max().item()
    drift = None
    if dtype != "fp32":
        base = rounded(copy.deepcopy(ground.model), dtype)
        with tempfile.TemporaryDirectory() as exact:
            write_adapter(Path(exact), update, heads, ground, "fp32")
            expected = probe(on_the_fly(base, Path(exact)), tokenizer, prompts)
        found = probe(rounded(merged(on_the_fly(base, folder)), dtype), tokenizer, prompts)
        does = (expected - probe(base, tokenizer, prompts)).abs().max().item()
        error = (found - expected).abs().max().item()
        drift = error / does if does else 0.0 if not error else math.inf
    return Proof(
        effect=(applied - plain).abs().max().item() / size,
        merged=(together - applied).abs().max().item() / size,
        mixed=None,
        drift=drift,
    )


def mixed_error(
    expression: Expression, folder: Path, folders: Mapping[str, Path], ground: AdapterBase, prompts: Sequence[Text]
) -> float:
    """Parents side by side, each scaled by its weight, against the file written: share of the largest logit."""
    mixture = Mixture(ground.model, folders)
    mixture.set({str(atom): float(weight) for atom, weight in weighted(expression).items()})
    expected = probe(mixture.model, ground.tokenizer, prompts)
    found = probe(on_the_fly(ground.model, folder), ground.tokenizer, prompts)
    return (found - expected).abs().max().item() / expected.abs().max().item()


def refuse_unproved(proof: Proof, allow_drift: bool) -> None:
    """AdapterError for logits that differ by more than TOLERANCE (fp32) or DRIFT (half precision)."""
    half = proof.drift is not None
    if not proof.merged <= TOLERANCE:
        raise AdapterError(f"merging changes the logits by {proof.merged:.2g} of the largest, more than {TOLERANCE:g}")
    if half and not proof.drift <= DRIFT and not allow_drift:  # type: ignore[operator]  # it is no None
        raise AdapterError(
            f"dtype: rounding changes {proof.drift:.2g} of what the adapter does to the logits, more than {DRIFT:g}: "
            "say --dtype fp32, or --allow_drift true"
        )
    if proof.mixed is not None and not half and not proof.mixed <= TOLERANCE:
        raise AdapterError(
            f"the result differs from its parents side by side by {proof.mixed:.2g} of the largest logit, more than "
            f"{TOLERANCE:g}"
        )


def told(proof: Proof) -> str:
    """The proof as a line."""
    mixed = "" if proof.mixed is None else f", parents side by side within {proof.mixed:.1e}"
    drift = "" if proof.drift is None else f"; rounding changes {proof.drift:.1%} of what it does"
    return f"of the largest logit: effect {proof.effect:.2g}, merged within {proof.merged:.1e}{mixed}{drift}"


def probe_prompts(file: str, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The first prompts of the file."""
    rows = read_rows(file, "prompt", PROBES)
    ensure_chat_template(tokenizer, rows)
    return [row["prompt"] for row in rows]


@torch.no_grad()
def probe(model: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> Tensor:
    """Logits of the prompts' real tokens (tokens, V); a classifier's (prompts, labels)."""
    ids, mask = prompt_batch(tokenizer, prompts, 10**9)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
    return logits[mask] if logits.ndim == 3 else logits


def on_the_fly(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A copy of the base with the adapter on top, as PEFT loads it."""
    return freeze(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter added into its weights, in place, by PEFT."""
    tuner: Any = model.base_model
    return freeze(tuner.merge_and_unload(safe_merge=True))


def rounded(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model with its weights rounded to a type, still computing in fp32; in place."""
    nn.Module.to(model, DTYPES[dtype])
    return model.float()


# ------------------------------------------------------------------------------------------------- reporting


def writings(config: Verify, folders: Mapping[str, Path], ground: AdapterBase) -> dict[str, dict[str, float]]:
    """What base and adapters write for the same prompts from the same noise: judges, repetition, perplexity; printed.

    Perplexity is per token, EOS included, under the base: it rises where text is no longer the base's language, and
    falls where it repeats itself.
    """
    tokenizer = ground.tokenizer
    rows = read_rows(config.prompts_file, "prompt", config.prompts, config.bad_rows, config.seed)
    ensure_chat_template(tokenizer, rows)
    prompts = filter_prompts([row["prompt"] for row in rows], tokenizer, config.sampling, config.prompts_file)
    judges: dict[str, Any] = {"vader": Vader()}
    if config.judge_file:
        judges["classifier"] = fit_judge(config.judge_file, config.seed)
    found: dict[str, dict[str, float]] = {}
    for name, folder in {"base": None, **folders}.items():
        model = on_the_fly(ground.model, folder) if folder else ground.model
        torch.manual_seed(config.seed)
        rollout = generate(model, tokenizer, prompts, config.sampling)
        rows_of = (rollout.input_ids, rollout.attention_mask, rollout.size)
        with torch.no_grad():
            logprobs = response_logprobs(ground.model, *rows_of, 1.0, tokenizer.pad_token_id)[0]
        texts = [decode(tokenizer, ids) for ids in rollout.responses.tolist()]
        statistics = text_statistics(texts, [display_text(prompt) for prompt in prompts])
        mask = rollout.response_mask
        found[name] = {judge: float(np.mean(score(texts))) for judge, score in judges.items()} | {
            "repetition": statistics.word_repetition,
            "duplicates": statistics.duplicate_share,
            "perplexity": math.exp(-(logprobs[mask].sum() / mask.sum()).item()),
        }
        print_main("  ".join([f"{name}:", *(f"{key} {number:.4g}" for key, number in found[name].items())]))
    return found


def _module(part: algebra.Factors | algebra.Scales, ground: AdapterBase, module: str) -> dict[str, float]:
    """Its row in `inspect`."""
    if isinstance(part, Factors):
        size = algebra.norm(part)
        weight = ground.model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        return {"rank": float(part.rank), "norm": size, "of_weight": size / weight.norm().item()}
    return {"entries": float(len(part.l)), "norm": (part.l - 1).norm().item(), "mean": part.l.mean().item()}
