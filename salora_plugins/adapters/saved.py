"""A saved LoRA adapter as its files state it: its configuration, its factors and their scalings."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..lora_options import COMPATIBLE_LORA_FIELDS, check_lora_entries
from ..parametrization import LORA_FACTORS
from ..ranks import Side
from ..support.files import read_json_object

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"

# Initializations that leave the base weights as they are; the others need a base model that was changed with them.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

# Of factors that mean something without scales beside them.
_NUMBERS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PREFIX = "base_model.model."
"""Of the keys in an adapter's file, before a module's name in the base model."""
_SUFFIXES = {side: f".{factor}.weight" for side, factor in LORA_FACTORS.items()}


def factor_key(name: str, side: Side) -> str:
    """Under which key of a file the factor of a module is saved that belongs to a side: lora_A, or lora_B."""
    return f"{PREFIX}{name}{_SUFFIXES[side]}"


@dataclass(frozen=True)
class SavedAdapter:
    """The weights and the configuration of a saved LoRA adapter. Modules are named as in the base model."""

    config: dict[str, Any]
    """Content of `adapter_config.json`."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Module name -> lora_A (k, d_in) and lora_B (d_out, k), in the dtype of the file; other shapes as they are."""

    other_tensors: dict[str, Tensor]
    """The file's other tensors under their keys: `modules_to_save`, biases and the like."""

    @classmethod
    def load(cls, folder: str | os.PathLike) -> SavedAdapter:
        """
        Read a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: One of them cannot be read or holds what none of its kind does, or a module has only one of its
                factors.
        """
        folder = Path(folder).expanduser()
        for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(without_file(folder, name))
        config = read_json_object(folder / ADAPTER_CONFIG_FILE)
        _check_adapter_config(config, folder / ADAPTER_CONFIG_FILE)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} {unreadable(error)}") from error
        factors = {}
        for key in [key for key in tensors if key.endswith(_SUFFIXES["input"])]:
            name = key.removesuffix(_SUFFIXES["input"])
            a, b = tensors.pop(key), tensors.pop(f"{name}{_SUFFIXES['output']}", None)
            if b is None:
                raise ValueError(f"{folder}: {name} has a lora_A but no lora_B. Save the adapter again.")
            factors[name.removeprefix(PREFIX)] = a, b
        return cls(config, factors, tensors)

    @property
    def trained_beside(self) -> tuple[str, ...]:
        """
        The keys of the other tensors, but for those of weights that factors stand on: of a head PEFT saves a copy then,
        and trains none of it.
        """
        copies = {f"{PREFIX}{name}.base_layer.weight" for name in self.factors}
        return tuple(key for key in self.other_tensors if key not in copies)

    def rank_of(self, name: str) -> int:
        """The rank that the configuration says a module has, `rank_pattern` included."""
        return self._of(name, "rank_pattern", "r")

    def scaling(self, name: str) -> float:
        """The LoRA scaling s of a module, with PEFT's rules for rsLoRA, `rank_pattern` and `alpha_pattern`."""
        rank, alpha = self.rank_of(name), self._of(name, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, name: str, pattern: str, default: str) -> Any:
        values = self.config.get(pattern) or {}
        return values.get(get_pattern_key(list(values), name), self.config[default])

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(a.shape[0] for a, _ in self.factors.values())


def check_plain_lora(saved: SavedAdapter, folder: Path, *, purpose: str) -> None:
    """
    Args:
        saved: An adapter.
        folder: Where it was read, for messages.
        purpose: What cannot be done otherwise, for messages: "exported".

    Raises:
        ValueError: Its update is not s B A of two finite factors per linear layer, on an unchanged base model.
    """
    config = saved.config
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={config.get('peft_type')!r}; only LoRA adapters can be {purpose}.")
    defaults = LoraConfig().to_dict()
    for option, value in config.items():
        if option == "init_lora_weights":
            unusual = value not in _PLAIN_INITIALIZATIONS
        else:
            unusual = option not in COMPATIBLE_LORA_FIELDS and bool(value) and value != defaults.get(option)
        if unusual:
            raise ValueError(
                f"{folder}: {option}={value!r}. Only adapters of two plain factors per linear layer, on an "
                f"unchanged base model, can be {purpose}."
            )
    if not saved.factors:
        raise ValueError(f"{folder}: holds no lora_A and lora_B of a linear layer.")
    odd = [key for key in saved.other_tensors if "lora_" in key]
    odd += [name for name, pair in saved.factors.items() if any(factor.ndim != 2 for factor in pair)]
    if odd:
        raise ValueError(
            f"{folder}: {odd[0]} does not belong to a plain linear layer (an embedding, a convolution or a bias of "
            f"lora_B). Such adapters cannot be {purpose}."
        )
    for name, (a, b) in saved.factors.items():
        if unread := {a.dtype, b.dtype} - _NUMBERS:
            raise ValueError(
                f"{folder}: the factors of {name} are {', '.join(map(str, unread))}, which are not read as numbers. "
                f"Adapters in float32, bfloat16 or float16 can be {purpose}."
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{folder}: the weights of {name} are not finite.")
        ranks = {a.shape[0], b.shape[1], saved.rank_of(name)}
        if len(ranks) > 1:
            raise ValueError(
                f"{folder}: the factors of {name} have the shapes {tuple(a.shape)} and {tuple(b.shape)}, and the "
                f"configuration says rank {saved.rank_of(name)}. The two files do not belong together; save it again."
            )


def without_file(folder: Path, name: str) -> str:
    """What is said of a folder without one of the files of an adapter, and where the adapter may be instead."""
    if folder.is_file():
        return f"{folder} is a file. Name the folder of the saved adapter."
    if not folder.is_dir():
        return f"{folder}: there is no such folder{'' if folder.is_absolute() else f' (looked in {Path.cwd()})'}."
    text = f"{folder} has no {name}, so it is not an adapter saved as safetensors."
    if within := adapter_within(folder, name):
        return f"{text} {within}"
    if (folder / PICKLED_WEIGHTS_FILE).is_file():
        return f"{text} {PICKLED_WEIGHTS_FILE} is a pickle, which is not read: save it with safe_serialization=True."
    if (folder / "config.json").is_file():
        return f"{text} It holds a whole model."
    return text


def adapter_within(folder: Path, name: str) -> str:
    """Which checkpoint in a trainer's folder, or named adapter in PEFT's, is one where the folder itself is none."""
    paths = sorted(folder.glob(f"*/{name}"))
    found = {step: path for path in paths if (step := numbered_checkpoint(path.parent)) is not None}
    if not found:  # PEFT saves into a folder of its name what is not called "default"
        return f"{paths[0].parent} has one: name that." if paths else ""
    return f"{found[max(found)].parent} has one: name that, or save the result with trainer.save_model()."


def numbered_checkpoint(folder: Path) -> int | None:
    """The step of a trainer's checkpoint, from the folder's name; None for any other folder."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def unreadable(error: SafetensorError) -> str:
    return f"is not a readable safetensors file, perhaps cut short ({error}). Save it again."


def _check_adapter_config(config: dict[str, Any], file: Path) -> None:
    if config.get("peft_type", "LORA") == "LORA":  # other methods have other options
        check_lora_entries({"r": None, "lora_alpha": None, **config}, file)
