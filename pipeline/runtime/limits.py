"""Limits of time and memory on code that is not the project's, such as a chat template that came with a model."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Stops its block with TimeoutError after `seconds`, and with MemoryError at `memory` bytes more than before it.

    The alarm is a signal, which Python gives to the main thread alone: in another there is no limit of time. Memory is
    counted as Linux does it (RLIMIT_AS, the address space); on other systems it has no limit.
    """
    with limited_time(seconds), limited_memory(memory):
        yield


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished after {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second: a destructor swallows exceptions
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    bounds = [used + size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
