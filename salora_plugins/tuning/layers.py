"""The LoRA layers of a model that carry an adapter as SaLoRA, and the two linear layers of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..parametrization import LORA_FACTORS, has_safe_factor
from ..ranks import Side

# What torch.compile puts into the names of modules and of their weights, and what others put into the modules' only.
COMPILED = "_orig_mod."
_WITHOUT_A_KEY = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def lora_linears(layer: LoraLayer, adapter_name: str) -> dict[Side, nn.Linear]:
    """The two linear layers of an adapter: "input": lora_A; "output": lora_B."""
    return {side: getattr(layer, factor)[adapter_name] for side, factor in LORA_FACTORS.items()}


def lora_layer(model: nn.Module, name: str) -> LoraLayer:
    """
    The LoRA layer that PEFT has put in the place of a target module.

    Raises:
        TypeError: There is another layer.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, LoraLayer):
        raise TypeError(f"{name!r} is a {type(layer).__name__}, not one of PEFT's LoRA layers.")
    return layer


def salora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(name as in the unwrapped model, layer) of the layers that carry this adapter as SaLoRA."""
    for name, layer in _with_names_of_keys(model, adapter_name):
        yield name.replace(COMPILED, ""), layer


def salora_linears(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Linear]]:
    """(name in the state dict, linear) of every parametrized lora_A and lora_B of an adapter."""
    for name, layer in _with_names_of_keys(model, adapter_name):
        for side, linear in lora_linears(layer, adapter_name).items():
            yield f"{name}.{LORA_FACTORS[side]}.{adapter_name}", linear


def check_without_other_adapters(model: nn.Module, adapter_name: str, names: Collection[str]) -> None:
    """
    Check that a base model is one: `get_peft_model` puts its layers into the very model that it is given, where they
    stay when it is given again, as a cell of a notebook is run again. They would be calibrated with, and trained and
    saved unprotected under the same name.

    Args:
        model: To which a tuner is made.
        adapter_name: Name of its adapter.
        names: The target modules; layers of SaLoRA there give way to new ones.

    Raises:
        ValueError: It has layers of an adapter of another type, or of one of this name elsewhere.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        factors = getattr(module, "lora_A", {})
        is_ours = len(factors) > 0 and all(map(has_safe_factor, factors.values()))
        if not is_ours or (adapter_name in factors and name not in names):
            raise ValueError(
                f"The model is no base model: {name!r} has the adapter of an earlier get_peft_model, which changes the "
                "model that it is given. Load the model again, or call unload() on what the earlier call returned."
            )


def _with_names_of_keys(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        if has_safe_factor(module.lora_A[adapter_name]):
            for wrapper in _WITHOUT_A_KEY:
                name = name.replace(wrapper, "")
            yield name, module
