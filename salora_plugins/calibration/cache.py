"""Safety modules that were calibrated before, in a folder of the user's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..distributed import gather_json, rank_and_world_size
from ..safety_module import SafetyModule, SafetyModuleError

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SALORA_CACHE"


def cache_folder() -> Path:
    """Where calibrated safety modules are kept: $SALORA_CACHE, or salora-plugins in the user's cache folder."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "salora-plugins"


def cache_key(settings: dict[str, Any]) -> str:
    """A name for everything that a calibration depends on, given as JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def load_cached(key: str) -> SafetyModule | None:
    """The safety module that was stored under a key; under torch.distributed only if every rank finds it."""
    path = _path(key)
    found = None
    if path.is_file():
        try:
            found = SafetyModule.load(path)
        except (SafetyModuleError, OSError) as error:
            logger.warning("A calibrated safety module in the cache cannot be used and is computed again: %s", error)
    if not all(gather_json(found is not None)):
        return None
    if rank_and_world_size()[0] == 0:
        logger.warning(
            "Using the safety module that was calibrated before with this model, data and settings (%s). "
            "calibration_cache=False calibrates again.",
            path,
        )
    return found


def store(key: str, safety_module: SafetyModule) -> None:
    """Keep a safety module for the next run; a folder that cannot be written to is no reason to stop."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        safety_module.save(_path(key))
    except OSError as error:
        logger.warning(
            "The calibrated safety module is not kept for the next run: %s. Set %s to a folder that can be written to.",
            error,
            FOLDER_VARIABLE,
        )


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"
