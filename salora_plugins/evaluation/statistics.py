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

    @computed_field
    @property
    def rate(self) -> float | None:
        """From 0 to 1."""
        return self.count / self.total if self.total else None

    @computed_field
    @property
    def interval(self) -> tuple[float, float] | None:
        """The Wilson 95 % interval of the rate."""
        return wilson_interval(self.count, self.total) if self.total else None


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
