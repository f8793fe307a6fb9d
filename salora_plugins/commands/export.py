"""`salora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import print_report


def export(
    adapter: Annotated[Path, typer.Argument(help="The saved adapter, of SaLoRA or any other LoRA: a folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    max_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the exported adapter. Default: SaLoRA's r; the saved rank of other adapters."),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Instead: the smallest rank that keeps this share of every update's squared norm (0.99)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; in 16 bits the certificate holds to about 1e-3.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there; other files stay.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a saved adapter at one rank, such as a lower one, and show what of its update is lost."""
    from ..adapters.export import export_adapter

    report = export_adapter(adapter, out, max_rank=max_rank, share=share, dtype=dtype, overwrite=overwrite)
    print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"Wrote {out}, a plain LoRA adapter.")
