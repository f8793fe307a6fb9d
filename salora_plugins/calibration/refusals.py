"""Completing the safety data with the model's own refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..activations.errors import CalibrationError
from ..inference.greedy import greedy_answers
from ..plugins import judges
from ..rows.examples import IGNORED, RenderedRequest, TokenizedExample
from ..support.distributed import gather_json, rank_and_world_size
from .rows import SafetyRows
from .settings import SafetySettings

logger = logging.getLogger(__name__)

Row = TokenizedExample | RenderedRequest

RESPONSE_TOKENS = 64
"""Length of a generated response; a refusal is decided and mostly complete by then."""

_ENOUGH = 16
"""So many examples always do; of fewer rows, at least half must come with a response or be refused."""


@dataclass(frozen=True)
class AnsweredRows:
    """Safety data that all has a response."""

    examples: list[TokenizedExample]
    counts: dict[str, int]
    """"requests" and "refusals", where the model has answered; else empty."""

    tokenizer: Any
    """As of the rows that they were made from."""


def answered_rows(rows: SafetyRows, model: nn.Module, settings: SafetySettings) -> AnsweredRows:
    """
    The rows with the model's own refusals in the place of requests.

    Raises:
        CalibrationError: See `add_own_refusals`.
    """
    if not rows.has_requests:
        return AnsweredRows([row for row in rows.rows if isinstance(row, TokenizedExample)], {}, rows.tokenizer)
    examples, counts = add_own_refusals(
        model,
        rows.tokenizer,
        rows.rows,
        settings.rows.num,
        is_refusal=judges()["keyword"],
        batch_size=max(settings.batch_size, 16),
        max_length=settings.rows.max_length,
    )
    return AnsweredRows(examples, counts, rows.tokenizer)


def add_own_refusals(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    num: int,
    *,
    is_refusal: Callable[[str, str], bool],
    batch_size: int,
    max_length: int,
) -> tuple[list[TokenizedExample], dict[str, int]]:
    """
    Give requests that have no response the model's own greedy one, and keep those that it refuses.

    Args:
        model: The aligned model, in evaluation mode.
        tokenizer: Its tokenizer.
        rows: Safety data in the order in which it is to be used.
        num: How many to return at the most; no more are generated than needed.
        is_refusal: Judge called with the request and the response.
        batch_size: Requests per generation.
        max_length: Prompt and response tokens together; longer prompts are left out.

    Returns:
        At most `num` examples, all with a response, and the counts "requests" and "refusals".

    Raises:
        CalibrationError: Too few requests were refused, so the model has no alignment to preserve, and the rows that
            came with a response do not suffice without them: all together they are neither 16 nor half of the rows.
    """
    kept: list[TokenizedExample] = []
    counts = {"requests": 0, "refusals": 0}
    rank, world_size = rank_and_world_size()
    progress = tqdm(total=min(num, len(rows)), desc="collecting refusals", unit="row", leave=False, disable=rank != 0)
    for batch in _batches(rows, batch_size, world_size, num):
        mine = [row for row, owner in batch if owner == rank and isinstance(row, RenderedRequest)]
        # The shares of the ranks come back in the order of the requests.
        answers = iter(
            [answer for share in gather_json(_answer(model, tokenizer, mine, max_length)) for answer in share]
        )
        for row, _ in batch:
            if len(kept) >= num:
                break
            if isinstance(row, TokenizedExample):
                kept.append(row)
                continue
            tokens, text = next(answers)
            counts["requests"] += 1
            if tokens is not None and is_refusal(row.request, text):
                kept.append(TokenizedExample(*(tuple(column) for column in tokens)))
                counts["refusals"] += 1
        progress.n = len(kept)
        progress.refresh()
        if len(kept) >= num:
            break
    progress.close()
    _check_enough(len(kept), counts, min(num, len(rows)))
    return kept, counts


def _check_enough(kept: int, counts: dict[str, int], wanted: int) -> None:
    """
    Say that there are fewer than wanted.

    Raises:
        CalibrationError: There are too few.
    """
    answered = kept - counts["refusals"]
    if kept < min(_ENOUGH, math.ceil((answered + counts["requests"]) / 2)):
        beside = f", beside {answered} rows with a response" if answered else ""
        raise CalibrationError(
            f"The model refused {counts['refusals']} of {counts['requests']} requests of safety_data{beside}, so there "
            "is too little alignment to preserve. Use an aligned (instruction-tuned, safety-trained) model with its "
            "chat template, or give safety_data with the responses that it should keep."
        )
    if kept < wanted:
        logger.warning(
            "Calibrating on %d safety examples instead of %d: the model refused %d of %d requests.",
            kept,
            wanted,
            counts["refusals"],
            counts["requests"],
        )


def _batches(rows: Sequence[Row], batch_size: int, world_size: int, num: int) -> Iterator[list[tuple[Row, int | None]]]:
    """
    Rows up to `batch_size` requests per rank, each with the rank that is to answer it; None: it has a response.

    A rank's requests follow one another, so that several ranks generate the very batches that one would.
    """
    batch: list[tuple[Row, int | None]] = []
    requests = 0
    for row in rows:
        if isinstance(row, RenderedRequest):
            batch.append((row, requests // batch_size))
            requests += 1
        else:
            batch.append((row, None))
        if requests == batch_size * world_size or len(batch) - requests >= num:
            yield batch
            batch, requests = [], 0
    if batch:
        yield batch


def _answer(
    model: nn.Module, tokenizer: Any, requests: Sequence[RenderedRequest], max_length: int
) -> list[tuple[tuple[list[int], list[int]] | None, str]]:
    """Greedy responses as token ids with labels, and as text; None where the prompt leaves no room for one."""
    if not requests:
        return []
    if not hasattr(model, "generate"):
        raise CalibrationError(
            f"safety_data has rows without a response, and {type(model).__name__} cannot generate one. Give "
            "safety_data with responses, or a safety_module."
        )
    prompts = [list(request.prompt_ids) for request in requests]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < max_length]
    answers: list[tuple[tuple[list[int], list[int]] | None, str]] = [(None, "")] * len(prompts)
    if not fitting:
        return answers
    longest = min(RESPONSE_TOKENS, max_length - 1)
    generated = greedy_answers(model, tokenizer, [prompts[index] for index in fitting], max_new_tokens=longest)
    for index, response in zip(fitting, generated, strict=True):
        prompt = prompts[index]
        response = response[: max_length - len(prompt)]
        labels = [IGNORED] * len(prompt) + response
        answers[index] = ((prompt + response, labels), tokenizer.decode(response, skip_special_tokens=True))
    return answers
