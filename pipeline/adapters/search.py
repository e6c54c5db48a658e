"""The numbers in an expression, found without training: chosen on validation rows, reported once on test rows.

    adapters loaded once -> grid -> refined where it was best -> the best trial that keeps the constraints -> test rows

A trial sets the weights of loaded adapters and measures; nothing is merged and no tensor is made. What a trial samples,
it samples from the same noise as every other. The number on the validation rows is the best of many and so flatters
itself: what is reported, with its interval, comes from rows that no trial has seen, beside every variable at 0, at 1,
the plain average, each adapter alone and the base.
"""

import importlib.metadata
import itertools
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import scipy.optimize
import scipy.stats
from transformers import PreTrainedTokenizerBase

from pipeline.adapters.expressions import Expression, Name, names, parse, substitute, variables
from pipeline.adapters.files import places, read_adapters, refuse_existing, written_whole
from pipeline.adapters.metrics import (
    MEASURED,
    SAMPLED,
    Array,
    EvalContext,
    Rows,
    SearchError,
    estimate,
    figures,
    measured,
    new_bench,
    read_split,
    refuse_unmixable,
    told,
    weights_of,
)
from pipeline.config.commands import Search
from pipeline.config.names import nearest
from pipeline.config.parse import flat
from pipeline.data.sources import hash_source
from pipeline.evaluation.statistics import paired_difference_ci
from pipeline.models.loading import check_model
from pipeline.runtime.console import print_main, silence_libraries

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Point = tuple[float, ...]

DECIMALS = 4
"""Of a variable: what is measured is what the composed adapter is made from."""
CONSTRAINT = re.compile(r"(\w+)\s*(<=|>=)\s*(?:([0-9.]+(?:e-?\d+)?)\s*(?:\*\s*(base))?|(base))", re.IGNORECASE)


@dataclass(frozen=True)
class Constraint:
    """`measure <= bound`, or `>=`; the bound alone or times the base model's."""

    measure: str
    sign: str
    bound: float
    of_base: bool

    def __str__(self) -> str:
        return f"{self.measure} {self.sign} {self.bound:g}{'*base' if self.of_base else ''}"

    def limit(self, base: Mapping[str, float]) -> float:
        return self.bound * base[self.measure] if self.of_base else self.bound

    def excess(self, figures: Mapping[str, float], base: Mapping[str, float]) -> float:
        """By how much it is broken, as a share of its limit; 0 where it is kept."""
        limit = self.limit(base)
        over = (figures[self.measure] - limit) * (1 if self.sign == "<=" else -1)
        return max(0.0, over) / (abs(limit) or 1.0)


@dataclass(frozen=True)
class Trial:
    """A choice of the variables and what it gave on the validation rows."""

    values: dict[str, float]
    figures: dict[str, float]
    excess: float  # of all constraints together; 0: all kept


# ------------------------------------------------------------------------------------------------- command


def search(config: Search) -> Path:
    """Writes trials.jsonl, result.json and curve.png, prints the test figures, and returns the folder.

    Raises SearchError for a dial that does not fit, rows in both splits, or constraints that no trial keeps.
    """
    silence_libraries()
    out = refuse_existing(config.out)
    folders = places(config.adapters)
    expression = parse(config.expression, folders)
    ranges = read_ranges(config.range, variables(expression))
    constraints = read_constraints(config.constraints)
    asked = asked_measures(config, constraints)
    used = dict.fromkeys([*names(expression), *names(parse(config.reference, folders))])
    adapters, ground = read_adapters({name: folders[name] for name in used or folders}, config.base)
    refuse_unmixable(adapters, ground)
    check_model(ground.model, ground.tokenizer, longest_row(config, asked), ground.path)
    validation, test = read_splits(config, asked, ground.tokenizer)
    with tempfile.TemporaryDirectory() as made:
        bench = new_bench(config, [expression], adapters, ground, asked, Path(made))
        base = figures(measured({}, validation, bench))
        trials: list[Trial] = []

        def trial(point: Point) -> tuple[float, float]:
            values = dict(zip(ranges, point, strict=True))
            found = figures(measured(weights_of(substitute(expression, values)), validation, bench))
            excess = sum(constraint.excess(found, base) for constraint in constraints)
            trials.append(Trial(values, found, excess))
            print_main(f"search: {told(values)}: {told(found)}{'' if not excess else '  (breaks a constraint)'}")
            return found[config.objective] * (1 if config.objective == "loss" else -1), excess

        grid = config.grid or (config.budget + 1) // 2
        best = minimise(trial, list(ranges.values()), grid, config.budget, config.seed)
        chosen = next(t for t in trials if tuple(t.values.values()) == best)
        if chosen.excess:
            raise SearchError(
                f"constraints: none of {len(trials)} trials keeps {config.constraints}; the nearest, "
                f"{told(chosen.values)}, has {told(chosen.figures)} (base: {told(base)}): widen range or constraints"
            )
        found = substitute(expression, chosen.values)
        report = tested(found, expression, constraints, test, bench)
    result: dict[str, Any] = {
        "expression": str(expression),
        "ranges": ranges,
        "objective": config.objective,
        "constraints": [str(constraint) for constraint in constraints],
        "chosen": chosen.values,
        "found": str(found),
        "compose": compose_command(found, config),
        "trials": len(trials),
        "validation": {"chosen": chosen.figures, "base": base},
        "test": report,
        "adapters": {name: dict(adapter.sha256) for name, adapter in adapters.items()},
        "base": ground.fingerprint,
        "files": {dial: hash_source(at) for dial, at in flat(config).items() if dial.endswith("_file") and at},
        "dials": flat(config),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "scipy")},
    }
    with written_whole(out) as folder:
        lines = (json.dumps(asdict(trial)) + "\n" for trial in trials)
        (folder / "trials.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(folder / "curve.png", trials, chosen, config.objective, constraints, base)
    print_main(f"search: {len(trials)} trials -> {out}; on test rows:")
    for name, row in report.items():
        print_main(f"  {name}: {row['expression']}: {told({key: e['value'] for key, e in row['figures'].items()})}")
    print_main(result["compose"])
    return out


def tested(
    found: Expression,
    expression: Expression,
    constraints: Sequence[Constraint],
    test: Rows,
    bench: EvalContext,
) -> dict[str, dict[str, Any]]:
    """What was found and what it must beat, on the test rows: every measure with its interval, and whether it keeps
    the constraints there; `chosen_minus` is the paired difference of the objective."""
    every = {"chosen": found}
    every |= {
        f"all variables {n}": substitute(expression, dict.fromkeys(variables(expression), float(n))) for n in (0, 1)
    }
    every |= {"average": parse(f"avg({', '.join(names(expression))})")}
    every |= {f"{name} alone": Name(name) for name in names(expression)} | {"base": parse("base")}
    rows: dict[str, dict[str, Array]] = {}
    for name, candidate in every.items():
        weights = weights_of(candidate)
        same = [other for other in rows if weights_of(every[other]) == weights]
        rows[name] = rows[same[0]] if same else measured(weights, test, bench)
    objective, base = bench.config.objective, figures(rows["base"])
    return {
        name: {
            "expression": str(every[name]),
            "figures": {measure: asdict(estimate(measure, values)) for measure, values in found_rows.items()},
            "kept": not any(constraint.excess(figures(found_rows), base) for constraint in constraints),
            "chosen_minus": asdict(paired_difference_ci(rows["chosen"][objective], found_rows[objective])),
        }
        for name, found_rows in rows.items()
    }


def compose_command(found: Expression, config: Search) -> str:
    """The command that writes what was found as an adapter."""
    given = {"adapters": config.adapters, "base": config.base, "out": f"{config.out.rstrip('/')}_composed"}
    dials = (f"--{dial} {shlex.quote(text)}" for dial, text in given.items() if text)
    return f"python stages/merge.py compose {shlex.quote(str(found))} {' '.join(dials)}"


# ------------------------------------------------------------------------------------------------- optimising


def minimise(
    trial: Callable[[Point], tuple[float, float]],
    ranges: Sequence[tuple[float, float]],
    grid: int,
    budget: int,
    seed: int,
) -> Point:
    """The tried point of least cost among those of no excess; of least excess where there are none.

    `trial` gives (cost, excess). First `grid` points over the box: of one variable equally far apart; of several a
    grid, or a Latin hypercube where a grid would have fewer than three a side. Then, up to `budget`: of one variable
    Brent's bounded search between the neighbours of the best, of several Nelder-Mead from it.
    """
    found: dict[Point, tuple[float, float]] = {}

    def tried(point: Sequence[float]) -> tuple[float, float]:
        inside = (min(max(float(x), low), high) for x, (low, high) in zip(point, ranges, strict=True))
        rounded = tuple(round(x, DECIMALS) + 0.0 for x in inside)
        if rounded not in found:
            found[rounded] = trial(rounded)
        return found[rounded]

    for point in start_points(ranges, grid, seed):
        tried(point)
    best = min(found, key=lambda point: found[point][::-1])
    costs = [cost for cost, _ in found.values()]
    worst, spread = max(costs), (max(costs) - min(costs)) or 1.0

    def penalised(point: Sequence[float]) -> float:
        cost, excess = tried(point)
        return worst + spread * (1 + excess) if excess else cost

    left = budget - len(found)
    if left > 0 and len(ranges) == 1:
        line = sorted(point[0] for point in found)
        at = line.index(best[0])
        between = (line[max(0, at - 1)], line[min(len(line) - 1, at + 1)])
        if between[0] < between[1]:
            scipy.optimize.minimize_scalar(
                lambda x: penalised((x,)), bounds=between, method="bounded", options={"maxiter": left, "xatol": 1e-4}
            )
    elif left > len(ranges):
        sides = [high - low for low, high in ranges]
        corners = [list(best)] + [
            [x + (side / 6 if x + side / 6 <= high else -side / 6) * (i == j) for j, x in enumerate(best)]
            for i, (side, (_, high)) in enumerate(zip(sides, ranges, strict=True))
        ]
        scipy.optimize.minimize(
            penalised,
            best,
            method="Nelder-Mead",
            bounds=ranges,
            options={"initial_simplex": corners, "maxfev": left, "xatol": 1e-4, "fatol": 1e-9},
        )
    return min(found, key=lambda point: found[point][::-1])


def start_points(ranges: Sequence[tuple[float, float]], count: int, seed: int) -> list[Point]:
    """At most `count` points over the box, its corners among them where there is a grid."""
    side = int(count ** (1 / len(ranges)) + 1e-9)
    if len(ranges) > 1 and side < 3:
        drawn = scipy.stats.qmc.LatinHypercube(len(ranges), rng=seed).random(count)
        return [tuple(low + x * (high - low) for x, (low, high) in zip(row, ranges, strict=True)) for row in drawn]
    return list(itertools.product(*(np.linspace(low, high, side).tolist() for low, high in ranges)))


# ------------------------------------------------------------------------------------------------- reading


def read_ranges(text: str, free: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The range of each variable of `x=0:1.5,y=0:1`, in the expression's order; SearchError if one is amiss."""
    if not free:
        raise SearchError("expression: it has no $variable to find a number for; `compose` writes it as it is")
    found: dict[str, tuple[float, float]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"\$?([\w.]+)\s*=\s*([^:]+):([^:]+)", part)
        if match is None:
            raise SearchError(f"range: expected variable=low:high,variable=low:high, got '{part}'")
        name = match[1]
        if name not in free:
            raise SearchError(f"range: the expression has no ${name}{nearest(name, list(free))}")
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            raise SearchError(f"range: {name}: expected two numbers, got '{match[2]}:{match[3]}'") from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SearchError(f"range: {name}: expected low < high, both finite, got '{match[2]}:{match[3]}'")
        found[name] = (low, high)
    if missing := [name for name in free if name not in found]:
        raise SearchError(f"range: ${missing[0]} has none: say {missing[0]}=low:high")
    return {name: found[name] for name in free}


def read_measures(text: str, dial: str = "also") -> list[str]:
    """The measures that a dial names."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in MEASURED:
            expected = f"expected one of {', '.join(MEASURED)}"
            raise SearchError(f"{dial}: '{name}' is not measured{nearest(name, MEASURED)}; {expected}")
    return found


def asked_measures(config: Search, constraints: Sequence[Constraint]) -> set[str]:
    """The objective, what the constraints and `also` name, and what a file or model was given for; kl, what samples
    were paid with, wherever there are samples."""
    asked = {config.objective, *(constraint.measure for constraint in constraints), *read_measures(config.also)}
    given = {
        "perplexity": config.retain_file or config.retain_test_file,
        "reward": config.reward,
        "classifier": config.judge_file,
    }
    asked |= {measure for measure, place in given.items() if place}
    return asked | ({"kl"} if asked & set(SAMPLED) else set())


def longest_row(config: Search, asked: set[str]) -> int:
    """Tokens that the base's context must hold."""
    written = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    return max(config.max_length if asked - set(SAMPLED) else 0, written if asked & set(SAMPLED) else 0)


def read_constraints(text: str) -> list[Constraint]:
    """The constraints of `perplexity <= 1.05*base, kl <= 6`."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = CONSTRAINT.fullmatch(part)
        if match is None:
            raise SearchError(f"constraints: expected `measure <= number` or `measure <= number*base`, got '{part}'")
        read_measures(match[1], "constraints")
        bound = float(match[3]) if match[3] else 1.0
        found.append(Constraint(match[1], match[2], bound, bool(match[4] or match[5])))
    return found


def read_splits(config: Search, asked: set[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows]:
    """Validation and test rows; SearchError where they share a row."""
    splits = []
    for name, file, retained in (
        ("validation_file", config.validation_file, config.retain_file),
        ("test_file", config.test_file, config.retain_test_file),
    ):
        if not file:
            raise SearchError(f"{name}: say which rows; the two splits must share none")
        if "perplexity" in asked and not retained:
            which = "retain_file" if name == "validation_file" else "retain_test_file"
            raise SearchError(f"{which}: perplexity is asked for: say of which text")
        splits.append(read_split(file, retained if "perplexity" in asked else "", config, asked, tokenizer))
    validation, test = splits
    for one, other, rows, others in (
        ("validation_file", "test_file", validation.keys, test.keys),
        ("retain_file", "retain_test_file", validation.retained_keys, test.retained_keys),
    ):
        if shared := rows & others:
            raise SearchError(
                f"{other}: {len(shared)} of its rows are in {one} too, first {min(shared)[:80]}: what is chosen on a "
                "row cannot be reported on it; give rows that the search does not see"
            )
    return validation, test


# ------------------------------------------------------------------------------------------------- showing


def draw(
    file: Path,
    trials: Sequence[Trial],
    chosen: Trial,
    objective: str,
    constraints: Sequence[Constraint],
    base: Mapping[str, float],
) -> None:
    """The objective against each variable and against each other measure, a panel each; hollow: breaks a constraint."""
    others = [name for name in chosen.figures if name != objective]
    across = [(f"${name}", lambda trial, name=name: trial.values[name]) for name in chosen.values]
    across += [(name, lambda trial, name=name: trial.figures[name]) for name in others]
    figure, axes = plt.subplots(
        1, len(across), figsize=(3.6 * len(across), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (title, of) in zip(axes[0], across, strict=True):
        rows = sorted((of(trial), trial.figures[objective], trial.excess) for trial in trials)
        if len(chosen.values) == 1 and title.startswith("$"):
            axis.plot([x for x, _, _ in rows], [y for _, y, _ in rows], color="0.75", zorder=1)
        colours = ["none" if excess else "C0" for _, _, excess in rows]
        axis.scatter([x for x, _, _ in rows], [y for _, y, _ in rows], c=colours, edgecolors="C0", s=22, zorder=2)
        axis.scatter([of(chosen)], [chosen.figures[objective]], marker="*", color="C3", s=120, zorder=3, label="chosen")
        for constraint in constraints:
            if constraint.measure == title:
                axis.axvline(constraint.limit(base), color="0.4", linestyle=":", label=str(constraint))
        axis.set_xlabel(title.replace("$", r"\$"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel(f"{objective}, validation rows", fontsize=9)
    figure.savefig(file, dpi=90)
    plt.close(figure)
