"""TIES and DARE by hand, and the paper's rules with the numbers of its authors' formulas written out.

Rank 1: A = (1, 2) and (3, -1), B = 5 and 7.
"""

import pytest
import torch

from pipeline.adapters.algebra import evaluate
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.operators import dare, ties
from pipeline.adapters.updates import (
    Scales,
    scaled_factors,
    to_dense,
)


def test_ties_by_hand():
    x, y = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.5, -2.0, 0.5])
    assert ties([x, -y], 1.0).tolist() == [1.0, 1.5, -0.75]  # the sign is elected after the weight -1
    assert ties([x, y], 1.0).tolist() == [0.75, -2.0, -1.0]
    assert ties([torch.tensor([1.0, -4.0, 2.0, 3.0])], 0.5).tolist() == [0.0, -4.0, 0.0, 3.0]
    assert ties([torch.tensor([1.0]), torch.tensor([-1.0])], 1.0).tolist() == [0.0]


def test_dare_is_drawn_from_its_seed_alone():
    ones = torch.ones(200, 100).double()
    torch.manual_seed(1)
    first = dare(ones, 0.9, 5, "q")
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, dare(ones, 0.9, 5, "q"))
    assert not torch.equal(first, dare(ones, 0.9, 6, "q"))
    assert not torch.equal(first, dare(ones, 0.9, 5, "k"))
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 10.0]).double())
    assert first.mean().item() == pytest.approx(1, abs=0.1)  # standard error 0.02
    assert torch.equal(dare(ones, 0.0, 5, "q"), ones)


A1, A2, A3 = (torch.tensor([row]) for row in ([1.0, 2.0], [3.0, -1.0], [-2.0, 4.0]))


B1, B2, B3 = (torch.tensor([[x]]) for x in (5.0, 7.0, 11.0))


PAPER = {name: {"q": scaled_factors(b, a)} for name, b, a in (("x", B1, A1), ("y", B2, A2), ("z", B3, A3))}


@pytest.mark.parametrize(
    ("text", "b", "a"),
    [
        ("paper(x + y)", 6.0, [2.0, 0.5]),  # weights always sum to 1
        ("paper(3*x + y)", 5.5, [1.5, 1.25]),
        ("paper(avg(x, y))", 6.0, [2.0, 0.5]),
        ("paper(lerp(x, y, 0.25))", 5.5, [1.5, 1.25]),
        ("paper(-x)", -5.0, [1.0, 2.0]),
        ("paper(-x, neg=A)", 5.0, [-1.0, -2.0]),
        ("paper(-0.4*x, neg=A)", 5.0, [-0.4, -0.8]),  # unlearning: A <- -λ A, B unchanged
        # analogy: A = c0 A_aux + c1 A_aim + c1 A_auxlm, B = c0 B_aux + c1 B_aim - c1 B_auxlm
        ("paper(0.6*x + 0.4*(y - z))", 0.6 * 5 + 0.4 * 7 - 0.4 * 11, [0.6 + 1.2 - 0.8, 1.2 - 0.4 + 1.6]),
        # detox: A = A1 + λ(A1 - A2), B = B1 + λ(B1 + B2)
        (
            "paper(x - 0.4*(y - x), neg=A, normalise=no)",
            5 + 0.4 * (5 + 7),
            [1 + 0.4 * (1 - 3), 2 + 0.4 * (2 + 1)],
        ),
        ("paper(x + y, normalise=no)", 12.0, [4.0, 1.0]),
    ],
)
def test_the_papers_rules_by_hand(text, b, a):
    part = evaluate(parse(text), PAPER)["q"]
    torch.testing.assert_close(to_dense(part), b * torch.tensor([a], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_papers_rules_for_ia3_by_hand():
    x, y, z = (torch.tensor(row).double() for row in ([2.0, 0.5], [1.0, 3.0], [0.0, 1.5]))
    adapters = {name: {"q": Scales(vector, False)} for name, vector in (("x", x), ("y", y), ("z", z))}

    def vector(text):
        return evaluate(parse(text), adapters)["q"].l

    torch.testing.assert_close(vector("paper(x + y)"), (x + y) / 2)
    torch.testing.assert_close(vector("paper(-x)"), 2 - x)
    torch.testing.assert_close(vector("paper(-0.7*x)"), 1.7 - 0.7 * x)
    torch.testing.assert_close(vector("paper(0.6*x + 0.4*(y - z))"), 1 + 0.6 * (x - 1) + 0.4 * (y - z))


def test_the_papers_sum_is_not_the_sum():
    """Its cross terms B1 A2 and B2 A1 are there, which is why it is for reproduction only."""
    factor_wise, exact = (to_dense(evaluate(parse(text), PAPER)["q"]) for text in ("paper(x + y)", "0.5*x + 0.5*y"))
    torch.testing.assert_close(factor_wise, exact + (B1 @ A2 + B2 @ A1 - B1 @ A1 - B2 @ A2).double() / 4)
