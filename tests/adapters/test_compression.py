"""Fewer ranks: what is discarded is the tail of the spectrum, and what needs its ranks keeps its factors."""

import pytest
import torch
from random_updates import ADAPTERS, lora

from pipeline.adapters.compression import compress_factors, factorize
from pipeline.adapters.updates import (
    Factors,
    add,
    to_dense,
)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_what_a_rank_discards_is_the_tail_of_the_spectrum(rank):
    part = add([("a", 1.0, lora(7, {"q": 3})), ("b", -0.7, lora(8, {"q": 3}))])["q"]
    kept, discarded = compress_factors(part, rank)
    spectrum = torch.linalg.svdvals(to_dense(part))
    tail = (spectrum[rank:].square().sum() / spectrum.square().sum()).item()
    assert discarded == pytest.approx(tail, rel=1e-9, abs=1e-15)
    error = ((to_dense(kept) - to_dense(part)).norm() / to_dense(part).norm()).item()
    assert error == pytest.approx(tail**0.5, rel=1e-6, abs=1e-12)
    assert kept.rank == min(rank, 5)


def test_an_update_that_needs_its_ranks_keeps_its_factors():
    part = ADAPTERS["b"]["q"]
    assert compress_factors(part) == (part, 0.0)
    assert compress_factors(part, 3)[0] is part


def test_ranks_that_only_hold_rounding_go():
    a = lora(9, {"q": 3})["q"]
    noise = Factors(1e-11 * a.b.roll(1, 0), a.a.roll(1, 1), 1e-11 * a.added_norm)
    assert compress_factors(add([("a", 1.0, {"q": a}), ("noise", 1.0, {"q": noise})])["q"])[0].rank == 3
    small = Factors(1e-6 * a.b[:, :1].roll(1, 0), a.a[:1].roll(1, 1), 1e-6 * a.added_norm)
    assert compress_factors(add([("a", 1.0, {"q": a}), ("small", 1.0, {"q": small})])["q"])[0].rank == 4


def test_a_dense_update_and_its_factors():
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    assert factorize(matrix).rank == 4
    torch.testing.assert_close(to_dense(factorize(matrix)), matrix, atol=1e-13, rtol=0)
    assert factorize(torch.zeros(3, 2)).rank == 1
