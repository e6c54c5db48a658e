"""What becomes of a finding's claims: figures and verdicts over seeds, as JSON and in docs/adapter-arithmetic.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.report import markdown_table
from pipeline.evaluation.statistics import mean_ci

PAGE = Path("docs/adapter-arithmetic.md")
Figures = dict[str, float]
"""By what was measured; of one seed."""


@dataclass(frozen=True)
class Claim:
    """That one figure is above another (or a number), on the mean over seeds."""

    text: str
    more: str
    less: str | float


BOUNDS = {"1.05": 1.05}
"""Figures of claims that nothing measures."""


def make_report(claims: Sequence[Claim], by_seed: Mapping[int, Figures], seconds: float, command: str) -> dict:
    """What is written: figures by seed with mean and interval, and what becomes of each claim."""
    figures = {
        name: {"seeds": [seed[name] for seed in by_seed.values()]}
        | mean_with_interval([seed[name] for seed in by_seed.values()])
        for name in next(iter(by_seed.values()))
    }
    known = [{**seed, **BOUNDS} for seed in by_seed.values()]
    verdicts = []
    for claim in claims:
        if not all(claim.more in seed and claim.less in seed for seed in known):
            continue
        differences = [seed[claim.more] - seed[claim.less] for seed in known]
        interval = mean_with_interval(differences)
        verdicts.append({"claim": claim.text, "seeds": differences, **interval, "outcome": verdict(interval)})
    return {
        "command": command,
        "seeds": list(by_seed),
        "cpu_seconds": round(seconds),
        "figures": figures,
        "claims": verdicts,
    }


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """The mean and, of two seeds or more, the ends of its 95 % interval."""
    if len(values) < 2:
        return {"mean": values[0]}
    estimate = mean_ci(values)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def verdict(difference: Mapping) -> str:
    """Whether the interval of a difference is above 0."""
    if "low" not in difference:
        return "one seed says nothing"
    return "yes" if difference["low"] > 0 else "no: the opposite" if difference["high"] < 0 else "not shown"


def format_section(result: Mapping) -> list[str]:
    """The finding's two tables."""

    def cells(name: str, row: Mapping) -> tuple[str, ...]:
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        return name, f"{row['mean']:.3f}{interval}", ", ".join(f"{value:.3f}" for value in row["seeds"])

    return [
        f"`{result['command']}` ({result['cpu_seconds']} seconds of CPU time)",
        "",
        *markdown_table(
            ("measure", "mean over seeds", "each seed"), [cells(name, row) for name, row in result["figures"].items()]
        ),
        "",
        *markdown_table(
            ("claim", "difference", "each seed", "shown"),
            [(*cells(row["claim"], row), row["outcome"]) for row in result["claims"]],
        ),
    ]


def write_into_page(finding: str, lines: Sequence[str]) -> None:
    """Puts the lines between the finding's two marks in the page, if it has them."""
    marks = [f"<!-- {finding}: written by benchmarks/adapter_arithmetic.py -->", f"<!-- end of {finding} -->"]
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if all(mark in page for mark in marks):
        before, _, rest = page.partition(marks[0])
        after = rest.partition(marks[1])[2]
        PAGE.write_text(before + "\n\n".join([marks[0], "\n".join(lines), marks[1]]) + after, encoding="utf-8")
