"""Expressions over named adapters, such as `sft + 0.5*helpful - 0.3*toxic`: their tree, its text, its weights.

Every part is a number or an adapter. Numbers multiply adapters and each other; adapters are added, never multiplied.
`base` is the adapter that changes nothing. avg and lerp are sums in other words; ties, dare and paper are not linear in
the weight updates and stay as they are. Weights are exact fractions until they multiply a tensor, so
0.1*a + 0.2*a - 0.3*a is exactly zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.config.errors import UserError


class ExpressionError(UserError):
    """An expression that cannot be parsed or evaluated; where it was parsed, with a caret under the place."""


@dataclass(frozen=True)
class Number:
    """A decimal number, not negative."""

    value: Decimal

    def __str__(self) -> str:
        return format(self.value.normalize(), "f") if -12 < self.value.adjusted() < 12 else str(self.value.normalize())


@dataclass(frozen=True)
class Variable:
    """A number to be filled in: `$x`."""

    name: str

    def __str__(self) -> str:
        return f"${self.name}"


@dataclass(frozen=True)
class Base:
    """The adapter that changes nothing."""

    def __str__(self) -> str:
        return "base"


@dataclass(frozen=True)
class Name:
    """An adapter by its name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Negated:
    """Minus an adapter or a number."""

    operand: "Expression"

    def __str__(self) -> str:
        return f"-{with_parentheses(self.operand, 1)}"


@dataclass(frozen=True)
class Sum:
    """Of two adapters, or of two numbers; a difference is the sum with a Negated."""

    left: "Expression"
    right: "Expression"

    def __str__(self) -> str:
        sign, right = ("-", self.right.operand) if isinstance(self.right, Negated) else ("+", self.right)
        return f"{self.left} {sign} {with_parentheses(right, 1)}"


@dataclass(frozen=True)
class Product:
    """Of a number and an adapter, in either order, or of two numbers."""

    left: "Expression"
    right: "Expression"

    def __str__(self) -> str:
        return f"{with_parentheses(self.left, 2)}*{with_parentheses(self.right, 3)}"


@dataclass(frozen=True)
class Call:
    """A function of adapters; `options` has every option it takes, in its signature's order."""

    function: str
    arguments: tuple["Expression", ...]
    options: tuple[tuple[str, "Expression | str"], ...] = ()

    def __str__(self) -> str:
        options = (f"{name}={setting}" for name, setting in self.options)
        return f"{self.function}({', '.join([*map(str, self.arguments), *options])})"

    def option(self, name: str) -> "Expression | str":
        """An option's setting: an expression of numbers, or a word."""
        return dict(self.options)[name]


Expression = Number | Variable | Base | Name | Negated | Sum | Product | Call
Term = Name | Call
"""What a weighted sum is made of: adapters, and the functions that are not sums."""


def with_parentheses(expression: Expression, least: int) -> str:
    """The text, in parentheses if it binds less tightly than `least` (a sum 0, a sign 1, a product 2, others 3)."""
    tightness = {Sum: 0, Negated: 1, Product: 2}.get(type(expression), 3)
    return str(expression) if tightness >= least else f"({expression})"


def is_number(expression: Expression) -> bool:
    """Whether it stands for a number, and not for an adapter."""
    if isinstance(expression, Negated):
        return is_number(expression.operand)
    if isinstance(expression, (Sum, Product)):
        return is_number(expression.left) and is_number(expression.right)
    return isinstance(expression, (Number, Variable))


def subexpressions(expression: Expression) -> Iterator[Expression]:
    """The expression and all that is in it, from left to right."""
    yield expression
    if isinstance(expression, Negated):
        yield from subexpressions(expression.operand)
    elif isinstance(expression, (Sum, Product)):
        yield from subexpressions(expression.left)
        yield from subexpressions(expression.right)
    elif isinstance(expression, Call):
        numbers = (setting for _, setting in expression.options if not isinstance(setting, str))
        for child in (*expression.arguments, *numbers):
            yield from subexpressions(child)


def adapter_names(expression: Expression) -> list[str]:
    """The adapters it names, each once, in order."""
    return list(dict.fromkeys(node.name for node in subexpressions(expression) if isinstance(node, Name)))


def variables(expression: Expression) -> list[str]:
    """The numbers still to be filled in, each once, in order."""
    return list(dict.fromkeys(node.name for node in subexpressions(expression) if isinstance(node, Variable)))


def number_value(expression: Expression) -> Fraction:
    """The number that an expression of numbers stands for, exactly; ExpressionError while a variable is in it."""
    if isinstance(expression, Number):
        return Fraction(expression.value)
    if isinstance(expression, Negated):
        return -number_value(expression.operand)
    if isinstance(expression, Sum):
        return number_value(expression.left) + number_value(expression.right)
    if isinstance(expression, Product):
        return number_value(expression.left) * number_value(expression.right)
    raise ExpressionError(f"expression: {expression}: no number has been given to it")


def split_product(product: Product) -> tuple[Fraction, Expression]:
    """The number and the adapter of a product of the two."""
    number, adapter = product.left, product.right
    if not is_number(number):
        number, adapter = adapter, number
    return number_value(number), adapter


def linear_weights(expression: Expression) -> dict[Term, Fraction]:
    """The expression as a weighted sum: each term's weight, equal terms collected, those of weight 0 left out.

    Raises ExpressionError while a weight holds a variable.
    """
    weights: dict[Term, Fraction] = {}
    for weight, term in weighted_terms(expression, Fraction(1)):
        weights[term] = weights.get(term, Fraction(0)) + weight
    return {term: weight for term, weight in weights.items() if weight}


def weighted_terms(expression: Expression, weight: Fraction) -> Iterator[tuple[Fraction, Term]]:
    """The terms of weight times an expression for an adapter, each with its own weight, from left to right."""
    if isinstance(expression, Negated):
        yield from weighted_terms(expression.operand, -weight)
    elif isinstance(expression, Sum):
        yield from weighted_terms(expression.left, weight)
        yield from weighted_terms(expression.right, weight)
    elif isinstance(expression, Product):
        number, adapter = split_product(expression)
        yield from weighted_terms(adapter, weight * number)
    elif isinstance(expression, Call) and expression.function == "avg":
        for argument in expression.arguments:
            yield from weighted_terms(argument, weight / len(expression.arguments))
    elif isinstance(expression, Call) and expression.function == "lerp":
        t = expression.option("t")
        assert not isinstance(t, str)
        for argument, share in zip(expression.arguments, (1 - number_value(t), number_value(t)), strict=True):
            yield from weighted_terms(argument, weight * share)
    elif isinstance(expression, (Name, Call)):
        yield weight, expression


def fill_variables(expression: Expression, values: Mapping[str, float]) -> Expression:
    """The expression with numbers for the variables in `values`; unchecked."""
    if isinstance(expression, Variable) and expression.name in values:
        value = values[expression.name]
        number = Number(Decimal(repr(abs(float(value)))))
        return Negated(number) if value < 0 else number
    if isinstance(expression, Negated):
        return Negated(fill_variables(expression.operand, values))
    if isinstance(expression, (Sum, Product)):
        return type(expression)(fill_variables(expression.left, values), fill_variables(expression.right, values))
    if isinstance(expression, Call):
        arguments = tuple(fill_variables(argument, values) for argument in expression.arguments)
        options = tuple(
            (name, setting if isinstance(setting, str) else fill_variables(setting, values))
            for name, setting in expression.options
        )
        return Call(expression.function, arguments, options)
    return expression
