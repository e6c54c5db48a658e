"""A model with Python code of its own, put in front of every stage and command: refused in a sentence, never run.

The code writes a file when it is imported, and the control shows that it is imported where it is trusted.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from pipeline import chat, evaluate, merge, ppo, pretrain, reward, sft
from pipeline.adapters.compose import compose
from pipeline.adapters.inspect import inspect
from pipeline.adapters.merge import merge as merge_adapter
from pipeline.adapters.search import search
from pipeline.adapters.verify import verify
from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.errors import UserError
from pipeline.config.stages import PPO, SFT, Chat, Evaluate, Merge, Pretrain, Reward
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.loading import load_language_model
from pipeline.runtime.hashing import hash_value

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig): model_type = "own"
class OwnLM(LlamaForCausalLM): config_class = OwnConfig
class OwnClassifier(LlamaForSequenceClassification): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM",
       "AutoModelForSequenceClassification": "own.OwnClassifier"}  # fmt: skip


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Where the planted code writes; whoever is asked whether it may says yes."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "ran"


@pytest.fixture(params=["model", "tokenizer"])
def planted(request, saved, tmp_path, marker):
    """A stage's final/ whose model or tokenizer is code of its own."""
    folder = shutil.copytree(saved["llama"], tmp_path / "runs/x/sft/final")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    if request.param == "model":
        edit(folder / "config.json", model_type="own", architectures=["OwnLM"], auto_map=MAP)
    else:
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        edit(folder / "tokenizer_config.json", **own)
    done = {"fingerprint": hash_value([{}, {}]), "identity": {}, "files": {}, "stage": "sft"}
    (folder / "DONE.json").write_text(json.dumps(done))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = {
        "texts": {"text": "the cat sat on a mat."},
        "answers": {"prompt": "the cat", "completion": " sat on a mat."},
        "pairs": {"prompt": "the cat", "chosen": " sat on a mat.", "rejected": " no hat."},
        "prompts": {"prompt": "the cat"},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture(scope="module")
def adapters(saved, make_model, files, tmp_path_factory):
    """Folders of an adapter alone, and of what compose made of it, both on the saved llama."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    peft = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(next(weight for name, weight in peft.named_parameters() if "lora_B" in name))
    peft.save_pretrained(str(folder / "alone"))
    adapters = f"a={folder / 'alone'}"
    dials = {"base": str(saved["llama"]), "probe_file": files["prompts"]}
    compose(Compose(expression="0.5*a", adapters=adapters, out=str(folder / "made"), **dials))
    return folder


def commands(planted: Path, files: dict[str, str], adapters: Path, out: Path):
    """Every stage and command that reads a model, with the planted one in each place where it can stand."""
    model, run = str(planted), Run(recipe="x", runs=str(out), report_to="none", precision="fp32")
    optim, sampling = Optim(batch_size=4, micro_batch=2), Sampling(max_new_tokens=4)
    trained = {"run": run, "optim": optim}
    held_out = {"train_file": files["answers"], "validation_file": files["answers"]}
    pairs = {"train_file": files["pairs"], "validation_file": files["pairs"], "test_file": files["pairs"]}
    texts = {"train_file": files["texts"], "validation_file": files["texts"]}
    rollouts = {"rollouts": 2, "rollout_batch": 4, "critic_warmup": 1, "micro_batch": 2, "eval_prompts": 4}
    prompts = {"train_file": files["prompts"], "validation_file": files["prompts"]}
    named = {"adapters": f"a={adapters / 'alone'}", "base": model}
    written = {"out": str(out / "out"), "probe_file": files["prompts"]}
    chat_run = Run(recipe="x", runs=str(planted.parents[2]), report_to="none")
    return {
        "pretrain": lambda: pretrain.train(Pretrain(**trained, **texts, init=model)),
        "sft": lambda: sft.train(SFT(**trained, **held_out, base=model)),
        "sft_lora": lambda: sft.train(SFT(**trained, **held_out, base=model, adapter=Adapter(adapter="lora"))),
        "reward": lambda: reward.train(
            Reward(**trained, **pairs, prompts_file=files["prompts"], sampling=sampling, base=model, sft=model)
        ),
        "ppo": lambda: ppo.train(PPO(run=run, **rollouts, **prompts, sampling=sampling, sft=model, reward=model)),
        "merge_stage": lambda: merge.train(Merge(run=run, probe_file=files["prompts"], policy=model)),
        "evaluate": lambda: evaluate.train(
            Evaluate(
                run=run, prompts_file=files["prompts"], prompts=4, judge_file="", sampling=sampling,
                base=model, sft=model, policy=model, reward=model,
            )
        ),
        "chat": lambda: chat.talk(Chat(run=chat_run, policies="sft", prompt="the cat", sampling=sampling)),
        "compose": lambda: compose(Compose(expression="0.5*a", **named, **written)),
        "merge": lambda: merge_adapter(MergeAdapter(adapter=str(adapters / "alone"), base=model, **written)),
        "inspect": lambda: inspect(Inspect(adapter=str(adapters / "alone"), base=model)),
        "verify": lambda: verify(Verify(adapter=str(adapters / "made"), base=model, prompts_file=files["prompts"])),
        "search": lambda: search(
            Search(
                expression="$x*a", range="x=0:1", validation_file=files["answers"], test_file=files["pairs"],
                out=str(out / "out"), **named,
            )
        ),
    }  # fmt: skip


COMMANDS = list(commands(Path("a/b/c/d"), dict.fromkeys(("texts", "answers", "pairs", "prompts"), ""), Path(), Path()))


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_lies_with_a_model_is_never_run(command, planted, files, adapters, marker, tmp_path):
    with pytest.raises(UserError, match=r"Python code that lies beside it \(auto_map\), which is never run") as refusal:
        commands(planted, files, adapters, tmp_path / "out")[command]()
    assert str(refusal.value).startswith(f"{planted}: its ")
    assert not marker.exists()


def test_the_planted_code_would_run_where_it_is_trusted(planted, marker):
    kind = AutoConfig if "auto_map" in (planted / "config.json").read_text() else AutoTokenizer
    kind.from_pretrained(planted, trust_remote_code=True)
    assert marker.exists()


def test_of_a_known_architecture_transformers_own_class_is_loaded(planted, saved, marker):
    """An auto_map beside a model type that transformers has."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved["llama"] / file, planted / file)
    edit(planted / "config.json", auto_map=MAP)
    edit(planted / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    assert type(load_language_model(planted)).__module__.startswith("transformers.models.llama")
    assert type(load_tokenizer(planted)).__module__.startswith("transformers.")
    assert not marker.exists()
