"""Command search: the numbers in an expression, found without training, on validation rows, reported on test rows.

    adapters loaded once -> grid -> refined where it was best -> the best trial that keeps the constraints -> test rows

A trial sets the weights of loaded adapters and measures; nothing is merged and no tensor is made. What a trial samples,
it samples from the same noise as every other. The best of many trials flatters itself on the validation rows: what is
reported, with its interval, comes from rows that no trial has seen, beside every variable at 0, at 1, the plain
average, each adapter alone and the base.
"""

import importlib.metadata
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.adapters.eval_rows import EvalRows, read_splits
from pipeline.adapters.expression_parser import parse, substitute
from pipeline.adapters.expressions import Expression, Name, adapter_names, variables
from pipeline.adapters.metrics import (
    EvalContext,
    check_mixable,
    estimate,
    format_figures,
    make_eval_context,
    mean_figures,
    measure,
)
from pipeline.adapters.mixture import mixture_weights
from pipeline.adapters.optimise import Point, Range, minimise
from pipeline.adapters.reading import parse_adapter_folders, read_adapters
from pipeline.adapters.search_dials import (
    Constraint,
    SearchError,
    Trial,
    longest_row,
    read_constraints,
    read_ranges,
    requested_measures,
)
from pipeline.adapters.search_plot import plot_trials
from pipeline.adapters.writing import atomic_folder, require_new_folder
from pipeline.config.commands import Search
from pipeline.config.parse import flat
from pipeline.data.sources import hash_source
from pipeline.evaluation.statistics import Array, paired_difference_ci
from pipeline.models.loading import check_model
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.logs import finite_or_null


def search(config: Search) -> Path:
    """Writes trials.jsonl, result.json and curve.png, prints the test figures, and returns the folder.

    Raises SearchError for a dial that does not fit, rows in both splits, or constraints that no trial keeps.
    """
    silence_libraries()
    out = require_new_folder(config.out)
    folders = parse_adapter_folders(config.adapters)
    expression = parse(config.expression, folders)
    ranges = read_ranges(config.range, variables(expression))
    constraints = read_constraints(config.constraints)
    measures = requested_measures(config, constraints)
    used = dict.fromkeys([*adapter_names(expression), *adapter_names(parse(config.reference, folders))])
    adapters, base = read_adapters({name: folders[name] for name in used or folders}, config.base)
    check_mixable(adapters, base)
    check_model(base.model, base.tokenizer, longest_row(config, measures), base.path)
    validation, test = read_splits(config, measures, base.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        context = make_eval_context(config, [expression], adapters, base, measures, Path(folder))
        base_figures = mean_figures(measure({}, validation, context))
        trials, chosen = run_trials(expression, ranges, constraints, validation, base_figures, context)
        if chosen.excess:
            raise SearchError(
                f"constraints: none of {len(trials)} trials keeps {config.constraints}; the nearest, "
                f"{format_figures(chosen.values)}, has {format_figures(chosen.figures)} (base: "
                f"{format_figures(base_figures)}): widen range or constraints"
            )
        solution = substitute(expression, chosen.values)
        report = measure_on_test(solution, expression, constraints, test, context)
    result: dict[str, Any] = {
        "expression": str(expression),
        "ranges": ranges,
        "objective": config.objective,
        "constraints": [str(constraint) for constraint in constraints],
        "chosen": chosen.values,
        "found": str(solution),
        "compose": compose_command(solution, config),
        "trials": len(trials),
        "validation": {"chosen": chosen.figures, "base": base_figures},
        "test": report,
        "adapters": {name: dict(adapter.sha256) for name, adapter in adapters.items()},
        "base": base.fingerprint,
        "files": {dial: hash_source(file) for dial, file in flat(config).items() if dial.endswith("_file") and file},
        "dials": flat(config),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "scipy")},
    }
    with atomic_folder(out) as temporary:
        lines = (json.dumps(finite_or_null(asdict(trial)), allow_nan=False) + "\n" for trial in trials)
        (temporary / "trials.jsonl").write_text("".join(lines), encoding="utf-8")
        (temporary / "result.json").write_text(
            json.dumps(finite_or_null(result), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        plot_trials(temporary / "curve.png", trials, chosen, config.objective, constraints, base_figures)
    print_main(f"search: {len(trials)} trials -> {out}; on test rows:")
    for name, row in report.items():
        figures = {measure_name: interval["value"] for measure_name, interval in row["figures"].items()}
        print_main(f"  {name}: {row['expression']}: {format_figures(figures)}")
    print_main(result["compose"])
    return out


def run_trials(
    expression: Expression,
    ranges: Mapping[str, Range],
    constraints: Sequence[Constraint],
    rows: EvalRows,
    base_figures: Mapping[str, float],
    context: EvalContext,
) -> tuple[list[Trial], Trial]:
    """All trials on the validation rows, and the best that keeps the constraints; where none does, the nearest."""
    config = context.config
    trials: list[Trial] = []

    def run_trial(point: Point) -> tuple[float, float]:
        values = dict(zip(ranges, point, strict=True))
        figures = mean_figures(measure(mixture_weights(substitute(expression, values)), rows, context))
        excess = sum(constraint.excess(figures, base_figures) for constraint in constraints)
        trials.append(Trial(values, figures, excess))
        broken = "  (breaks a constraint)" if excess else ""
        print_main(f"search: {format_figures(values)}: {format_figures(figures)}{broken}")
        return figures[config.objective] * (1 if config.objective == "loss" else -1), excess

    grid = config.grid or (config.budget + 1) // 2
    best = minimise(run_trial, list(ranges.values()), grid, config.budget, config.seed)
    return trials, next(trial for trial in trials if tuple(trial.values.values()) == best)


def measure_on_test(
    solution: Expression,
    expression: Expression,
    constraints: Sequence[Constraint],
    test: EvalRows,
    context: EvalContext,
) -> dict[str, dict[str, Any]]:
    """The solution and what it must beat, on the test rows: every measure with its interval, and whether it keeps the
    constraints there; `chosen_minus` is the paired difference of the objective."""
    names = adapter_names(expression)
    candidates = {"chosen": solution}
    candidates |= {
        f"all variables {n}": substitute(expression, dict.fromkeys(variables(expression), float(n))) for n in (0, 1)
    }
    candidates |= {"average": parse(f"avg({', '.join(names)})")}
    candidates |= {f"{name} alone": Name(name) for name in names} | {"base": parse("base")}
    numbers: dict[str, dict[str, Array]] = {}
    for name, candidate in candidates.items():
        weights = mixture_weights(candidate)
        same = [other for other in numbers if mixture_weights(candidates[other]) == weights]
        numbers[name] = numbers[same[0]] if same else measure(weights, test, context)
    objective, base_figures = context.config.objective, mean_figures(numbers["base"])
    return {
        name: {
            "expression": str(candidates[name]),
            "figures": {measure_name: asdict(estimate(measure_name, values)) for measure_name, values in rows.items()},
            "kept": not any(constraint.excess(mean_figures(rows), base_figures) for constraint in constraints),
            "chosen_minus": asdict(paired_difference_ci(numbers["chosen"][objective], rows[objective])),
        }
        for name, rows in numbers.items()
    }


def compose_command(solution: Expression, config: Search) -> str:
    """The command that writes the solution as an adapter."""
    settings = {"adapters": config.adapters, "base": config.base, "out": f"{config.out.rstrip('/')}_composed"}
    dials = (f"--{dial} {shlex.quote(setting)}" for dial, setting in settings.items() if setting)
    return f"python stages/merge.py compose {shlex.quote(str(solution))} {' '.join(dials)}"
