"""`salora safe-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import print_report


def safe_lora(
    adapter: Annotated[Path, typer.Argument(help="The saved LoRA adapter: a folder.")],
    base: Annotated[str, typer.Option(help="The model before its alignment: a folder or a hub repository.")],
    aligned: Annotated[str, typer.Option(help="The model after it, that the adapter was trained on.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    threshold: Annotated[
        float | None,
        typer.Option(help="Modules whose update has a smaller cosine with its projection are projected. [0.5]"),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Instead: so many modules, those of the smallest cosines.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 of the written weights.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the repositories' own model code.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there; other files stay.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Project the layers of an adapter that move away from the alignment onto it (Safe LoRA, arXiv 2405.16833)."""
    from ..repair.safe_lora import apply_safe_lora

    report = apply_safe_lora(
        adapter,
        base,
        aligned,
        threshold=threshold,
        num_layers=num_layers,
        out=out,
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"Wrote {out}, a plain LoRA adapter.")
