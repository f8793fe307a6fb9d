"""Writing a plain LoRA adapter, all of it or nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..config import CONFIG_FILE
from ..safety_module import DEFAULT_FILE, SafetyModule, content_digest
from ..support.files import TAKEN_AWAY, atomic_write, scratch_folder
from .model_card import write_card
from .saved import ADAPTER_CONFIG_FILE, CARD_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, SavedAdapter, factor_key

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of a saved adapter, all that this package or PEFT writes. What else lies in its folder is somebody else's.
_OWN_FILES = (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, DEFAULT_FILE, CONFIG_FILE, CARD_FILE, ADAPTER_CONFIG_FILE)

# What PEFT 0.4.0, the first version that loads safetensors files, knows. Versions 0.6 to 0.13 fail on keys that are new
# to them; 0.4 and 0.5 pass over them.
KEYS_OF_OLDEST_PEFT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "revision",
        "target_modules",
        "task_type",
    }
)


def check_dtype(dtype: str) -> None:
    """
    Raises:
        ValueError: An adapter is not written in this dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}.")


def in_dtype(factor: Tensor, dtype: str, name: str) -> Tensor:
    """
    A factor of the module `name` as it is written in "float32", "bfloat16" or "float16".

    Raises:
        ValueError: Its numbers are too large for it.
    """
    converted = factor.to(_DTYPES[dtype])
    if not torch.isfinite(converted).all():
        raise ValueError(f"dtype={dtype!r} cannot hold the weights of {name}: choose 'float32' or 'bfloat16'.")
    return converted


def check_destination(adapter: Path, out: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: `out` is the folder that is read.
        FileExistsError: There is something else than an adapter, or one that is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == adapter.resolve():
        raise ValueError(f"{out} holds the adapter that is read. Name another folder to write.")
    # One of the two is what an interruption may have left.
    if not any((out / name).is_file() for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE)):
        raise FileExistsError(f"{out} exists and is not a saved adapter. Name another folder to write.")
    if not overwrite:
        raise FileExistsError(
            f"{out} holds an adapter already. Name another folder, or give overwrite=True (--overwrite)."
        )


def write_adapter(
    adapter: SavedAdapter,
    out: Path,
    *,
    card: Callable[[str], str],
    tags: tuple[str, ...],
    safety_module: SafetyModule | None = None,
) -> None:
    """
    Write a plain LoRA adapter in the place of one that is there; all else in the folder stays.

    An interruption leaves the adapter that was there. Where even putting that back fails, or the process is killed in
    between, `adapter_config.json` is missing, without which nothing loads the folder, and what was there lies in a
    hidden folder beside it.

    Args:
        adapter: What to write.
        out: The folder.
        card: Makes a section for the model card, Markdown, from the digest of the weights.
        tags: For the model card.
        safety_module: Written beside it as `salora.safetensors`.
    """
    scratch = scratch_folder(out)
    new, old = scratch / "new", scratch / TAKEN_AWAY
    try:
        new.mkdir()
        tensors = dict(adapter.other_tensors)
        for name, (a, b) in adapter.factors.items():
            tensors[factor_key(name, "input")], tensors[factor_key(name, "output")] = a, b
        atomic_write(new / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        if safety_module is not None:
            safety_module.save(new / DEFAULT_FILE)
        if (out / CARD_FILE).is_file():
            shutil.copyfile(out / CARD_FILE, new / CARD_FILE)
        base_model = adapter.config.get("base_model_name_or_path")
        write_card(new, base_model, card(content_digest(tensors)), tags=tags, replaces=True)
        write_adapter_config(new, adapter.config)
        if out.exists():
            old.mkdir()
            _exchange(new, out, old)
        else:
            os.replace(new, out)
    except BaseException as error:
        _discard(scratch, out)
        # The files are called by the names that they were to have.
        if isinstance(error, OSError) and str(error.filename).startswith(str(new)):
            raise OSError(error.errno, error.strerror, str(out / Path(error.filename).name)) from error
        if isinstance(error, ValueError):
            raise ValueError(str(error).replace(str(new), str(out))) from error
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, out: Path, old: Path) -> None:
    """
    Put the files of `new` into `out` and those of the adapter there into `old`; interrupted, put them back.

    `adapter_config.json` is the first to go and the last to come.
    """
    before = [name for name in _OWN_FILES if (out / name).exists()]
    try:
        for name in reversed(before):
            os.replace(out / name, old / name)
        for name in _OWN_FILES:
            if (new / name).exists():
                os.replace(new / name, out / name)
    except BaseException:
        if ADAPTER_CONFIG_FILE not in before or (old / ADAPTER_CONFIG_FILE).exists():
            (out / ADAPTER_CONFIG_FILE).unlink(missing_ok=True)
        for name in _OWN_FILES:
            if (old / name).exists():
                os.replace(old / name, out / name)
            elif name not in before:
                (out / name).unlink(missing_ok=True)
        raise


def _discard(scratch: Path, out: Path) -> None:
    """Remove a scratch folder, unless it holds what could not be put back into `out`."""
    if not any(scratch.glob(f"{TAKEN_AWAY}/*")):
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        logger.error("%s is not complete. What was there lies in %s; move it back.", out, scratch / TAKEN_AWAY)


def write_adapter_config(folder: str | os.PathLike, values: dict[str, Any]) -> None:
    """
    Write `adapter_config.json` so that PEFT reads it from version 0.4.0 on, all of it or nothing.

    Options that are newer than that version are left out where they have their default: every PEFT that knows them
    fills in the same, and versions 0.6 to 0.13 refuse a file with keys that they do not know.

    Args:
        folder: Where to write; created where it is missing.
        values: What `LoraConfig.to_dict` gives, with sets or lists.
    """
    defaults = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if key in KEYS_OF_OLDEST_PEFT or (key != "peft_version" and value != defaults.get(key))
    }
    content = json.dumps(kept, indent=2, sort_keys=True) + "\n"
    atomic_write(Path(folder) / ADAPTER_CONFIG_FILE, content.encode())
