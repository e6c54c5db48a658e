"""SIGTERM and Ctrl-C: the step that is under way ends and is kept; a second one ends the process at once."""

import os
import signal
import sys
import threading
import time
from typing import Any

from accelerate.utils import gather_object

from pipeline.runtime.process import Interrupted, is_main

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_APART = 1.0  # a launcher may pass on what the terminal has sent already; later it is the user again


class Interrupts:
    """What a stage does when it is told to stop; that depends on its `phase`.

    loading, measuring   stops at once
    stepping             stops after the optimiser step (PPO: the rollout), with a checkpoint
    finishing            stops when `final/` is whole
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.phase = stage, "loading"
        self.number = 0  # of the signal
        self.first: float | None = None  # when this process got it, by a clock that never goes back
        self.agreed = False  # whether all processes stop at the same step
        self.previous: dict[signal.Signals, Any] = {}  # handlers

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int) -> bool:
        """Takes a signal; whether it ends the process at once."""
        now, self.number = time.monotonic(), number
        if self.first is not None:
            return now - self.first > SECONDS_APART
        self.first = now
        if self.phase in ("loading", "measuring"):
            return True
        if is_main() and sys.stderr.isatty():  # not by `print`, which may be what was interrupted
            os.write(2, f"\n{self.stage}: {self.name}: stops after this step; once more: at once\n".encode())
        return False

    def _handle(self, number: int, _: object) -> None:
        if self.receive(number):
            raise Interrupted(number, f"{self.stage}: stopped at once by {self.name}, while {self.phase}")

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else "SIGTERM"

    def asked_to_stop(self) -> bool:
        """Whether any process has been told to stop; all processes ask together, after each step."""
        if number := max(gather_object([self.number])):
            self.number, self.agreed = number, True
        return self.agreed

    def stop(self, kept: str) -> None:
        """Ends the stage; `kept` says what the next run finds."""
        raise Interrupted(self.number, f"{self.stage}: stopped by {self.name} {kept}")
