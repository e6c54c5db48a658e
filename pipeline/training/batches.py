"""The order of the training rows: new in every epoch, in whole batches, the same on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from pipeline.data.tokenize import IGNORE_INDEX, in_batches

POOL = 50  # batches within which rows are sorted by length
FILLER_MARGIN = -np.inf  # of the filler pair, as no row's can be


def epoch_order(count: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None) -> list[int]:
    """Row numbers of one epoch, in batches of `batch_size`; `count`, the filler's number, makes the last one whole.

    With `lengths` each batch holds rows of like lengths, and the batches come in random order. transformers' own
    grouping runs from long to short within each fifty batches, and where length goes with the kind of text the model
    then chases one kind after the other. `lengths` must say nothing about the label (`pipeline.reward.pair_lengths`).
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count).tolist()
    if lengths is not None:
        pools = in_batches(order, POOL * batch_size)
        order = [row for pool in pools for row in sorted(pool, key=lengths.__getitem__)]
    batches = in_batches(order, batch_size)
    batches[-1] += [count] * (batch_size - len(batches[-1]))
    if lengths is not None:
        batches = [batches[number] for number in random.permutation(len(batches))]
    return [row for batch in batches for row in batch]


class EpochSampler(Sampler[int]):
    """Draws each epoch's order anew; `epoch` says which it is, so that a run that is resumed goes on in its own."""

    def __init__(self, draw: Callable[[int], list[int]], epoch: Callable[[], int]) -> None:
        self.draw, self.epoch, self.size = draw, epoch, len(draw(0))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.epoch()))


def with_filler(rows: Dataset, eos_id: int) -> Dataset:
    """The rows and, after them, one that teaches nothing: a lone EOS without a label, or a pair of them.

    Without it the last batch of an epoch is short, and Accelerate hands some of its rows to several processes.
    """
    ids = {name: [eos_id] for name in ("input_ids", "chosen_ids", "rejected_ids")}
    filler: dict[str, Any] = {**ids, "labels": [IGNORE_INDEX], "seq_lengths": [1], "margin": FILLER_MARGIN}
    row = Dataset.from_dict({name: [filler[name]] for name in rows.column_names}, features=rows.features)
    return concatenate_datasets([rows, row])
