"""Options of a command that are options of `SaLoRAConfig`, made from `OPTIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from ..options import Option, RankPattern
from ..ranks import Rank


def takes_config_options(options: Iterable[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    A decorator that gives a command a parameter of typer for each of these options, in the place of its `**values`.

    The command gets their values as `SaLoRAConfig` takes them, by their names there. On the command line a name has
    no "calibration_" in front.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = {_short_name(option): (option, _parameter(option)) for option in options}

        def with_options(**given: Any) -> None:
            values = {option.name: _value(option, given.pop(name)) for name, (option, _) in parameters.items()}
            command(**given, **values)

        own = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        signature = own.replace(parameters=[*kept, *(parameter for _, parameter in parameters.values())])
        with_options.__doc__ = command.__doc__
        with_options.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature, as documented
        with_options.__annotations__ = {name: entry.annotation for name, entry in signature.parameters.items()}
        return with_options

    return decorate


def _short_name(option: Option) -> str:
    return option.name.removeprefix("calibration_")


def flag(option: Option) -> str:
    """What the option is called on the command line, such as "--batch-size"."""
    return "--" + _short_name(option).replace("_", "-")


def _parameter(option: Option) -> inspect.Parameter:
    """One that shows choices and default; typer shows the default itself where there is one."""
    kind: Any = option.type
    default, metavar = option.default, None
    text = option.help if option.default is not None else option.described()
    if option.type is bool or option.type is int:
        pass
    elif option.type == RankPattern:
        kind, default, metavar = list[str] | None, None, "MODULE=RANK"
        text += " Repeatable."
    elif option.type == Rank:
        kind, metavar = str, "RANK"
        default = None if default is None else str(default)
    else:
        kind = str
        metavar = f"[{'|'.join(option.choices)}]" if option.choices else None
    if default is None and kind is str:
        kind = str | None
    return inspect.Parameter(
        _short_name(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(help=text, metavar=metavar)],
    )


def _value(option: Option, given: Any) -> Any:
    if option.type == RankPattern:
        return _pattern(flag(option), given or ())
    if option.type == Rank and given is not None:
        return _rank(flag(option), given)
    return given


def _rank(name: str, text: str) -> Rank:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} {text}: give a whole number, or a share between 0 and 1 such as 0.95.") from None


def _pattern(name: str, entries: Iterable[str]) -> RankPattern:
    pattern = {}
    for entry in entries:
        module, separator, rank = entry.rpartition("=")
        if not separator or not module:
            raise ValueError(f"{name} {entry}: give MODULE=RANK, such as down_proj=64.")
        pattern[module] = _rank(name, rank)
    return pattern
