"""Which tokens of a prompt are its header: those that the chat template writes behind the request, up to the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .examples import IGNORED
from .rendering import Renderer

# Two requests that end in different characters, so that no tokenizer merges both with what follows in the same way.
_REQUESTS = ("salora-content", "Another content.")


class Headers:
    """
    Finds the header of a prompt by its token ids: the end of the user's turn, the assistant's header, and what opens
    or closes its reasoning. The last of its tokens is the last of the prompt, at which the answer's first is decided.

    What the chat template writes behind any request is rendered once, in every form of the template; of a prompt, the
    tokens count that end it in the same way. A token that the tokenizer makes of the request's last characters and the
    template's first ones is part of the request. Where a prompt ends in no such way (no chat template, a template that
    writes nothing there, token ids of another model) its last token counts alone.

    Args:
        tokenizer: What the rows were rendered with; None where it is not known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.forms: tuple[tuple[int, ...], ...] = ()
        """The token ids of the header in every form of the template; none where it writes nothing there."""
        if tokenizer is not None and hasattr(tokenizer, "apply_chat_template"):
            with contextlib.suppress(DataError):  # the template refuses a lone request
                self.forms = Renderer(tokenizer).headers(*_REQUESTS)

    def length(self, prompt: Sequence[int]) -> int:
        """How many tokens at the end of a prompt are its header: at least 1 of a prompt that is not empty."""
        found = min(1, len(prompt))
        for form in self.forms:
            # Some templates write the end otherwise when the answer is there: DeepSeek-R1's leaves out "<think>".
            for stop in range(len(form), 0, -1):
                found = max(found, _common_suffix(form[:stop], prompt))
        return found

    def mask(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """
        The header's positions in a batch: in front of every response of an example.

        Args:
            input_ids: (batch, length), on the CPU.
            labels: (batch, length), -100 where a token is no response token.

        Returns:
            (batch, length) bool.
        """
        mask = torch.zeros_like(labels, dtype=torch.bool)
        is_response = labels != IGNORED
        for row, (ids, response) in enumerate(zip(input_ids.tolist(), is_response.tolist(), strict=True)):
            begin = 0  # of the tokens between two responses
            for position, inside in enumerate(response):
                if inside:
                    if begin < position:
                        mask[row, position - self.length(ids[begin:position]) : position] = True
                    begin = position + 1
        return mask


def _common_suffix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            break
        length += 1
    return length
