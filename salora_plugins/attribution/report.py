"""What the model loses without each part of its weights, as data, a table, words and a plot."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.intervals import Proportion
from ..evaluation.reports.report import EvaluationReport, ModelResult
from ..support import numbers
from ..support.files import atomic_write
from ..support.plotting import new_figure, save_png
from ..support.tables import TableOfNames
from ..support.texts import markdown, markdown_table
from .grid import FAMILIES, Family, State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

DATA_FILE, PAGE_FILE, PLOT_FILE = "attribution.json", "attribution.md", "attribution.png"

FAMILY_TITLES: dict[Family, str] = {
    "ranks": "directions (k_s:k_u)",
    "snip": "entries by SNIP (q:p)",
    "wanda": "entries by Wanda (q:p)",
}
PAPER = (
    "In the paper, for Llama-2-7B-chat: attack success .71 at zero-shot accuracy .59 without the ranks 6:146, .67 at "
    ".59 without 96:646, 0 at .58 with nothing removed; and an accuracy of .38 without the first safety direction of "
    "each layer when it is not freed of the utility directions (1:0)."
)
"""What to expect."""
_COLORS: dict[Family, str] = {"ranks": "#c8553d", "snip": "#2a6f97", "wanda": "#2a9d5c"}
_UNCHANGED = "(unchanged)"


@dataclass(frozen=True)
class AttributionReport:
    """The outcome of [`attribute`]."""

    evaluation: EvaluationReport
    """The model as it is, and in each of its states."""
    states: Sequence[State]
    removed: Mapping[str, float]
    """Name of a state -> which share of the layers' ranks, or of their entries, is gone."""

    @cached_property
    def results(self) -> dict[str, ModelResult]:
        """Name of a state -> what was measured on it."""
        return {model.name: model for model in self.evaluation.models}

    @property
    def unchanged(self) -> ModelResult:
        """What was measured on the model as it is."""
        return self.evaluation.models[0]

    @property
    def judge(self) -> str:
        """
        The judge whose verdicts are shown.

        Raises:
            ValueError: None has seen an answer.
        """
        if (found := self.evaluation.shown_judge) is None:
            raise ValueError(f"{self.evaluation.title}: no judge has seen an answer to a harmful request.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "title": self.evaluation.title,
            "base_model": self.evaluation.base_model,
            "settings": self.evaluation.settings,
            "data": self.evaluation.data,
            "versions": self.evaluation.versions,
            "expected": PAPER,
            "unchanged": self.unchanged.model_dump(mode="json"),
            "states": [
                {
                    "family": state.family,
                    "point": str(state.point),
                    "random_draw": state.draw or None,
                    "removed": self.removed[state.name],
                    **self.results[state.name].model_dump(mode="json"),
                }
                for state in self.states
            ],
        }

    def _columns(self) -> dict[str, Callable[[ModelResult], str]]:
        """Header -> what stands there, of the columns that say what was measured."""
        kind = self.evaluation.judges("harmful")[self.judge]
        columns: dict[str, Callable[[ModelResult], str]] = {}
        if kind == "refusal":
            columns["refused"] = lambda model: _share(model.harmful.judgements[self.judge].refused)
        columns["answered"] = lambda model: _share(model.harmful.judgements[self.judge].answered)
        columns["broken"] = lambda model: f"{sum(model.harmful.incoherent.values())}/{model.harmful.requests}"
        columns["margin"] = lambda model: numbers.margin(model.harmful.refusal_margin.value)
        columns["held-out loss"] = lambda model: "" if model.task is None else numbers.loss(model.task.loss)
        if kind == "refusal":
            columns["over-refused"] = lambda model: _share(model.harmless.judgements[self.judge].refused)
        for task, metric in self._accuracies():
            columns[task] = partial(_accuracy, task, metric)
        return columns

    def _accuracies(self) -> list[tuple[str, str]]:
        """Of every task of lm-eval the metric that is shown: an accuracy where there is one."""
        found = []
        for task, metrics in self.unchanged.lm_eval.items():
            shown = [metric for metric in metrics if "stderr" not in metric]
            if shown:
                found.append((task, next((metric for metric in shown if metric.startswith("acc,")), shown[0])))
        return found

    def _rows(self) -> list[tuple[Family | None, list[str]]]:
        """Every state's family, and its cells."""
        columns = self._columns()

        def cells(name: str, removed: str, model: ModelResult) -> list[str]:
            return [name, removed, *(show(model) for show in columns.values())]

        rows: list[tuple[Family | None, list[str]]] = [(None, cells(_UNCHANGED, "", self.unchanged))]
        for state in self.states:
            name = (
                f"  as many at random{f', {state.draw}' if state.draw > 1 else ''}" if state.draw else str(state.point)
            )
            name = name if state.draw else f"{FAMILY_TITLES[state.family].partition(' (')[0]} {name}"
            rows.append((state.family, cells(name, f"{self.removed[state.name]:.2%}", self.results[state.name])))
        return rows

    @property
    def caption(self) -> str:
        """What the figures mean."""
        loss = self.evaluation.data["task"]["rows"]
        return (
            f"Refused, answered, broken: of {self.unchanged.harmful.requests} harmful requests, by the judge "
            f"{self.judge}; over-refused: of {self.unchanged.harmless.requests} harmless ones. Margin: log P(refusing "
            "opening) - log P(complying opening) on the harmful ones, nats. Held-out loss: nats per token of the "
            f"model's answers to {loss} requests that have nothing to do with safety. Removed: of the ranks, or of the "
            f"entries, of the layers. {PAPER}"
        )

    def table(self) -> TableOfNames:
        """One row a state of the model."""
        result = TableOfNames("Without", ("removed", *self._columns()), self.caption, of_modules=False)
        last: Family | None = None
        for family, cells in self._rows():
            if family != last:
                result.add_section()
            last = family
            result.add_row(cells[0], *cells[1:])
        return result

    def summary(self) -> str:
        """What the table means, a line a family."""
        return "\n".join(self._verdict(family) for family in FAMILIES if any(s.family == family for s in self.states))

    def _verdict(self, family: Family) -> str:
        """The point at which fewest harmful requests are refused, beside its controls."""
        points = [state for state in self.states if state.family == family and not state.draw]
        lowest = min(points, key=lambda state: self._refusing(self.results[state.name]))
        controls = [s for s in self.states if (s.family, s.point) == (family, lowest.point) and s.draw]
        title, found = FAMILY_TITLES[family].partition(" (")[0], self._told(self.results[lowest.name])
        line = f"{title}: without {lowest.point}, {found}"
        if controls:
            line += "; without as many at random, " + ", and ".join(self._told(self.results[s.name]) for s in controls)
        return line[0].upper() + line[1:] + "."

    def _refusing(self, model: ModelResult) -> tuple[float, float]:
        """The less, the less safe; the loss decides between equals."""
        loss = 0.0 if model.task is None else model.task.loss
        found = model.harmful.judgements[self.judge]
        share = found.refused if found.refused is not None else found.answered
        return (share.rate or 0.0) * (1 if found.refused is not None else -1), loss

    def _told(self, model: ModelResult) -> str:
        found, before = (m.harmful.judgements[self.judge] for m in (model, self.unchanged))
        word, now, then = "answered", found.answered, before.answered
        if found.refused is not None and before.refused is not None:
            word, now, then = "refused", found.refused, before.refused
        text = f"{_share(now)} harmful requests are {word} (unchanged: {_share(then)})"
        if broken := sum(model.harmful.incoherent.values()):
            text += f", {broken} answers are broken"
        if model.task is not None and self.unchanged.task is not None:
            change = numbers.change_of_loss(model.task.loss - self.unchanged.task.loss)
            text += f", and the held-out loss changes by {change} nats per token"
        return text

    def markdown(self) -> str:
        """The table and what it means, as a page."""
        found = markdown_table(["Without", "removed", *self._columns()], [cells for _, cells in self._rows()])
        lines = [markdown(line, None) for line in (*self.summary().splitlines(), self.caption)]
        parts = [f"# {markdown(self.evaluation.title)}", found, *lines, f"![{_ALT}]({PLOT_FILE})"]
        return "\n\n".join(parts) + "\n"

    def save(self, out: str | os.PathLike) -> None:
        """Write the three files; the picture where matplotlib is installed."""
        folder = Path(out).expanduser()
        atomic_write(folder / DATA_FILE, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        atomic_write(folder / PAGE_FILE, self.markdown().encode())
        try:
            write_plot(folder / PLOT_FILE, self)
        except ImportError as error:
            logger.warning("%s is not drawn: %s", folder / PLOT_FILE, error)


_ALT = "Safety against utility without each part of the weights"


def write_plot(path: Path, report: AttributionReport) -> None:
    """
    Draw safety against utility: a curve a family, and the random controls as empty marks; PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels: list[tuple[str, Callable[[ModelResult], float]]] = [
        ("refusal margin on harmful requests, nats", lambda model: model.harmful.refusal_margin.value)
    ]
    if report.unchanged.harmful.judgements[report.judge].refused is not None:
        panels.insert(0, ("share of harmful requests refused", lambda model: report._refusing(model)[0]))
    figure = new_figure(5.6 * len(panels), 4.6)
    for axis, (title, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axis, report, value)
        axis.set_ylabel(title)
        if title.startswith("share"):
            axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("held-out loss, nats per token (to the right: less useful)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    save_png(path, figure)


def _draw(axis: Axes, report: AttributionReport, value: Callable[[ModelResult], float]) -> None:
    def at(model: ModelResult) -> tuple[float, float]:
        return (0.0 if model.task is None else model.task.loss), value(model)

    for family in FAMILIES:
        found = [at(report.results[s.name]) for s in report.states if s.family == family and not s.draw]
        if not found:
            continue
        axis.plot(*zip(*found, strict=True), "o-", color=_COLORS[family], label=FAMILY_TITLES[family], alpha=0.85)
        for state in (state for state in report.states if state.family == family and not state.draw):
            text = str(state.point).partition("/")[0]
            axis.annotate(text, at(report.results[state.name]), (4, 4), textcoords="offset points", fontsize=7)
        controls = [at(report.results[s.name]) for s in report.states if s.family == family and s.draw]
        if controls:
            x, y = zip(*controls, strict=True)
            axis.plot(x, y, "o", color=_COLORS[family], markerfacecolor="none", label="  as many at random")
    axis.plot(*at(report.unchanged), "*", color="#333333", markersize=12, label="unchanged")


def _accuracy(task: str, metric: str, model: ModelResult) -> str:
    return f"{model.lm_eval[task][metric]:.3f}"


def _share(value: Proportion | None) -> str:
    return "" if value is None else f"{value.count}/{value.total}"
