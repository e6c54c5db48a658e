"""The README's results: the default recipe, LoRA and full, on several seeds, and their table.

    python benchmarks/seeds.py --seeds 1 2 3 [--runs runs] [--jobs 1]

Each seed is a chain of its own under <runs>/seed<k>/ (finished stages are skipped), from tokenizer to evaluation. The
table goes to docs/results.md with the mean over seeds and its 95 % interval (Student t over seeds: wide with three).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.judges import mean_ci

CHAIN = ("pretrain", "sft", "reward", "ppo", "merge", "evaluate")


def run(stage: str, recipe: str, seed: int, runs: Path, jobs: int, **paths: Path) -> Path:
    """Runs a stage for one seed and returns its folder; its output goes to a log beside the runs."""
    arguments = {
        "config": Path("configs") / recipe / f"{stage}.yaml",
        "runs": runs,
        "seed": seed,
        "report_to": "none",
    } | paths
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


def table(reports: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of (measure, mean over seeds with interval, and each seed's value)."""

    def row(title: str, *path: str | int) -> tuple[str, str]:
        values = []
        for report in reports:
            value: Any = report
            for key in path:
                value = value[key]
            values.append(float(value))
        e = mean_ci(values)
        return title, f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}] ({', '.join(f'{v:.3f}' for v in values)})"

    rows = [
        row("pretrain: validation loss, nats per token", "pretrain", "validation_loss"),
        row("pretrain: bits per byte", "pretrain", "bits_per_byte"),
        row("sft: validation loss, nats per completion token", "sft", "validation_loss"),
        row("reward: held-out pair accuracy", "reward", "test", "accuracy", "value"),
        row("reward: TF-IDF + ridge on the same pairs", "reward", "test", "linear_baseline", "value"),
        row("reward: the longer text wins", "reward", "test", "longer_wins", "value"),
    ]
    for kind, name in (("lora", "LoRA PPO"), ("full", "full PPO")):
        for measure, title in (
            ("score", "reward"),
            ("vader", "judge 1 (VADER)"),
            ("classifier", "judge 2 (classifier)"),
        ):
            for policy in ("sft", "ppo"):
                rows.append(row(f"{name}: {title}, {policy}", kind, "policies", policy, measure, "value"))
            rows.append(row(f"{name}: {title}, PPO - SFT", kind, "ppo_against_sft", measure, "difference", "value"))
            rows.append(
                row(
                    f"{name}: PPO - SFT, lower end of each seed's interval",
                    kind,
                    "ppo_against_sft",
                    measure,
                    "difference",
                    "low",
                )
            )
            rows.append(row(f"{name}: win rate by {title}", kind, "ppo_against_sft", measure, "win_rate", "value"))
        for index, check in enumerate(reports[0][kind]["health"]):
            rows.append(row(f"{name}: {check['name'].split(' (')[0]}", kind, "health", index, "value"))
        for policy in ("sft", "ppo"):
            rows.append(row(f"{name}: length in tokens, {policy}", kind, "policies", policy, "length", "value"))
            rows.append(row(f"{name}: ended by EOS, {policy}", kind, "policies", policy, "eos_share", "value"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds run side by side, sharing the cores")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        reports = list(pool.map(lambda seed: chain(seed, given.runs, given.jobs), given.seeds))
    lines = [
        "# Results of the default recipe",
        "",
        f"`python benchmarks/seeds.py --seeds {' '.join(map(str, given.seeds))}` on {os.cpu_count()} CPU cores "
        f"({platform.machine()}); mean over seeds [95 % interval over seeds] (each seed).",
        "",
        "| measure | value |",
        "| --- | --- |",
        *(f"| {title} | {value} |" for title, value in table(reports)),
        "",
    ]
    Path("docs/results.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
