"""Random updates of LoRA and IA3, and what they change, dense."""

import torch

from pipeline.adapters.updates import (
    Factors,
    Scales,
    Update,
    scaled_factors,
    to_dense,
)

SHAPES = {"q": (6, 5), "k": (5, 5), "down": (4, 9)}


def lora(seed: int, ranks: dict[str, int], scale: float = 1.7, bias: bool = False) -> Update:
    """A random update with its ranks by module, away from unit scale."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for module, rank in ranks.items():
        out, into = SHAPES[module]
        b, a = (torch.randn(*shape, generator=g) for shape in ((out, rank), (rank, into)))
        made[module] = scaled_factors(b, a, scale, torch.randn(out, generator=g) if bias else None)
    return made


def ia3(seed: int, modules: str = "q k down") -> Update:
    g = torch.Generator().manual_seed(seed)
    return {m: Scales(1 + torch.randn(SHAPES[m][1], generator=g).double(), m == "down") for m in modules.split()}


def changes(update: Update) -> dict[str, torch.Tensor]:
    """What it changes, dense; a module it leaves alone is not there."""
    dense_changes = {m: to_dense(part) if isinstance(part, Factors) else part.l - 1 for m, part in update.items()}
    return {m: change for m, change in dense_changes.items() if change.abs().max() > 1e-9}


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for module in expected:
        torch.testing.assert_close(actual[module], expected[module], atol=tolerance, rtol=tolerance)


def plus(x, y, weight):
    return {m: x.get(m, 0) + weight * y.get(m, 0) for m in x.keys() | y.keys()}


ADAPTERS = {
    "a": lora(1, {"q": 2, "k": 1}),
    "b": lora(2, {"q": 3, "down": 2}, scale=0.4),
    "sft": lora(3, {"q": 1, "k": 2, "down": 4}),
    "yelp_lm": lora(4, {"k": 5}),
    "x.v2": lora(5, {"down": 1}, scale=-2.0),
}


SCALES = {"a": ia3(1), "b": ia3(2, "q"), "sft": ia3(3, "k down"), "yelp_lm": ia3(4), "x.v2": ia3(5, "down")}
