"""What a search is asked for: measures, constraints, and the ranges of the expression's variables."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.commands import Search
from pipeline.config.errors import UserError
from pipeline.config.names import nearest

SAMPLED_MEASURES = ("reward", "vader", "classifier", "repetition", "kl")
MEASURES = ("loss", "accuracy", "perplexity", *SAMPLED_MEASURES)
CONSTRAINT = re.compile(r"(\w+)\s*(<=|>=)\s*(?:([0-9.]+(?:e-?\d+)?)\s*(?:\*\s*(base))?|(base))", re.IGNORECASE)


class SearchError(UserError):
    """A search that cannot be made as asked; the message names the dial and what was expected."""


@dataclass(frozen=True)
class Constraint:
    """`measure <= bound`, or `>=`; the bound alone or times the base model's."""

    measure: str
    sign: str
    bound: float
    of_base: bool

    def __str__(self) -> str:
        return f"{self.measure} {self.sign} {self.bound:g}{'*base' if self.of_base else ''}"

    def limit(self, base_figures: Mapping[str, float]) -> float:
        """The number that the measure is held against."""
        return self.bound * base_figures[self.measure] if self.of_base else self.bound

    def excess(self, figures: Mapping[str, float], base_figures: Mapping[str, float]) -> float:
        """By how much it is broken, as a share of its limit; 0 where it is kept."""
        limit = self.limit(base_figures)
        over = (figures[self.measure] - limit) * (1 if self.sign == "<=" else -1)
        return max(0.0, over) / (abs(limit) or 1.0)


@dataclass(frozen=True)
class Trial:
    """A choice of the variables and what it gave on the validation rows."""

    values: dict[str, float]
    figures: dict[str, float]
    excess: float  # of all constraints together; 0: all kept


def read_ranges(text: str, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The range of each variable of `x=0:1.5,y=0:1`, in the order of `names`; SearchError if one is amiss."""
    if not names:
        raise SearchError("expression: it has no $variable to find a number for; `compose` writes it as it is")
    ranges: dict[str, tuple[float, float]] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        match = re.fullmatch(r"\$?([\w.]+)\s*=\s*([^:]+):([^:]+)", entry)
        if match is None:
            raise SearchError(f"range: expected variable=low:high,variable=low:high, got '{entry}'")
        name = match[1]
        if name not in names:
            raise SearchError(f"range: the expression has no ${name}{nearest(name, list(names))}")
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            raise SearchError(f"range: {name}: expected two numbers, got '{match[2]}:{match[3]}'") from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SearchError(f"range: {name}: expected low < high, both finite, got '{match[2]}:{match[3]}'")
        ranges[name] = (low, high)
    if missing := [name for name in names if name not in ranges]:
        raise SearchError(f"range: ${missing[0]} has none: say {missing[0]}=low:high")
    return {name: ranges[name] for name in names}


def read_measures(text: str, dial: str = "also") -> list[str]:
    """The measures that a dial names."""
    measures = [name.strip() for name in text.split(",") if name.strip()]
    for name in measures:
        if name not in MEASURES:
            expected = f"expected one of {', '.join(MEASURES)}"
            raise SearchError(f"{dial}: '{name}' is not measured{nearest(name, MEASURES)}; {expected}")
    return measures


def read_constraints(text: str) -> list[Constraint]:
    """The constraints of `perplexity <= 1.05*base, kl <= 6`."""
    constraints = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        match = CONSTRAINT.fullmatch(entry)
        if match is None:
            raise SearchError(f"constraints: expected `measure <= number` or `measure <= number*base`, got '{entry}'")
        read_measures(match[1], "constraints")
        bound = float(match[3]) if match[3] else 1.0
        constraints.append(Constraint(match[1], match[2], bound, bool(match[4] or match[5])))
    return constraints


def requested_measures(config: Search, constraints: Sequence[Constraint]) -> set[str]:
    """The objective, what constraints and `also` name, and what a file or model is there for; kl with any samples."""
    measures = {config.objective, *(constraint.measure for constraint in constraints), *read_measures(config.also)}
    sources = {
        "perplexity": config.retain_file or config.retain_test_file,
        "reward": config.reward,
        "classifier": config.judge_file,
    }
    measures |= {measure for measure, source in sources.items() if source}
    return measures | ({"kl"} if measures & set(SAMPLED_MEASURES) else set())


def longest_row(config: Search, measures: set[str]) -> int:
    """Tokens that the base's context must hold."""
    sampled = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    return max(
        config.max_length if measures - set(SAMPLED_MEASURES) else 0,
        sampled if measures & set(SAMPLED_MEASURES) else 0,
    )
