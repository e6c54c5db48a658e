"""What `pipeline.runtime.internals` takes for granted of each library, held against the release that is installed."""

import ast
import warnings
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import wandb
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from pipeline.models.heads import new_reward_model
from pipeline.runtime import internals

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(path for folder in ("pipeline", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def has(library: str, thing: object, *names: str) -> None:
    """Fails with the library's name and release where one of its attributes is no longer there."""
    for name in names:
        owner = thing.__name__ if isinstance(thing, type) else type(thing).__name__
        assert hasattr(thing, name), (
            f"{library} {version(library)} no longer has {owner}.{name}: see pipeline/runtime/internals.py"
        )


@pytest.fixture
def adapted(make_model):
    return peft.get_peft_model(make_model("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2))


def test_peft_layers_say_which_adapters_they_read(adapted):
    layer = next(part for part in adapted.modules() if isinstance(part, BaseTunerLayer))
    has("peft", layer, "_active_adapter", "_disable_adapters")
    adapted.add_adapter("other", LoraConfig(task_type=TaskType.CAUSAL_LM, r=2))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert internals.active_adapters(layer) in ((["default"], False), ("default", False))
    internals.set_active_adapters(layer, ["other"])
    assert (layer.active_adapters, layer.disable_adapters) == (["other"], False)
    internals.set_active_adapters(layer, [], disabled=True)
    assert layer.disable_adapters
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained


def test_transformers_notes_that_an_adapter_was_loaded(adapted, saved, tmp_path):
    adapted.save_pretrained(tmp_path)
    adapted.base_model.model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(saved["llama"])
    has("transformers", model, "_hf_peft_config_loaded")
    assert not model._hf_peft_config_loaded
    model.load_adapter(tmp_path)
    assert model._hf_peft_config_loaded, f"transformers {version('transformers')}: _hf_peft_config_loaded says nothing"
    assert "peft_config" in vars(model)
    for name in [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]:
        model.set_submodule(name, model.get_submodule(name).get_base_layer())
    internals.forget_adapter(model)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").is_file()
    assert not (tmp_path / "whole/adapter_config.json").exists()


def test_transformers_keeps_how_it_named_the_weights_that_it_loaded(saved):
    model = AutoModelForCausalLM.from_pretrained(saved["llama"])
    has("transformers", model, "_weight_conversions")
    assert "_weight_conversions" in vars(model), "it is no longer an attribute that can be taken off an instance"


def test_transformers_saves_as_its_quantizer_says(saved, tmp_path):
    """An instance's `hf_quantizer` decides; without it the weights that are given are what is written."""
    model = AutoModelForCausalLM.from_pretrained(saved["llama"])

    class Quantizer:
        def is_serializable(self) -> bool:
            return False

        class quantization_config:
            quant_method = "of no kind"

    model.hf_quantizer = Quantizer()
    with pytest.raises((ValueError, AttributeError), match=r"of no kind|get_state_dict"):
        model.save_pretrained(tmp_path / "refused")
    internals.forget_quantization(model)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()


def test_transformers_names_the_layers_that_are_kept_whole():
    has("transformers", LlamaForCausalLM, "_no_split_modules")
    assert "LlamaDecoderLayer" in internals.layers_kept_whole(LlamaForCausalLM)


def test_trls_trainers_count_and_log_their_tokens(make_model, saved, tokenizer, tmp_path):
    ids = Dataset.from_list([{"input_ids": [1, 5, 6, 2]}] * 2)
    pairs = Dataset.from_list([{"chosen_ids": [1, 5, 2], "rejected_ids": [1, 6, 2]}] * 2)
    off = {"report_to": "none", "use_cpu": True, "max_length": None, **internals.checkpointing_arguments(False)}
    given = {"processing_class": tokenizer}
    scorer = new_reward_model(saved["llama"], tokenizer)
    trainers = [
        SFTTrainer(make_model("llama"), SFTConfig(str(tmp_path), **off), train_dataset=ids, **given),
        RewardTrainer(scorer, RewardConfig(str(tmp_path), **off), train_dataset=pairs, **given),
    ]
    for trainer in trainers:
        has("trl", trainer, "_total_train_tokens", "_metrics")
        internals.set_tokens_trained(trainer, 7)
        internals.log_tokens(trainer)
        assert trainer._metrics["train"]["num_tokens"] == [7] == [internals.tokens_trained(trainer)]


class GoesOn(TrainerCallback):
    """Puts back at the start what was summed up since the last log line, and looks at the next line."""

    def on_train_begin(self, args, state, control, **_):
        has("transformers", self.trainer, "_tr_loss", "_globalstep_last_logged")
        internals.set_running_averages(self.trainer, {"loss": 30.0, "last_logged": -2, "metrics": {"margin": [5.0]}})
        assert internals.running_averages(self.trainer)["metrics"]["margin"] == [5.0]

    def on_log(self, args, state, control, logs=None, **_):
        self.lines.append(logs)


def test_a_trainer_goes_on_from_its_running_averages(make_model, tokenizer, tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 2]}] * 2)
    off = {"report_to": "none", "use_cpu": True, "max_length": None, **internals.checkpointing_arguments(False)}
    arguments = SFTConfig(str(tmp_path), max_steps=1, logging_steps=1, disable_tqdm=True, save_strategy="no", **off)
    callback = GoesOn()
    trainer = SFTTrainer(
        make_model("llama"), arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    callback.trainer, callback.lines = trainer, []
    trainer.train()
    assert callback.lines[0]["margin"] == 5.0
    assert 10.0 < callback.lines[0]["loss"] < 15.0  # (30 and a step's loss) over three steps


def test_accelerate_forgets_its_state():
    has("accelerate", AcceleratorState, "_reset_state", "_shared_state")
    AcceleratorState(cpu=True)
    internals.reset_accelerator_state()
    assert AcceleratorState._shared_state == {}


def test_wandb_says_that_it_is_offline():
    for mode, is_offline in (("offline", True), ("online", False)):
        settings = wandb.Settings(mode=mode)
        has("wandb", settings, "_offline")
        assert settings._offline is is_offline


# the name of activation checkpointing


class OldArguments:
    """TrainingArguments before transformers 5.23."""

    gradient_checkpointing = False


class NewModel:
    def activation_checkpointing_enable(self, arguments):
        self.took = ("new", arguments)

    def gradient_checkpointing_enable(self, arguments):
        self.took = ("old", arguments)


class OldModel:
    def gradient_checkpointing_enable(self, arguments):
        self.took = ("old", arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(OldArguments, "gradient_checkpointing"), (TrainingArguments, "activation_checkpointing")],
)
def test_trainers_are_told_by_the_name_that_they_know(arguments, name, monkeypatch):
    if not hasattr(arguments, name):
        pytest.skip(f"transformers {version('transformers')} has the old name alone")
    monkeypatch.setattr(internals, "TrainingArguments", arguments)
    assert internals.checkpointing_arguments(True) == {name: True, f"{name}_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(("model", "name"), [(NewModel(), "new"), (OldModel(), "old")])
def test_a_model_is_told_by_the_name_that_it_knows(model, name):
    internals.enable_activation_checkpointing(model, context_fn="ours")
    assert model.took == (name, {"use_reentrant": False, "context_fn": "ours"})


def test_the_installed_release_has_no_complaint(make_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **internals.checkpointing_arguments(True))
        model = make_model("llama")
        internals.enable_activation_checkpointing(model)
    assert arguments.gradient_checkpointing
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


# and nowhere else


def foreign_privates(path: Path) -> set[str]:
    """Private names that a file uses, `getattr` and the like included, but does not define itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("pipeline")
        for alias in node.names
    }
    used |= {
        str(given.value)
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", ".pop", ".get"))
        for given in node.args
        if isinstance(given, ast.Constant)
    }
    return {name for name in used - own if name.startswith("_") and not name.endswith("__")}


def test_no_other_file_touches_a_librarys_private_attribute():
    found = {str(path.relative_to(ROOT)): names for path in FILES if (names := foreign_privates(path))}
    ours = found.pop("pipeline/runtime/internals.py")
    assert {"_active_adapter", "_weight_conversions", "_offline"} <= ours  # what is looked for would be seen
    assert found == {}
