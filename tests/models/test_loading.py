"""A directory as the base: an adapter alone or beside its base, pickles, weights that do not belong to it."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline import sft
from pipeline.adapters.base import read_base
from pipeline.config.dials import Adapter, Optim, Run
from pipeline.config.stages import SFT
from pipeline.data.tokenizer import ModelError
from pipeline.models.heads import load_reward_model, new_reward_model
from pipeline.models.loading import load_language_model, load_policy
from pipeline.models.saving import save_policy
from pipeline.runtime.finished import StageError
from pipeline.runtime.provenance import describe_parent

IDS = torch.tensor([[1, 6, 4, 9, 12, 5, 2]])
Q = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def edit_tensors(file, **changes):
    """The file with tensors changed, or (None) taken out; names with `__` for a dot."""
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, file, metadata={"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def made(saved, make_model, tmp_path_factory):
    """made(config): a PEFT adapter alone, which names its base by a path, and the logits of the two together."""
    root = tmp_path_factory.mktemp("alone")

    def make(config):
        folder = root / config.peft_type.value
        model = make_model("llama")
        model.name_or_path = str(saved["llama"])
        model = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(str(folder))
        return folder, logits(model)

    return make


@pytest.fixture
def alone(made, tmp_path):
    folder, _ = made(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return shutil.copytree(folder, tmp_path / "alone")


@pytest.fixture
def both(saved, tokenizer, tmp_path):
    """An adapter beside its base, as a stage leaves them."""
    save_policy(load_policy(saved["llama"], Adapter(adapter="lora", lora_r=2)), tokenizer, tmp_path / "both")
    return tmp_path / "both"


@pytest.mark.parametrize("config", [LoraConfig(r=2, task_type="CAUSAL_LM"), IA3Config(task_type="CAUSAL_LM")])
def test_an_adapter_alone_is_loaded_onto_the_base_that_it_names(config, made):
    folder, expected = made(config)
    assert not (folder / "config.json").exists()
    torch.testing.assert_close(logits(load_language_model(folder)), expected, atol=1e-5, rtol=0)
    dials = Adapter(adapter=config.peft_type.value.lower(), lora_r=2, lora_alpha=8)
    torch.testing.assert_close(logits(load_policy(folder, dials)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("named", ["/nowhere/base", "some/base"])
def test_a_base_that_is_not_found_is_named_with_the_way_on(named, alone):
    edit_config(alone, base_model_name_or_path=named)
    with pytest.raises(
        ModelError, match=f"alone: an adapter, and its base {named} .* cannot be loaded: .*merge.py merge"
    ):
        load_language_model(alone)


def test_an_adapter_that_names_no_base_is_refused(alone):
    edit_config(alone, base_model_name_or_path=None)
    with pytest.raises(
        ModelError, match=r"alone: an adapter that names no base: run `python stages/merge\.py merge .*"
    ):
        load_language_model(alone)


def test_weights_of_the_base_that_are_missing_or_unused_are_seen_beside_an_adapter(both):
    """transformers reports the adapter's alone, and draws or drops the base's in silence."""
    weights = both / "model.safetensors"
    whole = weights.read_bytes()
    assert load_language_model(both)
    edit_tensors(weights, **{f"{Q.replace('.', '__')}__weight": None})
    with pytest.raises(ModelError, match=f"both: not a whole language model: missing {Q}.weight"):
        load_language_model(both)
    with pytest.raises(ModelError, match=f"^{both}: not a whole language model: missing {Q}.weight"):
        read_base(both, "CAUSAL_LM")  # not the name of a view of it without the adapter
    weights.write_bytes(whole)
    edit_tensors(weights, score__weight=torch.zeros(1, 16))
    with pytest.raises(ModelError, match=r"head that would not be used: score\.weight"):
        load_language_model(both)


def test_an_adapter_of_another_base_is_refused(alone):
    weights = alone / "adapter_model.safetensors"
    whole = weights.read_bytes()
    layer = "base_model.model.model.layers.7.self_attn.q_proj"
    surplus = {f"{layer}.lora_{side}.weight": torch.zeros(shape) for side, shape in (("A", (2, 16)), ("B", (16, 2)))}
    edit_tensors(weights, **surplus)
    with pytest.raises(ModelError, match=r"weights of modules that the base does not have: model\.layers\.7"):
        load_language_model(alone)
    weights.write_bytes(whole)
    edit_tensors(weights, **{f"base_model.model.{Q}.lora_A.weight": torch.zeros(2, 24)})
    with pytest.raises(
        ModelError, match=rf"{Q}.lora_A.default.weight has shape \(2, 24\) in its weights, \(2, 16\) by"
    ):
        load_language_model(alone)
    edit_tensors(weights, **{f"base_model.model.{Q}.lora_A.weight": None})
    with pytest.raises(ModelError, match=f"missing {Q}.lora_A.default.weight"):
        load_language_model(alone)


def test_weights_of_another_shape_than_the_configs_are_named(saved, tmp_path):
    """A vocabulary that grew after the config was written, for one."""
    folder = shutil.copytree(saved["llama"], tmp_path / "grown")
    rows = load_file(folder / "model.safetensors")["lm_head.weight"].shape[0]
    edit_tensors(folder / "model.safetensors", lm_head__weight=torch.zeros(rows + 3, 16))
    says = rf"grown: lm_head.weight has shape \({rows + 3}, 16\) in its weights, \({rows}, 16\) by its config"
    with pytest.raises(ModelError, match=says):
        load_language_model(folder)


def pickled(folder, weights, pickle):
    torch.save(load_file(folder / weights), folder / pickle)
    (folder / weights).unlink()
    return folder


def test_pickled_weights_are_never_read(saved, alone, tokenizer, tmp_path):
    folder = shutil.copytree(saved["llama"], tmp_path / "model")
    pickled(folder, "model.safetensors", "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model/pytorch_model\.bin: a pickle can run any code when it is read"):
        load_language_model(folder)
    pickled(alone, "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(ModelError, match=r"alone/adapter_model\.bin: a pickle can run any code when it is read"):
        load_language_model(alone)
    new_reward_model(saved["llama"], tokenizer).save_pretrained(tmp_path / "reward")
    pickled(tmp_path / "reward", "model.safetensors", "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"reward/pytorch_model\.bin: a pickle can run any code when it is read"):
        load_reward_model(tmp_path / "reward")


def test_a_stage_starts_from_an_adapter_alone_and_knows_its_base_by_content(saved, alone, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " sat"}\n' * 2)
    base = shutil.copytree(saved["llama"], tmp_path / "base")
    edit_config(alone, base_model_name_or_path=str(base))
    run = Run(recipe="x", runs=str(tmp_path / "runs"), report_to="none", precision="fp32")
    optim = Optim(batch_size=2, micro_batch=1, learning_rate=0.0)
    dials = SFT(run=run, optim=optim, base=str(alone), train_file=str(rows), validation_file=str(rows))
    final = sft.train(dials)
    torch.testing.assert_close(logits(load_language_model(final)), logits(load_language_model(alone)))
    before = describe_parent(alone, final)["fingerprint"]
    assert describe_parent(alone, final)["fingerprint"] == before
    (base / "generation_config.json").write_text("{}")
    assert describe_parent(alone, final)["fingerprint"] != before
    shutil.rmtree(base)
    with pytest.raises(StageError, match=rf"alone: an adapter whose base .* cannot be used: {base}.*merge\.py merge"):
        describe_parent(alone, final)
