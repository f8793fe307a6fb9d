"""The safety module of a model whose weights are not whole in every process: sharded, or placeholders."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SaLoRAConfig
from ..models.weights import check_reachable, is_sharded_data_parallel, parameter_bytes, unreachable_weight
from ..safety_module import SafetyModule
from ..support.distributed import from_first_rank, gather_json
from ..support.memory import ROOM, free_memory
from ..support.notices import tell
from ..support.numbers import size
from .pipeline import calibrate_with
from .settings import checked_ranks, statistics_bytes

logger = logging.getLogger(__name__)


def calibrate_wherever(model: nn.Module, config: SaLoRAConfig, names: Sequence[str]) -> SafetyModule:
    """
    `calibrate_with`; where a process has not all of the target weights, the first one calibrates alone: on its own
    model where that is whole, and otherwise on the same model, loaded anew from where it came from, if it fits. The
    others wait, and all get the same bits.

    Raises:
        ValueError: There is nowhere to load it from, it is sharded in another way than by FSDP2 and ZeRO-3, or it does
            not fit; it names what is needed and what is there, and how to calibrate beforehand.
    """
    reason = unreachable_weight(model, names)
    reasons = [found for found in gather_json(reason) if found is not None]
    if not reasons:
        return calibrate_with(model, config)
    content = from_first_rank(lambda: _as_bytes(_calibrate_alone(model, config, names, reason, reasons[0])))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "received.safetensors"
        file.write_bytes(content)
        return SafetyModule.load(file)


def _as_bytes(safety_module: SafetyModule) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "calibrated.safetensors"
        safety_module.save(file)
        return file.read_bytes()


def _calibrate_alone(
    model: nn.Module, config: SaLoRAConfig, names: Sequence[str], reason: str | None, elsewhere: str
) -> SafetyModule:
    """
    Args:
        model: This process's.
        config, names: What is asked for, of which target modules.
        reason: Why the model cannot be run here; None: it can.
        elsewhere: Why it cannot in another process.
    """
    if reason is None:
        tell(logger, "%s: the first process calibrates, the others wait.", elsewhere)
        return calibrate_with(model, config)
    ranks = checked_ranks(model, config)
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not source or not is_sharded_data_parallel(model):
        check_reachable(model, names)
    place = _place_for(ROOM * parameter_bytes(model) + statistics_bytes(model, config, ranks))
    if place.arguments is None:
        check_reachable(model, names, but=f"It was not loaded anew, whole, to calibrate on: {place.text}")
    tell(logger, "%s: %s is loaded anew, whole, to calibrate on (%s). The others wait.", reason, source, place.text)
    with _outside_of_zero3():
        whole = _loaded_whole(model, source, place.arguments or {})
    try:
        return calibrate_with(whole, config)
    finally:  # the training is to have the room
        del whole
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Place:
    """Where a whole model has room."""

    arguments: dict[str, Any] | None
    """For `from_pretrained`; None: nowhere."""
    text: str


def _place_for(needed: float) -> _Place:
    host = free_memory()
    there = {"the CPU": host}
    device = None
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        there = {f"cuda:{device}": torch.cuda.mem_get_info(device)[0], **there}
    free = ", ".join(f"{size(number)} on {name}" for name, number in there.items())
    text = f"it takes about {size(needed)}; free are {free}"
    if device is not None and there[f"cuda:{device}"] >= needed:
        return _Place({"device_map": {"": device}}, text)
    if host >= needed:
        return _Place({}, text)
    if device is not None and sum(there.values()) >= needed:
        room = {device: int(there[f"cuda:{device}"] / ROOM), "cpu": int(host / ROOM)}
        return _Place({"device_map": "auto", "max_memory": room}, text)
    return _Place(None, text)


def _loaded_whole(model: nn.Module, source: str, arguments: dict[str, Any]) -> nn.Module:
    """The same model, of its own class, dtype, revision and quantization."""
    # FSDP has put a class of its own before the model's.
    kinds = [kind for kind in type(model).__mro__ if "FSDP" not in kind.__name__ and hasattr(kind, "from_pretrained")]
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no from_pretrained, so that it cannot be loaded anew.")
    of_model: Any = model.config
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    options = {
        "dtype": dtype,
        "revision": getattr(of_model, "_commit_hash", None),
        "use_safetensors": True,
        **arguments,
    }
    if (quantization := getattr(of_model, "quantization_config", None)) is not None:
        options["quantization_config"] = quantization
    kind: Any = kinds[0]
    if kind.__module__.startswith("transformers_modules."):
        options["trust_remote_code"] = True  # the user has allowed it for this very code
    return kind.from_pretrained(source, **options).eval()


@contextmanager
def _outside_of_zero3() -> Iterator[None]:
    """Within, `from_pretrained` loads a model whole also where transformers was told to shard it by DeepSpeed."""
    from transformers import integrations, modeling_utils
    from transformers.integrations import deepspeed

    # Private: the configuration that `set_hf_deepspeed_config` was given, to put it back.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    active = None if reference is None else reference()
    # Axolotl has put functions that always say yes in the places of transformers' own.
    name = "is_deepspeed_zero3_enabled"
    replaced = [(module, getattr(module, name)) for module in (modeling_utils, deepspeed)]
    deepspeed.unset_hf_deepspeed_config()
    for module, _ in replaced:
        setattr(module, name, getattr(integrations, name))
    try:
        yield
    finally:
        for module, function in replaced:
            setattr(module, name, function)
        if active is not None:
            deepspeed.set_hf_deepspeed_config(active)
