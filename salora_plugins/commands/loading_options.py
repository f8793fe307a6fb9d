"""The options of a command that say how a model is loaded, made from `LoadingOptions`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from ..models.loading import LoadingOptions


def takes_loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """A decorator that gives a command an option for each of `LoadingOptions`, in the place of its `loading`."""
    types = get_type_hints(LoadingOptions)
    options = {
        option.name: inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[types[option.name], typer.Option(help=option.metadata["help"])],
        )
        for option in fields(LoadingOptions)
    }

    def with_options(**given: Any) -> None:
        loading = LoadingOptions(**{name: given.pop(name) for name in options})
        command(**given, loading=loading)

    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += options.values() if parameter.name == "loading" else [parameter]
    with_options.__doc__ = command.__doc__
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect reads it
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
