"""Each epoch's order: whole batches of like lengths, a new order in each, and the same mathematics on any number."""

from collections import Counter

import pytest
import torch
from datasets import Dataset

from pipeline.data.tokenize import IGNORE_INDEX
from pipeline.training.batches import EpochSampler, epoch_order, with_filler


def lengths_of(count):
    return torch.randint(1, 500, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order, size, lengths):
    """Share of slots that hold no token; the filler has one."""
    rows = [[[*lengths, 1][row] for row in batch] for batch in batches(order, size)]
    return 1 - sum(map(sum, rows)) / sum(max(row) * len(row) for row in rows)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 400, 401, 1003])
def test_an_epoch_is_every_row_once_in_whole_batches(count, grouped):
    lengths = lengths_of(count) if grouped else None
    order = epoch_order(count, 8, seed=1, epoch=0, lengths=lengths)
    assert len(order) % 8 == 0
    assert len(order) < count + 8
    assert Counter(row for row in order if row != count) == Counter(range(count))


@pytest.mark.parametrize("count", [1600, 1603])
def test_batches_hold_like_lengths_whether_or_not_they_divide_the_rows(count):
    lengths = lengths_of(count)
    for epoch in (0, 1):
        assert padding(epoch_order(count, 8, 0, epoch, lengths), 8, lengths) < 0.04
    assert padding(epoch_order(count, 8, 0, 0), 8, lengths) > 0.3  # chance


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_an_order_of_its_own_and_every_seed_another(grouped):
    lengths = lengths_of(103) if grouped else None
    orders = [tuple(epoch_order(103, 8, seed, epoch, lengths)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert tuple(epoch_order(103, 8, 1, 2, lengths)) == orders[-1]


def test_no_length_comes_first():
    lengths = lengths_of(800)
    firsts = [lengths[epoch_order(800, 8, seed, 0, lengths)[0]] for seed in range(40)]
    assert 150 < sum(firsts) / 40 < 350


def test_a_sampler_draws_the_epoch_that_it_is_in():
    epoch = 0
    sampler = EpochSampler(lambda number: [number] * 3, lambda: epoch)
    assert (len(sampler), list(sampler)) == (3, [0, 0, 0])
    epoch = 2
    assert list(sampler) == [2, 2, 2]


def test_the_filler_has_the_columns_of_the_rows_and_no_label():
    texts = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert with_filler(texts, 2)[:] == {"input_ids": [[5, 6], [2]], "labels": [[-100, 6], [IGNORE_INDEX]]}
    pairs = Dataset.from_list([{"chosen_ids": [5], "rejected_ids": [6], "margin": 0.5}])
    assert with_filler(pairs, 2)[1] == {"chosen_ids": [2], "rejected_ids": [2], "margin": -float("inf")}
