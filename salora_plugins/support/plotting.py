"""Pictures by matplotlib, which is optional: without a display, the same everywhere."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """
    An empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: run `pip install 'salora-plugins[plot]'`.") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def save_png(path: str | os.PathLike, figure: Figure) -> None:
    """Write the figure as a PNG file, all of it or nothing."""
    atomic_write(path, png(figure))
