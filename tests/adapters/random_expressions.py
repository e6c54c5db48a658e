"""Random expressions, and the weights of their leaves by the meaning of each node."""

from decimal import Decimal
from fractions import Fraction

from hypothesis import strategies as st

from pipeline.adapters.expressions import (
    Base,
    Call,
    Name,
    Negated,
    Number,
    Product,
    Sum,
    Variable,
)

NAMES = ("a", "b", "sft", "yelp_lm", "x.v2")


numbers = st.builds(Number, st.decimals(0, 10**6, places=4).map(lambda d: d.normalize() + 0))


scalars = st.recursive(
    numbers | st.builds(Variable, st.sampled_from(("x", "y"))),
    lambda inner: st.builds(Negated, inner) | st.builds(Sum, inner, inner) | st.builds(Product, inner, inner),
    max_leaves=4,
)


constants = st.recursive(
    numbers,
    lambda inner: st.builds(Negated, inner) | st.builds(Sum, inner, inner) | st.builds(Product, inner, inner),
    max_leaves=3,
)


def trees(weights: st.SearchStrategy, functions: bool = True) -> st.SearchStrategy:
    """Random expressions for an adapter."""

    def larger(inner: st.SearchStrategy) -> st.SearchStrategy:
        some = st.lists(inner, min_size=1, max_size=3).map(tuple)
        nodes = (
            st.builds(Negated, inner)
            | st.builds(Sum, inner, inner)
            | st.builds(Product, weights, inner)
            | st.builds(Product, inner, weights)
            | st.builds(lambda parts: Call("avg", parts), some)
            | st.builds(lambda a, b, t: Call("lerp", (a, b), (("t", t),)), inner, inner, weights)
        )
        density, p, seed = (Number(Decimal(text)) for text in ("0.25", "0.9", "3"))
        if functions:
            nodes |= st.builds(lambda parts: Call("ties", parts, (("density", density),)), some)
            nodes |= st.builds(lambda a: Call("dare", (a,), (("p", p), ("seed", seed))), inner)
            nodes |= st.builds(lambda a: Call("paper", (a,), (("neg", "A"), ("normalise", "no"))), inner)
        return nodes

    return st.recursive(st.builds(Name, st.sampled_from(NAMES)) | st.just(Base()), larger, max_leaves=8)


def unfold(tree, weight=Fraction(1)):
    """(adapter, weight) of every leaf, from the meaning of each node."""
    if isinstance(tree, Name):
        return [(tree.name, weight)]
    if isinstance(tree, Negated):
        return unfold(tree.operand, -weight)
    if isinstance(tree, Sum):
        return unfold(tree.left, weight) + unfold(tree.right, weight)
    if isinstance(tree, Product):
        scalar, adapter = (tree.left, tree.right) if numeric(tree.left) is not None else (tree.right, tree.left)
        return unfold(adapter, weight * numeric(scalar))
    if isinstance(tree, Call) and tree.function == "avg":
        return [leaf for part in tree.arguments for leaf in unfold(part, weight / len(tree.arguments))]
    if isinstance(tree, Call):
        t = numeric(tree.options[0][1])
        a, b = tree.arguments
        return unfold(a, weight * (1 - t)) + unfold(b, weight * t)
    return []


def numeric(tree):
    if isinstance(tree, Number):
        return Fraction(tree.value)
    if isinstance(tree, Negated) and numeric(tree.operand) is not None:
        return -numeric(tree.operand)
    if isinstance(tree, (Sum, Product)) and None not in (sides := (numeric(tree.left), numeric(tree.right))):
        return sides[0] + sides[1] if isinstance(tree, Sum) else sides[0] * sides[1]
    return None
