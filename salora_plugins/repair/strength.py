"""How strongly refusals are restored, and what a sweep over that is to try; without torch, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from ..options import check_number, check_real


@dataclass(frozen=True)
class Strength:
    """How much of the safety vectors is added."""

    alpha: float = 1.0
    """Of all directions."""
    alpha_1: float = 1.0
    """Of the first direction of a layer over its last."""

    def check(self) -> None:
        """
        Raises:
            ValueError: A number is none that repairs anything.
        """
        for name, value in (("alpha", self.alpha), ("alpha_1", self.alpha_1)):
            check_real(name, value, "a number above 0, such as 1.0", lambda number: number > 0)

    def weights(self, singular_values: Tensor) -> Tensor:
        """
        alpha_i = 1 + (alpha_1 - 1) (s_i - s_r) / (s_1 - s_r), (r,); all alpha_1 where the singular values are equal.

        Args:
            singular_values: s_1 to s_r, descending.
        """
        first, last = singular_values[0], singular_values[-1]
        if first == last:
            return singular_values * 0 + self.alpha_1
        return 1 + (self.alpha_1 - 1) * (singular_values - last) / (first - last)


@dataclass(frozen=True)
class StrengthSearch:
    """
    A sweep over alpha and alpha_1, all else being given.

    The rule: of the strengths whose task loss is at most `max_loss_increase` above that of the fine-tuned model, the
    one with the most refusals; of several, the one with the smallest task loss. Where none is within it, the one with
    the smallest task loss.
    """

    task: Any
    """Held-out conversations of the task, as `task` of [`evaluate`]."""
    harmful: Any = "builtin"
    """Harmful requests that the calibration does not see, as `harmful` of [`evaluate`]."""
    num_requests: int = 32
    num_task_rows: int = 32
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    alpha_1s: tuple[float, ...] = (1.0, 2.0)
    max_loss_increase: float = 0.05
    """As a share of the fine-tuned model's loss."""
    judge: str = "keyword"
    """Judge of the refusals, as in [`evaluate`]."""
    max_new_tokens: int = 48
    batch_size: int = 16
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            ValueError: A number is out of range.
        """
        for strength in self.strengths:
            strength.check()
        if not self.strengths:
            raise ValueError("alphas and alpha_1s: give at least one of each.")
        check_real("max_loss_increase", self.max_loss_increase, "a share such as 0.05", lambda number: number >= 0)
        for name in ("num_requests", "num_task_rows", "max_new_tokens", "batch_size"):
            check_number(name, getattr(self, name), 1)

    @property
    def strengths(self) -> list[Strength]:
        """The grid."""
        return [Strength(alpha, alpha_1) for alpha in self.alphas for alpha_1 in self.alpha_1s]
