"""
ActSVD: the directions of safety that utility does not use (Wei et al. 2024, "Assessing the Brittleness of Safety
Alignment via Pruning and Low-Rank Modifications", arXiv 2402.05162, section 3.2).
"""

from __future__ import annotations

from torch import Tensor

from ..activations.errors import CalibrationError
from ..activations.statistics import ModuleStatistics
from ..activations.vectors import VectorStatistics
from ..hookspecs import BasisNeeds, RegisterBasisMethod, hookimpl
from ..ranks import Side, of_side
from ..support.linear_algebra import eigh, fix_signs, svd

LEAST_SINE = 0.1
"""Of the angle between a safety direction and the span of utility's: what is closer to it is dropped."""

UTILITY_RANKS = 4
"""Directions of utility for one of safety, where their number is not given."""


def isolated_directions(safety: Tensor, utility: Tensor, least_sine: float = LEAST_SINE) -> Tensor:
    """
    An orthonormal basis of the range of (I - U_u U_u^T) U_s.

    Its singular values are the sines of the principal angles between the two spans. Columns whose sine is smaller are
    dropped: they lie in utility's span but for a remainder, which scaling to unit length would make a direction. (The
    product of the two projectors, which the paper removes, is itself no projector.)

    Args:
        safety: U_s (d, k_s) with orthonormal columns.
        utility: U_u (d, k_u) with orthonormal columns.
        least_sine: The smallest sine that is kept.

    Returns:
        (d, k) float64, k <= k_s, perhaps 0.
    """
    safety, utility = safety.double(), utility.double()
    left, sines, _ = svd(safety - utility @ (utility.T @ safety))
    return left[:, sines >= least_sine]


def actsvd(statistics: ModuleStatistics, rank: int, side: Side) -> tuple[Tensor, Tensor]:
    """
    U_s and U_u are the top left singular vectors of W X_s and W X_u (of X_s and X_u for the input side); the basis is
    that of `isolated_directions`.

    The singular values are what the safety data has in these directions: with G the Gram matrix of its vectors and B
    the basis, B is turned so that B^T G B is diagonal, and its entries' roots, descending, are returned. So a smaller
    `safety_rank` later takes the directions with most of the safety data's energy, and the energy that a safety module
    says it captures is what it does capture.

    Args:
        statistics: Of one layer, with those of the utility rows.
        rank: k_s. k_u is `utility_rank` (`input_utility_rank`), or by default 4 k_s, at most as many as the utility
            data has and half of the layer.
        side: "output" or "input".

    Returns:
        Basis (d, k) with orthonormal columns and singular values (k,), both float32, 1 <= k <= k_s.

    Raises:
        CalibrationError: The utility rank is too large for the layer or the data, or nothing is left.
    """
    if statistics.utility is None:
        raise ValueError(f"{statistics.name}: actsvd needs the statistics of utility rows.")
    safety, utility = statistics.of(side), statistics.utility.of(side)
    number = _utility_rank(statistics, utility, rank, side)
    basis = isolated_directions(safety.top(rank)[0], utility.top(number)[0])
    if not basis.shape[1]:
        option, of_utility = of_side(side, "safety_rank"), of_side(side, "utility_rank")
        raise CalibrationError(
            f"{of_utility}={number}: the {number} {side} directions of utility hold all {rank} safety directions of "
            f"{statistics.name!r} (sines of the angles between them under {LEAST_SINE}), so that none is left to "
            f"protect. Lower {of_utility}, raise {option}, or leave the module out with exclude_modules."
        )
    energies, rotation = eigh(basis.T @ safety.product(basis))
    basis = fix_signs(basis @ rotation.flip(1))
    return basis.float().contiguous(), energies.flip(0).clamp(min=0).sqrt().float()


def _utility_rank(statistics: ModuleStatistics, utility: VectorStatistics, rank: int, side: Side) -> int:
    """
    k_u for k_s = `rank`.

    Raises:
        CalibrationError: There are not so many directions, or none.
    """
    option = of_side(side, "utility_rank")
    asked = statistics.options.get(option)
    if asked is None:
        found = utility.directions(min(UTILITY_RANKS * rank, utility.dimension // 2))
        if not found:
            raise CalibrationError(
                f"The {side}s of {statistics.name!r} are zero on all positions of the utility data that count, so "
                "that it has no direction there. Check utility_data, or leave the module out with exclude_modules."
            )
        return found
    if asked >= utility.dimension:
        raise CalibrationError(
            f"{option}={asked} is not smaller than the {utility.dimension} {side}s of {statistics.name!r}, which would "
            f"leave no direction to protect. Lower {option}, or leave it out."
        )
    found = utility.directions(asked)
    if found < asked:
        raise CalibrationError(
            f"{option}={asked}, but the {side}s of {statistics.name!r} have only {found} directions on the utility "
            f"data. Give more of it (num_utility_samples, utility_data), or lower {option} to {found}."
        )
    return asked


@hookimpl
def register_basis_methods(register: RegisterBasisMethod) -> None:
    needs = BasisNeeds(utility_rows=True, chooses_rank=True, options=("utility_rank", "input_utility_rank"))
    register("actsvd", actsvd, needs)
