"""Start values of the two factors: the weight's top singular directions, restricted to what the task uses; SAILS's."""

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


SAILS_SCALE = 0.1
"""What SAILS multiplies its directions with, for B to start at."""


def sails_factor(subspace: Tensor, rank: int, name: str) -> Tensor:
    """
    B_0 = 0.1 U[:, :r] (SAILS, arXiv 2512.23260).

    Args:
        subspace: U, (d_out, k) with orthonormal columns.
        rank: r.
        name: Of the module, for messages.

    Raises:
        ValueError: The subspace has fewer directions.
    """
    if rank > subspace.shape[1]:
        raise ValueError(
            f"r={rank}, but the SAE subspace of {name} has {subspace.shape[1]} directions for B to start in. Lower r "
            "(or its rank_pattern), or raise sae_feature_share or safety_rank (a share of the variance such as 0.95)."
        )
    return SAILS_SCALE * subspace[:, :rank]


def restrict_to_task(factor: Tensor, task_basis: Tensor) -> Tensor:
    """
    B_0 = U_T U_T^T U sqrt(S) from U sqrt(S) (the paper, section 4.2).

    Args:
        factor: (d_out, r).
        task_basis: U_T, (d_out, r_t) with orthonormal columns.
    """
    task_basis = task_basis.to(device=factor.device, dtype=torch.float32)
    return (task_basis @ (task_basis.T @ factor.float())).to(factor.dtype)
