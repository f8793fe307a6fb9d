"""A saved LoRA adapter as its files state it: factors, scalings, and how much of it lies in the safety directions."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .files import atomic_write
from .safety_module import SafetyModule

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

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

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# Products of float64 rounding errors: an update this much smaller than its factors is none.
_ZERO = 1e-12


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
            ValueError: One of them cannot be read, or a module has only one of its factors.
        """
        folder = Path(folder)
        for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}, so it is not an adapter saved as safetensors.")
        try:
            config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
            tensors = load_file(folder / WEIGHTS_FILE)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: the adapter cannot be read ({error}). Save it again.") from error
        names = [key.removesuffix(_FACTORS[0]) for key in tensors if key.endswith(_FACTORS[0])]
        factors = {}
        for name in names:
            a, b = (tensors.pop(f"{name}{suffix}", None) for suffix in _FACTORS)
            if b is None:
                raise ValueError(f"{folder}: {name} has a lora_A but no lora_B. Save the adapter again.")
            factors[name.removeprefix(_PREFIX)] = a, b
        return cls(config, factors, tensors)

    def scaling(self, name: str) -> float:
        """The LoRA scaling s of a module, with PEFT's rules for rsLoRA, `rank_pattern` and `alpha_pattern`."""
        from peft.utils.other import get_pattern_key

        def of(pattern: str, default: str) -> float:
            values = self.config.get(pattern) or {}
            return values.get(get_pattern_key(values.keys(), name), self.config[default])

        rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(a.shape[0] for a, _ in self.factors.values())


def safety_shares(adapter: SavedAdapter, safety_module: SafetyModule) -> dict[str, dict[str, float]]:
    """
    How much of an adapter's update lies in the protected directions, from saved files alone, in float64.

    Args:
        adapter: Any LoRA adapter of linear layers.
        safety_module: The directions.

    Returns:
        Module name -> side ("output": ||U_C^T dW||_F / ||dW||_F; "input", where there is an input side:
        ||dW V_C||_F / ||dW||_F) -> share; 0 where dW is zero. dW is never formed: of B = QR, only R A is needed.

    Raises:
        ValueError: The safety module has no directions for a module, or ones of another size.
    """
    shares = {}
    for name, (a, b) in adapter.factors.items():
        if name not in safety_module.bases or safety_module.bases[name].shape[0] != b.shape[0]:
            raise ValueError(f"{name}: the safety module has no directions for this module. Was it another model's?")
        a, b = a.double(), b.double()
        reduced = torch.linalg.qr(b).R
        norm = torch.linalg.norm(reduced @ a)
        is_zero = bool(norm <= _ZERO * torch.linalg.norm(a) * torch.linalg.norm(b))
        inside = {"output": (safety_module.bases[name].double().T @ b) @ a}
        if name in safety_module.input_bases:
            inside["input"] = reduced @ (a @ safety_module.input_bases[name].double())
        shares[name] = {
            side: 0.0 if is_zero else (torch.linalg.norm(part) / norm).item() for side, part in inside.items()
        }
    return shares


def largest_shares(shares: dict[str, dict[str, float]]) -> dict[str, float]:
    """Side -> the largest share over all modules."""
    sides = dict.fromkeys(side for of_module in shares.values() for side in of_module)
    return {side: max(of_module[side] for of_module in shares.values() if side in of_module) for side in sides}


def write_adapter_config(folder: str | os.PathLike, values: dict[str, Any]) -> None:
    """
    Write `adapter_config.json` so that PEFT reads it from version 0.4.0 on, all of it or nothing.

    Options that are newer than that version are left out where they have their default: every PEFT that knows them
    fills in the same, and versions 0.6 to 0.13 refuse a file with keys that they do not know.

    Args:
        folder: Where to write; created where it is missing.
        values: What `LoraConfig.to_dict` gives, with sets or lists.
    """
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if key in KEYS_OF_OLDEST_PEFT or (key != "peft_version" and value != defaults.get(key))
    }
    content = json.dumps(kept, indent=2, sort_keys=True) + "\n"
    atomic_write(Path(folder) / ADAPTER_CONFIG_FILE, content.encode())
