"""`salora restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.loading import LoadingOptions
from ..options import OPTIONS
from .config_options import takes_config_options
from .loading_options import takes_loading_options
from .printing import print_report

_CALIBRATION = (
    "safety_data",
    "num_safety_samples",
    "calibration_batch_size",
    "calibration_max_length",
    "calibration_engine",
    "calibration_cache",
    "seed",
)

_SEARCH_DEFAULTS = ("builtin", "0.25,0.5,1,1.5", "1,2", 32, 0.05)
"""Of the options of the sweep, without which they have no meaning: harmful, alphas, alpha_1s, requests, increase."""


@takes_config_options([OPTIONS[name] for name in _CALIBRATION])
@takes_loading_options
def restore(
    finetuned: Annotated[str, typer.Argument(help="The fine-tuned model: the folder of a LoRA adapter, or a model.")],
    aligned: Annotated[
        str, typer.Option(help="The aligned model that it was made from: a folder or a hub repository.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    unsafe: Annotated[
        str | None,
        typer.Option(
            help="What lost the refusals: an adapter's folder or a model, such as the base before its alignment. "
            "[the fine-tuned one]"
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="combined: one LoRA of adapter and repair; repair: that alone; merged: a whole model. "
            "[combined, or repair for a model]",
            metavar="[combined|repair|merged]",
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the repair.")] = 1.0,
    alpha_1: Annotated[float, typer.Option("--alpha-1", help="Of a layer's first direction over its last.")] = 1.0,
    entropy: Annotated[
        float | None, typer.Option(help="Share of the spectrum's entropy that the safety directions make up. [0.85]")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Cut repairs of a higher rank to it.")] = None,
    safety_module: Annotated[
        str | None, typer.Option(help="Safety directions that were computed before, instead of a calibration.")
    ] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Module name, repeatable, where no adapter is given. [all linear layers]")
    ] = None,
    search_task: Annotated[
        str | None,
        typer.Option(help="Find --alpha and --alpha-1 by a sweep; held-out conversations of the task for its loss."),
    ] = None,
    search_harmful: Annotated[
        str, typer.Option(help="Held-out harmful requests of the sweep: 'builtin', a file, a hub data set.")
    ] = _SEARCH_DEFAULTS[0],
    search_alphas: Annotated[str, typer.Option(help="Strengths to try, with commas.")] = _SEARCH_DEFAULTS[1],
    search_alpha_1s: Annotated[
        str, typer.Option("--search-alpha-1s", help="The same of --alpha-1.")
    ] = _SEARCH_DEFAULTS[2],
    search_requests: Annotated[
        int, typer.Option(min=1, help="Requests and task rows of the sweep.")
    ] = _SEARCH_DEFAULTS[3],
    search_max_loss_increase: Annotated[
        float, typer.Option(help="Largest increase of the task loss that may be chosen, as a share.")
    ] = _SEARCH_DEFAULTS[4],
    *,
    options: dict[str, Any],
    loading: LoadingOptions,
    dtype_of_adapter: Annotated[
        str, typer.Option("--adapter-dtype", help="float32, bfloat16 or float16 of a written adapter.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there; other files stay.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Give a model that was fine-tuned already its refusals back, without training (LSSF, arXiv 2602.00038)."""
    from ..repair.lssf import restore
    from ..repair.strength_search import StrengthSearch

    search = None
    swept = search_harmful, search_alphas, search_alpha_1s, search_requests, search_max_loss_increase
    if search_task is None and swept != _SEARCH_DEFAULTS:
        raise ValueError(
            "--search-...: without --search-task there is no sweep. Give held-out conversations of the task."
        )
    if search_task is not None:
        search = StrengthSearch(
            task=search_task,
            harmful=search_harmful,
            num_requests=search_requests,
            num_task_rows=search_requests,
            alphas=_numbers(search_alphas, "--search-alphas"),
            alpha_1s=_numbers(search_alpha_1s, "--search-alpha-1s"),
            max_loss_increase=search_max_loss_increase,
            seed=options["seed"],
        )
    given = {name: value for name, value in options.items() if value != OPTIONS[name].default}
    if search is not None and safety_module is not None:
        given.pop("seed", None)  # the sweep's
    report = restore(
        finetuned,
        aligned,
        out,
        unsafe=unsafe,
        form=form,
        alpha=alpha,
        alpha_1=alpha_1,
        entropy=entropy,
        max_rank=max_rank,
        search=search,
        safety_module=safety_module,
        target_modules=target_modules or None,
        dtype=dtype_of_adapter,
        overwrite=overwrite,
        loading=loading,
        **given,
    )
    print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"Wrote {out}, {'a model' if report.form == 'merged' else 'a plain LoRA adapter'}.")


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers with commas, such as 0.5,1.") from error
