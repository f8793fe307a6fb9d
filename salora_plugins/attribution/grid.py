"""What is removed: points of a grid as the user names them, and the states of the model that follow from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["ranks", "snip", "wanda"]
"""What is removed: directions of the layers' outputs, or entries of the weights, by one of two scores."""
FAMILIES: tuple[Family, ...] = get_args(Family)
PAPER_OUTPUTS = 4096
"""Outputs of a layer of Llama-2-7B, for which the paper's ranks are."""
DEFAULT_RANKS = ("1:0/4096", "6:146/4096", "96:646/4096")
"""The paper's: safety alone, and the two of its figures with the utility part."""
DEFAULT_ENTRIES = ("3:9", "5:7", "7:5", "9:3")
"""Of the paper's range, from the fewest entries to the most."""
MOST_PERCENT = 50

_RANKS = re.compile(r"(\d+):(\d+)(?:/(\d+))?")
_ENTRIES = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class RankPoint:
    """k_s safety directions, and k_u of utility, which they are freed of."""

    safety: int
    utility: int
    per: int | None = None
    """Where they are given for layers of so many outputs, and scaled to those that a layer has."""

    def of_layer(self, d_in: int, d_out: int) -> tuple[int, int]:
        """k_s and k_u of a layer."""
        if self.per is None:
            return self.safety, self.utility
        share = min(d_in, d_out) / self.per
        return max(1, round(self.safety * share)), round(self.utility * share)

    def __str__(self) -> str:
        return f"{self.safety}:{self.utility}" + ("" if self.per is None else f"/{self.per}")


@dataclass(frozen=True)
class EntryPoint:
    """The top q percent of each row by safety that are not in the top p percent by utility."""

    safety: float
    """q"""
    utility: float
    """p"""

    def __str__(self) -> str:
        return f"{self.safety:g}:{self.utility:g}"


Point = RankPoint | EntryPoint


@dataclass(frozen=True)
class State:
    """The model without a part of its weights."""

    family: Family
    point: Point
    draw: int = 0
    """0: the part that was found; from 1 on: as much, drawn at random."""

    @property
    def name(self) -> str:
        """Unique, and fit for a file."""
        name = f"{self.family} {self.point}".replace(":", ",").replace("/", " per ")
        return name + (f" random {self.draw}" if self.draw else "")


def rank_points(given: Iterable[str | Sequence[int]]) -> list[RankPoint]:
    """
    Args:
        given: "K_S:K_U", or "K_S:K_U/OUTPUTS" for ranks of a layer of so many outputs, scaled to the layers'; or pairs.

    Raises:
        ValueError: One is none.
    """
    points = []
    for value in given:
        text = value if isinstance(value, str) else ":".join(map(str, value))
        found = _RANKS.fullmatch(text)
        if found is None:
            raise ValueError(
                f"ranks: {text!r} is no pair of ranks. Give K_S:K_U, such as 96:646: whole numbers of safety "
                "directions and of utility directions; or 96:646/4096, which is scaled to layers of other sizes."
            )
        safety, utility = int(found[1]), int(found[2])
        per = None if found[3] is None else int(found[3])
        if safety < 1 or (per is not None and per <= max(safety, utility)):
            raise ValueError(
                f"ranks: {text!r}: there must be at least one safety direction, and fewer directions than outputs."
            )
        points.append(RankPoint(safety, utility, per))
    return list(dict.fromkeys(points))


def entry_points(given: Iterable[str | Sequence[float]]) -> list[EntryPoint]:
    """
    Args:
        given: "Q:P", percent of each row by safety and by utility, or pairs.

    Raises:
        ValueError: One is none, or out of range.
    """
    points = []
    for value in given:
        text = value if isinstance(value, str) else ":".join(map(str, value))
        found = _ENTRIES.fullmatch(text)
        if found is None:
            raise ValueError(
                f"entries: {text!r} is no pair of percentages. Give Q:P, such as 5:7: the top percent of each row by "
                "safety, without the top percent by utility."
            )
        point = EntryPoint(float(found[1]), float(found[2]))
        if not 0 < point.safety <= MOST_PERCENT or point.utility > MOST_PERCENT:
            raise ValueError(
                f"entries: {text!r} is out of range: q must be above 0, and q and p at most {MOST_PERCENT} percent. "
                "The paper's are from 3 to 9."
            )
        points.append(point)
    return list(dict.fromkeys(points))


def states_of(
    families: Sequence[str], ranks: Sequence[RankPoint], entries: Sequence[EntryPoint], draws: int
) -> list[State]:
    """
    All states, family by family, each part that was found before its random controls.

    Raises:
        ValueError: There is no such family, or none at all.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"families: {family!r} is none of {', '.join(FAMILIES)}.")
    grids: dict[Family, Sequence[Point]] = {"ranks": ranks, "snip": entries, "wanda": entries}
    states = [
        State(family, point, draw)
        for family in FAMILIES
        if family in families
        for point in grids[family]
        for draw in range(draws + 1)
    ]
    if not states:
        raise ValueError(f"families: there is nothing to remove. Name some of {', '.join(FAMILIES)}, with a grid each.")
    return states
