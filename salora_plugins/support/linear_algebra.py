"""Leading singular subspaces of large matrices; knows nothing of models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
# Below these sizes a full decomposition takes milliseconds.
_SMALL_MATRIX = 512
_SMALL_GRAM = 256
# On a device that works asynchronously: iterating waits for it at every step, a batch of decompositions once.
_SMALL_GRAM_ASYNCHRONOUS = 1024
# Copied to float64 at once.
_BYTES_TOGETHER = 256 * 2**20
# Copied from a device at once, by way of pinned memory, which torch keeps.
_BYTES_PINNED = 64 * 2**20

SYNCHRONOUS = frozenset({"cpu", "mps"})
"""Devices whose operations cost what they compute; on others launching many small ones takes longer than they do."""

_KRYLOV_OVERSAMPLING = 8
_KRYLOV_STEPS = 4
_KRYLOV_CYCLES = 12
_KRYLOV_TOLERANCE = 1e-9
_KRYLOV_RESIDUAL = 1e-3
_ORTHOGONAL = 1e-6  # before the last of several orthogonalizations

MOST_DEVIATION = 1e-4
"""Of a basis whose columns pass for orthonormal, see `deviation_from_orthonormal`."""

_said: set[tuple[str, str]] = set()


def is_asynchronous(device: torch.device) -> bool:
    """Whether a device's operations had better be few and large, and not waited for."""
    return device.type not in SYNCHRONOUS


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """
    Eigenvalues, ascending, and orthonormal eigenvectors of symmetric positive semidefinite matrices (..., d, d), as
    (..., d) and (..., d, d).

    cuSOLVER gives up on some Gram matrices, of low rank or with many equal eigenvalues; then LAPACK computes them on
    the CPU, and where that gives up, too, they are taken from a singular value decomposition.

    Raises:
        ValueError: The matrix contains NaN or infinity.
    """

    def by_svd() -> tuple[Tensor, ...]:
        u, s, _ = torch.linalg.svd(matrix.cpu())
        return s.flip(-1), u.flip(-1)

    attempts = [lambda: torch.linalg.eigh(matrix), by_svd]
    if matrix.device.type != "cpu":
        attempts.insert(1, lambda: torch.linalg.eigh(matrix.cpu()))
    values, vectors = _first_that_works("eigh", matrix, attempts)
    return values, vectors


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    The thin singular value decomposition, U (..., m, k), S (..., k) and V^T (..., k, n), k = min(m, n).

    Where the usual algorithm gives up: by cuSOLVER's slower one, then on the CPU, there at last from the eigenvectors
    of the smaller Gram matrix in float64.

    Raises:
        ValueError: The matrix contains NaN or infinity.
    """

    def by_eigh() -> tuple[Tensor, ...]:
        wide = matrix.shape[-2] < matrix.shape[-1]
        tall = (matrix.mT if wide else matrix).cpu().double()
        vectors = torch.linalg.eigh(tall.mT @ tall)[1].flip(-1)
        q, r = torch.linalg.qr(tall @ vectors)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        u = (q * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :]).to(matrix.dtype)
        vectors, values = vectors.to(matrix.dtype), diagonal.abs().to(matrix.dtype)
        return (vectors, values, u.mT) if wide else (u, values, vectors.mT)

    attempts = [
        lambda: torch.linalg.svd(matrix, full_matrices=False),
        lambda: torch.linalg.svd(matrix.cpu(), full_matrices=False),
        by_eigh,
    ]
    if matrix.device.type == "cuda":
        attempts.insert(1, lambda: torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"))
    if matrix.device.type == "cpu":
        del attempts[1]
    u, s, vh = _first_that_works("svd", matrix, attempts)
    return u, s, vh


def _first_that_works(
    name: str, matrix: Tensor, attempts: list[Callable[[], tuple[Tensor, ...]]]
) -> tuple[Tensor, ...]:
    """The first result that is finite, on the device of `matrix`; the others fail, or return NaN without a word."""
    for number, attempt in enumerate(attempts):
        try:
            result = attempt()
            if torch.stack([part.isfinite().all() for part in result]).all():  # one wait for the device
                return tuple(part.to(matrix.device) for part in result)
            error = "the result contains NaN or infinity"
        except RuntimeError as failure:  # torch.linalg.LinAlgError and a device's lack of memory are
            if number + 1 == len(attempts) and matrix.isfinite().all():
                raise
            error = str(failure)
        if not matrix.isfinite().all():
            raise ValueError(f"A matrix of shape {tuple(matrix.shape)} to be decomposed contains NaN or infinity.")
        _say_once(name, str(matrix.device), error)
    raise RuntimeError(f"torch.linalg.{name}: {error}")


def _say_once(name: str, device: str, error: str) -> None:
    """However many layers have it."""
    if (name, device) not in _said:
        _said.add((name, device))
        logger.warning(
            "torch.linalg.%s on %s failed (%s). Another algorithm is used, on the CPU if need be: slower, with the "
            "same result.",
            name,
            device,
            error,
        )


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
        u, s, vh = svd(matrices)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]
    test = _gaussian(n, min(rank + _OVERSAMPLING, m, n), seed, matrices.device, matrices.dtype)
    basis = torch.linalg.qr(matrices @ test).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ basis).Q).Q
    # The small factor is wide; its SVD comes from that of the QR factor of its transpose.
    q, r = torch.linalg.qr((basis.mT @ matrices).mT)
    u, s, vh = svd(r.mT)
    return (basis @ u)[..., :rank], s[..., :rank], (vh @ q.mT)[..., :rank, :]


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    The thin singular value decomposition of a product of two thin matrices, which is never formed: from the QR
    decompositions of both and the decomposition of a small matrix, in float64.

    Args:
        left: (m, k), any floating dtype.
        right: (k, n).

    Returns:
        U (m, p), S (p,), descending, and V^T (p, n), p = min(k, m, n), float64.

    Raises:
        ValueError: A matrix contains NaN or infinity.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vh = svd(r_left @ r_right.T)
    return q_left @ u, s, vh @ q_right.T


def balanced_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    `svd_of_product` with the roots of the singular values in both factors, of which the first k columns and rows are
    the best approximation of rank k.

    Returns:
        U sqrt(S) (m, p), S (p,), descending, and sqrt(S) V^T (p, n), float64.
    """
    u, values, vh = svd_of_product(left, right)
    root = values.sqrt()
    return u * root, values, root[:, None] * vh


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
        at most 1e-3 of the smallest of these eigenvalues, or the eigenvalues have stopped to grow, unless they
        decay so slowly that 12 cycles do not suffice.
    """
    block = rank + _KRYLOV_OVERSAMPLING
    if is_small(dimension, rank, device):
        return leading_eigenpairs(multiply(torch.eye(dimension, dtype=torch.float64, device=device)), rank)
    vectors = torch.linalg.qr(_gaussian(dimension, block, seed, device, torch.float64)).Q
    previous = torch.zeros(rank, dtype=torch.float64, device=device)
    for _ in range(_KRYLOV_CYCLES):
        basis = vectors
        images = multiply(vectors)
        for _ in range(_KRYLOV_STEPS):
            new = images[:, -block:]
            # Once leaves rounding errors that would make the basis lose its orthogonality. Where it holds all there is
            # (equal eigenvalues, low rank) the rest is rounding errors only, and may take several turns.
            for _ in range(5):
                overlap, size = basis.T @ new, torch.linalg.norm(new)
                new = torch.linalg.qr(new - basis @ overlap).Q
                if torch.linalg.norm(overlap) < _ORTHOGONAL * size:
                    break
            basis = torch.cat([basis, new], dim=1)
            images = torch.cat([images, multiply(new)], dim=1)
        projected = basis.T @ images
        values, rotation = eigh((projected + projected.T) / 2)
        rotation = rotation[:, -block:].flip(1)
        values = values.flip(0)[:rank]
        vectors = basis @ rotation
        residual = torch.linalg.norm(images @ rotation[:, :rank] - vectors[:, :rank] * values)
        # Value by value: the sum is blind to all others beside one that is a billion times as large.
        growth = _KRYLOV_TOLERANCE * values + torch.finfo(torch.float64).eps * dimension * values[0]
        if residual <= _KRYLOV_RESIDUAL * values[-1] or (values - previous <= growth).all():
            break
        previous = values
    return values, vectors[:, :rank]


def top_right_singular_vectors(rows: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    The top right singular vectors of a matrix that has few rows, or of several of one shape at once.

    Args:
        rows: (..., n, d), any floating dtype.
        rank: At most min(n, d).
        seed: Seed of the iteration where n is large.

    Returns:
        Basis (..., d, rank) with orthonormal columns and singular values (..., rank), descending, both float64.
    """
    rows = rows.double()
    inner = rows @ rows.mT
    if is_small(rows.shape[-2], rank, rows.device):
        squares, left = leading_eigenpairs(inner, rank)
    else:
        pairs = [
            top_eigenpairs(partial(torch.matmul, one), rows.shape[-2], rank, device=rows.device, seed=seed)
            for one in inner.reshape(-1, *inner.shape[-2:])
        ]
        values, vectors = zip(*pairs, strict=True)
        squares = torch.stack(values).reshape(*rows.shape[:-2], rank)
        left = torch.stack(vectors).reshape(*rows.shape[:-1], rank)
    # Restores the orthogonality that the squared singular values' rounding costs.
    return _orthonormalized(rows.mT @ left), squares.clamp(min=0).sqrt()


def _orthonormalized(matrix: Tensor) -> Tensor:
    """
    Q of the QR decomposition, R having a positive diagonal, of matrices (..., d, k) with nearly orthogonal columns.

    On an asynchronous device from two Cholesky decompositions (Yamamoto et al. 2015, "Roundoff error analysis of the
    CholeskyQR2 algorithm"), which are batched products, where a QR decomposition goes through the columns one by one,
    matrix by matrix. They fail where a column is rounding errors only; then it is QR.
    """
    if is_asynchronous(matrix.device):
        basis, deviation = _cholesky_qr(_cholesky_qr(_with_unit_columns(matrix))[0])
        if deviation * matrix.shape[-1] < 0.1:  # false for NaN
            return basis
    basis, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return basis * signs[..., None, :]


def _with_unit_columns(matrix: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    return matrix / norms.clamp(min=torch.finfo(matrix.dtype).tiny)


def _cholesky_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q from the Cholesky factor of the Gram matrix, and how far `matrix` itself was from orthonormal."""
    gram = matrix.mT @ matrix
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    triangle = torch.linalg.cholesky_ex(gram).L  # which does not wait for the device to look for errors
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=False)
    return matrix @ inverse.mT, (gram - identity).abs().max()


def is_small(dimension: int, rank: int, device: torch.device) -> bool:
    """Whether decomposing a matrix takes less than iterating for a few of its eigenpairs."""
    small = _SMALL_GRAM_ASYNCHRONOUS if is_asynchronous(device) else _SMALL_GRAM
    return dimension <= max(small, 2 * (1 + _KRYLOV_STEPS) * (rank + _KRYLOV_OVERSAMPLING))


def leading_eigenpairs(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (..., rank) of (..., d, d) matrices, descending, and eigenvectors (..., d, rank)."""
    values, vectors = eigh(matrices)
    return values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)


def deviation_from_orthonormal(basis: Tensor) -> Tensor:
    """
    The largest element of |Q^T Q - I| of matrices Q (..., d, rank), (...) float64, NaN where Q is not finite; float32
    decompositions leave 1e-6.
    """
    double = basis.double()
    identity = torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
    return (double.mT @ double - identity).abs().amax(dim=(-2, -1))


def deviations_from_orthonormal(bases: Sequence[Tensor]) -> list[Tensor]:
    """Of every Q (d, rank) the `deviation_from_orthonormal`, computed for those of one shape and device at once."""
    alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, basis in enumerate(bases):
        alike.setdefault((basis.shape, basis.device), []).append(index)
    deviations: dict[int, Tensor] = {}
    for (shape, device), indices in alike.items():
        size = max(1, _BYTES_TOGETHER // (8 * shape.numel())) if is_asynchronous(device) else 1
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            of_some = deviation_from_orthonormal(stacked([bases[i] for i in some]))
            deviations |= zip(some, of_some.reshape(-1).unbind(), strict=True)
    return [deviations[index] for index in range(len(bases))]


def values_of(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers of tensors with one element, waiting for every device once."""
    by_device: dict[torch.device, list[int]] = {}
    for index, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(index)
    values = [0.0] * len(scalars)
    for indices in by_device.values():
        of_device = torch.stack([scalars[i].reshape(()) for i in indices]).tolist()
        for i, value in zip(indices, of_device, strict=True):
            values[i] = value
    return values


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors that are elsewhere, waiting for a device once for every 64 MiB."""
    moved: list[Tensor] = []
    start = size = 0
    for end, tensor in enumerate(tensors, start=1):
        size += tensor.numel() * tensor.element_size()
        if size >= _BYTES_PINNED or end == len(tensors):
            moved += _on_cpu_at_once(tensors[start:end])
            start, size = end, 0
    return moved


def _on_cpu_at_once(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    # Out of the pinned memory that the copies went to, which is used again for the next ones.
    return [copy.clone() if tensor.is_cuda else copy for tensor, copy in zip(tensors, copies, strict=True)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; one alone as it is, for which operations are a bit faster."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def fix_signs(basis: Tensor) -> Tensor:
    """Singular vectors (..., d, k) are unique up to sign; make the largest element of each column positive."""
    largest = basis.abs().argmax(dim=-2, keepdim=True)
    signs = basis.gather(-2, largest).sign()
    return basis * torch.where(signs == 0, 1.0, signs)


def _gaussian(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Drawn on the CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype).to(device)
