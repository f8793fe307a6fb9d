"""How the commands show what they found."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import RenderableType

_AS_WIDE_AS_IT_IS = 10_000


class Report(Protocol):
    """What was found, in three forms."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""

    def table(self) -> RenderableType:
        """For a terminal."""

    def summary(self) -> str:
        """A few lines that say what the table means."""


def print_table(table: RenderableType) -> None:
    """
    Print it for the terminal's width. A file and a pipe have none, unless COLUMNS says one: nothing is folded there.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _AS_WIDE_AS_IT_IS
    console.print(table, crop=False)


def working(on: str) -> AbstractContextManager[Any]:
    """While it lasts, a line on a terminal says what takes so long; a file or a pipe gets none."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"{escape(on)} ...")


def print_report(report: Report, *, as_json: bool) -> None:
    """Print the JSON values, or the table and the summary."""
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    print_table(report.table())
    typer.echo(report.summary())
