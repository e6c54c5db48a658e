"""A stage's process: what its errors print, and what its memory costs."""

import ctypes
import errno
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from pipeline.config.errors import UserError
from pipeline.runtime import process
from pipeline.runtime.process import Interrupted, run_once, run_stage


def test_a_user_error_is_one_sentence_with_status_1_and_a_bug_is_a_traceback():
    def fails(config):
        raise UserError(f"{config}: no such file")

    with pytest.raises(SystemExit, match=r"^error: absent\.jsonl: no such file$"):
        run_stage(fails, "absent.jsonl")
    with pytest.raises(ZeroDivisionError):
        run_stage(lambda config: 1 // 0, None)


def test_a_full_disk_is_one_sentence_and_another_system_error_is_a_traceback():
    def fails(number):
        raise OSError(number, os.strerror(number), "runs/model.safetensors")

    with pytest.raises(SystemExit, match=r"^error: runs/model\.safetensors: no space left; .* untouched"):
        run_stage(fails, errno.ENOSPC)
    with pytest.raises(PermissionError):
        run_stage(fails, errno.EACCES)


def test_safetensors_and_torch_say_in_words_that_a_disk_is_full(capsys):
    def fails(words):
        raise RuntimeError(words)

    for words in ("I/O error: No space left on device (os error 28)", "[…inline_container.cc] . unexpected pos 8 vs 0"):
        with pytest.raises(SystemExit, match=r"^error: the disk: no space left"):
            run_stage(fails, words)
    with pytest.raises(RuntimeError, match="shapes"):
        run_stage(fails, "shapes do not match")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (Interrupted(15, "sft: stopped by SIGTERM after step 3"), 143, "sft: stopped by SIGTERM after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_interruption_is_one_line_with_the_status_of_its_signal(error, code, says, capsys):
    def fails(_):
        raise error

    with pytest.raises(SystemExit) as end:
        run_stage(fails, None)
    assert end.value.code == code
    assert capsys.readouterr().err == says


def test_a_number_that_is_not_finite_is_one_sentence():
    def fails(words):
        raise FloatingPointError(words)

    with pytest.raises(SystemExit, match=r"^error: sft: w is not finite$"):
        run_stage(fails, "sft: w is not finite")


@pytest.fixture
def two(monkeypatch):
    """This process as the main one of two; what the other one says each time they meet is counted."""
    place = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True, is_local_main_process=True)
    monkeypatch.setattr(process, "processes", lambda: place)
    monkeypatch.setattr(process, "SECONDS_BETWEEN_SIGNS", 0.05)
    place.meetings = []
    monkeypatch.setattr(process, "gather_object", lambda mine: place.meetings.append(mine) or [*mine, ("idle", None)])
    return place


def test_long_work_of_one_process_keeps_the_others_meeting(two):
    assert run_once(lambda: time.sleep(0.2) or "done") == "done"
    assert len(two.meetings) > 2
    assert two.meetings[-1] == [("done", "done")]


def test_what_one_process_raises_is_raised_on_all(two, monkeypatch):
    with pytest.raises(UserError, match="damaged"):
        run_once(lambda: (_ for _ in ()).throw(UserError("damaged")))
    failed = [("failed", UserError("damaged there"))]
    monkeypatch.setattr(process, "gather_object", lambda mine: failed + mine)
    two.process_index, two.is_main_process = 1, False
    with pytest.raises(UserError, match="damaged there"):
        run_once(lambda: 1 // 0)


def test_each_machine_may_do_it_for_its_own_processes(two, monkeypatch):
    two.process_index, two.is_main_process = 1, False  # the first of the second machine
    monkeypatch.setattr(process, "gather_object", lambda mine: [("done", "a"), *mine, ("idle", None)])
    assert run_once(lambda: "b", on_each_machine=True) == "b"
    assert run_once(lambda: "b") == "a"


PAGE_FAULTS = """
import resource, torch
from pipeline.runtime.process import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(5):
    faults()
print(sum(faults() for _ in range(5)))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator is not here")
def test_the_pages_of_a_freed_tensor_are_used_again():
    """64 MiB, five times: each time 16,384 pages of 4 KiB, or 32 of 2 MiB, unless they were kept."""

    def page_faults(call):
        program = [sys.executable, "-c", PAGE_FAULTS.format(call=call)]
        return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)

    assert page_faults("") >= 5 * 32
    assert page_faults("keep_freed_memory()") < 32
