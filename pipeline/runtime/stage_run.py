"""One run of a stage: what it leaves on disk, and that its output appears whole or not at all.

    runs/<recipe>/<stage>/
        config.yaml     every dial as it was resolved
        run.json        versions, revision, parents, data fingerprints, final metrics
        metrics.jsonl   one line per logged step            samples.jsonl   texts, one line each
        final/          written to final.partial, listed in DONE.json, then renamed
        .lock           held by the process that runs in the folder
        .hashes.json    of the files of final/, which are read again only where one has changed

A stage is finished when `final/DONE.json` is there, and nothing reads an unfinished one. DONE.json holds hashes of the
config, the data, the parents and every file: a stage made from other inputs is recognised and never silently reused.
"""

import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import yaml

from pipeline.config.parse import flat, identity
from pipeline.runtime import checkpoints
from pipeline.runtime.checkpoints import CHECKPOINTS_KEPT, Checkpoint
from pipeline.runtime.console import print_main
from pipeline.runtime.disk import LEAST_DISK, bytes_below, require_free
from pipeline.runtime.finished import StageError, read_done, remember_files, verify_files
from pipeline.runtime.finite import check_files_finite
from pipeline.runtime.hashing import fsync_folder, hash_value
from pipeline.runtime.internals import reset_accelerator_state
from pipeline.runtime.interrupts import Interrupts
from pipeline.runtime.launch import check_deepspeed, new_accelerator, parallel_strategy, uses_deepspeed
from pipeline.runtime.lock import LOCK, lock_folder, unlock
from pipeline.runtime.logs import append_line, cut_logs, finite_or_null, sync_logs
from pipeline.runtime.precision import resolve_precision
from pipeline.runtime.process import is_full_disk, is_main, processes, run_once
from pipeline.runtime.progress import new_progress
from pipeline.runtime.provenance import describe_parent, first_difference, git_revision, machine, package_versions
from pipeline.runtime.tracking import Tracking
from pipeline.runtime.watchdog import Heartbeat, check_same_inputs
from pipeline.runtime.whole import appear, make_folder, removed_on_error


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
        that replace what the dials say. StageError for a parent that is not there or damaged, UserError for a wrong
        launch."""
        self.stage, self.config, self.functions = stage, config, dict(functions or {})
        self.folder = config.run.folder(stage)
        self.final, self.partial = self.folder / "final", self.folder / "final.partial"
        self.dials = flat(config)
        self.data = dict(data)
        self.data_hashes = [content for _, content in data]
        self.form = ""  # of the rows that it is trained on: text or conversation
        self.started = time.monotonic()
        reset_accelerator_state()  # of an earlier stage in this process
        accelerator = new_accelerator(config.run.precision)  # refuses a wrong launch before any work
        if uses_deepspeed(accelerator):
            check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
        self.parents = run_once(
            lambda: {name: describe_parent(path, self.final) for name, path in parents.items()}, on_each_machine=True
        )
        check_same_inputs(
            stage,
            {"dials": self.dials | self.functions, "data": self.data_hashes, "models": self.identity["parents"]}
            | {"arithmetic": self.launch["precision"]},
        )
        self.checkpoints = self.folder / "checkpoints"
        self.resume_from: Checkpoint | None = None  # set when the stage is entered
        self.interrupts = Interrupts(stage)
        self.heartbeat = Heartbeat(stage, self.folder / ".processes", config.run.patience, self.interrupts)
        self._held = ExitStack()  # what is let go when the stage is left
        self._lock: TextIO | None = None
        self._tracking: Tracking | None = None
        self._is_written = False  # whether the weights of `final/` are there
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
        """True if `final/` was made from exactly these inputs and is whole; StageError, and no overwriting, if not."""
        return run_once(self._is_finished)

    def _is_finished(self) -> bool:
        if not (self.final / "DONE.json").is_file():
            if self.final.exists():
                raise StageError(
                    f"{self.final}: exists but has no DONE.json, so this project did not finish it: move it away"
                )
            return False
        old = read_done(self.final)["identity"]
        if old != self.identity:
            raise StageError(
                f"{self.final} was made from other inputs ({first_difference(old, self.identity)}). "
                f"Nothing was changed: move {self.folder} away to make it anew, or give --runs another folder"
            )
        verify_files(self.final)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # left by one killed just after the rename
        print_main(f"{self.stage}: finished already, skipped ({self.final})")
        return True

    def __enter__(self) -> "StageRun":
        with ExitStack() as held:
            held.enter_context(self.interrupts)
            held.callback(self._unlock)
            self.resume_from, self.number = run_once(self._open)
            run = self.config.run
            if is_main():
                self._tracking = Tracking(
                    run.report_to, self.stage, run.recipe, run.seed, self.folder, self.dials, self.number
                )
            processes().wait_for_everyone()
            self.heartbeat.start()
            self._held = held.pop_all()
        print_main(f"{self.stage}: {self.folder} ({self.launch['precision']})")
        if self.resume_from:
            print_main(f"{self.stage}: goes on after step {self.resume_from.step} ({self.resume_from.folder})")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.heartbeat.stop(None if self.interrupts.agreed else error)
        self._progress.close(finished=False)
        if self._tracking is not None:
            self._tracking.close(failed=kind is not None)
        if is_main() and error is not None:
            checkpoints.remove_partial(self.checkpoints)
            if self._is_written and self.partial.exists():
                print_main(f"{self.stage}: the weights are whole in {self.partial}: copy them before it is run again")
        self._held.close()
        if error is not None and is_full_disk(error):
            raise StageError(
                f"{self.folder}: no space left on its disk; what was half written is removed, what was finished and "
                "the checkpoints before are untouched: make room, then the same command goes on"
            ) from error

    def _open(self) -> tuple[Checkpoint | None, str]:
        """Makes the folder this run's, with the logs of what it goes on from alone; that, and the run's number."""
        require_free(self.stage, self.folder, LEAST_DISK)
        make_folder(self.folder)
        self._lock = lock_folder(self.folder)
        if self.final.exists():
            raise StageError(f"{self.final}: another process has just finished it: give the same command again")
        resume_from = self._matching_checkpoint(checkpoints.newest_checkpoint(self.checkpoints))
        if resume_from:
            checkpoints.remove_partial(self.checkpoints)
            cut_logs(self.folder, resume_from.facts["logs"])
        else:
            self._archive_unfinished()
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.dials, sort_keys=False), encoding="utf-8")
        self._write_run_json({})
        return resume_from, resume_from.facts["number"] if resume_from else uuid.uuid4().hex[:8]

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock(self._lock)

    def check_disk(self, checkpoint: int, written: int, final: int) -> None:
        """StageError where the disk has no space for what this run holds at its fullest, in bytes.

        That is the checkpoints kept and, beside them, the one being written or `final/`; `written` is how many
        checkpoints the whole run writes.
        """
        kept, most = min(written, CHECKPOINTS_KEPT), min(written, CHECKPOINTS_KEPT + 1)
        what = f" ({most} checkpoints of {checkpoint / 2**20:,.0f}, or {kept} and final/ of {final / 2**20:,.0f})"
        needed = LEAST_DISK + max(most * checkpoint, kept * checkpoint + final)
        run_once(lambda: require_free(self.stage, self.folder, needed - bytes_below(self.checkpoints), what))

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Saves what a later run of the same inputs resumes from: what all processes `write`, and a JSON `state`."""
        self.heartbeat.enter(f"checkpoint {step}")
        logs = sync_logs(self.folder) if is_main() else {}
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
            print_main(
                f"{checkpoint.folder}: of another run ({difference}): removed; its logs are kept in attempts/, and "
                "this one starts again"
            )
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

    def _archive_unfinished(self) -> None:
        """Logs of an earlier attempt that did not finish are kept under attempts/; its checkpoints are removed."""
        for folder in (self.checkpoints, self.partial):
            shutil.rmtree(folder, ignore_errors=True)
        paths = [path for path in self.folder.glob("*") if path.name not in ("attempts", LOCK)]
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
            append_line(self.folder / "metrics.jsonl", {"step": step, **metrics})
            if self._tracking is not None:
                self._tracking.log(metrics, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Appends texts to samples.jsonl, and shows the first twenty of them in the tracker."""
        if is_main():
            for row in rows:
                append_line(self.folder / "samples.jsonl", row)
            if self._tracking is not None:
                self._tracking.log_table(rows[:20], step)

    def stop(self, step: int) -> None:
        """Ends the stage after a step, as it was told to."""
        kept = "with a checkpoint: the same command goes on from it"
        if not self.config.run.save_steps:
            kept = "without a checkpoint, since save_steps is 0: the same command starts again"
        self.interrupts.stop(f"after step {step}, {kept}")

    def show_progress(self, total: int, done: int, **values: str) -> None:
        """Shows steps done and in all, the time left, and the two or three numbers that matter."""
        self._progress.show(done, total, values)

    def finish(self, write: Callable[[Path], None], metrics: Mapping[str, Any]) -> Path:
        """`write`, and then `complete`: for a stage that has nothing to measure on what it writes."""
        self.write(write)
        return self.complete(metrics)

    def write(self, write: Callable[[Path], None]) -> None:
        """Lets `write` fill `self.partial`, which will be `final/`: weights are on disk before anything is measured.

        Only the main process writes: every process holds the same whole weights.
        """
        self._progress.close(finished=True)
        phase, self.interrupts.phase = self.interrupts.phase, "finishing"
        if is_main():
            with removed_on_error(self.partial):
                shutil.rmtree(self.partial, ignore_errors=True)  # left by an earlier attempt
                self.partial.mkdir()
                write(self.partial)
                check_files_finite(self.stage, self.partial)
                fsync_folder(self.partial)
        processes().wait_for_everyone()
        self._is_written, self.interrupts.phase = True, phase

    def complete(self, metrics: Mapping[str, Any]) -> Path:
        """Lists what was written in DONE.json with the metrics, and renames the folder into place."""
        self.interrupts.phase = "finishing"
        metrics = finite_or_null(metrics)
        if is_main():
            self._write_run_json(metrics)
            sync_logs(self.folder)
            done = appear(self.partial, self.final, "DONE.json", lambda files: self._describe(files, metrics))
            remember_files(self.final, done["files"])
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            if self._tracking is not None:
                self._tracking.log_model(metrics, self.final, str(done["fingerprint"]), self.parents)
        processes().wait_for_everyone()
        print_main(f"{self.stage}: done in {time.monotonic() - self.started:.0f} s -> {self.final}")
        if self.interrupts.number:
            self.interrupts.stop(f"once {self.final} was finished")
        return self.final

    def _describe(self, files: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What DONE.json says."""
        return {
            "stage": self.stage,
            "identity": self.identity,
            "config": hash_value(self.identity["dials"]),
            "tokenizer": files.get("tokenizer.json", {}).get("sha256"),
            "base": {name: parent["fingerprint"] for name, parent in self.parents.items()},
            "parents": self.parents,
            "files": files,
            "metrics": metrics,
            "form": self.form,
            "fingerprint": hash_value([self.identity, files]),
        }
