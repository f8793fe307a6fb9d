"""`salora restore`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.loading import LoadingOptions
from ..options import OPTIONS
from ..repair.strength import StrengthSearch
from .config_options import takes_config_options
from .loading_options import takes_loading_options
from .parameters import target_modules_of
from .printing import print_report
from .search_options import takes_search_options

_CALIBRATION = (
    "safety_data",
    "num_safety_samples",
    "calibration_batch_size",
    "calibration_max_length",
    "calibration_engine",
    "calibration_cache",
    "seed",
)


@takes_config_options([OPTIONS[name] for name in _CALIBRATION])
@takes_loading_options
@takes_search_options
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
        list[str] | None,
        typer.Option(
            help="Where no adapter is given: module name, repeatable or with commas; one regular expression; or "
            "'all-linear'. [all linear layers]"
        ),
    ] = None,
    *,
    search: StrengthSearch | None,
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

    if search is not None:
        search = replace(search, seed=options["seed"], batch_size=options["calibration_batch_size"])
    given = {name: value for name, value in options.items() if value != OPTIONS[name].default}
    if search is not None and safety_module is not None:
        for name in ("seed", "calibration_batch_size"):  # the sweep's
            given.pop(name, None)
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
        target_modules=target_modules_of(target_modules),
        dtype=dtype_of_adapter,
        overwrite=overwrite,
        loading=loading,
        **given,
    )
    print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"Wrote {out}, {'a model' if report.form == 'merged' else 'a plain LoRA adapter'}.")
