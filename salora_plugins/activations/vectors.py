"""Statistics of a stream of vectors, updated batch by batch, from which their top directions are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..support.distributed import gather_from_all_ranks, is_distributed, maximum_over_ranks, sum_over_ranks
from ..support.linear_algebra import fix_signs, top_eigenpairs, top_right_singular_vectors

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
_BYTES_TOGETHER = 256 * 2**20


class VectorStatistics(ABC):
    """
    What is needed of a stream of vectors to find its top directions.

    Args:
        dimension: Length d of the vectors.
    """

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

    @torch.no_grad()
    def update(self, rows: Tensor, scales: Tensor | None = None) -> None:
        """
        Args:
            rows: (n, d), any floating dtype. NaN or infinity among them show in `energy`.
            scales: (n,), what every vector is multiplied with first; None: nothing.
        """
        # Under autocast the products would be computed in half precision.
        with torch.autocast(rows.device.type, enabled=False):
            self._precision = max(self._precision, torch.finfo(rows.dtype).eps / 4)
            rows = rows.detach().float()
            if scales is not None:
                rows = rows * scales.to(rows)[:, None]
            if rows.device.type == "mps":
                rows = rows.cpu()  # no float64 there
            self._forget()
            self.count += rows.shape[0]
            # Row by row: one float32 sum over the batch would lose digits.
            energy = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
            self._energy = energy if self._energy is None else self._energy + energy
            of_channels = rows.square().sum(0).double()
            self._of_channels = of_channels if self._of_channels is None else self._of_channels + of_channels
            self._update(rows)

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
            self._directions[most] = int(self._last_direction(*self.top(most)))
        return self._directions[most]

    def _last_direction(self, basis: Tensor, values: Tensor) -> Tensor:
        """The number of the last of these directions that is no rounding error, without waiting for the device."""
        energies, precision = self._rounding(basis.double())
        numbers = torch.arange(1, values.shape[0] + 1, device=values.device)
        return (numbers * (values.double().square() > precision**2 * energies)).max()

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

    @property
    def most_directions(self) -> int:
        """How many directions can be trusted."""
        return min(self.count, self.dimension)

    @abstractmethod
    def factor(self) -> Tensor | None:
        """R (m, d) with R^T R = the Gram matrix, where one with few rows is at hand; else None."""

    @abstractmethod
    def _update(self, rows: Tensor) -> None: ...

    @abstractmethod
    def _reduce(self, count: int) -> None: ...

    def _multiply(self, block: Tensor) -> Tensor:
        """The Gram matrix times a (d, k) float64 block."""
        factor = self.factor()
        if factor is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a factor nor a product of its own.")
        rows = factor.double()
        return rows.T @ (rows @ block)


@torch.no_grad()
def decompose_together(wanted: Iterable[tuple[VectorStatistics, int]]) -> None:
    """
    Find the top directions of several streams, so that `top` and `directions` have them at once.

    What is of one shape is decomposed in one call, and a device is waited for once a call: on a GPU, decomposing small
    matrices one after the other is mostly the launching of operations. Statistics without a factor of few rows are
    left to `top`.

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
        rows = statistics.factor()
        if rows is None or not rank <= rows.shape[0] < statistics.dimension:
            continue
        key = rows.shape, rows.dtype, rows.device, rank
        groups.setdefault(key, []).append((statistics, rows))
        if (len(groups[key]) + 1) * rows.numel() * 8 > _BYTES_TOGETHER:
            _decompose(groups.pop(key), rank)
    for (*_, rank), group in groups.items():
        _decompose(group, rank)


def _decompose(group: Sequence[tuple[VectorStatistics, Tensor]], rank: int) -> None:
    """`top` and `directions` of statistics whose factors have one shape."""
    rows = torch.stack([factor for _, factor in group])
    with torch.autocast(rows.device.type, enabled=False):
        bases, values = top_right_singular_vectors(rows, rank)
        bases = fix_signs(bases).float()
        last = []
        for (statistics, _), basis, of_basis in zip(group, bases, values.float(), strict=True):
            statistics._tops[rank] = basis.contiguous(), of_basis
            last.append(statistics._last_direction(basis, of_basis))
    for (statistics, _), number in zip(group, torch.stack(last).tolist(), strict=True):
        statistics._directions[rank] = number


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

    def _update(self, rows: Tensor) -> None:
        if self._factor is None:
            self._factor = rows.new_zeros(0, self.dimension)
        if self._factor.shape[0] + rows.shape[0] <= self.width:
            self._factor = torch.cat([self._factor, rows])
        else:
            self._factor = self._compress(self._factor, rows)

    def _compress(self, factor: Tensor, rows: Tensor) -> Tensor:
        """Q^T [F; X] with Q an orthonormal basis of [F; X] T^T, T being one of F's rows, (width, d)."""
        test = factor
        if missing := self.width - factor.shape[0]:
            generator = torch.Generator().manual_seed(self._seed)
            random = torch.randn(missing, self.dimension, generator=generator).to(rows)
            # The batch is at hand, so that its own power iteration costs no pass over the data.
            test = torch.cat([test, (random @ rows.T) @ rows])
        test = _orthonormal(test)
        # Rows without a direction of their own, since the factor has few, look into those of the batch.
        unused = torch.linalg.vector_norm(test, dim=1) < 0.5
        filler = rows[torch.arange(self.width, device=rows.device) % rows.shape[0]]
        test = _orthonormal(torch.where(unused[:, None], filler, test))
        both = torch.cat([factor, rows])
        return _orthonormal((test @ both.T).double()).to(both) @ both

    def _reduce(self, count: int) -> None:
        self._factor = _gather_rows(self.factor())


def _orthonormal(rows: Tensor) -> Tensor:
    """
    Orthonormal rows that span those of a (w, d) matrix, by its Cholesky factor: much cheaper than QR.

    In float64 and with all rows of one length, so that a direction is not lost beside one that is 10^5 times as large;
    a shift above the rounding errors keeps them from being blown up: such rows come out shorter than 1, or 0.
    """
    double = rows.double()
    matrix = double @ double.T
    scale = matrix.diagonal().clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    matrix = scale[:, None] * matrix * scale
    matrix.diagonal().add_(_SHIFT * len(matrix))
    # Not `cholesky`, which waits for the device to look for errors; NaN shows in the energy.
    triangle = torch.linalg.cholesky_ex(matrix).L
    # The inverse of a small matrix and one product take less than half the time of solving for all columns.
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=False) * scale
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

    def _update(self, rows: Tensor) -> None:
        """The vectors are in the statistics of the inputs."""

    def _reduce(self, count: int) -> None:
        """The statistics of the inputs are reduced on their own."""


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, (n, d); ranks may have different numbers of them."""
    longest = maximum_over_ranks(rows.shape[0])
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return gather_from_all_ranks(padded)
