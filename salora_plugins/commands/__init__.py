"""The built-in commands of `salora`, one module each: the function that has the module's name."""

from __future__ import annotations

import typer

from ..hookspecs import hookimpl
from . import (
    attribute,
    audit,
    calibrate,
    compare,
    doctor,
    evaluate,
    export,
    inspect,
    project,
    restore,
    safe_lora,
    validate,
)
from .command import Command


@hookimpl
def register_commands(app: typer.Typer) -> None:
    for module in (
        calibrate,
        inspect,
        audit,
        project,
        restore,
        safe_lora,
        export,
        evaluate,
        compare,
        validate,
        attribute,
        doctor,
    ):
        name = module.__name__.rpartition(".")[2]
        app.command(name=name.replace("_", "-"), cls=Command)(getattr(module, name))
