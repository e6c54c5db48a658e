"""How far a stage has come: a bar on a terminal, plain lines in a log file, nothing on all but the main process."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.runtime.console import console
from pipeline.runtime.process import is_main

SECONDS_BETWEEN_LINES = 30.0


class NullProgress:
    """Shows nothing."""

    def show(self, done: int, total: int, values: Mapping[str, str]) -> None:
        """Steps done and in all, and the two or three numbers that matter, by name."""

    def close(self, finished: bool) -> None:
        """Ends the display; `finished` says that the stage did all its work."""


class ProgressBar(NullProgress):
    """One bar of rich, redrawn in place."""

    def __init__(self, stage: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
        )
        self.stage, self.bar = stage, Progress(*columns, console=console)

    def show(self, done: int, total: int, values: Mapping[str, str]) -> None:
        if not self.bar.tasks:
            self.bar.start()
            self.bar.add_task(self.stage, total=total, values="")
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        self.bar.update(self.bar.task_ids[0], completed=done, values=text)

    def close(self, finished: bool) -> None:
        """A finished stage's bar is full, though its last log line may have come some steps earlier."""
        if finished:
            for task in self.bar.tasks:
                self.bar.update(task.id, completed=task.total)
        self.bar.stop()


class ProgressLines(NullProgress):
    """A line at the first and the last step, and between them at most one in SECONDS_BETWEEN_LINES."""

    def __init__(self, stage: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives the seconds of a clock that never goes back."""
        self.stage, self.console, self.clock = stage, console, clock
        self.first: tuple[int, float] | None = None  # the first step shown, and when
        self.last_line, self.last_time = "", 0.0  # as printed
        self.pending = ""  # the newest line, while it is not printed

    def show(self, done: int, total: int, values: Mapping[str, str]) -> None:
        now = self.clock()
        numbers = [f"{name} {value}" for name, value in values.items()]
        line = ", ".join([f"{self.stage}: {done}/{total}", *self._time_left(done, total, now), *numbers])
        self.pending = line if line != self.last_line else ""  # the last step may be shown twice
        if self.first is None or done >= total or now - self.last_time >= SECONDS_BETWEEN_LINES:
            self._print(now)
        self.first = self.first or (done, now)

    def close(self, finished: bool) -> None:
        self._print(self.clock())

    def _print(self, now: float) -> None:
        if self.pending:
            self.console.print(self.pending, markup=False)
            self.last_line, self.last_time, self.pending = self.pending, now, ""

    def _time_left(self, done: int, total: int, now: float) -> list[str]:
        """At the mean speed since the first step shown; nothing before the second and after the last."""
        if self.first is None or done <= self.first[0] or done >= total:
            return []
        step, moment = self.first
        return [f"{format_duration((now - moment) / (done - step) * (total - done))} left"]


def format_duration(seconds: float) -> str:
    """3:40, or 1:03:40."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


def new_progress(stage: str) -> NullProgress:
    """The display that suits where this process prints."""
    if not is_main():
        return NullProgress()
    if console.is_interactive or console.is_jupyter:
        return ProgressBar(stage, console)
    return ProgressLines(stage, console)
