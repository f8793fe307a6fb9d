"""Start values of the two factors: the weight's top singular directions, restricted to what the task uses."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_algebra import truncated_svd


def pissa_factors(weight: Tensor, rank: int, scaling: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    A_0 = sqrt(S / s) V^T and B_0 = U sqrt(S / s), so that s B_0 A_0 is the best rank-r part of W (PiSSA, and SaLoRA's
    initialization before the task restriction).

    Args:
        weight: W (d_out, d_in).
        rank: r.
        scaling: The LoRA scaling s > 0.
        seed: Seed of the decomposition.

    Returns:
        A_0 (r, d_in) and B_0 (d_out, r), float32. Where r exceeds the rank of W the rest is zero.
    """
    u, s, vh = truncated_svd(weight, min(rank, *weight.shape), seed)
    root = (s / scaling).sqrt()
    a, b = root[:, None] * vh, u * root
    missing = rank - root.shape[0]
    if missing:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])], dim=0)
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a.contiguous(), b.contiguous()


def restrict_to_task(factor: Tensor, task_basis: Tensor) -> Tensor:
    """
    B_0 = U_T U_T^T U sqrt(S) from U sqrt(S) (SaLoRA, section 4.2).

    Args:
        factor: (d_out, r).
        task_basis: U_T, (d_out, r_t) with orthonormal columns.
    """
    task_basis = task_basis.to(device=factor.device, dtype=torch.float32)
    return (task_basis @ (task_basis.T @ factor.float())).to(factor.dtype)
