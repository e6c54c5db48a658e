"""The curves of docs/inspecting-runs.md: PPO of the default recipe, healthy and made ill on purpose.

    python benchmarks/curves.py [--runs runs] [--jobs 1]

Needs runs/imdb up to the reward model (`make pretrain sft reward`). Each run is PPO with one or two dials changed; its
metrics.jsonl is drawn into docs/curves/<name>.png.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from seeds import run

ILL: dict[str, dict[str, object]] = {
    "healthy": {},
    "reward-hacking": {"kl_coef": 0.02, "score_clip": "none"},
    "kl-explosion": {"kl_coef": 0, "learning_rate": 1e-2},
    "entropy-collapse": {"kl_coef": 0, "score_clip": "none", "learning_rate": 3e-3, "epochs": 8},
    "length-drift": {"kl_coef": 0.02, "missing_eos_score": 2},
    "dead-critic": {"critic_learning_rate": 0, "value_clip": 0.01, "critic_warmup": 0},
}
PANELS = {
    "score": "score (reward units)",
    "kl": "KL to SFT (nats per response)",
    "entropy": "entropy (nats per token)",
    "length": "length (tokens)",
    "eos_share": "ended by EOS (share)",
    "explained_variance": "explained variance of the returns",
}


def variant(name: str, runs: Path, jobs: int) -> Path:
    """Trains one variant unless it is finished, and returns its folder."""
    parents = {"sft": runs / "imdb/sft/final", "reward": runs / "imdb/reward/final"}
    return run("ppo", "imdb", 0, runs / "curves" / name, jobs, **parents, **ILL[name])


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(rollout, value) of each metric."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            values.setdefault(name, []).append((row["step"], value))
    return values


def draw(name: str, folder: Path, healthy: Path, out: Path) -> None:
    """Six panels: the run's curves over the healthy run's, in grey."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        if folder != healthy:
            axis.plot(*zip(*series(healthy)[metric], strict=True), color="0.75", label="healthy")
        axis.plot(*zip(*series(folder)[metric], strict=True), color="C3" if folder != healthy else "C0", label=name)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[1, 1].set_xlabel("rollout", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="variants run side by side, sharing the cores")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        folders = dict(zip(ILL, pool.map(lambda name: variant(name, given.runs, given.jobs), ILL), strict=True))
    for name, folder in folders.items():
        draw(name, folder, folders["healthy"], Path("docs/curves"))
        last = {metric: values[-1][1] for metric, values in series(folder).items()}
        print(name, {metric: round(last[metric], 2) for metric in (*PANELS, "eval_score", "eval_kl")})


if __name__ == "__main__":
    main()
