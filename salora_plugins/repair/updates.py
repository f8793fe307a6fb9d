"""A model with low-rank updates of its layers, in memory only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.running import hooked

Factors = tuple[Tensor, Tensor]
"""A (k, d_in) and B (d_out, k) of an update B A, scaling included."""


@contextmanager
def with_updates(model: nn.Module, updates: Mapping[str, Sequence[Factors]]) -> Iterator[None]:
    """
    The model with W x + sum B A x in the place of W x, by hooks that are taken off again.

    Args:
        model: The model.
        updates: Module name -> the updates of its weight.
    """
    changed = [name for name, factors in updates.items() if factors]
    with hooked(model, changed, lambda layer, name: layer.register_forward_hook(_hook(updates[name]))):
        yield


def _hook(factors: Sequence[Factors]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    # One product for all of them.
    a = torch.cat([a for a, _ in factors]).float()
    b = torch.cat([b for _, b in factors], dim=1).float()
    by_device: dict[torch.device, Factors] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.device not in by_device:
            by_device[x.device] = a.to(x.device), b.to(x.device)
        own_a, own_b = by_device[x.device]
        return (output.float() + x.float() @ own_a.T @ own_b.T).to(output.dtype)

    return hook
