"""`salora doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..models.loading import LoadingOptions
from ..options import OPTIONS
from .calibrate import NOT_OF_CALIBRATION
from .config_options import takes_config_options
from .loading_options import takes_loading_options
from .parameters import target_modules_of
from .printing import print_report, working


@takes_config_options([option for name, option in OPTIONS.items() if name not in NOT_OF_CALIBRATION])
@takes_loading_options
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model that is to be calibrated: a folder or a hub repository.")
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Module name, repeatable or with commas; one regular expression; or 'all-linear'."),
    ] = None,
    *,
    options: dict[str, Any],
    loading: LoadingOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Say what stands in the way of a run: versions, hosts, devices, cache; of a model, whether it can be calibrated.

    With a model it takes the options of `salora calibrate`; no weights are read or downloaded. Exit code 1: a problem.
    """
    with working("Importing torch, transformers and what is installed beside them"):
        from ..config import SaLoRAConfig
        from ..doctor import Diagnosis, examine_installation, examine_model

        findings = examine_installation()
    if model is not None:
        loading.check()
        config = SaLoRAConfig(target_modules=target_modules_of(target_modules), **options)
        with working(f"Looking at {model}"):
            findings += examine_model(model, config, loading)
    elif target_modules or options != {n: OPTIONS[n].default for n in options} or loading != LoadingOptions():
        raise ValueError("These options are about a model. Name it: salora doctor MODEL.")
    diagnosis = Diagnosis(findings)
    print_report(diagnosis, as_json=as_json)
    if diagnosis.problems:
        raise typer.Exit(1)
