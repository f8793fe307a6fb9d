"""How strongly to repair: a small sweep over held-out requests and task rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..evaluation.generation import generate_responses
from ..evaluation.judges.named import load_judge
from ..evaluation.metrics import response_loss
from ..evaluation.plan import DataOptions
from .fusion import Strength
from .updates import Factors, with_updates

Updates = Mapping[str, Sequence[Factors]]


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
            ValueError: A number is out of range, or there is no such judge.
        """
        for strength in self.strengths:
            strength.check()
        if not self.strengths:
            raise ValueError("alphas and alpha_1s: give at least one of each.")
        if not self.max_loss_increase >= 0:
            raise ValueError(f"max_loss_increase={self.max_loss_increase}: give a share such as 0.05.")
        for name in ("num_requests", "num_task_rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a whole number of at least 1.")
        if load_judge(self.judge).kind != "refusal":
            raise ValueError(f"judge={self.judge!r} does not judge refusals. Choose one that does, such as 'keyword'.")

    @property
    def strengths(self) -> list[Strength]:
        """The grid."""
        return [Strength(alpha, alpha_1) for alpha in self.alphas for alpha_1 in self.alpha_1s]


@dataclass(frozen=True)
class Trial:
    """What was measured with one strength."""

    strength: Strength | None
    """None: the fine-tuned model as it is."""
    refused: int
    requests: int
    task_loss: float


def search_strength(
    search: StrengthSearch,
    model: nn.Module,
    tokenizer: Any,
    own: Updates,
    repairs: Callable[[Strength], Updates],
) -> tuple[Strength, list[Trial]]:
    """
    Args:
        search: What to try, and on what.
        model: The model that the updates belong to.
        tokenizer: Its tokenizer.
        own: The updates of the fine-tuned model.
        repairs: Strength -> the repair's updates.

    Returns:
        The strength by the rule of `StrengthSearch`, and what was measured, the fine-tuned model's first.

    Raises:
        ValueError: There are no requests or task rows, or a loss is not finite.
    """
    data = DataOptions(search.harmful, "builtin", search.task, search.num_requests, search.num_task_rows, search.seed)
    requests, task = data.harmful_requests(), data.held_out_task()
    if task is None:
        raise ValueError("task: give held-out conversations. Refusals alone would choose the strongest repair.")
    judge = load_judge(search.judge)

    def measure(strength: Strength | None) -> Trial:
        repair: Updates = {} if strength is None else repairs(strength)
        names = [*own, *(name for name in repair if name not in own)]
        with with_updates(model, {name: [*own.get(name, ()), *repair.get(name, ())] for name in names}):
            answers = generate_responses(
                model,
                tokenizer,
                [request.asked for request in requests],
                max_new_tokens=search.max_new_tokens,
                batch_size=search.batch_size,
                progress=False,
            )
            loss = response_loss(model, tokenizer, task.rows, search.batch_size)
        verdicts = judge([(request.prompt, answer) for request, answer in zip(requests, answers, strict=True)])
        if errors := [verdict for verdict in verdicts if isinstance(verdict, str)]:
            raise ValueError(f"judge={search.judge!r} failed: {errors[0]}")
        return Trial(strength, sum(verdict is True for verdict in verdicts), len(requests), loss)

    before = measure(None)
    strengths = tqdm(search.strengths, desc="searching the strength", unit="strength", leave=False)
    tried = {strength: measure(strength) for strength in strengths}
    return _chosen(before, tried, search.max_loss_increase), [before, *tried.values()]


def _chosen(before: Trial, tried: Mapping[Strength, Trial], max_loss_increase: float) -> Strength:
    finite = [strength for strength, trial in tried.items() if math.isfinite(trial.task_loss)]
    if not finite or not math.isfinite(before.task_loss):
        raise ValueError("The task loss is not finite. Check the task's rows, or choose smaller alphas.")
    most = (1 + max_loss_increase) * before.task_loss
    if within := [strength for strength in finite if tried[strength].task_loss <= most]:
        return max(within, key=lambda strength: (tried[strength].refused, -tried[strength].task_loss))
    return min(finite, key=lambda strength: tried[strength].task_loss)
