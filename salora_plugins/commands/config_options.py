"""Options of a command that are options of `SaLoRAConfig`, made from `OPTIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from ..options import Option, RankPattern
from ..ranks import Rank, rank_of_text
from ..rows.sources import named_by_a_host
from .parameters import CommandFunction, in_place_of


def takes_config_options(options: Sequence[Option]) -> Callable[[CommandFunction], CommandFunction]:
    """
    A decorator that gives a command a parameter for each of these options, in the place of its `options`.

    The command gets a dictionary of their values, as `SaLoRAConfig` takes them, by their names there. On the command
    line a name has no "calibration_" in front.
    """

    def values(given: Mapping[str, Any]) -> dict[str, Any]:
        return {option.name: _value(option, given[_short_name(option)]) for option in options}

    return in_place_of("options", [_parameter(option) for option in options], values)


def _short_name(option: Option) -> str:
    return option.name.removeprefix("calibration_")


def flag(option: Option) -> str:
    """What the option is called on the command line, such as "--batch-size"."""
    return "--" + _short_name(option).replace("_", "-")


def _parameter(option: Option) -> inspect.Parameter:
    """A parameter of typer, which shows the default itself where there is one."""
    kind, default, metavar = option.type, option.default, None
    help = option.help if default is not None else option.described()
    if option.type == RankPattern:
        kind, default, metavar = list[str], None, "MODULE=RANK"
        help += " Repeatable."
    elif option.type == Rank:
        kind, metavar = str, "RANK"
        default = None if default is None else str(default)
    elif option.several:
        kind, default = list[str], None
        help = f"{option.described()} Repeatable."
    elif option.type not in (bool, int, float):  # a choice is checked with the configuration; anything else is a name
        kind = str
        metavar = f"[{'|'.join(option.choices)}]" if option.choices else None
    return inspect.Parameter(
        _short_name(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if default is not None else kind | None, typer.Option(help=help, metavar=metavar)],
    )


def _value(option: Option, given: Any) -> Any:
    """
    Raises:
        ValueError: The option cannot have this value; before a model is loaded, and with the name that it has here.
    """
    value: Any = given
    if option.type == RankPattern:
        value = _pattern(option, given or ())
    elif option.type == Rank and given is not None:
        value = rank_of_text(given)
    elif option.several:
        value = named_by_a_host(given, flag(option)) if given else option.default
    option.check(value, named=flag(option))
    return value


def _pattern(option: Option, entries: Iterable[str]) -> RankPattern:
    pattern = {}
    for entry in entries:
        module, separator, rank = entry.rpartition("=")
        if not separator or not module:
            raise ValueError(f"{flag(option)} {entry}: give MODULE=RANK, such as down_proj=64.")
        pattern[module] = rank_of_text(rank)
    return pattern
