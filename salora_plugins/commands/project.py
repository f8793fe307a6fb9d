"""`salora project`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import print_report


def project(
    adapter: Annotated[Path, typer.Argument(help="The saved LoRA adapter: a folder.")],
    safety_module: Annotated[
        str, typer.Option(help="The safety module of its base model: a file, a folder, a hub repository.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; in 16 bits the certificate holds to about 1e-3.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there; other files stay.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write the closest adapter whose update avoids the safety directions, and show what is removed."""
    from ..adapters.projection import project_adapter

    report = project_adapter(adapter, safety_module, out, dtype=dtype, overwrite=overwrite)
    print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"Wrote {out}, a plain LoRA adapter.")
