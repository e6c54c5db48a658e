"""The processes of one launch: do they run the same thing, and are they all alive?

Collectives wait. If one process is killed, stopped or stuck, the others would stand still until a timeout of half an
hour, or for ever; a thread in each process watches the others' files and ends its own with one sentence.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import gather_object

from pipeline.config.errors import UserError
from pipeline.runtime.hashing import hash_file, hash_value
from pipeline.runtime.process import processes

BEAT = 1.0  # seconds between signs of life


def check_same_inputs(stage: str, facts: Mapping[str, Any]) -> None:
    """UserError on every process, naming the process and the fact, where they were not all started with the same."""
    package = Path(__file__).parents[1]
    code = sorted((str(file.relative_to(package)), hash_file(file)) for file in package.rglob("*.py"))
    own = {name: hash_value(fact) for name, fact in {**facts, "code": code}.items()}
    first, *others = gather_object([own])
    for rank, found in enumerate(others, 1):
        for name, value in found.items():
            if value != first[name]:
                raise UserError(
                    f"{stage}: process {rank} was started with other {name} than process 0 ({value[:8]}, not "
                    f"{first[name][:8]}): give all machines the same config, data, models and code"
                )


class Heartbeat:
    """Writes this process's phase to a file each second, and reads the other processes' from theirs.

    When another has failed, has died on this machine, or has not written for `patience` seconds, this process says so
    and exits with status 1, wherever its main thread stands. The folder is one that all machines see.
    """

    def __init__(self, stage: str, folder: Path, patience: float) -> None:
        self.stage, self.folder, self.patience = stage, folder, patience
        self.rank, self.world = processes().process_index, processes().num_processes
        self.phase, self.count = "starting", 0
        self.writing = threading.Lock()
        self.before: Any = None  # what SIGTERM did
        self.fd_before = -1
        self.seen: dict[int, tuple[int, float]] = {}  # by rank: the last count, and when it was new
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> "Heartbeat":
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("")
            processes().wait_for_everyone()  # no file of an earlier attempt is read
            self.woken, self.waker = os.pipe()
            if threading.current_thread() is threading.main_thread():
                # A launcher that has lost one process sends SIGTERM to the rest at once; the cause is worth a look
                # first. The main thread may stand in a collective, so the signal wakes the watching one.
                os.set_blocking(self.waker, False)
                self.before = signal.signal(signal.SIGTERM, lambda *_: None)
                self.fd_before = signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
            self.thread.start()
        return self

    def enter(self, phase: str) -> None:
        """Says what this process is about to do."""
        self.phase = phase
        if self.world > 1:
            self._write("")

    def stop(self, failure: BaseException | None) -> None:
        """Ends the watching; a failure is told to the others, and theirs, if they had one first, to the console."""
        if self.world == 1:
            return
        self.stopping.set()
        self.thread.join()
        if self.before is not None:
            signal.set_wakeup_fd(self.fd_before)
            signal.signal(signal.SIGTERM, self.before)
        if failure is None:
            with contextlib.suppress(OSError):  # others are still in the folder
                self._file(self.rank).unlink()
                self.folder.rmdir()
        else:
            self._write(f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}")
            if trouble := self._look():  # a collective that fails is mostly another process's fault
                self._tell(trouble)
        os.close(self.woken)
        os.close(self.waker)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _write(self, failure: str) -> None:
        with self.writing:
            self.count += 1
            own = {"pid": os.getpid(), "host": socket.gethostname(), "count": self.count, "phase": self.phase}
            temporary = self._file(self.rank).with_suffix(".partial")
            with contextlib.suppress(OSError):  # a beat that is lost is no reason to stop beating
                temporary.write_text(json.dumps({**own, "failure": failure}), encoding="utf-8")
                temporary.replace(self._file(self.rank))

    def _watch(self) -> None:
        while not self.stopping.is_set():
            self._write("")
            if trouble := self.trouble():
                self._leave(trouble)
            if select.select([self.woken], [], [], BEAT)[0] and signal.SIGTERM in os.read(self.woken, 64):
                self._leave(self._look())

    def _look(self) -> str:
        """What turns out within a second to be wrong with another process, or ''."""
        for _ in range(5):
            if trouble := self.trouble():
                return trouble
            time.sleep(0.2)
        return ""

    def _tell(self, trouble: str) -> None:
        print(f"error: {self.stage}: {trouble}; process {self.rank} stops in {self.phase}", file=sys.stderr, flush=True)

    def _leave(self, trouble: str) -> NoReturn:
        """Ends the process where it stands: the main thread may wait for ever in a collective."""
        if trouble:
            self._tell(trouble)
        os._exit(1 if trouble else 128 + signal.SIGTERM)

    def trouble(self) -> str:
        """What is wrong with another process, in words, or ''."""
        for rank in range(self.world):
            if rank == self.rank:
                continue
            try:
                beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # a process that ends well takes its file away
                continue
            who = f"process {rank} (pid {beat['pid']} on {beat['host']})"
            if beat["failure"]:
                return f"{who} failed in {beat['phase']}: {beat['failure']}"
            if beat["host"] == socket.gethostname() and not _is_running(beat["pid"]):
                return f"{who} died in {beat['phase']}"
            count, since = self.seen.get(rank, (-1, 0.0))
            if beat["count"] != count:
                self.seen[rank] = (beat["count"], time.monotonic())
            elif time.monotonic() - since > self.patience:
                return f"{who} has given no sign of life for {self.patience:.0f} s, in {beat['phase']}"
        return ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True
