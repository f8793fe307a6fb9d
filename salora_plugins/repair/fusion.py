"""LSSF's formulas (arXiv 2602.00038): what of a safety vector lies in a layer's safety subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.linear_algebra import svd_of_product
from .strength import Strength
from .updates import Factors


@dataclass(frozen=True)
class SafetyVector:
    """The safety vector delta = W_safe - W_unsafe of one layer, in its safety subspace U, all float64."""

    basis: Tensor
    """U, (d_out, r)."""
    singular_values: Tensor
    """(r,)"""
    coordinates: Tensor
    """K (r, m), with U^T delta = K R."""
    rows: Tensor
    """R, (m, d_in)."""
    norm: float
    """||delta||_F."""

    @classmethod
    def of_adapter(cls, basis: Tensor, singular_values: Tensor, unsafe: Factors) -> SafetyVector:
        """
        Of a model that lost its refusals by an update s B A of the safe one: delta = -s B A, which is never formed.

        Args:
            basis: U, (d_out, r).
            singular_values: (r,)
            unsafe: A (k, d_in) and s B (d_out, k).
        """
        a, b = (factor.double() for factor in unsafe)
        basis = basis.double()
        return cls(basis, singular_values.double(), -(basis.T @ b), a, product_norm(a, b))

    @classmethod
    def of_difference(cls, basis: Tensor, singular_values: Tensor, delta: Tensor) -> SafetyVector:
        """
        Args:
            basis: U, (d_out, r).
            singular_values: (r,)
            delta: W_safe - W_unsafe, (d_out, d_in).
        """
        basis = basis.double()
        identity = torch.eye(basis.shape[1], dtype=torch.float64)
        norm = torch.linalg.norm(delta).item()
        return cls(basis, singular_values.double(), identity, basis.T @ delta.double(), norm)

    @property
    def kept_share(self) -> float:
        """||U U^T delta||_F / ||delta||_F."""
        return product_norm(self.rows, self.coordinates) / self.norm

    def repair(self, strength: Strength) -> Factors:
        """
        alpha U' U'^T delta with U'_i = alpha_i U_i, as A (m, d_in) and B (d_out, m); m is r, or the rank of an unsafe
        adapter, whose A it is then.
        """
        weights = strength.weights(self.singular_values)
        return self.rows, strength.alpha * (self.basis * weights.square()) @ self.coordinates


def at_rank(update: Factors, rank: int | None) -> tuple[Factors, float]:
    """
    The best approximation of B A of a rank, and ||B A - it||_F / ||B A||_F; an update of no higher rank as it is.
    """
    a, b = update
    if rank is None or a.shape[0] <= rank:
        return update, 0.0
    u, values, vh = svd_of_product(b, a)
    root = values[:rank].sqrt()
    total = torch.linalg.norm(values).item()
    lost = torch.linalg.norm(values[rank:]).item() / total if total else 0.0
    return (root[:, None] * vh[:rank], u[:, :rank] * root), lost


def product_norm(a: Tensor, b: Tensor) -> float:
    """||B A||_F in float64, without forming the product."""
    return torch.linalg.norm(torch.linalg.qr(b.double()).R @ a.double()).item()
