"""What an expression over adapters stands for: one update of the base, and what becomes of whole trained layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.adapters.compression import factorize
from pipeline.adapters.expressions import (
    Call,
    Expression,
    Name,
    Term,
    adapter_names,
    linear_weights,
    number_value,
)
from pipeline.adapters.operators import dare, paper, ties
from pipeline.adapters.updates import (
    AlgebraError,
    Factors,
    ModuleUpdate,
    Update,
    add,
    check_addable,
    has_bias,
    to_dense,
    zero_update,
)


def evaluate(expression: Expression, adapters: Mapping[str, Update]) -> Update:
    """What the expression stands for, exactly; terms are added in the order of their names, whatever the text's.

    ties and dare act on whole dW, which only a dense matrix holds: their results have as many ranks as they need.
    Raises AlgebraError for adapters that do not fit together, ExpressionError for a variable without a number.
    """
    named = [adapters[name] for name in adapter_names(expression)] or list(adapters.values())
    zeros = zero_update(named)
    weights = linear_weights(expression)
    if not weights:
        return zeros
    terms = sorted(weights, key=str)
    total = add([(str(term), float(weights[term]), evaluate_term(term, adapters)) for term in terms])
    # a module whose weights cancel stays a module of the result
    return {module: total.get(module, zeros[module]) for module in sorted({*total, *zeros})}


def evaluate_term(term: Term, adapters: Mapping[str, Update]) -> Update:
    """An adapter's update, or that of a function of adapters; AlgebraError for a function without a rule."""
    if isinstance(term, Name):
        return adapters[term.name]
    if term.function == "paper":
        return paper(term.arguments[0], adapters, str(term.option("neg")), term.option("normalise") == "yes")
    if term.function == "ties":
        density = number_option(term, "density")
        return apply_to_changes(term, adapters, lambda changes, module: ties(changes, density))
    if term.function == "dare":
        p, seed = number_option(term, "p"), int(number_option(term, "seed"))
        return apply_to_changes(term, adapters, lambda changes, module: dare(changes[0], p, seed, module))
    raise AlgebraError(f"{term}: there is no rule for '{term.function}'; expected ties, dare or paper")


def number_option(call: Call, name: str) -> float:
    """The number that a function's option has."""
    setting = call.option(name)
    assert not isinstance(setting, str)
    return float(number_value(setting))


def apply_to_changes(
    call: Call, adapters: Mapping[str, Update], function: Callable[[Sequence[Tensor], str], Tensor]
) -> Update:
    """`function`(changes, module) of the arguments' changes to each module, dW (out, in) or l - 1 (n,)."""
    updates = [evaluate(argument, adapters) for argument in call.arguments]
    if any(has_bias(update) for update in updates):
        raise AlgebraError(f"{call}: lora_bias: {call.function} has no rule for it; leave it out, or use a sum")
    check_addable([(str(argument), update) for argument, update in zip(call.arguments, updates, strict=True)])
    results: dict[str, ModuleUpdate] = {}
    for module in sorted({module for update in updates for module in update}):
        parts = [update[module] for update in updates if module in update]
        changes = [to_dense(part) if isinstance(part, Factors) else part.l - 1 for part in parts]
        change, first = function(changes, module), parts[0]
        results[module] = factorize(change) if isinstance(first, Factors) else replace(first, l=1 + change)
    return results


def combine_heads(
    expression: Expression, heads: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], rule: str
) -> dict[str, Tensor]:
    """Whole layers trained beside the adapters (`modules_to_save`), combined by a rule; parameter by parameter.

    refuse: AlgebraError if there is any. first: as the first adapter in the expression that has one trained it, its
    weight aside. sum: base + sum w (head - base), float64; where the base has no such layer (a score head on a language
    model) every adapter must have one and the weights sum to 1.
    """
    trained = {name: heads[name] for name in adapter_names(expression) if heads.get(name)}
    if not trained:
        return {}
    first = next(iter(trained))
    if rule == "refuse":
        raise AlgebraError(
            f"adapter '{first}': modules_to_save: it has whole trained layers ({', '.join(trained[first])}), which an "
            "expression does not say how to combine: say --heads first or --heads sum"
        )
    if rule == "first":
        return dict(trained[first])
    weights = linear_weights(expression)
    if any(not isinstance(term, Name) for term in weights):
        raise AlgebraError(f"adapter '{first}': modules_to_save: heads have a sum, but no ties, dare or paper")
    total: dict[str, Tensor] = {}
    for parameter in sorted({parameter for head in trained.values() for parameter in head}):
        having = {name: head[parameter] for name, head in trained.items() if parameter in head}
        terms = [(float(weight), having[str(term)]) for term, weight in weights.items() if str(term) in having]
        if parameter not in base and (len(terms) != len(weights) or sum(weights.values()) != 1):
            raise AlgebraError(
                f"adapter '{first}': {parameter}: the base has no such layer, so heads can only be averaged: let every "
                f"adapter have one and the weights sum to 1 (they sum to {float(sum(weights.values())):g})"
            )
        start = base.get(parameter, torch.zeros(())).double()
        total[parameter] = start + sum(weight * (head.double() - start) for weight, head in terms)
    return total
