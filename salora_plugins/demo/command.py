"""`salora demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..commands.command import Command
from ..hookspecs import hookimpl
from ..support.files import make_folder

INTRODUCTION = """
A small aligned chat model (2 million parameters, part of this package) is fine-tuned on harmless word problems,
with LoRA and with SaLoRA: the same rows, steps, learning rate, rank, layers and seed. Then every model answers
requests that neither its training nor SaLoRA's calibration has seen. All numbers are measured in this run.
"""
CLOSING = """
This is one tiny model, one task and one seed: it shows what happens, not how much to expect from your model.
"Refused" is decided by keywords at the beginning of a response. SaLoRA's default protects the layers' inputs as well
as their outputs; the paper's form the outputs only. Every response is in {results}, the plot in {plot}.
"""


@hookimpl
def register_commands(app: typer.Typer) -> None:
    app.command(name="demo", cls=Command)(demo)


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json and refusals.png.")] = Path("demo-results"),
    seed: Annotated[int, typer.Option(help="Seed of the training data, their order and the adapters.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each fine-tuning.")] = 120,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of each fine-tuning.")] = 2e-3,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Ask at most so many requests of each set, for a quick look.")
    ] = None,
) -> None:
    """Fine-tune a small chat model with LoRA and with SaLoRA, and compare what they refuse."""
    # Imported here so that `salora --help` needs neither torch nor the demo's extra.
    try:
        import matplotlib  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`salora demo` needs {error.name}, which is not installed: run `pip install 'salora-plugins[demo]'`."
        ) from error
    from rich.console import Console

    from .experiment import Settings, adapters, fine_tune, load_demo_model, measure
    from .report import table, write_plot, write_results

    make_folder(output_dir)  # rather fail now than after minutes of training
    began = time.perf_counter()
    settings = Settings(steps=steps, learning_rate=learning_rate, seed=seed)
    console = Console()
    console.print(INTRODUCTION, highlight=False)
    model, tokenizer = load_demo_model()
    console.print("[bold]Base model[/bold]: measuring")
    measurements = [measure("base", model, tokenizer, max_prompts)]
    for name, peft_config in adapters(settings, tokenizer).items():
        console.print(f"[bold]{name}[/bold]: training {steps} steps, then measuring")
        measurements.append(measure(name, fine_tune(peft_config, settings), tokenizer, max_prompts))
    results, plot = output_dir / "results.json", output_dir / "refusals.png"
    write_results(results, measurements, settings, time.perf_counter() - began)
    write_plot(plot, measurements, settings)
    console.print(table(measurements))
    console.print(CLOSING.format(results=results, plot=plot), highlight=False, markup=False)
