"""`salora audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .parameters import png_file
from .printing import print_report

INSIDE = 3
"""Exit code where the verdict is not "outside"; 1 is an error, 2 a wrong use of the command."""


def audit(
    adapter: Annotated[Path, typer.Argument(help="The saved adapter, of SaLoRA or any other LoRA: a folder.")],
    safety_module: Annotated[
        str | None,
        typer.Option(help="The safety module: a file, a folder, a hub repository. Default: beside the adapter."),
    ] = None,
    max_share: Annotated[
        float, typer.Option(help="Largest share of a module's update in the safety directions that passes.")
    ] = 1e-5,
    plot: Annotated[
        Path | None, typer.Option(callback=png_file, help="Draw the shares, layer by module (.png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Show how much of an adapter's update lies in the safety directions.

    Exit code 3: more than --max-share, or the weights are not those that the safety module beside them was saved with.
    """
    from ..adapters.audit import audit, write_heat_map

    report = audit(adapter, safety_module, max_share=max_share)
    print_report(report, as_json=as_json)
    if plot is not None:
        write_heat_map(plot, report)
        typer.echo(f"Wrote {plot}.", err=as_json)
    if not report.is_outside:
        raise typer.Exit(INSIDE)
