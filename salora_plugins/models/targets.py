"""Which layers of a model an adapter targets."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..options import OPTIONS
from ..ranks import Rank, SideRanks, matching_patterns, of_side
from ..support.module_names import advice_to_leave_out, listed, pattern_for, quoted
from .embeddings import input_embeddings, output_embeddings
from .weights import base_layer, is_quantized, layer_features

logger = logging.getLogger(__name__)

# What PEFT's checks for LoRA are asked with, on behalf of an adapter that is one.
_LORA = LoraConfig()
# A share of the energy is not to be had from fewer outputs or inputs.
_LEAST_FOR_A_SHARE = OPTIONS["safety_rank"].default


@runtime_checkable
class _HasSafetyRanks(Protocol):
    """The configuration of an adapter that protects directions; any other is LoRA's."""

    safety_rank: Rank
    safety_rank_pattern: dict[str, Rank]
    input_safety_rank: Rank | None
    input_safety_rank_pattern: dict[str, Rank]

    @property
    def has_input_side(self) -> bool: ...


def target_module_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """
    The modules that PEFT would adapt, in the model's order, found by PEFT's own matching rules.

    Args:
        model: The base model, with or without adapters.
        config: Its target_modules, exclude_modules, layers_to_transform and layers_pattern are used.

    Raises:
        ValueError: Nothing matches, no target_modules are known for this architecture, or a target or the model is none
            that an adapter can be put on.
    """
    _check_model(model)
    given, config = config, copy.copy(config)
    if config.target_modules is None:
        model_type = BaseTuner.get_model_config(model).get("model_type")
        known = LoraModel.target_module_mapping.get(model_type) if model_type else None
        if known is None:
            raise ValueError(
                f"target_modules is not set, and PEFT knows no default for the model type {model_type!r}: name the "
                "linear layers to adapt, or give target_modules='all-linear'."
            )
        config.target_modules = list(known)
    _check_not_fused(model, config)
    _maybe_include_all_linear_layers(config, model)  # in place
    names = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if BaseTuner._check_target_module_exists(config, name):
            check_layer_type(name, module)
            # PEFT's own check, which knows the type "LORA" only.
            _check_lora_target_modules_mamba(_LORA, model, name.rpartition(".")[2])
            names.append(name)
    left_out = set(too_narrow(model, given, names))
    names = [name for name in names if name not in left_out]
    if not names:
        narrowing = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
        given_too = [f"{option}={value!r}" for option in narrowing if (value := getattr(config, option, None))]
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}"
            f"{' together with ' + ', '.join(given_too) if given_too else ''}. Its linear layers are called "
            f"{_linear_names(model)}{f' (the first is {first!r})' if (first := _first_linear(model)) else ''}."
        )
    _check_not_tied(model, names)
    _check_not_shared(model, names)
    return names


def _check_model(model: nn.Module) -> None:
    """
    Raises:
        ValueError: The model is wrapped by PEFT already, or has an encoder.
    """
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        raise ValueError(
            f"The model is a {type(model).__name__} already, and a SaLoRA adapter cannot be put around another. Start "
            "from the base model: model.merge_and_unload() keeps what the adapter has learned, model.unload() drops "
            "it; or add a SaLoRA adapter to a model of SaLoRA adapters with model.add_adapter(name, config)."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, and SaLoRA supports decoder-only language models: "
            "calibration runs requests and answers as one sequence. Use plain LoRA for it."
        )


def _check_not_fused(model: nn.Module, config: LoraConfig) -> None:
    """
    Raises:
        ValueError: Targets are names of experts that Transformers has fused, which PEFT would silently translate for
            LoRA and silently ignore for every other type.
    """
    if isinstance(config.target_modules, str) or not config.target_modules or not hasattr(model, "config"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = LoraConfig(target_modules=list(config.target_modules))
    convert_peft_config_for_transformers(view, model, None)
    if view.target_parameters:
        fused = sorted(set(config.target_modules).difference(view.target_modules or ()))
        raise ValueError(
            f"target_modules: {', '.join(map(repr, fused))} of {type(model).__name__} are parameters that hold all "
            f"experts ({', '.join(sorted(view.target_parameters))}), and SaLoRA supports linear layers only. Leave "
            "them out."
        )


def too_narrow(model: nn.Module, config: LoraConfig, names: Iterable[str]) -> list[str]:
    """
    Of the layers that target_modules="all-linear" finds those with so few outputs or inputs (routers, gates) that the
    safety rank would leave nothing to train. A share of the energy leaves out layers with up to 32, the default rank.
    Where a pattern decides the rank, the user has named the layer, and `check_ranks` says what is wrong.
    """
    targets = config.target_modules
    if not (isinstance(targets, str) and targets.lower() == "all-linear" and isinstance(config, _HasSafetyRanks)):
        return []
    names = list(names)
    default = default_input_ranks(model, names)
    sides: list[tuple[int, Rank | None, dict[str, Rank]]] = [(1, config.safety_rank, config.safety_rank_pattern)]
    if config.has_input_side:
        sides.append((0, config.input_safety_rank, config.input_safety_rank_pattern))
    narrow = set()
    for side, rank, pattern in sides:
        for name, key in matching_patterns(names, pattern).items():
            wanted = default[name] if rank is None else rank
            least = wanted if isinstance(wanted, int) else _LEAST_FOR_A_SHARE
            if key is None and layer_features(model.get_submodule(name))[side] <= least:
                narrow.add(name)
    return [name for name in names if name in narrow]


def say_what_is_left_out(model: nn.Module, config: LoraConfig) -> None:
    """Log the layers that `target_module_names` has left out."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    resolved = copy.copy(config)
    _maybe_include_all_linear_layers(resolved, model)  # in place
    linear = resolved.target_modules or ()
    found = [name for name, _ in model.named_modules() if name in linear]
    found = [name for name in found if BaseTuner._check_target_module_exists(resolved, name)]
    if left_out := too_narrow(model, config, found):
        kept = set(found) - set(left_out)
        logger.warning(
            "target_modules='all-linear': %d layers have too few outputs or inputs for the safety ranks and are left "
            "out: %s. Give them ranks in safety_rank_pattern (and input_safety_rank_pattern) to adapt them.",
            len(left_out),
            quoted(pattern_for(left_out, kept)),
        )


def check_reached_by_text(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: Targets are in a tower for images or sounds, which the safety data, being text, do not pass.
    """
    config = getattr(model, "config", None)
    towers = set(getattr(config, "sub_configs", {})) - {"text_config", "generation_config"}
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if towers and get_decoder is not None else None
    inside = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), None)
    if inside is None:
        return
    head, names = output_embeddings(model), list(names)
    reached = None if head is None else base_layer(head)
    unused = [n for n in names if not n.startswith(inside) and base_layer(model.get_submodule(n)) is not reached]
    if unused:
        everything = [name for name, _ in model.named_modules()]
        raise ValueError(
            f"target_modules: {len(unused)} of {len(names)} are outside of the language model ({listed(unused)}). The "
            "safety data is text and does not pass them, so that there is nothing to calibrate them on. Leave them "
            f"out: {advice_to_leave_out(unused, names, everything)}."
        )


def _first_linear(model: nn.Module) -> str | None:
    """The whole name of a linear layer."""
    return next((name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))), None)


def _linear_names(model: nn.Module) -> str:
    """The last parts of the names of a model's linear layers, such as "q_proj"."""
    linear = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def _check_not_tied(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: The head is a target and its weight is the input embedding's, which merging would change as well.
    """
    embeddings = input_embeddings(model)
    tied = None if embeddings is None else base_layer(embeddings).weight
    for name in names if tied is not None else ():
        if base_layer(model.get_submodule(name)).weight is tied:
            raise ValueError(
                f"target_modules: {name!r} has the weight of the input embeddings, which merging the adapter would "
                "change with it. Leave it out, or load the model with tie_word_embeddings=False."
            )


def _check_not_shared(model: nn.Module, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: The weight of a target is that of another layer, too, which merging would change as well: by this
            layer's update, which is not kept out of the other's directions.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    shared: dict[str, list[str]] = {}
    for name in names:
        layer = base_layer(model.get_submodule(name))
        others = [other for other, module in owners.get(id(getattr(layer, "weight", None)), ()) if module is not layer]
        if others:
            shared[name] = others
    if shared:
        name, others = next(iter(shared.items()))
        raise ValueError(
            f"target_modules: {len(shared)} of {len(names)} have their weight in common with another layer "
            f"({name!r} with {listed(others)}), which merging the adapter would change, too. Leave them out: "
            f"{advice_to_leave_out(list(shared), names)}; or give every layer a weight of its own."
        )


def check_layer_type(name: str, module: nn.Module) -> None:
    """
    Raises:
        ValueError: `module` is not a linear layer whose outputs a safety module can protect.
    """
    layer = base_layer(module)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        if _is_foreign_linear(layer):
            library = type(layer).__module__.split(".")[0]
            raise ValueError(
                f"target_modules: {name!r} is a {type(layer).__name__} of {library}, whose weight SaLoRA cannot read. "
                "Load the base model in bf16, or quantized by bitsandbytes or torchao (weights only), or leave it out "
                "with exclude_modules."
            )
        raise ValueError(
            f"target_modules: {name!r} is a {type(layer).__name__}, which SaLoRA does not support. Target linear "
            "layers (torch.nn.Linear, bitsandbytes' 4-bit and 8-bit ones, or transformers' Conv1D), or leave it out "
            "with exclude_modules."
        )
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and is_quantized(layer):
        # torchao's own name; its layers would train nothing without a word (torchao 0.17).
        if getattr(weight, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"target_modules: {name!r} quantizes its activations, too, and torchao passes no gradients through "
                "such layers, so that nothing would be trained. Quantize the weights only (Int8WeightOnlyConfig, for "
                "one)."
            )
        return
    if weight is None:
        found = "has no weight"
    elif not weight.is_floating_point() or weight.element_size() == 1:
        found = f"holds {weight.dtype} codes"
    elif not isinstance(weight, DTensor) and type(weight) not in (nn.Parameter, Tensor):
        found = f"keeps its weight as a {type(weight).__name__}"
    else:
        return
    raise ValueError(
        f"target_modules: {name!r} is a {type(layer).__name__} that {found}, which SaLoRA cannot read as numbers. Load "
        "the base model in bf16, or quantized by bitsandbytes or torchao (weights only)."
    )


def _is_foreign_linear(layer: nn.Module) -> bool:
    """Whether this is the linear layer of another library, by its features or the codes that it holds."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    holds_codes = any(t.dim() > 1 and (not t.is_floating_point() or t.element_size() == 1) for t in tensors)
    return holds_codes or hasattr(layer, "in_features")


def default_input_ranks(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Name of a linear layer -> `default_input_rank`."""
    return {name: default_input_rank(layer_features(model.get_submodule(name))[0]) for name in names}


def default_input_rank(d_in: int) -> int:
    """
    A quarter of a layer's inputs, as in docs/evidence/safety-retention.md; at most 256, so that the bases of wide
    models stay small beside their weights.
    """
    return max(1, min(d_in // 4, 256))


def check_ranks(model: nn.Module, ranks: SideRanks) -> None:
    """
    Raises:
        ValueError: A rank leaves a layer nothing to train.
    """
    for side, by_name in ranks.items():
        option = of_side(side, "safety_rank")
        too_large: dict[tuple[Rank, int], list[str]] = {}
        for name, rank in by_name.items():
            dimension = layer_features(model.get_submodule(name))[1 if side == "output" else 0]
            if (isinstance(rank, int) and rank >= dimension) or dimension < 2:
                too_large.setdefault((rank, dimension), []).append(name)
        if too_large:
            raise ValueError("\n".join(_too_large(option, side, *key, n, by_name) for key, n in too_large.items()))


def _too_large(option: str, side: str, rank: Rank, dimension: int, names: list[str], targets: Iterable[str]) -> str:
    pattern = pattern_for(names, set(targets) - set(names))
    lower = f"set {option}_pattern={{{quoted(pattern)}: {max(1, dimension // 4)}}}, " if dimension > 1 else ""
    return (
        f"{option}={rank} is not smaller than the {dimension} {side}s of {listed(names)}, which would leave their "
        f"update no direction at all. Leave them out ({advice_to_leave_out(names, targets)})"
        + (f", or {lower}or {option} to at most {dimension - 1}." if lower else ".")
    )
