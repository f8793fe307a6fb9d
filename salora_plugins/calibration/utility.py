"""The rows that stand for what a model is used for, beside the safety data: everyday requests and its own answers."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from torch import nn

from ..activations.errors import CalibrationError
from ..plugins import judges
from ..prompts.builtin import EVERYDAY
from ..rows.examples import TokenizedExample
from .refusals import Answerer, Answering, collect
from .rows import SafetyRows, safety_rows
from .settings import RowSettings

logger = logging.getLogger(__name__)

_ENOUGH = 16
"""So many examples always do; of fewer rows, at least half must be left."""


def utility_source(source: Any) -> Any:
    """What is read of `utility_data`, where "builtin" means everyday requests and not harmful ones."""
    if isinstance(source, (list, tuple)):
        return [EVERYDAY if isinstance(entry, str) and entry == "builtin" else entry for entry in source]
    return EVERYDAY if isinstance(source, str) and source == "builtin" else source


def read_utility_rows(rows: RowSettings) -> SafetyRows:
    """
    The rows before a model runs.

    Args:
        rows: Which rows; of a source "builtin", everyday requests that come with the package.

    Raises:
        DataError: They cannot be read.
        CalibrationError: There is no tokenizer.
    """
    return safety_rows(replace(rows, source=utility_source(rows.source)))


def utility_rows(model: nn.Module, rows: RowSettings, *, batch_size: int) -> list[TokenizedExample]:
    """
    Utility data that all has a response: a request without one gets the model's own greedy answer of up to 64 tokens,
    and is left out where that is a refusal. Under torch.distributed every rank must be here, and all get the same.

    Args:
        model: The base model, in evaluation mode.
        rows: As for `read_utility_rows`.
        batch_size: Requests that are answered at once, at most.

    Raises:
        DataError, CalibrationError: See `read_utility_rows` and `answered_utility_rows`.
    """
    return answered_utility_rows(model, read_utility_rows(rows), rows, batch_size=batch_size)


def answered_utility_rows(
    model: nn.Module, read: SafetyRows, rows: RowSettings, *, batch_size: int, whole_responses: bool = True
) -> list[TokenizedExample]:
    """
    `utility_rows` of what was read already.

    Args:
        model: The base model, in evaluation mode.
        read: What `read_utility_rows` gave.
        rows: Where it was read from.
        batch_size: Requests that are answered at once, at most.
        whole_responses: False: an answer is only as long as it takes to see whether it is a refusal, for what looks at
            the prompts alone.

    Raises:
        CalibrationError: The model cannot answer, or too few rows are left: neither 16 nor half of them.
    """
    if not read.has_requests:
        return [row for row in read.rows if isinstance(row, TokenizedExample)]
    if not hasattr(model, "generate"):
        raise CalibrationError(
            f"{rows.option} has rows without a response, and {type(model).__name__} cannot generate one. Give "
            f"{rows.option} with responses."
        )
    is_refusal = judges()["keyword"]
    answerer = Answerer(model, read.tokenizer, is_refusal, rows.max_length, batch_size, whole_responses, Answering())
    kept, counts = collect(read.rows, rows.num, answerer, refused=False, description="answering everyday requests")
    if len(kept) < min(_ENOUGH, math.ceil(len(read.rows) / 2), rows.num):
        raise CalibrationError(
            f"{rows.option}: of {counts['requests']} requests the model refused {counts['refusals']}, or had no room "
            f"for an answer, so that {len(kept)} rows are left. Give everyday requests, or rows with responses."
        )
    if counts["refusals"]:
        logger.info("%s: %d refused requests are left out.", rows.option, counts["refusals"])
    return kept
