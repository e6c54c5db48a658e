"""Modules without weights, filled with weights: what a process needs that holds only a piece of them."""

import pytest
import torch

from pipeline.config.dials import Adapter
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import ValueHead
from pipeline.models.sharding import full_state_dict, gathered, load_full_state_dict, meta_copy

IDS = torch.tensor([[1, 5, 7, 4, 9, 3]])
MASK = torch.ones_like(IDS).bool()


@pytest.fixture(params=["gpt2", "llama", "lora"])
def module(request, make_model):
    """Tied (GPT-2) and untied embeddings, an adapter, buffers that no state_dict has (Llama's)."""
    policy = make_model("gpt2" if request.param == "gpt2" else "llama", seed=3)
    if request.param == "lora":
        policy = wrap_with_adapter(policy, Adapter(adapter="lora"))
    return ActorCritic(policy, ValueHead(16), 0.7, 0).eval()


def outputs(module):
    with torch.no_grad():
        return module(IDS, MASK, 4)


def test_an_empty_copy_holds_nothing_and_filled_it_is_the_module(module):
    empty = meta_copy(module)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert [name for name, p in empty.named_parameters() if p.requires_grad] == trainable
    before = outputs(module)
    copy = load_full_state_dict(empty, full_state_dict(module))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # the copy has weights of its own
    for ours, theirs in zip(outputs(copy), before, strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_stay_one(make_model):
    model = make_model("gpt2", seed=3)
    weights = full_state_dict(model)
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    assert weights["lm_head.weight"] is not model.lm_head.weight
    copy = load_full_state_dict(meta_copy(model), weights)
    assert copy.lm_head.weight.data_ptr() == copy.transformer.wte.weight.data_ptr()


def test_only_the_named_weights_are_gathered(module):
    assert set(full_state_dict(module, {"critic.weight"})) == {"critic.weight"}


def test_weights_of_another_module_are_an_error(module):
    weights = full_state_dict(module)
    lacking = {name: w for name, w in weights.items() if name != "critic.bias"}
    with pytest.raises(ValueError, match=r"missing \['critic.bias'\]"):
        load_full_state_dict(meta_copy(module), lacking)
    with pytest.raises(ValueError, match=r"unused \['v_head.weight'\]"):
        load_full_state_dict(meta_copy(module), {**weights, "v_head.weight": torch.ones(1)})


def test_gathered_weights_are_given_back(module):
    empty = meta_copy(module)
    for _ in range(2):
        with gathered(module, empty) as policy:
            assert policy is empty
            assert torch.equal(outputs(policy)[0], outputs(module)[0])
        assert {p.device.type for _, p in empty.named_parameters(remove_duplicate=False)} == {"meta"}
    with pytest.raises(KeyError), gathered(module, empty):
        raise KeyError
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    with gathered(module, None) as policy:
        assert policy is module


def test_a_forward_put_on_an_instance_does_not_follow_its_copy(make_model):
    """As trainers do: the copy's would still run the original."""
    model = make_model("llama", seed=3)
    forward = model.forward
    model.forward = lambda *given, **named: forward(*given, **named)
    copy = load_full_state_dict(meta_copy(model), {name: 0 * w for name, w in full_state_dict(model).items()})
    with torch.no_grad():
        assert copy(IDS).logits.abs().max() == 0
        assert model(IDS).logits.abs().max() > 0
