"""The built-in commands of `salora`, one module each."""

from __future__ import annotations

import typer

from ..hookspecs import hookimpl
from .calibrate import calibrate
from .export import export
from .inspect import inspect


@hookimpl
def register_commands(app: typer.Typer) -> None:
    for command in (calibrate, inspect, export):
        app.command(name=command.__name__)(command)
