"""Several options of a command made from a declaration, instead of being written in its signature; what some mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

CommandFunction = Callable[..., None]


def in_place_of(
    name: str, parameters: Sequence[inspect.Parameter], value: Callable[[Mapping[str, Any]], Any]
) -> Callable[[CommandFunction], CommandFunction]:
    """
    A decorator that gives a command several parameters of typer in the place of one.

    Args:
        name: Of the command's parameter that they replace.
        parameters: Keyword-only, each with its annotation for typer and its default.
        value: From the values of `parameters` by name, what the command gets as `name`.
    """

    def decorate(command: CommandFunction) -> CommandFunction:
        def with_options(**given: Any) -> None:
            made = value({parameter.name: given.pop(parameter.name) for parameter in parameters})
            command(**given, **{name: made})

        own = inspect.signature(command, eval_str=True)
        all_of_them: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            all_of_them += parameters if parameter.name == name else [parameter]
        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        with_options.__signature__ = own.replace(parameters=all_of_them)  # type: ignore[attr-defined]  # inspect reads it
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in all_of_them}
        return with_options

    return decorate


def png_file(path: Path | None) -> Path | None:
    """
    A callback of typer for where a plot is written.

    Raises:
        BadParameter: It has another ending, such as that of weights, which would be lost.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path}: a plot is a PNG file. Name one that ends in .png.")
    return path


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,- ")


def target_modules_of(given: list[str] | None) -> list[str] | str | None:
    """Of a command: a single text with characters that no module name has is a regular expression, as in PEFT."""
    if not given:
        return None
    if len(given) == 1 and (given[0] == "all-linear" or not set(given[0]) <= _NAME_CHARACTERS):
        return given[0]
    return [name.strip() for text in given for name in text.split(",") if name.strip()]
