"""A model in the state in which it is measured, and back in its own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..support.memory import ROOM
from ..support.numbers import size
from .embeddings import input_embeddings, output_embeddings
from .weights import base_layer

logger = logging.getLogger(__name__)

# Beginnings of the `init_lora_weights` that PEFT subtracts from the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """
    The base model without the adapters that it carries, the copies of `modules_to_save` and the trained rows of
    `trainable_token_indices`; their state and requires_grad are put back.
    """
    adapted = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [module for module in adapted if not module.disable_adapters]
    requires_grad = [(p, p.requires_grad) for module in adapted for p in module.parameters()]
    for module in enabled:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in enabled:
            module.enable_adapters(True)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


def check_base_is_unchanged(model: nn.Module) -> None:
    """
    Refuse adapters whose start was taken out of the base model's weights: with them disabled, the model is not the one
    that they were put on.

    Raises:
        ValueError: There is such an adapter.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"init_lora_weights={start!r} of adapter {name!r} has changed the base model's weights, so that "
                "disabling the adapter does not give the base model. What is computed with that (calibrate, "
                "own_refusals, RefusalAnchor.of) must be before the adapter is put on it; or choose another "
                "init_lora_weights, such as True."
            )


def cheap_forward_options(model: nn.Module, layers: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """
    Arguments that spare a forward pass what calibration does not need: the KV cache and the logits, unless the head is
    one of the layers that are looked at, which then must see every position.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    head = output_embeddings(model)
    if any(layer in (head, getattr(head, "base_layer", None)) for layer in layers):
        del options["logits_to_keep"]
    return {name: value for name, value in options.items() if name in accepted}


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its input ids."""
    embeddings = input_embeddings(model)
    parameter = next((model if embeddings is None else embeddings).parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    # Offloaded by accelerate, which fetches the weights to the device that its hooks name.
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


@contextmanager
def hooked(
    model: nn.Module, names: Iterable[str], register: Callable[[nn.Module, str], RemovableHandle]
) -> Iterator[None]:
    """
    A model with hooks on some of its layers, which are taken off again whatever happens.

    Args:
        model: The model.
        names: Of the layers.
        register: From a layer, without adapters, and its name to the handle of its hook.
    """
    handles: list[RemovableHandle] = []
    try:
        for name in names:
            handles.append(register(base_layer(model.get_submodule(name)), name))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Dropout and gradient checkpointing off; every submodule gets its own mode back.

    On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights for a kernel without gradients at the first pass
    in this mode, and the model could not be trained any more; it is kept from that.
    """
    modes = [(module, module.training) for module in model.modules()]
    repacking: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    model.eval()
    for module in repacking:
        module.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in repacking:
            module.support_avx512bf16_for_cpu = True


@contextmanager
def on_accelerator(model: nn.Module) -> Iterator[None]:
    """
    Run a model that waits on the CPU on the accelerator, where there is one and the weights fit, and put it back.

    Trainers wrap a model with its adapter before they move it, so that calibration often finds it on the CPU.
    Models that were placed by a device map stay where they are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if (
        current is None
        or any(tensor.device.type != "cpu" for tensor in tensors)
        or getattr(model, "hf_device_map", None) is not None
        or any(hasattr(module, "_hf_hook") for module in model.modules())
    ):
        yield
        return
    device = torch.device(current.type, torch.accelerator.current_device_index())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if ROOM * needed > free:
            logger.warning(
                "The model stays on the CPU: it needs %s and %s has %s free. Load it with a device_map, or quantized, "
                "to run it faster.",
                size(ROOM * needed),
                device,
                size(free),
            )
            yield
            return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
