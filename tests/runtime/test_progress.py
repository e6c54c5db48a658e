"""Progress on a terminal and in a log file, by a clock that the test moves."""

import io

import pytest
from rich.console import Console

from pipeline.runtime import progress
from pipeline.runtime.progress import NullProgress, ProgressBar, ProgressLines, format_duration, new_progress


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log_file():
    """A console that writes where no terminal is."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def lines(log_file, clock):
    return ProgressLines("ppo", log_file, clock)


def printed(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_lines_come_at_the_first_and_last_step_and_every_thirty_seconds(lines, log_file, clock):
    for step in range(1, 33):
        lines.show(step, 32, {"score": f"{step / 100:+.2f}", "kl": "1.20"})
        clock.seconds += 11.0
    lines.close(finished=True)
    assert printed(log_file) == [
        "ppo: 1/32, score +0.01, kl 1.20",
        "ppo: 4/32, 5:08 left, score +0.04, kl 1.20",
        "ppo: 7/32, 4:35 left, score +0.07, kl 1.20",
        "ppo: 10/32, 4:02 left, score +0.10, kl 1.20",
        "ppo: 13/32, 3:29 left, score +0.13, kl 1.20",
        "ppo: 16/32, 2:56 left, score +0.16, kl 1.20",
        "ppo: 19/32, 2:23 left, score +0.19, kl 1.20",
        "ppo: 22/32, 1:50 left, score +0.22, kl 1.20",
        "ppo: 25/32, 1:17 left, score +0.25, kl 1.20",
        "ppo: 28/32, 0:44 left, score +0.28, kl 1.20",
        "ppo: 31/32, 0:11 left, score +0.31, kl 1.20",
        "ppo: 32/32, score +0.32, kl 1.20",
    ]


def test_time_left_is_at_the_speed_of_this_attempt_not_of_the_steps_before_it(lines, log_file, clock):
    lines.show(100, 200, {})
    clock.seconds += 60.0
    lines.show(110, 200, {})
    assert printed(log_file) == ["ppo: 100/200", "ppo: 110/200, 9:00 left"]


@pytest.mark.parametrize("finished", [True, False])
def test_the_last_step_that_was_reported_is_printed_once(lines, log_file, clock, finished):
    """Of a stage that fails, stops early, or reports its last step some steps before its end."""
    lines.show(10, 24, {})
    clock.seconds += 5.0
    lines.show(20, 24, {"loss": "[1.5]"})
    assert printed(log_file) == ["ppo: 10/24"]
    lines.close(finished)
    lines.close(False)
    assert printed(log_file) == ["ppo: 10/24", "ppo: 20/24, 0:02 left, loss [1.5]"]


def test_a_last_step_that_is_shown_twice_is_printed_once(lines, log_file):
    for step in (1, 24, 24):
        lines.show(step, 24, {"loss": "1.5"})
    lines.close(finished=True)
    assert printed(log_file) == ["ppo: 1/24, loss 1.5", "ppo: 24/24, loss 1.5"]


def test_nothing_reported_prints_nothing(log_file):
    for display in (ProgressLines("ppo", log_file), NullProgress()):
        display.close(finished=True)
    assert printed(log_file) == []


def test_a_terminal_has_one_bar_that_ends_full():
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True, force_interactive=True, color_system=None)
    bar = ProgressBar("sft", terminal)
    bar.show(3, 24, {"loss": "2.500"})
    bar.show(20, 24, {"loss": "[1.5]", "tokens/s": "1,000"})
    [task] = bar.bar.tasks
    assert (task.completed, task.total, task.fields["values"]) == (20, 24, "loss [1.5]  tokens/s 1,000")
    bar.close(finished=True)
    bar.close(finished=False)
    last = terminal.file.getvalue().rpartition("sft ")[2]
    assert last.startswith("━━━━━━━━━━━━━━━━━━━━━━━━ 24/24")
    assert "loss [1.5]  tokens/s 1,000" in last


def test_a_bar_that_did_not_finish_stays_where_it_was():
    bar = ProgressBar("sft", Console(file=io.StringIO(), force_terminal=True))
    bar.show(3, 24, {})
    bar.close(finished=False)
    assert bar.bar.tasks[0].completed == 3


@pytest.mark.parametrize(
    ("terminal", "main", "kind"),
    [
        (True, True, ProgressBar),
        (False, True, ProgressLines),
        (True, False, NullProgress),
        (False, False, NullProgress),
    ],
)
def test_the_display_suits_where_it_is_printed(monkeypatch, terminal, main, kind):
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_interactive=terminal))
    monkeypatch.setattr(progress, "is_main", lambda: main)
    assert type(new_progress("ppo")) is kind


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (5, "0:05"), (220, "3:40"), (3820, "1:03:40"), (36000, "10:00:00")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
