"""LoRA updates in as few ranks as they need, or fewer: truncated singular value decompositions, in float64."""

import torch
from torch import Tensor

from pipeline.adapters.updates import Factors, Update

ROUNDING = 1e-9
"""A singular value below this share of `Factors.added_norm` is rounding error. The largest singular value is no
measure of that: of a - a it is rounding error itself."""


def compress_factors(factors: Factors, rank: int = 0) -> tuple[Factors, float]:
    """The update in as few ranks as it needs, or in at most `rank` (0: no limit), and the share of |dW|^2 discarded.

    QR of both factors, then the SVD of the small product of the triangles: the SVD of dW (Eckart & Young 1936) at the
    cost of the rank, not of the matrix. An update that needs all the ranks it has comes back as it is, to the bit.
    """
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    needed = int((s > ROUNDING * factors.added_norm).sum())
    kept = min(needed, rank or needed)
    if kept == factors.rank:
        return factors, 0.0
    energy = s[:needed].square()
    discarded = (energy[kept:].sum() / energy.sum()).item() if kept < needed else 0.0
    if not kept:  # dW = 0; PEFT has no rank 0
        b, a = torch.zeros_like(factors.b[:, :1]), torch.zeros_like(factors.a[:1])
    else:
        root = s[:kept].sqrt()
        b, a = (q_b @ u[:, :kept]) * root, (root * (q_a @ v[:kept].T)).T
    return Factors(b, a, factors.added_norm, factors.bias), discarded


def compress_update(update: Update, rank: int = 0) -> tuple[Update, dict[str, float]]:
    """The update with each module's factors compressed, and each module's discarded share of |dW|^2.

    IA3 stays as it is.
    """
    compressed = {
        module: compress_factors(part, rank) if isinstance(part, Factors) else (part, 0.0)
        for module, part in update.items()
    }
    return {m: part for m, (part, _) in compressed.items()}, {m: lost for m, (_, lost) in compressed.items()}


def factorize(matrix: Tensor) -> Factors:
    """Factors of dW (out, in) by its SVD, in as many ranks as it has (one of zeros if it has none)."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    norm = matrix.norm().item()
    kept = max(1, int((s > ROUNDING * norm).sum()))
    root = s[:kept].sqrt()
    return Factors(u[:, :kept] * root, root[:, None] * v[:kept], norm)
