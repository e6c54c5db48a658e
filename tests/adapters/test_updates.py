"""Sums of updates against dense matrices in float64: by whole dW and never by factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_updates import ADAPTERS, SCALES, SHAPES, assert_same, changes, lora, plus

from pipeline.adapters.algebra import evaluate
from pipeline.adapters.compression import compress_update
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.updates import (
    add,
    cosine,
    frobenius_norm,
    to_dense,
    update_norm,
)

sizes = st.floats(0.01, 2) | st.floats(-2, -0.01)


ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), min_size=1)


@settings(deadline=None, max_examples=40)
@given(ranks, ranks, st.integers(0, 10**6), sizes, sizes)
def test_the_laws_on_updates(ranks_a, ranks_b, seed, scale, weight):
    a, b = lora(seed, ranks_a, scale), lora(seed + 1, ranks_b)
    whole_a, whole_b = changes(a), changes(b)

    def total(*terms):
        return compress_update(add([(f"t{i}", w, update) for i, (w, update) in enumerate(terms)]))[0]

    assert_same(changes(total((1, a))), whole_a)
    assert_same(changes(total((0.5, a), (0.5, a))), whole_a)
    assert_same(changes(total((1, a), (1, b))), changes(total((1, b), (1, a))))
    assert_same(changes(total((1, total((1, a), (1, b))), (-1, b))), whole_a)
    assert_same(changes(total((-1, total((-1, a))))), whole_a)
    assert changes(total((1, a), (-1, a))) == {}
    both = plus(whole_a, whole_b, weight)
    kept = {module: change for module, change in both.items() if change.abs().max() > 1e-9}
    assert_same(changes(total((1, a), (weight, b))), kept)
    for module, part in total((0.5, a), (0.5, a)).items():  # the sum needs no more ranks than its like
        assert part.rank == min(ranks_a[module], *SHAPES[module])
    for part in total((1, a), (-1, a)).values():
        assert part.rank == 1
        assert not part.b.any()
        assert not part.a.any()


def test_norms_and_angles_are_those_of_the_dense_updates():
    x, y = ADAPTERS["sft"], ADAPTERS["b"]
    flat = {name: torch.cat([changes(u).get(m, torch.zeros(SHAPES[m])).flatten() for m in SHAPES]) for name, u in
            (("x", x), ("y", y))}  # fmt: skip
    assert frobenius_norm(x["q"]) == pytest.approx(to_dense(x["q"]).norm().item(), rel=1e-12)
    assert update_norm(x) == pytest.approx(flat["x"].norm().item(), rel=1e-12)
    expected = torch.nn.functional.cosine_similarity(flat["x"], flat["y"], 0).item()
    assert cosine(x, y) == pytest.approx(expected, rel=1e-12)
    assert cosine(x, x) == pytest.approx(1)
    scales = torch.nn.functional.cosine_similarity(SCALES["a"]["q"].l - 1, SCALES["b"]["q"].l - 1, 0).item()
    assert cosine({"q": SCALES["a"]["q"]}, SCALES["b"]) == pytest.approx(scales)


def test_biases_are_added_where_all_have_one():
    x, y = lora(1, {"q": 2}, scale=3.0, bias=True), lora(2, {"q": 1, "k": 1}, bias=True)
    result = evaluate(parse("2*x - y"), {"x": x, "y": y})
    torch.testing.assert_close(result["q"].bias, 2 * x["q"].bias - y["q"].bias)
    torch.testing.assert_close(result["k"].bias, -y["k"].bias)
    g = torch.Generator().manual_seed(1)
    torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
    torch.testing.assert_close(x["q"].bias, 3.0 * torch.randn(6, generator=g).double())  # PEFT scales the bias too
