"""Directions of the layers' outputs: those of safety rows and of utility rows, and the part of the weights in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..activations.errors import CalibrationError
from ..activations.statistics import ModuleStatistics
from ..calibration.basis import prepare
from ..support.module_names import listed


def top_directions(
    statistics: dict[str, ModuleStatistics], ranks: Mapping[str, int], *, rows: str, asked: str | None
) -> dict[str, Tensor]:
    """
    U: the top left singular vectors of W X of every layer, whose first columns are those of any lower rank.

    Args:
        statistics: Module name -> of its outputs; emptied on the way.
        ranks: Module name -> how many; 0: none.
        rows: Of which rows, for messages.
        asked: What was asked for, for messages; None: the ranks are cut to the directions that there are.

    Returns:
        Module name -> (d_out, k) float32 on the CPU.

    Raises:
        CalibrationError: There are not so many.
    """
    wanted = {name: rank for name, rank in ranks.items() if rank}
    prepare(
        {name: statistics[name] for name in wanted},
        {"output": {name: min(rank, statistics[name].output.most_directions) for name, rank in wanted.items()}},
    )
    found: dict[str, Tensor] = {}
    short: dict[str, int] = {}
    for name, rank in ranks.items():
        vectors = statistics.pop(name).output
        directions = vectors.directions(rank)
        if directions < rank and asked is not None:
            short[name] = directions
            continue
        basis = vectors.top(directions)[0] if directions else None
        found[name] = Tensor(vectors.dimension, 0) if basis is None else basis.cpu()
    if short:
        raise CalibrationError(
            f"ranks {asked}: the outputs of {listed(list(short))} have only {min(short.values())} directions on the "
            f"{rows}; the rest would be rounding errors. Give more, and more varied, rows, or lower ranks."
        )
    return found


def removed_part(safety: Tensor, utility: Tensor) -> tuple[Tensor, Tensor]:
    """
    L and R with dW = R L^T W = (I - U_u U_u^T) U_s U_s^T W, what Wei et al. 2024 (arXiv 2402.05162) remove.

    The product of the two projectors is no projector itself, but its rank is at most k_s, and so is that of dW.

    Args:
        safety: U_s (d_out, k_s), with orthonormal columns.
        utility: U_u (d_out, k_u), with orthonormal columns; k_u may be 0.

    Returns:
        U_s and (I - U_u U_u^T) U_s, (d_out, k_s) each.
    """
    return safety, safety - utility @ (utility.T @ safety)
