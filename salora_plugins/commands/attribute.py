"""`salora attribute`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.loading import LoadingOptions, load_model, load_tokenizer
from .loading_options import takes_loading_options
from .parameters import target_modules_of
from .printing import print_report

_Families = Annotated[
    list[str] | None,
    typer.Option(metavar="[ranks|snip|wanda]", help="What is removed; can be repeated. [all of them]"),
]
_Ranks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K_S:K_U[/OUTPUTS]",
        help="Safety directions that are removed, freed of utility directions; scaled to each layer where they "
        "are for OUTPUTS; can be repeated. [1:0, 6:146 and 96:646, per 4096]",
    ),
]
_Entries = Annotated[
    list[str] | None,
    typer.Option(
        metavar="Q:P",
        help="Percent of each row by safety that are removed, without those by utility; can be repeated. [3:9, "
        "5:7, 7:5, 9:3]",
    ),
]
_Tasks = Annotated[list[str] | None, typer.Option(metavar="TASK", help="A task of lm-eval; can be repeated.")]


@takes_loading_options
def attribute(
    model: Annotated[str, typer.Argument(help="The aligned model: a folder or a hub repository.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted attribution continues there.")],
    family: _Families = None,
    ranks: _Ranks = None,
    entries: _Entries = None,
    random_draws: Annotated[int, typer.Option(min=0, help="Random controls of every point.")] = 1,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Module name, repeatable or with commas; or one regular expression. [all-linear]"),
    ] = None,
    safety_data: Annotated[
        list[str] | None,
        typer.Option(help="Harmful requests, with refusals or without; can be repeated. [builtin]"),
    ] = None,
    num_safety_samples: Annotated[int, typer.Option(min=1, help="Refusals to find directions and scores in.")] = 128,
    utility_data: Annotated[
        list[str] | None,
        typer.Option(help="Other requests, with answers or without; can be repeated. [builtin]"),
    ] = None,
    num_utility_samples: Annotated[int, typer.Option(min=1, help="Other answers to find directions in.")] = 128,
    num_held_out: Annotated[int, typer.Option(min=1, help="Of utility_data, held out for the loss.")] = 32,
    harmful: Annotated[
        str, typer.Option(help="Harmful requests to measure on: 'builtin' (held out), a file, a hub data set.")
    ] = "builtin",
    harmless: Annotated[
        str, typer.Option(help="Requests that should be answered: 'builtin', a file, a hub data set.")
    ] = "builtin",
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of each kind, at the most.")] = 64,
    judge: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:ARG]", help="Judge of the answers; can be repeated. [keyword]")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row; longer ones are cut.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or requests at once.")] = 16,
    lm_eval: _Tasks = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task of lm-eval.")] = None,
    lm_eval_include_path: Annotated[Path | None, typer.Option(help="A folder with more tasks of lm-eval.")] = None,
    *,
    loading: LoadingOptions,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rows' and requests' choice and random controls.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Delete what an attribution left there, and start again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Remove the directions and the weights that matter for refusals alone, and see what else the model loses."""
    from ..attribution import attribute
    from ..attribution.attributing import asked_states
    from ..attribution.grid import FAMILIES
    from ..evaluation.judges.named import load_judge
    from ..rows.sources import named_by_a_host

    asked_states(family or FAMILIES, ranks, entries, random_draws)  # rather fail now than after loading the model
    for spec in judge or []:
        load_judge(spec)
    loaded = load_model(model, loading)
    tokenizer = load_tokenizer(model, loading)
    if tokenizer is None:
        raise ValueError(f"{model}: no tokenizer was found beside the model.")
    report = attribute(
        loaded,
        tokenizer,
        out=out,
        families=family or FAMILIES,
        ranks=ranks,
        entries=entries,
        random_draws=random_draws,
        target_modules=target_modules_of(target_modules) or "all-linear",
        safety_data=named_by_a_host(safety_data, "--safety-data") if safety_data else "builtin",
        num_safety_samples=num_safety_samples,
        utility_data=named_by_a_host(utility_data, "--utility-data") if utility_data else "builtin",
        num_utility_samples=num_utility_samples,
        num_held_out=num_held_out,
        harmful=harmful,
        harmless=harmless,
        num_requests=num_requests,
        judges=judge or ["keyword"],
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        lm_eval_tasks=lm_eval or [],
        lm_eval_limit=lm_eval_limit,
        lm_eval_include_path=lm_eval_include_path,
        overwrite=overwrite,
    )
    print_report(report, as_json=as_json)
    typer.echo(f"Wrote {out}.", err=as_json)
