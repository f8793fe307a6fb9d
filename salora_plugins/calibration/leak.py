"""
How strongly an adapter could react to harmful requests that the calibration did not see: the leak, before training.

Part of the safety data is held out, V_C is computed from the rest, and an adapter is imagined whose A takes the
strongest directions of everyday requests that V_C leaves. Its leak is how it reacts to the held-out harmful requests
at their last token, where an answer begins, over how it reacts to other everyday requests there (squared norms). 0: it
cannot react to them; 1: as to any request. The rank of a layer can be the smallest that leaks little enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.errors import CalibrationError
from ..activations.last_inputs import last_inputs
from ..activations.positions import CountedPositions
from ..activations.statistics import ModuleStatistics
from ..activations.vectors import VectorStatistics, rank_by_need
from ..inspection import header_counts, leak_line, leak_warning, what_helps
from ..models.targets import default_input_rank
from ..models.weights import base_layer
from ..prompts.builtin import everyday_prompts
from ..ranks import Rank, measured_rule, share_or_rule
from ..rows.batching import check_token_ids
from ..rows.errors import DataError
from ..rows.examples import IGNORED, Example, TokenizedExample, data_digest
from ..rows.tokenizing import render_prompts
from ..support.distributed import gather_json, rank_and_world_size
from ..support.linear_algebra import is_asynchronous, top_right_singular_vectors
from ..support.module_names import listed
from ..support.notices import tell
from .basis import prepare
from .gathering import safety_statistics
from .refusals import AnsweredRows
from .rows import task_rows, tokenizer_for
from .settings import SafetySettings

logger = logging.getLogger(__name__)

FILTERS = 16
"""Directions of the imagined adapter: the default rank of a trained one."""
_EVERY, _LEAST, _MOST = 5, 16, 64  # one of so many rows is held out, at least and at most so many
_LEAST_CALIBRATED = 2  # times as many must be left to calibrate on
_LEAST_EVERYDAY, _MOST_EVERYDAY = 32, 128
_LEAST_RANK = 16  # that a rule tries
# Of the everyday requests' energy: less than this is left by rounding, where all prompts end alike (the first layer).
_NOTHING = 1e-6
_ALIKE = 1.01  # leaks of this ratio


@dataclass(frozen=True)
class Leak:
    """What was measured, or why nothing was."""

    by_module: dict[str, float] = field(default_factory=dict)
    """Module name -> leak with the directions that it gets."""

    ranks: dict[str, Rank] = field(default_factory=dict)
    """Module name -> input rank: a number in the place of a rule such as "leak:0.05"."""

    held_out: int = 0
    """Harmful requests that were held out."""

    everyday: str = ""
    """Which everyday requests stood for the task."""

    reason: str = ""
    """Why nothing was measured."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the provenance."""
        if not self.by_module:
            return {"leak_unknown": self.reason}
        return {"leak": self.by_module, "leak_requests": self.held_out, "leak_everyday": self.everyday}


def measure_leak(
    model: nn.Module,
    answered: AnsweredRows,
    positions: CountedPositions,
    settings: SafetySettings,
    supplied: Callable[[dict[str, ModuleStatistics]], dict[str, ModuleStatistics]] = dict,
) -> Leak:
    """
    Measure the leak of every layer, and choose the ranks that are to follow from it.

    The safety module itself is computed from all rows afterwards: what is measured is that of four fifths of them.

    Args:
        model: The base model, in evaluation mode.
        answered: The safety data.
        positions: Which of its positions count.
        settings: Of the calibration.
        supplied: Gives statistics what else the basis method needs.

    Raises:
        CalibrationError: A rank is to follow from the leak, and it cannot be measured.
    """
    wanted = settings.ranks.get("input")
    if wanted is None:
        return Leak(reason="there is no input side, so that an update reacts to harmful requests as to any other")
    if not settings.reads_safety_rows:
        return _unmeasured(f"basis_method={settings.method_name!r} reads no safety data", wanted)
    part, held_out = _split(answered.examples)
    everyday, named, reason = _everyday(settings) if held_out else ([], "", _too_few(answered.examples))
    if reason:
        return _unmeasured(reason, wanted)
    layers = {name: base_layer(model.get_submodule(name)) for name in settings.names}
    prompts = [*held_out, *everyday]
    # First, since it says best what is wrong with a layer.
    statistics = supplied(safety_statistics(model, part, positions, settings, "measuring the leak"))
    try:
        inputs = last_inputs(model, layers, prompts, settings.batch_size)
        found = _by_module(statistics, inputs, len(held_out), settings)
    except CalibrationError as error:
        if any(measured_rule(rank) is not None for rank in wanted.values()):
            raise
        # All ranks are here. What is calibrated is checked for itself, and does not depend on this.
        logger.warning("The leak is not measured: %s", error)
        return Leak(reason=str(error))
    _say_what_is_not_reached(found, wanted, header_counts(settings.positions, settings.header_weight))
    return Leak(
        by_module={name: float(f"{leak:.4g}") for name, (_, leak) in found.items()},
        ranks={name: found[name][0] if measured_rule(rank) is not None else rank for name, rank in wanted.items()},
        held_out=len(held_out),
        everyday=named,
    )


def _unmeasured(reason: str, wanted: Mapping[str, Rank]) -> Leak:
    """
    Raises:
        CalibrationError: A rank is to follow from the leak.
    """
    if by_rule := next((rank for rank in wanted.values() if measured_rule(rank) is not None), None):
        raise CalibrationError(
            f"input_safety_rank={by_rule!r}: the leak cannot be measured: {reason}. Give that, or a number."
        )
    logger.info("The leak is not measured: %s.", reason)
    return Leak(reason=reason)


def leak_of(basis: Tensor, task: Tensor, everyday: Tensor, harmful: Tensor) -> float:
    """
    How an adapter reacts to harmful requests over how it does to everyday ones, in squared norms: its A takes the 16
    strongest directions of the task's inputs outside of V_C.

    Args:
        basis: V_C (d_in, r_in), with orthonormal columns.
        task: (n, d_in), inputs of a layer on what is trained on.
        everyday: (n, d_in), inputs that the reaction is compared with.
        harmful: (n, d_in), inputs at harmful requests.
    """
    sets = [rows.to(basis.device).double() for rows in (task, everyday, harmful)]
    vectors = basis.double()
    of_task, *others = (rows - (rows @ vectors) @ vectors.T for rows in sets)
    directions, _ = top_right_singular_vectors(of_task, min(FILTERS, *of_task.shape))
    to_everyday, to_harmful = ((rows @ directions).square().sum(1).mean() for rows in others)
    least = _NOTHING * sets[1].square().sum(1).mean()
    return (to_harmful / torch.maximum(to_everyday, least)).item()


def energy_left(basis: Tensor, inputs: Tensor) -> float:
    """The share of the squared norms of inputs (n, d_in) that V_C (d_in, r_in) leaves."""
    rows, vectors = inputs.to(basis.device).double(), basis.double()
    return 1 - ((rows @ vectors).square().sum() / rows.square().sum()).item()


def _by_module(
    statistics: dict[str, ModuleStatistics], inputs: Mapping[str, Tensor], num_held_out: int, settings: SafetySettings
) -> dict[str, tuple[int, float]]:
    """
    Module name -> number of directions and leak; every rank of torch.distributed measures some, and all get all.

    Raises:
        CalibrationError: The basis method failed.
    """
    wanted = settings.ranks["input"]
    rank, world_size = rank_and_world_size()
    measured: dict[str, tuple[int, float]] = {}
    known: dict[tuple[int, Rank, str], tuple[int, float]] = {}  # layers that share their inputs, and so their bases
    failed = ""
    mine = {name: statistics[name] for index, name in enumerate(settings.names) if index % world_size == rank}
    on_device = {name: entry for name, entry in mine.items() if is_asynchronous(entry.of("input").device)}
    prepare(on_device, {"input": wanted})
    for index, name in enumerate(settings.names):
        if index % world_size == rank and not failed:
            key = id(inputs[name]), wanted[name], name if settings.needs.looks_at_modules else ""
            try:
                if key not in known:
                    known[key] = _of_module(statistics[name], inputs[name], num_held_out, wanted[name], settings)
                measured[name] = known[key]
            except Exception as error:
                failed = f"{name!r}: {type(error).__name__}: {error}"
    if failures := [text for text in gather_json(failed) if text]:
        raise CalibrationError(
            f"basis_method={settings.method_name!r} failed when the leak was measured, for {failures[0]}"
        )
    whole = {name: (number, leak) for share in gather_json(measured) for name, (number, leak) in share.items()}
    return {name: whole[name] for name in settings.names}


def _of_module(
    entry: ModuleStatistics, inputs: Tensor, num_held_out: int, wanted: Rank, settings: SafetySettings
) -> tuple[int, float]:
    harmful, task, everyday = inputs[:num_held_out], inputs[num_held_out::2], inputs[num_held_out + 1 :: 2]

    def measured(number: int) -> tuple[int, float]:
        basis = settings.basis_method(entry, number, "input")[0]
        return number, leak_of(basis, task, everyday, harmful)

    vectors, rule = entry.of("input"), measured_rule(wanted)
    if rule is None:
        return measured(_number_of_directions(vectors, wanted))
    tried: list[tuple[int, float]] = []
    for number in _grid(vectors):
        tried.append(measured(number))
        if tried[-1][1] <= rule.value:
            return tried[-1]
    least = min(leak for _, leak in tried)
    alike = [(number, leak) for number, leak in tried if leak <= _ALIKE * least]
    # All do in the first layer, where the last token is the same in all prompts: no fewer than by default then.
    usual = default_input_rank(vectors.dimension)
    return max((pair for pair in alike if pair[0] <= usual), default=alike[0])


def _grid(vectors: VectorStatistics) -> list[int]:
    """Numbers of directions to try: powers of two times 16, up to half of the inputs or what the data has."""
    most = max(1, vectors.directions(vectors.dimension // 2))
    return [number for number in (_LEAST_RANK << doubling for doubling in range(16)) if number <= most] or [most]


def _number_of_directions(vectors: VectorStatistics, wanted: Rank) -> int:
    """As the calibration of all rows chooses it, or fewer where these rows have fewer."""
    if isinstance(wanted, int):
        return max(1, vectors.directions(wanted))
    return max(1, rank_by_need(vectors, share_or_rule(wanted))[0])


def _split(examples: Sequence[TokenizedExample]) -> tuple[list[TokenizedExample], list[tuple[int, ...]]]:
    """
    The rows to calibrate on, and the prompts that are held out: evenly spaced in their random order. No row has one of
    them, whatever its response.
    """
    prompts = [prompt_of(example) for example in examples]
    different = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    number = min(_MOST, max(_LEAST, len(different) // _EVERY))
    if len(different) < (1 + _LEAST_CALIBRATED) * number:
        return list(examples), []
    held_out = [different[(2 * place + 1) * len(different) // (2 * number)] for place in range(number)]
    chosen = set(held_out)
    return [example for example, prompt in zip(examples, prompts, strict=True) if prompt not in chosen], held_out


def prompt_of(example: TokenizedExample) -> tuple[int, ...]:
    """The tokens in front of an example's last response; none where it begins with it, or has none."""
    labels = example.labels
    starts = (i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED and labels[i - 1] == IGNORED)
    return example.input_ids[: next(starts, 0)]


def _too_few(examples: Sequence[TokenizedExample]) -> str:
    different = len({prompt for prompt in map(prompt_of, examples) if prompt})
    least = (1 + _LEAST_CALIBRATED) * _LEAST
    return (
        f"of {len(examples)} safety rows none can be held out; it takes {least} with different prompts, and they have "
        f"{different}"
    )


def _everyday(settings: SafetySettings) -> tuple[list[tuple[int, ...]], str, str]:
    """
    Prompts of everyday requests, what they are called, and why there are none. Every second one stands for the task.
    """
    if settings.task_rows is not None:
        prompts = [prompt_of(row) for row in task_rows(settings.task_rows)]
        prompts = [prompt for prompt in prompts if prompt][:_MOST_EVERYDAY]
        if len(prompts) >= _LEAST_EVERYDAY:
            return prompts, "task_data", ""
    try:
        tokenizer = tokenizer_for(settings.rows)
        examples = [Example(messages=({"role": "user", "content": row["prompt"]},)) for row in everyday_prompts()]
        rendered = [tuple(ids) for ids in render_prompts(examples, tokenizer)]
        for ids in rendered:
            check_token_ids(ids, settings.rows.vocabulary, lambda: "an everyday request")
    except (CalibrationError, DataError) as error:
        return [], "", f"there are no everyday requests to compare with ({error})"
    return rendered, "builtin", ""


def everyday_digest(settings: SafetySettings) -> str:
    """Of what the leak is measured against, for what depends on it."""
    rows = [] if settings.task_rows is None else task_rows(settings.task_rows)
    built_in = [Example(prompt_text=row["prompt"]) for row in everyday_prompts()]
    return data_digest([*built_in, *rows])


def say_leak(provenance: Mapping[str, Any]) -> None:
    """Tell of the leak that a safety module has, with a warning where it is large."""
    if line := leak_line(provenance):
        tell(logger, "%s", line)
    if warning := leak_warning(provenance):
        logger.warning("%s", warning)


def _say_what_is_not_reached(
    found: Mapping[str, tuple[int, float]], wanted: Mapping[str, Rank], header_counts_already: bool
) -> None:
    missed: dict[Rank, list[str]] = {}
    for name, rank in wanted.items():
        if (rule := measured_rule(rank)) is not None and found[name][1] > rule.value:
            missed.setdefault(rank, []).append(name)
    for rank, names in missed.items():
        least, most = min(found[name][1] for name in names), max(found[name][1] for name in names)
        logger.warning(
            "input_safety_rank=%r is not reached by %d of %d layers (%s), with any number of directions up to half of "
            "the inputs: they got those that leak least, %.3f to %.3f (where all leak alike, no fewer than by "
            "default). %s",
            rank,
            len(names),
            len(wanted),
            listed(names),
            least,
            most,
            what_helps(header_counts_already),
        )
