"""What a calibration needs to know, resolved once from a configuration and a model; the configuration stops here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..activations.collector import statistics_dimensions
from ..activations.errors import CalibrationError
from ..activations.statistics import Engine, choose_engine
from ..bases.actsvd import UTILITY_RANKS
from ..config import SaLoRAConfig
from ..hookspecs import SAFETY_ROWS_ONLY, BasisMethod, BasisNeeds
from ..models.embeddings import vocabulary_size
from ..models.targets import check_ranks, check_reached_by_text, default_input_ranks, target_module_names
from ..models.weights import base_layer, check_reachable, unreachable_weight
from ..options import OPTIONS, Positions
from ..plugins import basis_methods, basis_needs
from ..ranks import Rank, Side, SideRanks, matching_patterns, measured_rule, of_side, rule_of

SHARE_DIRECTIONS = 256
"""How many directions a sketch must be good for where ranks are shares of the energy, and so not known before."""

RULE_DIRECTIONS = 512
"""The same where they follow from a rule such as "leak:0.05"."""


@dataclass(frozen=True)
class RowSettings:
    """Which rows are read, and what they are rendered with and for."""

    source: Any
    """As for `salora_plugins.rows.reading.load_examples`."""

    option: str
    """What the user calls them, for messages."""

    num: int
    """How many are used."""

    seed: int
    """Of their order."""

    max_length: int
    """Tokens of a row that are kept."""

    tokenizer: Any
    """As it was given; None: found where a row needs one."""

    vocabulary: int | None
    """How many tokens the model has an embedding for."""

    base_model: str
    """Folder or repository of the model, with its own tokenizer; may be empty."""


@dataclass(frozen=True)
class SafetySettings:
    """Of the calibration of a safety module."""

    rows: RowSettings
    batch_size: int
    positions: Positions
    header_weight: float
    ranks: SideRanks
    default_ranks: Mapping[Side, Set[str]]
    """
    Modules whose rank is the default's, or follows from a rule. That must not fail on a small or uniform set, and is
    cut to what there is; a number that was asked for is an error.
    """
    basis_method: BasisMethod
    method_name: str
    needs: BasisNeeds
    """What the method gets beside the statistics of the safety rows."""
    engine: Engine
    may_cache: bool
    task_rows: RowSettings | None
    """Rows of the task, where they are known before the training: what the leak is measured against."""
    asked: Mapping[str, Any]
    """What the user asked for, as the provenance tells it."""
    options: Mapping[str, Any]
    """Every option by its name, data that was given as objects named by its type."""
    utility_rows: RowSettings | None = None
    """Where the method needs them."""
    contrastive_rows: RowSettings | None = None
    """Where there are any."""
    unaligned_model: str | None = None
    """Where the method needs it."""

    @property
    def names(self) -> list[str]:
        """The modules, in the model's order."""
        return list(self.ranks["output"])

    @property
    def reads_safety_rows(self) -> bool:
        """Whether safety data is read and run through the model."""
        return self.needs.reads_safety_rows("input" in self.ranks)

    @property
    def needs_headers(self) -> bool:
        """Whether the header's positions are told apart from the others."""
        return self.positions == "header" or self.header_weight != 1


@dataclass(frozen=True)
class TaskSettings:
    """Of the start values from task data."""

    rows: RowSettings
    batch_size: int
    names: Sequence[str]
    rank: int
    engine: Engine


def safety_settings(model: nn.Module, config: SaLoRAConfig) -> SafetySettings:
    """
    Args:
        model: The base model, with or without adapters.
        config: Its options of calibration, of directions and of targets.

    Raises:
        ValueError: An option contradicts the model.
    """
    ranks = checked_ranks(model, config)
    names = list(ranks["output"])
    methods = basis_methods()
    if config.basis_method not in methods:
        raise ValueError(
            f"basis_method={config.basis_method!r} is not registered. Choose one of {', '.join(sorted(methods))}."
        )
    check_reachable(model, names)
    needs = basis_needs().get(config.basis_method, SAFETY_ROWS_ONLY)
    if needs.unaligned_model and config.unaligned_model is None:
        raise CalibrationError(
            f"basis_method={config.basis_method!r} compares the model with unaligned_model: name that, a folder or a "
            "hub repository."
        )
    as_values = config.to_dict()
    return SafetySettings(
        rows=safety_row_settings(model, config),
        batch_size=config.calibration_batch_size,
        positions=config.resolved_safety_positions,
        header_weight=float(config.header_weight),
        ranks=ranks,
        default_ranks=_default_ranks(config, ranks),
        basis_method=methods[config.basis_method],
        method_name=config.basis_method,
        needs=needs,
        engine=_engine(model, config, ranks, needs),
        may_cache=config.calibration_cache,
        task_rows=_known_task_rows(model, config),
        asked={
            **({"safety_data": as_values["safety_data"]} if needs.reads_safety_rows("input" in ranks) else {}),
            **({"variant": config.variant} if config.variant == "sails" else {}),
            "safety_rank": config.safety_rank,
            "safety_rank_pattern": dict(config.safety_rank_pattern),
            "input_safety_rank": config.input_safety_rank if config.has_input_side else 0,
            "input_safety_rank_pattern": dict(config.input_safety_rank_pattern),
            "basis_method": config.basis_method,
            "seed": config.seed,
        },
        options={name: as_values[name] for name in OPTIONS},
        utility_rows=_row_settings(model, config, config.utility_data, "utility_data", config.num_utility_samples)
        if needs.utility_rows
        else None,
        contrastive_rows=None
        if config.contrastive_data is None
        else _row_settings(model, config, config.contrastive_data, "contrastive_data", config.num_safety_samples),
        unaligned_model=config.unaligned_model if needs.unaligned_model else None,
    )


def checked_ranks(model: nn.Module, config: SaLoRAConfig) -> SideRanks:
    """
    Side -> target module, in the model's order -> rank. The weights need not be there, so that the model may be one of
    the meta device.

    Raises:
        ValueError: There are no such targets, or they cannot be calibrated.
    """
    names = target_module_names(model, config)
    ranks = config.safety_ranks(default_input_ranks(model, names))
    check_ranks(model, ranks)
    check_reached_by_text(model, names)
    return ranks


def safety_row_settings(model: nn.Module, config: SaLoRAConfig) -> RowSettings:
    """Of the safety data."""
    return _row_settings(model, config, config.safety_data, "safety_data", config.num_safety_samples)


def statistics_bytes(model: nn.Module, config: SaLoRAConfig, ranks: SideRanks) -> int:
    """What the statistics of a calibration take beside the weights; the model may be one of the meta device."""
    layers = {name: base_layer(model.get_submodule(name)) for name in ranks["output"]}
    outputs, inputs = statistics_dimensions(layers, with_inputs="input" in ranks)
    needs = basis_needs().get(config.basis_method, SAFETY_ROWS_ONLY)
    sets = needs.reads_safety_rows("input" in ranks) + needs.utility_rows
    engine = _engine(model, config, ranks, needs)
    return sets * sum([engine.bytes_of(d) for d in outputs] + [engine.bytes_of(d, "input") for d in inputs])


def task_settings(model: nn.Module, config: SaLoRAConfig, rows: Any = None) -> TaskSettings:
    """
    Args:
        model: The base model, with or without adapters.
        config: task_data, task_rank, num_task_samples, target_modules, ... are used.
        rows: Task data to use instead of `config.task_data`.

    Raises:
        CalibrationError: The weights are sharded.
    """
    names = target_module_names(model, config)
    if (found := unreachable_weight(model, names)) is not None:
        raise CalibrationError(f"{found}, so that no task data can be run through it. Set init='pissa' or 'zero'.")
    source = config.task_data if rows is None else rows
    return TaskSettings(
        rows=_row_settings(model, config, source, "task_data", config.num_task_samples),
        batch_size=config.calibration_batch_size,
        names=names,
        rank=config.task_rank,
        engine=_engine(model, config, {"output": dict.fromkeys(names, config.task_rank)}, SAFETY_ROWS_ONLY),
    )


def _row_settings(model: nn.Module, config: SaLoRAConfig, source: Any, option: str, num: int) -> RowSettings:
    return RowSettings(
        source=source,
        option=option,
        num=num,
        seed=config.seed,
        max_length=config.calibration_max_length,
        tokenizer=config.tokenizer,
        vocabulary=vocabulary_size(model),
        base_model=getattr(getattr(model, "config", None), "_name_or_path", "") or "",
    )


def _known_task_rows(model: nn.Module, config: SaLoRAConfig) -> RowSettings | None:
    """None where there are none, or none that can be read a second time for the start values."""
    data = config.task_data
    if data is None or not (isinstance(data, os.PathLike) or hasattr(data, "__len__")):
        return None
    return _row_settings(model, config, data, "task_data", config.num_task_samples)


def _default_ranks(config: SaLoRAConfig, ranks: SideRanks) -> dict[Side, set[str]]:
    is_default: dict[Side, bool] = {
        "output": config.safety_rank == OPTIONS["safety_rank"].default,
        "input": config.input_safety_rank is None,
    }
    return {
        side: {
            name
            for name, key in matching_patterns(of_names, getattr(config, of_side(side, "safety_rank_pattern"))).items()
            if (is_default[side] and key is None) or measured_rule(of_names[name]) is not None
        }
        for side, of_names in ranks.items()
    }


def _most_directions(rank: Rank) -> int:
    if isinstance(rank, int):
        return rank
    return SHARE_DIRECTIONS if rule_of(rank) is None else RULE_DIRECTIONS


def _engine(model: nn.Module, config: SaLoRAConfig, ranks: SideRanks, needs: BasisNeeds) -> Engine:
    most = {side: max(map(_most_directions, by_name.values())) for side, by_name in ranks.items()}
    if needs.utility_rows:
        for side in most:
            if (option := of_side(side, "utility_rank")) in needs.options:
                most[side] = max(most[side], getattr(config, option) or UTILITY_RANKS * most[side])
    layers = {name: base_layer(model.get_submodule(name)) for name in ranks["output"]}
    outputs, inputs = statistics_dimensions(layers, with_inputs="input" in ranks)
    return choose_engine(
        config.calibration_engine,
        outputs,
        inputs,
        rank=most["output"],
        input_rank=most.get("input", 0),
        num_weights=sum(parameter.numel() for parameter in model.parameters()),
        seed=config.seed,
    )
