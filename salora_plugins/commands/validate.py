"""`salora validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.loading import LoadingOptions, load_model, load_tokenizer
from .loading_options import takes_loading_options
from .parameters import png_file
from .printing import print_report


@takes_loading_options
def validate(
    file: Annotated[str, typer.Argument(help="A safety module: a file, a folder with one, or a hub repository.")],
    model: Annotated[str, typer.Option(help="The model that it belongs to: a folder or a hub repository.")],
    harmful: Annotated[
        str, typer.Option(help="Harmful requests: 'builtin' (held out), a file, a hub data set.")
    ] = "builtin",
    harmless: Annotated[
        str, typer.Option(help="Harmless requests, with answers or without: 'builtin', a file, a hub data set.")
    ] = "builtin",
    num_requests: Annotated[int, typer.Option(min=2, help="Requests of each kind, at the most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 16,
    *,
    loading: LoadingOptions,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the requests' selection and the random directions.")] = 0,
    plot: Annotated[Path | None, typer.Option(callback=png_file, help="Draw what the model loses (.png).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Remove a safety module's directions from the running model and see whether its refusals go with them."""
    from ..evaluation.reports.validation_report import write_plot
    from ..evaluation.request_sets import load_requests
    from ..evaluation.validation import validate
    from ..safety_module import SafetyModule

    safety_module = SafetyModule.load(file)  # rather fail now than after loading the model
    asked, everyday = (
        load_requests(source, option=option, num=num_requests, seed=seed)
        for option, source in (("harmful", harmful), ("harmless", harmless))
    )
    loaded = load_model(model, loading)
    tokenizer = load_tokenizer(model, loading)
    if tokenizer is None:
        raise ValueError(f"--model {model}: no tokenizer was found beside the model.")
    report = validate(
        safety_module, loaded, tokenizer, harmful=asked, harmless=everyday, batch_size=batch_size, seed=seed
    )
    print_report(report, as_json=as_json)
    if plot is not None:
        write_plot(plot, report)
        typer.echo(f"Wrote {plot}.", err=as_json)
