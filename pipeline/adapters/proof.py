"""Proofs on the logits of real prompts, by PEFT's own forward: a merge, a written adapter, a sum of its parents."""

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.expressions import Expression
from pipeline.adapters.mixture import Mixture, mixture_weights
from pipeline.adapters.updates import Update
from pipeline.adapters.writing import DTYPES, write_adapter
from pipeline.config.dials import Reading
from pipeline.core.tensors import position_ids
from pipeline.data.chat_template import ensure_chat_template
from pipeline.data.formats import read_rows
from pipeline.data.messages import Text
from pipeline.data.tokenize import prompt_batch
from pipeline.models.loading import Policy, freeze, merge_adapter, unwrap_peft

PROBES = 32  # prompts
TOLERANCE = 1e-5  # of the largest logit, fp32
MAX_DRIFT = 0.05  # of the largest change of a logit by the adapter, half precision


@dataclass(frozen=True)
class ProvedMerge:
    """A model with its adapter merged into its weights, and how its logits compare with those before."""

    model: PreTrainedModel
    unmerged_logits: Tensor
    error: float  # share of the largest logit


@dataclass(frozen=True)
class Proof:
    """What the logits of the probes say; shares of the largest logit, drift a share of the adapter's effect."""

    effect: float  # adapter against base
    merged: float  # merged into the weights against unmerged
    mixed: float | None  # parents side by side against unmerged; None where the result is not a weighted sum of them
    drift: float | None  # of rounding to the type that is written, base and merge included; None for fp32


def prove_merge(
    model: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], name: str | Path
) -> ProvedMerge:
    """The model with its adapter merged into its weights, in place, by PEFT.

    Raises AdapterError, with the `name` of what is merged, if a logit of the prompts changes by more than TOLERANCE.
    """
    unmerged_logits = probe_logits(model, tokenizer, prompts)
    merged = merge_adapter(unwrap_peft(model))
    error = relative_error(probe_logits(merged, tokenizer, prompts), unmerged_logits)
    if not error <= TOLERANCE:
        raise AdapterError(f"{name}: merging changes the logits by {error:.2g} of the largest, more than {TOLERANCE:g}")
    return ProvedMerge(merged, unmerged_logits, error)


def prove_adapter(
    folder: Path,
    base: AdapterBase,
    update: Update,
    heads: Mapping[str, Tensor],
    dtype: str,
    prompts: Sequence[Text],
    name: str | Path,
) -> Proof:
    """What the logits say of the adapter in `folder`, written in `dtype` from the unrounded update and heads.

    Raises AdapterError as `prove_merge` does.
    """
    merge = prove_merge(load_unmerged(base.model, folder), base.tokenizer, prompts, name)
    return Proof(
        effect=relative_error(probe_logits(base.model, base.tokenizer, prompts), merge.unmerged_logits),
        merged=merge.error,
        mixed=None,
        drift=None if dtype == "fp32" else rounding_drift(folder, base, update, heads, dtype, prompts),
    )


def rounding_drift(
    folder: Path, base: AdapterBase, update: Update, heads: Mapping[str, Tensor], dtype: str, prompts: Sequence[Text]
) -> float:
    """What rounding base, adapter and merge to `dtype` changes of a logit, as a share of what the adapter changes.

    The base that it is held against is rounded too.
    """
    rounded_base = round_weights_(copy.deepcopy(base.model), dtype)
    with tempfile.TemporaryDirectory() as exact:
        write_adapter(Path(exact), update, heads, base, "fp32")
        expected = probe_logits(load_unmerged(rounded_base, Path(exact)), base.tokenizer, prompts)
    merged = merge_adapter(unwrap_peft(load_unmerged(rounded_base, folder)))
    error = probe_logits(round_weights_(merged, dtype), base.tokenizer, prompts) - expected
    effect = expected - probe_logits(rounded_base, base.tokenizer, prompts)
    largest_error, largest_effect = error.abs().max().item(), effect.abs().max().item()
    if largest_effect:
        return largest_error / largest_effect
    return math.inf if largest_error else 0.0


def mixture_error(
    expression: Expression, folder: Path, parents: Mapping[str, Path], base: AdapterBase, prompts: Sequence[Text]
) -> float:
    """The file written against its parents side by side, each scaled by its weight: share of the largest logit."""
    mixture = Mixture(base.model, parents)
    mixture.set_weights(mixture_weights(expression))
    expected = probe_logits(mixture.model, base.tokenizer, prompts)
    return relative_error(probe_logits(load_unmerged(base.model, folder), base.tokenizer, prompts), expected)


def check_proof(proof: Proof, allow_drift: bool) -> None:
    """AdapterError for logits that differ by more than MAX_DRIFT (half precision) or, mixed, TOLERANCE (fp32)."""
    if proof.drift is not None:
        if not proof.drift <= MAX_DRIFT and not allow_drift:
            raise AdapterError(
                f"dtype: rounding changes {proof.drift:.2g} of what the adapter does to the logits, more than "
                f"{MAX_DRIFT:g}: say --dtype fp32, or --allow_drift true"
            )
    elif proof.mixed is not None and not proof.mixed <= TOLERANCE:
        raise AdapterError(
            f"the result differs from its parents side by side by {proof.mixed:.2g} of the largest logit, more than "
            f"{TOLERANCE:g}"
        )


def format_proof(proof: Proof) -> str:
    """The proof as a line."""
    mixed = "" if proof.mixed is None else f", parents side by side within {proof.mixed:.1e}"
    drift = "" if proof.drift is None else f"; rounding changes {proof.drift:.1%} of what it does"
    return f"of the largest logit: effect {proof.effect:.2g}, merged within {proof.merged:.1e}{mixed}{drift}"


def read_probes(file: str, tokenizer: PreTrainedTokenizerBase, reading: Reading = Reading()) -> list[Text]:
    """The first prompts of the file."""
    rows = read_rows(file, "prompt", PROBES, reading)
    ensure_chat_template(tokenizer, rows)
    return [row["prompt"] for row in rows]


@torch.no_grad()
def probe_logits(model: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> Tensor:
    """Logits of the prompts' real tokens (tokens, V); a classifier's (prompts, labels)."""
    ids, mask = prompt_batch(tokenizer, prompts, 10**9)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
    return logits[mask] if logits.ndim == 3 else logits


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """The largest difference of a logit, as a share of the largest expected one."""
    return (logits - expected).abs().max().item() / expected.abs().max().item()


def load_unmerged(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A copy of the base with the adapter on top, as PEFT loads it, frozen."""
    return freeze(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))


def round_weights_(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model with its weights rounded to a type, still computing in fp32; in place."""
    nn.Module.to(model, DTYPES[dtype])
    return model.float()
