"""The options of a command that describe a sweep over strengths, made into a `StrengthSearch`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from ..repair.strength import StrengthSearch
from .parameters import CommandFunction, in_place_of

_TASK = "search_task"
# Option -> its type and help; the defaults are those of `StrengthSearch`.
_OPTIONS: dict[str, tuple[type, str]] = {
    "harmful": (str, "Held-out harmful requests of the sweep: 'builtin', a file, a hub data set."),
    "alphas": (str, "Strengths to try, with commas."),
    "alpha_1s": (str, "The same of --alpha-1."),
    "num_requests": (int, "Requests of the sweep."),
    "num_task_rows": (int, "Rows of the task in the sweep."),
    "max_loss_increase": (float, "Largest increase of the task loss that may be chosen, as a share."),
}


def takes_search_options(command: CommandFunction) -> CommandFunction:
    """
    A decorator that gives a command the options of a sweep, in the place of its `search`: a `StrengthSearch`, or
    None where no sweep is asked for.
    """
    defaults = {field.name: _as_text(field.default) for field in fields(StrengthSearch)}
    task = "Find --alpha and --alpha-1 by a sweep: held-out conversations of the task, for its loss."
    parameters = [_parameter(_TASK, None, str | None, task)]
    for name, (kind, help) in _OPTIONS.items():
        parameters.append(_parameter(f"search_{name}", defaults[name], kind, help))

    def value(given: Mapping[str, Any]) -> StrengthSearch | None:
        wanted = {name: given[f"search_{name}"] for name in _OPTIONS}
        if given[_TASK] is None:
            if changed := [name for name, value in wanted.items() if value != defaults[name]]:
                raise ValueError(f"{_flag(changed[0])}: without --search-task there is no sweep. Give it, too.")
            return None
        lists = {name: _numbers(wanted[name], _flag(name)) for name in ("alphas", "alpha_1s")}
        return StrengthSearch(**{**wanted, **lists, "task": given[_TASK]})

    return in_place_of("search", parameters, value)(command)


def _parameter(name: str, default: Any, kind: Any, help: str) -> inspect.Parameter:
    option = typer.Option(_flag(name.removeprefix("search_")), help=help)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _flag(name: str) -> str:
    return f"--search-{name.replace('_', '-')}"


def _as_text(value: Any) -> Any:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers with commas, such as 0.5,1.") from error
