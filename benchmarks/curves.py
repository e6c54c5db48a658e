"""The curves of docs/inspecting-runs.md: PPO of the default recipe, healthy and made ill on purpose.

    python benchmarks/curves.py [--runs runs] [--jobs 1]

Needs runs/imdb up to the reward model (`make pretrain sft reward`). Each run is PPO with one or two dials changed; its
metrics.jsonl is drawn into docs/curves/<name>.png.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plots import draw, series
from seeds import run

ILL: dict[str, dict[str, object]] = {
    "healthy": {},
    "reward-hacking": {"kl_coef": 0.02, "score_clip": "none"},
    "kl-explosion": {"kl_coef": 0, "learning_rate": 1e-2},
    "entropy-collapse": {"kl_coef": 0, "score_clip": "none", "learning_rate": 3e-3, "num_ppo_epochs": 8},
    "length-drift": {"kl_coef": 0.02, "missing_eos_score": 2},
    "dead-critic": {"critic_learning_rate": 0, "cliprange_value": 0.01, "critic_warmup": 0},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="variants run side by side, sharing the cores")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        folders = dict(zip(ILL, pool.map(lambda name: variant(name, given.runs, given.jobs), ILL), strict=True))
    for name, folder in folders.items():
        lines = {"healthy": (folders["healthy"], "0.75" if name != "healthy" else "C0")}
        lines |= {name: (folder, "C3")} if name != "healthy" else {}
        draw(Path("docs/curves") / f"{name}.png", PANELS, lines)
        last = {metric: values[-1][1] for metric, values in series(folder).items()}
        print(name, {metric: round(last[metric], 2) for metric in (*PANELS, "eval_score", "eval_kl")})


if __name__ == "__main__":
    main()
