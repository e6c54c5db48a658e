"""An expression's text and its tree are one; its weights are exact; what is no expression is shown at its place."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapters.expressions import (
    Base,
    Call,
    ExpressionError,
    Name,
    Negated,
    Number,
    Product,
    Sum,
    Variable,
    names,
    parse,
    substitute,
    variables,
    weighted,
)
from pipeline.config.errors import UserError

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
        found = (
            st.builds(Negated, inner)
            | st.builds(Sum, inner, inner)
            | st.builds(Product, weights, inner)
            | st.builds(Product, inner, weights)
            | st.builds(lambda parts: Call("avg", parts), some)
            | st.builds(lambda a, b, t: Call("lerp", (a, b), (("t", t),)), inner, inner, weights)
        )
        density, p, seed = (Number(Decimal(text)) for text in ("0.25", "0.9", "3"))
        if functions:
            found |= st.builds(lambda parts: Call("ties", parts, (("density", density),)), some)
            found |= st.builds(lambda a: Call("dare", (a,), (("p", p), ("seed", seed))), inner)
            found |= st.builds(lambda a: Call("paper", (a,), (("neg", "A"), ("normalise", "no"))), inner)
        return found

    return st.recursive(st.builds(Name, st.sampled_from(NAMES)) | st.just(Base()), larger, max_leaves=8)


@given(trees(scalars))
def test_a_tree_is_read_back_from_its_text(tree):
    assert parse(str(tree)) == tree
    assert parse(str(tree).replace(" ", "")) == tree
    assert parse(f" {tree}\n") == tree


def by_definition(tree, weight=Fraction(1)):
    """(adapter, weight) of every leaf, from the meaning of each node."""
    if isinstance(tree, Name):
        return [(tree.name, weight)]
    if isinstance(tree, Negated):
        return by_definition(tree.of, -weight)
    if isinstance(tree, Sum):
        return by_definition(tree.left, weight) + by_definition(tree.right, weight)
    if isinstance(tree, Product):
        scalar, adapter = (tree.left, tree.right) if numeric(tree.left) is not None else (tree.right, tree.left)
        return by_definition(adapter, weight * numeric(scalar))
    if isinstance(tree, Call) and tree.function == "avg":
        return [leaf for part in tree.arguments for leaf in by_definition(part, weight / len(tree.arguments))]
    if isinstance(tree, Call):
        t = numeric(tree.options[0][1])
        a, b = tree.arguments
        return by_definition(a, weight * (1 - t)) + by_definition(b, weight * t)
    return []


def numeric(tree):
    if isinstance(tree, Number):
        return Fraction(tree.value)
    if isinstance(tree, Negated) and numeric(tree.of) is not None:
        return -numeric(tree.of)
    if isinstance(tree, (Sum, Product)) and None not in (sides := (numeric(tree.left), numeric(tree.right))):
        return sides[0] + sides[1] if isinstance(tree, Sum) else sides[0] * sides[1]
    return None


@given(trees(constants, functions=False))
def test_the_weights_are_those_of_the_leaves(tree):
    expected: dict[str, Fraction] = {}
    for name, weight in by_definition(tree):
        expected[name] = expected.get(name, Fraction(0)) + weight
    assert {str(atom): w for atom, w in weighted(tree).items()} == {name: w for name, w in expected.items() if w}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("sft + 0.5*helpful - 0.3*toxic", {"sft": 1, "helpful": Fraction(1, 2), "toxic": Fraction(-3, 10)}),
        ("0.6*cls + 0.4*(yelp - amazon)", {"cls": Fraction(3, 5), "yelp": Fraction(2, 5), "amazon": Fraction(-2, 5)}),
        ("0.1*a + 0.2*a - 0.3*a", {}),
        ("a - b - c", {"a": 1, "b": -1, "c": -1}),
        ("a - (b - c)", {"a": 1, "b": -1, "c": 1}),
        ("-a*2", {"a": -2}),
        ("2*-a", {"a": -2}),
        ("- -a", {"a": 1}),
        ("2*3*a", {"a": 6}),
        ("(1 - 0.25)*a", {"a": Fraction(3, 4)}),
        ("avg(a, b, b)", {"a": Fraction(1, 3), "b": Fraction(2, 3)}),
        ("lerp(a, b, 0.25)", {"a": Fraction(3, 4), "b": Fraction(1, 4)}),
        ("lerp(a, b, t=-1)", {"a": 2, "b": -1}),
        ("base + a", {"a": 1}),
        ("0 - a", {"a": -1}),
        ("0", {}),
        ("1e-3*a", {"a": Fraction(1, 1000)}),
        (".5*a", {"a": Fraction(1, 2)}),
        ("2*ties(a, b) - ties(a,b, density=0.2)", {"ties(a, b, density=0.2)": 1}),
    ],
)
def test_weights_of_expressions(text, weights):
    assert {str(atom): weight for atom, weight in weighted(parse(text)).items()} == weights


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" sft+.50*helpful ", "sft + 0.5*helpful"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a)", "a"),
        ("ties(a,b)", "ties(a, b, density=0.2)"),
        ("dare(a,.9)", "dare(a, p=0.9, seed=0)"),
        ("dare(a, seed=7, p=0.5)", "dare(a, p=0.5, seed=7)"),
        ("lerp(a,b,$t)", "lerp(a, b, t=$t)"),
        ("paper(a - 0.4*b, neg='A')", "paper(a - 0.4*b, neg=A, normalise=yes)"),
        ("1e-20*a", "1E-20*a"),
        ("100*a", "100*a"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse(text)) == canonical


def test_names_and_variables_stand_once_in_order():
    tree = parse("b + $y*(a - b) + lerp(c, a, $x) + $y*dare(d, p=$p)")
    assert names(tree) == ["b", "a", "c", "d"]
    assert variables(tree) == ["y", "x", "p"]


def test_variables_are_filled_in_exactly():
    tree = parse("sft + $x*good - $y*(bad - sft)")
    filled = substitute(tree, {"x": 0.3, "y": -1e-3})
    assert str(filled) == "sft + 0.3*good - (-0.001)*(bad - sft)"
    assert {str(a): w for a, w in weighted(filled).items()} == {
        "sft": Fraction(999, 1000), "good": Fraction(3, 10), "bad": Fraction(1, 1000),
    }  # fmt: skip
    assert variables(substitute(tree, {"x": 1})) == ["y"]
    assert substitute(parse("1e-30*$x*a"), {"x": 2.5e-7}) == parse("1e-30*2.5e-7*a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"z": 1.0}, "no variable $z"),
        ({"x": float("nan")}, "$x: expected a finite number, got nan"),
        ({"x": float("inf")}, "$x: expected a finite number, got inf"),
        ({"p": 1.5}, "dare: p: expected a number in [0, 1), got 1.5"),
    ],
)
def test_what_cannot_be_filled_in(values, message):
    with pytest.raises(ExpressionError) as refused:
        substitute(parse("a + $x*dare(b, p=$p)"), values)
    assert message in str(refused.value)


def test_a_weight_without_a_number_has_no_value():
    with pytest.raises(ExpressionError, match=r"\$x"):
        weighted(parse("a + $x*b"))


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", 0, "expected a number, an adapter or '(', got the end"),
        ("a +", 3, "got the end"),
        ("a ** b", 3, "got '*'"),
        ("a*b", 1, "'*' stands between two adapters"),
        ("a/2", 1, "there is no division"),
        ("a b", 2, "expected an operator or the end, got 'b'"),
        ("a + 1", 2, "'+' stands between an adapter and a number"),
        ("2", 0, "expected an adapter, got the number 2"),
        ("0.3*0.5", 0, "expected an adapter, got the number 0.3*0.5"),
        ("(a", 2, "expected ')', got the end"),
        ("a)", 1, "got ')'"),
        ("a + toxik", 4, "no adapter is called 'toxik' (there are a, b, toxic); did you mean 'toxic'?"),
        ("a + nan*b", 4, "nan: expected a finite number"),
        ("inf*b", 0, "inf: expected a finite number"),
        ("1e999*a", 0, "expected a number between 1e-300 and 1e300"),
        ("a + 1e-999*b", 4, "expected a number between"),
        ("3a", 0, "'3' has no meaning here"),
        ("a ^ 2", 2, "'^' has no meaning here"),
        ("a; b", 1, "';' has no meaning here"),
        ("ties(a, density=2)", 16, "ties: density: expected a number in (0, 1], got 2"),
        ("ties(a, density=0)", 16, "ties: density: expected a number in (0, 1], got 0"),
        ("ties(a, dense=1)", 8, "ties has no option 'dense'; did you mean 'density'?"),
        ("ties(a", 6, "expected ',', got the end"),
        ("ties(density=0.2)", 0, "ties takes at least 1 adapters, got 0"),
        ("dare(a)", 0, "dare: p is missing: expected a number in [0, 1)"),
        ("dare(a, 1)", 8, "dare: p: expected a number in [0, 1), got 1"),
        ("dare(a, 0.5, seed=0.5)", 18, "dare: seed: expected a whole number of at least 0, got 0.5"),
        ("dare(a, p=0.5, p=0.6)", 15, "dare: p is given twice"),
        ("lerp(a, b)", 0, "lerp: t is missing: expected a number"),
        ("lerp(a, t=0.5)", 0, "lerp takes 2 adapters, got 1"),
        ("lerp(a, b, a)", 11, "lerp: t: expected a number, got a"),
        ("lerp(a, b, 0.1, 0.2)", 16, "lerp takes no more arguments here"),
        ("avg()", 0, "avg takes at least 1 adapters, got 0"),
        ("avg(a, 2)", 7, "expected an adapter, got the number 2"),
        ("paper(a, neg=C)", 13, "paper: neg: expected A or B, got 'C'"),
        ("slerp + a", 0, "no adapter is called 'slerp' (there are a, b, toxic); did you mean 'lerp'?"),
    ],
)
def test_what_is_refused_is_shown_at_its_place(text, place, message):
    with pytest.raises(ExpressionError) as refused:
        parse(text, ("a", "b", "toxic"))
    said, shown, caret = str(refused.value).split("\n")
    assert said.startswith("expression: ")
    assert message in said
    assert shown == f"  {text}"
    assert caret == " " * (place + 2) + "^"
    assert isinstance(refused.value, UserError)


def test_any_name_will_do_where_none_are_known():
    assert parse("whatever.v3") == Name("whatever.v3")
