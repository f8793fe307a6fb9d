"""What `restore` has done, for people and programs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..adapters.certificate import largest
from ..adapters.model_card import PACKAGE, TO_LOAD, provenance_rows, table
from ..safety_module import SafetyModule
from ..support.module_names import listed
from ..support.numbers import loss, percent
from ..support.tables import TableOfNames
from ..support.texts import markdown, markdown_table, one_line
from .strength import Strength, StrengthSearch
from .strength_search import Trial

Form = Literal["combined", "repair", "merged"]
FORMS: dict[Form, str] = {
    "combined": "one plain LoRA of the adapter and the repair",
    "repair": "the repair alone, a plain LoRA that goes on the fine-tuned model",
    "merged": "a whole model",
}

_LSSF = "[LSSF](https://arxiv.org/abs/2602.00038)"


@dataclass(frozen=True)
class ModuleRestoration:
    """One module's repair."""

    directions: int
    """r, of its safety subspace U."""
    rank: int
    """Of the repair that was written; 0 where the module lost nothing."""
    delta_norm: float
    """||delta||_F of its safety vector W_safe - W_unsafe."""
    kept_share: float
    """||U U^T delta||_F / ||delta||_F: what of the safety vector lies in the subspace."""
    repair_norm: float
    """||alpha U' U'^T delta||_F."""
    lost_share: float
    """What of the repair its truncation to a rank has lost, of its norm."""
    share_before: float | None
    """||U^T dW||_F / ||dW||_F of the fine-tuned adapter's update, what `salora audit` says of it; None without one."""
    share_after: float | None
    """The same of that update and the repair together."""


@dataclass(frozen=True)
class RestoreReport:
    """The outcome of [`restore`]."""

    form: Form
    strength: Strength
    modules: dict[str, ModuleRestoration]
    unsafe: str
    """What the safety vectors are the difference to."""
    search: StrengthSearch | None = None
    trials: tuple[Trial, ...] = ()
    """What the search has measured: the fine-tuned model first, then every strength."""
    not_covered: tuple[str, ...] = ()
    """Modules and tensors of the fine-tuned adapter that the repair leaves as they are: trained biases and the like."""

    @property
    def lost_share(self) -> float:
        """What truncation has lost of all repairs together, of their norm."""
        total = sum(module.repair_norm**2 for module in self.modules.values())
        lost = sum((module.repair_norm * module.lost_share) ** 2 for module in self.modules.values())
        return math.sqrt(lost / total) if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        if self.search is not None:  # data may be an object
            values["search"] |= {name: str(getattr(self.search, name))[:200] for name in ("task", "harmful")}
        return {**values, "lost_share": self.lost_share}

    def summary(self) -> str:
        """A few lines for people."""
        repaired = {name: module for name, module in self.modules.items() if module.rank}
        directions = [module.directions for module in repaired.values()]
        ranks = [module.rank for module in repaired.values()]
        lines = [
            f"{len(repaired)} of {len(self.modules)} modules repaired, alpha={self.strength.alpha:g}, "
            f"alpha_1={self.strength.alpha_1:g}: {_range(directions)} safety directions, repairs of rank "
            f"{_range(ranks)}.",
            f"Unsafe counterpart: {self.unsafe}.",
        ]
        if self.lost_share:
            lines.append(f"Lost by truncation: {percent(self.lost_share)} of the repairs' norm.")
        before = [m.share_before for m in repaired.values() if m.share_before is not None]
        after = [m.share_after for m in repaired.values() if m.share_after is not None]
        if before and after:
            lines.append(
                f"Largest share of a module's update in the safety directions: {largest(before):.2g} before, "
                f"{largest(after):.2g} now."
            )
        if unchanged := [name for name, module in self.modules.items() if not module.rank]:
            lines.append(f"Nothing to repair, since the unsafe counterpart has the safe weights: {listed(unchanged)}.")
        if self.not_covered:
            lines.append(f"Not repaired, though fine-tuning has changed it: {one_line(listed(self.not_covered))}.")
        return "\n".join([*self._search_lines(), *lines])

    def _search_lines(self) -> list[str]:
        return [] if self.search is None else [" ".join(_search_told(self.search)), *map(_trial_told, self.trials)]

    def table(self) -> TableOfNames:
        """One row a module."""
        result = TableOfNames(
            "Module",
            ("directions", "rank", "safety vector", "kept", "repair", "before", "now"),
            "Kept: what of the safety vector lies in the safety directions. Before, now: share of the adapter's update "
            "in them.",
        )
        for name, module in self.modules.items():
            shares = ("-" if s is None else f"{s:.2g}" for s in (module.share_before, module.share_after))
            numbers = f"{module.delta_norm:.3g}", percent(module.kept_share), f"{module.repair_norm:.3g}"
            result.add_row(name, str(module.directions), str(module.rank), *numbers, *shares)
        return result

    def card_section(self, safety_module: SafetyModule) -> str:
        """
        The section of the model card.

        Args:
            safety_module: The safety subspace.
        """
        repaired = [module for module in self.modules.values() if module.rank]
        rows = {
            "Form": FORMS[self.form],
            "Strength": f"alpha = {self.strength.alpha:g}, alpha_1 = {self.strength.alpha_1:g}",
            "Safety directions": _range([module.directions for module in repaired]),
            "Rank of the repairs": _range([module.rank for module in repaired]),
            "Lost by truncation": percent(self.lost_share),
            **provenance_rows(safety_module),
        }
        if self.not_covered:
            rows["Not repaired"] = markdown(listed(self.not_covered))
        told = "" if self.search is None else f"\n{' '.join(_search_told(self.search))}\n\n{self._trials_table()}\n"
        load = "" if self.form == "merged" else f"\n{TO_LOAD}\n"
        return f"""
## Refusals restored

What fine-tuning took of the refusals, {PACKAGE} has put back (`salora restore`, {_LSSF}): to the weights, the part of
the safety vectors that lies in the safety directions was added.

{table(rows)}
{told}{load}"""

    def _trials_table(self) -> str:
        rows = []
        for trial in self.trials:
            strength = trial.strength
            values = ("fine-tuned", "") if strength is None else (f"{strength.alpha:g}", f"{strength.alpha_1:g}")
            rows.append([*values, f"{trial.refused} of {trial.requests}", loss(trial.task_loss)])
        return markdown_table(["alpha", "alpha_1", "refused", "task loss"], rows, labels=0)


def _search_told(search: StrengthSearch) -> list[str]:
    return [
        f"Searched: the most refusals at a task loss of at most {search.max_loss_increase:.0%} above the fine-tuned",
        "model's; where none is within it, the smallest task loss.",
    ]


def _trial_told(trial: Trial) -> str:
    strength = trial.strength
    told = "as fine-tuned" if strength is None else f"alpha={strength.alpha:g}, alpha_1={strength.alpha_1:g}"
    return f"  {told}: {trial.refused} of {trial.requests} refused, task loss {loss(trial.task_loss)}"


def _range(numbers: list[int]) -> str:
    if not numbers:
        return "0"
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
