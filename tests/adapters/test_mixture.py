"""Adapters side by side."""

import torch
from adapter_factory import assert_logits, logits, logits_by_hand, weighted_changes

from pipeline.adapters.mixture import Mixture


def test_a_mixture_is_every_sum_without_writing_one(factory):
    for kind, first, second in (
        ("llama", "plain", "rslora"),
        ("llama", "ia3", "ia3 keys"),
        ("gpt2", "gpt2", "gpt2 rslora"),
    ):
        folders = {"x.1": factory.adapter(first), "b": factory.adapter(second, 2)}
        base = factory.base(kind)
        mixture = Mixture(base, folders)
        for weights in ({"x.1": 1.0, "b": 0.5}, {"x.1": -0.3}, {}, {"b": 2.0}):
            mixture.set_weights(weights)
            expected = logits_by_hand(factory, kind, weighted_changes(weights, folders), "ia3" in first)
            assert_logits(logits(mixture.model), expected)
        assert torch.equal(logits(base), logits(factory.base(kind)))
