"""Statistics of a stream of vectors, updated batch by batch, from which their top directions are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..ranks import RankRule, rank_of_spectrum
from ..support.distributed import gather_from_all_ranks, is_distributed, maximum_over_ranks, sum_over_ranks
from ..support.linear_algebra import (
    fix_signs,
    is_asynchronous,
    is_small,
    leading_eigenpairs,
    stacked,
    top_eigenpairs,
    top_right_singular_vectors,
)

LEAST_WIDTH = 2
"""
Rows of a sketch per direction that can be trusted: it then finds 99.9 % of what the exact top directions capture, and
with twice the rows 99.98 % (docs/how-it-works.md), where the singular values decay like 1/sqrt(i); faster decay leaves
less to miss.
"""
# From this size on a Gram matrix is computed in blocks, for its symmetry to save a third of the time.
_BLOCKED_DIMENSION = 384
# Which part of a number is rounding error, at least: some float32 operations.
_PRECISION = 1e-5
# What is copied to float64 at once.
_ROWS_AT_ONCE = 1024
# Per row of a matrix, several times what float64 rounding makes of an eigenvalue 0 of its scaled Gram matrix.
_SHIFT = 4 * torch.finfo(torch.float64).eps
# Factors (in float64) that are decomposed in one call.
_BYTES_TOGETHER = 512 * 2**20


class VectorStatistics(ABC):
    """
    What is needed of a stream of vectors to find its top directions.

    Args:
        dimension: Length d of the vectors.
    """

    knows_channels = True
    """Whether it keeps the energy of every channel."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.count = 0
        """Number n of vectors seen."""
        self._energy: Tensor | None = None
        self._of_channels: Tensor | None = None
        self._precision = _PRECISION
        self._tops: dict[int, tuple[Tensor, Tensor]] = {}
        self._directions: dict[int, int] = {}

    @property
    def energy(self) -> float:
        """Sum of the squared norms of the vectors."""
        return self.energy_tensor.item()

    @property
    def energy_tensor(self) -> Tensor:
        """The same without waiting for the device: float64 scalar."""
        return torch.zeros((), dtype=torch.float64) if self._energy is None else self._energy

    def update(self, rows: Tensor, scales: Tensor | None = None) -> None:
        """
        Args:
            rows: (n, d), any floating dtype. NaN or infinity among them show in `energy`.
            scales: (n,), what every vector is multiplied with first; None: nothing.
        """
        update_together([self], [rows], scales)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What statistics must have in common to be updated together, besides the shape of their vectors."""
        return type(self), self.dimension, self._energy is None

    def bytes_of_update(self, count: int) -> int:
        """About half of what an update with so many vectors takes for a while."""
        return 8 * count * self.dimension

    @torch.no_grad()
    def top(self, rank: int) -> tuple[Tensor, Tensor]:
        """
        The top right singular vectors of the (n, d) matrix of all vectors; computed once for layers that share them.

        Args:
            rank: At most `most_directions`.

        Returns:
            Basis (d, rank) with orthonormal columns and singular values (rank,), descending, both float32.
        """
        if not 0 < rank <= self.most_directions:
            raise ValueError(f"rank={rank} of {self.count} vectors of dimension {self.dimension}")
        found = next((size for size in sorted(self._tops) if size >= rank), None)
        if found is None:
            rows = self.factor()
            with torch.autocast(self.device.type, enabled=False):
                if rows is not None and rows.shape[0] < self.dimension:
                    basis, values = top_right_singular_vectors(rows, rank)
                else:
                    squares, basis = top_eigenpairs(self._multiply, self.dimension, rank, device=self.device)
                    values = squares.clamp(min=0).sqrt()
            self._tops[rank] = fix_signs(basis).float().contiguous(), values.float()
        basis, values = self._tops[found or rank]
        return (basis, values) if found in (None, rank) else (basis[:, :rank].contiguous(), values[:rank])

    @torch.no_grad()
    def directions(self, most: int) -> int:
        """
        How many of the top directions are the data's, and not rounding errors only; up to `most`.

        Every number is known to a few parts in its dtype's precision, so that rounding errors have that share of the
        energy of each channel: a direction with less than it is none, while a small one beside a large channel may be.
        """
        most = min(most, self.most_directions)
        if most <= 0:
            return 0
        if most not in self._directions:
            basis, values = self.top(most)
            self._directions[most] = int(_last_direction(values, self._least_energies(basis)))
        return self._directions[most]

    def _least_energies(self, basis: Tensor) -> Tensor:
        """What the energy of each of these directions must exceed to be no rounding error, (k,) float64."""
        energies, precision = self._rounding(basis.double())
        return precision**2 * energies

    def _forget(self) -> None:
        """What was found of the vectors so far, before there are others."""
        self._tops.clear()
        self._directions.clear()

    def _rounding(self, basis: Tensor) -> tuple[Tensor, float]:
        """The energy of the channels in these directions (d, k), and which part of a number may be rounding error."""
        if self._of_channels is None:
            return basis.new_zeros(basis.shape[1]), self._precision
        return self._of_channels.to(basis.device) @ basis.square(), self._precision

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.energy_tensor.device

    def reduce(self) -> None:
        """Let every rank of torch.distributed end with the statistics of all ranks' vectors."""
        if is_distributed():
            totals = torch.tensor([float(self.count), self.energy], dtype=torch.float64)
            count, energy = sum_over_ranks(totals).tolist()
            self._reduce(int(count))
            self.count, self._energy = int(count), torch.tensor(energy, dtype=torch.float64, device=self.device)
            of_channels = self._of_channels
            if of_channels is None:
                of_channels = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
            self._of_channels = sum_over_ranks(of_channels)
            self._forget()

    def gram(self) -> Tensor:
        """The sum of the vectors' outer products, or what the sketch holds of it: (d, d) float64."""
        return self._multiply(torch.eye(self.dimension, dtype=torch.float64, device=self.device))

    @torch.no_grad()
    def product(self, block: Tensor) -> Tensor:
        """`gram()` times a block (d, k), without forming it: (d, k) float64."""
        with torch.autocast(self.device.type, enabled=False):
            return self._multiply(block.to(self.device, torch.float64))

    @property
    def most_directions(self) -> int:
        """How many directions can be trusted."""
        return min(self.count, self.dimension)

    @abstractmethod
    def factor(self) -> Tensor | None:
        """R (m, d) with R^T R = the Gram matrix, where one with few rows is at hand; else None."""

    def _renewed(self, others: Sequence[Any], rows: Tensor, random_rows: RandomRows) -> Sequence[Any]:
        """
        What `_update` needs of the vectors of several statistics of this kind, computed at once; changes nothing.

        Args:
            others: All of them, this one first.
            rows: (k, n, d) float32, or (n, d) of this one alone.
            random_rows: Where random rows come from.
        """
        return [rows] if len(others) == 1 else rows.unbind()

    @abstractmethod
    def _update(self, renewed: Any) -> None: ...

    @abstractmethod
    def _reduce(self, count: int) -> None: ...

    def _multiply(self, block: Tensor) -> Tensor:
        """The Gram matrix times a (d, k) float64 block."""
        factor = self.factor()
        if factor is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a factor nor a product of its own.")
        rows = factor.double()
        return rows.T @ (rows @ block)


class RandomRows:
    """
    The random matrices that sketches begin with, drawn and copied to the device once for all that need the same: they
    depend on the shape and the seed only.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def of(self, count: int, dimension: int, seed: int, device: torch.device) -> Tensor:
        """(count, dimension) float32, drawn on the CPU, so that it is the same on every device."""
        key = count, dimension, seed, device
        if key not in self._known:
            generator = torch.Generator().manual_seed(seed)
            self._known[key] = torch.randn(count, dimension, generator=generator).to(device)
        return self._known[key]


@torch.no_grad()
def update_together(
    statistics: Sequence[VectorStatistics],
    rows: Sequence[Tensor],
    scales: Tensor | None = None,
    random_rows: RandomRows | None = None,
) -> None:
    """
    Update several statistics of one `kind` in the operations of one; in halves where a device lacks the memory.

    Args:
        statistics: All different.
        rows: For each of them (n, d), of one shape, dtype and device.
        scales: (n,), see `VectorStatistics.update`.
        random_rows: Random matrices to share with other calls.
    """
    random_rows = random_rows or RandomRows()
    try:
        # Under autocast the products would be computed in half precision.
        with torch.autocast(rows[0].device.type, enabled=False):
            energies, channels, renewed = _of_new_vectors(statistics, rows, scales, random_rows)
    except torch.OutOfMemoryError:
        if len(statistics) == 1:
            raise
        half = len(statistics) // 2
    else:
        for entry, energy, of_channels, new in zip(statistics, energies, channels, renewed, strict=True):
            entry._forget()
            entry._precision = max(entry._precision, torch.finfo(rows[0].dtype).eps / 4)
            entry.count += rows[0].shape[0]
            entry._energy, entry._of_channels = energy, of_channels
            entry._update(new)
        return
    # Not inside the block, where the error keeps what was computed so far.
    update_together(statistics[:half], rows[:half], scales, random_rows)
    update_together(statistics[half:], rows[half:], scales, random_rows)


def _of_new_vectors(
    statistics: Sequence[VectorStatistics], rows: Sequence[Tensor], scales: Tensor | None, random_rows: RandomRows
) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Any]]:
    """Of each of these statistics the energy, that of its channels, and what `_renewed` gives."""
    first = statistics[0]
    vectors = stacked(rows).detach().float()
    if scales is not None:
        vectors = vectors * scales.to(vectors)[:, None]
    if vectors.device.type == "mps":
        vectors = vectors.cpu()  # no float64 there
    # Row by row: one float32 sum over the batch would lose digits.
    energy = torch.linalg.vector_norm(vectors, dim=-1).double().square().sum(-1)
    if first._energy is not None:
        energy = stacked([entry.energy_tensor for entry in statistics]) + energy
    energies = [energy] if len(statistics) == 1 else energy.unbind()
    channels: Sequence[Tensor | None] = [None] * len(statistics)
    if first.knows_channels:
        sums = vectors.square().sum(-2).double()
        known = [entry._of_channels for entry in statistics if entry._of_channels is not None]
        sums = stacked(known) + sums if known else sums
        channels = [sums] if len(statistics) == 1 else sums.unbind()
    return energies, channels, first._renewed(statistics, vectors, random_rows)


def _last_direction(values: Tensor, least: Tensor) -> Tensor:
    """The number of the last of these directions (..., k) that is no rounding error, without waiting for the device."""
    numbers = torch.arange(1, values.shape[-1] + 1, device=values.device)
    return (numbers * (values.double().square() > least)).amax(-1)


@torch.no_grad()
def decompose_together(wanted: Iterable[tuple[VectorStatistics, int]]) -> None:
    """
    Find the top directions of several streams, so that `top` and `directions` have them at once.

    What is of one shape is decomposed in one call, and a device is waited for once a call: on a GPU, decomposing small
    matrices one after the other is mostly the launching of operations. Statistics without a factor of few rows are
    left to `top`, but for small ones on such a device.

    Args:
        wanted: Statistics, and the most directions that will be asked of them.
    """
    largest: dict[int, tuple[VectorStatistics, int]] = {}  # layers may share statistics
    for statistics, most in wanted:
        rank = min(most, statistics.most_directions)
        known = max(statistics._tops, default=0)
        if rank > max(known, largest.get(id(statistics), (statistics, 0))[1]):
            largest[id(statistics)] = statistics, rank
    groups: dict[Any, list[tuple[VectorStatistics, Tensor]]] = {}
    for statistics, rank in largest.values():
        matrix = statistics.factor()
        if matrix is None or not rank <= matrix.shape[0] < statistics.dimension:
            if not (is_asynchronous(statistics.device) and is_small(statistics.dimension, rank, statistics.device)):
                continue
            matrix = statistics.gram()
        key = matrix.shape, matrix.dtype, matrix.device, rank
        groups.setdefault(key, []).append((statistics, matrix))
        if (len(groups[key]) + 1) * matrix.numel() * 8 > _BYTES_TOGETHER:
            _decompose(groups.pop(key), rank)
    for (*_, rank), group in groups.items():
        _decompose(group, rank)


def _decompose(group: Sequence[tuple[VectorStatistics, Tensor]], rank: int) -> None:
    """`top` and `directions` of statistics whose factors, or else whose Gram matrices, have one shape."""
    matrices = torch.stack([matrix for _, matrix in group])
    with torch.autocast(matrices.device.type, enabled=False):
        if matrices.shape[-2] < matrices.shape[-1]:
            bases, values = top_right_singular_vectors(matrices, rank)
        else:
            squares, bases = leading_eigenpairs(matrices, rank)
            values = squares.clamp(min=0).sqrt()
        bases, values = fix_signs(bases).float().contiguous(), values.float()
        least = []
        for (statistics, _), basis, of_basis in zip(group, bases.unbind(), values.unbind(), strict=True):
            statistics._tops[rank] = basis, of_basis
            least.append(statistics._least_energies(basis))
        numbers = _last_direction(values, torch.stack(least)).tolist()
    for (statistics, _), number in zip(group, numbers, strict=True):
        statistics._directions[rank] = number


def rank_by_need(vectors: VectorStatistics, wanted: float | RankRule) -> tuple[int, bool]:
    """
    How many top singular directions a share of the energy, or a rule of the spectrum, asks for, and True; they must
    leave the layer something to train. Where all that there are do not do, their number, and False.
    """
    most = min(vectors.dimension - 1, vectors.most_directions)
    rank, size = min(32, most), min(vectors.dimension, vectors.count)
    while rank:
        known, energy = vectors.top(rank)[1], vectors.energy
        found = rank_of_spectrum(known, energy, size, wanted)
        is_settled = rank == most or found == rank_of_spectrum(known, energy, size, wanted, at_least=True)
        if found is not None and is_settled:
            return (found, True) if vectors.directions(found) == found else (vectors.directions(most), False)
        if rank == most:
            break
        rank = min(2 * rank, most)
    return vectors.directions(most), False


class ExactStatistics(VectorStatistics):
    """
    The vectors themselves while they are no more than their dimension, and their Gram matrix from then on, so that
    memory is bounded by d^2 however long the stream is.

    The Gram matrix is computed in float64: in float32 the products of a direction that is 10^4 times as large as the
    others leave more rounding errors than those have energy.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension)
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._is_complete = True

    def factor(self) -> Tensor | None:
        return None if self._gram is not None else self._stacked()

    def _stacked(self) -> Tensor:
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.dimension)

    def _update(self, rows: Tensor) -> None:
        if self._gram is None:
            self._rows.append(rows)
            if self.count > self.dimension:
                self._gram = self._summed_up()
        else:
            self._add(self._gram, rows)

    def _summed_up(self) -> Tensor:
        gram = torch.zeros(self.dimension, self.dimension, dtype=torch.float64, device=self.device)
        while self._rows:
            self._add(gram, self._rows.pop())
        return gram

    def _add(self, gram: Tensor, rows: Tensor) -> None:
        """Add the products of the upper blocks only; the others mirror them."""
        size = self.dimension if self.dimension < _BLOCKED_DIMENSION else -(-self.dimension // 3)
        for some in rows.split(_ROWS_AT_ONCE):
            parts = some.double().split(size, dim=1)
            for i, left in enumerate(parts):
                for j, right in enumerate(parts[i:], start=i):
                    gram[i * size : (i + 1) * size, j * size : (j + 1) * size].addmm_(left.T, right)
        self._is_complete = False

    def _multiply(self, block: Tensor) -> Tensor:
        if self._gram is None:
            return super()._multiply(block)
        if not self._is_complete:
            self._gram = self._gram.triu() + self._gram.triu(1).T
            self._is_complete = True
        return self._gram @ block

    def _reduce(self, count: int) -> None:
        if count > self.dimension:
            self._gram = sum_over_ranks(self._summed_up() if self._gram is None else self._gram)
            self._is_complete = False
        else:
            self._rows = [_gather_rows(self._stacked())]


class SketchedStatistics(VectorStatistics):
    """
    A factor F with `width` rows and F^T F close to the Gram matrix G, so that memory is bounded by d * width.

    The vectors themselves are kept until they are more than `width`. From then on every batch X renews the factor: with
    Q an orthonormal basis of F's rows, and Y = (F^T F + X^T X) Q, the new F is the Nystrom approximation of F^T F +
    X^T X from Y (Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix
    from streaming data"). A fixed random test matrix Q gives their single-pass sketch; renewing it from the factor
    makes each batch a step of power iteration, too, at no further pass over the data.

    Args:
        dimension: Length d of the vectors.
        width: Rows of the factor.
        seed: Seed of the first test matrix.
    """

    def __init__(self, dimension: int, width: int, seed: int = 0) -> None:
        super().__init__(dimension)
        self.width = width
        self._seed = seed
        self._factor: Tensor | None = None

    @property
    def most_directions(self) -> int:
        return min(super().most_directions, self.width // LEAST_WIDTH)

    def factor(self) -> Tensor:
        return torch.zeros(0, self.dimension) if self._factor is None else self._factor

    @property
    def kind(self) -> tuple[Any, ...]:
        size = None if self._factor is None else self._factor.shape[0]
        return *super().kind, self.width, self._seed, size

    def bytes_of_update(self, count: int) -> int:
        return 8 * (count + self.width) * self.dimension

    def _renewed(self, others: Sequence[SketchedStatistics], rows: Tensor, random_rows: RandomRows) -> Sequence[Tensor]:
        factor = rows[..., :0, :] if self._factor is None else stacked([other.factor() for other in others])
        if factor.shape[-2] + rows.shape[-2] <= self.width:
            renewed = torch.cat([factor, rows], dim=-2)
        else:
            renewed = self._compress(factor, rows, random_rows)
        return [renewed] if len(others) == 1 else renewed.unbind()

    def _update(self, factor: Tensor) -> None:
        self._factor = factor

    def _compress(self, factor: Tensor, rows: Tensor, random_rows: RandomRows) -> Tensor:
        """
        Q^T [F; X] with Q an orthonormal basis of [F; X] T^T, T being one of F's rows, (..., width, d), for one or
        several F (..., m, d) and X (..., n, d).
        """
        test = factor
        if missing := self.width - factor.shape[-2]:
            random = random_rows.of(missing, self.dimension, self._seed, rows.device)
            # The batch is at hand, so that its own power iteration costs no pass over the data.
            test = torch.cat([test, (random @ rows.mT) @ rows], dim=-2)
        test = _orthonormal(test)
        # Rows without a direction of their own, since the factor has few, look into those of the batch.
        unused = torch.linalg.vector_norm(test, dim=-1) < 0.5
        filler = rows.index_select(-2, torch.arange(self.width, device=rows.device) % rows.shape[-2])
        test = _orthonormal(torch.where(unused[..., None], filler, test))
        both = torch.cat([factor, rows], dim=-2)
        return _orthonormal((test @ both.mT).double()).to(both) @ both

    def _reduce(self, count: int) -> None:
        self._factor = _gather_rows(self.factor())


def _orthonormal(rows: Tensor) -> Tensor:
    """
    Orthonormal rows that span those of (..., w, d) matrices, by their Cholesky factors: much cheaper than QR.

    In float64 and with all rows of one length, so that a direction is not lost beside one that is 10^5 times as large;
    a shift above the rounding errors keeps them from being blown up: such rows come out shorter than 1, or 0.
    """
    double = rows.double()
    matrix = double @ double.mT
    size = matrix.shape[-1]
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    matrix = scale[..., :, None] * matrix * scale[..., None, :]
    matrix.diagonal(dim1=-2, dim2=-1).add_(_SHIFT * size)
    # Not `cholesky`, which waits for the device to look for errors; NaN shows in the energy.
    triangle = torch.linalg.cholesky_ex(matrix).L
    # The inverse of a small matrix and one product take less than half the time of solving for all columns.
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=False) * scale[..., None, :]
    return inverse.to(rows) @ rows


class OutputStatistics(VectorStatistics):
    """
    Of the outputs W x of a linear layer, by way of the statistics of its inputs: the Gram matrix is W G W^T. The
    outputs themselves count for the energy only.

    Args:
        inputs: Statistics of x, which other layers may share.
        dimension: d_out.
        weight: Gives W (d_out, d_in), valid inside its `with` block.
    """

    knows_channels = False  # the rounding errors of the inputs count

    def __init__(
        self, inputs: VectorStatistics, dimension: int, weight: Callable[[], AbstractContextManager[Tensor]]
    ) -> None:
        super().__init__(dimension)
        self.inputs = inputs
        self._weight = weight

    @property
    def most_directions(self) -> int:
        return min(super().most_directions, self.inputs.most_directions)

    @torch.no_grad()
    def factor(self) -> Tensor | None:
        rows = self.inputs.factor()
        if rows is None:
            return None
        with self._weight() as weight:
            return rows @ weight.to(rows).T

    @torch.no_grad()
    def _multiply(self, block: Tensor) -> Tensor:
        with self._weight() as weight:
            weight = weight.to(block)
            return weight @ self.inputs._multiply(weight.T @ block)

    @torch.no_grad()
    def _rounding(self, basis: Tensor) -> tuple[Tensor, float]:
        with self._weight() as weight:
            return self.inputs._rounding(weight.to(basis).T @ basis)

    def _update(self, renewed: Any) -> None:
        """The vectors are in the statistics of the inputs."""

    def _reduce(self, count: int) -> None:
        """The statistics of the inputs are reduced on their own."""


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, (n, d); ranks may have different numbers of them."""
    longest = maximum_over_ranks(rows.shape[0])
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return gather_from_all_ranks(padded)
