"""`salora calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.loading import LoadingOptions, load_model, load_tokenizer


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
    variant: Annotated[str, typer.Option(help="'two-sided', or 'paper': the output side only.")] = "two-sided",
    input_safety_rank: Annotated[
        str | None,
        typer.Option(help="Input directions per layer, or a share; 0: no input side. Default: a quarter, at most 256."),
    ] = None,
    safety_rank_pattern: Annotated[
        list[str] | None, typer.Option(help="MODULE=RANK for single modules, repeatable.")
    ] = None,
    input_safety_rank_pattern: Annotated[
        list[str] | None, typer.Option(help="MODULE=RANK for single modules, repeatable.")
    ] = None,
    safety_positions: Annotated[
        str | None, typer.Option(help="Positions that count: 'response', 'predicting', 'prompt' or 'all'.")
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
    from ..config import SaLoRAConfig

    options = SaLoRAConfig(
        target_modules=_target_modules(target_modules),
        safety_data=safety_data,
        safety_rank=_rank("--safety-rank", safety_rank),
        variant=variant,
        input_safety_rank=None if input_safety_rank is None else _rank("--input-safety-rank", input_safety_rank),
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

    from ..calibration import calibrate_with
    from ..inspection import summary

    loading = LoadingOptions(dtype, device_map, load_in_4bit, load_in_8bit, revision, trust_remote_code)
    loaded = load_model(model, loading)
    options.tokenizer = load_tokenizer(model, loading)
    safety_module = calibrate_with(loaded, options)
    safety_module.save(out)
    typer.echo(summary(safety_module))
    typer.echo(
        f"Wrote {out}. Use it with SaLoRAConfig(safety_module={str(out)!r}), or `salora.safety_module` in Axolotl."
    )


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
