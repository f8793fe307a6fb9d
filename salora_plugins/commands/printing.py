"""How the commands show what they found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.table import Table


class Report(Protocol):
    """What was found, in three forms."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""

    def table(self) -> Table:
        """For a terminal."""

    def summary(self) -> str:
        """A few lines that say what the table means."""


def print_report(report: Report, *, as_json: bool) -> None:
    """Print the JSON values, or the table and the summary."""
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console

    Console().print(report.table())
    typer.echo(report.summary())
