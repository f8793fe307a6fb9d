"""Running a model over batches and updating statistics of what passes its layers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .statistics import ModuleStatistics, RowStatistics

logger = logging.getLogger(__name__)


class CalibrationError(ValueError):
    """Calibration cannot give a meaningful result with this model and data."""


def position_mask(
    labels: Tensor, positions: Literal["response", "predicting"], attention_mask: Tensor | None = None
) -> Tensor:
    """
    The positions whose layer inputs count.

    Args:
        labels: (batch, length), -100 where a token is no response token.
        positions: "response": the input is a response token. "predicting": the next token is one.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        (batch, length) bool.
    """
    mask = labels != -100
    if positions == "predicting":
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask if attention_mask is None else mask & attention_mask.bool()


class StatisticsCollector:
    """
    Forward hooks on linear layers that update a `RowStatistics` per layer and side.

    Layers that are called with the same tensor, such as q_proj, k_proj and v_proj, share their input statistics.

    Args:
        layers: Name -> linear layer.
        with_inputs: Whether to gather the input side, too.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, with_inputs: bool = False) -> None:
        self.layers = dict(layers)
        self.with_inputs = with_inputs
        self._outputs: dict[str, RowStatistics] = {}
        self._inputs: dict[str, RowStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: tuple[Tensor, str] | None = None
        self._mask: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StatisticsCollector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def positions(self, mask: Tensor) -> Iterator[None]:
        """Count the positions where `mask` (batch, length) is true in the forward pass inside this block."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None
            self._last_input = None

    def result(self) -> dict[str, ModuleStatistics]:
        """
        Raises:
            CalibrationError: A layer was never called.
        """
        for name in self.layers:
            if name not in self._outputs:
                raise CalibrationError(
                    f"target_modules: {name!r} was not used in any forward pass over the data, so its outputs are "
                    "unknown. Leave it out with exclude_modules."
                )
        return {
            name: ModuleStatistics(
                name, self._outputs[name], self._inputs[self._leaders[name]] if self.with_inputs else None
            )
            for name in self.layers
        }

    def _hook(self, name: str):
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._mask is None:
                return
            rows = self._select(name, output)
            bias = getattr(layer, "bias", None)
            if bias is not None:
                rows = rows - bias.to(rows.dtype)
            self._update(self._outputs, name, rows, "outputs")
            if self.with_inputs:
                self._update_input(name, args[0])

        return hook

    def _update_input(self, name: str, tensor: Tensor) -> None:
        shared = self._last_input is not None and self._last_input[0] is tensor
        leader = self._last_input[1] if shared else name
        if self._leaders.setdefault(name, leader) != leader:
            raise CalibrationError(f"{name!r} shares its input with another layer in some batches only.")
        if not shared:
            self._last_input = (tensor, name)
            self._update(self._inputs, name, self._select(name, tensor), "inputs")

    def _select(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a (batch, length, d) or (batch * length, d) tensor that count, (n, d)."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        if flat.shape[0] != self._mask.numel():
            raise CalibrationError(
                f"target_modules: {name!r} is called with tensors of shape {tuple(tensor.shape)}, not with one vector "
                f"per token of a batch of {tuple(self._mask.shape)}. Leave it out with exclude_modules."
            )
        return flat[self._mask.flatten().to(flat.device)]

    def _update(self, statistics: dict[str, RowStatistics], name: str, rows: Tensor, kind: str) -> None:
        entry = statistics.setdefault(name, RowStatistics(rows.shape[-1]))
        try:
            entry.update(rows)
        except FloatingPointError:
            raise CalibrationError(
                f"The {kind} of {name!r} contain NaN or infinity on the calibration data: the base model is broken, or "
                "its dtype overflows (try bfloat16 instead of float16)."
            ) from None


def collect_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    positions: Literal["response", "predicting"] = "response",
    with_inputs: bool = False,
    description: str = "calibrating",
) -> dict[str, ModuleStatistics]:
    """
    One pass over the data that gathers the statistics of all layers at once.

    Args:
        model: Called with input_ids and attention_mask; must be in evaluation mode.
        layers: Name -> linear layer inside `model`.
        batches: Dicts of input_ids, labels and attention_mask, (batch, length) int64.
        positions: Which positions count, see `position_mask`.
        with_inputs: Whether to gather the layers' inputs, too.
        description: Shown beside the progress bar.

    Raises:
        CalibrationError: A layer is not used, is not called once per token, or gives NaN.
    """
    options = cheap_forward_options(model)
    device = input_device(model)
    tokens = 0
    with StatisticsCollector(layers, with_inputs=with_inputs) as collector, torch.no_grad():
        progress = tqdm(batches, desc=description, unit="batch", leave=False)
        for batch in progress:
            batch = {key: value.to(device) for key, value in batch.items()}
            mask = position_mask(batch["labels"], positions, batch["attention_mask"])
            with collector.positions(mask):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
            tokens += int(batch["attention_mask"].sum())
            if elapsed := progress.format_dict["elapsed"]:
                progress.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
    return collector.result()


def cheap_forward_options(model: nn.Module) -> dict[str, Any]:
    """Arguments that spare a forward pass what calibration does not need: the KV cache and the logits."""
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in options.items() if name in accepted}


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its input ids."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    parameter = next((embeddings if embeddings is not None else model).parameters(), None)
    if parameter is None or parameter.is_meta:
        return getattr(model, "device", torch.device("cpu"))
    return parameter.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def on_accelerator(model: nn.Module) -> Iterator[None]:
    """
    Run a model that waits on the CPU on the accelerator, where there is one and the weights fit, and put it back.

    Trainers wrap a model with its adapter before they move it, so that calibration often finds it on the CPU.
    Models that were placed by a device map stay where they are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    stays = (
        not torch.accelerator.is_available()
        or any(tensor.device.type != "cpu" for tensor in tensors)
        or getattr(model, "hf_device_map", None) is not None
        or any(hasattr(module, "_hf_hook") for module in model.modules())
    )
    if stays:
        yield
        return
    device = torch.accelerator.current_accelerator()
    device = torch.device(device.type, torch.accelerator.current_device_index())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 1.2 * needed > free:
            logger.warning(
                "Calibrating on the CPU: the model needs %.1f GB and %s has %.1f GB free. Load it with a device_map, "
                "or quantized, to calibrate faster.",
                needed / 1e9,
                device,
                free / 1e9,
            )
            yield
            return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
