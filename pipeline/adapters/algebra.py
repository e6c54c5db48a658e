"""Adapters as what they do to their base's weights, added and compressed there: exact, in float64.

    LoRA    a module's update is dW = b a, b (out, r) with the scale alpha/r in it, a (r, in); nothing is dW = 0
    IA3     a module's input or output is multiplied by l (n,);                             nothing is l = 1

A sum of LoRA updates puts their factors side by side, so it has no cross terms and no approximation whatever the ranks
and scales: [w1 b1, w2 b2] [a1; a2] = w1 b1 a1 + w2 b2 a2. IA3 is added as its distance from one, l = 1 + sum w (l - 1);
a module that an adapter leaves alone counts as nothing. Adding the factors themselves (`paper`) mixes b1 with a2: it is
here to reproduce Zhang et al. (arXiv 2306.14870), not to be used.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.adapters.expressions import (
    Base,
    Call,
    Expression,
    Name,
    Negated,
    Product,
    Sum,
    is_number,
    names,
    value,
    weighted,
)
from pipeline.config.errors import UserError

NOTHING = 1e-9
"""A singular value below this share of sum |w| |b| |a| is rounding. Of the largest singular value, as is usual, it
could not be a share: of a - a all of them are rounding, the largest too."""


class AlgebraError(UserError):
    """Adapters that cannot be combined as asked; the message names them and what differs."""


@dataclass(frozen=True)
class Factors:
    """A LoRA update of one module, dW = b @ a; float64."""

    b: Tensor  # (out, r), the scale in it
    a: Tensor  # (r, in)
    size: float  # sum of |w| |b| |a| (Frobenius) over all that was added to make it
    bias: Tensor | None = None  # (out,), added to the module's own

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Scales:
    """What IA3 multiplies a module's output by, or its input (`feedforward`); float64."""

    l: Tensor  # (n,)  # noqa: E741  # the paper's letter
    feedforward: bool


Update = Mapping[str, Factors | Scales]
"""An adapter: what it does to each module, by the module's name in the base; all of one kind."""


def factors(b: Tensor, a: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Factors:
    """The update scale * b @ a (and scale * bias) in float64; b (out, r), a (r, in), bias (out,)."""
    b, a = scale * b.double(), a.double()
    return Factors(b, a, b.norm().item() * a.norm().item(), None if bias is None else scale * bias.double())


def dense(part: Factors) -> Tensor:
    """dW (out, in)."""
    return part.b @ part.a


def norm(part: Factors) -> float:
    """Frobenius norm of dW, without forming it: the norm of the product of two triangles."""
    return (_triangle(part.b) @ _triangle(part.a.T).T).norm().item()


def inner(x: Factors, y: Factors) -> float:
    """Sum over the entries of dW_x * dW_y, without forming them."""
    return ((x.b.T @ y.b) * (x.a @ y.a.T)).sum().item()


def length(update: Update) -> float:
    """Norm of the whole update: of every dW and bias, or of every l - 1."""
    return sum(_norm(part) ** 2 for part in update.values()) ** 0.5


def cosine(x: Update, y: Update) -> float:
    """Of the angle between two updates of one kind, as vectors of all that they change; 0 if either is nothing."""
    product = 0.0
    for module in x.keys() & y.keys():
        p, q = x[module], y[module]
        if isinstance(p, Factors) and isinstance(q, Factors):
            product += inner(p, q) + (0.0 if p.bias is None or q.bias is None else (p.bias @ q.bias).item())
        elif isinstance(p, Scales) and isinstance(q, Scales):
            product += ((p.l - 1) @ (q.l - 1)).item()
    return product / lengths if (lengths := length(x) * length(y)) else 0.0


def distance(x: Update, y: Update) -> float:
    """Relative error of x against y: length of x - y over length of y; of nothing against nothing 0."""
    size = length(y)
    error = length(add([("x", 1.0, x), ("y", -1.0, y)]))
    return error / size if size else error


# ------------------------------------------------------------------------------------------------- sums


def add(terms: Sequence[tuple[str, float, Update]]) -> Update:
    """The weighted sum of updates, exactly: (name, weight, update) each; the names are for errors.

    Raises AlgebraError when LoRA meets IA3, a module's shape or place differs, or some but not all have a lora_bias.
    """
    first, _, reference = terms[0]
    for name, _, update in terms:
        if kind(update) != kind(reference):
            raise AlgebraError(
                f"adapter '{name}' is {kind(update)}, '{first}' is {kind(reference)}: a sum of the two depends on "
                "which acts first; train both of one kind"
            )
        if has_bias(update) != has_bias(reference):
            without = first if has_bias(update) else name
            raise AlgebraError(
                f"adapter '{without}': lora_bias: it has none, the others do; train all with lora_bias or none"
            )
    found: dict[str, Factors | Scales] = {}
    for module in sorted({module for _, _, update in terms for module in update}):
        held = [(name, weight, update[module]) for name, weight, update in terms if module in update]
        _check_shapes(module, held)
        found[module] = _added([(weight, part) for _, weight, part in held])
    return found


def nothing(updates: Sequence[Update]) -> Update:
    """The update that changes nothing, on every module of the given ones: rank-1 zeros, or ones."""
    return {
        module: Factors(torch.zeros_like(part.b[:, :1]), torch.zeros_like(part.a[:1]), 0.0, _zeros(part.bias))
        if isinstance(part, Factors)
        else replace(part, l=torch.ones_like(part.l))
        for update in updates
        for module, part in sorted(update.items())
    }


def evaluate(expression: Expression, adapters: Mapping[str, Update]) -> Update:
    """What the expression stands for, exactly; terms are added in the order of their names, whatever the text's.

    ties and dare act on whole dW, which only a dense matrix holds: their results have as many ranks as they need.
    Raises AlgebraError for adapters that do not fit together, ExpressionError for a variable without a number.
    """
    named = [adapters[name] for name in names(expression)] or list(adapters.values())
    atoms = weighted(expression)
    if not atoms:
        return nothing(named)
    terms = [(str(atom), float(atoms[atom]), _atom(atom, adapters)) for atom in sorted(atoms, key=str)]
    left_alone = nothing(named)  # a module whose weights cancel stays a module of the result
    found = add(terms)
    return {module: found.get(module, left_alone[module]) for module in sorted({*found, *left_alone})}


def combined_heads(
    expression: Expression, heads: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], rule: str
) -> dict[str, Tensor]:
    """Whole layers trained beside the adapters (`modules_to_save`), combined by a rule; parameter by parameter.

    refuse: AlgebraError if there is any. first: as the first adapter in the expression that has one trained it, its
    weight aside. sum: base + sum w (head - base), float64; where the base has no such layer (a score head on a language
    model) the weights must sum to 1, for the sum would otherwise hold a part of nothing.
    """
    held = {name: heads[name] for name in names(expression) if heads.get(name)}
    if not held:
        return {}
    first = next(iter(held))
    if rule == "refuse":
        raise AlgebraError(
            f"adapter '{first}': modules_to_save: it has whole trained layers ({', '.join(held[first])}), which an "
            "expression does not say how to combine: say --heads first or --heads sum"
        )
    if rule == "first":
        return dict(held[first])
    weights = weighted(expression)
    if any(not isinstance(atom, Name) for atom in weights):
        raise AlgebraError(f"adapter '{first}': modules_to_save: heads have a sum, but no ties, dare or paper")
    found: dict[str, Tensor] = {}
    for parameter in sorted({parameter for head in held.values() for parameter in head}):
        trained = {name: head[parameter] for name, head in held.items() if parameter in head}
        terms = [(float(w), trained[str(atom)]) for atom, w in weights.items() if str(atom) in trained]
        if parameter not in base and (len(terms) != len(weights) or sum(weights.values()) != 1):
            raise AlgebraError(
                f"adapter '{first}': {parameter}: the base has no such layer, so heads can only be averaged: let every "
                f"adapter have one and the weights sum to 1 (they sum to {float(sum(weights.values())):g})"
            )
        start = base.get(parameter, torch.zeros(())).double()
        found[parameter] = start + sum(w * (head.double() - start) for w, head in terms)
    return found


# ------------------------------------------------------------------------------------------------- compression


def compressed(part: Factors, rank: int = 0) -> tuple[Factors, float]:
    """The update in as few ranks as it needs, or in at most `rank` (0: no limit), and the share of |dW|^2 discarded.

    QR of both factors, then the SVD of the small product of the triangles: the SVD of dW (Eckart & Young 1936) at the
    cost of the rank, not of the matrix. An update that needs all the ranks it has comes back as it is, to the bit.
    """
    q_b, r_b = torch.linalg.qr(part.b)
    q_a, r_a = torch.linalg.qr(part.a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    needed = int((s > NOTHING * part.size).sum())
    kept = min(needed, rank or needed)
    if kept == part.rank:
        return part, 0.0
    energy = s[:needed].square()
    discarded = (energy[kept:].sum() / energy.sum()).item() if kept < needed else 0.0
    if not kept:  # nothing at all; PEFT has no rank 0
        zeros = torch.zeros_like(part.b[:, :1]), torch.zeros_like(part.a[:1])
        return Factors(*zeros, part.size, part.bias), 0.0
    root = s[:kept].sqrt()
    return Factors((q_b @ u[:, :kept]) * root, (root * (q_a @ v[:kept].T)).T, part.size, part.bias), discarded


def compress(update: Update, rank: int = 0) -> tuple[Update, dict[str, float]]:
    """`compressed`, module by module: the update, and each module's discarded share of |dW|^2. IA3 stays as it is."""
    found = {m: compressed(part, rank) if isinstance(part, Factors) else (part, 0.0) for m, part in update.items()}
    return {m: part for m, (part, _) in found.items()}, {m: lost for m, (_, lost) in found.items()}


def from_dense(matrix: Tensor, bias: Tensor | None = None) -> Factors:
    """Factors of dW (out, in) by its SVD, in as many ranks as it has (one of zeros if it has none)."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    size = matrix.norm().item()
    kept = max(1, int((s > NOTHING * size).sum()))
    root = s[:kept].sqrt()
    return Factors(u[:, :kept] * root, root[:, None] * v[:kept], size, bias)


# ------------------------------------------------------------------------------------------------- beyond sums


def ties(updates: Sequence[Tensor], density: float) -> Tensor:
    """TIES of weighted updates of one shape (Yadav et al., arXiv 2306.01708): trim, elect a sign, mean of who agrees.

    Each keeps its `density` share of largest entries; an entry's sign is that of the sum over updates, and its value
    the mean of those that have this sign. The weights are in the updates before they vote, so that a negative one
    votes against.
    """
    trimmed = torch.stack([_trimmed(update, density) for update in updates])
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp(min=1)


def dare(update: Tensor, p: float, seed: int, module: str) -> Tensor:
    """DARE of an update (Yu et al., arXiv 2311.03099): each entry is dropped with probability p, else divided by 1 - p.

    The draw depends on seed and module alone: not on the order of modules, nor on torch's global generator.
    """
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    keep = torch.rand(update.shape, generator=generator, dtype=torch.float64) >= p
    return torch.where(keep, update / (1 - p), 0)


def paper_weights(expression: Expression, neg: str, normalise: bool) -> dict[str, tuple[float, float, float]]:
    """By adapter, the weights of its A and its B (LoRA) and of l - 1 (IA3) in the rules of Zhang et al. 2023.

    A weight multiplies both factors, a minus sign only the factor `neg`. With `normalise` the weights of the outermost
    sum are divided by their sum. A lone adapter is their unlearning: its weight, too, is on the factor `neg` alone.
    Raises AlgebraError for a function of adapters inside, and for weights that sum to 0.
    """
    outer = list(_signed_terms(expression, through_sums=True))
    if len(outer) == 1 and isinstance(outer[0][2], Name):
        sign, weight, adapter = outer[0]
        one_factor = float(sign * weight)
        return {str(adapter): (one_factor, 1.0, one_factor) if neg == "A" else (1.0, one_factor, one_factor)}
    total = sum(weight for _, weight, _ in outer) if normalise and len(outer) > 1 else Fraction(1)
    if not total:
        raise AlgebraError(f"paper({expression}): its weights sum to 0, so they cannot be made to sum to 1")
    found: dict[str, tuple[float, float, float]] = {}
    for sign, weight, part in outer:
        for name, s, w in _leaves(part, sign, weight / total):
            on_neg, on_other = float(s * w), float(w)
            old = found.get(name, (0.0, 0.0, 0.0))
            new = (on_neg, on_other, on_neg) if neg == "A" else (on_other, on_neg, on_neg)
            found[name] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])
    return found


def paper(expression: Expression, adapters: Mapping[str, Update], neg: str, normalise: bool) -> Update:
    """The expression by the factor-wise rules of Zhang et al. (arXiv 2306.14870), A and B each added by itself.

    Raises AlgebraError unless all adapters have the same modules and ranks, as the rules need.
    """
    weights = paper_weights(expression, neg, normalise)
    first = next(iter(weights))
    for name in weights:
        if _shape(adapters[name]) != _shape(adapters[first]):
            raise AlgebraError(
                f"adapter '{name}': paper(...) adds factors, so it needs the modules and ranks of '{first}'; write the "
                "sum without paper(...), which needs neither"
            )
        if has_bias(adapters[name]):
            raise AlgebraError(f"adapter '{name}': lora_bias: paper(...) has no rule for it")
    if kind(adapters[first]) == "IA3":
        return add([(name, w, adapters[name]) for name, (_, _, w) in weights.items()])
    found: dict[str, Factors | Scales] = {}
    for module in adapters[first]:
        parts = [(w, part) for name, w in weights.items() if isinstance(part := adapters[name][module], Factors)]
        a = torch.stack([w[0] * part.a for w, part in parts]).sum(0)
        b = torch.stack([w[1] * part.b for w, part in parts]).sum(0)
        found[module] = factors(b, a)
    return found


# ------------------------------------------------------------------------------------------------- private


def kind(update: Update) -> str:
    """LoRA or IA3."""
    return "LoRA" if any(isinstance(part, Factors) for part in update.values()) else "IA3"


def has_bias(update: Update) -> bool:
    return any(isinstance(part, Factors) and part.bias is not None for part in update.values())


def _atom(atom: Name | Call, adapters: Mapping[str, Update]) -> Update:
    if isinstance(atom, Name):
        return adapters[atom.name]
    if atom.function == "paper":
        neg, normalise = str(atom.option("neg")), atom.option("normalise") == "yes"
        return paper(atom.arguments[0], adapters, neg, normalise)
    updates = [evaluate(argument, adapters) for argument in atom.arguments]
    if any(has_bias(update) for update in updates):
        raise AlgebraError(f"{atom}: lora_bias: {atom.function} has no rule for it; leave it out, or use a sum")
    if len({kind(update) for update in updates}) > 1:
        add([(str(argument), 1.0, update) for argument, update in zip(atom.arguments, updates, strict=True)])
    numbers = {name: float(value(v)) for name, v in atom.options if not isinstance(v, str)}
    found: dict[str, Factors | Scales] = {}
    for module in sorted({module for update in updates for module in update}):
        parts = [update[module] for update in updates if module in update]
        _check_shapes(module, [(str(atom), 1.0, part) for part in parts])
        changes = [dense(part) if isinstance(part, Factors) else part.l - 1 for part in parts]
        if atom.function == "ties":
            change = ties(changes, numbers["density"])
        else:
            change = dare(changes[0], numbers["p"], int(numbers["seed"]), module)
        part = parts[0]
        found[module] = from_dense(change) if isinstance(part, Factors) else replace(part, l=1 + change)
    return found


def _added(terms: Sequence[tuple[float, Factors | Scales]]) -> Factors | Scales:
    lora = [(w, part) for w, part in terms if isinstance(part, Factors)]
    if not lora:
        scales = [(w, part) for w, part in terms if isinstance(part, Scales)]
        change = torch.stack([w * (part.l - 1) for w, part in scales]).sum(0)
        # 1 + (l - 1) is l up to rounding; an adapter alone stays itself to the bit
        alone = len(scales) == 1 and scales[0][0] == 1
        return scales[0][1] if alone else replace(scales[0][1], l=1 + change)
    biases = [w * part.bias for w, part in lora if part.bias is not None]
    return Factors(
        b=torch.cat([w * part.b for w, part in lora], 1),
        a=torch.cat([part.a for _, part in lora], 0),
        size=sum(abs(w) * part.size for w, part in lora),
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def _check_shapes(module: str, parts: Sequence[tuple[str, float, Factors | Scales]]) -> None:
    def shape(part: Factors | Scales) -> tuple:
        if isinstance(part, Factors):
            return (part.b.shape[0], part.a.shape[1])
        return (len(part.l), "its input" if part.feedforward else "its output")

    first, _, reference = parts[0]
    for name, _, part in parts:
        if shape(part) != shape(reference):
            raise AlgebraError(
                f"adapter '{name}': {module}: {shape(part)}, but '{first}' has {shape(reference)} there; train both on "
                "one base, with one choice of feedforward_modules"
            )


def _signed_terms(
    expression: Expression, through_sums: bool, sign: int = 1, weight: Fraction = Fraction(1)
) -> Iterator[tuple[int, Fraction, Expression]]:
    """(sign, weight >= 0, what they multiply); a sum counts as one unless it is the outermost and `through_sums`."""
    if isinstance(expression, Negated):
        yield from _signed_terms(expression.of, through_sums, -sign, weight)
    elif isinstance(expression, Product):
        number, adapter = expression.left, expression.right
        if not is_number(number):
            number, adapter = adapter, number
        size = value(number)
        yield from _signed_terms(adapter, False, -sign if size < 0 else sign, weight * abs(size))
    elif isinstance(expression, Sum) and through_sums:
        yield from _signed_terms(expression.left, True, sign, weight)
        yield from _signed_terms(expression.right, True, sign, weight)
    elif isinstance(expression, Call) and expression.function in ("avg", "lerp") and through_sums:
        for atom, share in weighted(expression).items():
            yield (sign if share > 0 else -sign), weight * abs(share), atom
    elif not isinstance(expression, Base):
        yield sign, weight, expression


def _leaves(expression: Expression, sign: int, weight: Fraction) -> Iterator[tuple[str, int, Fraction]]:
    for s, w, part in _signed_terms(expression, True, sign, weight):
        if isinstance(part, Name):
            yield part.name, s, w
        elif isinstance(part, Call) and part.function not in ("avg", "lerp"):
            raise AlgebraError(f"paper(...): {part}: it adds adapters only; put the function outside")
        else:
            yield from _leaves(part, s, w)


def _shape(update: Update) -> dict[str, int]:
    return {module: part.rank if isinstance(part, Factors) else len(part.l) for module, part in update.items()}


def _norm(part: Factors | Scales) -> float:
    if isinstance(part, Scales):
        return (part.l - 1).norm().item()
    return norm(part) if part.bias is None else (norm(part) ** 2 + part.bias.square().sum().item()) ** 0.5


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R


def _trimmed(update: Tensor, density: float) -> Tensor:
    """The update with all but its largest entries at 0; at least one is kept."""
    flat = update.flatten()
    kept = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(update)


def _zeros(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.zeros_like(bias)
