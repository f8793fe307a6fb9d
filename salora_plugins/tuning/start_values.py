"""The start values of an adapter's layers: computed from their weights, copied, or restricted to the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..config import SaLoRAConfig
from ..initialization import pissa_factors, restrict_to_task, sails_factor
from ..models.weights import linear_weight
from ..parametrization import SafeFactor, moved_once, register_safe_factor, safe_factor, trained_factor
from ..ranks import Side
from ..support.distributed import broadcast
from .layers import lora_linears

# Weights (in float32) that are decomposed together.
_BYTES_AT_ONCE = 64 * 2**20


def start_factors(
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    config: SaLoRAConfig,
    subspaces: Mapping[str, Tensor],
    *,
    zeros: bool,
) -> Iterator[tuple[str, dict[Side, Tensor] | None]]:
    """
    (name, {"input": A_0, "output": B_0}) of every layer; None for `init="zero"`, which has no start factors.

    Weights of one shape are decomposed several at a time, where they are: what a single small one costs is mostly the
    launching of operations.

    Args:
        layers: By name; the adapter's weights in them say shape and device.
        adapter_name: The adapter.
        config: Its `init`, and the seed of the decompositions.
        subspaces: Of `init="sails"`: the directions (d_out, k) in which B starts, by name.
        zeros: Whether zeros will do, since saved factors follow.
    """
    if config.init == "zero":
        yield from ((name, None) for name in layers)
        return
    if config.init == "sails" and not zeros:
        for name, layer in layers.items():
            linears = lora_linears(layer, adapter_name)
            b = sails_factor(subspaces[name], layer.r[adapter_name], name)
            # PEFT has just drawn A.
            a = linears["input"].weight.detach().float().clone()
            yield name, {"input": a, "output": b.to(linears["output"].weight.device)}
        return
    groups: dict[tuple[int, int, int, float, torch.device], list[str]] = {}
    for name, layer in layers.items():
        linears = lora_linears(layer, adapter_name)
        d_out, d_in = linears["output"].weight.shape[0], linears["input"].weight.shape[1]
        device = linears["output"].weight.device
        groups.setdefault((d_out, d_in, layer.r[adapter_name], layer.scaling[adapter_name], device), []).append(name)
    for (d_out, d_in, rank, scaling, device), names in groups.items():
        if zeros:
            for name in names:
                a, b = torch.zeros(rank, d_in, device=device), torch.zeros(d_out, rank, device=device)
                yield name, {"input": a, "output": b}
            continue
        size = max(1, _BYTES_AT_ONCE // (4 * d_out * d_in))
        for chunk in (names[start : start + size] for start in range(0, len(names), size)):
            weights = torch.empty(len(chunk), d_out, d_in, device=device)
            for slot, name in zip(weights, chunk, strict=True):
                with linear_weight(layers[name].get_base_layer()) as weight:
                    slot.copy_(weight)
            for name, a, b in zip(chunk, *pissa_factors(weights, rank, scaling, config.seed), strict=True):
                yield name, {"input": a, "output": b}


def parametrize_layer(
    layer: LoraLayer,
    adapter_name: str,
    start: Mapping[Side, Tensor] | None,
    bases: Mapping[Side, Tensor],
) -> None:
    """
    Let an adapter's weights in a layer be computed by a `SafeFactor` each.

    Args:
        layer: The layer, whose adapter PEFT has just made.
        adapter_name: The adapter.
        start: A_0 and B_0; None for B = 0 beside PEFT's random A.
        bases: V_C and U_C; on a side without one there is no projection.
    """
    for side, linear in lora_linears(layer, adapter_name).items():
        offset = None
        with torch.no_grad():
            if start is not None:
                linear.weight.copy_(start[side])
                # Taken from the parameter: the frozen half starts with the very bits that the trained one has.
                offset = linear.weight.detach().float().clone()
            elif side == "output":
                linear.weight.zero_()
        register_safe_factor(linear, SafeFactor(side, _placed(bases.get(side), linear.weight.device), offset))


def replace_bases(layer: LoraLayer, adapter_name: str, bases: Mapping[Side, Tensor]) -> None:
    """Project an adapter's weights in a layer by other bases from here on."""
    for side, linear in lora_linears(layer, adapter_name).items():
        safe_factor(linear).basis = _placed(bases.get(side), trained_factor(linear).device)


def _placed(basis: Tensor | None, device: torch.device) -> Tensor | None:
    """A basis where its layer is; one that several layers share is there once, too."""
    return None if basis is None else moved_once(basis, device)


def copy_factors(layer: LoraLayer, source: str, target: str) -> None:
    """Adapters that share one configuration share the safety module and start from the same weights."""
    linears = lora_linears(layer, target)
    for side, original in lora_linears(layer, source).items():
        factor = safe_factor(original)
        offset = None if factor.offset is None else factor.offset.clone()
        with torch.no_grad():
            linears[side].weight.copy_(trained_factor(original))
        register_safe_factor(linears[side], SafeFactor(side, factor.basis, offset))


def restrict_layer_to_task(layer: LoraLayer, adapter_name: str, task_basis: Tensor) -> None:
    """B_0 <- U_T U_T^T B_0, in the trained half and in the frozen one."""
    linear = lora_linears(layer, adapter_name)["output"]
    parameter = trained_factor(linear)
    check_writable(parameter)
    with torch.no_grad():
        parameter.copy_(restrict_to_task(parameter, task_basis))
    safe_factor(linear).offset = parameter.detach().float().clone()


def restrict_layers_to_task(
    layers: Mapping[str, LoraLayer], adapter_name: str, task_bases: Mapping[str, Tensor]
) -> None:
    """`restrict_layer_to_task` of all layers of an adapter, the same on every rank; by module name."""
    for name, layer in layers.items():
        restrict_layer_to_task(layer, adapter_name, task_bases[name])
    synchronize(layers.values(), adapter_name)


def check_writable(parameter: nn.Parameter) -> None:
    """
    Raises:
        RuntimeError: The factor is sharded.
    """
    if is_managed(parameter):
        raise RuntimeError(
            "The task initialization cannot be set from the first training batch once DeepSpeed or FSDP manages the "
            "factors. Set task_data in SaLoRAConfig, so that it is known before, or init='pissa' or 'zero'."
        )


def is_managed(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed or FSDP has a part in what a factor is."""
    return any(hasattr(parameter, mark) for mark in ("device_mesh", "ds_id", "_hp_mapping"))


def is_at_start(linear: nn.Linear) -> bool:
    """Whether a factor still is its start factor."""
    offset = safe_factor(linear).offset
    return offset is not None and torch.equal(trained_factor(linear), offset.to(trained_factor(linear)))


def synchronize(layers: Iterable[LoraLayer], adapter_name: str) -> None:
    """Give every rank the first one's start values; decompositions may differ in the last bits."""
    for layer in layers:
        for linear in lora_linears(layer, adapter_name).values():
            factor, parameter = safe_factor(linear), trained_factor(linear)
            broadcast([t for t in (parameter, factor.offset) if t is not None])
