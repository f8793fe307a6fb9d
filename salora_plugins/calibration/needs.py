"""What a basis method needs beside the safety rows, gathered where it says so: see `hookspecs.BasisNeeds`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.errors import CalibrationError
from ..activations.positions import CountedPositions
from ..activations.statistics import ModuleStatistics
from ..activations.vectors import ExactStatistics
from ..hookspecs import Preparation
from ..models.checkpoint_weights import CheckpointWeights, coarser_dtype, elements_that_differ
from ..models.weights import base_layer, is_quantized, layer_features, linear_weight
from ..rows.examples import TokenizedExample, data_digest
from ..support.module_names import listed
from .contrastive import contrastive_rows
from .gathering import utility_statistics
from .refusals import needs_responses
from .rows import SafetyRows
from .settings import SafetySettings
from .utility import answered_utility_rows, read_utility_rows


@dataclass(frozen=True)
class Sources:
    """What is read before a model runs, and decides what comes out."""

    utility: SafetyRows | None = None
    unaligned: CheckpointWeights | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For the name under which a result is kept."""
        return {
            **({} if self.utility is None else {"utility": self.utility.digest}),
            **({} if self.unaligned is None else {"unaligned": self.unaligned.fingerprint()}),
        }


@dataclass(frozen=True)
class Supplies:
    """What the method gets of every module beside the statistics of the safety rows."""

    utility: dict[str, ModuleStatistics] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Callable[[], Tensor]]] = field(default_factory=dict)
    roundings: Mapping[str, float] = field(default_factory=dict)
    prepared: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the provenance."""


def read_sources(model: nn.Module, settings: SafetySettings) -> Sources:
    """
    Raises:
        DataError: The utility data cannot be read.
        FileNotFoundError, ValueError: The unaligned model cannot be read, or is of another kind; or this one is
            quantized, so that what it differs by would be its rounding for the most part.
    """
    utility = None if settings.utility_rows is None else read_utility_rows(settings.utility_rows)
    if settings.unaligned_model is None:
        return Sources(utility)
    if quantized := [name for name in settings.names if is_quantized(model.get_submodule(name))]:
        raise CalibrationError(
            f"basis_method={settings.method_name!r} compares weights with those of unaligned_model, and the weights of "
            f"{listed(quantized)} are quantized: what they differ by would be the rounding of that for the most part. "
            "Calibrate on the model as it is stored (`salora calibrate` without --load-in-4bit and --load-in-8bit), "
            "and train the quantized one with the resulting safety_module."
        )
    option = "unaligned_model"
    return Sources(utility, CheckpointWeights(settings.unaligned_model, model, settings.names, option=option))


def gather(model: nn.Module, sources: Sources, positions: CountedPositions, settings: SafetySettings) -> Supplies:
    """
    Args:
        model: The base model in evaluation mode, its adapters disabled.
        sources: What was read.
        positions: Those that count, of the utility rows as of the safety rows.
        settings: Of the calibration.

    Raises:
        CalibrationError, DataError: Something cannot be gathered; it names the option.
    """
    needs, facts = settings.needs, {name: settings.options[name] for name in settings.needs.options}
    utility: dict[str, ModuleStatistics] = {}
    if sources.utility is not None and settings.utility_rows is not None:
        rows = answered_utility_rows(
            model,
            sources.utility,
            settings.utility_rows,
            batch_size=settings.batch_size,
            whole_responses=needs_responses(settings.positions),
        )
        utility = utility_statistics(model, rows, positions, settings)
        facts |= {
            "utility_data": settings.options["utility_data"],
            "utility_data_sha256": data_digest(rows),
            "utility_samples": len(rows),
        }
    if sources.unaligned is not None:
        facts |= {"unaligned_model": sources.unaligned.source, "unaligned_sha256": sources.unaligned.fingerprint()}
    prepared: Mapping[str, Any] = {}
    if needs.prepare is not None:
        preparation = Preparation(
            model=model,
            names=settings.names,
            options=settings.options,
            contrastive_rows=partial(_pairs, settings, facts),
            batch_size=settings.batch_size,
        )
        prepared = needs.prepare(preparation)
        if not isinstance(prepared, Mapping):
            raise CalibrationError(
                f"basis_method={settings.method_name!r}: what it prepares must be a mapping of module names, not "
                f"{type(prepared).__name__}."
            )
    layers = {name: model.get_submodule(name) for name in settings.names}
    return Supplies(
        utility,
        weights={name: _readers(layer, name, sources, settings) for name, layer in layers.items()},
        roundings={}
        if sources.unaligned is None
        else {name: _rounding(layer, name, sources.unaligned) for name, layer in layers.items()},
        prepared=prepared,
        facts={name: value for name, value in facts.items() if value is not None},
    )


def with_supplies(
    statistics: Mapping[str, ModuleStatistics], supplies: Supplies, settings: SafetySettings
) -> dict[str, ModuleStatistics]:
    """The statistics of the safety rows with what else the method gets; its options, too."""
    options = {name: settings.options[name] for name in settings.needs.read_options}
    return {
        name: replace(
            entry,
            utility=supplies.utility.get(name),
            prepared=supplies.prepared.get(name),
            options=options,
            default_sides=frozenset(side for side, names in settings.default_ranks.items() if name in names),
            weights=supplies.weights.get(name, {}),
            weight_rounding=supplies.roundings.get(name, entry.weight_rounding),
        )
        for name, entry in statistics.items()
    }


def empty_statistics(model: nn.Module, settings: SafetySettings) -> dict[str, ModuleStatistics]:
    """Of no vectors, for a method without safety rows."""
    found = {}
    for name in settings.names:
        d_in, d_out = layer_features(model.get_submodule(name))
        inputs = ExactStatistics(d_in) if "input" in settings.ranks else None
        found[name] = ModuleStatistics(name, ExactStatistics(d_out), inputs)
    return found


def _readers(
    module: nn.Module, name: str, sources: Sources, settings: SafetySettings
) -> dict[str, Callable[[], Tensor]]:
    readers: dict[str, Callable[[], Tensor]] = {}
    if settings.needs.weights:
        readers["weights"] = partial(_weight, module)
    if sources.unaligned is not None:
        readers["unaligned_model"] = partial(_unaligned_weight, module, name, sources.unaligned)
    return readers


def _weight(module: nn.Module) -> Tensor:
    with linear_weight(module) as weight:
        return weight.to(torch.float32, copy=True)


def _unaligned_weight(module: nn.Module, name: str, checkpoint: CheckpointWeights) -> Tensor:
    """The model's own where they differ by no more than the rounding of the one in the coarser dtype."""
    weight = checkpoint.weight(name)
    with linear_weight(module) as own:
        weight = weight.to(own.device)
        return torch.where(elements_that_differ(own, weight), weight.float(), own.float()).contiguous()


def _rounding(module: nn.Module, name: str, checkpoint: CheckpointWeights) -> float:
    """See `ModuleStatistics.weight_rounding`."""
    layer: Any = base_layer(module)
    own: torch.dtype = layer.weight.dtype
    if checkpoint.dtype(name) == own:
        return torch.finfo(torch.float32).eps
    # Rounding errors are spread evenly over a step, which is at most eps times the number.
    step = torch.finfo(coarser_dtype(own, checkpoint.dtype(name))).eps
    return max(torch.finfo(torch.float32).eps, step / math.sqrt(12))


def _pairs(settings: SafetySettings, facts: dict[str, Any]) -> list[tuple[TokenizedExample, TokenizedExample]]:
    """The contrastive rows, of which it is told in `facts`."""
    if settings.contrastive_rows is None:
        raise CalibrationError(
            f"basis_method={settings.method_name!r} compares safe with unsafe responses: give contrastive_data, rows "
            "with prompt, chosen (safe) and rejected (unsafe)."
        )
    pairs = contrastive_rows(settings.contrastive_rows)
    facts["contrastive_samples"] = len(pairs)
    facts["contrastive_data_sha256"] = data_digest([example for pair in pairs for example in pair])
    return pairs
