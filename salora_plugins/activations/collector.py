"""Hooks on linear layers that keep statistics of what passes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..models.weights import layer_features, linear_weight
from ..support.linear_algebra import values_of
from ..support.module_names import advice_to_leave_out, listed
from .errors import CalibrationError
from .statistics import Engine, ModuleStatistics
from .vectors import OutputStatistics, VectorStatistics
from .waiting import WaitingUpdates


class StatisticsCollector:
    """
    Forward hooks on linear layers that update the statistics of what passes them.

    A layer with more outputs than inputs is represented by its inputs, from which the statistics of its outputs follow;
    any other by its outputs. Layers that are called with the same tensor, such as gate_proj and up_proj, share the
    statistics of their inputs.

    Args:
        layers: Name -> linear layer.
        engine: How the statistics are kept.
        with_inputs: Whether to gather the inputs of every layer, for the input side.
    """

    def __init__(self, layers: Mapping[str, nn.Module], engine: Engine, *, with_inputs: bool = False) -> None:
        self.layers = dict(layers)
        self.engine = engine
        self.with_inputs = with_inputs
        self._outputs: dict[str, VectorStatistics] = {}
        self._inputs: dict[str, VectorStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: tuple[Tensor, str] | None = None
        self._mask_size = 0
        self._index: dict[torch.device, Tensor] = {}
        self._scales: dict[torch.device, Tensor] = {}
        self._waiting = WaitingUpdates(self._scales_on)
        self._bias = {name: _bias(layer) for name, layer in self.layers.items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StatisticsCollector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, by_inputs(layer))))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def positions(self, mask: Tensor, scales: Tensor | None = None) -> Iterator[None]:
        """
        Count the positions where `mask` (batch, length) is true in the forward pass inside this block, every vector
        multiplied by its number in `scales` (batch, length); on the CPU no device has to be waited for.

        Raises:
            CalibrationError: A layer gave NaN or infinity.
        """
        self._mask_size = mask.numel()
        # As indices, found once: a boolean mask would make the device wait at every layer.
        self._index = {mask.device: mask.flatten().nonzero().squeeze(1)}
        self._scales = {} if scales is None else {mask.device: scales.to(mask.device)[mask]}
        try:
            yield
            self._waiting.flush()
            self._check_finite()
        finally:
            self._waiting.forget()
            self._index = {}
            self._scales = {}
            self._last_input = None

    def result(self) -> dict[str, ModuleStatistics]:
        """
        The statistics of every layer, over the data of all ranks of torch.distributed.

        Raises:
            CalibrationError: Layers were never called.
        """
        if unused := [name for name in self.layers if name not in self._outputs]:
            raise CalibrationError(
                f"target_modules: {len(unused)} of {len(self.layers)} layers were not used in any forward pass over "
                f"the data ({listed(unused)}), so their outputs are unknown. Leave them out: "
                f"{advice_to_leave_out(unused, self.layers)}."
            )
        for statistics in (*self._inputs.values(), *self._outputs.values()):
            statistics.reduce()
        return {
            name: ModuleStatistics(
                name, self._outputs[name], self._inputs[self._leaders[name]] if self.with_inputs else None
            )
            for name in self.layers
        }

    def _hook(self, name: str, from_inputs: bool) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        bias = self._bias[name]

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not self._index:
                return
            inputs = self._update_input(name, args[0]) if from_inputs or self.with_inputs else None
            rows = self._select(name, output)
            if name not in self._outputs:
                dimension = output.shape[-1]
                self._outputs[name] = (
                    OutputStatistics(inputs, dimension, lambda: linear_weight(layer))
                    if from_inputs and inputs is not None
                    else self.engine.statistics(dimension)
                )
            if bias is not None:
                rows = rows - bias.to(rows)
            self._waiting.add(self._outputs[name], rows)

        return hook

    def _update_input(self, name: str, tensor: Tensor) -> VectorStatistics:
        last, last_leader = self._last_input or (None, name)
        leader = last_leader if last is tensor else name
        if self._leaders.setdefault(name, leader) != leader:
            raise CalibrationError(f"{name!r} shares its input with another layer in some batches only.")
        if last is not tensor:
            self._last_input = (tensor, name)
            if name not in self._inputs:
                self._inputs[name] = self.engine.statistics(tensor.shape[-1], "input")
            self._waiting.add(self._inputs[name], self._select(name, tensor))
        return self._inputs[leader]

    def _select(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a (batch, length, d) or (batch * length, d) tensor that count, (n, d)."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        if flat.shape[0] != self._mask_size:
            raise CalibrationError(
                f"target_modules: {name!r} is called with tensors of shape {tuple(tensor.shape)}, not with one vector "
                f"per token of a batch of {self._mask_size} tokens. Leave it out with exclude_modules."
            )
        return flat.index_select(0, _on(flat.device, self._index))

    def _scales_on(self, device: torch.device) -> Tensor | None:
        return _on(device, self._scales) if self._scales else None

    def _check_finite(self) -> None:
        kept = [("inputs", name, entry) for name, entry in self._inputs.items()]
        kept += [("outputs", name, entry) for name, entry in self._outputs.items()]
        energies = values_of([entry.energy_tensor for _, _, entry in kept])
        for (kind, name, _), energy in zip(kept, energies, strict=True):
            if not math.isfinite(energy):
                raise CalibrationError(
                    f"The {kind} of {name!r} contain NaN or infinity on the calibration data: the base model is "
                    "broken, or its dtype overflows (try bfloat16 instead of float16)."
                )


def by_inputs(layer: nn.Module) -> bool:
    """Whether a layer's outputs are represented by its inputs, being more than them."""
    d_in, d_out = layer_features(layer)
    return d_in < d_out


def statistics_dimensions(layers: Mapping[str, nn.Module], *, with_inputs: bool) -> tuple[list[int], list[int]]:
    """Lengths of the outputs and of the inputs that a `StatisticsCollector` keeps statistics of, none being shared."""
    features = [layer_features(layer) for layer in layers.values()]
    outputs = [d_out for d_in, d_out in features if d_in >= d_out]
    return outputs, [d_in for d_in, d_out in features if with_inputs or d_in < d_out]


def _on(device: torch.device, copies: dict[torch.device, Tensor]) -> Tensor:
    """What is kept of a tensor by device, copied there once."""
    if device not in copies:
        copies[device] = next(iter(copies.values())).to(device)
    return copies[device]


def _bias(layer: nn.Module) -> Tensor | None:
    """A copy of the bias, which is not there between calls where accelerate offloads the layer."""
    if not isinstance(getattr(layer, "bias", None), Tensor):
        return None
    with align_module_device(layer):
        bias = layer.bias
        return bias.detach().clone() if isinstance(bias, Tensor) else None
