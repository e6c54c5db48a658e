"""The README's results: the default recipe, LoRA and full, on several seeds, and their table.

    python benchmarks/seeds.py --seeds 1 2 3 [--runs runs] [--jobs 1]

Each seed is a chain of its own under <runs>/seed<k>/ (finished stages are skipped), from tokenizer to evaluation. The
table goes to docs/results.md with the mean over seeds and its 95 % interval (Student t over seeds: wide with three),
PPO's curves to docs/curves/imdb.png and imdb_full.png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from plots import draw

from pipeline.evaluation.report import TITLES, format_bounds, format_interval, markdown_table
from pipeline.evaluation.statistics import mean_ci

CHAIN = ("pretrain", "sft", "reward", "ppo", "merge", "evaluate")


def run(stage: str, recipe: str, seed: int, runs: Path, jobs: int, **dials: object) -> Path:
    """Runs a stage for one seed and returns its folder; its output goes to a log beside the runs."""
    arguments = {
        "config": Path("configs") / recipe / f"{stage}.yaml",
        "runs": runs,
        "seed": seed,
        "report_to": "none",
    } | dials
    command = [sys.executable, f"stages/{stage}.py", *(f"--{name}={value}" for name, value in arguments.items())]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | threads)
    return runs / recipe / stage


def chain(seed: int, runs: Path, jobs: int) -> dict[str, Any]:
    """All stages of one seed, with LoRA and with full PPO; returns what the stages reported."""
    runs = runs / f"seed{seed}"
    folders = {stage: run(stage, "imdb", seed, runs, jobs) for stage in CHAIN}
    final = {stage: folder / "final" for stage, folder in folders.items()}
    run("ppo", "imdb_full", seed, runs, jobs, sft=final["sft"], reward=final["reward"])
    run("merge", "imdb_full", seed, runs, jobs)
    shared = {"base": final["pretrain"], "sft": final["sft"], "reward": final["reward"]}
    full = run("evaluate", "imdb_full", seed, runs, jobs, **shared)
    reports = {stage: json.loads((folder / "run.json").read_text())["metrics"] for stage, folder in folders.items()}
    pages = {"lora": folders["evaluate"], "full": full}
    reports |= {name: json.loads((page / "final" / "evaluation.json").read_text()) for name, page in pages.items()}
    return reports


PANELS = {
    "eval_score": "validation: score (reward units)",
    "eval_vader": "validation: VADER compound",
    "eval_classifier": "validation: P(positive) by judge 2",
    "kl": "KL to SFT (nats per response)",
    "entropy": "entropy (nats per token)",
    "length": "length (tokens)",
}
KINDS = {"lora": "LoRA PPO", "full": "full PPO"}


def over_seeds(values: Iterable[float]) -> str:
    """Mean over seeds with its 95 % interval (Student t)."""
    e = mean_ci(list(values))
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def page(seeds: list[int], reports: list[dict[str, Any]]) -> list[str]:
    """docs/results.md, from what the stages of each seed reported."""

    def stage_row(title: str, *path: str) -> tuple[str, ...]:
        values = [reduce(getitem, path, report) for report in reports]
        return title, over_seeds(values), ", ".join(f"{value:.3f}" for value in values)

    def policy_row(title: str, *path: str) -> tuple[str, ...]:
        policies = [[report["lora"]["policies"][p] for report in reports] for p in ("base", "sft", "ppo")]
        policies.append([report["full"]["policies"]["ppo"] for report in reports])
        return title, *(over_seeds(reduce(getitem, path, policy) for policy in column) for column in policies)

    runs = [(seed, kind, report[kind]) for kind in KINDS for seed, report in zip(seeds, reports, strict=True)]
    bounds_of = {row["name"].split(" (")[0]: format_bounds(row["low"], row["high"]) for row in runs[0][2]["health"]}
    return [
        "# Results of the default recipe",
        "",
        f"`python benchmarks/seeds.py --seeds {' '.join(map(str, seeds))}` on {os.cpu_count()} CPU cores "
        f"({platform.machine()}). Intervals are 95 %: over seeds (Student t) in the first two tables, over "
        f"{runs[0][2]['prompts']:,} held-out prompts, paired, in the third.",
        "",
        "## Stages",
        "",
        *markdown_table(
            ("measure", "mean over seeds", "each seed"),
            [
                stage_row("pretrain: validation loss, nats per token", "pretrain", "validation_loss"),
                stage_row("pretrain: bits per byte", "pretrain", "bits_per_byte"),
                stage_row("sft: validation loss, nats per completion token", "sft", "validation_loss"),
                stage_row("reward: held-out pair accuracy", "reward", "test", "accuracy", "value"),
                stage_row("reward: TF-IDF + ridge on the same pairs", "reward", "test", "linear_baseline", "value"),
                stage_row("reward: the longer text wins", "reward", "test", "longer_wins", "value"),
            ],
        ),
        "",
        "## Policies",
        "",
        *markdown_table(
            ("measure", "base", "SFT", *KINDS.values()),
            [
                *(policy_row(title, name, "value") for name, title in TITLES.items()),
                policy_row("KL to SFT, nats per response", "kl", "value"),
                policy_row("perplexity under base", "perplexity_under_base"),
                policy_row("word repetition in a response", "text", "word_repetition"),
                policy_row("distinct-1", "text", "distinct_1"),
                policy_row("distinct-2", "text", "distinct_2"),
                policy_row("distinct-4", "text", "distinct_4"),
                policy_row("exact duplicates", "text", "duplicate_share"),
                policy_row("length, tokens", "length", "value"),
                policy_row("ended by EOS", "eos_share", "value"),
            ],
        ),
        "",
        "## PPO against SFT, seed by seed",
        "",
        *markdown_table(
            ("policy", "seed", *TITLES.values(), "wins by reward / judge 1 / judge 2"),
            [
                (
                    KINDS[kind],
                    str(seed),
                    *(format_interval(report["ppo_against_sft"][name]["difference"]) for name in TITLES),
                    " / ".join(f"{report['ppo_against_sft'][name]['win_rate']['value']:.3f}" for name in TITLES),
                )
                for seed, kind, report in runs
            ],
        ),
        "",
        "## Is it text still?",
        "",
        *markdown_table(
            ("policy", "seed", *(f"{name}: {bound}" for name, bound in bounds_of.items())),
            [
                (
                    KINDS[kind],
                    str(seed),
                    *(f"{row['value']:.3g}{'' if row['healthy'] else ' **outside**'}" for row in report["health"]),
                )
                for seed, kind, report in runs
            ],
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds run side by side, sharing the cores")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        reports = list(pool.map(lambda seed: chain(seed, given.runs, given.jobs), given.seeds))
    for recipe in ("imdb", "imdb_full"):
        folders = {f"seed {seed}": given.runs / f"seed{seed}" / recipe / "ppo" for seed in given.seeds}
        colours = {name: (folder, f"C{n}") for n, (name, folder) in enumerate(folders.items())}
        draw(Path("docs/curves") / f"{recipe}.png", PANELS, colours)
    lines = page(given.seeds, reports)
    Path("docs/results.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
