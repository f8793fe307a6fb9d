"""The built-in commands of `salora`, one module each."""

from __future__ import annotations

import typer

from ..hookspecs import hookimpl
from .audit import audit
from .calibrate import calibrate
from .command import Command
from .compare import compare
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .project import project
from .validate import validate


@hookimpl
def register_commands(app: typer.Typer) -> None:
    for command in (calibrate, inspect, audit, project, export, evaluate, compare, validate):
        app.command(name=command.__name__, cls=Command)(command)
