"""Safety modules that were calibrated before, in a folder of the user's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..safety_module import SafetyModule
from ..support.distributed import gather_json

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


def cache_key(settings: dict[str, Any]) -> str:
    """A name for everything that a calibration depends on, given as JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_cached(key: str, check: Callable[[SafetyModule], None]) -> SafetyModule | None:
    """
    The safety module that was stored under a key; under torch.distributed only if every rank finds it.

    Args:
        key: From `cache_key`.
        check: Raises a ValueError for a module that is not what was asked for; it is computed again.
    """
    path, found = _path(key), None
    try:
        if path is not None and path.is_file():
            safety_module = SafetyModule.load(path)
            check(safety_module)
            found = safety_module
    except (ValueError, OSError) as error:
        logger.warning(
            "A calibrated safety module in the cache cannot be used and is computed again (%s): %s", path, error
        )
    return found if all(gather_json(found is not None)) else None


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
