"""A stage's process: what its errors print, and what its memory costs."""

import ctypes
import errno
import os
import subprocess
import sys

import pytest

from pipeline.config.errors import UserError
from pipeline.runtime.process import run_stage


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
