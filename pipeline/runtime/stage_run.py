"""One run of a stage: what it leaves on disk, and that its output appears whole or not at all.

    runs/<recipe>/<stage>/
        config.yaml     every dial as it was resolved
        run.json        versions, revision, parents, data fingerprints, final metrics
        metrics.jsonl   one line per logged step            samples.jsonl   texts, one line each
        final/          written to final.partial, listed in DONE.json, then renamed

A stage is finished when `final/DONE.json` is there, and nothing reads an unfinished one. DONE.json holds hashes of the
config, the data, the parents and every file: a stage made from other inputs is recognised and never silently reused.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from pipeline.config.parse import flat, identity
from pipeline.runtime import checkpoints
from pipeline.runtime.checkpoints import Checkpoint
from pipeline.runtime.console import print_main
from pipeline.runtime.finished import StageError, read_done
from pipeline.runtime.hashing import file_manifest, fsync_folder, hash_value
from pipeline.runtime.internals import reset_accelerator_state
from pipeline.runtime.launch import check_deepspeed, new_accelerator, parallel_strategy, uses_deepspeed
from pipeline.runtime.precision import resolve_precision
from pipeline.runtime.process import is_main, processes
from pipeline.runtime.progress import new_progress
from pipeline.runtime.provenance import describe_parent, first_difference, git_revision, machine, package_versions
from pipeline.runtime.tracking import Tracking
from pipeline.runtime.watchdog import Heartbeat, check_same_inputs

LOGS = ("metrics.jsonl", "samples.jsonl")
LEAST_DISK = 50 * 2**20  # bytes, for logs and samples


class StageRun:
    """One run of one stage: its folder, logs and progress, and its `final/`, which appears whole or not at all."""

    def __init__(
        self,
        stage: str,
        config: Any,
        parents: Mapping[str, Path],
        data: Sequence[tuple[str, str]],
        functions: Mapping[str, str] | None = None,
    ) -> None:
        """`data`: each source and its hash (`data.sources.hash_sources`); `functions`: by role, the names of functions
        that replace what the dials say. StageError for a parent that is not there, UserError for a wrong launch."""
        self.stage, self.config, self.functions = stage, config, dict(functions or {})
        self.folder = config.run.folder(stage)
        self.final = self.folder / "final"
        self.dials = flat(config)
        self.parents = {name: describe_parent(path, self.final) for name, path in parents.items()}
        self.data = dict(data)
        self.data_hashes = [content for _, content in data]
        self.started = time.monotonic()
        reset_accelerator_state()  # of an earlier stage in this process
        accelerator = new_accelerator(config.run.precision)  # refuses a wrong launch before any work
        if uses_deepspeed(accelerator):
            check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
        check_same_inputs(
            stage,
            {"dials": self.dials | self.functions, "data": self.data_hashes, "models": self.identity["parents"]}
            | {"arithmetic": self.launch["precision"]},
        )
        self.checkpoints = self.folder / "checkpoints"
        self.resume_from: Checkpoint | None = None  # set when the stage is entered
        self.heartbeat = Heartbeat(stage, self.folder / ".processes", config.run.patience)
        self._tracking: Tracking | None = None
        self._progress = new_progress(stage)

    @property
    def launch(self) -> dict[str, Any]:
        """Strategy, processes and precision: they change a result by rounding alone."""
        precision = resolve_precision(self.config.run.precision)
        return {"strategy": parallel_strategy(), "processes": processes().num_processes, "precision": precision}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: stage, dials, data and parents; the last two by content, not by path."""
        return {
            "stage": self.stage,
            "dials": identity(self.config) | self.functions,
            "data": self.data_hashes,
            "parents": {name: parent["fingerprint"] for name, parent in self.parents.items()},
        }

    def is_finished(self) -> bool:
        """True if `final/` was made from exactly these inputs; StageError, and no overwriting, if from others."""
        if not (self.final / "DONE.json").is_file():
            if self.final.exists():
                raise StageError(
                    f"{self.final}: exists but has no DONE.json, so this project did not finish it: move it away"
                )
            return False
        old = read_done(self.final)["identity"]
        if old == self.identity:
            print_main(f"{self.stage}: finished already, skipped ({self.final})")
            return True
        raise StageError(
            f"{self.final} was made from other inputs ({first_difference(old, self.identity)}). "
            f"Nothing was changed: move {self.folder} away to make it anew, or give --runs another folder"
        )

    def __enter__(self) -> "StageRun":
        newest: list[Checkpoint | None] = [checkpoints.newest_checkpoint(self.checkpoints) if is_main() else None]
        broadcast_object_list(newest)
        self.resume_from = self._matching_checkpoint(newest[0])
        self.number = self.resume_from.facts["number"] if self.resume_from else uuid.uuid4().hex[:8]
        if is_main():
            self._check_disk()
            self._truncate_logs(self.resume_from) if self.resume_from else self._archive_unfinished()
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.dials, sort_keys=False), encoding="utf-8")
            self._write_run_json({})
            run = self.config.run
            self._tracking = Tracking(
                run.report_to, self.stage, run.recipe, run.seed, self.folder, self.dials, self.number
            )
        processes().wait_for_everyone()
        self.heartbeat.start()
        print_main(f"{self.stage}: {self.folder} ({self.launch['precision']})")
        if self.resume_from:
            print_main(f"{self.stage}: goes on after step {self.resume_from.step} ({self.resume_from.folder})")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.heartbeat.stop(error)
        self._progress.close(finished=False)
        if self._tracking is not None:
            self._tracking.close(failed=kind is not None)

    def _check_disk(self) -> None:
        """StageError where the disk has no space for two models of the largest parent's size."""
        needed = max([LEAST_DISK, *(2 * parent["bytes"] for parent in self.parents.values())])
        folder = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StageError(
                f"{self.folder}: the disk has {free / 2**20:,.0f} MiB free, {self.stage} needs about "
                f"{needed / 2**20:,.0f}: make room, or give --runs a folder on another disk"
            )

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Saves what a later run of the same inputs resumes from: what all processes `write`, and a JSON `state`."""
        self.heartbeat.enter(f"checkpoint {step}")
        logs = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
        facts = {"identity": self.identity, "launch": self.launch, "logs": logs, "number": self.number, "state": state}
        checkpoints.save_checkpoint(self.checkpoints, step, write, facts)

    def _matching_checkpoint(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint if it was made from this run's inputs, else None; StageError if only the launch differs.

        A checkpoint made under DDP is whole and may be resumed on any number of processes. The other strategies leave
        one piece per process, so their number must be the same.
        """
        if checkpoint is None:
            return None
        if checkpoint.facts["identity"] != self.identity:
            difference = first_difference(checkpoint.facts["identity"], self.identity)
            print_main(f"{checkpoint.folder}: of another run ({difference}): set aside")
            return None
        old, new = checkpoint.facts["launch"], self.launch
        if old["precision"] != new["precision"]:
            raise StageError(
                f"{checkpoint.folder} was made in {old['precision']}, which --precision {self.config.run.precision} is "
                f"not on this machine: go on where it was made, or move {self.checkpoints} away to start again"
            )
        if old["strategy"] != new["strategy"] or (old != new and old["strategy"] != "DDP"):
            file = f"configs/accelerate/{old['strategy'].lower().replace('-', '')}.yaml"
            raise StageError(
                f"{checkpoint.folder} was made under {old['strategy']} on {old['processes']} processes, this launch is "
                f"{new['strategy']} on {new['processes']}: go on with `accelerate launch --config_file {file} "
                f"--num_processes {old['processes']} stages/{self.stage}.py …`, or move {self.checkpoints} away to "
                "start again"
            )
        return checkpoint

    def _truncate_logs(self, checkpoint: Checkpoint) -> None:
        """Cuts the logs back to their length at the checkpoint: the steps after it are logged again."""
        for name in LOGS:
            if (self.folder / name).exists():
                os.truncate(self.folder / name, checkpoint.facts["logs"].get(name, 0))

    def _archive_unfinished(self) -> None:
        """Logs of an earlier attempt that did not finish are kept under attempts/."""
        paths = [path for path in self.folder.glob("*") if path.name != "attempts"]
        if paths:
            archive = self.folder / "attempts" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
            archive.mkdir(parents=True)
            for path in paths:
                path.rename(archive / path.name)

    def _write_run_json(self, metrics: Mapping[str, Any]) -> None:
        content = {
            **self.identity,
            "parents": self.parents,
            "data": self.data,
            "versions": package_versions(),
            "revision": git_revision(),
            "command": sys.argv,
            **self.launch,
            "machine": machine(),
            "seconds": round(time.monotonic() - self.started, 1),
            "metrics": metrics,
        }
        (self.folder / "run.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and to the tracker, under the same names."""
        if is_main():
            self._append("metrics.jsonl", {"step": step, **metrics})
            if self._tracking is not None:
                self._tracking.log(metrics, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Appends texts to samples.jsonl, and shows the first twenty of them in the tracker."""
        if is_main():
            for row in rows:
                self._append("samples.jsonl", row)
            if self._tracking is not None:
                self._tracking.log_table(rows[:20], step)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def show_progress(self, total: int, done: int, **values: str) -> None:
        """Shows steps done and in all, the time left, and the two or three numbers that matter."""
        self._progress.show(done, total, values)

    def finish(self, write: Callable[[Path], None], metrics: Mapping[str, Any]) -> Path:
        """Lets `write` fill a folder beside `final/`, lists it in DONE.json and renames it into place.

        Only the main process writes: every process holds the same whole weights.
        """
        self._progress.close(finished=True)
        state = processes()
        temporary = self.folder / "final.partial"
        if state.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # left by an earlier attempt
            temporary.mkdir()
            write(temporary)
            self._write_run_json(metrics)
            files = file_manifest(temporary)
            done = {
                "stage": self.stage,
                "identity": self.identity,
                "config": hash_value(self.identity["dials"]),
                "tokenizer": files.get("tokenizer.json", {}).get("sha256"),
                "base": {name: parent["fingerprint"] for name, parent in self.parents.items()},
                "parents": self.parents,
                "files": files,
                "metrics": metrics,
            }
            done["fingerprint"] = hash_value([done["identity"], done["files"]])
            fsync_folder(temporary)
            (temporary / "DONE.json").write_text(json.dumps(done, indent=1, default=str) + "\n", encoding="utf-8")
            fsync_folder(temporary)
            temporary.rename(self.final)
            fsync_folder(self.final.parent)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            if self._tracking is not None:
                self._tracking.log_model(metrics, self.final, str(done["fingerprint"]), self.parents)
        state.wait_for_everyone()
        print_main(f"{self.stage}: done in {time.monotonic() - self.started:.0f} s -> {self.final}")
        return self.final
