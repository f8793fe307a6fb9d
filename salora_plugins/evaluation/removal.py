"""A model without some directions of its layers' outputs or inputs, in memory only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.running import hooked
from ..parametrization import project_out
from ..ranks import Side


@contextmanager
def without_directions(model: nn.Module, side: Side, directions: Mapping[str, Tensor]) -> Iterator[None]:
    """
    The model without some directions of its layers' outputs or inputs, by hooks that are taken off again.

    Args:
        model: The model.
        side: "output": y - Q Q^T (y - b), b being the layer's bias; "input": x - Q Q^T x.
        directions: Module name -> Q (d, k) with orthonormal columns; d is d_out or d_in.
    """

    def register(layer: nn.Module, name: str) -> RemovableHandle:
        if side == "output":
            return layer.register_forward_hook(_output_hook(_remover(directions[name])))
        return layer.register_forward_pre_hook(_input_hook(directions[name]))

    with hooked(model, directions, register):
        yield


@contextmanager
def without_parts(model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """
    The model with W - R L^T W in the place of its layers' weights W, by hooks that are taken off again.

    Args:
        model: The model, quantized or not.
        parts: Module name -> L and R, (d_out, k) each.
    """

    def register(layer: nn.Module, name: str) -> RemovableHandle:
        return layer.register_forward_hook(_output_hook(_part_remover(*parts[name])))

    with hooked(model, parts, register):
        yield


def _output_hook(remove: Callable[[Tensor], Tensor]) -> Callable:
    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        return remove(output) if bias is None else remove(output - bias) + bias

    return hook


def _input_hook(basis: Tensor) -> Callable:
    remove = _remover(basis)
    return lambda layer, args: (remove(args[0]), *args[1:])


def _remover(basis: Tensor) -> Callable[[Tensor], Tensor]:
    by_device: dict[torch.device, Tensor] = {}

    def remove(vectors: Tensor) -> Tensor:
        if vectors.device not in by_device:
            by_device[vectors.device] = basis.to(vectors.device, torch.float32)
        return project_out(vectors.float(), by_device[vectors.device], "input").to(vectors.dtype)

    return remove


def _part_remover(read: Tensor, written: Tensor) -> Callable[[Tensor], Tensor]:
    by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def remove(vectors: Tensor) -> Tensor:
        if vectors.device not in by_device:
            by_device[vectors.device] = read.to(vectors.device), written.T.contiguous().to(vectors.device)
        left, right = by_device[vectors.device]
        return (vectors.float() - (vectors.float() @ left) @ right).to(vectors.dtype)

    return remove


def random_directions(bases: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """
    Uniformly distributed subspaces of the same dimensions; layers that share their directions share these, too.

    Args:
        bases: Module name -> the directions (d, k) to imitate.
        seed: Of the draw.

    Returns:
        Module name -> (d, k) float32 with orthonormal columns.
    """
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    last: tuple[Tensor, Tensor] | None = None
    for name, basis in bases.items():
        if last is None or not torch.equal(last[0], basis):
            last = basis, torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q
        result[name] = last[1]
    return result
