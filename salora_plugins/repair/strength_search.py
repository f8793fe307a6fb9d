"""How strongly to repair: a small sweep over held-out requests and task rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..evaluation.generation import generate_responses
from ..evaluation.judges.named import NamedJudge, load_judge
from ..evaluation.metrics import response_loss
from ..evaluation.plan import DataOptions
from ..models.running import on_accelerator
from .strength import Strength, StrengthSearch
from .updates import Factors, with_updates

Updates = Mapping[str, Sequence[Factors]]


@dataclass(frozen=True)
class Trial:
    """What was measured with one strength."""

    strength: Strength | None
    """None: the fine-tuned model as it is."""
    refused: int
    requests: int
    task_loss: float


def refusal_judge(search: StrengthSearch) -> NamedJudge:
    """
    Raises:
        ValueError: There is no such judge, or it does not judge refusals.
    """
    judge = load_judge(search.judge)
    if judge.kind != "refusal":
        raise ValueError(f"judge={search.judge!r} does not judge refusals. Choose one that does, such as 'keyword'.")
    return judge


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
    judge = refusal_judge(search)

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

    strengths = tqdm(search.strengths, desc="searching the strength", unit="strength", leave=False)
    with on_accelerator(model):
        before = measure(None)
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
