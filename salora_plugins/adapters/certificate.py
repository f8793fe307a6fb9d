"""How much of an update, or of one of its factors, lies in the directions of a safety module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..parametrization import LORA_FACTORS
from ..ranks import Side
from ..safety_module import SafetyModule
from .saved import PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, SavedAdapter, factor_key

FOREIGN_FACTOR_SHARE = 1e-2
"""A factor saved in bf16 leaves this share of itself in the safety directions; another safety module's, far more."""

# Products of float64 rounding errors: an update this much smaller than its factors is none.
_ZERO = 1e-12


def safety_shares(adapter: SavedAdapter, safety_module: SafetyModule) -> dict[str, dict[Side, float]]:
    """
    How much of an adapter's update lies in the protected directions, from saved files alone, in float64.

    Args:
        adapter: Any LoRA adapter of linear layers.
        safety_module: The directions.

    Returns:
        Module name -> side ("output": ||U_C^T dW||_F / ||dW||_F; "input", where there is an input side:
        ||dW V_C||_F / ||dW||_F) -> share; 0 where dW is zero. dW is never formed: of B = QR, only R A is needed.

    Raises:
        ValueError: The safety module has no directions for a module, or ones of another size; or the weights are not
            finite, of which there is no share.
    """
    shares = {}
    for name, (a, b) in adapter.factors.items():
        if not covers(safety_module, name, b):
            raise ValueError(f"{name}: the safety module has no directions for this module. Was it another model's?")
        norm, inside = norms(a, b, safety_module, name)
        if not math.isfinite(norm):
            raise ValueError(f"the weights of {name} are not finite")
        shares[name] = {side: part / norm if norm else 0.0 for side, part in inside.items()}
    return shares


def covers(safety_module: SafetyModule, name: str, b: Tensor) -> bool:
    """Whether a safety module has directions for a module's update with the factor `b`, (d_out, k)."""
    return name in safety_module.bases and safety_module.bases[name].shape[0] == b.shape[0]


def covers_nothing(saved: SavedAdapter, safety_module: SafetyModule) -> str:
    """What is said where no module of an adapter is covered."""
    name, (_, b) = next(iter(saved.factors.items()))
    other, basis = next(iter(safety_module.bases.items()))
    return (
        f"the safety module covers none of its {len(saved.factors)} modules (the first is {name!r}, of {b.shape[0]} "
        f"outputs; the safety module has {other!r}, of {basis.shape[0]}). Give the safety module of the adapter's "
        "base model."
    )


def norms(a: Tensor, b: Tensor, safety_module: SafetyModule, name: str) -> tuple[float, dict[Side, float]]:
    """
    The Frobenius norm of an update without its scaling, and of its part in the protected directions, in float64.

    Args:
        a: lora_A, (k, d_in).
        b: lora_B, (d_out, k).
        safety_module: The directions.
        name: The module's name.

    Returns:
        ||B A||_F, 0 where it is rounding error only; and side -> ||U_C^T B A||_F or ||B A V_C||_F. All are NaN where
        a factor is not finite.
    """
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan, dict.fromkeys(safety_module.sides, math.nan)
    reduced = torch.linalg.qr(b).R
    norm = _or_zero(torch.linalg.norm(reduced @ a).item(), a, b)
    inside: dict[Side, float] = {}
    for side, found in safety_module.sides.items():
        basis, dimension = found.bases[name].double(), b.shape[0] if side == "output" else a.shape[1]
        if basis.shape[0] != dimension:
            raise ValueError(
                f"{name}: the safety module's directions are for {basis.shape[0]} {side}s, the adapter has "
                f"{dimension}. Was it another model's?"
            )
        part = (basis.T @ b) @ a if side == "output" else reduced @ (a @ basis)
        inside[side] = torch.linalg.norm(part).item()
    return norm, inside


def product_norm(a: Tensor, b: Tensor) -> float:
    """||B A||_F in float64, without forming the product; 0 where it is rounding error only."""
    a, b = a.double(), b.double()
    return _or_zero(torch.linalg.norm(torch.linalg.qr(b).R @ a).item(), a, b)


def _or_zero(norm: float, a: Tensor, b: Tensor) -> float:
    return 0.0 if norm <= _ZERO * (torch.linalg.norm(a) * torch.linalg.norm(b)).item() else norm


def lies_inside(factor: Tensor, basis: Tensor, side: Side) -> bool:
    """
    Whether more of a factor lies in the directions of a basis than rounding to 16 bits leaves there.

    Args:
        factor: Saved lora_A, (k, d_in), or lora_B, (d_out, k).
        basis: (d, r) with orthonormal columns.
        side: "input" for lora_A, "output" for lora_B.
    """
    along = factor.cpu().double() if side == "output" else factor.cpu().double().T
    inside = torch.linalg.norm(basis.cpu().double().T @ along)
    return bool(inside > FOREIGN_FACTOR_SHARE * torch.linalg.norm(along))


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
        ValueError: The weights were written as a pickle beside an older safetensors file, which is what is loaded.
    """
    weights, pickle = folder / WEIGHTS_FILE, folder / PICKLED_WEIGHTS_FILE
    if not weights.is_file():
        return
    if pickle.is_file() and pickle.stat().st_mtime_ns > weights.stat().st_mtime_ns:
        raise ValueError(
            f"safe_serialization=False: {pickle} was written beside an older {WEIGHTS_FILE}, which PEFT and all else "
            "load instead. Leave safe_serialization at True, or save into another folder."
        )
    advice = (
        "Do not use this file. Either the adapter's layers were replaced after it was made, and with them what "
        "computes their weights (prepare_model_for_compiled_hotswap, remove_parametrizations): make it anew. Or the "
        f"installed PEFT {version('peft')} saves adapters in another way than salora-plugins knows: install a "
        "supported version."
    )
    tensors = load_file(weights)
    for name in safety_module.bases:
        for side, kind in LORA_FACTORS.items():
            factor = tensors.get(factor_key(name, side))
            if factor is None or factor.ndim != 2:
                raise RuntimeError(f"{weights}: has no {kind}.weight of {name}. {advice}")
            if not safety_module.protects:
                continue
            if side in safety_module.sides and lies_inside(factor, safety_module.sides[side].bases[name], side):
                raise RuntimeError(f"{weights}: {kind}.weight of {name} lies in the safety directions. {advice}")


def largest_shares(shares: Mapping[str, Mapping[Side, float]]) -> dict[Side, float]:
    """Side -> the largest share over all modules; NaN where one of them is."""
    sides = dict.fromkeys(side for of_module in shares.values() for side in of_module)
    return {side: largest(of_module[side] for of_module in shares.values() if side in of_module) for side in sides}


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN where one of them is, which `max` would pass over unless it comes first."""
    return max(values, key=lambda value: (math.isnan(value), value))
