"""What a launch may not ask for: refused before any work. tests/chain/test_distributed.py has real launches."""

import pytest

from pipeline.config.errors import UserError
from pipeline.runtime import launch


def test_a_launch_of_another_precision_than_the_recipes_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "LAUNCH_PRECISION", "bf16")
    with pytest.raises(UserError, match="the launch says mixed_precision: bf16, the recipe precision: fp32"):
        launch.new_accelerator("fp32")
    assert launch.new_accelerator("bf16").num_processes == 1


@pytest.mark.parametrize("backend", ["DDP", "DEEPSPEED", "FSDP"])
def test_fp16_is_for_gpus_under_ddp(backend, monkeypatch):
    monkeypatch.setattr(launch, "requested_backend", lambda: backend)
    with pytest.raises(UserError, match=r"precision: fp16 wants a loss scale, .* on a CPU say --precision bf16"):
        launch.new_accelerator("fp16")


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
    launch.check_deepspeed(rest)
    with pytest.raises(UserError, match=f"the launch's DeepSpeed config says {dials}"):
        launch.check_deepspeed(rest | says)
