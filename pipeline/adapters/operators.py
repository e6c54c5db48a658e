"""The functions of adapters that are not weighted sums: TIES, DARE, and the factor-wise rules of Zhang et al."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.adapters.expressions import (
    Base,
    Call,
    Expression,
    Name,
    Negated,
    Product,
    Sum,
    linear_weights,
    split_product,
)
from pipeline.adapters.updates import (
    AlgebraError,
    Factors,
    ModuleUpdate,
    Update,
    add,
    has_bias,
    scaled_factors,
    update_kind,
)


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """TIES of weighted changes of one shape (Yadav et al., arXiv 2306.01708): trim, elect a sign, mean of who agrees.

    Each keeps its `density` share of largest entries; an entry's sign is that of the sum over changes, and its value
    the mean of those that have this sign. The weights are in the changes before they vote, so that a negative one
    votes against.
    """
    trimmed = torch.stack([trim(change, density) for change in changes])
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp(min=1)


def trim(change: Tensor, density: float) -> Tensor:
    """The change with all but its `density` share of largest entries at 0; at least one is kept."""
    flat = change.flatten()
    kept = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def dare(change: Tensor, p: float, seed: int, module: str) -> Tensor:
    """DARE of a change (Yu et al., arXiv 2311.03099): each entry is dropped with probability p, else divided by 1 - p.

    The draw depends on seed and module alone: not on the order of modules, nor on torch's global generator.
    """
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    keep = torch.rand(change.shape, generator=generator, dtype=torch.float64) >= p
    return torch.where(keep, change / (1 - p), 0)


def paper(expression: Expression, adapters: Mapping[str, Update], neg: str, normalise: bool) -> Update:
    """The expression by the factor-wise rules of Zhang et al. (arXiv 2306.14870), A and B each added by itself.

    Not the sum of the updates: it mixes b1 with a2. It is here to reproduce the paper. Raises AlgebraError unless all
    adapters have the same modules and ranks, as the rules need.
    """
    weights = paper_weights(expression, neg, normalise)
    check_same_ranks({name: adapters[name] for name in weights})
    first = next(iter(weights))
    if update_kind(adapters[first]) == "IA3":
        return add([(name, weight, adapters[name]) for name, (_, _, weight) in weights.items()])
    update: dict[str, ModuleUpdate] = {}
    for module in adapters[first]:
        terms = [(w, part) for name, w in weights.items() if isinstance(part := adapters[name][module], Factors)]
        a = torch.stack([weight_a * part.a for (weight_a, _, _), part in terms]).sum(0)
        b = torch.stack([weight_b * part.b for (_, weight_b, _), part in terms]).sum(0)
        update[module] = scaled_factors(b, a)
    return update


def check_same_ranks(adapters: Mapping[str, Update]) -> None:
    """AlgebraError unless all have the modules and ranks of the first, and none a lora_bias."""
    first = next(iter(adapters))
    for name, update in adapters.items():
        if module_ranks(update) != module_ranks(adapters[first]):
            raise AlgebraError(
                f"adapter '{name}': paper(...) adds factors, so it needs the modules and ranks of '{first}'; write the "
                "sum without paper(...), which needs neither"
            )
        if has_bias(update):
            raise AlgebraError(f"adapter '{name}': lora_bias: paper(...) has no rule for it")


def module_ranks(update: Update) -> dict[str, int]:
    """By module, LoRA's rank or the length of IA3's vector."""
    return {module: part.rank if isinstance(part, Factors) else len(part.l) for module, part in update.items()}


def paper_weights(expression: Expression, neg: str, normalise: bool) -> dict[str, tuple[float, float, float]]:
    """By adapter, the weights of its A and its B (LoRA) and of l - 1 (IA3) in the rules of Zhang et al. 2023.

    A weight multiplies both factors, a minus sign only the factor `neg`. With `normalise` the weights of the outermost
    sum are divided by their sum. A lone adapter is their unlearning: its weight, too, is on the factor `neg` alone.
    Raises AlgebraError for a function of adapters inside, and for weights that sum to 0.
    """
    outer = list(signed_terms(expression, through_sums=True))
    if len(outer) == 1 and isinstance(outer[0][2], Name):
        sign, weight, adapter = outer[0]
        one_factor = float(sign * weight)
        return {str(adapter): (one_factor, 1.0, one_factor) if neg == "A" else (1.0, one_factor, one_factor)}
    total = sum(weight for _, weight, _ in outer) if normalise and len(outer) > 1 else Fraction(1)
    if not total:
        raise AlgebraError(f"paper({expression}): its weights sum to 0, so they cannot be made to sum to 1")
    weights: dict[str, tuple[float, float, float]] = {}
    for outer_sign, outer_weight, term in outer:
        for name, sign, weight in signed_adapters(term, outer_sign, outer_weight / total):
            on_neg, on_other = float(sign * weight), float(weight)
            old = weights.get(name, (0.0, 0.0, 0.0))
            new = (on_neg, on_other, on_neg) if neg == "A" else (on_other, on_neg, on_neg)
            weights[name] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])
    return weights


def signed_terms(
    expression: Expression, through_sums: bool, sign: int = 1, weight: Fraction = Fraction(1)
) -> Iterator[tuple[int, Fraction, Expression]]:
    """(sign, weight >= 0, what they multiply); a sum counts as one unless it is the outermost and `through_sums`."""
    if isinstance(expression, Negated):
        yield from signed_terms(expression.operand, through_sums, -sign, weight)
    elif isinstance(expression, Product):
        number, adapter = split_product(expression)
        yield from signed_terms(adapter, False, -sign if number < 0 else sign, weight * abs(number))
    elif isinstance(expression, Sum) and through_sums:
        yield from signed_terms(expression.left, True, sign, weight)
        yield from signed_terms(expression.right, True, sign, weight)
    elif isinstance(expression, Call) and expression.function in ("avg", "lerp") and through_sums:
        for term, share in linear_weights(expression).items():
            yield (sign if share > 0 else -sign), weight * abs(share), term
    elif not isinstance(expression, Base):
        yield sign, weight, expression


def signed_adapters(expression: Expression, sign: int, weight: Fraction) -> Iterator[tuple[str, int, Fraction]]:
    """(name, sign, weight >= 0) of every adapter inside; AlgebraError for a function that is not a sum."""
    for inner_sign, inner_weight, term in signed_terms(expression, True, sign, weight):
        if isinstance(term, Name):
            yield term.name, inner_sign, inner_weight
        elif isinstance(term, Call) and term.function not in ("avg", "lerp"):
            raise AlgebraError(f"paper(...): {term}: it adds adapters only; put the function outside")
        else:
            yield from signed_adapters(term, inner_sign, inner_weight)
