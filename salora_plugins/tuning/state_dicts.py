"""The factors of an adapter in PEFT's state dicts: effective weights when it is saved, split again when loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..adapters.certificate import lies_inside
from ..adapters.saved import ADAPTER_CONFIG_FILE, PREFIX, SavedAdapter
from ..config import SaLoRAConfig
from ..lora_options import check_lora_entries
from ..parametrization import LORA_FACTORS, SafeFactor, safe_factor, trained_factor, weight_holder
from ..support.files import read_json_object
from ..support.module_names import listed
from .layers import COMPILED, lora_linears, salora_layers, salora_linears
from .start_values import is_at_start, is_managed

# Ends of the keys of saved factors.
_FACTORS = tuple(f".{factor}.weight" for factor in LORA_FACTORS.values())


def check_saved_as_trained(model: nn.Module, adapter_name: str, config: SaLoRAConfig) -> None:
    """
    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        config: Its configuration, as it will be saved.

    Raises:
        ValueError: What is saved would compute something else than the adapter: its configuration or its scaling was
            changed since the adapter was made, or others have a part in what its factors compute.
    """
    saved = SavedAdapter(config.to_lora_config().to_dict(), {}, {})
    for name, layer in salora_layers(model, adapter_name):
        module, linears = name.removeprefix(PREFIX), lora_linears(layer, adapter_name)
        rank, scaling = linears["input"].out_features, float(layer.scaling[adapter_name])
        if rank != saved.rank_of(module):
            raise ValueError(
                f"{module}: adapter {adapter_name!r} has rank {rank} there, and its configuration would be saved with "
                f"{saved.rank_of(module)}. r, rank_pattern and init have no effect once the adapter is made: set them "
                "back, and give them to get_peft_model."
            )
        if not math.isclose(scaling, saved.scaling(module), rel_tol=1e-6):
            raise ValueError(
                f"{module}: adapter {adapter_name!r} computes with the scaling {scaling:g}, and its configuration "
                f"would be saved with {saved.scaling(module):g}. lora_alpha, alpha_pattern and use_rslora have no "
                "effect once the adapter is made: set them back, and give them to get_peft_model. A scaling that was "
                "changed in the layers (set_scale, rescale_adapter_scale) is not saved: put it back before saving."
            )
        for linear in linears.values():
            _check_alone(linear, module)
        _check_start(linears["output"], adapter_name)
    _warn_of_what_is_not_saved(model, config)


def check_scaling_of_file(folder: Path, model: nn.Module, adapter_name: str) -> None:
    """
    Args:
        folder: Of a saved adapter, whose weights are to be loaded into one that is there.
        model: The model with that.
        adapter_name: That adapter.

    Raises:
        ValueError: It would multiply the same factors by another scaling; or a file cannot be read.
    """
    file = folder / ADAPTER_CONFIG_FILE
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        return  # none of its weights are taken
    check_lora_entries({"r": None, "lora_alpha": None, **config}, file)
    saved = SavedAdapter(config, {}, {})
    for name, layer in salora_layers(model, adapter_name):
        module, scaling = name.removeprefix(PREFIX), float(layer.scaling[adapter_name])
        if saved.rank_of(module) != lora_linears(layer, adapter_name)["input"].out_features:
            return  # told by the shapes of the weights
        if not math.isclose(scaling, saved.scaling(module), rel_tol=1e-6):
            raise ValueError(
                f"{module}: the weights in {folder} were trained with the scaling {saved.scaling(module):g}, and "
                f"adapter {adapter_name!r} has {scaling:g}, with which they compute something else. Go on with the "
                "lora_alpha, r, alpha_pattern, rank_pattern and use_rslora of that adapter, as load_for_training does."
            )


def put_effective_weights(state_dict: dict[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """
    Put the weights of an ordinary LoRA adapter in the place of the factors: effective, float32, under LoRA's own keys.

    Args:
        state_dict: What PEFT has selected of the model's state dict; changed.
        model: The model with the adapter.
        adapter_name: The adapter.

    Raises:
        ValueError: A factor is missing, or was trained with another safety module.
        RuntimeError: The factors are sharded.
    """
    for name, linear in salora_linears(model, adapter_name):
        key = f"{name}.parametrizations.weight."
        if f"{key}original" not in state_dict:
            raise ValueError(
                f"The state dict has no {key}original, a factor of adapter {adapter_name!r}. Give the state_dict() "
                "of this very model, without the prefixes of one that wraps it (such as 'module.')."
            )
        _check_gathered(state_dict[f"{key}original"])
        factor = safe_factor(linear)
        state, start = (state_dict.pop(f"{key}{part}_extra_state", None) for part in ("0.", "0.start."))
        if state is not None:
            factor.check_state(state, name)
        # Compiled layers are called by another name in this process only.
        state_dict[f"{name}.weight".replace(COMPILED, "")] = factor.exact(state_dict.pop(f"{key}original"), start)


def take_factors(
    state_dict: dict[str, Tensor], model: nn.Module, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Split the effective weights of a saved adapter into trained factors and start factors, which the model gets at once.

    Args:
        state_dict: Of the saved adapter; the weights of SaLoRA's layers are taken out of it.
        model: The model with the adapter to load into.
        adapter_name: The adapter.

    Returns:
        The trained factors, and what else a state dict of the model holds of them, both under the model's keys.

    Raises:
        ValueError: A weight does not fit this adapter, lies in the directions that it protects, or is of a layer that
            the adapter does not have.
    """
    factors, states = {}, {}
    for name, linear in salora_linears(model, adapter_name):
        key = next((k for k in _checkpoint_keys(name, adapter_name) if k in state_dict), None)
        if key is None:
            continue  # PEFT reports missing keys itself
        prefix = f"{name}.parametrizations.weight."
        factors[f"{prefix}original"] = _load_factor(linear, state_dict.pop(key), name.replace(f".{adapter_name}", ""))
        states.update(_states_of_loaded(safe_factor(linear), f"{prefix}0."))
    left = {key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in state_dict if key.endswith(_FACTORS)}
    if factors and left:
        raise ValueError(
            f"The saved adapter has weights of {len(left)} layers that adapter {adapter_name!r} does not have "
            f"({listed(sorted(left))}), and they would be lost. Create it with the target_modules that it was trained "
            "with (load_for_training reads them)."
        )
    return factors, states


def check_that_more_than_a_copy_is_loaded(
    model: nn.Module, copy_name: str, original_name: str, loaded: Mapping[str, Tensor]
) -> None:
    """
    Refuse to load what a frozen copy of a trained adapter holds already, while the adapter itself is at its start.

    That is what transformers does when it resumes a run whose reference is a copy of the adapter ("ref", in TRL):
    of a checkpoint with adapters in subfolders it loads these only, and training would start over.

    Args:
        model: The model with both adapters.
        copy_name: The copy, into which weights are loaded.
        original_name: The adapter itself.
        loaded: The trained factors of `take_factors`.

    Raises:
        ValueError: It is so.
    """
    copies = [linear for _, linear in salora_linears(model, copy_name)]
    trained = [linear for _, linear in salora_linears(model, original_name)]
    if not trained or len(copies) != len(loaded) or any(trained_factor(copy).requires_grad for copy in copies):
        return
    if _untrained(trained, copies, list(loaded.values())):
        raise ValueError(
            f"The weights of {copy_name!r}, the frozen copy of {original_name!r}, are to be loaded, but "
            f"{original_name!r} itself is at its start: a trainer that resumes with such a copy does not load the "
            "adapter itself, and would train it from the beginning. Pass model=load_for_training(base_model, "
            "checkpoint) together with resume_from_checkpoint=checkpoint."
        )


def _untrained(trained: Sequence[nn.Linear], copies: Sequence[nn.Linear], loaded: Sequence[Tensor]) -> bool:
    return all(
        is_at_start(linear) or _equal_weights(linear, copy, factor)
        for linear, copy, factor in zip(trained, copies, loaded, strict=True)
    )


def _checkpoint_keys(name: str, adapter_name: str) -> tuple[str, ...]:
    key = f"{name.removesuffix(f'.{adapter_name}')}.weight"
    plain = key.replace(COMPILED, "")
    return key, plain, f"base_model.model.{plain}"


def _warn_of_what_is_not_saved(model: nn.Module, config: SaLoRAConfig) -> None:
    """Such as base weights that were unfrozen by hand: no adapter's file has them, no safety module protects them."""
    saved = (".lora_", ".modules_to_save.", ".trainable_tokens_delta", "._flat_param")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lost = [name for name in trained if not any(part in f".{name}" for part in saved)]
    if config.bias != "none":
        lost = [name for name in lost if not name.endswith("bias")]
    if lost:
        warnings.warn(
            f"{len(lost)} trainable parameters are not part of the adapter ({listed(lost)}): they are not saved with "
            "it, so that what is loaded is not what was trained, and the safety module does not protect them. Freeze "
            "them, or name their modules in modules_to_save.",
            UserWarning,
            stacklevel=2,
        )


def _check_alone(linear: nn.Linear, name: str) -> None:
    """
    Raises:
        ValueError: Another parametrization has a part in what the factor computes.
    """
    holder = weight_holder(linear)
    # Hooks say nothing: DeepSpeed has some on every module.
    if (other := holder._modules.get("1")) is not None:
        raise ValueError(
            f"{name}: {type(other).__name__}, another parametrization, has a part in the adapter's weights, of which a "
            "saved adapter knows nothing. Take it off before saving."
        )


def _check_start(linear: nn.Linear, adapter_name: str) -> None:
    """
    Raises:
        ValueError: A factor was changed while its start is still to come. That is what becomes of a copy of a model
            from before the first training batch that takes averages of the model's parameters: the start of these is
            another one, and the copy would compute with the difference of the two.
    """
    if not safe_factor(linear).awaits_task_data or is_managed(trained_factor(linear)):
        return
    if not is_at_start(linear):
        raise ValueError(
            f"Adapter {adapter_name!r} waits for its first training batch, and its factors were changed meanwhile, as "
            "in a copy that was made before that batch and averages the parameters (EMA, SWA), which is to be made "
            "after the first step; or by training in evaluation mode, where model.train() was forgotten. Or give "
            "task_data, or set init='pissa' or 'zero', which wait for nothing."
        )


def _check_gathered(factor: Tensor) -> None:
    if isinstance(factor, DTensor):
        raise RuntimeError(
            "The factors are sharded by FSDP. With a trainer set fsdp_state_dict_type: FULL_STATE_DICT. Otherwise "
            "gather them on every rank with get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
            "cpu_offload=True)) of torch.distributed.checkpoint.state_dict, and give the result to "
            "save_pretrained(state_dict=...) on one."
        )
    if factor.is_meta:
        raise RuntimeError(
            "The factors are on the meta device, so that there is nothing to save: the model was offloaded "
            "(cpu_offload, dispatch_model, to('meta')) after it was trained. Save the adapter before that."
        )
    if factor.numel() == 0:
        raise RuntimeError(
            "The factors are sharded by DeepSpeed ZeRO-3. Save with the trainer's save_model, with "
            "stage3_gather_16bit_weights_on_model_save in the DeepSpeed configuration; or give what "
            "accelerator.get_state_dict(engine) gathers on all ranks to save_pretrained(state_dict=...) on one."
        )


def _states_of_loaded(factor: SafeFactor, prefix: str) -> dict[str, Tensor]:
    """What a state dict with this factor holds beside it, for one that loading a saved adapter makes."""
    states = {f"{prefix}_extra_state": factor.get_extra_state()}
    states[f"{prefix}_extra_state"][0] = 0  # its start is not to be set any more
    if factor.start is not None:
        states[f"{prefix}start._extra_state"] = factor.start.value
    return states


def _equal_weights(linear: nn.Linear, other: nn.Linear, factor: Tensor) -> bool:
    """Whether `linear` computes the weight that `other` would with `factor`, up to the rounding of a saved file."""
    parameter = trained_factor(linear)
    weight = safe_factor(linear).exact(parameter)
    difference = weight - safe_factor(other).exact(factor.to(parameter.dtype))
    tolerance = 1e-6 if parameter.dtype == torch.float32 else 1e-4
    return bool(difference.norm() <= tolerance * weight.norm())


def _load_factor(linear: nn.Linear, weight: Tensor, name: str) -> Tensor:
    """The trained half of a saved weight; the other becomes the start factor."""
    factor, parameter = safe_factor(linear), trained_factor(linear)
    if weight.shape != linear.weight.shape:
        raise ValueError(
            f"{name}: the saved weight has shape {tuple(weight.shape)}, this adapter's has "
            f"{tuple(linear.weight.shape)}. Load it with the r, rank_pattern and init that it was "
            "trained with (load_for_training reads them)."
        )
    if factor.basis is not None and lies_inside(weight, factor.basis, factor.side):
        raise ValueError(
            f"{name}: the saved weight lies partly in the directions that this adapter's safety module protects, so it "
            "was trained with another safety module. Resume with the one that was saved with it: "
            "SaLoRAConfig(safety_module=<that folder>), or load_for_training."
        )
    if factor.start is not None:
        # The same update in the form before `form_of_factors` was written, [A; A_0] and [B, -B_0].
        halves = weight.float().chunk(2, dim=0 if factor.side == "input" else 1)
        old = halves[0] - halves[1] if factor.side == "input" else halves[0] + halves[1]
        if torch.linalg.norm(old) < torch.linalg.norm(halves[0]) / 2 and torch.linalg.norm(halves[1]) > 0:
            raise ValueError(
                f"{name}: the saved weight looks like one that an earlier salora-plugins saved, whose factors had "
                "another form, and would be read as something else. Train it further with the version that saved it. "
                "For everything else it is a plain LoRA adapter: PeftModel.from_pretrained."
            )
    return factor.take_over(weight).to(parameter.dtype)
