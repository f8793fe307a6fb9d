"""`salora evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..models.loading import LoadingOptions
from .loading_options import takes_loading_options
from .printing import print_table


@takes_loading_options
def evaluate(
    base_model: Annotated[str, typer.Argument(help="The base model: a folder or a hub repository.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted evaluation continues there.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="An adapter on it, a folder or a hub repository; can be repeated."),
    ] = None,
    merged: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="A whole model of the same tokenizer, such as a merged one."),
    ] = None,
    harmful: Annotated[
        str, typer.Option(help="Harmful requests: 'builtin' (held out), a file, a hub data set.")
    ] = "builtin",
    harmless: Annotated[
        str, typer.Option(help="Requests that should be answered: 'builtin', a file, a hub data set.")
    ] = "builtin",
    task: Annotated[
        str | None, typer.Option(help="Held-out conversations, for the loss: a file or a hub data set.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:ARG]", help="Judge of the answers; can be repeated. [keyword]")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Take so many requests of each set, spread over the categories.")
    ] = None,
    num_task_rows: Annotated[int | None, typer.Option(min=1, help="Take so many rows of the task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of requests and task rows.")] = 0,
    perplexity_threshold: Annotated[
        float | None, typer.Option(help="Answers of a higher perplexity under the base model count as broken.")
    ] = None,
    kl_tokens: Annotated[int, typer.Option(min=1, help="First answer tokens for the KL divergence.")] = 5,
    safety_module: Annotated[
        str | None, typer.Option(help="Audit the adapters against this one; default: each against its own.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of lm-eval; can be repeated.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task of lm-eval.")] = None,
    lm_eval_include_path: Annotated[Path | None, typer.Option(help="A folder with more tasks of lm-eval.")] = None,
    *,
    loading: LoadingOptions,
    title: Annotated[str | None, typer.Option(help="Title of the report.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete what an evaluation left there, and start again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure refusals, over-refusal, coherence and task loss of a model, its adapters and merged models."""
    from ..evaluation.coherence import PERPLEXITY_THRESHOLD
    from ..evaluation.evaluate import evaluate

    report = evaluate(
        base_model,
        _named(adapter or [], "--adapter"),
        _named(merged or [], "--merged"),
        out=out,
        harmful=harmful,
        harmless=harmless,
        task=task,
        judges=judge or ["keyword"],
        num_requests=num_requests,
        num_task_rows=num_task_rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        perplexity_threshold=PERPLEXITY_THRESHOLD if perplexity_threshold is None else perplexity_threshold,
        kl_tokens=kl_tokens,
        safety_module=safety_module,
        lm_eval_tasks=lm_eval or [],
        lm_eval_limit=lm_eval_limit,
        lm_eval_include_path=lm_eval_include_path,
        title=title,
        overwrite=overwrite,
        **asdict(loading),
    )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    from ..evaluation.reports.tables import table

    print_table(table(report))
    typer.echo(f"Wrote {out}.")


def _named(values: list[str], option: str) -> dict[str, str]:
    """NAME=PATH, or PATH, whose last part is the name then."""
    result: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        # A path may hold a "=" itself.
        if not separator or "/" in name or Path(value).exists():
            name, path = Path(value).name, value
        if not name or not path:
            raise ValueError(f"{option} {value}: give NAME=PATH, or a path.")
        if name in result:
            raise ValueError(f"{option} {value}: {name!r} names two of them. Give NAME=PATH.")
        result[name] = path
    return result
