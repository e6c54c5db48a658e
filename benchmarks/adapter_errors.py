"""Relative errors of adapter sums: PEFT's add_weighted_adapter and pipeline.adapters against the dense sum.

    python benchmarks/adapter_errors.py [--size 2048]

One linear layer, two random adapters of each kind, several weights. What an adapter does is its forward on the identity
matrix minus the base's; the exact sum is that of the adapters' own changes in float64. Ours is loaded by PEFT as well,
in fp32. Then the time to compress a sum of two rank-32 updates of a size x size layer, against PEFT's full SVD. Prints
the table of docs/adapter-arithmetic.md.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pipeline.adapters.compression import compress_factors, compress_update
from pipeline.adapters.updates import Factors, ModuleUpdate, Scales, Update, add, scaled_factors
from pipeline.evaluation.report import markdown_table

IN, OUT = 24, 32
WEIGHTS = ((1.0,), (1.0, 1.0), (1.0, -1.0), (0.5, 0.5))
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["linear"]}
KINDS: dict[str, tuple[Any, Any]] = {
    "LoRA": (LoraConfig(**PLAIN), LoraConfig(**PLAIN)),
    "rsLoRA": (LoraConfig(**PLAIN, use_rslora=True), LoraConfig(**PLAIN, use_rslora=True)),
    "LoRA, ranks 4 and 8": (LoraConfig(**PLAIN), LoraConfig(**PLAIN | {"r": 8})),
    "LoRA + rsLoRA": (LoraConfig(**PLAIN), LoraConfig(**PLAIN, use_rslora=True)),
    "lora_bias": (LoraConfig(**PLAIN, lora_bias=True), LoraConfig(**PLAIN, lora_bias=True)),
    "LoRA, one of two layers each": (LoraConfig(**PLAIN), LoraConfig(**PLAIN | {"target_modules": ["second"]})),
    "IA3": (IA3Config(target_modules=["linear"], feedforward_modules=[]),) * 2,
}
MODES = ("linear", "svd", "cat")


class Layer(nn.Module):
    """Two layers on one input, their outputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.second = nn.Linear(IN, OUT), nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x), self.second(x)], -1)


def make_model(configs: Sequence[Any]) -> PeftModel:
    """The layer with an adapter for each config, named 0, 1, ..., away from their start."""
    model = get_peft_model(Layer(), configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def adapter_change(model: PeftModel, adapter: str) -> Tensor:
    """What the adapter adds to the outputs for the unit vectors and for 0, float64."""
    x = torch.cat([torch.eye(IN), torch.zeros(1, IN)])
    model.base_model.set_adapter(adapter)
    with_it = model(x).double()
    with model.disable_adapter():
        return with_it - model(x).double()


def read_update(model: PeftModel, adapter: str) -> Update:
    """The adapter as the algebra takes it."""
    update: dict[str, ModuleUpdate] = {}
    for name in ("linear", "second"):
        layer = getattr(model.base_model.model, name)
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter]
            bias = None if b.bias is None else b.bias.detach()
            update[name] = scaled_factors(b.weight.detach(), a, layer.scaling[adapter], bias)
        elif adapter in getattr(layer, "ia3_l", {}):
            update[name] = Scales(layer.ia3_l[adapter].detach().double().flatten(), False)
    return update


@torch.no_grad()
def add_here(model: PeftModel, weights: Sequence[float]) -> Tensor:
    """The change of the sum, compressed without loss and loaded by PEFT in fp32."""
    update, _ = compress_update(add([(str(n), weight, read_update(model, str(n))) for n, weight in enumerate(weights)]))
    first = next(iter(update.values()))
    if isinstance(first, Scales):
        config: Any = IA3Config(target_modules=list(update), feedforward_modules=[])
    else:
        ranks = {name: part.rank for name, part in update.items() if isinstance(part, Factors)}
        config = LoraConfig(
            r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(update),
            lora_bias=first.bias is not None,
        )  # fmt: skip
    fresh = get_peft_model(Layer(), config)
    for name, part in update.items():
        layer = getattr(fresh.base_model.model, name)
        if isinstance(part, Scales):
            layer.ia3_l["default"].copy_(part.l[:, None])
            continue
        layer.lora_A["default"].weight.copy_(part.a)
        layer.lora_B["default"].weight.copy_(part.b)
        if part.bias is not None:
            layer.lora_B["default"].bias.copy_(part.bias)
    return adapter_change(fresh, "default")


def add_by_peft(mode: str) -> Callable[[PeftModel, Sequence[float]], Tensor]:
    """The change of the sum by add_weighted_adapter."""

    def combine(model: PeftModel, weights: Sequence[float]) -> Tensor:
        names = [str(number) for number in range(len(weights))]
        ia3 = "ia3" in str(type(model.base_model)).lower()
        model.base_model.add_weighted_adapter(
            names, list(weights), "sum", **({} if ia3 else {"combination_type": mode})
        )
        return adapter_change(model, "sum")

    return combine


def format_errors(kind: str, combine: Callable[[PeftModel, Sequence[float]], Tensor]) -> str:
    """Relative error for each of WEIGHTS, or that it was refused; every case has a fresh model."""
    cells = []
    for weights in WEIGHTS:
        model = make_model(KINDS[kind])
        exact = sum(w * adapter_change(model, str(number)) for number, w in enumerate(weights))
        try:
            change = combine(model, weights)
        except ValueError:
            cells.append("refused")
            continue
        cells.append(f"{((change - exact).norm() / exact.norm()).item():.2g}".replace("e-0", "e-"))
    return " · ".join(cells)


def measure_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the layer whose sum is timed")
    size = parser.parse_args().size
    warnings.simplefilter("ignore")
    header = ("adapters", *(f"PEFT {mode}" for mode in MODES), "here")
    rows = [
        (
            kind,
            *(format_errors(kind, add_by_peft(mode)) if kind != "IA3" or mode == MODES[0] else "" for mode in MODES),
            format_errors(kind, add_here),
        )
        for kind in KINDS
    ]
    print("\n".join(markdown_table(header, rows)))
    print(f"\nweights {' · '.join(str(list(weights)) for weights in WEIGHTS)}")
    g = torch.Generator().manual_seed(0)
    halves = [scaled_factors(torch.randn(size, 32, generator=g), torch.randn(32, size, generator=g)) for _ in range(2)]
    both = add([("a", 1.0, {"m": halves[0]}), ("b", -0.5, {"m": halves[1]})])["m"]
    assert isinstance(both, Factors)
    whole = (both.b @ both.a).float()
    small = min(measure_seconds(lambda: compress_factors(both, 32)) for _ in range(3))
    full = measure_seconds(lambda: torch.linalg.svd(whole, full_matrices=True))
    print(f"{size} x {size}, 64 ranks to 32: {small:.3f} s, full SVD in fp32 {full:.1f} s: {full / small:.0f} times")


if __name__ == "__main__":
    main()
