"""A stage's process: what its errors print, and what its memory costs."""

import ctypes
import errno
import os
import subprocess
import sys

import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.runtime import process
from pipeline.runtime.process import stage_main


def test_a_users_error_is_one_sentence_with_status_1_and_a_bug_is_a_traceback():
    def fails(config):
        raise UserError(f"{config}: no such file")

    with pytest.raises(SystemExit, match=r"^error: absent\.jsonl: no such file$"):
        stage_main(fails, "absent.jsonl")
    with pytest.raises(ZeroDivisionError):
        stage_main(lambda config: 1 // 0, None)


def test_a_full_disk_is_one_sentence_and_another_system_error_is_a_traceback():
    def fails(number):
        raise OSError(number, os.strerror(number), "runs/model.safetensors")

    with pytest.raises(SystemExit, match=r"^error: runs/model\.safetensors: no space left; .* untouched"):
        stage_main(fails, errno.ENOSPC)
    with pytest.raises(PermissionError):
        stage_main(fails, errno.EACCES)


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


def test_a_launch_of_another_precision_than_the_recipes_is_refused(monkeypatch):
    monkeypatch.setattr(process, "TOLD", "bf16")
    with pytest.raises(UserError, match="the launch says mixed_precision: bf16, the recipe precision: fp32"):
        process.new_accelerator("fp32")
    assert process.new_accelerator("bf16").num_processes == 1


@pytest.mark.parametrize("asked", ["DDP", "DEEPSPEED", "FSDP"])
def test_fp16_is_for_gpus_under_ddp(asked, monkeypatch):
    monkeypatch.setattr(process, "asked", lambda: asked)
    with pytest.raises(UserError, match=r"precision: fp16 wants a loss scale, .* on a CPU say --precision bf16"):
        process.new_accelerator("fp16")


@pytest.mark.parametrize(
    ("says", "dials"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4.*micro_batch"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5.*max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: .*learning rates"),
        ({"bf16": {"enabled": True}}, "bf16: .*precision"),
    ],
)
def test_what_the_dials_decide_is_not_for_deepspeeds_config_to_say(says, dials):
    rest = {"gradient_accumulation_steps": 1, "gradient_clipping": "auto", "fp16": {"enabled": "auto"}}
    process.check_deepspeed(rest)
    with pytest.raises(UserError, match=f"the launch's DeepSpeed config says {dials}"):
        process.check_deepspeed(rest | says)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_stages_precision_is_that_of_matrix_products(precision, kind):
    weight = torch.ones(2, 2, requires_grad=True)
    with process.autocast(precision):
        assert (weight @ weight).dtype == kind
    assert weight.dtype == torch.float32


@pytest.mark.parametrize(("capability", "precision"), [("AVX512", "bf16"), ("AVX2", "fp32"), ("DEFAULT", "fp32")])
def test_auto_is_what_this_machine_is_fast_in(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert process.actual("auto") == precision
    assert process.actual("bf16") == "bf16"
    with process.autocast("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
