"""The report of an evaluation, from its plan, what was measured, and the judged answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from .evaluated_models import EvaluatedModel
from .plan import EvaluationPlan
from .reports.aggregation import paired_tests, set_result
from .reports.report import SETS, Answer, EvaluationReport, ModelResult, SetName, SetResult, TaskResult
from .run_folder import RunFolder


def assemble(plan: EvaluationPlan, folder: RunFolder, answers: Mapping[str, Sequence[Answer]]) -> EvaluationReport:
    """
    Count, compare, and put everything together.

    Args:
        plan: Of the evaluation.
        folder: With everything that was measured.
        answers: Model -> its answers to both sets, judged.
    """
    packages = ("salora-plugins", "torch", "transformers", "peft", *(["lm-eval"] if plan.lm_eval.tasks else []))
    return EvaluationReport(
        title=plan.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=plan.base.source,
        settings=_settings(plan),
        data=_data(plan),
        versions={name: version(name) for name in packages},
        models=[_result(plan, folder, evaluated, answers[evaluated.name]) for evaluated in plan.models],
        tests=paired_tests(answers, {judge.name: judge.kind for judge in plan.judges}),
    )


def _result(
    plan: EvaluationPlan, folder: RunFolder, evaluated: EvaluatedModel, answers: Sequence[Answer]
) -> ModelResult:
    kinds = {judge.name: judge.kind for judge in plan.judges}
    name, task = evaluated.name, plan.task

    def on(of_set: SetName) -> SetResult:
        return set_result([answer for answer in answers if answer.set == of_set], kinds)

    return ModelResult(
        name=name,
        kind=evaluated.kind,
        source=evaluated.source,
        harmful=on("harmful"),
        harmless=on("harmless"),
        task=None if task is None else TaskResult(loss=folder.measured(name, task.entry), rows=len(task.rows)),
        lm_eval={
            name_of_task: metrics
            for group in plan.lm_eval.tasks
            for name_of_task, metrics in folder.measured(name, plan.lm_eval_entry(group)).items()
        },
        audit=plan.audits.get(name),
    )


def _settings(plan: EvaluationPlan) -> dict[str, Any]:
    shown_elsewhere = ("base_model", *SETS)
    return {
        **{name: setting.value for name, setting in plan.settings.items() if name not in shown_elsewhere},
        "batch_size": plan.measuring.batch_size,
        "seed": plan.seed,
        "revision": plan.loading.revision,
        "perplexity_threshold": plan.measuring.perplexity_threshold,
        "judges": {judge.name: judge.settings for judge in plan.judges},
        "lm_eval_limit": plan.lm_eval.limit,
    }


def _data(plan: EvaluationPlan) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        name: {
            "source": plan.settings[name].value,
            "rows": len(plan.requests[name]),
            "sha256": plan.settings[name].digest,
        }
        for name in SETS
    }
    if plan.task is not None:
        found["task"] = {"source": plan.task.source, "rows": len(plan.task.rows), "sha256": plan.task.digest}
    return found
