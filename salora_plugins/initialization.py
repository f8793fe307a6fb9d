"""Start values of the two factors: the weight's top singular directions, restricted to what the task uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .support.linear_algebra import truncated_svd


def pissa_factors(weights: Tensor, rank: int, scaling: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    A_0 = sqrt(S / s) V^T and B_0 = U sqrt(S / s), so that s B_0 A_0 is the best rank-r part of W (PiSSA, and the
    paper's start before the task restriction).

    Args:
        weights: W (..., d_out, d_in): one weight, or several of one shape at once.
        rank: r.
        scaling: The LoRA scaling s > 0.
        seed: Seed of the decomposition.

    Returns:
        A_0 (..., r, d_in) and B_0 (..., d_out, r), float32. Where r exceeds the rank of W the rest is zero.
    """
    u, s, vh = truncated_svd(weights, min(rank, *weights.shape[-2:]), seed)
    root = (s / scaling).sqrt()
    a, b = root[..., :, None] * vh, u * root[..., None, :]
    missing = rank - root.shape[-1]
    if missing:
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous()


def restrict_to_task(factor: Tensor, task_basis: Tensor) -> Tensor:
    """
    B_0 = U_T U_T^T U sqrt(S) from U sqrt(S) (the paper, section 4.2).

    Args:
        factor: (d_out, r).
        task_basis: U_T, (d_out, r_t) with orthonormal columns.
    """
    task_basis = task_basis.to(device=factor.device, dtype=torch.float32)
    return (task_basis @ (task_basis.T @ factor.float())).to(factor.dtype)
