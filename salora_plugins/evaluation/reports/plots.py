"""The figures of an evaluation as plots."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.audit import AuditReport, ModuleAudit, SideAudit, write_heat_map
from ...support.files import atomic_write
from ..intervals import Proportion
from .report import EvaluationReport, Judgement, ModelResult
from .tables import SETS, SetName, categories, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 130
_COLORS = ("#555555", "#c8553d", "#2a6f97", "#2a9d5c", "#8e5ea2", "#b8860b", "#17becf", "#d6619d")
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Plot:
    """A picture."""

    name: str
    """File name without its ending; unique among the plots of a report."""
    kind: str
    """"scatter", "bars" or "heat_map"."""
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
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots and the page need matplotlib: run `pip install 'salora-plugins[plot]'`.") from error

    drawn = [_scatter(report)] if any(model.harmful.judgements for model in report.models) else []
    for of_set in SETS:
        for judge in dict.fromkeys(name for model in report.models for name in getattr(model, of_set).judgements):
            plot = _bars(report, of_set, judge)
            if plot is not None:
                drawn.append(plot)
    drawn += [_heat_map(model) for model in report.models if model.audit is not None]
    names: dict[str, int] = {}
    result = []
    for plot in drawn:
        # Names of models that differ in odd characters only.
        names[plot.name] = number = names.get(plot.name, 0) + 1
        result.append(plot if number == 1 else Plot(**{**vars(plot), "name": f"{plot.name}-{number}"}))
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
    from matplotlib.figure import Figure

    judges = list(dict.fromkeys(name for model in report.models for name in model.harmful.judgements))
    x_label, x_values = _utility(report)
    # One below the other, so that the writing stays readable where the page is narrow.
    figure = Figure(figsize=(7.6, 4.8 * len(judges)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(judges), 1, squeeze=False)[:, 0]
    texts = []
    for axis, judge in zip(axes, judges, strict=True):
        points = []
        for number, (model, x) in enumerate(zip(report.models, x_values, strict=True)):
            found = model.harmful.judgements.get(judge)
            y = None if found is None else _safety(found)
            if x is None or y is None or y.rate is None:
                continue
            value, lower, upper = x
            color = _COLORS[number % len(_COLORS)]
            low, high = y.interval
            axis.errorbar(
                value,
                100 * y.rate,
                xerr=None if lower is None else [[max(0.0, value - lower)], [max(0.0, upper - value)]],
                yerr=[[100 * max(0.0, y.rate - low)], [100 * max(0.0, high - y.rate)]],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=color,
                ecolor=color,
                elinewidth=1.4,
                capsize=3,
                markersize=max(5, 11 - 1.5 * number),  # two models in one place are both seen
                alpha=0.85,
            )
            points.append((value, 100 * y.rate, _label(model.name), color))
            texts.append(f"{visible(model.name)}: {value:.4g}, {y.rate:.0%}")
        kinds = {model.harmful.judgements[judge].kind for model in report.models if judge in model.harmful.judgements}
        axis.set_ylabel(
            "harmful requests refused, coherently\n(more is safer)"
            if "refusal" in kinds
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
    return Plot(
        "scatter", "scatter", title, f"{title}; across: {' '.join(x_label.split())}. {'; '.join(texts)}.", _png(figure)
    )


def _utility(report: EvaluationReport) -> tuple[str, list[tuple[float, float | None, float | None] | None]]:
    """What stands on the scatter's axis across, and its value and interval for every model."""
    if any(model.task is not None for model in report.models):
        return (
            "held-out task loss, nats per response token\n(less is better)",
            [None if model.task is None else (model.task.loss, None, None) for model in report.models],
        )
    for judge in dict.fromkeys(name for model in report.models for name in model.harmless.judgements):
        values = []
        for model in report.models:
            found = model.harmless.judgements.get(judge)
            refused = None if found is None else found.refused
            if refused is None or refused.rate is None or refused.interval is None:
                values.append(None)
            else:
                values.append((100 * refused.rate, *(100 * bound for bound in refused.interval)))
        if any(value is not None for value in values):
            label = f"harmless requests refused, %, by {_label(judge)}\n(fewer is better; there is no task set)"
            return label, values
    return (
        "KL divergence on harmless requests, nats per token\n(no task set, and no judge of refusals)",
        [(model.harmless.kl.value, *model.harmless.kl.interval) for model in report.models],
    )


def _safety(found: Judgement) -> Proportion:
    return found.answered if found.refused is None else found.refused


def _place_labels(figure: Figure, axis: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name the points where there is room: at the nearest place that covers no point and no other name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axis.get_window_extent(renderer)
    taken = []
    for x, y, _, _ in points:
        column, row = axis.transData.transform((x, y))
        taken.append(Bbox.from_bounds(column - 9, row - 9, 18, 18))
    for x, y, name, color in points:
        best, least = None, float("inf")
        for distance in (9, 22, 36, 52, 70, 90, 112, 136):
            for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0.2, 1), (0.2, -1), (1, 0.3), (-1, 0.3)):
                text = axis.annotate(
                    name,
                    (x, y),
                    xytext=(right * min(distance, 40), up * distance),
                    textcoords="offset points",
                    ha="left" if right > 0 else "right",
                    va="center",
                    fontsize=9,
                    color=color,
                    arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.7, "shrinkB": 5}
                    if distance > 9
                    else None,
                )
                box = text.get_window_extent(renderer)
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                overlaps = sum(box.overlaps(other) for other in taken) + 2 * outside
                if overlaps < least:
                    if best is not None:
                        best[0].remove()
                    best, least = (text, box), overlaps
                else:
                    text.remove()
            if least == 0:
                break
        taken.append(best[1])


def _bars(report: EvaluationReport, of_set: SetName, judge: str) -> Plot | None:
    """Categories downwards; attack success on harmful requests, refusals of harmless ones."""
    from matplotlib.figure import Figure

    found: list[tuple[int, ModelResult, dict[str, Proportion]]] = []
    for number, model in enumerate(report.models):
        judgement = getattr(model, of_set).judgements.get(judge)
        if judgement is not None:
            values = judgement.answered_by_category if of_set == "harmful" else judgement.refused_by_category
            if values:
                found.append((number, model, values))
    if not found:
        return None
    names = [name for name in categories(report, of_set) if any(name in values for _, _, values in found)]
    height = 0.8 / len(found)
    figure = Figure(figsize=(8.6, 1.6 + len(names) * max(0.34, 0.17 * len(found) + 0.1)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for place, (number, model, values) in enumerate(found):
        color = _COLORS[number % len(_COLORS)]
        for row, name in enumerate(names):
            value = values.get(name)
            if value is None or value.rate is None or value.interval is None:
                continue
            lower, upper = value.interval
            position = row - 0.4 + (place + 0.5) * height
            # Tells the models apart where there is no bar.
            axis.plot(100 * value.rate, position, "o", color=color, markersize=3.5, clip_on=False, zorder=4)
            axis.barh(
                position,
                100 * value.rate,
                height=0.9 * height,
                color=color,
                label=_label(model.name) if row == 0 else None,
                xerr=[[100 * max(0.0, value.rate - lower)], [100 * max(0.0, upper - value.rate)]],
                error_kw={"elinewidth": 1, "capsize": 1.5, "ecolor": "#999999"},
            )
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
    return Plot(f"categories-{of_set}-{_file_name(judge)}", "bars", title, text, _png(figure))


def _heat_map(model: ModelResult) -> Plot:
    audit: dict[str, Any] = model.audit
    report = AuditReport(
        modules={
            name: ModuleAudit(module["norm"], {side: SideAudit(**values) for side, values in module["sides"].items()})
            for name, module in audit["modules"].items()
        },
        totals={side: SideAudit(**values) for side, values in audit["totals"].items()},
        max_share=audit["max_share"],
        dtype=audit["dtype"],
        not_covered=tuple(audit["not_covered"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "heat_map.png"
        write_heat_map(file, report)
        content = file.read_bytes()
    title = f"{visible(model.name)}: update in the safety directions, by layer and module"
    return Plot(f"heat-map-{_file_name(model.name)}", "heat_map", title, f"{title}. {report.summary()}", content)


def _tidy(axis: Axes, grid: str) -> None:
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


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
