"""`salora calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.loading import LoadingOptions, load_model, load_tokenizer
from ..options import OPTIONS
from ..support.files import check_writable
from .config_options import takes_config_options
from .loading_options import takes_loading_options
from .parameters import target_modules_of

NOT_OF_CALIBRATION = frozenset({"safety_module", "init", "task_rank", "task_data", "num_task_samples"})
"""Options of an adapter that a calibration has no use for: its result, and what is for the start of a training."""


@takes_config_options([option for name, option in OPTIONS.items() if name not in NOT_OF_CALIBRATION])
@takes_loading_options
def calibrate(
    model: Annotated[str, typer.Option(help="The aligned model: a folder or a hub repository.")],
    out: Annotated[Path, typer.Option(help="The safety module to write (.safetensors).")],
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Module name, repeatable or with commas; one regular expression; or 'all-linear'."),
    ] = None,
    *,
    options: dict[str, Any],
    loading: LoadingOptions,
) -> None:
    """Compute the safety module of a model, to be used by any number of training runs."""
    from ..config import SaLoRAConfig
    from ..safety_module import check_replaceable

    config = SaLoRAConfig(target_modules=target_modules_of(target_modules), **options)
    if loading.load_in_4bit and loading.load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit are both given. Choose one.")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder. Name the file to write, such as {out / 'salora.safetensors'}.")
    out = out.expanduser()
    check_replaceable(out, "--out")
    check_writable(out)  # rather fail now than after the calibration

    from ..calibration import calibrate_with
    from ..inspection import summary

    loaded = load_model(model, loading)
    config.tokenizer = load_tokenizer(model, loading)
    safety_module = calibrate_with(loaded, config)
    safety_module.save(out)
    typer.echo(summary(safety_module))
    typer.echo(
        f"Wrote {out}. Use it with SaLoRAConfig(safety_module={str(out)!r}), or `salora.safety_module` in Axolotl."
    )
