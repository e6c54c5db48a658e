"""Constraints and ranges: read, or refused with the dial's name."""

import pytest

from pipeline.adapters.search_dials import Constraint, read_constraints, read_ranges
from pipeline.config.errors import UserError


def test_constraints_are_read():
    figures, base = {"perplexity": 12.0, "kl": 3.0}, {"perplexity": 10.0, "kl": 0.0}
    of_base, kl, least = read_constraints("perplexity <= 1.05*base, kl<=6, perplexity >= 13")
    assert of_base == Constraint("perplexity", "<=", 1.05, True)
    assert of_base.excess(figures, base) == pytest.approx(1.5 / 10.5)
    assert kl.excess(figures, base) == 0
    assert least.excess(figures, base) == pytest.approx(1 / 13)


@pytest.mark.parametrize("text", ["perplexity < 3", "perplexity <= base*2", "ppl <= 3", "kl <= -", "kl"])
def test_other_constraints_are_refused(text):
    with pytest.raises(UserError, match="constraints: "):
        read_constraints(text)


@pytest.mark.parametrize("text", ["", "x=0:1", "x=0:1,y=1:0", "x=0:1,y=0:inf", "x=0:1,z=0:1", "x=0-1,y=0:1", "x=0:a"])
def test_other_ranges_are_refused(text):
    with pytest.raises(UserError, match="range: "):
        read_ranges(text, ["x", "y"])
    assert read_ranges("y=-1:2, $x=0:1.5", ["x", "y"]) == {"x": (0, 1.5), "y": (-1, 2)}
