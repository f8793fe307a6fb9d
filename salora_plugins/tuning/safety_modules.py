"""Which safety module an adapter is trained with: the one given, a new one, or that of a checkpoint to resume from."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters.adapter_config import AdapterConfig
from ..adapters.digest import check_saved_together
from ..calibration import calibrate_wherever
from ..config import SaLoRAConfig
from ..models.fingerprint import check_belongs
from ..models.targets import check_ranks
from ..models.weights import check_fsdp_settings, has_placeholders
from ..options import OF_BASIS_METHODS, OPTIONS
from ..ranks import Side, SideRanks
from ..safety_module import SafetyModule
from ..support.notices import tell

logger = logging.getLogger(__name__)

# Of a configuration, what says which directions of a safety module are to be taken, and which it was to have.
_OPTIONS_OF_SAFETY_MODULES = (
    "variant",
    "safety_rank",
    "safety_rank_pattern",
    "input_safety_rank",
    "input_safety_rank_pattern",
    "safety_positions",
    "header_weight",
    "basis_method",
    *OF_BASIS_METHODS,
)


def safety_module_for(model: nn.Module, config: SaLoRAConfig, names: Sequence[str]) -> SafetyModule:
    """
    The safety module of a configuration, as far as it is asked for; calibrated where it names none.

    Args:
        model: The base model.
        config: Where it belongs to an adapter already, that adapter's safety module is taken, if it is for this model.
        names: The target modules.

    Raises:
        ValueError: The safety module does not fit the options or (SafetyModuleError) the model; or the run is to be
            sharded in a way that loses it.
    """
    check_fsdp_settings()
    if config.safety_module is not None:
        safety_module = _given(config)
    elif isinstance(config, AdapterConfig) and _fits(config.safety_module_in_force, model, config, names):
        return config.safety_module_in_force
    else:
        safety_module = calibrate_wherever(model, config, names)
    ranks = _ranks(config, safety_module, names)
    check_ranks(model, ranks)
    safety_module = safety_module.restricted_to(ranks)
    if not has_placeholders(model, names):
        check_belongs(safety_module, model, names)
    return safety_module


def safety_module_of_checkpoint(
    folder: str | os.PathLike, config: AdapterConfig, adapter_name: str, model: nn.Module
) -> SafetyModule | None:
    """
    The safety module that was saved with the weights of a checkpoint, or None where it is the adapter's own.

    Args:
        folder: The checkpoint.
        config: Of the adapter that its weights are to be loaded into.
        adapter_name: That adapter, for the log.
        model: The base model.

    Raises:
        ValueError: It belongs to other weights, or (SafetyModuleError) to another model, or one of both is of SAILS.
    """
    own = config.safety_module_in_force
    names = list(own.bases)
    check_saved_together(folder)
    saved = SafetyModule.load(folder)
    if saved.protects != own.protects:
        of_folder, of_config = ("safety", "SAILS") if saved.protects else ("SAILS", "safety")
        raise ValueError(
            f"{folder} was saved by a {of_folder} training, and adapter {adapter_name!r} is of a {of_config} training "
            f"(variant={config.variant!r}): what one keeps out of, the other starts in. Resume with the variant of the "
            f"checkpoint, or start anew without it."
        )
    check_belongs(saved, model, names)
    saved = saved.restricted_to(_all_directions(saved, names))
    if _same_bases(saved, own):
        return None
    differs = _all_directions(saved, names) != _all_directions(own, names)
    logger.log(
        logging.WARNING if differs or config.safety_module is not None else logging.INFO,
        "Adapter %r: training goes on with the safety module that was saved in %s, not with the one of this "
        "configuration%s.",
        adapter_name,
        folder,
        ", which has other numbers of directions" if differs else "",
    )
    return saved


def bases_of(safety_module: SafetyModule, name: str) -> dict[Side, Tensor]:
    """The bases that one module's update is kept out of: U_C and, where there is an input side, V_C; of SAILS none."""
    if not safety_module.protects:
        return {}
    return {side: found.bases[name] for side, found in safety_module.sides.items()}


def take_options(config: AdapterConfig, saved: SaLoRAConfig) -> None:
    """Take over from a saved configuration what tells how much of the safety module beside it is to be taken."""
    for option in _OPTIONS_OF_SAFETY_MODULES:
        setattr(config, option, getattr(saved, option))


def _given(config: SaLoRAConfig) -> SafetyModule:
    """
    The safety module that a configuration names.

    Raises:
        ValueError: It was computed from other positions, or with another weight of them, or by another basis method,
            or other options of that, than the options want.
    """
    given = config.safety_module
    safety_module = given if isinstance(given, SafetyModule) else SafetyModule.load(given)
    _check_variant(config, safety_module)
    if not config.weights_follow:  # a saved adapter is trained on with its own, whatever it was called
        _check_method(config, safety_module)
        _warn_about_unread_data(config, safety_module)
    positions = safety_module.provenance.get("safety_positions")
    if config.safety_positions is not None and positions not in (None, config.safety_positions):
        raise ValueError(
            f"safety_positions={config.safety_positions!r}, but the safety module was computed from "
            f"{positions!r} positions. Leave safety_positions unset, or calibrate again."
        )
    weight = safety_module.provenance.get("header_weight", 1)
    if config.header_weight not in (1, weight):
        raise ValueError(
            f"header_weight={config.header_weight!r}, but the safety module was computed with {weight!r}. Leave "
            "header_weight unset, or calibrate again."
        )
    if config.safety_positions is None and config.variant == "paper" and positions not in (None, "response"):
        raise ValueError(
            "variant='paper' takes the positions of the response, but the safety module was computed from "
            f"{positions!r} positions. Calibrate again with variant='paper'; or set input_safety_rank=0 "
            "instead of it, to take this module without its input side."
        )
    if config.has_input_side and config.input_safety_rank is None and not safety_module.input_bases:
        warnings.warn(
            "The safety module has no input side, so the update may react to harmful requests, and keeps fewer "
            "refusals. Calibrate again without variant='paper' and input_safety_rank=0; or set variant='paper' "
            "here, for the paper's form and start.",
            UserWarning,
            stacklevel=3,
        )
    return safety_module


def _check_variant(config: SaLoRAConfig, safety_module: SafetyModule) -> None:
    """
    Raises:
        ValueError: Directions to start in are to protect, or those of a safety module are to start in.
    """
    if safety_module.protects and config.variant == "sails":
        raise ValueError(
            "variant='sails' with a safety module, whose directions are to be kept out of: leave safety_module out and "
            "set sae and contrastive_data, or give what a SAILS adapter was saved with."
        )
    if not safety_module.protects and config.variant != "sails":
        raise ValueError(
            f"variant={config.variant!r} with the directions that a SAILS adapter starts in, which protect nothing. "
            "Calibrate with basis_method='sae' for a safety module of such directions, or set variant='sails'."
        )


def _check_method(config: SaLoRAConfig, safety_module: SafetyModule) -> None:
    """
    Raises:
        ValueError: The options ask for another basis method than the safety module says, or for other options of it.
    """
    known = safety_module.provenance
    method = known.get("basis_method")
    if method is None:
        return
    if config.basis_method not in (OPTIONS["basis_method"].default, method):
        raise ValueError(
            f"basis_method={config.basis_method!r}, but the safety module was computed by {method!r}. Leave "
            "basis_method unset, or calibrate again."
        )
    if config.basis_method != method:  # left out, or the default on purpose, which are the same here
        tell(logger, "The safety module was computed by basis_method=%r: training goes on with its directions.", method)
    values = config.to_dict()  # data by its name, as in the provenance
    for name in OF_BASIS_METHODS:
        value = values[name]
        if value == OPTIONS[name].default:
            continue
        if name == "num_utility_samples":  # the most that are read; how many there were is known
            found = known.get("utility_samples")
            agrees = found is not None and found <= value
        else:
            found = known.get(name)
            agrees = found == value
        if not agrees:
            raise ValueError(
                f"{name}={value!r:.80}, but the safety module was computed by {method!r} "
                f"{'without it' if found is None else f'with {found!r:.80}'}. Leave {name} unset, or calibrate again."
            )


def _warn_about_unread_data(config: SaLoRAConfig, safety_module: SafetyModule) -> None:
    """Say that a safety module skips the calibration that safety data beside it would be for, unless it is of them."""
    known, values = safety_module.provenance, config.to_dict()  # data by its name, as in the provenance
    data, most = values["safety_data"], values["num_safety_samples"]
    unread = {}
    if data not in (OPTIONS["safety_data"].default, known.get("safety_data")):
        source = known.get("safety_data")
        unread[f"safety_data={data!r}"] = "without safety data" if source is None else f"from {source!r}"
    if most != OPTIONS["num_safety_samples"].default and known.get("safety_samples", 0) > most:
        unread[f"num_safety_samples={most}"] = f"from {known.get('safety_samples')} examples"
    for option, found in unread.items():
        warnings.warn(
            f"{option} has no effect beside safety_module, which was computed {found}: leave it out, or leave "
            "safety_module out to calibrate in this run.",
            UserWarning,
            stacklevel=4,
        )


def _ranks(config: SaLoRAConfig, safety_module: SafetyModule, names: Sequence[str]) -> SideRanks:
    """
    The ranks to take of a safety module: its own where the configuration asks for none, and on the output side neither
    did who calibrated it with a method that then chooses, as "salora" does not.
    """
    bases, default = safety_module.input_bases, OPTIONS["safety_rank"].default
    own = {name: safety_module.bases[name].shape[1] for name in names if name in safety_module.bases}
    may_choose = safety_module.provenance.get("basis_method") not in (None, OPTIONS["basis_method"].default)
    chosen = may_choose and config.safety_rank == safety_module.provenance.get("safety_rank") == default
    return config.safety_ranks(
        {name: bases[name].shape[1] if name in bases else 0 for name in names},
        {name: own.get(name, default) for name in names} if chosen else None,
    )


def _all_directions(safety_module: SafetyModule, names: Sequence[str]) -> SideRanks:
    """Side -> module name -> how many directions the safety module has for it; modules that it lacks count as 1."""
    return {
        side: {name: found.bases[name].shape[1] if name in found.bases else 1 for name in names}
        for side, found in safety_module.sides.items()
    }


def _same_bases(first: SafetyModule, second: SafetyModule) -> bool:
    if first.sides.keys() != second.sides.keys():
        return False
    pairs = [(found.bases, second.sides[side].bases) for side, found in first.sides.items()]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def _fits(safety_module: SafetyModule, model: nn.Module, config: SaLoRAConfig, names: Sequence[str]) -> bool:
    """Whether the safety module that this configuration led to before was for this very model."""
    try:
        safety_module.restricted_to(_ranks(config, safety_module, names))
        check_belongs(safety_module, model, names)
    except ValueError:
        return False
    return True
