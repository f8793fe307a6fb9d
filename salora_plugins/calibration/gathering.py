"""The statistics of the safety data, over the positions that count."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..activations.capture import collect_statistics
from ..activations.errors import CalibrationError
from ..activations.positions import CountedPositions
from ..activations.statistics import ModuleStatistics
from ..models.weights import base_layer
from ..rows.batching import share_of_rank
from ..rows.examples import TokenizedExample
from ..rows.headers import Headers
from .settings import SafetySettings

logger = logging.getLogger(__name__)


def safety_positions(tokenizer: Any, settings: SafetySettings) -> CountedPositions:
    """
    The positions that count, with a notice where the header's are asked for and there are none.

    Args:
        tokenizer: What the rows were rendered with; None where they came as token ids.
        settings: Of the calibration.
    """
    if not settings.needs_headers:
        return CountedPositions(settings.positions)
    headers = Headers(tokenizer)
    if not headers.forms:
        option = "header_weight" if settings.header_weight != 1 else "safety_positions='header'"
        reason = (
            "no tokenizer was given with these rows of token ids"
            if tokenizer is None
            else "the tokenizer's chat template writes nothing behind a request, or it has none"
        )
        logger.warning("%s: %s, so that the last token of the prompt alone counts as the header.", option, reason)
    return CountedPositions(settings.positions, headers.mask, settings.header_weight)


def safety_statistics(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    positions: CountedPositions,
    settings: SafetySettings,
    description: str = "calibrating the safety module",
) -> dict[str, ModuleStatistics]:
    """
    Raises:
        CalibrationError: No position counts; or see `collect_statistics`.
    """
    return _collected(model, examples, positions, settings, description, "the safety data")


def utility_statistics(
    model: nn.Module, examples: Sequence[TokenizedExample], positions: CountedPositions, settings: SafetySettings
) -> dict[str, ModuleStatistics]:
    """
    The same of utility rows, at positions of the same kind: of others, what tells the two apart would be the kind.
    (Wei et al. take the response's of both, as this does with safety_positions "response".)

    Raises:
        CalibrationError: No position counts; or see `collect_statistics`.
    """
    rows = "the utility data (utility_data)"
    return _collected(model, examples, positions, settings, "gathering utility", rows)


def _collected(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    positions: CountedPositions,
    settings: SafetySettings,
    description: str,
    rows: str,
) -> dict[str, ModuleStatistics]:
    """`rows` says for messages what the examples are."""
    statistics = collect_statistics(
        model,
        {name: base_layer(model.get_submodule(name)) for name in settings.names},
        share_of_rank(examples, settings.batch_size),
        settings.engine,
        positions=positions,
        with_inputs="input" in settings.ranks,
        description=description,
    )
    if not statistics[settings.names[0]].output.count:
        raise CalibrationError(
            f"safety_positions={settings.positions!r}: {rows} has no such position. In tokenized rows, labels must be "
            "-100 on the tokens of the prompt and the tokens' ids on those of the response; or choose other "
            "safety_positions."
        )
    return statistics
