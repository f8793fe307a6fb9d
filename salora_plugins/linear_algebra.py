"""Leading singular subspaces of large matrices; knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
# Below these sizes a full decomposition takes milliseconds.
_SMALL_MATRIX = 512
_SMALL_GRAM = 256

_KRYLOV_OVERSAMPLING = 8
_KRYLOV_STEPS = 4
_KRYLOV_CYCLES = 12
_KRYLOV_TOLERANCE = 1e-11
_KRYLOV_RESIDUAL = 1e-3


def truncated_svd(matrices: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """
    The top singular triples of one matrix or of several of one shape at once; randomized with a fixed seed where they
    are large (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1), without touching the global random state.

    Args:
        matrices: (..., m, n), any floating dtype.
        rank: Number of triples, at most min(m, n).
        seed: Seed of the random projection.

    Returns:
        U (..., m, rank), S (..., rank) and V^T (..., rank, n) in float32 on the device of `matrices`.
    """
    matrices = matrices.float()
    m, n = matrices.shape[-2:]
    if min(m, n) <= max(_SMALL_MATRIX, 2 * rank):
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]
    test = _gaussian(n, min(rank + _OVERSAMPLING, m, n), seed, matrices.device, matrices.dtype)
    basis = torch.linalg.qr(matrices @ test).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ basis).Q).Q
    # The small factor is wide; its SVD comes from that of the QR factor of its transpose.
    q, r = torch.linalg.qr((basis.mT @ matrices).mT)
    u, s, vh = torch.linalg.svd(r.mT, full_matrices=False)
    return (basis @ u)[..., :rank], s[..., :rank], (vh @ q.mT)[..., :rank, :]


def top_eigenpairs(
    multiply: Callable[[Tensor], Tensor], dimension: int, rank: int, *, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """
    The largest eigenvalues of a symmetric positive semidefinite matrix and their eigenvectors, by restarted block
    Krylov iteration (Musco, Musco 2015), or from the matrix itself where it is small.

    Args:
        multiply: Multiplies the matrix with a (dimension, k) float64 block.
        dimension: Size of the matrix.
        rank: Number of eigenpairs, at most `dimension`.
        device: Where to compute; must know float64.
        seed: Seed of the first block.

    Returns:
        Eigenvalues (rank,), descending, and orthonormal eigenvectors (dimension, rank), both float64. Their residual is
        at most 1e-3 of the smallest of these eigenvalues, or the eigenvalues' sum has stopped to grow, unless they
        decay so slowly that 12 cycles do not suffice.
    """
    block = rank + _KRYLOV_OVERSAMPLING
    if dimension <= max(_SMALL_GRAM, 2 * (1 + _KRYLOV_STEPS) * block):
        values, vectors = torch.linalg.eigh(multiply(torch.eye(dimension, dtype=torch.float64, device=device)))
        return values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    vectors = torch.linalg.qr(_gaussian(dimension, block, seed, device, torch.float64)).Q
    total = 0.0
    for _ in range(_KRYLOV_CYCLES):
        basis = vectors
        images = multiply(vectors)
        for _ in range(_KRYLOV_STEPS):
            new = images[:, -block:]
            for _ in range(2):  # once leaves rounding errors that would make the basis lose its orthogonality
                new = torch.linalg.qr(new - basis @ (basis.T @ new)).Q
            basis = torch.cat([basis, new], dim=1)
            images = torch.cat([images, multiply(new)], dim=1)
        projected = basis.T @ images
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        rotation = rotation[:, -block:].flip(1)
        values = values.flip(0)[:rank]
        vectors = basis @ rotation
        residual = torch.linalg.norm(images @ rotation[:, :rank] - vectors[:, :rank] * values)
        previous, total = total, values.sum().item()
        if residual <= _KRYLOV_RESIDUAL * values[-1] or total - previous <= _KRYLOV_TOLERANCE * total:
            break
    return values, vectors[:, :rank]


def top_right_singular_vectors(rows: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    The top right singular vectors of a matrix that has few rows.

    Args:
        rows: (n, d), any floating dtype.
        rank: At most min(n, d).
        seed: Seed of the iteration where n is large.

    Returns:
        Basis (d, rank) with orthonormal columns and singular values (rank,), descending, both float64.
    """
    rows = rows.double()
    inner = rows @ rows.T
    squares, left = top_eigenpairs(lambda block: inner @ block, rows.shape[0], rank, device=rows.device, seed=seed)
    # QR restores the orthogonality that the squared singular values' rounding costs.
    basis, r = torch.linalg.qr(rows.T @ left)
    return basis * torch.where(r.diagonal() < 0, -1.0, 1.0), squares.clamp(min=0).sqrt()


def fix_signs(basis: Tensor) -> Tensor:
    """Singular vectors are unique up to sign; make the largest element of each column positive."""
    largest = basis.abs().argmax(dim=0)
    signs = basis.gather(0, largest[None]).sign()
    return basis * torch.where(signs == 0, 1.0, signs)


def _gaussian(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Drawn on the CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype).to(device)
