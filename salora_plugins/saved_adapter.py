"""A saved LoRA adapter as its files state it: factors, scalings, and how much of it lies in the safety directions."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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

# Initializations that leave the base weights as they are; the others need a base model that was changed with them.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
FOREIGN_FACTOR_SHARE = 1e-2
"""A factor saved in bf16 leaves this share of itself in the safety directions; another safety module's, far more."""

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
        if not covers(safety_module, name, b):
            raise ValueError(f"{name}: the safety module has no directions for this module. Was it another model's?")
        norm, inside = norms(a, b, safety_module, name)
        shares[name] = {side: part / norm if norm else 0.0 for side, part in inside.items()}
    return shares


def covers(safety_module: SafetyModule, name: str, b: Tensor) -> bool:
    """Whether a safety module has directions for a module's update with the factor `b`, (d_out, k)."""
    return name in safety_module.bases and safety_module.bases[name].shape[0] == b.shape[0]


def norms(a: Tensor, b: Tensor, safety_module: SafetyModule, name: str) -> tuple[float, dict[str, float]]:
    """
    The Frobenius norm of an update without its scaling, and of its part in the protected directions, in float64.

    Args:
        a: lora_A, (k, d_in).
        b: lora_B, (d_out, k).
        safety_module: The directions.
        name: The module's name.

    Returns:
        ||B A||_F, 0 where it is rounding error only; and side -> ||U_C^T B A||_F or ||B A V_C||_F.
    """
    a, b = a.double(), b.double()
    reduced = torch.linalg.qr(b).R
    norm = torch.linalg.norm(reduced @ a).item()
    if norm <= _ZERO * (torch.linalg.norm(a) * torch.linalg.norm(b)).item():
        norm = 0.0
    inside = {"output": (safety_module.bases[name].double().T @ b) @ a}
    if name in safety_module.input_bases:
        if safety_module.input_bases[name].shape[0] != a.shape[1]:
            raise ValueError(
                f"{name}: the safety module's directions are for {safety_module.input_bases[name].shape[0]} inputs, "
                f"the adapter has {a.shape[1]}. Was it another model's?"
            )
        inside["input"] = reduced @ (a @ safety_module.input_bases[name].double())
    return norm, {side: torch.linalg.norm(part).item() for side, part in inside.items()}


def check_saved_factors(folder: Path, safety_module: SafetyModule) -> None:
    """
    Check that the weights that PEFT has just written are an ordinary LoRA adapter with the projected factors.

    That they are rests on hooks of PEFT that are not public. Without this check, another PEFT could save the raw
    factors, which lie in the safety directions, or save them under names that nothing reads.

    Args:
        folder: Where the adapter is saved; nothing is checked where no safetensors file is there.
        safety_module: The one that the adapter was trained with.

    Raises:
        RuntimeError: A target module's factors are missing, or lie in the safety directions.
    """
    from importlib.metadata import version

    if not (folder / WEIGHTS_FILE).is_file():
        return
    advice = (
        f"The installed PEFT {version('peft')} saves adapters in another way than salora-plugins knows. Do not use "
        "this file; install a PEFT version that salora-plugins supports."
    )
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, basis in safety_module.bases.items():
        bases = (safety_module.input_bases.get(name), basis)
        for suffix, directions, axis in zip(_FACTORS, bases, (1, 0), strict=True):
            factor = tensors.get(f"{_PREFIX}{name}{suffix}")
            if factor is None or factor.ndim != 2:
                raise RuntimeError(f"{folder / WEIGHTS_FILE}: has no {suffix[1:]} of {name}. {advice}")
            if directions is None:
                continue
            along = factor.double() if axis == 0 else factor.double().T
            inside = torch.linalg.norm(directions.double().T @ along)
            if inside > FOREIGN_FACTOR_SHARE * torch.linalg.norm(along):
                raise RuntimeError(
                    f"{folder / WEIGHTS_FILE}: {suffix[1:]} of {name} lies in the safety directions. {advice}"
                )


def largest_shares(shares: dict[str, dict[str, float]]) -> dict[str, float]:
    """Side -> the largest share over all modules."""
    sides = dict.fromkeys(side for of_module in shares.values() for side in of_module)
    return {side: max(of_module[side] for of_module in shares.values() if side in of_module) for side in sides}


def check_destination(adapter: Path, out: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: `out` is the folder that is read, or holds it.
        FileExistsError: There is something else than an adapter, or one that is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == adapter.resolve() or adapter.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the adapter that is read. Name another folder to write.")
    if not (out / ADAPTER_CONFIG_FILE).is_file():
        raise FileExistsError(f"{out} exists and is not a saved adapter. Name another folder to write.")
    if not overwrite:
        raise FileExistsError(
            f"{out} holds an adapter already. Name another folder, or give overwrite=True (--overwrite)."
        )


def check_plain_lora(saved: SavedAdapter, folder: Path, *, purpose: str) -> None:
    """
    Args:
        saved: An adapter.
        folder: Where it was read, for messages.
        purpose: What cannot be done otherwise, for messages: "exported".

    Raises:
        ValueError: Its update is not s B A of two finite factors per linear layer, on an unchanged base model.
    """
    from peft import LoraConfig

    from .config import COMPATIBLE_LORA_FIELDS

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
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{folder}: the weights of {name} are not finite.")


def write_adapter(
    adapter: SavedAdapter,
    out: Path,
    *,
    card: str,
    tags: tuple[str, ...],
    safety_module: SafetyModule | None = None,
) -> None:
    """
    Write a plain LoRA adapter, all of its files or none, in the place of one that is there.

    Args:
        adapter: What to write.
        out: The folder.
        card: A section for the model card, Markdown.
        tags: For the model card.
        safety_module: Written beside it as `salora.safetensors`.
    """
    from .model_card import write_card

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        tensors = dict(adapter.other_tensors)
        for name, (a, b) in adapter.factors.items():
            tensors[f"{_PREFIX}{name}{_FACTORS[0]}"] = a
            tensors[f"{_PREFIX}{name}{_FACTORS[1]}"] = b
        atomic_write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_adapter_config(folder, adapter.config)
        write_card(folder, adapter.config.get("base_model_name_or_path"), card, tags=tags)
        if safety_module is not None:
            safety_module.save(folder)
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        try:
            os.replace(folder, out)
        except OSError:
            if (Path(scratch) / "old").exists():
                os.replace(Path(scratch) / "old", out)
            raise


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
