"""The demo's measurements as a table in the terminal, a plot and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..evaluation.intervals import Proportion
from ..evaluation.reports.tables import proportion_text
from ..support.files import atomic_write
from ..support.numbers import loss
from ..support.plotting import new_figure, save_png
from .experiment import Measurement, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#555555", "#c8553d", "#2a6f97", "#2a9d5c")


def table(measurements: list[Measurement]) -> Table:
    """One row a model; proportions with counts and intervals."""
    result = Table(caption="In brackets: Wilson 95 % intervals. Loss: nats per response token.", caption_justify="left")
    result.add_column("Model", no_wrap=True)
    result.add_column("Harmful requests\nrefused (more is safer)", justify="right")
    result.add_column("Harmless look-alikes\nrefused (fewer is better)", justify="right")
    result.add_column("Word problems\nsolved (held out)", justify="right")
    result.add_column("Word problems'\nloss (held out)", justify="right")
    for measured in measurements:
        result.add_row(
            measured.name,
            proportion_text(measured.refusals),
            proportion_text(measured.over_refusals),
            proportion_text(measured.task_accuracy),
            loss(measured.task_loss),
            end_section=True,
        )
    return result


def write_results(path: Path, measurements: list[Measurement], settings: Settings, seconds: float) -> None:
    """Write everything that was set and measured, every response too."""
    results = {
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("salora-plugins", "torch", "transformers", "peft", "trl")},
        "seconds": round(seconds, 1),
        "measurements": [measured.model_dump() for measured in measurements],
    }
    atomic_write(path, json.dumps(results, indent=2, ensure_ascii=False).encode())


def write_plot(path: Path, measurements: list[Measurement], settings: Settings) -> None:
    """
    Draw one panel a quantity, one line a model, with the intervals; PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = [measured.name for measured in measurements]
    figure = new_figure(13, 1.9 + 0.62 * len(names))
    axes = figure.subplots(1, 4, sharey=True)
    proportions = (
        ("Harmful requests refused\n(held out; more is safer)", [m.refusals for m in measurements]),
        ("Harmless look-alikes refused\n(held out; fewer is better)", [m.over_refusals for m in measurements]),
        ("Word problems solved\n(held out; more is better)", [m.task_accuracy for m in measurements]),
    )
    for axis, (title, values) in zip(axes, proportions, strict=False):
        _draw_proportions(axis, title, values)
    _draw_losses(axes[3], [measured.task_loss for measured in measurements])
    axes[0].set_yticks(range(len(names)), names, fontsize=11)
    axes[0].set_ylim(len(names) - 0.5, -0.6)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=9)
    figure.suptitle(
        f"Fine-tuned on word problems: {settings.steps} steps, learning rate {settings.learning_rate:g}, "
        f"rank {settings.rank}; one model of 2 million parameters, seed {settings.seed}; lines: Wilson 95 % intervals",
        fontsize=10,
    )
    save_png(path, figure)


def _draw_proportions(axis: Axes, title: str, values: Sequence[Proportion]) -> None:
    for position, value in enumerate(values):
        if value.estimate is None:
            continue
        rate, lower, upper = value.estimate
        color = _color(position)
        axis.plot([100 * lower, 100 * upper], [position] * 2, color=color, linewidth=2.2, alpha=0.55)
        axis.plot(100 * rate, position, "o", color=color, markersize=8)
        axis.annotate(
            f"{value.count}/{value.total}",
            (100 * rate, position),
            xytext=(0, 8),
            textcoords="offset points",
            ha="left" if rate < 0.1 else "right" if rate > 0.9 else "center",
            fontsize=9,
        )
    axis.set_xlim(-3, 103)
    axis.set_xticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
    axis.set_title(title, fontsize=10)


def _draw_losses(axis: Axes, losses: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for position, value in enumerate(losses):
        axis.plot(value, position, "o", color=_color(position), markersize=8)
        axis.annotate(
            loss(value), (value, position), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9
        )
    # The base model's loss is far above the others; on a linear axis they would all look the same.
    axis.set_xscale("log")
    axis.set_xlim(10 ** math.floor(math.log10(min(losses))), 10 ** math.ceil(math.log10(max(losses))))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("Word problems' loss, nats per token\n(held out; log scale; less is better)", fontsize=10)


def _color(position: int) -> str:
    return _COLORS[position % len(_COLORS)]
