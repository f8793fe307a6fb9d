"""`salora inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .parameters import png_file
from .printing import print_table


def inspect(
    file: Annotated[str, typer.Argument(help="A safety module: a file, a folder with one, or a hub repository.")],
    plot: Annotated[
        Path | None, typer.Option(callback=png_file, help="Draw the singular values and the captured energy (.png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a safety module holds: ranks and captured energy per layer, and where it comes from."""
    from ..inspection import describe, summary, table, write_plot
    from ..safety_module import SafetyModule

    safety_module = SafetyModule.load(file)
    if as_json:
        typer.echo(json.dumps(describe(safety_module), indent=2))
    else:
        print_table(table(safety_module))
        typer.echo(summary(safety_module))
    if plot is not None:
        write_plot(plot, safety_module)
        typer.echo(f"Wrote {plot}.", err=as_json)
