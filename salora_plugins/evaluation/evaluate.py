"""Evaluate a base model and what was made of it, in a folder where an interrupted evaluation continues."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..adapters.audit import audit
from ..models.loading import check_loading, load_tokenizer
from ..rows.examples import Example, select_examples
from ..rows.reading import DataError, load_examples
from ..rows.sources import describe
from ..safety_module import SafetyModule
from ..support.files import atomic_write
from .coherence import PERPLEXITY_THRESHOLD, coherence, response_perplexities
from .evaluated_models import Loader, Subject, check_vocabularies, find_subjects
from .first_tokens import (
    COMPLYING_OPENINGS,
    KL_TOKENS,
    REFUSING_OPENINGS,
    FirstTokenReference,
    first_token_kl,
    first_token_reference,
    refusal_margins,
)
from .generation import generate_responses
from .judges.named import NamedJudge, load_judge
from .lm_eval_tasks import check_tasks, run_lm_eval
from .metrics import encode_conversation, response_loss
from .reports.figures import paired_tests, set_result
from .reports.report import ANSWERS_FOLDER, REPORT_FILE, Answer, EvaluationReport, ModelResult, TaskResult
from .request_sets import Request, load_requests, requests_digest
from .run_folder import Setting, Work

WORK_FOLDER = "work"
"""What is measured so far, in the folder of the report."""

SETS = ("harmful", "harmless")
_JUDGED_AT_ONCE = 32

Measurement = Callable[[nn.Module], Any]
"""Measures something on a model; JSON values."""

# Types of what lies in the work folder: of a measurement by its key, and of the lines of answers and of verdicts.
_SHAPES = {"task": float, "lm_eval": dict[str, dict[str, float]], "perplexities": dict[str, list[float | None]]}
_RESPONSES = list[tuple[int, str]]
_VERDICTS = list[tuple[str, int, bool]]


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

    All answer greedily, rendered with the base model's tokenizer and chat template. One model is in memory at a time;
    an adapter that is not plain LoRA, and may change the base model's weights, is loaded on a fresh one. Judges that
    are models are loaded when all answers are complete.

    `out` receives `report.json`, `answers/NAME.jsonl`, and `work/` with every measurement as soon as it is made. An
    interrupted evaluation continues there and comes to the same result. Adapters, models, judges, a task and lm-eval
    tasks can be added later: only what is missing is computed. What all models have in common cannot be changed:
    the base model, the requests, the length of answers, and how models are loaded.

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
        FileNotFoundError, FileExistsError: See the message.
        ValueError: An option is out of range, data cannot be used, a model does not fit, or `out` holds an evaluation
            with other settings.
        ImportError: lm-eval is asked for and not installed.
    """
    _check_numbers(
        num_requests=num_requests,
        num_task_rows=num_task_rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        kl_tokens=kl_tokens,
        lm_eval_limit=lm_eval_limit,
        perplexity_threshold=perplexity_threshold,
    )
    check_loading(dtype, load_in_4bit, load_in_8bit)
    _check_of_use("num_task_rows", num_task_rows, "task", task is not None)
    _check_of_use("lm_eval_limit", lm_eval_limit, "lm_eval_tasks", bool(lm_eval_tasks))
    _check_of_use("lm_eval_include_path", lm_eval_include_path, "lm_eval_tasks", bool(lm_eval_tasks))
    _check_of_use("safety_module", safety_module, "adapters", bool(adapters))
    if lm_eval_tasks:
        check_tasks(lm_eval_tasks, lm_eval_include_path)
    requests = {
        "harmful": load_requests(harmful, option="harmful", num=num_requests, seed=seed),
        "harmless": load_requests(harmless, option="harmless", num=num_requests, seed=seed),
    }
    task_rows = None if task is None else _task_rows(task, num_task_rows, seed)
    judges = list(dict.fromkeys(judges))
    judge_settings = {judge: load_judge(judge).describe() for judge in judges}
    subjects = find_subjects(str(base_model), adapters or {}, models or {}, revision)
    base = subjects[0]
    audits = {subject.name: _audit(subject, safety_module) for subject in subjects if subject.kind == "adapter"}
    _warn_of_calibration_rows(requests["harmful"], subjects, safety_module)
    tokenizer = load_tokenizer(base.source, revision, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"base_model={base.source!r}: no tokenizer was found beside the model.")
    check_vocabularies(tokenizer, subjects, trust_remote_code)
    for row in task_rows or ():
        try:
            encode_conversation(tokenizer, row)
        except ValueError as error:
            raise DataError(f"{describe(task, 'task')}: {error}") from error

    out = Path(out)
    work = Work(out / WORK_FOLDER)
    _prepare(out, work, overwrite)
    sources = {"harmful": harmful, "harmless": harmless}
    choice = {"num_requests": num_requests, "seed": seed}
    settings = {
        "base_model": Setting(base.source, base.digest),
        **{name: Setting(_shown(sources[name]), requests_digest(requests[name]), choice) for name in SETS},
        "max_new_tokens": Setting(max_new_tokens),
        "kl_tokens": Setting(kl_tokens),
        "dtype": Setting(dtype),
        "load_in_4bit": Setting(load_in_4bit),
        "load_in_8bit": Setting(load_in_8bit),
        "refusing_openings": Setting(list(REFUSING_OPENINGS)),
        "complying_openings": Setting(list(COMPLYING_OPENINGS)),
    }
    work.keep_settings(settings)
    for subject in subjects:
        work.keep_source(subject.name, subject.source, subject.digest)

    more: dict[str, Measurement] = {}
    task_digest = hashlib.sha256(json.dumps(task_rows).encode()).hexdigest()
    task_key = f"task-{task_digest[:16]}"
    if task_rows is not None:
        more[task_key] = lambda model: response_loss(model, tokenizer, task_rows, batch_size)
    lm_eval_keys = {name: f"lm_eval-{_key(name, lm_eval_limit, seed)}" for name in lm_eval_tasks}
    for name, key in lm_eval_keys.items():
        more[key] = lambda model, name=name: run_lm_eval(
            model,
            tokenizer,
            name,
            limit=lm_eval_limit,
            include_path=lm_eval_include_path,
            batch_size=batch_size,
            seed=seed,
        )
    loader = Loader(
        base,
        revision,
        dtype=dtype,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        trust_remote_code=trust_remote_code,
    )
    prompts = {name: [request.prompt for request in requests[name]] for name in SETS}
    runner = _Runner(work, loader, tokenizer, prompts, max_new_tokens, kl_tokens, batch_size, progress)
    for subject in subjects:
        runner.measure(subject, more)
    for subject in subjects:
        runner.measure_perplexities(subject)
    loader.release()

    answers = {subject.name: _answers(work, subject.name, requests, perplexity_threshold) for subject in subjects}
    kinds = {}
    for spec in judges:
        judge = load_judge(spec)
        kinds[judge.name] = judge.kind
        for name in answers:
            answers[name] = _judged(judge, judge_settings[spec], answers[name], work, name, progress)

    results = [
        ModelResult(
            name=subject.name,
            kind=subject.kind,
            source=subject.source,
            **{of: set_result([answer for answer in answers[subject.name] if answer.set == of], kinds) for of in SETS},
            task=None
            if task_rows is None
            else TaskResult(loss=work.read(subject.name, task_key, _shape(task_key)), rows=len(task_rows)),
            lm_eval={
                name: metrics
                for key in lm_eval_keys.values()
                for name, metrics in work.read(subject.name, key, _shape(key)).items()
            },
            audit=audits.get(subject.name),
        )
        for subject in subjects
    ]
    data = {
        name: {"source": settings[name].value, "rows": len(requests[name]), "sha256": settings[name].digest}
        for name in SETS
    }
    if task_rows is not None:
        data["task"] = {"source": _shown(task), "rows": len(task_rows), "sha256": task_digest}
    packages = ("salora-plugins", "torch", "transformers", "peft", *(["lm-eval"] if lm_eval_tasks else []))
    report = EvaluationReport(
        title=title or f"Evaluation of {Path(base.source).name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=base.source,
        settings={
            **{name: setting.value for name, setting in settings.items() if name not in ("base_model", *SETS)},
            "batch_size": batch_size,
            "seed": seed,
            "revision": revision,
            "perplexity_threshold": perplexity_threshold,
            "judges": judge_settings,
            "lm_eval_limit": lm_eval_limit,
        },
        data=data,
        versions={name: version(name) for name in packages},
        models=results,
        tests=paired_tests(answers, kinds),
    )
    for name, of_model in answers.items():
        content = "".join(answer.model_dump_json() + "\n" for answer in of_model)
        atomic_write(out / ANSWERS_FOLDER / f"{name}.jsonl", content.encode())
    report.save(out)
    return report


class _Runner:
    """Measures on models what is not measured yet."""

    def __init__(
        self,
        work: Work,
        loader: Loader,
        tokenizer: Any,
        prompts: Mapping[str, list[str]],
        max_new_tokens: int,
        kl_tokens: int,
        batch_size: int,
        progress: bool,
    ):
        self._work, self._loader, self._tokenizer, self._prompts = work, loader, tokenizer, prompts
        self._max_new_tokens, self._kl_tokens = max_new_tokens, kl_tokens
        self._batch_size, self._progress = batch_size, progress
        self._references: dict[str, FirstTokenReference] = {}

    def measure(self, subject: Subject, more: Mapping[str, Measurement]) -> None:
        """
        Everything but the perplexities, for which the base model is needed.

        Args:
            subject: The model.
            more: Name -> what is to be measured besides answers, margins and KL divergences.
        """
        measurements: dict[str, Measurement] = {"margins": self._margins, "kl": self._kl, **more}
        if subject.kind == "base":
            measurements["kl"] = lambda model: {name: [0.0] * len(asked) for name, asked in self._prompts.items()}
        missing = {k: run for k, run in measurements.items() if self._work.read(subject.name, k, _shape(k)) is None}
        unanswered = any(len(_responses(self._work, subject.name, name)) < len(p) for name, p in self._prompts.items())
        if not missing and not unanswered:
            return
        if "kl" in missing and subject.kind != "base" and not self._references:
            self._references = {
                name: first_token_reference(
                    self._loader.base,
                    self._tokenizer,
                    asked,
                    num_tokens=self._kl_tokens,
                    batch_size=self._batch_size,
                )
                for name, asked in self._prompts.items()
            }
        with self._loader.loaded(subject) as model:
            if unanswered:
                self._answer(subject.name, model)
            for key, run in missing.items():
                value = run(model)
                _check_finite(value, subject)
                self._work.write(subject.name, key, value)

    def measure_perplexities(self, subject: Subject) -> None:
        """Of a model's answers, under the base model."""
        if self._work.read(subject.name, "perplexities", _shape("perplexities")) is not None:
            return
        values = {}
        for name, asked in self._prompts.items():
            responses = _responses(self._work, subject.name, name)
            values[name] = response_perplexities(
                self._loader.base,
                self._tokenizer,
                asked,
                [responses[index] for index in range(len(asked))],
                batch_size=self._batch_size,
            )
        self._work.write(subject.name, "perplexities", values)

    def _answer(self, name: str, model: nn.Module) -> None:
        total = sum(map(len, self._prompts.values()))
        with tqdm(total=total, desc=f"{name}: answers", unit="request", disable=not self._progress) as bar:
            for of_set, asked in self._prompts.items():
                done = _responses(self._work, name, of_set)
                bar.update(len(done))
                # Batches are written whole and in the order of their lengths, so that what remains is batched as
                # without an interruption.
                lengths = [len(tokens) for tokens in self._tokenizer(asked)["input_ids"]]
                order = sorted((i for i in range(len(asked)) if i not in done), key=lambda i: lengths[i])
                lines = self._work.lines(name, f"responses-{of_set}", _RESPONSES)
                for start in range(0, len(order), self._batch_size):
                    chosen = order[start : start + self._batch_size]
                    responses = generate_responses(
                        model,
                        self._tokenizer,
                        [asked[index] for index in chosen],
                        max_new_tokens=self._max_new_tokens,
                        batch_size=self._batch_size,
                        progress=False,
                    )
                    lines.add(list(zip(chosen, responses, strict=True)))
                    bar.update(len(chosen))

    def _margins(self, model: nn.Module) -> dict[str, list[float]]:
        return {
            name: refusal_margins(model, self._tokenizer, asked, batch_size=self._batch_size).tolist()
            for name, asked in self._prompts.items()
        }

    def _kl(self, model: nn.Module) -> dict[str, list[float]]:
        return {
            name: first_token_kl(model, reference, batch_size=self._batch_size).tolist()
            for name, reference in self._references.items()
        }


def _shape(key: str) -> Any:
    return _SHAPES.get(key.partition("-")[0], dict[str, list[float]])


def _responses(work: Work, name: str, of_set: str) -> dict[int, str]:
    batches = work.lines(name, f"responses-{of_set}", _RESPONSES).records
    return {index: text for batch in batches for index, text in batch}


def _answers(
    work: Work, name: str, requests: Mapping[str, Sequence[Request]], perplexity_threshold: float
) -> list[Answer]:
    """A model's answers to both sets, not judged yet."""
    keys = ("margins", "kl", "perplexities")
    margins, kl, perplexities = found = [work.read(name, key, _shape(key)) for key in keys]
    answers = []
    for of_set, asked in requests.items():
        for key, values in zip(keys, found, strict=True):
            if len(values.get(of_set, ())) != len(asked):
                raise work.damaged(name, key)
        responses = _responses(work, name, of_set)
        if not set(range(len(asked))) <= set(responses):
            raise work.damaged(name, f"responses-{of_set}")
        for index, request in enumerate(asked):
            perplexity = perplexities[of_set][index]
            answers.append(
                Answer(
                    set=of_set,
                    index=index,
                    category=request.category,
                    prompt=request.prompt,
                    response=responses[index],
                    coherence=coherence(responses[index], perplexity, threshold=perplexity_threshold),
                    perplexity=perplexity,
                    verdicts={},
                    refusal_margin=margins[of_set][index],
                    kl=kl[of_set][index],
                )
            )
    return answers


def _judged(
    judge: NamedJudge, settings: Mapping[str, Any], answers: Sequence[Answer], work: Work, name: str, progress: bool
) -> list[Answer]:
    """The answers with a judge's verdicts on the coherent ones. Verdicts are kept; where it failed, it tries again."""
    # Other phrases or another rubric make another judge.
    lines = work.lines(name, f"verdicts-{_key(judge.name, settings)}", _VERDICTS)
    verdicts = {(of_set, index): verdict for of_set, index, verdict in itertools.chain(*lines.records)}
    errors: dict[tuple[str, int], str] = {}
    sets = SETS if judge.kind == "refusal" else ("harmful",)
    judged = [answer for answer in answers if answer.set in sets and answer.coherence == "coherent"]
    asked = [answer for answer in judged if (answer.set, answer.index) not in verdicts]
    with tqdm(total=len(asked), desc=f"{name}: {judge.name}", unit="answer", disable=not progress) as bar:
        for start in range(0, len(asked), _JUDGED_AT_ONCE):
            chunk = asked[start : start + _JUDGED_AT_ONCE]
            done = []
            for answer, verdict in zip(chunk, judge([(a.prompt, a.response) for a in chunk]), strict=True):
                if isinstance(verdict, str):
                    errors[answer.set, answer.index] = verdict
                else:
                    done.append((answer.set, answer.index, verdict))
            lines.add(done)
            verdicts |= {(of_set, index): verdict for of_set, index, verdict in done}
            bar.update(len(chunk))
    result = []
    for answer in answers:
        key = answer.set, answer.index
        if key in errors:
            update = {
                "verdicts": {**answer.verdicts, judge.name: None},
                "errors": {**answer.errors, judge.name: errors[key]},
            }
            answer = answer.model_copy(update=update)
        elif key in verdicts and answer.coherence == "coherent":
            answer = answer.model_copy(update={"verdicts": {**answer.verdicts, judge.name: verdicts[key]}})
        result.append(answer)
    return result


def _task_rows(source: Any, num: int | None, seed: int) -> list[dict[str, Any]]:
    """Conversations as `response_loss` takes them."""
    examples = load_examples(source, option="task")
    if any(not isinstance(example, Example) or not example.messages for example in examples):
        raise DataError(
            f"{describe(source, 'task')}: there is plain text, or there are token ids. Give conversations: rows with "
            "`messages`, or with `prompt` and `response`."
        )
    if num is not None:
        examples = select_examples(examples, num, seed)
    return [
        {"prompt": list(example.messages), "completion": [{"role": "assistant", "content": example.response}]}
        for example in examples
    ]


def _audit(subject: Subject, safety_module: SafetyModule | str | os.PathLike | None) -> dict[str, Any] | None:
    if safety_module is None and not subject.has_safety_module:
        return None
    if not subject.is_plain_lora:
        warnings.warn(f"{subject.name} is not plain LoRA, so its update is not audited.", stacklevel=3)
        return None
    return audit(subject.folder, safety_module).to_dict()


def _warn_of_calibration_rows(
    requests: Sequence[Request], subjects: Sequence[Subject], safety_module: SafetyModule | str | os.PathLike | None
) -> None:
    """What a method does to the requests that it was calibrated on says little about others."""
    modules = [subject.folder for subject in subjects if subject.has_safety_module]
    modules += [] if safety_module is None else [safety_module]
    loaded = [module if isinstance(module, SafetyModule) else SafetyModule.load(module) for module in modules]
    sources = {module.provenance.get("safety_data") for module in loaded}
    for source in sorted(source for source in sources if isinstance(source, str)):
        if source != "builtin" and not Path(source).exists():
            continue  # rows in memory, or a file of another machine
        try:
            rows = load_examples(source, option="safety_data", allow_missing_response=True)
        except DataError:
            continue  # changed since; it is not needed here
        known = {row.request.strip() for row in rows if isinstance(row, Example)}
        shared = sum(request.prompt.strip() in known for request in requests)
        if shared:
            warnings.warn(
                f"{shared} of {len(requests)} harmful requests stand in {source!r}, from which a safety module was "
                "computed. Evaluate on others.",
                stacklevel=3,
            )


def _prepare(out: Path, work: Work, overwrite: bool) -> None:
    """Make sure that `out` may be written to."""
    if out.exists() and not work.exists and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and holds no evaluation. Name another folder to write.")
    if overwrite and work.exists:
        (out / REPORT_FILE).unlink(missing_ok=True)
        for folder in (ANSWERS_FOLDER, WORK_FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)


def _check_numbers(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give a number above 0.")


def _check_of_use(name: str, value: Any, needed: str, given: bool) -> None:
    if value is not None and not given:
        raise ValueError(f"{name} has no effect without {needed}. Give {needed}, or leave {name} out.")


def _check_finite(value: Any, subject: Subject) -> None:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_finite(part, subject)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{subject.name}={subject.source}: its outputs are not finite numbers, so that nothing can be measured. "
            "Its weights are damaged, or too large for the dtype: try dtype='float32' (--dtype), or leave it out."
        )


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"rows ({type(source).__name__})"


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
