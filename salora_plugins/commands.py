"""`salora calibrate`, `salora inspect` and `salora export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .hookspecs import hookimpl


@hookimpl
def register_commands(app: typer.Typer) -> None:
    app.command(name="calibrate")(calibrate)
    app.command(name="inspect")(inspect)
    app.command(name="export")(export)


def calibrate(
    model: Annotated[str, typer.Option(help="The aligned model: a folder or a hub repository.")],
    out: Annotated[Path, typer.Option(help="The safety module to write (.safetensors).")],
    safety_data: Annotated[
        str, typer.Option(help="Harmful requests, with responses or without: 'builtin', a file, a hub data set.")
    ] = "builtin",
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Module name, repeatable or with commas; one regular expression; or 'all-linear'."),
    ] = None,
    safety_rank: Annotated[str, typer.Option(help="Output directions per layer, or a share such as 0.95.")] = "32",
    input_safety_rank: Annotated[
        str, typer.Option(help="Input directions per layer, or a share; 0: no input side.")
    ] = "0",
    safety_rank_pattern: Annotated[
        list[str] | None, typer.Option(help="MODULE=RANK for single modules, repeatable.")
    ] = None,
    input_safety_rank_pattern: Annotated[
        list[str] | None, typer.Option(help="MODULE=RANK for single modules, repeatable.")
    ] = None,
    safety_positions: Annotated[
        str | None, typer.Option(help="Positions that count: 'response' or 'predicting'.")
    ] = None,
    basis_method: Annotated[str, typer.Option(help="Method that computes the bases.")] = "salora",
    num_safety_samples: Annotated[int, typer.Option(help="Safety examples to calibrate on.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 512,
    engine: Annotated[str, typer.Option(help="Statistics: 'auto', 'exact' or 'sketched'.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights, or 'auto': as they are stored.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="'auto' splits a large model over GPUs and CPU (see accelerate).")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the weights as QLoRA does (bitsandbytes).")] = False,
    load_in_8bit: Annotated[bool, typer.Option(help="Quantize the weights to 8 bits (bitsandbytes).")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the hub repository.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the repository's own model code.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the selection of examples.")] = 0,
    cache: Annotated[bool, typer.Option(help="Take the result of an equal calibration, and keep this one.")] = True,
) -> None:
    """Compute the safety module of a model, to be used by any number of training runs."""
    from salora_plugins import SaLoRAConfig

    options = SaLoRAConfig(
        target_modules=_target_modules(target_modules),
        safety_data=safety_data,
        safety_rank=_rank("--safety-rank", safety_rank),
        input_safety_rank=_rank("--input-safety-rank", input_safety_rank),
        safety_rank_pattern=_pattern("--safety-rank-pattern", safety_rank_pattern),
        input_safety_rank_pattern=_pattern("--input-safety-rank-pattern", input_safety_rank_pattern),
        safety_positions=safety_positions,
        basis_method=basis_method,
        num_safety_samples=num_safety_samples,
        calibration_batch_size=batch_size,
        calibration_max_length=max_length,
        calibration_engine=engine,
        calibration_cache=cache,
        seed=seed,
    )
    if load_in_4bit and load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit are both given. Choose one.")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder. Name the file to write, such as {out / 'salora.safetensors'}.")
    out.parent.mkdir(parents=True, exist_ok=True)  # rather fail now than after the calibration

    from salora_plugins.calibration import calibrate_with

    from .inspection import summary

    loaded = _load_model(model, dtype, device_map, load_in_4bit, load_in_8bit, revision, trust_remote_code)
    options.tokenizer = _tokenizer(model, revision, trust_remote_code)
    safety_module = calibrate_with(loaded, options)
    safety_module.save(out)
    typer.echo(summary(safety_module))
    typer.echo(
        f"Wrote {out}. Use it with SaLoRAConfig(safety_module={str(out)!r}), or `salora.safety_module` in Axolotl."
    )


def inspect(
    file: Annotated[str, typer.Argument(help="A safety module: a file, a folder with one, or a hub repository.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the singular values and the captured energy (.png).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a safety module holds: ranks and captured energy per layer, and where it comes from."""
    from salora_plugins import SafetyModule

    from .inspection import describe, summary, table, write_plot

    safety_module = SafetyModule.load(file)
    if as_json:
        typer.echo(json.dumps(describe(safety_module), indent=2))
    else:
        from rich.console import Console

        Console().print(table(safety_module))
        typer.echo(summary(safety_module))
    if plot is not None:
        write_plot(plot, safety_module)
        typer.echo(f"Wrote {plot}.", err=as_json)


def export(
    adapter: Annotated[Path, typer.Argument(help="The saved adapter, of SaLoRA or any other LoRA: a folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    max_rank: Annotated[
        int | None, typer.Option(help="Rank of the exported adapter. Default: half of the saved rank.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Instead: the smallest rank that keeps this share of every update's squared norm (0.99)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; in 16 bits the certificate holds to about 1e-3.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a saved adapter at a lower rank, and show what of its update is lost."""
    from .export import export_adapter

    report = export_adapter(adapter, out, max_rank=max_rank, share=share, dtype=dtype, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console

    Console().print(report.table())
    typer.echo(report.summary())
    typer.echo(f"Wrote {out}, a plain LoRA adapter.")


def _load_model(
    source: str,
    dtype: str,
    device_map: str | None,
    load_in_4bit: bool,
    load_in_8bit: bool,
    revision: str | None,
    trust_remote_code: bool,
) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if load_in_4bit:
        import torch

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(source, **options).eval()


def _tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    """None where the model has none; data that needs one says so."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _target_modules(given: list[str] | None) -> list[str] | str | None:
    """A single text with characters that no module name has is a regular expression, as in PEFT."""
    if not given:
        return None
    if len(given) == 1 and (given[0] == "all-linear" or not set(given[0]) <= _NAME_CHARACTERS):
        return given[0]
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,- ")


def _rank(option: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} {text}: give a whole number, or a share between 0 and 1 such as 0.95.") from None


def _pattern(option: str, entries: list[str] | None) -> dict[str, int | float]:
    pattern = {}
    for entry in entries or ():
        module, separator, rank = entry.rpartition("=")
        if not separator or not module:
            raise ValueError(f"{option} {entry}: give MODULE=RANK, such as down_proj=64.")
        pattern[module] = _rank(option, rank)
    return pattern
