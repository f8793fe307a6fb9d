"""Evaluate a base model and what was made of it: plan, measure, judge, assemble."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.loading import LoadingOptions
from ..safety_module import SafetyModule
from .assembling import assemble
from .coherence import PERPLEXITY_THRESHOLD
from .evaluated_models import ModelLoader
from .first_tokens import KL_TOKENS
from .judging import judge
from .measuring import measure
from .plan import DataOptions, EvaluationPlan, LmEvalOptions, MeasuringOptions, plan_evaluation
from .reports.report import EvaluationReport
from .run_folder import RunFolder


def evaluate(
    base_model: str | os.PathLike,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    models: Mapping[str, str | os.PathLike] | None = None,
    *,
    out: str | os.PathLike,
    harmful: Any = "builtin",
    harmless: Any = "builtin",
    task: Any = None,
    judges: Sequence[str] = ("keyword",),
    num_requests: int | None = None,
    num_task_rows: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    perplexity_threshold: float = PERPLEXITY_THRESHOLD,
    kl_tokens: int = KL_TOKENS,
    safety_module: SafetyModule | str | os.PathLike | None = None,
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    lm_eval_include_path: str | os.PathLike | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    title: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> EvaluationReport:
    """
    Measure what a base model, adapters on it, and other models with its vocabulary refuse, answer and know.

    All answer greedily, rendered with the base model's tokenizer and chat template. `out` receives `report.json`,
    `answers/NAME.jsonl`, and `work/` with every measurement as soon as it is made. An interrupted evaluation continues
    there and comes to the same result. Adapters, models, judges, a task and lm-eval tasks can be added later: only what
    is missing is computed. What all models have in common cannot be changed: the base model, the requests, the length
    of answers, and how models are loaded.

    Args:
        base_model: Folder or hub repository of the model that the adapters belong to; "base" in the report.
        adapters: Name -> folder or hub repository of an adapter of any kind that PEFT loads, as safetensors.
        models: Name -> folder or hub repository of a whole model: a merged or a fully fine-tuned one.
        out: The folder to write.
        harmful: Requests that are to be refused: see `load_requests`.
        harmless: Requests that are to be answered.
        task: Held-out conversations, for the loss on their responses: see `load_examples`. None: not measured.
        judges: "NAME" or "NAME:ARGUMENT": see `load_judge`.
        num_requests: Take at most so many of each set, spread evenly over its categories.
        num_task_rows: Take at most so many of the task.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Requests at once; affects memory, speed and, by rounding, now and then a word of an answer.
        seed: Seed of the choice of requests and task rows, and lm-eval's.
        perplexity_threshold: Answers above it, under the base model, count as incoherent.
        kl_tokens: At how many first answer tokens the KL divergence from the base model is measured.
        safety_module: Audit the adapters against it; None: each against the one beside it, if there is one.
        lm_eval_tasks: Names of tasks or groups of lm-eval.
        lm_eval_limit: Take so many rows of each task only.
        lm_eval_include_path: A folder with tasks of one's own.
        dtype: Of the weights; "auto": as they are stored.
        device_map: Where the weights go; None: the CPU.
        load_in_4bit: Quantize as QLoRA does (bitsandbytes).
        load_in_8bit: Quantize to 8 bits (bitsandbytes).
        revision: Of the base model's hub repository.
        trust_remote_code: Run the repositories' own model code.
        title: Of the report. Default: the base model's name.
        overwrite: Delete what an evaluation left in `out`, and start again.
        progress: Show progress bars.

    Returns:
        The report, which stands in `out` as well.

    Raises:
        FileNotFoundError: A model, an adapter or data is not there.
        FileExistsError: `out` holds something else.
        ValueError: An option, data, a model or an adapter cannot be used, or `out` holds another evaluation.
        ImportError: lm-eval is asked for and not installed.
    """
    data = DataOptions(harmful, harmless, task, num_requests, num_task_rows, seed)
    measuring = MeasuringOptions(max_new_tokens, kl_tokens, batch_size, perplexity_threshold)
    lm_eval = LmEvalOptions(tuple(lm_eval_tasks), lm_eval_limit, lm_eval_include_path)
    loading = LoadingOptions(dtype, device_map, load_in_4bit, load_in_8bit, revision, trust_remote_code)
    plan = plan_evaluation(
        str(base_model), adapters or {}, models or {}, safety_module, data, measuring, judges, lm_eval, loading, title
    )
    return carry_out(plan, out, overwrite=overwrite, progress=progress)


def carry_out(
    plan: EvaluationPlan,
    out: str | os.PathLike,
    *,
    loader: ModelLoader | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> EvaluationReport:
    """
    Evaluate by a plan; what is in the folder already is not measured again.

    Args:
        plan: From `plan_evaluation`.
        out: See `evaluate`.
        loader: Gives the models; None: from where the plan says that they lie.
        overwrite: See `evaluate`.
        progress: Show progress bars.

    Raises:
        FileExistsError, ValueError: See `evaluate`.
    """
    folder = RunFolder(out)
    folder.prepare(overwrite=overwrite)
    folder.keep_settings(plan.settings)
    for evaluated in plan.models:
        folder.keep_source(evaluated.name, evaluated.source, evaluated.digest)
    measure(plan, folder, loader=loader, progress=progress)
    answers = judge(plan, folder, progress=progress)
    report = assemble(plan, folder, answers)
    folder.save(report, answers)
    return report
