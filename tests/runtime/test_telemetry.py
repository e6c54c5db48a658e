"""No telemetry unless the user turns it on. Each test runs in a fresh process: the setting is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "CI")


def run_python(script: str, folder: Path, **env: str) -> str:
    """What the script prints, run online and with no setting of telemetry but those given."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder, env=kept | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["", "import transformers"], ids=["alone", "after transformers"])
@pytest.mark.parametrize(("value", "disabled"), [(None, True), ("0", False), ("1", True)])
def test_a_stage_disables_telemetry_unless_the_user_has_set_it(tmp_path, first, value, disabled):
    script = f"{first}\nimport pipeline.ppo\nfrom huggingface_hub import constants\n"
    env = {} if value is None else {"HF_HUB_DISABLE_TELEMETRY": value}
    assert run_python(script + "print(constants.HF_HUB_DISABLE_TELEMETRY)", tmp_path, **env) == f"{disabled}\n"


TRAINER = """
import socket
import pipeline
from huggingface_hub.utils import _telemetry
sent, connected = [], []
_telemetry._send_telemetry_in_thread = lambda **request: sent.append(request["topic"])
def refuse(self, address):
    connected.append(address)
    raise OSError("no network in this test")
socket.socket.connect = refuse
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from pipeline.data.tokenizer import train_tokenizer
tokenizer = train_tokenizer("char", ["abc"], 10)
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
rows = Dataset.from_list([{"input_ids": [3, 4, 5]}])
arguments = SFTConfig(output_dir="out", report_to="none", use_cpu=True, bf16=False, max_length=None)
SFTTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=rows, processing_class=tokenizer)
_telemetry._TELEMETRY_QUEUE.join()
print(sent, connected)
"""


@pytest.mark.parametrize(("env", "sent"), [({}, []), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, ["trl/SFTTrainer"])])
def test_a_trainer_of_trl_sends_nothing_unless_the_user_lets_it(tmp_path, env, sent):
    """TRL calls `huggingface_hub.utils.send_telemetry` when a trainer is made; its sender stands in, for both cases."""
    assert run_python(TRAINER, tmp_path, **env).splitlines()[-1] == f"{sent} []"
