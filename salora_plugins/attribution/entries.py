"""Entries of weights: the choice of those that matter for safety alone, and the model without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.weights import base_layer


@dataclass(frozen=True)
class Entries:
    """Entries of a weight (d_out, d_in)."""

    columns: Tensor
    """(d_out, k) integers, in each row different ones."""
    chosen: Tensor
    """(d_out, k) bool: which of them are meant."""


def narrow_columns(columns: Tensor, d_in: int) -> Tensor:
    """Columns of a weight (d_out, d_in) as they are kept: on the CPU, int16 where that does."""
    return columns.to(torch.int16 if d_in <= torch.iinfo(torch.int16).max else torch.int32).cpu()


def safety_alone(safety: Tensor, utility: Tensor, d_in: int) -> Entries:
    """
    S_s(q) - S_u(p) of Wei et al. 2024 (section 3.1), row by row.

    Args:
        safety: (d_out, k) columns of the top entries by safety.
        utility: (d_out, k) those by utility; k may be 0.
        d_in: Columns of the weight.
    """
    return Entries(safety.long(), ~_marked(utility, d_in).gather(1, safety.long()))


def random_entries(like: Entries, utility: Tensor, d_in: int, seed: int) -> Entries:
    """
    As many entries of each row, at random, and like those none of the top ones by utility (as far as there are others).

    Args:
        like: What is imitated.
        utility: See `safety_alone`.
        d_in: See `safety_alone`.
        seed: Of the draw; on another kind of device it is another draw.
    """
    counts = like.chosen.sum(1, keepdim=True)
    device = like.columns.device
    keys = torch.rand(utility.shape[0], d_in, generator=torch.Generator(device).manual_seed(seed), device=device)
    keys -= _marked(utility, d_in).to(keys)
    columns = keys.topk(int(counts.max()), dim=1).indices
    return Entries(columns, torch.arange(columns.shape[1], device=device) < counts)


def _marked(columns: Tensor, d_in: int) -> Tensor:
    marked = torch.zeros(columns.shape[0], d_in, dtype=torch.bool, device=columns.device)
    return marked.scatter_(1, columns.long(), True)


@contextmanager
def without_entries(
    model: nn.Module, names: Sequence[str], entries_of: Callable[[str, torch.device], Entries]
) -> Iterator[float]:
    """
    The model with some entries of its weights set to zero. What stood there is kept on the CPU meanwhile, and put back
    whatever happens, bit for bit: a few percent of the weights, never a copy of them.

    Args:
        model: Neither quantized nor offloaded.
        names: The layers.
        entries_of: From a layer's name and device its entries, on that device.

    Yields:
        Which share of all entries of these layers is zero now.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    chosen = total = 0
    try:
        for name in names:
            weight = _writable_weight(model.get_submodule(name))
            entries = entries_of(name, weight.device)
            values = weight.gather(1, entries.columns)
            kept.append((weight, narrow_columns(entries.columns, weight.shape[1]), values.cpu()))
            weight.scatter_(1, entries.columns, values.masked_fill(entries.chosen, 0))
            chosen += int(entries.chosen.sum())
            total += weight.numel()
        yield chosen / total
    finally:
        for weight, columns, values in reversed(kept):  # two layers may share one tensor
            weight.scatter_(1, columns.to(weight.device).long(), values.to(weight.device))


def _writable_weight(module: nn.Module) -> Tensor:
    """The weight's own memory as (d_out, d_in)."""
    layer = base_layer(module)
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight is a {type(weight).__name__}")
    return weight.data.T if isinstance(layer, Conv1D) else weight.data
