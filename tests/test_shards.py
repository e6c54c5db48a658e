"""Modules without weights, filled with weights: what a process needs that holds only a piece of them."""

import pytest
import torch

from pipeline.actor_critic import ActorCritic, ValueHead
from pipeline.config import Adapter
from pipeline.models import with_adapter
from pipeline.shards import empty_copy, filled, whole, whole_weights

IDS = torch.tensor([[1, 5, 7, 4, 9, 3]])
MASK = torch.ones_like(IDS).bool()


@pytest.fixture(params=["gpt2", "llama", "lora"])
def module(request, make_model):
    """Tied (GPT-2) and untied embeddings, an adapter, buffers that no state_dict has (Llama's)."""
    policy = make_model("gpt2" if request.param == "gpt2" else "llama", seed=3)
    if request.param == "lora":
        policy = with_adapter(policy, Adapter(adapter="lora"))
    return ActorCritic(policy, ValueHead(16), 0.7, 0).eval()


def outputs(module):
    with torch.no_grad():
        return module(IDS, MASK, 4)


def test_an_empty_copy_holds_nothing_and_filled_it_is_the_module(module):
    empty = empty_copy(module)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert [name for name, p in empty.named_parameters() if p.requires_grad] == trainable
    before = outputs(module)
    copy = filled(empty, whole_weights(module))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # the copy has weights of its own
    for ours, theirs in zip(outputs(copy), before, strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_stay_one(make_model):
    model = make_model("gpt2", seed=3)
    weights = whole_weights(model)
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    assert weights["lm_head.weight"] is not model.lm_head.weight
    copy = filled(empty_copy(model), weights)
    assert copy.lm_head.weight.data_ptr() == copy.transformer.wte.weight.data_ptr()


def test_only_the_named_weights_are_gathered(module):
    assert set(whole_weights(module, {"critic.weight"})) == {"critic.weight"}


def test_weights_of_another_module_are_an_error(module):
    weights = whole_weights(module)
    lacking = {name: w for name, w in weights.items() if name != "critic.bias"}
    with pytest.raises(ValueError, match=r"missing \['critic.bias'\]"):
        filled(empty_copy(module), lacking)
    with pytest.raises(ValueError, match=r"unused \['v_head.weight'\]"):
        filled(empty_copy(module), {**weights, "v_head.weight": torch.ones(1)})


def test_gathered_weights_are_given_back(module):
    empty = empty_copy(module)
    for _ in range(2):
        with whole(module, empty) as policy:
            assert policy is empty
            assert torch.equal(outputs(policy)[0], outputs(module)[0])
        assert {p.device.type for _, p in empty.named_parameters(remove_duplicate=False)} == {"meta"}
    with pytest.raises(KeyError), whole(module, empty):
        raise KeyError
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    with whole(module, None) as policy:
        assert policy is module


def test_a_forward_put_on_an_instance_does_not_follow_its_copy(make_model):
    """As trainers do: the copy's would still run the original."""
    model = make_model("llama", seed=3)
    forward = model.forward
    model.forward = lambda *given, **named: forward(*given, **named)
    copy = filled(empty_copy(model), {name: 0 * w for name, w in whole_weights(model).items()})
    with torch.no_grad():
        assert copy(IDS).logits.abs().max() == 0
        assert model(IDS).logits.abs().max() > 0
