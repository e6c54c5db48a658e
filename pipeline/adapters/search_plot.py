"""The picture of a search: what every trial gave."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from pipeline.adapters.search_dials import Constraint, Trial

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_trials(
    file: Path,
    trials: Sequence[Trial],
    chosen: Trial,
    objective: str,
    constraints: Sequence[Constraint],
    base_figures: Mapping[str, float],
) -> None:
    """The objective against each variable and against each other measure, a panel each; hollow: breaks a constraint."""
    measures = [name for name in chosen.figures if name != objective]
    panels = [*(f"${name}" for name in chosen.values), *measures]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, title in zip(axes[0], panels, strict=True):
        points = sorted((x_value(trial, title), trial.figures[objective], trial.excess) for trial in trials)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        if len(chosen.values) == 1 and title.startswith("$"):
            axis.plot(xs, ys, color="0.75", zorder=1)
        colours = ["none" if excess else "C0" for _, _, excess in points]
        axis.scatter(xs, ys, c=colours, edgecolors="C0", s=22, zorder=2)
        best = [x_value(chosen, title)], [chosen.figures[objective]]
        axis.scatter(*best, marker="*", color="C3", s=120, zorder=3, label="chosen")
        for constraint in constraints:
            if constraint.measure == title:
                axis.axvline(constraint.limit(base_figures), color="0.4", linestyle=":", label=str(constraint))
        axis.set_xlabel(title.replace("$", r"\$"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel(f"{objective}, validation rows", fontsize=9)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def x_value(trial: Trial, title: str) -> float:
    """Where a trial lies in the panel of a `$variable` or of a measure."""
    return trial.values[title[1:]] if title.startswith("$") else trial.figures[title]
