"""`axolotl salora-calibrate`: the safety module that a training config would calibrate, computed beforehand."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("salora-calibrate")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The safety module to write. Default: safety_module.safetensors in the config's output_dir.",
)
def salora_calibrate(config: str, out: Path | None) -> None:
    """Compute the safety module for a config with `adapter: salora`, without training."""
    # Private part of Axolotl: what its own commands read a config with, plugins and validation included.
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import ModelLoader, load_tokenizer

    from ...calibration import calibrate_with
    from ...inspection import summary
    from ...safety_module import check_replaceable
    from ...support.files import check_writable
    from .args import ADAPTER
    from .translation import in_the_terms_of_the_file, salora_config

    cfg = load_cfg(config)
    if cfg.adapter != ADAPTER:
        raise click.ClickException(f"{config}: adapter: {cfg.adapter}. Set adapter: salora to calibrate for it.")
    if (cfg.salora or {}).get("safety_module"):
        raise click.ClickException(
            f"{config}: salora.safety_module: {cfg.salora['safety_module']} is set, so that nothing would be "
            "calibrated. Remove it."
        )
    out = out or Path(cfg.output_dir) / "safety_module.safetensors"
    try:
        check_replaceable(out, "--out")
        check_writable(out)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    # The base model as Axolotl prepares it for training, quantized if the config says so, but without an adapter.
    model, _ = ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()
    try:
        with in_the_terms_of_the_file():
            safety_module = calibrate_with(model, salora_config(model, cfg))
        safety_module.save(out)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(summary(safety_module))
    click.echo(f"Wrote {out}. Train with it: salora.safety_module: {out}")
