"""How many directions a layer gets: a number, or as many as capture a share of the energy, by module if wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor  # not at run time: `options` is imported at every start of Axolotl

Side = Literal["output", "input"]
"""Of a layer: what it writes, W x, where U_C belongs, or what it reads, x, where V_C belongs."""
SIDES: tuple[Side, ...] = ("output", "input")

Rank = int | float | str
"""
A number of directions; or (a float between 0 and 1) the share of the energy that they must capture; or a rule that
says what they must reach, such as "leak:0.05", see `RULES`.
"""
SideRanks = Mapping[Side, Mapping[str, Rank]]
"""Side ("output" and, where there is to be one, "input") -> module name -> rank."""


@dataclass(frozen=True)
class RuleKind:
    """A way to choose ranks, layer by layer, by what is measured on the safety data."""

    sides: tuple[Side, ...]
    """Where it can be asked for."""

    meaning: str
    """What its number is, for messages."""


RULES: dict[str, RuleKind] = {
    "leak": RuleKind(
        ("input",), "the most that an adapter may react to harmful requests that were held out, over everyday ones"
    )
}
"""Name -> rule. Its number is between 0 and 1."""


@dataclass(frozen=True)
class RankRule:
    """A rule as it is asked for: "leak:0.05"."""

    kind: str
    value: float


def rule_of(rank: object) -> RankRule | None:
    """The rule that a rank is; None for a number, a share, and what is no rank."""
    kind, separator, text = rank.partition(":") if isinstance(rank, str) else ("", "", "")
    if not separator or kind not in RULES:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return RankRule(kind, value) if 0 < value < 1 else None


def rank_of_text(text: str) -> Rank:
    """A rank as it is written on a command line; what is no number is left to `check_rank`."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def of_side(side: Side, name: str) -> str:
    """What an option, or a key of a file, is called for a side: "safety_rank", or "input_safety_rank"."""
    return name if side == "output" else f"input_{name}"


def side_of(option: str) -> Side:
    """The side that an option is about, by its name: see `of_side`."""
    return "input" if option.startswith(of_side("input", "")) else "output"


def check_rank(option: str, value: object, least: int) -> None:
    """
    Raises:
        ValueError: `value` is neither a whole number of at least `least` nor a float between 0 and 1 nor a rule for
            this side.
    """
    if isinstance(value, float) and 0 < value < 1:
        return
    side = side_of(option)
    if (rule := rule_of(value)) is not None and side in RULES[rule.kind].sides:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        rules = "".join(
            f", or {kind + ':0.05'!r}, {rule.meaning}" for kind, rule in RULES.items() if side in rule.sides
        )
        raise ValueError(
            f"{option}={value!r}: give a whole number of at least {least}, or a share of the energy between 0 and 1 "
            f"such as 0.95{rules}."
        )


def check_pattern(option: str, pattern: object) -> None:
    """
    Raises:
        ValueError: `pattern` is not a mapping of regular expressions to ranks.
    """
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{option}={pattern!r}: give a mapping of module names or regular expressions to ranks.")
    for key, value in pattern.items():
        try:
            re.compile(str(key))
        except re.error as error:
            raise ValueError(f"{option}: {key!r} is not a valid regular expression ({error}).") from error
        check_rank(f"{option}[{key!r}]", value, 1)


def matching_patterns(names: Iterable[str], pattern: Mapping[str, Rank]) -> dict[str, str | None]:
    """Module name -> the first key of a pattern that decides its rank; None where none does."""
    return {name: next((k for k in pattern if re.fullmatch(rf"(.*\.)?({k})", name)), None) for name in names}


def ranks_of(
    names: Iterable[str],
    rank: Rank | Mapping[str, Rank],
    pattern: Mapping[str, Rank] | None = None,
    *,
    option: str = "safety_rank_pattern",
) -> dict[str, Rank]:
    """
    The rank of every module. A pattern matches the end of a module's name, as in PEFT's `rank_pattern`.

    Args:
        names: Module names.
        rank: For the modules that no pattern matches: one for all, or by module name.
        pattern: Regular expression -> rank; the first match counts.
        option: What the user calls the pattern, for messages.

    Raises:
        ValueError: A pattern matches no module, so that it would have no effect.
    """
    pattern = pattern or {}
    keys = matching_patterns(names, pattern)
    ranks = {
        name: pattern[key] if key is not None else rank[name] if isinstance(rank, Mapping) else rank
        for name, key in keys.items()
    }
    if unused := [key for key in pattern if key not in keys.values()]:
        raise ValueError(
            f"{option}: {unused[0]!r} decides the rank of no target module. Check it against the target modules, for "
            f"example {next(iter(ranks), 'none')!r}, and against the patterns before it."
        )
    return ranks


def rank_for_share(singular_values: Tensor, energy: float, share: float) -> int | None:
    """
    The smallest number of directions that capture a share of the energy; None where all of them capture less.

    Args:
        singular_values: (r,), descending.
        energy: Sum of all squared singular values, of which these are the largest.
        share: Between 0 and 1.
    """
    captured = singular_values.double().square().cumsum(0)
    # A little slack, since float32 values of a complete decomposition need not add up to all of the energy.
    enough = captured >= share * (1 - 1e-6) * energy
    return int(enough.int().argmax()) + 1 if enough.any() else None
