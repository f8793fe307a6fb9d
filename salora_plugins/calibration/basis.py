"""SaLoRA's own way to compute a safety basis, registered like those of plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..hookspecs import BasisMethod, hookimpl
from .statistics import ModuleStatistics


def top_singular_vectors(
    statistics: ModuleStatistics, rank: int, side: Literal["output", "input"]
) -> tuple[Tensor, Tensor]:
    """
    U_C: the top left singular vectors of W X_h (SaLoRA, section 4.1); for the input side those of X_h.

    Args:
        statistics: Of one layer over the safety data.
        rank: Number of directions.
        side: "output" or "input".

    Returns:
        Basis (d, rank) with orthonormal columns and singular values (rank,), both float32.
    """
    return getattr(statistics, side).top(rank)


@hookimpl
def register_basis_methods(register: Callable[[str, BasisMethod], None]) -> None:
    register("salora", top_singular_vectors)
