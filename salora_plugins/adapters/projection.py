"""The closest adapter whose update avoids the safety directions, for adapters that were trained without SaLoRA."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..inspection import what_directions
from ..parametrization import project_out
from ..ranks import Side
from ..safety_module import SafetyModule
from ..support.numbers import percent, tiny_share
from ..support.tables import TableOfNames
from ..support.texts import markdown, one_line
from .certificate import covers, covers_nothing, largest_shares, norms, safety_shares
from .model_card import PACKAGE, TO_CHECK, TO_LOAD, certificate_row, provenance_rows, table
from .saved import SavedAdapter, check_plain_lora
from .writing import check_destination, check_dtype, in_dtype, write_adapter


@dataclass(frozen=True)
class ProjectionReport:
    """The outcome of [`project_adapter`]."""

    removed_share: float
    """||dW - dW'||_F / ||dW||_F of the updates of all modules together."""
    modules: dict[str, float]
    """Module name -> the same of its update; 0 where it had none."""
    not_covered: tuple[str, ...]
    """Modules and tensors of the adapter that the safety module says nothing of; they are written as they were."""
    safety_shares: dict[Side, float]
    """Side -> the largest share of a module's update in its safety directions that the written file has."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        shares = ", ".join(f"{side} side {tiny_share(share)}" for side, share in self.safety_shares.items())
        lines = [
            f"{len(self.modules)} modules projected; removed: {percent(self.removed_share)} of the update's norm.",
            f"Largest share of a module's update in the safety directions now: {shares}.",
        ]
        if self.not_covered:
            shown = ", ".join(map(one_line, self.not_covered[:3])) + (", ..." if len(self.not_covered) > 3 else "")
            lines.append(f"Written as they were, since the safety module does not cover them: {shown}.")
        return "\n".join(lines)

    def table(self) -> TableOfNames:
        """One row a module."""
        result = TableOfNames("Module", ("removed",), "Removed: share of the norm of the module's update.")
        for name, share in self.modules.items():
            result.add_row(name, percent(share))
        return result

    def card_section(self, safety_module: SafetyModule, digest: str) -> str:
        """
        The section of the model card of the projected adapter.

        Args:
            safety_module: The one that it was projected with.
            digest: Of the projected weights.
        """
        rows = {
            "Removed": f"{percent(self.removed_share)} of the norm of the update",
            "Certificate": certificate_row(self.safety_shares, digest),
            **provenance_rows(safety_module),
        }
        if self.not_covered:
            names = [markdown(name) for name in self.not_covered[:5]]
            rows["Not protected"] = ", ".join(names) + (", ..." if len(self.not_covered) > 5 else "")
        return f"""
## Projected out of the safety directions

A LoRA adapter whose update was projected out of the
{markdown(what_directions(safety_module.provenance).sentence)},
by {PACKAGE} (`salora project`). It was trained without them. That does not promise that no refusal is lost.

{table(rows)}

{TO_CHECK}

{TO_LOAD}
"""


def project_adapter(
    adapter: str | os.PathLike,
    safety_module: SafetyModule | str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> ProjectionReport:
    """
    Write the closest adapter whose update avoids the safety directions, as another plain LoRA adapter of the same rank.

    With P = I - U_C U_C^T and, where there is an input side, Q = I - V_C V_C^T, every update dW = s B A becomes
    s (P B) (A Q). The map X -> P X Q is the orthogonal projection of the matrix space onto the matrices X with
    U_C^T X = 0 and X V_C = 0, so that of all of these P dW Q is the closest to dW in the Frobenius norm. It has no
    higher rank than dW. Projected in float64.

    Unlike in training with SaLoRA, nothing makes up for what is removed: the task loss may rise.

    Args:
        adapter: A folder with `adapter_model.safetensors` and `adapter_config.json`.
        safety_module: The directions: a safety module of the adapter's base model, or its file.
        out: The folder to write.
        dtype: "float32", "bfloat16" or "float16" of the written weights; in 16 bits rounding brings back about 1e-3.
        overwrite: Replace an adapter that `out` holds already; all other files there stay.

    Raises:
        FileNotFoundError, FileExistsError: See the message.
        ValueError: An option is out of range, the adapter is not two plain factors per linear layer, the safety
            module covers none of its modules, or its weights are too large for `dtype`.
    """
    check_dtype(dtype)
    folder, out = Path(adapter).expanduser(), Path(out).expanduser()
    check_destination(folder, out, overwrite)
    saved = SavedAdapter.load(folder)
    check_plain_lora(saved, folder, purpose="projected")
    if not isinstance(safety_module, SafetyModule):
        safety_module = SafetyModule.load(safety_module)
    if not safety_module.protects:
        raise ValueError(
            "safety_module: these are the directions that a SAILS adapter starts in. Give a safety module, such as one "
            "that `salora calibrate` computes with basis_method='sae'."
        )
    covered = [name for name, (_, b) in saved.factors.items() if covers(safety_module, name, b)]
    if not covered:
        raise ValueError(f"{folder}: {covers_nothing(saved, safety_module)}")
    factors = dict(saved.factors)
    removed, squares, total = {}, 0.0, 0.0
    for name in covered:
        a, b = saved.factors[name]
        factors[name] = new_a, new_b = _projected(a, b, safety_module, name)
        before, after = (norms(*pair, safety_module, name)[0] for pair in ((a, b), (new_a, new_b)))
        square = max(0.0, before**2 - after**2)  # orthogonal, so that the squares add up
        removed[name] = math.sqrt(square) / before if before else 0.0
        squares += (saved.scaling(name) ** 2) * square
        total += (saved.scaling(name) * before) ** 2
    written = replace(
        saved,
        factors={name: (in_dtype(a, dtype, name), in_dtype(b, dtype, name)) for name, (a, b) in factors.items()},
    )
    only_covered = replace(written, factors={name: written.factors[name] for name in covered})
    report = ProjectionReport(
        removed_share=math.sqrt(squares / total) if total else 0.0,
        modules=removed,
        not_covered=(*(name for name in saved.factors if name not in removed), *saved.trained_beside),
        safety_shares=largest_shares(safety_shares(only_covered, safety_module)),
    )
    write_adapter(
        written,
        out,
        card=lambda digest: report.card_section(safety_module, digest),
        tags=("lora", "salora"),
        safety_module=safety_module,
    )
    return report


def _projected(a: Tensor, b: Tensor, safety_module: SafetyModule, name: str) -> tuple[Tensor, Tensor]:
    factors: dict[Side, Tensor] = {"input": a.double(), "output": b.double()}
    for side, found in safety_module.sides.items():
        # The bases are float32: orthonormal to 1e-7, of which a second projection leaves 1e-14.
        for _ in range(2):
            factors[side] = project_out(factors[side], found.bases[name].double(), side)
    return factors["input"], factors["output"]
