"""The figures of an evaluation as plots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...adapters.audit import AuditReport, heat_map
from ...support.files import atomic_write
from ...support.numbers import percent
from ...support.plotting import new_figure, png
from ...support.texts import visible
from ..intervals import Proportion
from .report import SETS, EvaluationReport, Judgement, SetName
from .tables import categories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_COLORS = ("#555555", "#c8553d", "#2a6f97", "#2a9d5c", "#8e5ea2", "#b8860b", "#17becf", "#d6619d")
_MARKERS = "osD^vP*X"

_Interval = tuple[float, float, float] | tuple[float, None, None]
"""A value and the bounds of its interval, where it has one."""
_Point = tuple[float, float, str, str]
"""Across, up, name and color."""

# Where a point's name may stand: how far, and the direction; near places first.
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0.2, 1), (0.2, -1), (1, 0.3), (-1, 0.3))
_PLACES = [(far, right, up) for far in (9, 22, 36, 52, 70, 90, 112, 136) for right, up in _DIRECTIONS]


@dataclass(frozen=True)
class Plot:
    """A picture."""

    name: str
    """File name without its ending; unique among the plots of a report."""
    kind: Literal["scatter", "bars", "heat_map"]
    title: str
    text: str
    """What it shows, for those who do not see it."""
    png: bytes


def draw(report: EvaluationReport) -> list[Plot]:
    """
    The scatter of safety and utility, the categories of each set with each judge, and the adapters' heat maps.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = [_scatter(report)] if report.judges("harmful") else []
    for of_set in SETS:
        for judge in report.judges(of_set):
            plot = _bars(report, of_set, judge)
            if plot is not None:
                drawn.append(plot)
    drawn += [_heat_map(model.name, model.audit) for model in report.models if model.audit is not None]
    names: dict[str, int] = {}
    result = []
    for plot in drawn:
        # Names of models that differ in odd characters only.
        names[plot.name] = number = names.get(plot.name, 0) + 1
        result.append(plot if number == 1 else replace(plot, name=f"{plot.name}-{number}"))
    return result


def write_plots(folder: Path, plots: Sequence[Plot], *, overwrite: bool = False) -> list[Path]:
    """
    Write the plots as NAME.png.

    Returns:
        The files.

    Raises:
        FileExistsError: One of the files exists, and `overwrite` is not set; nothing is written then.
    """
    files = [folder / f"{plot.name}.png" for plot in plots]
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists. Name another folder, or give --overwrite.")
    for file, plot in zip(files, plots, strict=True):
        atomic_write(file, plot.png)
    return files


def _scatter(report: EvaluationReport) -> Plot:
    judges = report.judges("harmful")
    x_label, x_values = _utility(report)
    # One below the other, so that the writing stays readable where the page is narrow.
    figure = new_figure(7.6, 4.8 * len(judges))
    axes = figure.subplots(len(judges), 1, squeeze=False)[:, 0]
    texts: list[str] = []
    for axis, (judge, kind) in zip(axes, judges.items(), strict=True):
        points, of_points = _points(axis, report, judge, x_values)
        texts += of_points
        axis.set_ylabel(
            "harmful requests refused, coherently\n(more is safer)"
            if kind == "refusal"
            else "attack success rate\n(fewer is safer)"
        )
        axis.set_ylim(-4, 104)
        axis.set_yticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
        axis.set_xlabel(x_label)
        axis.margins(x=0.2)
        axis.set_title(f"Judge: {_label(judge, 60)}", fontsize=10)
        _tidy(axis, "both")
        if points:
            _place_labels(figure, axis, points)
        else:
            axis.text(0.5, 0.5, "nothing to show", ha="center", transform=axis.transAxes)
    title = "Safety and utility"
    text = f"{title}; across: {' '.join(x_label.split())}. {'; '.join(texts)}."
    return Plot("scatter", "scatter", title, text, png(figure))


def _points(
    axis: Axes, report: EvaluationReport, judge: str, x_values: Sequence[_Interval | None]
) -> tuple[list[_Point], list[str]]:
    """Draw the models with their intervals, where both values are known; returns where, and the same in words."""
    points, texts = [], []
    for number, (model, x) in enumerate(zip(report.models, x_values, strict=True)):
        found = model.harmful.judgements.get(judge)
        y = None if found is None else _safety(found).estimate
        if x is None or y is None:
            continue
        value, lower, upper = x
        rate, low, high = y
        color = _COLORS[number % len(_COLORS)]
        axis.errorbar(
            value,
            100 * rate,
            xerr=None if lower is None or upper is None else [[max(0.0, value - lower)], [max(0.0, upper - value)]],
            yerr=[[100 * max(0.0, rate - low)], [100 * max(0.0, high - rate)]],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=color,
            ecolor=color,
            elinewidth=1.4,
            capsize=3,
            markersize=max(5, 11 - 1.5 * number),  # two models in one place are both seen
            alpha=0.85,
        )
        points.append((value, 100 * rate, _label(model.name), color))
        texts.append(f"{visible(model.name)}: {value:.4g}, {percent(rate)}")
    return points, texts


def _utility(report: EvaluationReport) -> tuple[str, list[_Interval | None]]:
    """What stands on the scatter's axis across, and its value and interval for every model."""
    if any(model.task is not None for model in report.models):
        return (
            "held-out task loss, nats per response token\n(less is better)",
            [None if model.task is None else (model.task.loss, None, None) for model in report.models],
        )
    for judge in report.judges("harmless"):
        values: list[_Interval | None] = []
        for model in report.models:
            found = model.harmless.judgements.get(judge)
            refused = None if found is None or found.refused is None else found.refused.estimate
            values.append(None if refused is None else (100 * refused[0], 100 * refused[1], 100 * refused[2]))
        if any(value is not None for value in values):
            label = f"harmless requests refused, %, by {_label(judge)}\n(fewer is better; there is no task set)"
            return label, values
    return (
        "KL divergence on harmless requests, nats per token\n(no task set, and no judge of refusals)",
        [(model.harmless.kl.value, *model.harmless.kl.interval) for model in report.models],
    )


def _safety(found: Judgement) -> Proportion:
    return found.answered if found.refused is None else found.refused


def _place_labels(figure: Figure, axis: Axes, points: Sequence[_Point]) -> None:
    """Name the points where there is room: at the nearest place that covers no point and no other name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    taken = []
    for x, y, _, _ in points:
        column, row = axis.transData.transform((x, y))
        taken.append(Bbox.from_bounds(column - 9, row - 9, 18, 18))
    for point in points:
        taken.append(_place_label(axis, point, frame, taken))


def _place_label(axis: Axes, point: _Point, frame: Bbox, taken: Sequence[Bbox]) -> Bbox:
    """Name a point; returns the place that the name takes."""
    best, least = _PLACES[0], float("inf")
    for place in _PLACES:
        text = _annotate(axis, point, place)
        box = text.get_window_extent()
        text.remove()
        outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
        overlaps = sum(box.overlaps(other) for other in taken) + 2 * outside
        if overlaps < least:
            best, least = place, overlaps
        if not overlaps:
            break
    return _annotate(axis, point, best).get_window_extent()


def _annotate(axis: Axes, point: _Point, place: tuple[int, float, float]) -> Annotation:
    (x, y, name, color), (distance, right, up) = point, place
    line = {"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.7, "shrinkB": 5}
    return axis.annotate(
        name,
        (x, y),
        xytext=(right * min(distance, 40), up * distance),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="center",
        fontsize=9,
        color=color,
        arrowprops=line if distance > 9 else None,
    )


def _bars(report: EvaluationReport, of_set: SetName, judge: str) -> Plot | None:
    """Categories downwards; attack success on harmful requests, refusals of harmless ones."""
    found: list[tuple[int, str, dict[str, Proportion]]] = []
    for number, model in enumerate(report.models):
        judgement = model.on(of_set).judgements.get(judge)
        if judgement is not None:
            values = judgement.answered_by_category if of_set == "harmful" else judgement.refused_by_category
            if values:
                found.append((number, model.name, values))
    if not found:
        return None
    names = [name for name in categories(report, of_set) if any(name in values for _, _, values in found)]
    figure = new_figure(8.6, 1.6 + len(names) * max(0.34, 0.17 * len(found) + 0.1))
    axis = figure.subplots()
    height = 0.8 / len(found)
    for place, (number, model_name, values) in enumerate(found):
        color, offset = _COLORS[number % len(_COLORS)], (place + 0.5) * height - 0.4
        _bars_of_model(axis, [values.get(name) for name in names], color, offset, height, _label(model_name))
    totals = {name: max(values[name].total for _, _, values in found if name in values) for name in names}
    axis.set_yticks(range(len(names)), [f"{_label(name, 40)} ({totals[name]})" for name in names], fontsize=8.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
    what = "Attack success on harmful requests" if of_set == "harmful" else "Harmless requests refused"
    axis.set_title(f"{what}, by category (requests)\njudge: {_label(judge, 60)}", fontsize=10)
    _tidy(axis, "x")
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(found)),
        fontsize=9,
        frameon=False,
    )
    title = f"{what} by category; judge: {visible(judge)}"
    text = f"{title}. Bars with Wilson 95 % intervals; the figures stand in the table of categories."
    return Plot(f"categories-{of_set}-{_file_name(judge)}", "bars", title, text, png(figure))


def _bars_of_model(
    axis: Axes, values: Sequence[Proportion | None], color: str, offset: float, height: float, label: str
) -> None:
    """One bar a category, each at its number and the model's offset."""
    for row, value in enumerate(values):
        if value is None or value.estimate is None:
            continue
        rate, lower, upper = value.estimate
        # Tells the models apart where there is no bar.
        axis.plot(100 * rate, row + offset, "o", color=color, markersize=3.5, clip_on=False, zorder=4)
        axis.barh(
            row + offset,
            100 * rate,
            height=0.9 * height,
            color=color,
            label=label if row == 0 else None,
            xerr=[[100 * max(0.0, rate - lower)], [100 * max(0.0, upper - rate)]],
            error_kw={"elinewidth": 1, "capsize": 1.5, "ecolor": "#999999"},
        )


def _heat_map(name: str, audit: AuditReport) -> Plot:
    title = f"{visible(name)}: update in the safety directions, by layer and module"
    text = f"{title}. {audit.summary()}"
    return Plot(f"heat-map-{_file_name(name)}", "heat_map", title, text, png(heat_map(audit)))


def _tidy(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    axis.grid(axis=grid, alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _label(name: str, longest: int = 32) -> str:
    """A name for a picture, where "$" would begin a formula."""
    name = " ".join(visible(name).split())
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60] or "unnamed"
