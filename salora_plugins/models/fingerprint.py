"""Which model a safety module was computed for, told by a few elements of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ranks import Side
from ..safety_module import SafetyModule, SafetyModuleError
from ..support.linear_algebra import on_cpu
from .weights import is_quantized, is_torchao, layer_features, linear_weight

_SAMPLES_PER_WEIGHT = 64
_SAMPLES_PER_PARAMETER = 1024


def model_fingerprint(model: nn.Module) -> str:
    """
    Hex digest of a model from a few elements of every parameter, as they are stored: a different one for another dtype
    or quantization of the same checkpoint. A base model with adapters in its layers has its own.
    """
    digest = hashlib.sha256()
    for module_name, module in _without_adapters(model):
        offloaded = has_offloaded_params(module)
        with align_module_device(module, torch.device("cpu")) if offloaded else nullcontext():
            for name, parameter in module.named_parameters(recurse=False):
                digest.update(f"{module_name}.{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
                values = parameter.dequantize() if is_torchao(parameter) else parameter
                digest.update(_samples(values.detach().flatten()).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_adapters(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` as it is without adapters: an adapted layer is its base layer, under the name of both."""
    seen = set() if seen is None else seen
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _without_adapters(child, f"{name}.{child_name}" if name else child_name, seen)


def _samples(values: Tensor) -> Tensor:
    """Evenly spaced elements of a vector, on the CPU."""
    index = _evenly_spaced(values.numel(), _SAMPLES_PER_PARAMETER)
    return values[index.to(values.device)].cpu().contiguous()


def _evenly_spaced(size: int, most: int) -> Tensor:
    """Indices into a vector of `size` elements; in float64, since float32 would round beyond the end of large ones."""
    return torch.linspace(0, size - 1, min(most, size), dtype=torch.float64).long()


def weight_samples(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Module name -> evenly spaced elements of its weight, (up to 64,) float32 on the CPU: the fingerprint."""
    samples: dict[str, Tensor] = {}
    places: dict[tuple[torch.Size, torch.device], tuple[Tensor, Tensor]] = {}
    for name in names:
        with linear_weight(model.get_submodule(name)) as weight:
            key = weight.shape, weight.device
            if key not in places:
                index = _evenly_spaced(weight.numel(), _SAMPLES_PER_WEIGHT)
                rows, columns = index // weight.shape[1], index % weight.shape[1]
                places[key] = rows.to(weight.device), columns.to(weight.device)
            samples[name] = weight[places[key]].float()
    return dict(zip(samples, on_cpu(list(samples.values())), strict=True))


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of whole weights, with their names, shapes and dtypes; one at a time is on the CPU."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode())
        digest.update(memoryview(weight.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def layer_weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and weight (d_out, d_in) of linear layers, dequantized; each is only valid until the next."""
    for name in names:
        with linear_weight(model.get_submodule(name)) as weight:
            yield name, weight


def check_belongs(safety_module: SafetyModule, model: nn.Module, names: Iterable[str]) -> None:
    """
    Check that a safety module was computed for these layers of this model.

    The sampled weights must agree up to the rounding of bf16; those of a quantized layer up to its quantization
    error, which is a fraction of the weights' spread.

    Raises:
        SafetyModuleError: Shapes or weights differ; it names the first module where they do.
    """
    names = list(names)
    samples = weight_samples(model, [name for name in names if name in safety_module.weight_samples])
    for name in names:
        module = model.get_submodule(name)
        d_in, d_out = layer_features(module)
        dimensions: dict[Side, int] = {"output": d_out, "input": d_in}
        for side, found in safety_module.sides.items():
            if name in found.bases and found.bases[name].shape[0] != dimensions[side]:
                raise SafetyModuleError(
                    f"The safety module was computed for another model: its basis for {name!r} is for "
                    f"{found.bases[name].shape[0]} {side}s, the layer has {dimensions[side]}. Calibrate on this model."
                )
        if name not in samples:
            continue
        ours, theirs = samples[name], safety_module.weight_samples[name]
        if not _agree(ours, theirs, is_quantized(module)):
            raise SafetyModuleError(
                f"The safety module was computed for another model: the weight of {name!r} is not the one it was "
                f"computed for ({safety_module.provenance.get('base_model') or 'unnamed model'}). Calibrate on this "
                "model, or load the model that it belongs to."
            )


def _agree(ours: Tensor, theirs: Tensor, quantized: bool) -> bool:
    """Whether elements of a weight are those of the same checkpoint."""
    if ours.shape != theirs.shape:
        return False
    if quantized:
        return bool((ours - theirs).square().mean() <= 0.05 * theirs.square().mean())
    return torch.allclose(ours, theirs, rtol=2**-7, atol=1e-3 * theirs.abs().mean().item())
