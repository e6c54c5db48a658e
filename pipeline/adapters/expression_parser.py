"""From the text of an expression to its tree.

sum      = signed (("+" | "-") signed)*          signed = "-" signed | product
product  = factor ("*" factor)*                  factor = "-" factor | atom
atom     = number | $variable | name | "base" | "0" | "(" sum ")" | function "(" arguments ")"
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import NoReturn

from pipeline.adapters.expressions import (
    Base,
    Call,
    Expression,
    ExpressionError,
    Name,
    Negated,
    Number,
    Product,
    Sum,
    Variable,
    fill_variables,
    is_number,
    number_value,
    variables,
)
from pipeline.config.names import nearest


@dataclass(frozen=True)
class Option:
    """A function's option: a number between low and high (an open end is excluded), or one of `choices`."""

    default: str = ""  # "": it must be given
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()
    positional: bool = False  # may follow the adapters without its name

    @property
    def expected(self) -> str:
        """What an error says that it must be."""
        if self.choices:
            return " or ".join(self.choices)
        if self.whole:
            return f"a whole number of at least {self.low:g}"
        if math.isinf(self.low):
            return "a number"
        return f"a number in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    def accepts(self, number: Fraction) -> bool:
        """Whether the number is in its range."""
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and (number.denominator == 1 or not self.whole)


@dataclass(frozen=True)
class Signature:
    """How many adapters a function takes, and its options."""

    min_adapters: int
    max_adapters: int
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
        1, 1, {"neg": Option("B", choices=("A", "B")), "normalise": Option("yes", choices=("yes", "no"))}
    ),
}  # fmt: skip
"""avg: the mean. lerp: (1 - t) a + t b. ties: Yadav et al. (arXiv 2306.01708). dare: Yu et al. (arXiv 2311.03099).
paper: the factor-wise rules of Zhang et al. (arXiv 2306.14870), for reproduction."""

ZERO = Number(Decimal(0))
NAME = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*"
TOKEN = re.compile(
    rf"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_.])|(?P<name>{NAME})
    |\$(?P<variable>{NAME})|(?P<word>"[^"]*"|'[^']*')|(?P<sign>[-+*(),=])|(?P<end>$))""",
    re.VERBOSE,
)


def parse(text: str, known_names: Collection[str] | None = None) -> Expression:
    """The tree of an expression for an adapter; only adapters in `known_names` may be named (None: any).

    Raises ExpressionError, with the place, for what is not an expression, an unknown name, a product of adapters, a
    sum of an adapter and a number, an infinite number, or a function's option outside its range.
    """
    parser = Parser(" ".join(text.split("\n")), known_names)
    start = parser.start
    expression = parser.parse_sum()
    if parser.kind != "end":
        parser.fail(f"expected an operator or the end, got '{parser.token}'")
    return parser.require_adapter(expression, start)


def substitute(expression: Expression, values: Mapping[str, float]) -> Expression:
    """The expression with numbers for its variables; a variable that is not in `values` stays.

    Raises ExpressionError for a name that is not one of its variables, a number that is not finite, or one outside the
    range of the option that it is given to.
    """
    for name, number in values.items():
        if name not in variables(expression):
            raise ExpressionError(f"expression: it has no variable ${name}{nearest(name, variables(expression))}")
        if not math.isfinite(number):
            raise ExpressionError(f"expression: ${name}: expected a finite number, got {number}")
    return parse(str(fill_variables(expression, values)))


class Parser:
    """A text and the token in it that comes next: its kind, its text, where it starts and where it ends."""

    def __init__(self, text: str, known_names: Collection[str] | None) -> None:
        self.text, self.known_names = text, known_names
        self.token, self.end = "", 0
        self.advance()

    def advance(self) -> str:
        """Goes on to the next token; returns the one before."""
        passed = self.token
        match = TOKEN.match(self.text, self.end)
        if match is None:
            self.start = len(self.text) - len(self.text[self.end :].lstrip())
            character = self.text[self.start]
            hint = ": there is no division; multiply by a decimal number" if character == "/" else ""
            self.fail(f"'{character}' has no meaning here{hint}")
        self.kind = str(match.lastgroup)
        self.start, self.end, self.token = match.start(self.kind), match.end(), match[self.kind]
        return passed

    @property
    def quoted_token(self) -> str:
        """The next token as an error names it."""
        return f"'{self.token}'" if self.token else "the end"

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """Raises ExpressionError with a caret under a place, the next token's unless one is given."""
        at = self.start if at is None else at
        raise ExpressionError(f"expression: {message}\n  {self.text}\n  {' ' * at}^")

    def accept(self, sign: str) -> bool:
        """Passes the sign if it comes next; whether it did."""
        if self.kind == "sign" and self.token == sign:
            self.advance()
            return True
        return False

    def expect(self, sign: str) -> None:
        """Passes the sign, which must come next."""
        if not self.accept(sign):
            self.fail(f"expected '{sign}', got {self.quoted_token}")

    def parse_sum(self) -> Expression:
        start = self.start
        left = self.parse_signed()
        while self.kind == "sign" and self.token in "+-":
            at, sign, right_start = self.start, self.advance(), self.start
            right = self.parse_signed()
            if is_number(left) != is_number(right):
                if (left if is_number(left) else right) != ZERO:
                    self.fail(f"'{sign}' stands between an adapter and a number; a number multiplies an adapter", at)
                left, right = self.require_adapter(left, start), self.require_adapter(right, right_start)
            left = Sum(left, Negated(right) if sign == "-" else right)
        return left

    def parse_signed(self) -> Expression:
        return Negated(self.parse_signed()) if self.accept("-") else self.parse_product()

    def parse_product(self) -> Expression:
        left = self.parse_factor()
        while self.kind == "sign" and self.token == "*":
            at = self.start
            self.advance()
            right = self.parse_factor()
            if not is_number(left) and not is_number(right):
                self.fail("'*' stands between two adapters; only a number multiplies an adapter", at)
            left = Product(left, right)
        return left

    def parse_factor(self) -> Expression:
        return Negated(self.parse_factor()) if self.accept("-") else self.parse_atom()

    def parse_atom(self) -> Expression:
        at = self.start
        if self.kind == "number":
            return Number(self.to_decimal(self.advance(), at))
        if self.kind == "variable":
            return Variable(self.advance())
        if self.kind == "name":
            return self.parse_name()
        if self.accept("("):
            inner = self.parse_sum()
            self.expect(")")
            return inner
        self.fail(f"expected a number, an adapter or '(', got {self.quoted_token}")

    def parse_name(self) -> Expression:
        """An adapter's name, `base`, or a function with its arguments."""
        at, name = self.start, self.advance()
        if name == "base":
            return Base()
        if name in FUNCTIONS:
            return self.parse_call(name, at)
        if name.lower() in ("nan", "inf", "infinity"):
            self.fail(f"{name}: expected a finite number or an adapter's name", at)
        if self.known_names is not None and name not in self.known_names:
            hint = nearest(name, [*self.known_names, *FUNCTIONS])
            self.fail(f"no adapter is called '{name}' (there are {', '.join(sorted(self.known_names))}){hint}", at)
        return Name(name)

    def to_decimal(self, text: str, at: int) -> Decimal:
        """The number; fails if a float cannot hold it."""
        number = Decimal(text)
        if number and not 1e-300 < abs(float(number)) < 1e300:
            self.fail(f"{text}: expected a number between 1e-300 and 1e300, or 0", at)
        return number or Decimal(0)

    def parse_call(self, function: str, at: int) -> Expression:
        """A function's arguments: adapters, then numbers that may stand without their name, then name=setting."""
        signature = FUNCTIONS[function]
        self.expect("(")
        adapters: list[Expression] = []
        settings: dict[str, Expression | str] = {}
        takes_positional = any(option.positional for option in signature.options.values())
        while not self.accept(")"):
            if adapters or settings:
                self.expect(",")
            start = self.start
            if self.kind == "name" and re.match(r"\s*=", self.text[self.end :]):
                name = self.parse_option_name(function, settings)
                start = self.start
            elif settings or (len(adapters) >= signature.min_adapters and takes_positional):
                free = [name for name, o in signature.options.items() if o.positional and name not in settings]
                if not free:
                    self.fail(f"{function} takes no more arguments here", start)
                name = free[0]
            else:
                adapters.append(self.require_adapter(self.parse_sum(), start))
                continue
            settings[name] = self.parse_setting(f"{function}: {name}", signature.options[name], start)
        self.check_adapter_count(function, len(adapters), at)
        return Call(function, tuple(adapters), self.with_defaults(function, settings, at))

    def parse_option_name(self, function: str, settings: Mapping[str, Expression | str]) -> str:
        """The name before `=`, which is passed too."""
        options, start = FUNCTIONS[function].options, self.start
        name = self.advance()
        self.expect("=")
        if name not in options:
            self.fail(f"{function} has no option '{name}'{nearest(name, list(options))}", start)
        if name in settings:
            self.fail(f"{function}: {name} is given twice", start)
        return name

    def parse_setting(self, what: str, option: Option, at: int) -> Expression | str:
        """A word, or an expression of numbers, that the option accepts."""
        if option.choices:
            word = self.advance().strip("\"'") if self.kind in ("name", "word") else self.token
            if word not in option.choices:
                self.fail(f"{what}: expected {option.expected}, got '{word}'", at)
            return word
        number = self.parse_sum()
        if not is_number(number) or (not variables(number) and not option.accepts(number_value(number))):
            self.fail(f"{what}: expected {option.expected}, got {number}", at)
        return number

    def check_adapter_count(self, function: str, count: int, at: int) -> None:
        fewest, most = FUNCTIONS[function].min_adapters, FUNCTIONS[function].max_adapters
        if not fewest <= count <= most:
            at_least = "" if fewest == most else "at least "
            self.fail(f"{function} takes {at_least}{fewest} adapters, got {count}", at)

    def with_defaults(
        self, function: str, settings: Mapping[str, Expression | str], at: int
    ) -> tuple[tuple[str, Expression | str], ...]:
        """Every option of the function with its setting or default, in the signature's order."""
        complete: list[tuple[str, Expression | str]] = []
        for name, option in FUNCTIONS[function].options.items():
            if name in settings:
                complete.append((name, settings[name]))
            elif option.default:
                complete.append((name, option.default if option.choices else Number(Decimal(option.default))))
            else:
                self.fail(f"{function}: {name} is missing: expected {option.expected}", at)
        return tuple(complete)

    def require_adapter(self, expression: Expression, at: int) -> Expression:
        """The expression, 0 as the base; fails if it is another number."""
        if expression == ZERO:
            return Base()
        if is_number(expression):
            self.fail(f"expected an adapter, got the number {expression}", at)
        return expression
