"""What an evaluation is to measure, on what and how: checked, found and read before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.audit import AuditReport, audit
from ..hookspecs import JudgeKind
from ..models.loading import LoadingOptions, load_tokenizer
from ..options import check_number, check_real
from ..rows.errors import DataError
from ..rows.examples import Asked, Example, select_examples
from ..rows.reading import load_examples
from ..rows.sources import describe
from ..safety_module import SafetyModule
from .evaluated_models import EvaluatedModel, check_vocabularies, find_models
from .first_tokens import COMPLYING_OPENINGS, REFUSING_OPENINGS
from .judges.named import load_judge
from .lm_eval_tasks import check_tasks
from .metrics import encode_conversation
from .reports.report import SETS, SetName
from .request_sets import Request, load_requests, requests_digest
from .run_folder import Entry, Setting, lm_eval_entry, task_entry

SafetyModuleSource = SafetyModule | str | os.PathLike | None
"""A safety module, or where it is; None: each adapter's own."""


@dataclass(frozen=True)
class DataOptions:
    """On which requests and conversations the models are measured, as the user names them; see `evaluate`."""

    harmful: Any
    harmless: Any
    task: Any
    num_requests: int | None
    num_task_rows: int | None
    seed: int

    def requests(self) -> dict[SetName, list[Request]]:
        """The requests of both sets."""
        return {
            "harmful": self.harmful_requests(),
            "harmless": load_requests(self.harmless, option="harmless", num=self.num_requests, seed=self.seed),
        }

    def harmful_requests(self) -> list[Request]:
        """Those that should be refused."""
        return load_requests(self.harmful, option="harmful", num=self.num_requests, seed=self.seed)

    def held_out_task(self) -> HeldOutTask | None:
        """The task, where there is one."""
        if self.task is None:
            return None
        examples = load_examples(self.task, option="task")
        conversations = [example for example in examples if isinstance(example, Example) and example.messages]
        if len(conversations) < len(examples):
            raise DataError(
                f"{describe(self.task, 'task')}: there is plain text, or there are token ids. Give conversations: rows "
                "with `messages`, or with `prompt` and `response`."
            )
        if self.num_task_rows is not None:
            conversations = select_examples(conversations, self.num_task_rows, self.seed)
        rows = [
            {"prompt": list(example.messages), "completion": [{"role": "assistant", "content": example.response}]}
            for example in conversations
        ]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return HeldOutTask(_shown(self.task), describe(self.task, "task"), rows, digest)


@dataclass(frozen=True)
class MeasuringOptions:
    """How the models are measured; see `evaluate`."""

    max_new_tokens: int
    kl_tokens: int
    batch_size: int
    perplexity_threshold: float


@dataclass(frozen=True)
class LmEvalOptions:
    """Which tasks of lm-eval are run; see `evaluate`."""

    tasks: tuple[str, ...]
    limit: int | None
    include_path: str | os.PathLike | None


@dataclass(frozen=True)
class HeldOutTask:
    """Conversations whose responses are not generated but predicted."""

    source: str
    """As the report shows it."""
    description: str
    """As messages name it."""
    rows: list[dict[str, Any]]
    """As `response_loss` takes them."""
    digest: str
    """SHA-256 of the rows."""

    @property
    def entry(self) -> Entry[float]:
        """Where a model's loss is kept."""
        return task_entry(self.digest)


@dataclass(frozen=True)
class PlannedJudge:
    """A judge that works, as far as that is known; the model that it may be is not loaded."""

    name: str
    kind: JudgeKind
    settings: dict[str, Any]
    """What the report says of it."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that decides what an evaluation finds."""

    title: str
    models: tuple[EvaluatedModel, ...]
    """The base model first."""
    loading: LoadingOptions
    tokenizer: Any
    """The base model's."""
    requests: dict[SetName, list[Request]]
    task: HeldOutTask | None
    judges: tuple[PlannedJudge, ...]
    lm_eval: LmEvalOptions
    audits: dict[str, AuditReport]
    """Adapter -> its audit, which needs no model; only those that could be audited."""
    measuring: MeasuringOptions
    seed: int
    settings: dict[str, Setting]
    """What all models have in common, and what a folder of another evaluation is told by."""

    @property
    def base(self) -> EvaluatedModel:
        """The base model."""
        return self.models[0]

    @property
    def prompts(self) -> dict[SetName, list[Asked]]:
        """The requests as the models are asked them."""
        return {of_set: [request.asked for request in asked] for of_set, asked in self.requests.items()}

    def lm_eval_entry(self, task: str) -> Entry[dict[str, dict[str, float]]]:
        """Where what lm-eval finds on a task is kept."""
        return lm_eval_entry(task, self.lm_eval.limit, self.seed)


def plan_evaluation(
    base_model: str,
    adapters: Mapping[str, str | os.PathLike],
    models: Mapping[str, str | os.PathLike],
    safety_module: SafetyModuleSource,
    data: DataOptions,
    measuring: MeasuringOptions,
    judges: Sequence[str],
    lm_eval: LmEvalOptions,
    loading: LoadingOptions,
    title: str | None,
) -> EvaluationPlan:
    """
    Check and read everything that can be without a model's weights; for the arguments and errors see `evaluate`.

    Warnings are attributed to the caller of the caller.
    """
    _check_numbers(data, measuring, lm_eval)
    loading.check()
    _check_uses(data, lm_eval, safety_module, adapters)
    if lm_eval.tasks:
        check_tasks(lm_eval.tasks, lm_eval.include_path)
    requests, task = data.requests(), data.held_out_task()
    planned_judges = tuple(planned_judge(judge) for judge in dict.fromkeys(judges))
    found = find_models(base_model, adapters, models, loading.revision)
    base = found[0]
    audits = _audits(found, safety_module)
    _warn_of_calibration_rows(requests["harmful"], found, safety_module)
    tokenizer = load_tokenizer(base.source, loading)
    if tokenizer is None:
        raise ValueError(f"base_model={base.source!r}: no tokenizer was found beside the model.")
    check_vocabularies(tokenizer, found, loading)
    if task is not None:
        _check_task(task, tokenizer)
    return EvaluationPlan(
        title=title or f"Evaluation of {Path(base.source).name}",
        models=tuple(found),
        loading=loading,
        tokenizer=tokenizer,
        requests=requests,
        task=task,
        judges=planned_judges,
        lm_eval=lm_eval,
        audits=audits,
        measuring=measuring,
        seed=data.seed,
        settings=common_settings(base, data, requests, measuring, loading),
    )


def common_settings(
    base: EvaluatedModel,
    data: DataOptions,
    requests: Mapping[SetName, Sequence[Request]],
    measuring: MeasuringOptions,
    loading: LoadingOptions,
) -> dict[str, Setting]:
    """What all models of an evaluation have in common."""
    sources = {"harmful": data.harmful, "harmless": data.harmless}
    choice = {"num_requests": data.num_requests, "seed": data.seed}
    return {
        "base_model": Setting(base.source, base.digest),
        **{name: Setting(_shown(sources[name]), requests_digest(requests[name]), choice) for name in SETS},
        "max_new_tokens": Setting(measuring.max_new_tokens),
        "kl_tokens": Setting(measuring.kl_tokens),
        "dtype": Setting(loading.dtype),
        "load_in_4bit": Setting(loading.load_in_4bit),
        "load_in_8bit": Setting(loading.load_in_8bit),
        "refusing_openings": Setting(list(REFUSING_OPENINGS)),
        "complying_openings": Setting(list(COMPLYING_OPENINGS)),
    }


def planned_judge(spec: str) -> PlannedJudge:
    """
    A judge by name, see `load_judge`; the model that it may be is not loaded.

    Raises:
        ValueError: There is none of that name, or its argument is not usable.
    """
    judge = load_judge(spec)
    return PlannedJudge(judge.name, judge.kind, judge.describe())


def _audits(models: Sequence[EvaluatedModel], safety_module: SafetyModuleSource) -> dict[str, AuditReport]:
    audits = {}
    for evaluated in models:
        if evaluated.kind != "adapter" or (safety_module is None and not evaluated.has_safety_module):
            continue
        if evaluated.is_plain_lora:
            audits[evaluated.name] = audit(evaluated.folder, safety_module)
        else:
            warnings.warn(f"{evaluated.name} is not plain LoRA, so its update is not audited.", stacklevel=4)
    return audits


def _warn_of_calibration_rows(
    requests: Sequence[Request], models: Sequence[EvaluatedModel], safety_module: SafetyModuleSource
) -> None:
    """What a method does to the requests that it was calibrated on says little about others."""
    modules: list[SafetyModule | str | os.PathLike] = [each.folder for each in models if each.has_safety_module]
    modules += [] if safety_module is None else [safety_module]
    loaded = [module if isinstance(module, SafetyModule) else SafetyModule.load(module) for module in modules]
    sources = {
        source
        for module in loaded
        for source in (
            *(module.provenance.get("safety_sources") or [module.provenance.get("safety_data")]),
            module.provenance.get("contrastive_data"),
        )
    }
    for source in sorted(source for source in sources if isinstance(source, str)):
        if source != "builtin" and not Path(source).exists():
            continue  # rows in memory, or a file of another machine
        try:
            rows = load_examples(source, option="safety_data", allow_missing_response=True)
        except DataError:
            continue  # changed since; it is not needed here
        known = {row.transcript.strip() for row in rows if isinstance(row, Example)}
        shared = sum(request.prompt.strip() in known for request in requests)
        if shared:
            warnings.warn(
                f"{shared} of {len(requests)} harmful requests stand in {source!r}, from which a safety module was "
                "computed. Evaluate on others.",
                stacklevel=4,
            )


def _check_task(task: HeldOutTask, tokenizer: Any) -> None:
    for row in task.rows:
        try:
            encode_conversation(tokenizer, row)
        except ValueError as error:
            raise DataError(f"{task.description}: {error}") from error


def _check_numbers(data: DataOptions, measuring: MeasuringOptions, lm_eval: LmEvalOptions) -> None:
    numbers: dict[str, int | None] = {
        "num_requests": data.num_requests,
        "num_task_rows": data.num_task_rows,
        "max_new_tokens": measuring.max_new_tokens,
        "batch_size": measuring.batch_size,
        "kl_tokens": measuring.kl_tokens,
        "lm_eval_limit": lm_eval.limit,
    }
    for name, value in numbers.items():
        if value is not None:
            check_number(name, value, 1)
    threshold = measuring.perplexity_threshold
    if threshold != math.inf:  # then no answer is above it
        check_real("perplexity_threshold", threshold, "a number above 0", lambda number: number > 0)


def _check_uses(
    data: DataOptions, lm_eval: LmEvalOptions, safety_module: SafetyModuleSource, adapters: Mapping[str, Any]
) -> None:
    for name, value, needed, given in (
        ("num_task_rows", data.num_task_rows, "task", data.task is not None),
        ("lm_eval_limit", lm_eval.limit, "lm_eval_tasks", bool(lm_eval.tasks)),
        ("lm_eval_include_path", lm_eval.include_path, "lm_eval_tasks", bool(lm_eval.tasks)),
        ("safety_module", safety_module, "adapters", bool(adapters)),
    ):
        if value is not None and not given:
            raise ValueError(f"{name} has no effect without {needed}. Give {needed}, or leave {name} out.")


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"rows ({type(source).__name__})"
