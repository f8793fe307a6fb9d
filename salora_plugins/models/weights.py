"""The weights of linear layers, however they are kept: quantized, offloaded, sharded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params, parse_flag_from_env
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.integrations import is_fsdp_enabled
from transformers.pytorch_utils import Conv1D

from ..support.distributed import rank_and_world_size
from ..support.linear_algebra import values_of
from ..support.module_names import advice_to_leave_out, listed

_BITSANDBYTES_PARAMETERS = ("Params4bit", "Int8Params")


def base_layer(module: nn.Module) -> nn.Module:
    """The original layer inside a layer that already carries adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, quantized or not."""
    layer: Any = base_layer(module)
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


@contextmanager
def linear_weight(module: nn.Module) -> Iterator[Tensor]:
    """
    The weight of a linear layer as (d_out, d_in), dequantized, and fetched where accelerate has offloaded it or where
    DeepSpeed ZeRO-3 or FSDP2 has sharded it, for which every rank must be here.

    The tensor is only valid inside the `with` block and must not be written to.

    Raises:
        ValueError: bitsandbytes has repacked the 4-bit weight for inference on this CPU, which no gradients pass.
    """
    layer: Any = base_layer(module)
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "The 4-bit base model was run in evaluation mode on this CPU, for which bitsandbytes has repacked its "
            "weights: no gradients pass them any more. Load the model again, and call model.train() before it is run."
        )
    with align_module_device(layer), _gathered(layer.weight), torch.no_grad():
        if _is_bitsandbytes(layer.weight):
            # Not by way of the module: on a CPU that replaces an 8-bit weight by one that has lost its scales.
            weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()
        else:
            weight = dequantize_module_weight(layer).detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        yield weight.T if isinstance(layer, Conv1D) else weight


@contextmanager
def _gathered(weight: Tensor) -> Iterator[None]:
    """
    Within, a weight that ZeRO-3 has sharded is whole. PEFT's `gather_params_ctx` asks transformers whether ZeRO-3 is in
    use, which does not know any more once its configuration is gone, as it is when Axolotl has loaded the model.
    """
    if not _is_partitioned(weight):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
        yield


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is one of bitsandbytes or torchao, which `linear_weight` dequantizes."""
    layer: Any = base_layer(module)
    weight = layer.weight
    return _is_bitsandbytes(weight) or is_torchao(weight)


def _is_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ in _BITSANDBYTES_PARAMETERS


def is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def check_reachable(model: nn.Module, names: Iterable[str], *, but: str = "") -> None:
    """
    Args:
        model: The base model.
        names: The target modules.
        but: What was tried in vain, for the message.

    Raises:
        ValueError: A target weight is not in this process: sharded by DeepSpeed ZeRO-3 or FSDP, or on the meta device.
            It says how to calibrate first.
    """
    found = unreachable_weight(model, names)
    if found is not None:
        source = getattr(getattr(model, "config", None), "_name_or_path", "") or "MODEL"
        tried = f" {but}." if but else ""
        raise ValueError(
            f"{found}, so there is nothing to calibrate on.{tried} Calibrate first, in one process, and use the "
            f"result: run `salora calibrate --model {source} --out safety.safetensors` with your target modules, and "
            "set safety_module='safety.safetensors'."
        )


def unreachable_weight(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why the model cannot be run in this process as it is, for messages; None if all target weights are here."""
    names = list(names)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "The model is sharded by FSDP"
    for name in names:
        layer = base_layer(model.get_submodule(name))
        for parameter in layer.parameters(recurse=False):
            if _is_partitioned(parameter):
                return f"The weight of {name!r} is sharded by DeepSpeed ZeRO-3"
            if isinstance(parameter, DTensor):
                return f"The weight of {name!r} is sharded by FSDP"
            if parameter.is_meta and not has_offloaded_params(layer):
                return f"The weight of {name!r} is on the meta device"
    return PLACEHOLDERS if has_placeholders(model, names) else None


def check_not_offloaded(model: nn.Module, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: accelerate has offloaded target layers, where an adapter can be loaded and not be trained: PEFT puts
            it where the weights are.
    """
    layers: dict[str, Any] = {name: base_layer(model.get_submodule(name)) for name in names}
    offloaded = [name for name, layer in layers.items() if layer.weight.is_meta and has_offloaded_params(layer)]
    if offloaded:
        raise ValueError(
            f"device_map: {len(offloaded)} of {len(names)} target layers are offloaded to the CPU or the disk "
            f"({listed(offloaded)}), where no adapter is trained. Load the model onto one device, quantized where it "
            f"does not fit; or leave them out: {advice_to_leave_out(offloaded, names)}."
        )


def check_loaded(model: nn.Module, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: Target layers have no weights yet, from which an adapter could start.
    """
    layers: dict[str, Any] = {name: base_layer(model.get_submodule(name)) for name in names}
    absent = [name for name, layer in layers.items() if layer.weight.is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} target layers are on the meta device, without weights ({listed(absent)}). "
            "Load the model's weights before the adapter is made."
        )


PLACEHOLDERS = "The weights are in the first process only, as FSDP loads them with fsdp_cpu_ram_efficient_loading"


def check_fsdp_settings() -> None:
    """
    Raises:
        ValueError: accelerate is to hand out the weights of the first process under FSDP2. It takes all that a state
            dict holds for sharded parameters, and a SaLoRA layer's holds what tells its safety module, too. Or
            checkpoints are to be written in shards, which are of the factors and not of the adapter's weights.
    """
    if os.environ.get("FSDP_VERSION") != "2" or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true: with FSDP2, accelerate cannot hand out from the first process what "
            "tells a SaLoRA layer's safety module. Set it to false, as examples/accelerate-fsdp2.yaml does."
        )
    if os.environ.get("FSDP_STATE_DICT_TYPE", "").upper() == "SHARDED_STATE_DICT":
        raise ValueError(
            "fsdp_state_dict_type: SHARDED_STATE_DICT: a SaLoRA adapter is saved whole, since its weights are computed "
            "from whole factors, and the first checkpoint would fail. Set it to FULL_STATE_DICT, as "
            "examples/accelerate-fsdp2.yaml does."
        )


def has_placeholders(model: nn.Module, names: Iterable[str]) -> bool:
    """
    Whether this process may have something else in the place of the target weights, which the first process has: zeros,
    or with older Transformers whatever stood in the memory, which only the settings tell.
    """
    if rank_and_world_size()[0] == 0:
        return False
    layers: list[Any] = [base_layer(model.get_submodule(name)) for name in names]
    weights = [layer.weight for layer in layers]
    if not all(type(weight) is nn.Parameter and not _is_partitioned(weight) for weight in weights):
        return False
    return is_fsdp_enabled() or not any(weight.any() for weight in weights)


def is_sharded_data_parallel(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 has sharded it, and not tensor parallelism, which has DTensors as well."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(_is_partitioned(parameter) for parameter in model.parameters())


def _is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has sharded it, which leaves no element in its place: its own mark of a parameter."""
    return hasattr(parameter, "ds_id")


def parameter_bytes(model: nn.Module) -> int:
    """What the parameters of a model take whole, also where this process has a shard of them."""
    # DeepSpeed's own name for the number of elements of a parameter whose shard is here.
    return sum(int(getattr(p, "ds_numel", p.numel())) * p.element_size() for p in model.parameters())


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: A target weight holds NaN or infinity; it names the module.
    """
    finite: dict[str, Tensor] = {}
    for name in names:
        with linear_weight(model.get_submodule(name)) as weight:
            finite[name] = torch.isfinite(weight).all()
    for name, is_finite in zip(finite, values_of(list(finite.values())), strict=True):
        if not is_finite:
            raise ValueError(
                f"The weight of {name!r} contains NaN or infinity: the base model is broken, or was loaded in a "
                "dtype too small for it."
            )
