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
from ..activations.vectors import VectorStatistics, decompose_together, rank_by_need
from ..hookspecs import SAFETY_ROWS_ONLY, BasisMethod, BasisNeeds, RegisterBasisMethod, hookimpl
from ..ranks import Rank, Side, SideRanks, of_side, share_or_rule
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

    energy: float | None = None
    """What the squared singular values are a part of, where the method told it; else that of the statistics."""


@dataclass(frozen=True)
class MethodCall:
    """A basis method as it is called."""

    method: BasisMethod
    name: str
    needs: BasisNeeds


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
def register_basis_methods(register: RegisterBasisMethod) -> None:
    register("salora", top_singular_vectors)


def compute_bases(
    statistics: dict[str, ModuleStatistics],
    ranks: SideRanks,
    method: BasisMethod,
    method_name: str,
    defaults: Mapping[Side, Collection[str]] | None = None,
    needs: BasisNeeds = SAFETY_ROWS_ONLY,
) -> dict[Side, SideBases]:
    """
    The bases of all modules; under torch.distributed every rank computes some, and all get the same bits.

    Args:
        statistics: Module name -> its statistics; emptied on the way, so that their memory is free again.
        ranks: Side -> module name -> rank; without a side there are no bases for it.
        method: Computes a basis.
        method_name: Its name, for messages.
        defaults: Side -> modules whose rank nobody asked for: it is cut to the directions that the data has.
        needs: What the method said of itself.

    Returns:
        The sides. Modules that share their inputs share one input basis, but where the method looks at their weights or
        at what it prepared for each.

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
    call = MethodCall(method, method_name, needs)
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
            source[side, name] = name
            if not needs.looks_at_modules:
                source[side, name] = shared.setdefault(vectors, {}).setdefault((wanted[name], may_cut), name)
            if source[side, name] == name:
                computed[side, name] = None
                if index % world_size == rank:
                    try:
                        computed[side, name] = _basis(entry, side, wanted[name], may_cut, call)
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
    if needs != SAFETY_ROWS_ONLY:
        _take_energies(energies, computed, source)
    owners = {name: index % world_size for index, name in enumerate(names)}
    complete = _with_room(computed, dimensions)
    for (_, name), basis in complete.items():
        broadcast([basis.vectors, basis.singular_values], source=owners[name])
    return {side: _side({n: complete[side, source[side, n]] for n in names}, energies[side]) for side in ranks}


def _take_energies(
    energies: dict[Side, dict[str, float]],
    computed: Mapping[tuple[Side, str], Basis | None],
    source: Mapping[tuple[Side, str], str],
) -> None:
    """Put those that the method told, of whichever rank, in the place of the statistics' own."""
    told = [
        (side, name, basis.energy)
        for (side, name), basis in computed.items()
        if basis is not None and basis.energy is not None
    ]
    known = {(side, name): energy for share in gather_json(told) for side, name, energy in share}
    for (side, name), first in source.items():
        energies[side][name] = known.get((side, first), energies[side][name])


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
        deviation = deviation + 0 * new[key].singular_values.double().sum()
        computed[key] = Basis(basis, values, deviation, new[key].energy)


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


def _basis(entry: ModuleStatistics, side: Side, wanted: Rank, may_cut: bool, call: MethodCall) -> Basis:
    vectors = entry.of(side)
    rank = _number_of_directions(entry, side, wanted, may_cut) if call.needs.safety_rows in (True, side) else wanted
    if not (isinstance(rank, int) or call.needs.chooses_rank):
        told = f"{of_side(side, 'safety_rank')}={rank}: basis_method={call.name!r} takes a number of directions only."
        raise _ProblemError({"error": told})
    least = most = rank if isinstance(rank, int) else vectors.dimension - 1
    if call.needs.chooses_rank:
        least, most = 1, vectors.dimension - 1 if may_cut or not isinstance(wanted, int) else most
    try:
        result = call.method(entry, rank, side)
        return _checked_basis(result, (vectors.dimension, least, most), entry.name, call.name)
    except CalibrationError as error:
        raise _ProblemError({"error": str(error)}) from error


def _number_of_directions(entry: ModuleStatistics, side: Side, wanted: Rank, may_cut: bool) -> int:
    """
    Raises:
        _ProblemError: The safety data does not have so many directions.
    """
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
    return found


def _checked_basis(result: Any, shape: tuple[int, int, int], name: str, method: str) -> Basis:
    """
    Args:
        result: What the method returned.
        shape: The dimension, and the least and the largest number of columns.
        name: Of the module, for messages.
        method: Its name, for messages.

    Raises:
        CalibrationError: A method returned something else than tensors of the shapes of a basis and its values.
    """
    dimension, least, most = shape
    told = partial(_not_a_basis, dimension=dimension, rank=_extent(least, most), name=name, method=method)
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise CalibrationError(told(f"a {type(result).__name__}{size}"))
    if kinds := [type(part).__name__ for part in result[:2] if not isinstance(part, Tensor)]:
        raise CalibrationError(told(" and ".join(f"a {kind}" for kind in kinds)))
    basis, values = result[:2]
    rank = basis.shape[-1] if basis.ndim else 0
    if (basis.shape, values.shape) != ((dimension, rank), (rank,)) or not least <= rank <= most:
        raise CalibrationError(told(f"shapes {tuple(basis.shape)} and {tuple(values.shape)}"))
    if not (basis.is_floating_point() and values.is_floating_point()):
        raise CalibrationError(told(f"{basis.dtype} and {values.dtype}"))
    if basis.device.type == "mps":
        basis, values = basis.cpu(), values.cpu()  # no float64 there
    basis, values = basis.detach().float().contiguous(), values.detach().float().contiguous()
    return Basis(basis, values, energy=_energy(result[2], told) if len(result) == 3 else None)


def _energy(value: Any, told: Callable[[str], str]) -> float:
    try:
        energy = float(value)
    except (TypeError, ValueError):
        energy = math.nan
    if not 0 < energy < math.inf:
        raise CalibrationError(told(f"the energy {value!r:.80}"))
    return energy


def _extent(least: int, most: int) -> int | str:
    return most if least == most else f"{least} to {most}"


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


def _not_a_basis(found: str, dimension: int, rank: int | str, name: str, method: str) -> str:
    return (
        f"basis_method={method!r} returned {found} for {name!r}; expected a tensor of shape ({dimension}, {rank}) "
        f"with orthonormal columns and one of shape ({rank},), their singular values."
    )
