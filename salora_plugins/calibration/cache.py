"""Safety modules that were calibrated before, in a folder of the user's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from ..inference.greedy import end_tokens
from ..models.fingerprint import check_belongs, layer_weights, model_fingerprint, weights_digest
from ..ranks import of_side
from ..rows.headers import Headers
from ..safety_module import SafetyModule
from ..support.distributed import gather_json, is_distributed
from .leak import everyday_digest
from .needs import Sources
from .rows import SafetyRows
from .settings import SafetySettings

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SALORA_CACHE"


def cache_folder() -> Path | None:
    """
    Where calibrated safety modules are kept: $SALORA_CACHE, or salora-plugins in the user's cache folder; None where
    the user has no home folder, as in containers that run under a number without a name.
    """
    try:
        if folder := os.environ.get(FOLDER_VARIABLE):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "salora-plugins"
    except RuntimeError:
        return None


def calibration_key(model: nn.Module, settings: SafetySettings, rows: SafetyRows, sources: Sources) -> str | None:
    """A name for everything that a safety module depends on; None where it is not to be kept."""
    if not settings.may_cache or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None
    if not _is_known(settings):
        return None  # code of a plugin, which may change from run to run, or what it reads may
    decides = {
        "version": version("salora-plugins"),
        "model": model_fingerprint(model),
        "configuration": _model_configuration(model),
        # What still counts of a generation configuration where answers are greedy.
        "ends_of_answers": sorted(end_tokens(model, rows.tokenizer)) if rows.has_requests else [],
        "examples": rows.digest,
        "ranks": settings.ranks,
        "positions": settings.positions,
        "header": [settings.header_weight, Headers(rows.tokenizer).forms] if settings.needs_headers else [],
        "leak": everyday_digest(settings) if "input" in settings.ranks and settings.reads_safety_rows else "",
        "engine": dataclasses.astuple(settings.engine),
        "num_safety_samples": settings.rows.num,
        "batch_size": settings.batch_size,
        "max_length": settings.rows.max_length,
    }
    if settings.method_name != "salora":
        read = {name: settings.options[name] for name in settings.needs.options}
        decides["method"] = [settings.method_name, read, settings.options["num_utility_samples"], sources.facts]
    if settings.needs.weights:  # all of what the method looks at
        decides["weights"] = weights_digest(layer_weights(model, settings.names))
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _is_known(settings: SafetySettings) -> bool:
    """Whether all that decides the bases of a method is known: its code and what it reads."""
    own = str(getattr(settings.basis_method, "__module__", "")).startswith(f"{__package__.partition('.')[0]}.")
    return own and settings.needs.prepare is None


def load_asked_for(key: str, model: nn.Module, settings: SafetySettings) -> SafetyModule | None:
    """
    The safety module that was stored under a key; under torch.distributed only if every rank finds the same, since
    machines have caches of their own.

    One that is not what was asked for is computed again.
    """
    path, found, digest = _path(key), None, None
    try:
        if path is not None and path.is_file():
            safety_module = SafetyModule.load(path)
            _check_asked_for(safety_module, model, settings)
            found = safety_module
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_distributed() else ""
    except (ValueError, OSError) as error:
        logger.warning(
            "A calibrated safety module in the cache cannot be used and is computed again (%s): %s", path, error
        )
    return found if len(set(gather_json(digest))) == 1 else None


def store(key: str, safety_module: SafetyModule) -> None:
    """Keep a safety module for the next run; a folder that cannot be written to, or is full, is no reason to stop."""
    path = _path(key)
    if os.environ.get("LOCAL_RANK", "0") != "0" or path is None:
        return
    try:
        safety_module.save(path)
    except (OSError, SafetensorError) as error:  # safetensors has its own type for a full disk
        logger.warning(
            "The calibrated safety module is not kept for the next run: %s. Set %s to a folder that can be written to.",
            error,
            FOLDER_VARIABLE,
        )


def _path(key: str) -> Path | None:
    """The file of a key; None where there is no folder to keep it in."""
    folder = cache_folder()
    if folder is None:
        logger.warning("Calibrated safety modules are not kept: no home folder. Set %s to a folder.", FOLDER_VARIABLE)
        return None
    return folder / f"{key}.safetensors"


def _check_asked_for(safety_module: SafetyModule, model: nn.Module, settings: SafetySettings) -> None:
    """
    Raises:
        ValueError: It is not one of these modules of this model, with these ranks.
    """
    if set(safety_module.bases) != set(settings.names) or set(safety_module.sides) != set(settings.ranks):
        raise ValueError("it is of other modules, or has another side.")
    check_belongs(safety_module, model, settings.names)
    for side, by_name in settings.ranks.items():
        may_be_less = of_side(side, "safety_rank_cut") in safety_module.provenance
        for name, wanted in by_name.items():
            found = safety_module.sides[side].bases[name].shape[1]
            if isinstance(wanted, int) and found != wanted and not (may_be_less and found < wanted):
                raise ValueError(f"{name!r} has {found} {side} directions instead of {wanted}.")


# What of a model's configuration does not decide activations: names, labels, what is returned, token ids that trainers
# set, and the dtype, which the fingerprint of the weights knows.
_WITHOUT_EFFECT = frozenset(
    {
        *("name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)


def _model_configuration(model: nn.Module) -> Any:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return None if to_dict is None else _deciding_configuration(to_dict())


def _deciding_configuration(values: Any) -> Any:
    """
    A configuration as JSON values without what has no effect on activations beyond rounding: names that begin with "_"
    (the path, the implementation of attention) are none of them.
    """
    if not isinstance(values, Mapping):
        return values
    return {
        str(key): _deciding_configuration(value)
        for key, value in values.items()
        if not str(key).startswith("_") and key not in _WITHOUT_EFFECT
    }
