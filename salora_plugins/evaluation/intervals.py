"""Proportions and means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

from pydantic import BaseModel, ConfigDict, NonNegativeInt, computed_field


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion by the score method of Wilson (1927, J. Am. Stat. Assoc. 22, p. 209).

    Args:
        successes: how many of the trials succeeded.
        total: number of trials.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper bound, both from 0 to 1.

    Raises:
        ValueError: `total` is not positive, `successes` is not in 0..total, or `confidence` is not in (0, 1).
    """
    if total < 1:
        raise ValueError(f"total={total}: an interval needs at least one trial")
    if not 0 <= successes <= total:
        raise ValueError(f"successes={successes}: it must be from 0 to total={total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: it must be between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / total
    center = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # Exactly 0 and 1 at the ends, where rounding would leave something like 1e-17.
    lower = 0.0 if successes == 0 else max(0.0, center - half)
    upper = 1.0 if successes == total else min(1.0, center + half)
    return lower, upper


class Proportion(BaseModel):
    """How many of how many. There is no rate where there is nothing to count."""

    model_config = ConfigDict(frozen=True)

    count: NonNegativeInt
    total: NonNegativeInt

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorators of properties
    @property
    def rate(self) -> float | None:
        """From 0 to 1."""
        return self.count / self.total if self.total else None

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorators of properties
    @property
    def interval(self) -> tuple[float, float] | None:
        """The Wilson 95 % interval of the rate."""
        return wilson_interval(self.count, self.total) if self.total else None

    @property
    def estimate(self) -> tuple[float, float, float] | None:
        """The rate and the bounds of its interval, where there is something to count."""
        return (self.count / self.total, *wilson_interval(self.count, self.total)) if self.total else None


class Mean(BaseModel):
    """The mean of a quantity over prompts."""

    model_config = ConfigDict(frozen=True)

    value: float
    interval: tuple[float, float]
    """Its normal 95 % interval: 1.96 standard errors to either side; the value itself where there is one prompt."""
    count: NonNegativeInt
    """Number of prompts."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """
        Raises:
            ValueError: There are no values.
        """
        if not values:
            raise ValueError("values is empty: a mean needs at least one value")
        center = mean(values)
        half = NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(value=center, interval=(center - half, center + half), count=len(values))


class McNemar(BaseModel):
    """Two models on the same requests: how often an event happened with one of them only."""

    model_config = ConfigDict(frozen=True)

    pairs: NonNegativeInt
    only_first: NonNegativeInt
    only_second: NonNegativeInt
    p_value: float
    """Exact and two-sided."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """
    The test of McNemar (1947, Psychometrika 12, p. 153) of whether an event is as frequent in one series as in the
    other, by the exact binomial distribution of the pairs that differ.

    Args:
        first: Whether the event happened, per request.
        second: The same for the other model, on the same requests.

    Raises:
        ValueError: The series are not of one length.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} entries and second {len(second)}: give one for every request")
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1)) / 2**differing
    return McNemar(pairs=len(pairs), only_first=only_first, only_second=only_second, p_value=min(1.0, 2 * tail))
