"""Expressions over named adapters, `sft + 0.5*helpful - 0.3*toxic`: read into a tree, printed, made a weighted sum.

    sum      = signed (("+" | "-") signed)*          signed = "-" signed | product
    product  = factor ("*" factor)*                  factor = "-" factor | atom
    atom     = number | $variable | name | "base" | "0" | "(" sum ")" | function "(" arguments ")"

Every part is a number or an adapter. Numbers multiply adapters and each other; adapters are added, never multiplied.
`base` (or `0`) is the adapter that changes nothing. avg and lerp are sums in other words; ties, dare and paper are not
linear in the weight updates and stay as they are. Weights are exact fractions up to the moment they meet a tensor, so
0.1*a + 0.2*a - 0.3*a is nothing at all. This room knows no tensor.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import NoReturn

from pipeline.config.errors import UserError
from pipeline.config.names import nearest


class ExpressionError(UserError):
    """An expression that cannot be read or worked out; the message shows it with a caret under the place."""


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
    of: "Expression"

    def __str__(self) -> str:
        return f"-{_within(self.of, 1)}"


@dataclass(frozen=True)
class Sum:
    """Of two adapters, or of two numbers; a difference is the sum with a Negated."""

    left: "Expression"
    right: "Expression"

    def __str__(self) -> str:
        sign, right = ("-", self.right.of) if isinstance(self.right, Negated) else ("+", self.right)
        return f"{self.left} {sign} {_within(right, 1)}"


@dataclass(frozen=True)
class Product:
    """Of a number and an adapter, in either order, or of two numbers."""

    left: "Expression"
    right: "Expression"

    def __str__(self) -> str:
        return f"{_within(self.left, 2)}*{_within(self.right, 3)}"


@dataclass(frozen=True)
class Call:
    """A function of adapters; `options` has every option it takes, in its signature's order."""

    function: str
    arguments: tuple["Expression", ...]
    options: tuple[tuple[str, "Expression | str"], ...] = ()

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options)
        return f"{self.function}({', '.join([*map(str, self.arguments), *options])})"

    def option(self, name: str) -> "Expression | str":
        return dict(self.options)[name]


Expression = Number | Variable | Base | Name | Negated | Sum | Product | Call
ZERO = Number(Decimal(0))
Atom = Name | Call
"""What a weighted sum is made of: adapters, and the functions that are no sums."""


@dataclass(frozen=True)
class Option:
    """A number in [low, high], an open end being one that it may not reach, or one of some words."""

    default: str = ""  # "": it must be given
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    words: tuple[str, ...] = ()
    positional: bool = False  # may follow the adapters without its name

    @property
    def expected(self) -> str:
        if self.words:
            return " or ".join(self.words)
        if self.whole:
            return f"a whole number of at least {self.low:g}"
        if math.isinf(self.low):
            return "a number"
        return f"a number in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    def holds(self, value: Fraction) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and (value.denominator == 1 or not self.whole)


@dataclass(frozen=True)
class Signature:
    least: int  # adapters
    most: int
    options: Mapping[str, Option] = field(default_factory=dict)


FUNCTIONS = {
    "avg": Signature(1, 10**6),
    "lerp": Signature(2, 2, {"t": Option(positional=True)}),
    "ties": Signature(1, 10**6, {"density": Option("0.2", low=0, high=1, open_low=True)}),
    "dare": Signature(
        1,
        1,
        {
            "p": Option(low=0, high=1, open_high=True, positional=True),
            "seed": Option("0", low=0, high=2**63 - 1, whole=True),
        },
    ),
    "paper": Signature(
        1, 1, {"neg": Option("B", words=("A", "B")), "normalise": Option("yes", words=("yes", "no"))}
    ),
}  # fmt: skip
"""avg: the mean. lerp: (1 - t) a + t b. ties: Yadav et al. (arXiv 2306.01708). dare: Yu et al. (arXiv 2311.03099).
paper: the factor-wise rules of Zhang et al. (arXiv 2306.14870), for reproduction."""

RESERVED = (*FUNCTIONS, "base")
NAME = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*"
TOKEN = re.compile(
    rf"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_.])|(?P<name>{NAME})
    |\$(?P<variable>{NAME})|(?P<word>"[^"]*"|'[^']*')|(?P<sign>[-+*(),=])|(?P<end>$))""",
    re.VERBOSE,
)


# ------------------------------------------------------------------------------------------------- reading


def parse(text: str, known: Collection[str] | None = None) -> Expression:
    """The tree of an expression for an adapter; `known` are the adapters' names, None: any name will do.

    Raises ExpressionError, with the place, for what is not an expression, an unknown name, a product of adapters, a
    sum of an adapter and a number, an infinite number, or a function's option outside its range.
    """
    reader = _Reader(" ".join(text.split("\n")), known)
    start = reader.start
    found = reader.sum()
    if reader.kind != "end":
        reader.refuse(f"expected an operator or the end, got '{reader.value}'")
    return reader.as_adapter(found, start)


class _Reader:
    """A text, and how far it has been read: the token at `start` is the next."""

    def __init__(self, text: str, known: Collection[str] | None) -> None:
        self.text, self.known, self.end = text, known, 0
        self.advance()

    def advance(self) -> str:
        """Moves on by one token; returns the one passed."""
        passed = getattr(self, "value", "")
        match = TOKEN.match(self.text, self.end)
        if match is None:
            self.start = self.end + len(self.text[self.end :]) - len(self.text[self.end :].lstrip())
            shown = self.text[self.start]
            hint = ": there is no division; multiply by a decimal number" if shown == "/" else ""
            self.refuse(f"'{shown}' has no meaning here{hint}")
        self.kind = str(match.lastgroup)
        self.start, self.end, self.value = match.start(self.kind), match.end(), match[self.kind]
        return passed

    @property
    def next(self) -> str:
        return f"'{self.value}'" if self.value else "the end"

    def refuse(self, what: str, at: int | None = None) -> NoReturn:
        at = self.start if at is None else at
        raise ExpressionError(f"expression: {what}\n  {self.text}\n  {' ' * at}^")

    def take(self, sign: str) -> bool:
        if self.kind == "sign" and self.value == sign:
            self.advance()
            return True
        return False

    def need(self, sign: str) -> None:
        if not self.take(sign):
            self.refuse(f"expected '{sign}', got {self.next}")

    def sum(self) -> Expression:
        start = self.start
        found = self.signed()
        while self.kind == "sign" and self.value in "+-":
            at, sign, right_start = self.start, self.advance(), self.start
            right = self.signed()
            if is_number(found) != is_number(right):
                if (found if is_number(found) else right) != ZERO:
                    self.refuse(f"'{sign}' stands between an adapter and a number; a number multiplies an adapter", at)
                found, right = self.as_adapter(found, start), self.as_adapter(right, right_start)
            found = Sum(found, Negated(right) if sign == "-" else right)
        return found

    def signed(self) -> Expression:
        return Negated(self.signed()) if self.take("-") else self.product()

    def product(self) -> Expression:
        found = self.factor()
        while self.kind == "sign" and self.value == "*":
            at = self.start
            self.advance()
            right = self.factor()
            if not is_number(found) and not is_number(right):
                self.refuse("'*' stands between two adapters; only a number multiplies an adapter", at)
            found = Product(found, right)
        return found

    def factor(self) -> Expression:
        return Negated(self.factor()) if self.take("-") else self.atom()

    def atom(self) -> Expression:
        at, kind = self.start, self.kind
        if kind == "number":
            return Number(self.decimal(self.advance(), at))
        if kind == "variable":
            return Variable(self.advance())
        if kind == "name":
            name = self.advance()
            if name == "base":
                return Base()
            if name in FUNCTIONS:
                return self.call(name, at)
            if name.lower() in ("nan", "inf", "infinity"):
                self.refuse(f"{name}: expected a finite number or an adapter's name", at)
            if self.known is not None and name not in self.known:
                mend = nearest(name, [*self.known, *FUNCTIONS])
                self.refuse(f"no adapter is called '{name}' (there are {', '.join(sorted(self.known))}){mend}", at)
            return Name(name)
        if self.take("("):
            found = self.sum()
            self.need(")")
            return found
        self.refuse(f"expected a number, an adapter or '(', got {self.next}")

    def decimal(self, text: str, at: int) -> Decimal:
        """The number; beyond what a float holds it is refused, so that it stays one when it meets a tensor."""
        value = Decimal(text)
        if value and not 1e-300 < abs(float(value)) < 1e300:
            self.refuse(f"{text}: expected a number between 1e-300 and 1e300, or 0", at)
        return value or Decimal(0)

    def call(self, function: str, at: int) -> Expression:
        """A function's arguments: adapters, then numbers that may stand without their name, then name=value."""
        signature = FUNCTIONS[function]
        self.need("(")
        adapters: list[Expression] = []
        given: dict[str, Expression | str] = {}
        while not self.take(")"):
            if adapters or given:
                self.need(",")
            start = self.start
            if self.kind == "name" and re.match(r"\s*=", self.text[self.end :]):
                name = self.advance()
                self.need("=")
                if name not in signature.options:
                    mend = nearest(name, list(signature.options))
                    self.refuse(f"{function} has no option '{name}'{mend}", start)
                if name in given:
                    self.refuse(f"{function}: {name} is given twice", start)
                start = self.start
            elif given or (len(adapters) >= signature.least and any(o.positional for o in signature.options.values())):
                left = [n for n, option in signature.options.items() if option.positional and n not in given]
                if not left:
                    self.refuse(f"{function} takes no more arguments here", start)
                name = left[0]
            else:
                adapters.append(self.as_adapter(self.sum(), start))
                continue
            given[name] = self.option(f"{function}: {name}", signature.options[name], start)
        if not signature.least <= len(adapters) <= signature.most:
            least = "" if signature.least == signature.most else "at least "
            self.refuse(f"{function} takes {least}{signature.least} adapters, got {len(adapters)}", at)
        for name, option in signature.options.items():
            if name not in given and not option.default:
                self.refuse(f"{function}: {name} is missing: expected {option.expected}", at)
        defaults: dict[str, Expression | str] = {
            name: option.default if option.words else Number(Decimal(option.default))
            for name, option in signature.options.items()
            if name not in given
        }
        values = defaults | given
        return Call(function, tuple(adapters), tuple((name, values[name]) for name in signature.options))

    def option(self, what: str, option: Option, at: int) -> Expression | str:
        if option.words:
            word = self.advance().strip("\"'") if self.kind in ("name", "word") else self.value
            if word not in option.words:
                self.refuse(f"{what}: expected {option.expected}, got '{word}'", at)
            return word
        found = self.sum()
        if not is_number(found) or (not variables(found) and not option.holds(value(found))):
            self.refuse(f"{what}: expected {option.expected}, got {found}", at)
        return found

    def as_adapter(self, found: Expression, at: int) -> Expression:
        if found == ZERO:
            return Base()
        if is_number(found):
            self.refuse(f"expected an adapter, got the number {found}", at)
        return found


# ------------------------------------------------------------------------------------------------- asking


def is_number(expression: Expression) -> bool:
    """Whether it stands for a number, and not for an adapter."""
    if isinstance(expression, Negated):
        return is_number(expression.of)
    if isinstance(expression, (Sum, Product)):
        return is_number(expression.left) and is_number(expression.right)
    return isinstance(expression, (Number, Variable))


def parts(expression: Expression) -> Iterator[Expression]:
    """The expression and all that is in it, from left to right."""
    yield expression
    if isinstance(expression, Negated):
        yield from parts(expression.of)
    elif isinstance(expression, (Sum, Product)):
        yield from parts(expression.left)
        yield from parts(expression.right)
    elif isinstance(expression, Call):
        for part in (*expression.arguments, *(v for _, v in expression.options if not isinstance(v, str))):
            yield from parts(part)


def names(expression: Expression) -> list[str]:
    """The adapters it names, each once, in order."""
    return list(dict.fromkeys(part.name for part in parts(expression) if isinstance(part, Name)))


def variables(expression: Expression) -> list[str]:
    """The numbers still to be filled in, each once, in order."""
    return list(dict.fromkeys(part.name for part in parts(expression) if isinstance(part, Variable)))


def substitute(expression: Expression, values: Mapping[str, float]) -> Expression:
    """The expression with numbers for its variables; a variable that is not in `values` stays.

    Raises ExpressionError for a name that is no variable of it, a number that is not finite, or one outside the range
    of the option that it is given to.
    """
    for name, number in values.items():
        if name not in variables(expression):
            raise ExpressionError(f"expression: it has no variable ${name}{nearest(name, variables(expression))}")
        if not math.isfinite(number):
            raise ExpressionError(f"expression: ${name}: expected a finite number, got {number}")
    return parse(str(_filled(expression, values)))


def value(expression: Expression) -> Fraction:
    """The number that an expression of numbers stands for, exactly; ExpressionError while a variable is in it."""
    if isinstance(expression, Number):
        return Fraction(expression.value)
    if isinstance(expression, Negated):
        return -value(expression.of)
    if isinstance(expression, Sum):
        return value(expression.left) + value(expression.right)
    if isinstance(expression, Product):
        return value(expression.left) * value(expression.right)
    raise ExpressionError(f"expression: {expression}: no number has been given to it")


def weighted(expression: Expression) -> dict[Atom, Fraction]:
    """The expression as a sum of weights times atoms, equal atoms collected, those of weight 0 left out.

    Raises ExpressionError while a weight holds a variable.
    """
    found: dict[Atom, Fraction] = {}
    for weight, atom in _terms(expression, Fraction(1)):
        found[atom] = found.get(atom, Fraction(0)) + weight
    return {atom: weight for atom, weight in found.items() if weight}


# ------------------------------------------------------------------------------------------------- private


def _terms(expression: Expression, weight: Fraction) -> Iterator[tuple[Fraction, Atom]]:
    if isinstance(expression, Negated):
        yield from _terms(expression.of, -weight)
    elif isinstance(expression, Sum):
        yield from _terms(expression.left, weight)
        yield from _terms(expression.right, weight)
    elif isinstance(expression, Product):
        number, adapter = expression.left, expression.right
        if not is_number(number):
            number, adapter = adapter, number
        yield from _terms(adapter, weight * value(number))
    elif isinstance(expression, Call) and expression.function == "avg":
        for argument in expression.arguments:
            yield from _terms(argument, weight / len(expression.arguments))
    elif isinstance(expression, Call) and expression.function == "lerp":
        t = expression.option("t")
        assert not isinstance(t, str)
        for argument, share in zip(expression.arguments, (1 - value(t), value(t)), strict=True):
            yield from _terms(argument, weight * share)
    elif isinstance(expression, (Name, Call)):
        yield weight, expression


def _filled(expression: Expression, values: Mapping[str, float]) -> Expression:
    if isinstance(expression, Variable) and expression.name in values:
        number = values[expression.name]
        size = Number(Decimal(repr(abs(float(number)))))
        return Negated(size) if number < 0 else size
    if isinstance(expression, Negated):
        return Negated(_filled(expression.of, values))
    if isinstance(expression, (Sum, Product)):
        return type(expression)(_filled(expression.left, values), _filled(expression.right, values))
    if isinstance(expression, Call):
        options = ((name, v if isinstance(v, str) else _filled(v, values)) for name, v in expression.options)
        return Call(expression.function, tuple(_filled(a, values) for a in expression.arguments), tuple(options))
    return expression


def _within(expression: Expression, least: int) -> str:
    """Its text, in parentheses if it binds less tightly than `least` (a sum 0, a sign 1, a product 2, an atom 3)."""
    tightness = {Sum: 0, Negated: 1, Product: 2}.get(type(expression), 3)
    return str(expression) if tightness >= least else f"({expression})"
