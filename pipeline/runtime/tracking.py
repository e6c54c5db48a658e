"""Logging to wandb, TensorBoard or trackio through Accelerate's trackers. No result depends on it.

Names are the same everywhere: metrics are `<stage>/<name>` (the README's glossary), sample tables `<stage>/samples`. In
wandb the group is the recipe, the job type the stage, and each `final/` is a model artifact `<recipe>-<stage>`, by
reference: its files are hashed, neither copied nor uploaded. Its metadata names the artifacts it was made from.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from pipeline.config.errors import UserError
from pipeline.runtime.console import print_main
from pipeline.runtime.internals import is_offline

PACKAGES = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


class Tracking:
    """One stage's run in one tracker; `report_to` none makes every call do nothing."""

    def __init__(
        self, report_to: str, stage: str, recipe: str, seed: int, folder: Path, dials: Mapping[str, Any], number: str
    ) -> None:
        """`number` identifies the run; a stage that resumes has the same one, so the tracker appends to its run."""
        self.stage, self.recipe = stage, recipe
        self.tracker: GeneralTracker | None = None
        if report_to == "none":
            return
        if not any(importlib.util.find_spec(package) for package in PACKAGES[report_to]):
            raise UserError(
                f"report_to {report_to} needs a package: `pip install {PACKAGES[report_to][0]}`, or --report_to none"
            )
        name = f"{recipe}-{stage}-seed{seed}-{number}"
        project = os.environ.get("WANDB_PROJECT", "rlhf-pipeline")
        if report_to == "wandb":
            run_id = re.sub(r"[^\w.-]", "-", name)
            self.tracker = start_wandb(
                project, group=recipe, job_type=stage, name=name, dir=str(folder), id=run_id, resume="allow"
            )
        elif report_to == "tensorboard":
            self.tracker = TensorBoardTracker("tensorboard", logging_dir=folder)
            self.tracker.start()
        else:
            self.tracker = TrackioTracker(project, group=recipe, name=name, resume="allow")
            self.tracker.start()
        values = {dial: value if isinstance(value, bool | int | float) else str(value) for dial, value in dials.items()}
        self.tracker.store_init_configuration(values)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker is not None:
            self.tracker.log({f"{self.stage}/{name}": value for name, value in metrics.items()}, step=step)

    def log_table(self, rows: Sequence[Mapping[str, Any]], step: int | None) -> None:
        """Logs the rows as a table `<stage>/samples`; the tracker keeps the tables of all steps."""
        name = f"{self.stage}/samples"
        if self.tracker is None or not rows:
            return
        columns = list(rows[0])
        cells = [
            [row[column] if isinstance(row[column], bool | int | float) else str(row[column]) for column in columns]
            for row in rows
        ]
        if isinstance(self.tracker, WandBTracker):
            self.tracker.log_table(name, columns, cells, step=step)
        elif isinstance(self.tracker, TensorBoardTracker):
            lines = [columns, ["---"] * len(columns), *cells]
            text = "\n".join(
                "| " + " | ".join(str(cell).replace("\n", " ").replace("|", "\\|") for cell in line) + " |"
                for line in lines
            )
            self.tracker.log({name: text}, step=step)
        else:
            import pandas
            import trackio

            self.tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))}, step=step)

    def log_model(
        self, metrics: Mapping[str, Any], final: Path, fingerprint: str, parents: Mapping[str, Mapping]
    ) -> None:
        """In wandb: the metrics become the run's summary, and `final` a model artifact that names its parents."""
        if not isinstance(self.tracker, WandBTracker):
            return
        import wandb

        run = self.tracker.run
        run.summary.update({f"{self.stage}/{name}": value for name, value in metrics.items()})
        made_from = {role: f"{artifact_name(parent)}:{parent['fingerprint'][:12]}" for role, parent in parents.items()}
        artifact = wandb.Artifact(
            f"{self.recipe}-{self.stage}", "model", metadata={"fingerprint": fingerprint, "made_from": made_from}
        )
        artifact.add_reference(final.resolve().as_uri())
        run.log_artifact(artifact, aliases=["latest", fingerprint[:12]])
        if not is_offline(run):
            for name in made_from.values():
                try:
                    run.use_artifact(name, type="model")
                except (wandb.errors.CommError, ValueError):
                    print_main(f"wandb: no artifact {name} to link to (made offline, or without wandb)")

    def close(self, failed: bool) -> None:
        if isinstance(self.tracker, WandBTracker):
            run = self.tracker.run
            run.finish(exit_code=int(failed))
            if is_offline(run):
                print_main(f"wandb: offline; upload with `wandb sync {Path(run.dir).parent}`")
        elif self.tracker is not None:
            self.tracker.finish()


def artifact_name(parent: Mapping[str, Any]) -> str:
    """`<recipe>-<stage>` of a parent at <runs>/<recipe>/<stage>/final; else the last two parts of its path."""
    parts = Path(parent["place"]).parts
    return "-".join(parts[-3:-1]) if parts[-1:] == ("final",) and len(parts) > 2 else "-".join(parts[-2:])


def start_wandb(project: str, **settings: Any) -> WandBTracker:
    """A started wandb run; offline where there is no key, or the server does not answer. Never asks for a key."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        has_key = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        tracker = WandBTracker(project, mode=None if has_key else "offline", **settings)
        tracker.start()
    except wandb.errors.Error as error:  # no network, no answer, a rejected key
        print_main(f"wandb: warning: logged offline, since {' '.join(str(error).split())[:120]}")
        tracker = WandBTracker(project, mode="offline", **settings)
        tracker.start()
    return tracker
