"""From statistics to safety bases: SaLoRA's own method, registered like those of plugins, and ranks by need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..distributed import broadcast, rank_and_world_size, sum_over_ranks
from ..hookspecs import BasisMethod, hookimpl
from ..ranks import Rank, rank_for_share
from .capture import CalibrationError
from .statistics import ModuleStatistics, VectorStatistics

Side = Literal["output", "input"]

_OPTIONS = {"output": "safety_rank", "input": "input_safety_rank"}


@dataclass(frozen=True)
class Basis:
    """Directions of one side of one module."""

    vectors: Tensor
    """(d, rank) float32 on the CPU, with orthonormal columns."""

    singular_values: Tensor
    """(rank,) float32 on the CPU."""


def top_singular_vectors(statistics: ModuleStatistics, rank: int, side: Side) -> tuple[Tensor, Tensor]:
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


def compute_bases(
    statistics: dict[str, ModuleStatistics],
    ranks: Mapping[Side, Mapping[str, Rank]],
    method: BasisMethod,
    method_name: str,
) -> dict[Side, dict[str, Basis]]:
    """
    The bases of all modules; under torch.distributed every rank computes some, and all get the same bits.

    Args:
        statistics: Module name -> its statistics; emptied on the way, so that their memory is free again.
        ranks: Side -> module name -> rank; without a side there are no bases for it.
        method: Computes a basis.
        method_name: Its name, for messages.

    Returns:
        Side -> module name -> basis. Modules that share their inputs share one input basis.

    Raises:
        CalibrationError: The data does not have so many directions, or the method's result is no basis.
    """
    rank, world_size = rank_and_world_size()
    computed: dict[tuple[Side, str], Basis | None] = {}
    shared: weakref.WeakKeyDictionary[VectorStatistics, dict[Rank, str]] = weakref.WeakKeyDictionary()
    source: dict[tuple[Side, str], str] = {}
    dimensions: dict[tuple[Side, str], int] = {}
    names = list(statistics)
    for index, name in enumerate(tqdm(names, desc="finding directions", unit="layer", leave=False, disable=rank != 0)):
        entry = statistics.pop(name)
        for side, wanted in ranks.items():
            vectors: VectorStatistics = getattr(entry, side)
            dimensions[side, name] = vectors.dimension
            source[side, name] = shared.setdefault(vectors, {}).setdefault(wanted[name], name)
            if source[side, name] == name:
                mine = index % world_size == rank
                computed[side, name] = _basis(entry, side, wanted[name], method, method_name) if mine else None
    owners = {name: index % world_size for index, name in enumerate(names)}
    for (side, name), basis in _with_room(computed, dimensions).items():
        broadcast([basis.vectors, basis.singular_values], source=owners[name])
        computed[side, name] = basis
    return {side: {name: computed[side, source[side, name]] for name in names} for side in ranks}


def _with_room(
    computed: Mapping[tuple[Side, str], Basis | None], dimensions: Mapping[tuple[Side, str], int]
) -> dict[tuple[Side, str], Basis]:
    """What this rank has computed, and room for what the other ranks have."""
    ranks = torch.tensor([0 if basis is None else basis.singular_values.shape[0] for basis in computed.values()])
    return {
        key: Basis(torch.empty(dimensions[key], rank), torch.empty(rank)) if basis is None else basis
        for (key, basis), rank in zip(computed.items(), sum_over_ranks(ranks).tolist(), strict=True)
    }


def _basis(entry: ModuleStatistics, side: Side, wanted: Rank, method: BasisMethod, method_name: str) -> Basis:
    vectors: VectorStatistics = getattr(entry, side)
    option = _OPTIONS[side]
    if isinstance(wanted, float):
        wanted = _rank_by_need(entry.name, vectors, wanted, option)
    elif vectors.count < wanted:
        raise CalibrationError(
            f"{option}={wanted}, but the safety data has only {vectors.count} positions to find directions in. Give "
            f"more safety data (num_safety_samples, safety_data), or lower {option}."
        )
    elif vectors.most_directions < wanted:
        raise CalibrationError(
            f"{option}={wanted}, but the {side}s of {entry.name!r} have only {vectors.most_directions} directions. "
            f"Lower {option}, or set it for this module in {option}_pattern."
        )
    basis, values = method(entry, wanted, side)
    _check_basis(basis, vectors.dimension, wanted, entry.name, method_name)
    return Basis(basis.float().cpu().contiguous(), values.float().cpu())


def _rank_by_need(name: str, vectors: VectorStatistics, share: float, option: str) -> int:
    """How many top singular directions capture a share of the energy; they must leave the layer something to train."""
    most = min(vectors.dimension - 1, vectors.most_directions)
    rank = min(32, most)
    while True:
        found = rank_for_share(vectors.top(rank)[1], vectors.energy, share)
        if found is not None:
            return found
        if rank == most:
            break
        rank = min(2 * rank, most)
    sketched = most < min(vectors.dimension - 1, vectors.count)
    advice = "calibration_engine='exact', which knows all directions" if sketched else "a number"
    raise CalibrationError(
        f"{option}={share}: {most} directions capture less than that share of the energy of {name!r}. Lower the share, "
        f"or give {advice}, or another rank for this module in {option}_pattern."
    )


def _check_basis(basis: Tensor, dimension: int, rank: int, name: str, method: str) -> None:
    if basis.shape != (dimension, rank):
        raise CalibrationError(
            f"basis_method={method!r} returned shape {tuple(basis.shape)} for {name!r}; expected {(dimension, rank)}."
        )
    error = (basis.T.double() @ basis.double() - torch.eye(rank, dtype=torch.float64, device=basis.device)).abs().max()
    if not error < 1e-4:
        raise CalibrationError(
            f"basis_method={method!r} returned a basis for {name!r} whose columns are not orthonormal."
        )
