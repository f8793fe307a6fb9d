"""Which tokens of the data count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Positions


def position_mask(labels: Tensor, positions: Positions, attention_mask: Tensor | None = None) -> Tensor:
    """
    The positions whose layer inputs count.

    Args:
        labels: (batch, length), -100 where a token is no response token.
        positions: "response": the input is a response token. "predicting": the next token is one. Of an example
            that has a response token, "prompt": the tokens that are none, and "all": every token.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        (batch, length) bool.
    """
    mask = labels != -100
    if positions in ("prompt", "all"):
        of_example = mask.any(dim=1, keepdim=True).expand_as(mask)
        mask = of_example & ~mask if positions == "prompt" else of_example
    elif positions == "predicting":
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask if attention_mask is None else mask & attention_mask.bool()
