"""Requests with the model's own answers, to see later what becomes of these."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..rows.examples import as_messages
from .generation import generate_responses
from .request_sets import Request

logger = logging.getLogger(__name__)

RESPONSE_TOKENS = 64
"""Length of the model's own answers."""


def with_own_answers(
    model: nn.Module, tokenizer: Any, requests: Sequence[Request], *, option: str, batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    """
    The requests with their responses, or the model's own greedy ones, without those to which the model says nothing.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        requests: At least one.
        option: What the user calls them, for messages.
        batch_size: Requests that are answered at once.
        progress: Show a progress bar.

    Returns:
        Conversations in TRL's prompt-completion form.

    Raises:
        ValueError: It says nothing to any.
    """
    unanswered = [request.asked for request in requests if not request.response]
    own = iter(
        generate_responses(
            model, tokenizer, unanswered, max_new_tokens=RESPONSE_TOKENS, batch_size=batch_size, progress=progress
        )
    )
    answers = [request.response or next(own) for request in requests]
    silent = sum(not answer for answer in answers)
    if silent == len(answers):
        raise ValueError(f"{option}: the model answers none of these requests. Give others, or rows with responses.")
    if silent:
        logger.warning(
            "The model says nothing to %d of %d %s requests; they are left out.", silent, len(answers), option
        )
    return [
        {
            "prompt": list(as_messages(request.asked)),
            "completion": [{"role": "assistant", "content": answer}],
        }
        for request, answer in zip(requests, answers, strict=True)
        if answer
    ]
