"""Which tokens of the data count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import Positions

Headers = Callable[[Tensor, Tensor], Tensor]
"""From input_ids and labels, (batch, length) on the CPU, to the header's positions, (batch, length) bool."""


def position_mask(
    labels: Tensor, positions: Positions, attention_mask: Tensor | None = None, header: Tensor | None = None
) -> Tensor:
    """
    The positions whose layer inputs count.

    Args:
        labels: (batch, length), -100 where a token is no response token.
        positions: "response": the input is a response token. "predicting": the next token is one. Of an example
            that has a response token, "prompt": the tokens that are none, and "all": every token. "header": those of
            the prompt behind the request's own text; the last of them is the one at which the answer begins.
        attention_mask: (batch, length), 0 for padding.
        header: (batch, length) bool, the header's positions; must be given for "header".

    Returns:
        (batch, length) bool.

    Raises:
        ValueError: The header's positions are wanted, and not given.
    """
    mask = labels != -100
    if positions == "header":
        if header is None:
            raise ValueError("positions='header' needs the header's positions")
        mask = header
    elif positions in ("prompt", "all"):
        of_example = mask.any(dim=1, keepdim=True).expand_as(mask)
        mask = of_example & ~mask if positions == "prompt" else of_example
    elif positions == "predicting":
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask if attention_mask is None else mask & attention_mask.bool()


@dataclass(frozen=True)
class CountedPositions:
    """Which positions of the safety data count, and how much those of the header do."""

    kind: Positions = "response"
    headers: Headers | None = None
    """Finds the header's positions; needed for "header" and for a weight of it."""

    header_weight: float = 1.0
    """How many times as much as another vector one of the header counts, in the sum of the outer products."""

    def of_batch(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            batch: input_ids, labels and attention_mask, (batch, length), on the CPU.

        Returns:
            The positions that count, (batch, length) bool, and what their vectors are multiplied with, (batch, length)
            float32: the root of their weight. None: all with 1.
        """
        labels, attention_mask = batch["labels"], batch["attention_mask"]
        header = None if self.headers is None else self.headers(batch["input_ids"], labels)
        mask = position_mask(labels, self.kind, attention_mask, header)
        if header is None or self.header_weight == 1:
            return mask, None
        if self.header_weight == 0:
            return mask & ~header, None
        return mask, torch.where(header, self.header_weight**0.5, 1.0)
