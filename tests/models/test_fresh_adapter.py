"""On which layers a fresh adapter is: every name of `target_modules` counts, and what is written has one order."""

import json

import pytest
import torch
from peft import TaskType
from transformers import Olmo2Config, Olmo2ForCausalLM

from pipeline.config.dials import Adapter
from pipeline.data.tokenizer import ModelError
from pipeline.models.fresh_adapter import linear_names, wrap_with_adapter
from pipeline.models.heads import new_reward_model
from pipeline.models.loading import load_language_model, load_policy
from pipeline.models.multi_adapter import adapter_layers
from pipeline.models.saving import save_policy, save_with_base

LINEAR = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
}


class Backwards(set):
    """A set whose order is another than that of any other run."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), reverse=True))


def unknown_to_peft() -> Olmo2ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Olmo2ForCausalLM(Olmo2Config(vocab_size=19, pad_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj, v_proj", " v_proj ,q_proj,"])
def test_spaces_around_names_change_nothing(adapter, targets, make_model, capsys):
    model = wrap_with_adapter(make_model("llama"), Adapter(adapter=adapter, lora_r=2, target_modules=targets))
    assert len(adapter_layers(model)) == 4
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    said = f"adapter: {adapter}, linear layers: 4 (q_proj, v_proj), weights trained: {trained:,}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("{0},nowhere", "no module of this {kind} is called 'nowhere'; its linear layers are {all}"),
        ("{0}x,{1}", "no module of this {kind} is called '{0}x'; did you mean '{0}'.; its linear layers are"),
        ("all-linear", "no module of this {kind} is called 'all-linear'.*leave target_modules empty for all"),
        (" , ", "expected names of modules between commas, got ' , '"),
        ("{0},mlp", "mlp is a \\w+MLP .*, and only linear layers can have an adapter: {all}"),
    ],
)
def test_a_name_that_no_linear_layer_has_is_refused(adapter, kind, targets, says, make_model):
    names = LINEAR[kind]
    dials = Adapter(adapter=adapter, target_modules=targets.format(*names))
    pattern = "target_modules: " + says.format(*names, kind=kind, all=", ".join(names))
    with pytest.raises(ModelError, match=pattern):
        wrap_with_adapter(make_model(kind), dials)


def test_the_error_lists_the_layers_that_are_adapted_where_no_name_is_given(make_model):
    for kind, names in LINEAR.items():
        model = make_model(kind)
        assert linear_names(model) == names
        wrapped = wrap_with_adapter(model, Adapter(adapter="lora", lora_r=2))
        layers = [name.rpartition(".")[2] for name, _ in named_layers(wrapped)]
        assert sorted(set(layers)) == names


def named_layers(model):
    layers = {id(layer) for layer in adapter_layers(model)}
    return [(name, layer) for name, layer in model.named_modules() if id(layer) in layers]


def test_a_name_may_be_of_one_layer_alone(make_model):
    dials = Adapter(adapter="lora", lora_r=2, target_modules="layers.1.self_attn.q_proj")
    [(name, _)] = named_layers(wrap_with_adapter(make_model("llama"), dials))
    assert name.endswith("layers.1.self_attn.q_proj")


def test_a_layer_tied_to_the_embeddings_is_refused_and_a_head_of_its_own_is_not(make_model):
    """A merge into a tied head would change what every token is read as."""
    dials = Adapter(adapter="lora", lora_r=2, target_modules="lm_head")
    with pytest.raises(ModelError, match="lm_head shares its weight with the embeddings"):
        wrap_with_adapter(make_model("gpt2"), dials)
    assert len(adapter_layers(wrap_with_adapter(make_model("llama"), dials))) == 1


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_a_classifiers_names_are_its_own(adapter, saved, tokenizer):
    def wrap(targets):
        model = new_reward_model(saved["llama"], tokenizer)
        return wrap_with_adapter(model, Adapter(adapter=adapter, target_modules=targets), TaskType.SEQ_CLS)

    assert len(adapter_layers(wrap("k_proj"))) == 2
    with pytest.raises(ModelError, match="score is the classifier's head, which is trained whole"):
        wrap("k_proj,score")
    with pytest.raises(ModelError, match="no module of this llama is called 'lm_head'"):
        wrap("lm_head")


def test_ppo_checks_and_prints_the_names_too(saved, make_model, tokenizer, tmp_path, capsys):
    dials = Adapter(adapter="lora", lora_r=2, target_modules="q_proj, k_proj")
    with pytest.raises(ModelError, match="no module of this llama is called 'q_prj'"):
        load_policy(saved["llama"], Adapter(adapter="lora", target_modules="q_prj"))
    save_policy(load_policy(saved["llama"], dials), tokenizer, tmp_path)
    capsys.readouterr()
    load_policy(tmp_path, dials)  # SFT's adapter, trained further
    assert "adapter: lora, linear layers: 4 (k_proj, q_proj), weights trained: " in capsys.readouterr().out
    with pytest.raises(ModelError, match="its target_modules are k_proj,q_proj, not q_proj: leave"):
        load_policy(tmp_path, Adapter(adapter="lora", lora_r=2, target_modules="q_proj"))


def test_ia3_on_an_architecture_that_peft_does_not_know():
    """A traceback without target_modules; with them too, where PEFT asks for the feed-forward ones."""
    with pytest.raises(ModelError, match=r"PEFT does not know where IA3 belongs in olmo2; .* k_proj, "):
        wrap_with_adapter(unknown_to_peft(), Adapter(adapter="ia3"))
    model = unknown_to_peft()
    ids = torch.tensor([[1, 5, 3]])
    before = model(input_ids=ids).logits
    wrapped = wrap_with_adapter(model, Adapter(adapter="ia3", target_modules="k_proj,v_proj,down_proj"))
    assert len(adapter_layers(wrapped)) == 6
    assert not any(layer.is_feedforward for layer in adapter_layers(wrapped))
    assert torch.equal(wrapped(input_ids=ids).logits, before)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("task", [TaskType.CAUSAL_LM, TaskType.SEQ_CLS])
def test_what_is_a_set_is_written_in_one_order(adapter, task, saved, tokenizer, tmp_path):
    """Python's sets of names have another order in every process: the same command would leave another fingerprint."""

    def save(name, kind):
        if task == TaskType.SEQ_CLS:
            model = new_reward_model(saved["llama"], tokenizer)
        else:
            model = load_language_model(saved["llama"])
        torch.manual_seed(1)
        wrapped = wrap_with_adapter(model, Adapter(adapter=adapter, lora_r=2), task)
        config = wrapped.peft_config["default"]
        for field, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, field, kind(value))
        save_with_base(wrapped, tmp_path / name)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    torch.manual_seed(0)
    first = save("first", set)
    torch.manual_seed(0)
    assert save("second", Backwards) == first
    config = json.loads(first["adapter_config.json"])
    assert len(config["target_modules"]) == {"lora": 14, "ia3": 3}[adapter]
    assert list(config) == sorted(config)
    for field in ("target_modules", "feedforward_modules"):
        assert not isinstance(config.get(field, []), list) or config.get(field, []) == sorted(config.get(field, []))
