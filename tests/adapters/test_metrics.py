"""Figures of adapters on rows."""

import numpy as np
import pytest

from pipeline.adapters.metrics import token_losses
from pipeline.evaluation.statistics import mean_ci


def test_the_interval_of_a_loss_per_token_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    count = rng.integers(3, 30, 400).astype(float)
    nats = rng.normal(4 * count, np.sqrt(count))
    estimate = mean_ci(token_losses(-nats, count))
    assert estimate.value == pytest.approx(nats.sum() / count.sum())
    draws = rng.integers(0, 400, (2000, 400))
    spread = (nats[draws].sum(1) / count[draws].sum(1)).std()  # the bootstrap's
    assert (estimate.high - estimate.value) / 1.96 == pytest.approx(spread, rel=0.1)
