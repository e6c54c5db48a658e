"""No telemetry unless the user turns it on. Each test runs in a fresh process: the setting is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "CI")

TRAINER = """
import socket
import pipeline.ppo
from huggingface_hub import constants
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
print(constants.HF_HUB_DISABLE_TELEMETRY, sent, connected)
"""


def run_python(script: str, folder: Path, **env: str) -> str:
    """The last line that the script prints, run online and with no setting of telemetry but those given."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder, env=kept | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("env", "printed"), [({}, "True [] []"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False ['trl/SFTTrainer'] []")]
)
def test_a_trainer_of_trl_sends_nothing_unless_the_user_lets_it(tmp_path, env, printed):
    """TRL calls `huggingface_hub.utils.send_telemetry` when a trainer is made; what would send it is replaced.

    With telemetry on, one message is sent: the test can see what it looks for. Nothing connects to the network.
    """
    assert run_python(TRAINER, tmp_path, **env) == printed


@pytest.mark.parametrize(("env", "disabled"), [({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")])
def test_an_earlier_import_of_huggingface_hub_changes_nothing(tmp_path, env, disabled):
    """As in a notebook, where transformers is often imported first."""
    script = "from huggingface_hub import constants\nimport pipeline\nprint(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert run_python(script, tmp_path, **env) == disabled
