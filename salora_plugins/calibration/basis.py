"""From statistics to safety bases: SaLoRA's own method, registered like those of plugins, and ranks by need."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.errors import CalibrationError
from ..activations.statistics import ModuleStatistics
from ..activations.vectors import VectorStatistics, decompose_together
from ..hookspecs import BasisMethod, hookimpl
from ..ranks import Rank, RankRule, Side, SideRanks, of_side, rank_of_spectrum, share_or_rule
from ..safety_module import SideBases
from ..support.distributed import broadcast, gather_json, rank_and_world_size, sum_over_ranks
from ..support.linear_algebra import MOST_DEVIATION, deviations_from_orthonormal, on_cpu, values_of
from ..support.module_names import listed, pattern_for, quoted

logger = logging.getLogger(__name__)

# Modules whose statistics are decomposed before the first of them is freed.
_TOGETHER = 64


@dataclass(frozen=True)
class Basis:
    """Directions of one side of one module."""

    vectors: Tensor
    """(d, rank) float32, with orthonormal columns; on the CPU once its deviation is known."""

    singular_values: Tensor
    """(rank,) float32, where the vectors are."""

    deviation: Tensor | None = None
    """How far the columns are from orthonormal, once it is known; NaN where anything is not finite."""


def top_singular_vectors(statistics: ModuleStatistics, rank: int, side: Side) -> tuple[Tensor, Tensor]:
    """
    U_C: the top left singular vectors of W X_h (the paper, section 4.1); for the input side those of X_h.

    Args:
        statistics: Of one layer over the safety data.
        rank: Number of directions.
        side: "output" or "input".

    Returns:
        Basis (d, rank) with orthonormal columns and singular values (rank,), both float32.
    """
    return statistics.of(side).top(rank)


@hookimpl
def register_basis_methods(register: Callable[[str, BasisMethod], None]) -> None:
    register("salora", top_singular_vectors)


def compute_bases(
    statistics: dict[str, ModuleStatistics],
    ranks: SideRanks,
    method: BasisMethod,
    method_name: str,
    defaults: Mapping[Side, Collection[str]] | None = None,
) -> dict[Side, SideBases]:
    """
    The bases of all modules; under torch.distributed every rank computes some, and all get the same bits.

    Args:
        statistics: Module name -> its statistics; emptied on the way, so that their memory is free again.
        ranks: Side -> module name -> rank; without a side there are no bases for it.
        method: Computes a basis.
        method_name: Its name, for messages.
        defaults: Side -> modules whose rank nobody asked for: it is cut to the directions that the data has.

    Returns:
        The sides. Modules that share their inputs share one input basis.

    Raises:
        CalibrationError: The data does not have so many directions, or the method's result is no basis. All ranks raise
            it, and it names all such modules.
    """
    rank, world_size = rank_and_world_size()
    defaults = defaults or {}
    computed: dict[tuple[Side, str], Basis | None] = {}
    problems: list[_Problem] = []
    shared: weakref.WeakKeyDictionary[VectorStatistics, dict[tuple[Rank, bool], str]] = weakref.WeakKeyDictionary()
    source: dict[tuple[Side, str], str] = {}
    dimensions: dict[tuple[Side, str], int] = {}
    names = list(statistics)
    energies: dict[Side, dict[str, float]] = {}
    for side in ranks:
        tensors = [statistics[name].of(side).energy_tensor for name in names]
        energies[side] = dict(zip(names, values_of(tensors), strict=True))
    for index, name in enumerate(tqdm(names, desc="finding directions", unit="layer", leave=False, disable=rank != 0)):
        if index % _TOGETHER == 0:
            mine = [name for i, name in enumerate(names[index : index + _TOGETHER], index) if i % world_size == rank]
            prepare({name: statistics[name] for name in mine}, ranks)
        entry = statistics.pop(name)
        for side, wanted in ranks.items():
            vectors = entry.of(side)
            dimensions[side, name] = vectors.dimension
            may_cut = name in defaults.get(side, ())
            source[side, name] = shared.setdefault(vectors, {}).setdefault((wanted[name], may_cut), name)
            if source[side, name] == name:
                computed[side, name] = None
                if index % world_size == rank:
                    try:
                        computed[side, name] = _basis(entry, side, wanted[name], may_cut, method, method_name)
                    except _ProblemError as problem:
                        problems.append(problem.args[0])
                    except Exception as error:
                        if world_size == 1:
                            raise
                        told = f"basis_method={method_name!r} failed for {name!r}: {type(error).__name__}: {error}"
                        problems.append({"error": told})
        if (index + 1) % _TOGETHER == 0 or index + 1 == len(names):
            _move_to_cpu(computed)
    problems += _defects(computed, method_name)
    _raise_for(problems, source)
    owners = {name: index % world_size for index, name in enumerate(names)}
    complete = _with_room(computed, dimensions)
    for (_, name), basis in complete.items():
        broadcast([basis.vectors, basis.singular_values], source=owners[name])
    return {side: _side({n: complete[side, source[side, n]] for n in names}, energies[side]) for side in ranks}


def prepare(statistics: Mapping[str, ModuleStatistics], ranks: SideRanks) -> None:
    """Decompose the statistics of several modules at once."""
    wanted = [
        (entry.of(side), of_names[name]) for side, of_names in ranks.items() for name, entry in statistics.items()
    ]
    try:
        decompose_together((vectors, rank) for vectors, rank in wanted if isinstance(rank, int))
    except (RuntimeError, ValueError) as error:
        # Too much for the device's memory, for one: each of them is decomposed alone next, and says what is wrong.
        logger.debug("Modules could not be decomposed together: %s", error)


def _move_to_cpu(computed: dict[tuple[Side, str], Basis | None]) -> None:
    """The new bases, with their deviations: a device is waited for once for all of them."""
    new = {key: basis for key, basis in computed.items() if basis is not None and basis.deviation is None}
    deviations = deviations_from_orthonormal([basis.vectors for basis in new.values()])
    vectors = on_cpu([basis.vectors for basis in new.values()])
    singular_values = on_cpu([basis.singular_values for basis in new.values()])
    for key, deviation, basis, values in zip(new, deviations, vectors, singular_values, strict=True):
        # An infinite or undefined singular value makes the sum undefined.
        computed[key] = Basis(basis, values, deviation + 0 * new[key].singular_values.double().sum())


def _side(bases: Mapping[str, Basis], energies: dict[str, float]) -> SideBases:
    return SideBases(
        {name: basis.vectors for name, basis in bases.items()},
        {name: basis.singular_values for name, basis in bases.items()},
        energies,
        are_checked=True,  # by the rank that computed them, see `_defects`
    )


_Problem = dict[str, Any]
"""Of one module: side, name, and, where the data has too few directions, rank and found; otherwise error."""


class _ProblemError(Exception):
    """Carries a problem."""


def _raise_for(problems: list[_Problem], source: Mapping[tuple[Side, str], str]) -> None:
    """
    Raises:
        CalibrationError: A rank has met problems. The others must not wait for its bases.
    """
    groups: dict[tuple[Side, Rank, bool, bool], dict[str, int]] = {}
    for problem in (problem for of_rank in gather_json(problems) for problem in of_rank):
        if "error" in problem:
            raise CalibrationError(problem["error"])
        side = problem["side"]
        alike = [name for (other, name), first in source.items() if (other, first) == (side, problem["name"])]
        key = (side, problem["rank"], problem["found"] == 0, problem["sketched"])
        groups.setdefault(key, {}).update(dict.fromkeys(alike, problem["found"]))
    if groups:
        targets = {name for _, name in source}
        raise CalibrationError("\n".join(_too_few(*key, found, targets) for key, found in groups.items()))


def _too_few(
    side: Side, wanted: Rank, none: bool, sketched: bool, found: Mapping[str, int], targets: Collection[str]
) -> str:
    """One message for modules that fail alike: name -> how many directions it has."""
    option, names = of_side(side, "safety_rank"), list(found)
    pattern = quoted(pattern_for(names, set(targets) - set(names)))
    if none:
        return (
            f"The {side}s of {listed(names)} are zero on all positions of the safety data that count, so that they "
            "have no direction to protect: their weights are zero, or the model or the data is broken. Leave them out "
            f"with exclude_modules={pattern}."
        )
    numbers = sorted(set(found.values()))
    have = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    if not isinstance(wanted, int):
        advice = "calibration_engine='exact', which knows all directions" if sketched else "a number"
        reach = "capture less than that share of the energy"
        if isinstance(wanted, str):
            reach = "may make up less than that share of the entropy"
        return (
            f"{option}={wanted}: {have} directions {reach} of {listed(names)}. Lower "
            f"the share, or give {advice}, or another rank for these modules: "
            f"{option}_pattern={{{pattern}: ...}}."
        )
    return (
        f"{option}={wanted}, but the {side}s of {listed(names)} have only {have} directions on the safety data; the "
        "rest would be rounding errors. Give more, and more varied, safety data (num_safety_samples, safety_data), "
        f"lower {option} to {numbers[0]}, or set it for these modules: {option}_pattern={{{pattern}: {numbers[0]}}}."
    )


def _with_room(
    computed: Mapping[tuple[Side, str], Basis | None], dimensions: Mapping[tuple[Side, str], int]
) -> dict[tuple[Side, str], Basis]:
    """What this rank has computed, and room for what the other ranks have."""
    ranks = torch.tensor([0 if basis is None else basis.singular_values.shape[0] for basis in computed.values()])
    return {
        key: Basis(torch.empty(dimensions[key], rank), torch.empty(rank)) if basis is None else basis
        for (key, basis), rank in zip(computed.items(), sum_over_ranks(ranks).tolist(), strict=True)
    }


def _basis(
    entry: ModuleStatistics, side: Side, wanted: Rank, may_cut: bool, method: BasisMethod, method_name: str
) -> Basis:
    vectors = entry.of(side)
    if not isinstance(wanted, int):
        found, enough = rank_by_need(vectors, share_or_rule(wanted))
    elif vectors.count < wanted and not may_cut:
        option = of_side(side, "safety_rank")
        told = (
            f"{option}={wanted}, but the safety data has only {vectors.count} positions to find directions in. "
            f"Give more safety data (num_safety_samples, safety_data), or lower {option}."
        )
        raise _ProblemError({"error": told})
    else:
        found = vectors.directions(wanted)
        enough = found == wanted or (may_cut and found > 0)
    if not enough:
        sketched = vectors.most_directions < min(vectors.dimension - 1, vectors.count)
        raise _ProblemError({"side": side, "name": entry.name, "rank": wanted, "found": found, "sketched": sketched})
    try:
        result = method(entry, found, side)
        return _checked_basis(result, vectors.dimension, found, entry.name, method_name)
    except CalibrationError as error:
        raise _ProblemError({"error": str(error)}) from error


def rank_by_need(vectors: VectorStatistics, wanted: float | RankRule) -> tuple[int, bool]:
    """
    How many top singular directions a share of the energy, or a rule of the spectrum, asks for, and True; they must
    leave the layer something to train. Where all that there are do not do, their number, and False.
    """
    most = min(vectors.dimension - 1, vectors.most_directions)
    rank, size = min(32, most), min(vectors.dimension, vectors.count)
    while rank:
        found = rank_of_spectrum(vectors.top(rank)[1], vectors.energy, size, wanted)
        if found is not None and vectors.directions(found) == found:
            return found, True
        if found is not None or rank == most:
            break
        rank = min(2 * rank, most)
    return vectors.directions(most), False


def _checked_basis(result: Any, dimension: int, rank: int, name: str, method: str) -> Basis:
    """
    Raises:
        CalibrationError: A method returned something else than tensors of the shapes of a basis and its values.
    """
    told = partial(_not_a_basis, dimension=dimension, rank=rank, name=name, method=method)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise CalibrationError(told(f"a {type(result).__name__}{size}"))
    if kinds := [type(part).__name__ for part in result if not isinstance(part, Tensor)]:
        raise CalibrationError(told(" and ".join(f"a {kind}" for kind in kinds)))
    basis, values = result
    if (basis.shape, values.shape) != ((dimension, rank), (rank,)):
        raise CalibrationError(told(f"shapes {tuple(basis.shape)} and {tuple(values.shape)}"))
    if not (basis.is_floating_point() and values.is_floating_point()):
        raise CalibrationError(told(f"{basis.dtype} and {values.dtype}"))
    if basis.device.type == "mps":
        basis, values = basis.cpu(), values.cpu()  # no float64 there
    basis, values = basis.detach().float().contiguous(), values.detach().float().contiguous()
    return Basis(basis, values)


def _defects(computed: Mapping[tuple[Side, str], Basis | None], method: str) -> list[_Problem]:
    """What is wrong with bases that are none."""
    checked = [
        (name, basis, basis.deviation)
        for (_, name), basis in computed.items()
        if basis is not None and basis.deviation is not None
    ]
    deviations = values_of([deviation for _, _, deviation in checked])
    problems: list[_Problem] = []
    for (name, basis, _), deviation in zip(checked, deviations, strict=True):
        if not math.isfinite(deviation):
            found = "NaN or infinity"
        elif deviation > MOST_DEVIATION:
            found = f"columns that are not orthonormal (deviation {deviation:.1e})"
        else:
            continue
        dimension, rank = basis.vectors.shape
        problems.append({"error": _not_a_basis(found, dimension, rank, name, method)})
    return problems


def _not_a_basis(found: str, dimension: int, rank: int, name: str, method: str) -> str:
    return (
        f"basis_method={method!r} returned {found} for {name!r}; expected a tensor of shape {(dimension, rank)} with "
        f"orthonormal columns and one of shape {(rank,)}, their singular values."
    )
