"""`salora compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .printing import print_table

if TYPE_CHECKING:
    from ..evaluation.reports.plots import Plot


def compare(
    reports: Annotated[list[Path], typer.Argument(help="Reports of `salora evaluate`: files or their folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write all of it, with plots and answers, as one page (.html), or the tables (.md)."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the plots into this folder (.png).")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the comparison.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the models of one or more evaluations beside each other: verdict, tables, plots, a page with all answers."""
    from ..evaluation.reports.comparison import compare

    # Rather now than after the work.
    if out is not None and out.suffix.lower() not in (".html", ".md"):
        raise ValueError(f"--out {out}: a page ends in .html, and the tables in .md. Name such a file.")
    if out is not None and out.exists() and (out.is_dir() or not overwrite):
        raise FileExistsError(
            f"{out} exists. Name another file" + (" to write." if out.is_dir() else ", or give --overwrite.")
        )
    comparison = compare(reports, title=title)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        from ..evaluation.reports.tables import table
        from ..support.texts import visible

        print_table(table(comparison.report))
        for note in comparison.notes:
            typer.echo(f"Note: {visible(note)}")
    is_page = out is not None and out.suffix.lower() == ".html"
    drawn: list[Plot] = []
    if is_page or plots is not None:
        from ..evaluation.reports.plots import draw, write_plots

        drawn = draw(comparison.report)
    if plots is not None:  # before `out`, which is not to be written where one of them exists
        for file in write_plots(plots, drawn, overwrite=overwrite):
            typer.echo(f"Wrote {file}.", err=as_json)
    if out is None:
        return
    if is_page:
        from ..evaluation.reports.page import write_page

        write_page(out, comparison, drawn)
    else:
        from ..evaluation.reports.markdown import write_markdown

        write_markdown(out, comparison)
    typer.echo(f"Wrote {out}.", err=as_json)
