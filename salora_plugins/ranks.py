"""How many directions a layer gets: a number, or as many as capture a share of the energy, by module if wanted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .support.texts import how_to_write, shortened

if TYPE_CHECKING:
    from torch import Tensor  # not at run time: `options` is imported at every start of Axolotl

Side = Literal["output", "input"]
"""Of a layer: what it writes, W x, where U_C belongs, or what it reads, x, where V_C belongs."""
SIDES: tuple[Side, ...] = ("output", "input")

Rank = int | float | str
"""
A number of directions; or (a float between 0 and 1) the share of the energy that they must capture; or a rule that
says what they must reach, such as "leak:0.05" or "entropy:0.85", see `RULES`.
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

    example: float
    """A number that can be asked for, for messages."""


RULES: dict[str, RuleKind] = {
    "leak": RuleKind(
        ("input",),
        "the most that an adapter may react to harmful requests that were held out, over everyday ones",
        0.05,
    ),
    "entropy": RuleKind(SIDES, "the share of the entropy of the spectrum that the directions make up", 0.85),
}
"""Name -> rule. Its number is between 0 and 1."""


@dataclass(frozen=True)
class RankRule:
    """A rule as it is asked for: "leak:0.05"."""

    kind: str
    value: float

    @property
    def is_of_spectrum(self) -> bool:
        """Whether singular values decide it, as they do a share, and no measurement."""
        return self.kind == "entropy"


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


def measured_rule(rank: object) -> RankRule | None:
    """The rule that a rank is, where it is a goal for what is measured (the leak), and no property of the spectrum."""
    rule = rule_of(rank)
    return rule if rule is not None and not rule.is_of_spectrum else None


def share_or_rule(rank: float | str) -> float | RankRule:
    """
    What a rank that is no number of directions asks for.

    Raises:
        ValueError: It is neither a share nor a rule.
    """
    if isinstance(rank, float):
        return rank
    if (rule := rule_of(rank)) is None:
        raise ValueError(f"{rank!r} is neither a share of the energy nor a rule")
    return rule


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


def check_rank(option: str, value: object, least: int, *, named: str | None = None) -> None:
    """
    Args:
        option: It says the side.
        value: Of the option.
        least: Number of directions.
        named: What a host calls the option.

    Raises:
        ValueError: `value` is neither a whole number of at least `least` nor a float between 0 and 1 nor a rule for
            this side.
    """
    if isinstance(value, float) and 0 < value < 1:
        return
    side = side_of(option)
    if (rule := rule_of(value)) is not None and side in RULES[rule.kind].sides:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        rules = "".join(
            f", or {f'{kind}:{rule.example}'!r}, {rule.meaning}" for kind, rule in RULES.items() if side in rule.sides
        )
        raise ValueError(
            f"{named or option}={shortened(value)}: give a whole number of at least {least}, or a share of the energy "
            f"between 0 and 1 such as 0.95{rules}{how_to_write(value)}."
        )


def check_pattern(option: str, pattern: object, *, named: str | None = None) -> None:
    """
    Args:
        option: It says the side.
        pattern: Of the option.
        named: What a host calls the option.

    Raises:
        ValueError: `pattern` is not a mapping of regular expressions to ranks.
    """
    named = named or option
    if not isinstance(pattern, Mapping):
        raise ValueError(
            f"{named}={shortened(pattern)}: give a mapping of module names or regular expressions to ranks."
        )
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise ValueError(f"{named}: {shortened(key)} is no text. Give module names or regular expressions.")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{named}: {key!r} is not a valid regular expression ({error}).") from error
        check_rank(option, value, 1, named=f"{named}[{key!r}]")


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


def rank_for_entropy(
    singular_values: Tensor, energy: float, dimension: int, share: float, *, at_least: bool = False
) -> int | None:
    """
    The smallest number of directions that make up a share of the spectrum's entropy; None where those that are known
    may not (LSSF, arXiv 2602.00038: p_i = s_i^2 / sum s^2, H_rho = -sum_{i<=rho} p_i log p_i, the least rho with
    H_rho >= share * H_n).

    Where only the first m of n singular values are known, as with a sketch, the energy of the others is, but not how it
    is spread. It is taken as spread evenly over the n - m that are missing, which makes their entropy, H_n, and so the
    number of directions as large as they can be: with the whole spectrum known, it could be smaller, never larger.
    (Sketched singular values are a little too small, and that too moves energy to the others.) With `at_least`, it is
    taken as concentrated in directions as strong as the last that is known, which no other exceeds: with the whole
    spectrum known, the number could be larger, never smaller. Where both agree, it is the number.

    Args:
        singular_values: (m,), descending.
        energy: Sum of all squared singular values, of which these are the largest.
        dimension: n, how many singular values there are: the vectors' length, or their number where that is smaller.
        share: Between 0 and 1.
        at_least: Give the smallest number that it can be, instead of the largest.
    """
    shares = singular_values.double().square() / energy
    entropies = -shares.xlogy(shares).cumsum(0)
    rest, missing = max(0.0, 1 - float(shares.sum())), dimension - len(shares)
    # A complete float32 decomposition need not add up to all of the energy.
    of_rest = 0.0
    if missing > 0 and rest > 1e-6:
        mean = rest / missing
        of_rest = -rest * math.log(max(mean, float(shares[-1])) if at_least else mean)
    enough = entropies >= share * (1 - 1e-6) * (float(entropies[-1]) + of_rest)
    return int(enough.int().argmax()) + 1 if enough.any() else None


def rank_of_spectrum(
    singular_values: Tensor, energy: float, dimension: int, wanted: float | RankRule, *, at_least: bool = False
) -> int | None:
    """
    `rank_for_share` or `rank_for_entropy`, as a share or a rule of the spectrum asks for; `at_least` is of the latter.

    Raises:
        ValueError: The rule is not one of the spectrum.
    """
    if not isinstance(wanted, RankRule):
        return rank_for_share(singular_values, energy, wanted)
    if not wanted.is_of_spectrum:
        raise ValueError(f"{wanted.kind}:{wanted.value} does not follow from singular values")
    return rank_for_entropy(singular_values, energy, dimension, wanted.value, at_least=at_least)
