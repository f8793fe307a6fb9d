"""The options of a command that say how a model is loaded, made from `LoadingOptions`."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, get_type_hints

import typer

from ..models.loading import LoadingOptions
from .parameters import CommandFunction, in_place_of


def takes_loading_options(command: CommandFunction) -> CommandFunction:
    """A decorator that gives a command a parameter for each of `LoadingOptions`, in the place of its `loading`."""
    types = get_type_hints(LoadingOptions)
    parameters = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[types[option.name], typer.Option(help=option.metadata["help"])],
        )
        for option in fields(LoadingOptions)
    ]
    return in_place_of("loading", parameters, lambda given: LoadingOptions(**given))(command)
