"""Which linear layers write into the residual stream, by the names that Transformers gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Adds = Literal["attn_out", "mlp_out"]
"""What a part of a block adds to the stream: that of the attention (or what stands in its place), or of the MLP."""

# The first number in a name is that of the block; experts have one, too.
_IN_BLOCK = re.compile(r"((?:[^.]+\.)*?(\d+))\.(.+)")
# Last parts of names. "c_proj" is GPT-2's for both, and "dense" that of several attentions.
_WRITERS: dict[str, Adds] = {
    "o_proj": "attn_out",
    "out_proj": "attn_out",
    "wo": "attn_out",
    "dense": "attn_out",
    "down_proj": "mlp_out",
    "dense_4h_to_h": "mlp_out",
    "fc2": "mlp_out",
    "fc_out": "mlp_out",
    "w2": "mlp_out",
}
# Blocks that normalize what a part writes, before it is added (Gemma 2 and 3, OLMo 2; GLM-4).
_NORMS_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class ResidualWriter:
    """A linear layer whose output is added to the residual stream."""

    layer: int
    """Number of its block."""
    block: str
    """Name of the block."""
    part: str
    """Name of the attention or MLP that it ends."""
    adds: Adds
    """What the part is."""


def residual_writer(name: str) -> ResidualWriter | None:
    """
    Where a linear layer writes into the residual stream.

    Args:
        name: Of the module in the base model, such as "model.layers.3.self_attn.o_proj".

    Returns:
        None where it does not, as q_proj, or where its name does not tell.
    """
    found = _IN_BLOCK.match(name)
    if found is None:
        return None
    block, layer, inside = found[1], int(found[2]), found[3]
    part, _, last = inside.rpartition(".")
    adds = _WRITERS.get(last)
    if last == "c_proj":
        adds = "attn_out" if "attn" in part else "mlp_out"
    if adds is None or not part:
        return None
    # What a block adds is the sum over its experts.
    return ResidualWriter(layer, block, f"{block}.{part.partition('.experts')[0]}", adds)


def normalizes_outputs(block: nn.Module) -> bool:
    """Whether a norm stands between what the parts of a block write and the stream."""
    return any(hasattr(block, name) for name in _NORMS_BEHIND)


def hidden_states(output: object) -> Tensor:
    """
    The hidden states in what a block, an attention or an MLP returns, (batch, length, d).

    Raises:
        TypeError: There are none.
    """
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.ndim != 3:
        raise TypeError(f"a {type(first).__name__} is no hidden states of (batch, length, d)")
    return first
