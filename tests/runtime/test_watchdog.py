"""What one process concludes from the others' heartbeat files. tests/chain/test_distributed.py has real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from pipeline.config.errors import UserError
from pipeline.runtime import watchdog
from pipeline.runtime.interrupts import Interrupts
from pipeline.runtime.watchdog import Heartbeat, check_same_inputs


@pytest.fixture
def watcher(tmp_path):
    """Process 0 of three, whose watching thread is not started."""
    heartbeat = Heartbeat("toy", tmp_path, 0.2, Interrupts("toy"))
    heartbeat.world = 3
    return heartbeat


def beat(watcher, rank=1, count=1, phase="update 4", failure="", pid=None, host=None):
    content = {"pid": pid or os.getpid(), "host": host or socket.gethostname(), "count": count, "phase": phase}
    (watcher.folder / f"{rank}.json").write_text(json.dumps({**content, "failure": failure}))


def test_processes_that_have_ended_or_go_on_writing_have_not_failed(watcher):
    for count in range(6):
        beat(watcher, count=count)
        assert watcher.find_failure() == ""
        time.sleep(0.1)


def test_silence_is_a_failure_after_the_timeout_and_not_before(watcher):
    beat(watcher, rank=2, host="elsewhere", pid=7)
    assert watcher.find_failure() == ""
    time.sleep(0.1)
    assert watcher.find_failure() == ""
    time.sleep(0.15)
    assert watcher.find_failure() == "process 2 (pid 7 on elsewhere) has given no sign of life for 0 s, in update 4"


def test_a_failure_is_named(watcher):
    beat(watcher, host="elsewhere", pid=7, failure="KeyError: 'text'")
    assert watcher.find_failure() == "process 1 (pid 7 on elsewhere) failed in update 4: KeyError: 'text'"


def test_a_dead_process_of_this_machine_is_seen_at_once(watcher):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    beat(watcher, pid=child.pid)
    assert watcher.find_failure() == ""
    child.kill()
    time.sleep(0.1)  # dead, and not yet waited for
    assert f"process 1 (pid {child.pid} on {socket.gethostname()}) died in update 4" == watcher.find_failure()
    child.wait()
    assert "died in update 4" in watcher.find_failure()


def test_a_phase_is_written_at_once_and_removed_at_a_good_end(watcher):
    watcher.enter("rollout 3")
    written = json.loads((watcher.folder / "0.json").read_text())
    assert (written["phase"], written["pid"], written["failure"]) == ("rollout 3", os.getpid(), "")
    watcher.thread.join = lambda: None
    watcher.wakeup_read, watcher.wakeup_write = os.pipe()
    watcher.stop(ValueError("bad\nvery bad"))
    assert json.loads((watcher.folder / "0.json").read_text())["failure"] == "ValueError: bad"
    watcher.wakeup_read, watcher.wakeup_write = os.pipe()
    watcher.stop(None)
    assert not watcher.folder.exists()


def test_who_fails_because_of_another_names_it(watcher, capsys):
    watcher.thread.join = lambda: None
    watcher.wakeup_read, watcher.wakeup_write = os.pipe()
    watcher.enter("update 9")
    beat(watcher, host="elsewhere", pid=7, failure="KeyError: 'text'")
    watcher.stop(RuntimeError("connection closed by peer"))
    says = (
        "error: toy: process 1 (pid 7 on elsewhere) failed in update 4: KeyError: 'text'; process 0 stops in update 9"
    )
    assert capsys.readouterr().err == says + "\n"


def test_a_file_that_cannot_be_read_is_passed_over(watcher):
    (watcher.folder / "1.json").write_text("{half")
    assert watcher.find_failure() == ""


def test_signals_are_as_before_when_a_stage_has_ended(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    heartbeat = Heartbeat("toy", tmp_path / "beats", 5.0, Interrupts("toy"))
    heartbeat.world = 2
    heartbeat.start()
    assert signal.getsignal(signal.SIGTERM) is not before
    os.write(heartbeat.wakeup_write, bytes([signal.SIGCHLD]))  # another signal wakes it and is not taken for the end
    time.sleep(0.2)
    assert heartbeat.thread.is_alive()
    heartbeat.stop(None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not heartbeat.thread.is_alive()


def test_one_process_alone_writes_nothing(tmp_path):
    heartbeat = Heartbeat("toy", tmp_path / "none", 1.0, Interrupts("toy")).start()
    heartbeat.enter("update 1")
    heartbeat.stop(None)
    assert not (tmp_path / "none").exists()


def test_another_fact_is_named_with_its_process(monkeypatch):
    facts = {"dials": {"a": 1}, "data": ["x"]}
    check_same_inputs("toy", facts)

    def gathered(hashes):
        return [*hashes, *hashes, hashes[0] | {"data": "f" * 64}]

    monkeypatch.setattr(watchdog, "gather_object", gathered)
    with pytest.raises(
        UserError, match=r"toy: process 2 was started with other data than process 0 \(ffffffff, not \w+"
    ):
        check_same_inputs("toy", facts)
