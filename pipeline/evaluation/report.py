"""The report of an evaluation: the table at the end of a run, evaluation.json and evaluation.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.evaluation.side_figures import NOT_MEASURED, show
from pipeline.evaluation.statistics import Estimate
from pipeline.runtime.console import console, print_main
from pipeline.runtime.process import is_main

HEADER = ("measure", "base", "SFT", "PPO", "PPO - SFT [95 % CI]")
VADER_KNOWS_NO_WORD = "VADER's list of English words has none of the responses'"
TITLES = {"score": "reward", "vader": "judge 1: VADER compound", "classifier": "judge 2: P(positive)"}


def format_bounds(low: float | None, high: float | None) -> str:
    return f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def format_interval(estimate: dict[str, float] | None) -> str:
    return (
        NOT_MEASURED
        if estimate is None
        else f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
    )


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The comparison as rows of text: measure, base, SFT, PPO, PPO - SFT with its 95 % interval."""

    def difference(name: str) -> str:
        return format_interval(report["ppo_against_sft"][name]["difference"])

    policies = [report["policies"][name] for name in ("base", "sft", "ppo")]
    titles = {name: title for name, title in TITLES.items() if name in report["ppo_against_sft"]}
    rows = [
        (title, *(show(p[name], "+.3f" if name != "classifier" else ".3f") for p in policies), difference(name))
        for name, title in titles.items()
    ]
    for name, title in titles.items():
        rate = report["ppo_against_sft"][name]["win_rate"]
        rows.append(
            (
                f"PPO beats SFT by {title.split(':')[0]}",
                "",
                "",
                show(rate, ".3f"),
                "" if rate is None else f"[{rate['low']:.3f}, {rate['high']:.3f}]",
            )
        )
    rows += [
        ("KL to SFT, nats per response", *(show(p["kl"], ".2f") for p in policies), ""),
        ("length, tokens", *(show(p["length"], ".1f") for p in policies), ""),
        ("ended by EOS", *(show(p["eos_share"], ".3f") for p in policies), ""),
        ("perplexity under base", *(show(p["perplexity_under_base"], ".1f") for p in policies), ""),
    ]
    texts = [p["text"] for p in policies]
    names = {"distinct_1": "distinct-1", "distinct_2": "distinct-2", "distinct_4": "distinct-4"}
    names |= {"word_repetition": "word repetition in a response", "duplicate_share": "exact duplicates"}
    rows += [(title, *(f"{text[name]:.3f}" for text in texts), "") for name, title in names.items()]
    commonest = [next(iter(text["commonest_content_words"]), ("none", 0.0)) for text in texts]
    rows.append(("commonest content word, share", *(f"{word} {share:.3f}" for word, share in commonest), ""))
    return rows


def print_report(report: dict[str, Any], final: Path, merged: Path) -> None:
    """Prints the table, and the paths of the page and of the model."""
    if not is_main():
        return
    table = Table(*HEADER, title=f"{report['prompts']:,} held-out prompts")
    for row in table_rows(report):
        table.add_row(*row)
    console.print(table)
    for row in report["health"]:
        print_main(f"{'ok  ' if row['healthy'] else 'FAIL'} {row['name']}: {show(row['value'], '.3g')}")
    print_main(f"merged model     {merged}\nevaluation page  {final / 'evaluation.md'}")


def write_report(report: dict[str, Any], samples: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes evaluation.json and evaluation.md."""
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(markdown_page(report, samples), encoding="utf-8")


def describe_judges(report: dict[str, Any]) -> str:
    """A sentence on the judges."""
    if report["judge_accuracy"] is None:
        return "No judge but the reward, which was trained on: a higher one alone does not show better answers."
    accuracy = Estimate(**report["judge_accuracy"])
    vader = "VADER's rule" if "vader" in report["ppo_against_sft"] else f"{NOT_MEASURED}: {VADER_KNOWS_NO_WORD}"
    return (
        f"Judge 1 is {vader}; judge 2 is a bag-of-words classifier fitted to human labels that no training "
        "stage saw (its accuracy on labels held out from it in turn: "
        f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]). Both read the response alone."
    )


def markdown_page(report: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """The evaluation as one Markdown page."""
    lines = [
        "# Did alignment work?",
        "",
        f"One response per policy to each of {report['prompts']:,} held-out prompts, sampled at the training "
        f"temperature. {describe_judges(report)} Intervals are 95 %, paired over prompts.",
        "",
        *markdown_table(HEADER, table_rows(report)),
        "",
        "## If length were equal",
        "",
        *markdown_table(
            ("measure", "PPO - SFT at equal length [95 % CI]"),
            [(name, format_interval(d["at_equal_length"])) for name, d in report["ppo_against_sft"].items()],
        ),
        "",
        "## Is it text still?",
        "",
        *markdown_table(
            ("figure", "value", "bounds", ""),
            [
                (
                    row["name"],
                    show(row["value"], ".3g"),
                    format_bounds(row["low"], row["high"]),
                    "ok" if row["healthy"] else "**outside**",
                )
                for row in report["health"]
            ],
        ),
        "",
        "Commonest content words (share of responses, the prompt's own words aside):",
        "",
        *(
            f"- {name}: "
            + ", ".join(f"{word} {share:.3f}" for word, share in policy["text"]["commonest_content_words"])
            for name, policy in report["policies"].items()
        ),
        "",
        "## Samples",
        "",
        "The first prompts of the file, not chosen.",
        "",
    ]
    for row in samples:
        lines += [f"**{row['prompt']}** …", ""]
        lines += [
            f"- {name} ({row[f'{name}_score']:+.2f}): {' '.join(row[name].split())}" for name in ("base", "sft", "ppo")
        ]
        lines.append("")
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(cells)} |"
        for cells in [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    ]
