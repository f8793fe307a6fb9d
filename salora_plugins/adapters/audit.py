"""How much of any LoRA adapter's update lies in the safety directions, from its files alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..options import check_real
from ..ranks import Side
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..support.linear_algebra import svd_of_product
from ..support.numbers import tiny_share
from ..support.plotting import new_figure, save_png
from ..support.tables import TableOfNames
from ..support.texts import one_line, visible
from .certificate import covers, covers_nothing, largest, norms
from .digest import adapter_problem
from .saved import SavedAdapter, check_plain_lora

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CERTIFICATE_BOUND = 1e-5
"""What an adapter that was trained with SaLoRA keeps to."""

Verdict = Literal["outside", "inside", "changed"]

# Directions of an update that float32 factors cannot tell from rounding.
_NEGLIGIBLE = 1e-6
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class SideAudit:
    """One side of one module's update dW."""

    share: float
    """||U_C^T dW||_F / ||dW||_F (output), ||dW V_C||_F / ||dW||_F (input)."""
    expected_share: float
    """The root mean square of that share over random updates: sqrt(r_s / d)."""
    largest_cosine: float
    """Cosine of the smallest principal angle between the update's column space (output) or row space (input) and the
    safety directions: 1 if they have a direction in common."""


@dataclass(frozen=True)
class ModuleAudit:
    """One module's update."""

    norm: float
    """||dW||_F, scaling included."""
    sides: dict[Side, SideAudit]
    """"output" and, where the safety module has one, "input"."""


@dataclass(frozen=True)
class AuditReport:
    """The outcome of [`audit`]."""

    modules: dict[str, ModuleAudit]
    totals: dict[Side, SideAudit]
    """Side -> all modules together: shares of the norm of all updates; the largest of the cosines."""
    max_share: float
    """What is allowed for the share of any module."""
    dtype: str
    """Of the adapter's file."""
    not_covered: tuple[str, ...]
    """Modules and tensors that the adapter changes and the safety module says nothing of."""
    verdict: Verdict
    """Whether every module's update stays out of the safety directions, up to `max_share`; "changed" where the
    directions are of the safety module beside the adapter, and that was saved with other weights, wherever they lie."""
    changed: str | None = None
    """Why what lies beside the adapter is not that of its weights; None where it is, or where it names no weights."""

    @property
    def largest_shares(self) -> dict[Side, float]:
        """Side -> largest share of a module."""
        return {
            side: largest(module.sides[side].share for module in self.modules.values() if side in module.sides)
            for side in self.totals
        }

    @property
    def is_outside(self) -> bool:
        """Whether every module's update stays out of the safety directions, up to `max_share`."""
        return self.verdict == "outside"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "verdict": self.verdict,
            "changed": self.changed,
            "max_share": self.max_share,
            "dtype": self.dtype,
            "largest_shares": self.largest_shares,
            "totals": {side: asdict(total) for side, total in self.totals.items()},
            "modules": {name: asdict(module) for name, module in self.modules.items()},
            "not_covered": list(self.not_covered),
        }

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        if not any(module.norm for module in self.modules.values()):
            lines.append("The update is zero: this adapter changes nothing, as one does that was not trained.")
        for side, total in self.totals.items():
            times = total.share / total.expected_share
            lines.append(
                f"{side.capitalize()} side: {tiny_share(total.share)} of the update's norm lies in the safety "
                f"directions, {times:.2g} times what a random update has ({tiny_share(total.expected_share)}); the "
                f"most in a module: {tiny_share(self.largest_shares[side])}."
            )
        above = sum(not all(s.share <= self.max_share for s in m.sides.values()) for m in self.modules.values())
        if self.changed is not None:
            lines.append(f"Changed: {visible(self.changed)}.")
        if self.is_outside:
            lines.append(f"Outside: no module has more than {self.max_share:g} of its update in them.")
        else:
            word = "Now" if self.verdict == "changed" else "Inside:"
            lines.append(f"{word} {above} of {len(self.modules)} modules have more than {self.max_share:g} inside.")
            if self.dtype != "float32":
                lines.append(f"The file holds {self.dtype} numbers, whose rounding alone can exceed that bound.")
        if self.not_covered:
            shown = ", ".join(map(one_line, self.not_covered[:3])) + (", ..." if len(self.not_covered) > 3 else "")
            lines.append(f"Not covered by the safety module, though changed: {len(self.not_covered)} ({shown}).")
        return "\n".join(lines)

    def table(self) -> TableOfNames:
        """One row a module."""
        result = TableOfNames(
            "Module",
            ("norm", *(header for side in self.totals for header in (f"{side} share", "random", "cosine"))),
            "Share: of the norm of the module's update, inside the safety directions. Random: what a random update "
            "has. Cosine: of the smallest principal angle.",
        )
        for name, module in self.modules.items():
            cells = [f"{module.norm:.3g}"]
            for found in module.sides.values():
                cells += [tiny_share(found.share), tiny_share(found.expected_share), f"{found.largest_cosine:.3f}"]
            result.add_row(name, *cells)
        return result


def audit(
    adapter: str | os.PathLike,
    safety_module: SafetyModule | str | os.PathLike | None = None,
    *,
    max_share: float = CERTIFICATE_BOUND,
) -> AuditReport:
    """
    Measure how much of a saved LoRA adapter's update lies in the safety directions, in float64, without the model.

    For a random update B A whose factors are independent and Gaussian, U_C^T B A has on average r_s / d_out of its
    squared norm, whatever A is, since the Gaussian distribution is the same in every basis; the same holds of the rows
    with r_in / d_in. An adapter whose share is far above that writes into the safety directions by preference.

    Args:
        adapter: A folder with `adapter_model.safetensors` and `adapter_config.json`, of SaLoRA or any other LoRA.
        safety_module: The directions: a safety module or its file; None: the one beside the adapter, whose weights must
            be those that it was saved with: the verdict is "changed" otherwise, whatever is measured.
        max_share: The largest share of a module's update that counts as outside.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The adapter is not two plain factors per linear layer, the safety module covers none of its modules,
            or `max_share` is no share.
    """
    wanted = "a share of the norm between 0 and 1, such as 1e-5"
    check_real("max_share", max_share, wanted, lambda number: 0 <= number <= 1)
    folder = Path(adapter).expanduser()
    saved = SavedAdapter.load(folder)
    check_plain_lora(saved, folder, purpose="audited")
    changed, own = adapter_problem(folder), safety_module is None
    safety_module = _safety_module(safety_module, folder)
    modules = {
        name: _audited(*saved.factors[name], abs(saved.scaling(name)), safety_module, name)
        for name in safety_module.bases  # in the model's order; that of the file is the alphabet's
        if name in saved.factors and covers(safety_module, name, saved.factors[name][1])
    }
    if not modules:
        raise ValueError(f"{folder}: {covers_nothing(saved, safety_module)}")
    first = next(iter(saved.factors.values()))[0]
    return AuditReport(
        modules=modules,
        totals=_totals(modules, list(safety_module.sides)),
        max_share=max_share,
        dtype=str(first.dtype).removeprefix("torch."),
        not_covered=(*(name for name in saved.factors if name not in modules), *saved.trained_beside),
        verdict=_verdict(modules, max_share, changed if own else None),
        changed=changed,
    )


def _verdict(modules: dict[str, ModuleAudit], max_share: float, changed: str | None) -> Verdict:
    if changed is not None:
        return "changed"
    # A share that is no number is not below the bound.
    outside = all(side.share <= max_share for module in modules.values() for side in module.sides.values())
    return "outside" if outside else "inside"


def _safety_module(given: SafetyModule | str | os.PathLike | None, folder: Path) -> SafetyModule:
    if given is None and not (folder / DEFAULT_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {DEFAULT_FILE} beside the adapter. Name the safety module of its base model "
            "(safety_module, --safety-module); `salora calibrate` computes it."
        )
    found = given if isinstance(given, SafetyModule) else SafetyModule.load(folder if given is None else given)
    if not found.protects:
        raise ValueError(
            f"{folder if given is None else 'safety_module'}: these are the directions that a SAILS adapter starts in, "
            "and nothing is kept out of them. Name a safety module of the base model (safety_module, --safety-module) "
            "to measure against; `salora calibrate` computes it."
        )
    return found


def _audited(a: Tensor, b: Tensor, scaling: float, safety_module: SafetyModule, name: str) -> ModuleAudit:
    """
    Args:
        a: lora_A, (k, d_in).
        b: lora_B, (d_out, k).
        scaling: Of the update, without its sign.
        safety_module: The directions.
        name: The module's name.
    """
    norm, inside = norms(a, b, safety_module, name)
    spaces = _spaces(a, b)
    sides: dict[Side, SideAudit] = {}
    for side, found in safety_module.sides.items():
        basis = found.bases[name]
        sides[side] = SideAudit(
            share=inside[side] / norm if norm else 0.0,
            expected_share=math.sqrt(basis.shape[1] / basis.shape[0]),
            largest_cosine=_largest_cosine(spaces[side], basis) if norm else 0.0,
        )
    return ModuleAudit(scaling * norm, sides)


def _spaces(a: Tensor, b: Tensor) -> dict[Side, Tensor]:
    """Orthonormal bases of the column space (d_out, m) and the row space (d_in, m) of B A, float64."""
    u, values, vh = svd_of_product(b, a)
    rank = int((values > _NEGLIGIBLE * values[0]).sum())
    return {"output": u[:, :rank], "input": vh[:rank].T}


def _largest_cosine(space: Tensor, basis: Tensor) -> float:
    return min(1.0, torch.linalg.matrix_norm(basis.double().T @ space, 2).item())


def _totals(modules: dict[str, ModuleAudit], sides: Sequence[Side]) -> dict[Side, SideAudit]:
    """Of all updates together, each having its norm."""
    total = sum(module.norm**2 for module in modules.values())
    totals: dict[Side, SideAudit] = {}
    for side in sides:
        of_side = [(module.norm, module.sides[side]) for module in modules.values()]
        if total:
            share = math.sqrt(sum((norm * found.share) ** 2 for norm, found in of_side) / total)
            expected = math.sqrt(sum((norm * found.expected_share) ** 2 for norm, found in of_side) / total)
        else:
            share, expected = 0.0, max(found.expected_share for _, found in of_side)
        totals[side] = SideAudit(share, expected, largest(found.largest_cosine for _, found in of_side))
    return totals


def write_heat_map(path: Path, report: AuditReport) -> None:
    """
    Write `heat_map` as a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    save_png(path, heat_map(report))


def heat_map(report: AuditReport) -> Figure:
    """
    Draw the shares as multiples of a random update's, layers downwards and kinds of modules across.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, kinds, cells = layer_grid(report)
    width, height = 1.6 + 0.75 * len(kinds), 2.2 + 0.24 * len(layers)
    figure = new_figure(max(4.5, width * len(report.totals)), max(3.0, height))

    from matplotlib.colors import LogNorm

    axes = figure.subplots(1, len(report.totals), squeeze=False)[0]
    for axis, side in zip(axes, report.totals, strict=True):
        values = torch.full((len(layers), len(kinds)), float("nan"), dtype=torch.float64)
        for (row, column), name in cells.items():
            entry = report.modules[name].sides[side]
            values[row, column] = max(entry.share / entry.expected_share, 1e-6)
        # White where the update is like a random one; fixed limits, so that two adapters' pictures can be compared.
        image = axis.imshow(values, norm=LogNorm(0.1, 10), cmap="RdBu_r", aspect="auto")
        axis.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set_title(f"{side} side", fontsize=10)
        axis.set_ylabel("layer" if axis is axes[0] else "")
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_label("share in the safety directions,\ntimes a random update's", fontsize=8)
    return figure


def layer_grid(report: AuditReport) -> tuple[list[str], list[str], dict[tuple[int, int], str]]:
    """Layers and kinds of modules in the model's order, and (row, column) -> module name."""
    found = {name: _LAYER.search(name) for name in report.modules}
    # What stands before the number tells an encoder's layers from a decoder's.
    rows = {name: name[: match.end()].strip(".") if match else "" for name, match in found.items()}
    columns = {name: name[match.end() :] if match else name for name, match in found.items()}
    prefixes = {row.rpartition(".")[0] for row in rows.values()}
    layers, kinds = list(dict.fromkeys(rows.values())), list(dict.fromkeys(columns.values()))
    cells = {(layers.index(rows[name]), kinds.index(columns[name])): name for name in report.modules}
    if len(prefixes) == 1:
        layers = [layer.rpartition(".")[2] for layer in layers]
    last = [kind.rpartition(".")[2] for kind in kinds]
    return layers, last if len(set(last)) == len(last) else kinds, cells
