"""Do all processes of a launch run the same inputs, and are they all alive?

A collective waits for every process. If one is killed, stopped or stuck, the others would hang until the timeout of
half an hour, or for ever. So a thread in each process reads a heartbeat file of every other one, and ends its own
process with one sentence where another has failed.
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
from pipeline.runtime.interrupts import SIGNALS, Interrupts
from pipeline.runtime.process import processes

SECONDS_BETWEEN_BEATS = 1.0


def check_same_inputs(stage: str, facts: Mapping[str, Any]) -> None:
    """UserError on every process where a fact, or the code, differs between processes; it names process and fact."""
    package = Path(__file__).parents[1]
    code = sorted((str(file.relative_to(package)), hash_file(file)) for file in package.rglob("*.py"))
    hashes = {name: hash_value(fact) for name, fact in {**facts, "code": code}.items()}
    first, *others = gather_object([hashes])
    for rank, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                raise UserError(
                    f"{stage}: process {rank} was started with other {name} than process 0 ({value[:8]}, not "
                    f"{first[name][:8]}): give all machines the same config, data, models and code"
                )


class Heartbeat:
    """Writes this process's phase to a file each second, and reads the files of the other processes.

    When another process has failed, has died on this machine, or has not written for `timeout` seconds, this one prints
    that and exits with status 1, whatever its main thread is waiting for. All machines must see the folder.
    """

    def __init__(self, stage: str, folder: Path, timeout: float, interrupts: Interrupts) -> None:
        self.stage, self.folder, self.timeout, self.interrupts = stage, folder, timeout, interrupts
        self.rank, self.world = processes().process_index, processes().num_processes
        self.phase, self.count = "starting", 0
        self.write_lock = threading.Lock()
        self.previous_handlers: dict[signal.Signals, Any] = {}
        self.previous_wakeup_fd = -1
        self.last_beats: dict[int, tuple[int, float]] = {}  # by rank: the newest count, and when it was first read
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> "Heartbeat":
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("")
            processes().wait_for_everyone()  # every file of an earlier attempt is replaced before one is read
            self.wakeup_read, self.wakeup_write = os.pipe()
            if threading.current_thread() is threading.main_thread():
                # A launcher that has lost one process sends SIGTERM to the rest at once. The reason is printed first;
                # the main thread may be waiting in a collective, so the signal wakes the watching thread.
                os.set_blocking(self.wakeup_write, False)
                self.previous_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
                self.previous_wakeup_fd = signal.set_wakeup_fd(self.wakeup_write, warn_on_full_buffer=False)
            self.thread.start()
        return self

    def enter(self, phase: str) -> None:
        """Records what this process is about to do."""
        self.phase = phase
        if self.world > 1:
            self._write("")

    def stop(self, failure: BaseException | None) -> None:
        """Ends the watching thread. A failure is written for the other processes; if one of them failed first, that is
        printed."""
        if self.world == 1:
            return
        self.stopping.set()
        self.thread.join()
        if self.previous_handlers:
            signal.set_wakeup_fd(self.previous_wakeup_fd)
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)
        if failure is None:
            with contextlib.suppress(OSError):  # the folder still holds other processes' files
                self._file(self.rank).unlink()
                self.folder.rmdir()
        else:
            self._write(f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}")
            if reason := self._wait_for_failure():  # a collective fails mostly because of another process
                self._print_failure(reason)
        os.close(self.wakeup_read)
        os.close(self.wakeup_write)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _write(self, failure: str) -> None:
        with self.write_lock:
            self.count += 1
            beat = {"pid": os.getpid(), "host": socket.gethostname(), "count": self.count, "phase": self.phase}
            temporary = self._file(self.rank).with_suffix(".partial")
            with contextlib.suppress(OSError):  # the next beat may be written again
                temporary.write_text(json.dumps({**beat, "failure": failure}), encoding="utf-8")
                temporary.replace(self._file(self.rank))

    def _watch(self) -> None:
        while not self.stopping.is_set():
            self._write("")
            if reason := self.find_failure():
                self._exit(reason)
            is_awake = select.select([self.wakeup_read], [], [], SECONDS_BETWEEN_BEATS)[0]
            for number in os.read(self.wakeup_read, 64) if is_awake else b"":
                if number in SIGNALS:
                    stops_at_once, reason = self.interrupts.receive(number), self._wait_for_failure()
                    if stops_at_once or reason:
                        self._exit(reason)

    def _wait_for_failure(self) -> str:
        """`find_failure`, tried for a second."""
        for _ in range(5):
            if reason := self.find_failure():
                return reason
            time.sleep(0.2)
        return ""

    def _print_failure(self, reason: str) -> None:
        print(f"error: {self.stage}: {reason}; process {self.rank} stops in {self.phase}", file=sys.stderr, flush=True)

    def _exit(self, reason: str) -> NoReturn:
        """Ends the process at once, without waiting for the main thread, which may hang in a collective."""
        if reason:
            self._print_failure(reason)
        elif self.rank == 0:
            print(f"{self.stage}: stopped at once by {self.interrupts.name}", file=sys.stderr, flush=True)
        os._exit(1 if reason else 128 + self.interrupts.number)

    def find_failure(self) -> str:
        """Which other process has failed, died or stopped writing, and in what phase, in words; '' if none has."""
        for rank in range(self.world):
            if rank == self.rank:
                continue
            try:
                beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # a process that ends well removes its file
                continue
            name = f"process {rank} (pid {beat['pid']} on {beat['host']})"
            if beat["failure"]:
                return f"{name} failed in {beat['phase']}: {beat['failure']}"
            if beat["host"] == socket.gethostname() and not _is_running(beat["pid"]):
                return f"{name} died in {beat['phase']}"
            count, since = self.last_beats.get(rank, (-1, 0.0))
            if beat["count"] != count:
                self.last_beats[rank] = (beat["count"], time.monotonic())
            elif time.monotonic() - since > self.timeout:
                return f"{name} has given no sign of life for {self.timeout:.0f} s, in {beat['phase']}"
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
