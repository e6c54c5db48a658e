"""An adapter as what it does to each module of its base, and weighted sums of these: exact, in float64.

    LoRA    a module's update is dW = b a, b (out, r) with the scale alpha/r in it, a (r, in); no change is dW = 0
    IA3     a module's input or output is multiplied by l (n,);                             no change is l = 1

A sum of LoRA updates puts their factors side by side, so it has no cross terms and no approximation whatever the ranks
and scales: [w1 b1, w2 b2] [a1; a2] = w1 b1 a1 + w2 b2 a2. IA3 is added as its distance from one, l = 1 + sum w (l - 1).
A module that an adapter leaves alone counts as no change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config.errors import UserError


class AlgebraError(UserError):
    """Adapters that cannot be combined as asked; the message names them and what differs."""


@dataclass(frozen=True)
class Factors:
    """A LoRA update of one module, dW = b @ a; float64."""

    b: Tensor  # (out, r), the scale in it
    a: Tensor  # (r, in)
    added_norm: float  # sum of |w| |b| |a| (Frobenius) over all that was added to make it
    bias: Tensor | None = None  # (out,), added to the module's own

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Scales:
    """What IA3 multiplies a module's output by, or its input (`feedforward`); float64."""

    l: Tensor  # (n,)  # noqa: E741  # the paper's letter
    feedforward: bool


ModuleUpdate = Factors | Scales
Update = Mapping[str, ModuleUpdate]
"""What an adapter does to each module, by the module's name in the base; all of one kind."""


def scaled_factors(b: Tensor, a: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Factors:
    """The update scale * b @ a (and scale * bias) in float64; b (out, r), a (r, in), bias (out,)."""
    b, a = scale * b.double(), a.double()
    return Factors(b, a, b.norm().item() * a.norm().item(), None if bias is None else scale * bias.double())


def to_dense(factors: Factors) -> Tensor:
    """dW (out, in)."""
    return factors.b @ factors.a


def update_kind(update: Update) -> str:
    """LoRA or IA3."""
    return "LoRA" if any(isinstance(part, Factors) for part in update.values()) else "IA3"


def has_bias(update: Update) -> bool:
    """Whether a module's bias is changed (lora_bias)."""
    return any(isinstance(part, Factors) and part.bias is not None for part in update.values())


def frobenius_norm(factors: Factors) -> float:
    """Norm of dW, without forming it: that of the product of two triangles."""
    r_b, r_a = (torch.linalg.qr(matrix, mode="r").R for matrix in (factors.b, factors.a.T))
    return (r_b @ r_a.T).norm().item()


def inner_product(x: Factors, y: Factors) -> float:
    """Sum over the entries of dW_x * dW_y, without forming them."""
    return ((x.b.T @ y.b) * (x.a @ y.a.T)).sum().item()


def update_norm(update: Update) -> float:
    """Norm of the whole update: of every dW and bias, or of every l - 1."""
    return sum(module_norm(part) ** 2 for part in update.values()) ** 0.5


def module_norm(part: ModuleUpdate) -> float:
    """Norm of one module's dW and bias, or of its l - 1."""
    if isinstance(part, Scales):
        return (part.l - 1).norm().item()
    norm = frobenius_norm(part)
    return norm if part.bias is None else (norm**2 + part.bias.square().sum().item()) ** 0.5


def cosine(x: Update, y: Update) -> float:
    """Of the angle between two updates of one kind, as vectors of all that they change; 0 if either changes nothing."""
    product = 0.0
    for module in x.keys() & y.keys():
        p, q = x[module], y[module]
        if isinstance(p, Factors) and isinstance(q, Factors):
            product += inner_product(p, q) + (0.0 if p.bias is None or q.bias is None else (p.bias @ q.bias).item())
        elif isinstance(p, Scales) and isinstance(q, Scales):
            product += ((p.l - 1) @ (q.l - 1)).item()
    norms = update_norm(x) * update_norm(y)
    return product / norms if norms else 0.0


def add(terms: Sequence[tuple[str, float, Update]]) -> Update:
    """The weighted sum of updates, exactly: (name, weight, update) each; the names are for errors.

    Raises AlgebraError as `check_addable` does.
    """
    check_addable([(name, update) for name, _, update in terms])
    return {
        module: add_module([(weight, update[module]) for _, weight, update in terms if module in update])
        for module in sorted({module for _, _, update in terms for module in update})
    }


def add_module(terms: Sequence[tuple[float, ModuleUpdate]]) -> ModuleUpdate:
    """The weighted sum of what updates of one kind and shape do to one module: (weight, update) each."""
    lora = [(weight, part) for weight, part in terms if isinstance(part, Factors)]
    if not lora:
        scales = [(weight, part) for weight, part in terms if isinstance(part, Scales)]
        if len(scales) == 1 and scales[0][0] == 1:
            return scales[0][1]  # to the bit: 1 + (l - 1) is l up to rounding only
        change = torch.stack([weight * (part.l - 1) for weight, part in scales]).sum(0)
        return replace(scales[0][1], l=1 + change)
    biases = [weight * part.bias for weight, part in lora if part.bias is not None]
    return Factors(
        b=torch.cat([weight * part.b for weight, part in lora], 1),
        a=torch.cat([part.a for _, part in lora], 0),
        added_norm=sum(abs(weight) * part.added_norm for weight, part in lora),
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def check_addable(updates: Sequence[tuple[str, Update]]) -> None:
    """AlgebraError if LoRA meets IA3, a module's shape or place differs, or some but not all have a lora_bias."""
    first, reference = updates[0]
    for name, update in updates:
        if update_kind(update) != update_kind(reference):
            raise AlgebraError(
                f"adapter '{name}' is {update_kind(update)}, '{first}' is {update_kind(reference)}: a sum of the two "
                "depends on which acts first; train both of one kind"
            )
        if has_bias(update) != has_bias(reference):
            without = first if has_bias(update) else name
            raise AlgebraError(
                f"adapter '{without}': lora_bias: it has none, the others do; train all with lora_bias or none"
            )
    seen: dict[str, tuple[str, tuple]] = {}
    for name, update in updates:
        for module, part in sorted(update.items()):
            other, shape = seen.setdefault(module, (name, module_shape(part)))
            if module_shape(part) != shape:
                raise AlgebraError(
                    f"adapter '{name}': {module}: {module_shape(part)}, but '{other}' has {shape} there; train both "
                    "on one base, with one choice of feedforward_modules"
                )


def module_shape(part: ModuleUpdate) -> tuple:
    """(out, in) of dW; of l, its length and what it multiplies."""
    if isinstance(part, Factors):
        return (part.b.shape[0], part.a.shape[1])
    return (len(part.l), "its input" if part.feedforward else "its output")


def zero_update(updates: Sequence[Update]) -> Update:
    """The update that changes nothing, on every module of the given ones: LoRA rank-1 zeros, IA3 ones."""
    return {module: zero_module(part) for update in updates for module, part in sorted(update.items())}


def zero_module(part: ModuleUpdate) -> ModuleUpdate:
    """No change to a module, in the shape of a given one."""
    if isinstance(part, Scales):
        return replace(part, l=torch.ones_like(part.l))
    bias = None if part.bias is None else torch.zeros_like(part.bias)
    return Factors(torch.zeros_like(part.b[:, :1]), torch.zeros_like(part.a[:1]), 0.0, bias)
