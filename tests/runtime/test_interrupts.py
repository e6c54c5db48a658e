"""What a stage does when it is told to stop; a stage of two processes stops as one."""

import signal

import pytest
from ranks import changed
from tiny import configs
from warm import launch

from pipeline.runtime import interrupts
from pipeline.runtime.interrupts import Interrupts
from pipeline.runtime.watchdog import Heartbeat


@pytest.fixture
def clock(monkeypatch):
    """Seconds; the test sets them."""
    now = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("phase", "at_once"), [("loading", True), ("measuring", True), ("stepping", False), ("finishing", False)]
)
def test_what_is_under_way_decides(phase, at_once, clock):
    told = Interrupts("toy")
    told.phase = phase
    assert not told.asked_to_stop()
    assert told.receive(signal.SIGTERM) is at_once
    assert told.asked_to_stop()


def test_a_second_signal_stops_at_once_but_not_what_a_launcher_passes_on(clock):
    told = Interrupts("toy")
    told.phase = "stepping"
    assert not told.receive(signal.SIGINT)
    clock[0] = 0.5
    assert not told.receive(signal.SIGTERM)
    clock[0] = 2.0
    assert told.receive(signal.SIGINT)


def test_who_hears_of_it_from_another_process_may_still_get_its_own(clock, monkeypatch):
    told = Interrupts("toy")
    told.phase = "stepping"
    monkeypatch.setattr(interrupts, "gather_object", lambda mine: [*mine, signal.SIGTERM])
    assert told.asked_to_stop()
    clock[0] = 5.0
    assert not told.receive(signal.SIGTERM)  # its first


@pytest.mark.parametrize(
    ("phase", "failure", "exits"),
    [("stepping", "", None), ("stepping", "process 1 died", 1), ("loading", "", 143), ("finishing", "", None)],
)
def test_the_watching_thread_tells_a_stop_from_the_end_of_another_process(phase, failure, exits, tmp_path, monkeypatch):
    told = Interrupts("toy")
    told.phase = phase
    heartbeat = Heartbeat("toy", tmp_path, 5.0, told)
    heartbeat.wakeup_read = 0
    failures = iter(["", failure, ""])
    monkeypatch.setattr(heartbeat, "_write", lambda _: heartbeat.stopping.set())  # once round
    monkeypatch.setattr(heartbeat, "find_failure", lambda: "")
    monkeypatch.setattr(heartbeat, "_wait_for_failure", lambda: next(failures) or next(failures))
    monkeypatch.setattr("select.select", lambda *_: ([0], [], []))
    monkeypatch.setattr("os.read", lambda *_: bytes([signal.SIGTERM]))
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    heartbeat._watch()
    assert ended == ([] if exits is None else [exits])


def test_two_processes_stop_after_the_same_rollout_when_one_is_told(folder):
    done = launch("ddp", "tests/faults.py", str(folder), "ddp", "term")
    assert done.returncode == 143, done.stderr[-3000:]
    line = "ppo: stopped by SIGTERM after step 2, with a checkpoint: the same command goes on from it"
    assert done.stderr.count(line) == 1, done.stderr[-3000:]
    config = changed(configs(folder, folder / "ddp_term", "faults")["ppo"])
    assert [path.name for path in config.run.folder("ppo").glob("checkpoints/*")] == ["2"]
