"""Statistics of the vectors that pass a layer, updated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RowStatistics:
    """
    What is needed of a stream of vectors to find its top directions.

    The vectors themselves are kept while they are fewer than their dimension, and their Gram matrix from then on, so
    that memory is bounded by dimension^2 however long the stream is. Sums are in float64, because a Gram matrix
    squares the singular values' range; devices without float64 (MPS) sum on the CPU.
    """

    dimension: int
    """Length d of the vectors."""

    count: int = 0
    """Number n of vectors seen."""

    energy: float = 0.0
    """Sum of their squared norms."""

    _rows: list[Tensor] = field(default_factory=list, repr=False)
    _gram: Tensor | None = field(default=None, repr=False)
    _tops: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """
        Args:
            rows: (n, d), any floating dtype.

        Raises:
            FloatingPointError: A vector is not finite.
        """
        rows = rows.detach()
        rows = rows.cpu().double() if rows.device.type == "mps" else rows.float()
        energy = rows.double().square().sum().item()
        if energy != energy or energy in (float("inf"), float("-inf")):
            raise FloatingPointError("a vector holds NaN or infinity")
        self._tops.clear()
        self.count += rows.shape[0]
        self.energy += energy
        if self._gram is None:
            self._rows.append(rows)
            if self.count > self.dimension:
                self._gram = self._gram_of(torch.cat(self._rows))
                self._rows.clear()
        else:
            self._gram += self._gram_of(rows)

    def gram(self) -> Tensor:
        """The sum of the outer products, (d, d) float64."""
        if self._gram is not None:
            return self._gram
        return self._gram_of(self.rows())

    def rows(self) -> Tensor | None:
        """The vectors, (n, d), while they are kept; None once there is only the Gram matrix."""
        if self._gram is not None:
            return None
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.dimension)

    @torch.no_grad()
    def top(self, rank: int) -> tuple[Tensor, Tensor]:
        """
        The top right singular vectors of the (n, d) matrix of all vectors; computed once for layers that share them.

        Args:
            rank: At most min(n, d).

        Returns:
            Basis (d, rank) with orthonormal columns and singular values (rank,), descending, both float32.
        """
        if not 0 < rank <= min(self.count, self.dimension):
            raise ValueError(f"rank={rank} of {self.count} vectors of dimension {self.dimension}")
        if rank not in self._tops:
            self._tops[rank] = self._compute_top(rank)
        return self._tops[rank]

    def _compute_top(self, rank: int) -> tuple[Tensor, Tensor]:
        if self._gram is not None:
            values, vectors = torch.linalg.eigh(self._gram)
            basis, squares = vectors[:, -rank:].flip(1), values[-rank:].flip(0)
        else:
            rows = self.rows().double()
            # n < d: decompose the (n, n) matrix of inner products; QR restores what that loses in orthogonality.
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            squares = values[-rank:].flip(0)
            basis, r = torch.linalg.qr(rows.T @ vectors[:, -rank:].flip(1))
            basis = basis * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return _fix_signs(basis).float().contiguous(), squares.clamp(min=0).sqrt().float()

    @staticmethod
    def _gram_of(rows: Tensor) -> Tensor:
        rows = rows.double()
        return rows.T @ rows


@dataclass(frozen=True)
class ModuleStatistics:
    """What a basis method gets to know of one layer."""

    name: str
    """The module's name in the base model."""

    output: RowStatistics
    """Of W x over the chosen positions, without the bias."""

    input: RowStatistics | None = None
    """Of x over the chosen positions; None where no input side was asked for."""


def _fix_signs(basis: Tensor) -> Tensor:
    """Singular vectors are unique up to sign; make the largest element of each positive."""
    largest = basis.abs().argmax(dim=0)
    signs = basis.gather(0, largest[None]).sign()
    return basis * torch.where(signs == 0, 1.0, signs)
