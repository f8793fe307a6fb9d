"""
From a model and safety data to a safety module, in one line: settings, rows, answered rows, statistics, directions.

Only the first step knows the configuration, and only the last ones need the model to run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..activations.statistics import ModuleStatistics
from ..config import SaLoRAConfig
from ..hookspecs import SAFETY_ROWS_ONLY
from ..inspection import facts
from ..models.fingerprint import weight_samples
from ..models.running import adapters_disabled, check_base_is_unchanged, evaluation_mode, on_accelerator
from ..models.targets import say_what_is_left_out
from ..models.weights import check_weights
from ..ranks import Side
from ..safety_module import SafetyModule, SideBases
from ..support.module_names import listed
from ..support.notices import tell
from .basis import compute_bases
from .cache import calibration_key, load_asked_for, store
from .gathering import safety_positions, safety_statistics
from .leak import Leak, measure_leak, say_leak
from .needs import Sources, Supplies, empty_statistics, gather, read_sources, with_supplies
from .recording import provenance_of
from .refusals import AnsweredRows, answered_rows
from .rows import SafetyRows, safety_rows
from .settings import SafetySettings, safety_settings

logger = logging.getLogger(__name__)


def calibrate(model: nn.Module, tokenizer: Any = None, **options: Any) -> SafetyModule:
    """
    Compute the safety module of a model: U_C per target layer (the paper, section 4.1), and V_C with an input side.

    Args:
        model: The aligned model; a [`~peft.PeftModel`] is calibrated with its adapters disabled. It is put back as it
            was: device, training mode, gradient checkpointing, hooks.
        tokenizer: Its tokenizer. None loads the one in the model's own folder or repository, where data needs one.
        options: As in [`SaLoRAConfig`]: safety_data, target_modules, safety_rank, input_safety_rank,
            safety_positions, basis_method, num_safety_samples, calibration_batch_size, calibration_engine, ...

    Returns:
        The safety module, its tensors on the CPU.

    Raises:
        CalibrationError: The model refuses too little, a layer is not used, or values are not finite.
        DataError: The safety data cannot be read.
        ValueError: An option contradicts the model, or an adapter has changed the base model's weights.

    Example:

        >>> calibrate(model, tokenizer, target_modules=["q_proj", "v_proj"]).save("llama.salora.safetensors")
    """
    config = SaLoRAConfig(**options, tokenizer=tokenizer)
    check_base_is_unchanged(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    say_what_is_left_out(model, config)
    return calibrate_with(model, config)


def calibrate_with(model: nn.Module, config: SaLoRAConfig) -> SafetyModule:
    """
    `calibrate` with the options of a configuration.

    Under torch.distributed, where every rank must call it, each takes its share of the samples, and all end with the
    same bits.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = safety_settings(model, config)
    rows = safety_rows(settings.rows) if settings.reads_safety_rows else SafetyRows([], None)
    sources = read_sources(model, settings)
    with adapters_disabled(model):
        key = calibration_key(model, settings, rows, sources)
        if key is not None and (cached := load_asked_for(key, model, settings)) is not None:
            tell(logger, "%s; from the cache (calibration_cache=False calibrates again).", facts(cached.provenance))
            say_leak(cached.provenance)
            return cached
        start = time.monotonic()
        with on_accelerator(model), evaluation_mode(model):
            check_weights(model, settings.names)
            answered = answered_rows(rows, model, settings)
            _tell_of_answers(answered, settings.rows.num)
            found = _directions(model, answered, sources, settings)
    provenance = provenance_of(settings, answered, found.positions_counted, found.sides, found.leak, found.supplied)
    safety_module = SafetyModule(found.sides, weight_samples(model, settings.names), provenance)
    seconds = time.monotonic() - start
    answers = f", besides {answered.answering.seconds:.0f} s for the answers" if answered.counts else ""
    tell(logger, "%s; calibrated in %.0f s%s.", facts(provenance), seconds - answered.answering.seconds, answers)
    say_leak(provenance)
    if key is not None:
        store(key, safety_module)
    return safety_module


def directions_of_rows(model: nn.Module, config: SaLoRAConfig) -> dict[Side, SideBases]:
    """
    The directions that the layers' outputs and inputs take on rows of any kind, by the steps of a calibration.

    They are no safety module: nothing of it is measured, kept or told.

    Args:
        model: The base model, its adapters disabled.
        config: Its `safety_data` are the rows, and its `basis_method` is "salora".
    """
    settings = safety_settings(model, config)
    rows = safety_rows(settings.rows)
    with on_accelerator(model), evaluation_mode(model):
        check_weights(model, settings.names)
        answered = answered_rows(rows, model, settings)
        positions = safety_positions(answered.tokenizer, settings)
        statistics = safety_statistics(model, answered.examples, positions, settings, "gathering directions")
        return compute_bases(
            statistics, settings.ranks, settings.basis_method, settings.method_name, settings.default_ranks
        )


@dataclass(frozen=True)
class _Found:
    """What came out of the passes over the data."""

    sides: dict[Side, SideBases]
    leak: Leak
    positions_counted: int
    supplied: Mapping[str, Any]
    """What the method got beside the safety rows, for the provenance."""


def _directions(model: nn.Module, answered: AnsweredRows, sources: Sources, settings: SafetySettings) -> _Found:
    needs = settings.needs
    tokenizer = answered.tokenizer if sources.utility is None else answered.tokenizer or sources.utility.tokenizer
    positions = safety_positions(tokenizer, settings)
    supplies = gather(model, sources, positions, settings) if needs != SAFETY_ROWS_ONLY else Supplies()

    def supplied(statistics: dict[str, ModuleStatistics]) -> dict[str, ModuleStatistics]:
        return statistics if needs == SAFETY_ROWS_ONLY else with_supplies(statistics, supplies, settings)

    leak = measure_leak(model, answered, positions, settings, supplied)
    if settings.reads_safety_rows:
        statistics = safety_statistics(model, answered.examples, positions, settings)
    else:
        statistics = empty_statistics(model, settings)
    positions_counted = statistics[settings.names[0]].output.count
    statistics = supplied(statistics)
    supplies.utility.clear()  # so that their memory is free again, module by module
    sides = compute_bases(
        statistics,
        {**settings.ranks, "input": leak.ranks} if leak.ranks else settings.ranks,
        settings.basis_method,
        settings.method_name,
        settings.default_ranks,
        needs,
    )
    return _Found(sides, leak, positions_counted, supplies.facts)


def _tell_of_answers(answered: AnsweredRows, num: int) -> None:
    if answered.by_source:
        of_each = ", ".join(f"{number} of {name}" for name, number in answered.by_source.items())
        tell(logger, "Safety data: %s.", of_each)
        if unused := [name for name, number in answered.by_source.items() if not number]:
            logger.warning(
                "safety_data: nothing of %s is used: the model refuses none of its requests, or the others are so many "
                "that num_safety_samples=%d are full without it.",
                listed(unused),
                num,
            )
    if answered.counts:
        took = answered.answering
        tell(
            logger,
            "Answered %d requests in %.0f s, refusing %d: %.0f tokens/s, %d at once.",
            answered.counts["requests"],
            took.seconds,
            answered.counts["refusals"],
            took.tokens / max(took.seconds, 1e-9),
            took.largest_batch,
        )
