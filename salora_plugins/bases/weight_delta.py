"""
The directions in which alignment has changed the weights, without any data: as Safe LoRA has them (Hsu et al. 2024,
arXiv 2405.16833), whose V = W_aligned - W_unaligned, and here its top singular vectors.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..activations.errors import CalibrationError
from ..activations.statistics import ModuleStatistics
from ..activations.vectors import ExactStatistics, rank_by_need
from ..hookspecs import BasisNeeds, RegisterBasisMethod, hookimpl
from ..ranks import Rank, Side, of_side, share_or_rule


def weight_delta(statistics: ModuleStatistics, rank: Rank, side: Side) -> tuple[Tensor, Tensor, float]:
    """
    The top left (output side) or right (input side) singular vectors of W_aligned - W_unaligned.

    Args:
        statistics: Of one layer, with its two weights.
        rank: How many; or the share of the delta's energy or entropy that they are to make up. Where the delta has
            fewer, for rounding leaves nothing of the others, all that it has.
        side: "output" or "input".

    Returns:
        Basis (d, rank) with orthonormal columns and singular values (rank,), both float32; and the energy of the
        delta, the sum of all its squared singular values.

    Raises:
        CalibrationError: The delta is zero, or not finite; or all of its directions do not make up the share.
    """
    aligned = statistics.weight()
    delta = aligned - statistics.unaligned_weight()
    rms, size = aligned.square().mean().sqrt().item(), delta.square().sum().item()
    if not math.isfinite(size):
        raise CalibrationError(
            f"unaligned_model: the weight of {statistics.name!r} there, or here, contains NaN or infinity."
        )
    vectors = ExactStatistics(delta.shape[0 if side == "output" else 1])
    vectors.update(delta.T if side == "output" else delta)
    # What rounding the weights can make of a singular value: the norm of a matrix of random errors.
    noise = statistics.weight_rounding * rms * sum(math.sqrt(length) for length in delta.shape)
    most = min(vectors.dimension - 1, vectors.most_directions)
    if isinstance(rank, int):
        number = vectors.directions(min(rank, most))
    else:
        number, enough = rank_by_need(vectors, share_or_rule(rank))
        if not enough and number and vectors.top(1)[1].item() > noise:
            raise CalibrationError(
                f"{of_side(side, 'safety_rank')}={rank}: {number} directions, which leave the layer one to train, do "
                f"not make up that share of the delta of {statistics.name!r}. Lower it, or give a number."
            )
    basis, values = vectors.top(number) if number else (delta[:, :0], delta.new_zeros(0))
    number = int((values > noise).sum())
    if not number:
        raise CalibrationError(
            f"unaligned_model: its weight of {statistics.name!r} is that of the model itself, so that alignment has "
            "changed nothing there and the delta has no direction. Check that it is another model; where alignment "
            "left some modules as they were, leave these out with exclude_modules."
        )
    return basis[:, :number].contiguous(), values[:number], vectors.energy


@hookimpl
def register_basis_methods(register: RegisterBasisMethod) -> None:
    needs = BasisNeeds(safety_rows=False, weights=True, unaligned_model=True, chooses_rank=True)
    register("weight-delta", weight_delta, needs)
