"""Many module names in one message: the first of them, and a regular expression for all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SHOWN = 3


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def pattern_for(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """
    A short regular expression that fully matches all of these module names and none of the others, as `exclude_modules`
    and `target_modules` take it: by what the names begin with, by their last parts, or by all of them.
    """
    names, others = list(names), list(others)
    for candidate in (*_by_beginning(names), _by_last_parts(names, 1), _by_last_parts(names, 2)):
        if all(re.fullmatch(candidate, name) for name in names) and not any(re.fullmatch(candidate, o) for o in others):
            return candidate
    return "|".join(re.escape(name) for name in names)


def quoted(pattern: str) -> str:
    """As it is written in Python and in YAML."""
    return f"r'{pattern}'" if "\\" in pattern else f"'{pattern}'"


def advice_to_leave_out(names: Sequence[str], targets: Iterable[str], everything: Iterable[str] = ()) -> str:
    """
    How to leave target modules out, in PEFT and in Axolotl.

    Args:
        names: The modules that cannot be targets.
        targets: All modules that were to be targets.
        everything: All modules of the model, of which none may be matched besides.
    """
    kept = [name for name in targets if name not in set(names)]
    advice = f"exclude_modules={quoted(pattern_for(names, kept))}"
    if kept:
        rest = set(everything).difference(kept) | set(names)
        advice += f" (in Axolotl lora_exclude_modules, or lora_target_modules: '{pattern_for(kept, rest)}')"
    return advice


def _by_beginning(names: list[str]) -> list[str]:
    """Shortest beginning first; with their last parts, where these are few."""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(re.escape(parts[0]))
    last = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in names}))
    last = f"({last})" if "|" in last else last
    beginnings = [r"\.".join(shared[: number + 1]) for number in range(len(shared))]
    return [rf"{beginning}\..*" for beginning in beginnings] + [rf"{beginning}\..*\.{last}" for beginning in beginnings]


def _by_last_parts(names: list[str], number: int) -> str:
    ends = sorted({r"\.".join(re.escape(part) for part in name.split(".")[-number:]) for name in names})
    return rf"(.*\.)?({'|'.join(ends)})" if len(ends) > 1 else rf"(.*\.)?{ends[0]}"
