"""Foreign code stops at its limits, and leaves nothing of them behind."""

import itertools
import resource
import signal
import sys
import threading
import time

import pytest

from pipeline.runtime.limits import limited

FREE = 2**30


def state():
    return (
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL),
        resource.getrlimit(resource.RLIMIT_AS),
    )


def test_a_loop_without_end_is_stopped():
    before, started = state(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"not finished after 0\.1 seconds"), limited(0.1, FREE):
        sum(1 for _ in itertools.count())
    assert time.monotonic() - started < 5
    assert state() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory has a limit on Linux alone")
def test_memory_without_end_is_refused():
    before = state()
    with pytest.raises(MemoryError), limited(60, 2**27):
        bytearray(2**34)  # more than any other thread gives back meanwhile
    assert len(bytearray(2**28)) == 2**28
    assert state() == before


def test_a_timer_of_another_goes_on():
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with limited(5, FREE):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_outside_the_main_thread_the_block_runs_without_an_alarm():
    done = []

    def run():
        with limited(0.01, FREE):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done
