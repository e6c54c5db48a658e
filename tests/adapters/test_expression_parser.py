"""An expression's text and its tree are one; what cannot be parsed is shown at its place."""

from fractions import Fraction

import pytest
from hypothesis import given
from random_expressions import scalars, trees

from pipeline.adapters.expression_parser import parse, substitute
from pipeline.adapters.expressions import (
    ExpressionError,
    Name,
    linear_weights,
    variables,
)
from pipeline.config.errors import UserError


@given(trees(scalars))
def test_a_tree_is_read_back_from_its_text(tree):
    assert parse(str(tree)) == tree
    assert parse(str(tree).replace(" ", "")) == tree
    assert parse(f" {tree}\n") == tree


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


def test_variables_are_filled_in_exactly():
    tree = parse("sft + $x*good - $y*(bad - sft)")
    filled = substitute(tree, {"x": 0.3, "y": -1e-3})
    assert str(filled) == "sft + 0.3*good - (-0.001)*(bad - sft)"
    assert {str(a): w for a, w in linear_weights(filled).items()} == {
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
