"""LSSF's formulas (arXiv 2602.00038): what of a safety vector lies in a layer's safety subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.certificate import product_norm
from ..support.linear_algebra import balanced_factors
from .strength import Strength
from .updates import Factors


@dataclass(frozen=True)
class SafetyVector:
    """
    The safety vector delta = W_safe - W_unsafe of one layer, in its safety subspace U. It is kept for all layers at
    once, its large parts as they are elsewhere or in float32; computed with in float64.
    """

    basis: Tensor
    """U, (d_out, r), as it was given."""
    singular_values: Tensor
    """(r,)"""
    coordinates: Tensor
    """K (r, m) float64, with U^T delta = K R."""
    rows: Tensor
    """R, (m, d_in), of an unsafe adapter its A as it was given."""
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
        a, b = unsafe
        return cls(basis, singular_values.double(), -(basis.double().T @ b.double()), a, product_norm(a, b))

    @classmethod
    def of_difference(cls, basis: Tensor, singular_values: Tensor, delta: Tensor) -> SafetyVector:
        """
        Args:
            basis: U, (d_out, r).
            singular_values: (r,)
            delta: W_safe - W_unsafe, (d_out, d_in).
        """
        identity = torch.eye(basis.shape[1], dtype=torch.float64)
        rows = (basis.double().T @ delta.double()).float()
        return cls(basis, singular_values.double(), identity, rows, torch.linalg.norm(delta).item())

    @property
    def kept_share(self) -> float:
        """||U U^T delta||_F / ||delta||_F."""
        return product_norm(self.rows, self.coordinates) / self.norm

    def repair(self, strength: Strength) -> Factors:
        """
        alpha U' U'^T delta with U'_i = alpha_i U_i, as A (m, d_in) and B (d_out, m), float64; m is r, or the rank of an
        unsafe adapter, whose A it is then.
        """
        weights = strength.weights(self.singular_values)
        return self.rows.double(), strength.alpha * (self.basis.double() * weights.square()) @ self.coordinates


def at_rank(update: Factors, rank: int | None) -> tuple[Factors, float]:
    """
    The best approximation of B A of a rank, and ||B A - it||_F / ||B A||_F; an update of no higher rank as it is.
    """
    a, b = update
    if rank is None or a.shape[0] <= rank:
        return update, 0.0
    b, values, a = balanced_factors(b, a)
    total = torch.linalg.norm(values).item()
    lost = torch.linalg.norm(values[rank:]).item() / total if total else 0.0
    return (a[:rank], b[:, :rank]), lost
