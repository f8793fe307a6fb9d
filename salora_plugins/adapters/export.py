"""A saved adapter at a rank of choice: the best approximation of its update, with the certificate in force."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import read_side_config
from ..options import check_number, check_real
from ..ranks import Side
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..support.linear_algebra import balanced_factors
from ..support.numbers import percent, tiny_share
from ..support.tables import TableOfNames
from .certificate import largest_shares, safety_shares
from .digest import adapter_problem
from .model_card import PACKAGE, PAPER, TO_CHECK, TO_LOAD, certificate_row, provenance_rows, table
from .saved import SavedAdapter, check_plain_lora
from .writing import check_destination, check_dtype, in_dtype, write_adapter

# A share of an update's norm; of one that is kept whole, a decomposition in float64 loses far less.
_LOST = 1e-6


@dataclass(frozen=True)
class ModuleExport:
    """What was kept of one module's update dW."""

    saved_rank: int
    """Rank of the factors in the file."""
    effective_rank: float
    """exp of the entropy of dW's normalized singular values (Roy, Vetterli 2007); 0 where dW is zero."""
    norm: float
    """||dW||_F."""
    lost_share: float
    """||dW - its approximation||_F / ||dW||_F, before the rounding to the dtype of the file."""


@dataclass(frozen=True)
class ExportReport:
    """The outcome of [`export_adapter`]."""

    rank: int
    """Rank of the exported adapter, the same in every module."""
    lost_share: float
    """As for a module, of the updates of all modules together."""
    modules: dict[str, ModuleExport]
    """Module name -> what was kept."""
    safety_shares: dict[Side, float] | None
    """Side -> largest share of a module's exported update in its safety directions; None without a safety module."""

    @classmethod
    def of(cls, modules: dict[str, ModuleExport], rank: int, safety_shares: dict[Side, float] | None) -> ExportReport:
        """With the loss of all modules together."""
        total = sum(module.norm**2 for module in modules.values())
        lost = sum((module.norm * module.lost_share) ** 2 for module in modules.values())
        return cls(rank, (lost / total) ** 0.5 if total else 0.0, modules, safety_shares)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        lost = tiny_share(self.lost_share)
        lines = [f"{len(self.modules)} modules at rank {self.rank}; lost: {lost} of the update's norm."]
        if self.safety_shares is None:
            lines.append("No safety module beside the adapter: the certificate was not computed.")
        else:
            shares = ", ".join(f"{side} side {tiny_share(share)}" for side, share in self.safety_shares.items())
            lines.append(f"Largest share of a module's update in the safety directions: {shares}.")
        return "\n".join(lines)

    def table(self) -> TableOfNames:
        """One row a module."""
        result = TableOfNames(
            "Module", ("saved rank", "effective rank", "lost"), "Lost: share of the norm of the module's update."
        )
        for name, module in self.modules.items():
            effective, lost = f"{module.effective_rank:.1f}", tiny_share(module.lost_share)
            result.add_row(name, str(module.saved_rank), effective, lost)
        return result

    def card_section(self, safety_module: SafetyModule | None, digest: str) -> str:
        """
        The section of the model card of the exported adapter.

        Args:
            safety_module: That of the exported adapter; None for adapters of plain LoRA.
            digest: Of the exported weights.
        """
        saved_rank = max(module.saved_rank for module in self.modules.values())
        rows = {
            "Rank": f"{self.rank}, from {saved_rank}",
            "Lost": f"{tiny_share(self.lost_share)} of the norm of the update",
        }
        if safety_module is not None and self.safety_shares is not None:
            rows |= {"Certificate": certificate_row(self.safety_shares, digest), **provenance_rows(safety_module)}
            origin = f"A LoRA adapter with the safety module of {PAPER} that is described below, brought"
            to_check = f"\n{TO_CHECK}\n"
        else:
            origin, to_check = "A LoRA adapter, brought", ""
        return f"""
## Exported

{origin} to rank {self.rank} by {PACKAGE} (`salora export`). It is for inference; train the original further.

{table(rows)}
{to_check}
{TO_LOAD}
"""


def export_adapter(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    max_rank: int | None = None,
    share: float | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> ExportReport:
    """
    Write the best approximation of a saved LoRA adapter at one rank, as another plain LoRA adapter.

    The update dW = s B A of every module is replaced by its top R singular triples, from QR decompositions of the two
    factors and the SVD of a small matrix, all in float64; dW itself is never formed. The new factors carry the scaling:
    every module has rank R (zeros fill up one of lower rank), alpha = R, no rsLoRA and no patterns, because older vLLM,
    text-generation-inference and llama.cpp read one scaling for all modules.

    The certificate survives. With V_R the kept right singular vectors, the approximation is dW V_R V_R^T, so that
    ||U_C^T dW V_R V_R^T||_F <= ||U_C^T dW||_F; dW_R = U_R U_R^T dW gives the same for V_C. As ||dW_R||_F is
    sqrt(1 - lost^2) ||dW||_F, the share inside grows at most by 1 / sqrt(1 - lost^2), and what was 0 stays 0. What
    remains is the rounding of the new factors: 1e-7 in float32, 1e-3 in bfloat16.

    The exported adapter cannot be trained further as SaLoRA, since its factors are no longer the trained and the
    frozen halves; keep the original for that.

    Args:
        adapter: A folder with `adapter_model.safetensors` and `adapter_config.json`, of SaLoRA or any other LoRA.
        out: The folder to write.
        max_rank: R; an adapter of lower rank keeps its own. Default: SaLoRA's r (the largest of the modules'), which is
            the saved rank after `init="zero"` and half of it after the other two; the saved rank for all other
            adapters, of which nothing is lost then. A warning says what the default loses.
        share: Instead of `max_rank`, the smallest R at which every module keeps this share of ||dW||_F^2.
        dtype: "float32", "bfloat16" or "float16" of the exported weights.
        overwrite: Replace an adapter that `out` holds already; all other files there stay.

    Returns:
        What was lost, and the certificate where the adapter has its safety module beside it.

    Raises:
        FileNotFoundError, FileExistsError: See the message.
        ValueError: An option is out of range, or the adapter is not two plain factors per linear layer (DoRA, biases on
            lora_B, embeddings, convolutions, fused experts, initializations that change the base model), or its
            weights are too large for `dtype`.
    """
    folder, out = Path(adapter).expanduser(), Path(out).expanduser()
    _check_options(max_rank, share, dtype)
    check_destination(folder, out, overwrite)
    saved = SavedAdapter.load(folder)
    check_plain_lora(saved, folder, purpose="exported")

    safety_module, default_rank = _safety_module_and_rank(folder, saved)
    updates = {name: _decomposed(a, b, saved.scaling(name)) for name, (a, b) in saved.factors.items()}
    if share is not None:
        rank = max(_rank_for(update.values, share) for update in updates.values())
    else:
        rank = min(max_rank or default_rank, saved.rank)
    exported = SavedAdapter(
        config=_config(saved.config, rank),
        factors={name: update.at_rank(rank, dtype, name) for name, update in updates.items()},
        other_tensors=saved.other_tensors,
    )
    report = ExportReport.of(
        modules={name: _kept(update.values, rank, saved.factors[name][0].shape[0]) for name, update in updates.items()},
        rank=rank,
        safety_shares=None if safety_module is None else largest_shares(safety_shares(exported, safety_module)),
    )
    if max_rank is None and share is None and report.lost_share > _LOST:
        warnings.warn(
            f"{folder}: at SaLoRA's rank, {rank} of the {saved.rank} that are saved, {percent(report.lost_share)} of "
            f"the update's norm is lost. Give max_rank={saved.rank} (--max-rank) to keep it all, or a share to keep.",
            UserWarning,
            stacklevel=2,
        )
    write_adapter(
        exported,
        out,
        card=lambda digest: report.card_section(safety_module, digest),
        tags=("lora",) if safety_module is None else ("lora", "salora"),
    )
    return report


def _safety_module_and_rank(adapter: Path, saved: SavedAdapter) -> tuple[SafetyModule | None, int]:
    """The safety module that the weights were saved with, if there is one, and the rank at which they were trained."""
    if (problem := adapter_problem(adapter)) is not None:
        warnings.warn(f"{problem}. It is exported as a plain LoRA adapter, without a certificate.", stacklevel=3)
        return None, saved.rank
    safety_module = SafetyModule.load(adapter) if (adapter / DEFAULT_FILE).is_file() else None
    if safety_module is not None and not safety_module.protects:
        safety_module = None
    trained = read_side_config(adapter)
    if trained is None:
        return safety_module, saved.rank
    # With start factors, the file has the trained and the start factors side by side: 2r.
    times = 1 if trained.get("init") == "zero" else 2
    return safety_module, max(-(-a.shape[0] // times) for a, _ in saved.factors.values())


def _check_options(max_rank: int | None, share: float | None, dtype: str) -> None:
    if max_rank is not None and share is not None:
        raise ValueError("max_rank and share are both given. Choose one.")
    if max_rank is not None:
        check_number("max_rank", max_rank, 1)
    if share is not None:
        wanted = "a share of the squared norm between 0 and 1, such as 0.99"
        check_real("share", share, wanted, lambda number: 0 < number <= 1)
    check_dtype(dtype)


class _Update(NamedTuple):
    """The singular value decomposition of s B A, the values' roots shared out to both sides; float64."""

    a: Tensor
    """sqrt(S) V^T, (m, d_in); m = min(k, d_in, d_out)."""
    values: Tensor
    """S, (m,), descending."""
    b: Tensor
    """U sqrt(S), (d_out, m)."""

    def at_rank(self, rank: int, dtype: str, name: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of the best approximation, for the module `name` of an adapter in `dtype`."""
        return in_dtype(_resized(self.a, rank, 0), dtype, name), in_dtype(_resized(self.b, rank, 1), dtype, name)


def _decomposed(a: Tensor, b: Tensor, scaling: float) -> _Update:
    b, values, a = balanced_factors(scaling * b.double(), a)
    return _Update(a, values, b)


def _rank_for(values: Tensor, share: float) -> int:
    """The smallest number of singular values, at least 1, whose squares are `share` of all."""
    kept = values.square().cumsum(0)
    return min(int((kept < share * kept[-1]).sum()) + 1, len(values))


def _resized(factor: Tensor, rank: int, axis: int) -> Tensor:
    """The first `rank` rows (axis 0) or columns (axis 1), filled up with zeros where there are fewer."""
    kept = factor.narrow(axis, 0, min(rank, factor.shape[axis]))
    missing = rank - kept.shape[axis]
    padding = (0, 0, 0, missing) if axis == 0 else (0, missing)
    return torch.nn.functional.pad(kept, padding).contiguous()


def _kept(values: Tensor, rank: int, saved_rank: int) -> ModuleExport:
    norm = torch.linalg.norm(values).item()
    if norm == 0:
        return ModuleExport(saved_rank, 0.0, 0.0, 0.0)
    weights = values[values > 0] / values.sum()
    return ModuleExport(
        saved_rank=saved_rank,
        effective_rank=torch.exp(-(weights * weights.log()).sum()).item(),
        norm=norm,
        lost_share=torch.linalg.norm(values[rank:]).item() / norm,
    )


def _config(saved: dict[str, Any], rank: int) -> dict[str, Any]:
    config = copy.deepcopy(saved)
    config.update(r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=True)
    return config
