"""Curves of metrics.jsonl, as PNG."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a stage's folder."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            values.setdefault(name, []).append((row["step"], value))
    return values


def draw(
    file: Path,
    panels: Mapping[str, str],
    lines: Mapping[str, tuple[Path, str]],
    optimum: Mapping[str, float] | None = None,
) -> None:
    """Six panels, metric -> title, each with one line a folder, label -> (folder, colour), and the optimum, dotted."""
    curves = {label: (series(folder), colour) for label, (folder, colour) in lines.items()}
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, panels.items(), strict=True):
        for label, (values, colour) in curves.items():
            axis.plot(*zip(*values[metric], strict=True), color=colour, label=label)
        if optimum and metric in optimum:
            axis.axhline(optimum[metric], color="0.4", linestyle=":", label="optimum")
        if metric == "explained_variance":  # at most 1, and anything below where all returns are alike
            axis.set_ylim(max(-1, axis.get_ylim()[0]), 1.05)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[1, 1].set_xlabel("rollout", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)
