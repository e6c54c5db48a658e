"""The weights of an expression are exact and those of its leaves; its names and variables stand once, in order."""

from fractions import Fraction

import pytest
from hypothesis import given
from random_expressions import constants, trees, unfold

from pipeline.adapters.expression_parser import parse
from pipeline.adapters.expressions import (
    ExpressionError,
    adapter_names,
    linear_weights,
    variables,
)


@given(trees(constants, functions=False))
def test_the_weights_are_those_of_the_leaves(tree):
    expected: dict[str, Fraction] = {}
    for name, weight in unfold(tree):
        expected[name] = expected.get(name, Fraction(0)) + weight
    assert {str(atom): w for atom, w in linear_weights(tree).items()} == {name: w for name, w in expected.items() if w}


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
    assert {str(atom): weight for atom, weight in linear_weights(parse(text)).items()} == weights


def test_names_and_variables_stand_once_in_order():
    tree = parse("b + $y*(a - b) + lerp(c, a, $x) + $y*dare(d, p=$p)")
    assert adapter_names(tree) == ["b", "a", "c", "d"]
    assert variables(tree) == ["y", "x", "p"]


def test_a_weight_without_a_number_has_no_value():
    with pytest.raises(ExpressionError, match=r"\$x"):
        linear_weights(parse("a + $x*b"))
