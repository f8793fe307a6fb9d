"""Tasks of EleutherAI's lm-eval, which is optional."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import nn


def check_tasks(tasks: Sequence[str], include_path: str | os.PathLike | None = None) -> None:
    """
    Args:
        tasks: Names of tasks or groups.
        include_path: A folder with tasks of one's own.

    Raises:
        ImportError: lm-eval is not installed; the message names the command.
        ValueError: It has no such task.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401 - its dependencies are optional ones of lm-eval
    except ImportError as error:
        raise ImportError(
            f"lm_eval_tasks needs lm-eval ({error}): run `pip install 'salora-plugins[lm-eval]'`."
        ) from error
    known = _manager(include_path).all_tasks
    for task in tasks:
        if task not in known:
            raise ValueError(f"lm_eval_tasks: lm-eval has no task {task!r}. `lm-eval ls tasks` lists them.")


def run_lm_eval(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    limit: int | None = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """
    Run a task, or a group of tasks, on a model in memory.

    Args:
        model: A causal language model of transformers, with or without a PEFT adapter.
        tokenizer: Its tokenizer.
        task: Its name, which `check_tasks` knows.
        limit: Rows per task.
        include_path: A folder with further tasks.
        batch_size: Rows at once.
        seed: Of the choice of few-shot examples.

    Returns:
        Task -> metric and filter, as "acc,none" -> value.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[task],
        limit=limit,
        task_manager=_manager(include_path),
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        name: {
            metric: float(value)
            for metric, value in metrics.items()
            # A standard error is "N/A" or no number where there are too few rows for one.
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name, metrics in found["results"].items()
    }


def _manager(include_path: str | os.PathLike | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))
