"""What a stage leaves on disk, and how it gets there whole.

    runs/<recipe>/<stage>/
        config.yaml     every dial as it was resolved
        run.json        versions, revision, parents, data fingerprints, final metrics
        metrics.jsonl   one line per logged step            samples.jsonl   texts, one line each
        final/          written beside its place, listed in DONE.json, renamed whole

A stage is finished when `final/DONE.json` is there, and nothing reads an unfinished one. DONE.json fingerprints the
config, the data, the parents and every file: a stage made from other inputs is recognised and never silently reused.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config.errors import UserError
from pipeline.config.parse import flat, identity
from pipeline.runtime import checkpoints
from pipeline.runtime.checkpoints import Checkpoint
from pipeline.runtime.console import console, print_main
from pipeline.runtime.hashing import file_manifest, first_changed_file, fsync_folder, hash_folder, hash_value
from pipeline.runtime.internals import reset_accelerator_state
from pipeline.runtime.launch import check_deepspeed, new_accelerator, parallel_strategy, uses_deepspeed
from pipeline.runtime.precision import resolve_precision
from pipeline.runtime.process import is_main, processes
from pipeline.runtime.tracking import Tracking
from pipeline.runtime.watchdog import Heartbeat, check_same_inputs

LOGS = ("metrics.jsonl", "samples.jsonl")
LEAST_DISK = 50 * 2**20  # bytes; logs and samples want some as well


class StageError(UserError):
    """A stage that cannot start or finish; the message says why and how to mend it."""


def read_done(final: Path) -> dict[str, Any]:
    """DONE.json of a finished stage output; a StageError names the stage to run where there is none."""
    if not (final / "DONE.json").is_file():
        what = "not finished (no DONE.json there)" if final.exists() else "not there"
        stage = final.parent.name
        how = (
            f"run {stage} first, for example `make {stage}`" if final.name == "final" else "a stage's final/ is needed"
        )
        raise StageError(f"{final}: {what}: {how}")
    return json.loads((final / "DONE.json").read_text(encoding="utf-8"))


def verify_files(final: Path) -> dict[str, Any]:
    """DONE.json after every file listed in it was found with its size and sha256; else a StageError names the file."""
    done = read_done(final)
    if other := first_changed_file(final, done["files"]):
        raise StageError(
            f"{final / other}: missing or not as it was written (sha256 differs): run {done['stage']} again"
        )
    return done


class StageRun:
    """One run of one stage: its folder, log, progress bar, and its `final/`, which appears whole or not at all."""

    def __init__(
        self,
        stage: str,
        config: Any,
        parents: Mapping[str, Path],
        data: Sequence[tuple[str, str]],
        functions: Mapping[str, str] | None = None,
    ) -> None:
        """`data`: each source and its hash (`data.sources.hash_sources`); `functions`: by role, the names of functions
        that were given in place of what the dials say."""
        self.stage, self.config, self.functions = stage, config, dict(functions or {})
        self.folder = config.run.folder(stage)
        self.final = self.folder / "final"
        self.dials = flat(config)
        self.parents = {name: _describe_parent(path, self.final) for name, path in parents.items()}
        self.data = dict(data)
        self.data_hashes = [content for _, content in data]
        self.started = time.monotonic()
        reset_accelerator_state()  # of a stage before this one in the same process
        accelerator = new_accelerator(config.run.precision)  # a launch that is not what it seems: no work is begun
        if uses_deepspeed(accelerator):
            check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
        check_same_inputs(
            stage,
            {"dials": self.dials | self.functions, "data": self.data_hashes, "models": self.identity["parents"]}
            | {"arithmetic": self.launch["precision"]},
        )
        self.checkpoints = self.folder / "checkpoints"
        self.resume_from: Checkpoint | None = None  # known once the stage is entered
        self.heartbeat = Heartbeat(stage, self.folder / ".processes", config.run.patience)
        self._tracking: Tracking | None = None
        self._progress: Progress | None = None

    @property
    def launch(self) -> dict[str, Any]:
        """How it is computed, which decides no more than the rounding."""
        precision = resolve_precision(self.config.run.precision)
        return {"strategy": parallel_strategy(), "processes": processes().num_processes, "precision": precision}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: dials, data and parents (by content and role, wherever they lie)."""
        return {
            "stage": self.stage,
            "dials": identity(self.config) | self.functions,
            "data": self.data_hashes,
            "parents": {name: parent["fingerprint"] for name, parent in self.parents.items()},
        }

    def is_finished(self) -> bool:
        """True if `final/` was made from exactly these inputs; made from others it is an error, never overwritten."""
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
            f"{self.final} was made from other inputs ({_first_difference(old, self.identity)}). "
            f"Nothing was changed: move {self.folder} away to make it anew, or give --runs another folder"
        )

    def __enter__(self) -> "StageRun":
        found: list[Checkpoint | None] = [checkpoints.newest_checkpoint(self.checkpoints) if is_main() else None]
        broadcast_object_list(found)
        self.resume_from = self._same_run(found[0])
        self.number = self.resume_from.facts["number"] if self.resume_from else uuid.uuid4().hex[:8]
        if is_main():
            self._check_disk()
            self._truncate_logs(self.resume_from) if self.resume_from else self._archive_unfinished()
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.dials, sort_keys=False), encoding="utf-8")
            self._write_run_json({})
            run, known = self.config.run, (self.folder, self.dials, self.number)
            self._tracking = Tracking(run.report_to, self.stage, run.recipe, run.seed, *known)
        processes().wait_for_everyone()
        self.heartbeat.start()
        print_main(f"{self.stage}: {self.folder} ({self.launch['precision']})")
        if self.resume_from:
            print_main(f"{self.stage}: goes on after step {self.resume_from.step} ({self.resume_from.folder})")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.heartbeat.stop(error)
        self.close_progress()
        if self._tracking is not None:
            self._tracking.close(failed=kind is not None)

    def _check_disk(self) -> None:
        """StageError when the disk has no room for two models like the parents': found now, not at the end."""
        needed = max([LEAST_DISK, *(2 * parent["bytes"] for parent in self.parents.values())])
        there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise StageError(
                f"{self.folder}: the disk has {free / 2**20:,.0f} MiB free, {self.stage} needs about "
                f"{needed / 2**20:,.0f}: make room, or give --runs a folder on another disk"
            )

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """What a later run of the same inputs goes on from: what all processes `write`, and a JSON `state`."""
        self.heartbeat.enter(f"checkpoint {step}")
        logs = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
        facts = {"identity": self.identity, "launch": self.launch, "logs": logs, "number": self.number, "state": state}
        checkpoints.save_checkpoint(self.checkpoints, step, write, facts)

    def _same_run(self, found: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint, if this run is the one it was made by; StageError if only the launch is another.

        DDP's is everyone's; where each process keeps pieces of its own, as many must come back.
        """
        if found is None:
            return None
        if found.facts["identity"] != self.identity:
            difference = _first_difference(found.facts["identity"], self.identity)
            print_main(f"{found.folder}: of another run ({difference}): set aside")
            return None
        old, new = found.facts["launch"], self.launch
        if old["precision"] != new["precision"]:
            raise StageError(
                f"{found.folder} was made in {old['precision']}, which --precision {self.config.run.precision} is not "
                f"on this machine: go on where it was made, or move {self.checkpoints} away to start again"
            )
        if old["strategy"] != new["strategy"] or (old != new and old["strategy"] != "DDP"):
            file = f"configs/accelerate/{old['strategy'].lower().replace('-', '')}.yaml"
            raise StageError(
                f"{found.folder} was made under {old['strategy']} on {old['processes']} processes, this launch is "
                f"{new['strategy']} on {new['processes']}: go on with `accelerate launch --config_file {file} "
                f"--num_processes {old['processes']} stages/{self.stage}.py …`, or move {self.checkpoints} away to "
                "start again"
            )
        return found

    def _truncate_logs(self, found: Checkpoint) -> None:
        """Cuts the logs back to where the checkpoint was made: what came after it comes again."""
        for name in LOGS:
            if (self.folder / name).exists():
                os.truncate(self.folder / name, found.facts["logs"].get(name, 0))

    def _archive_unfinished(self) -> None:
        """Logs of an earlier attempt that did not finish are kept under attempts/."""
        left = [path for path in self.folder.glob("*") if path.name != "attempts"]
        if left:
            aside = self.folder / "attempts" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
            aside.mkdir(parents=True)
            for path in left:
                path.rename(aside / path.name)

    def _write_run_json(self, metrics: Mapping[str, Any]) -> None:
        content = {
            **self.identity,
            "parents": self.parents,
            "data": self.data,
            "versions": _versions(),
            "revision": _git_revision(),
            "command": sys.argv,
            **self.launch,
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
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
                self._tracking.table(rows[:20], step)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def show_progress(self, total: int, done: int, **shown: str) -> None:
        """Draws the stage's one progress bar with its time left and the two or three numbers that matter."""
        if not is_main():
            return
        if self._progress is None:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.completed}/{task.total}"),
            ]
            columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), _Numbers()]
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._progress.add_task(self.stage, total=total, numbers="")
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._progress.update(self._progress.task_ids[0], completed=done, numbers=numbers)

    def close_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def finish(self, write: Callable[[Path], None], metrics: Mapping[str, Any]) -> Path:
        """Lets `write` fill a folder beside `final/`, lists it in DONE.json and renames it into place.

        Only the main process writes: every process holds the same whole weights.
        """
        if self._progress is not None:
            task = self._progress.tasks[0]
            self._progress.update(task.id, completed=task.total)  # log lines may have stopped short of the last step
        self.close_progress()
        state = processes()
        temporary = self.folder / "final.partial"
        if state.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that this one goes on from
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
                self._tracking.finished(metrics, self.final, str(done["fingerprint"]), self.parents)
        state.wait_for_everyone()
        print_main(f"{self.stage}: done in {time.monotonic() - self.started:.0f} s -> {self.final}")
        return self.final


class _Numbers(ProgressColumn):
    def render(self, task: Task) -> Any:
        return task.fields["numbers"]


def _describe_parent(path: Path, own: Path) -> dict[str, Any]:
    """A parent's fingerprint, and where it lies: relative to this stage's final/, so that runs/ may move.

    A stage's output, or any model: a directory with a config.json, or the name of one on the hub.
    """
    is_stage = (path / "DONE.json").is_file() or path.name == "final"
    if not is_stage and (path / "config.json").is_file():
        fingerprint = hash_folder(path)
    elif not is_stage and not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        return {"path": str(path), "place": str(path), "fingerprint": _hub_commit(str(path)), "bytes": 0}
    else:
        fingerprint = read_done(path)["fingerprint"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    path_from_here = os.path.relpath(path.resolve(), own.resolve())
    return {"path": path_from_here, "place": str(path), "fingerprint": fingerprint, "bytes": size}


def _hub_commit(model: str) -> str:
    try:
        return str(HfApi().model_info(model).sha)
    except (OSError, ValueError) as error:  # a network that is off, an answer that is no, a name that cannot be one
        raise StageError(
            f"{model}: no such folder, and the hub does not give a model of that name ({type(error).__name__}); give a "
            "stage's final/, a model's folder, or a hub name with the network on"
        ) from None


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for name in sorted({*old["dials"], *new["dials"]}):
        was, now = old["dials"].get(name, "absent"), new["dials"].get(name, "absent")
        if was != now:
            return f"{name}: {was} then, {now} now"
    for name in sorted({*old["parents"], *new["parents"]}):
        if name not in new["parents"] or name not in old["parents"]:
            return f"its parent {name}: {'used' if name in old['parents'] else 'absent'} then, not so now"
        if old["parents"][name] != new["parents"][name]:
            return f"its parent {name} was made anew since"
    return "its data files differ"


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "wandb", "tokenizers")
    return {name: importlib.metadata.version(name) for name in names}


def _git_revision() -> str:
    """HEAD of the repository this code lies in, with '+' when it has uncommitted changes; '' outside git."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parent
    head = subprocess.run([git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [git, "-C", here, "--no-optional-locks", "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
