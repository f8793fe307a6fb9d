"""Evaluate a base model and what was made of it, in one folder that an interrupted evaluation goes on in."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..audit import audit
from ..calibration.data import DataError, Example, load_examples, select_examples
from ..calibration.sources import describe
from ..commands.loading import load_model, load_tokenizer
from ..files import atomic_write, hub_file, hub_folder, is_hub_id
from ..plugins import judges as known_judges
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..saved_adapter import ADAPTER_CONFIG_FILE, WEIGHTS_FILE, SavedAdapter, check_plain_lora
from .coherence import PERPLEXITY_THRESHOLD, coherence, response_perplexities
from .first_tokens import (
    COMPLYING_OPENINGS,
    KL_TOKENS,
    REFUSING_OPENINGS,
    first_token_kl,
    first_token_reference,
    refusal_margins,
)
from .generation import generate_responses
from .metrics import response_loss
from .report import (
    ANSWERS_FOLDER,
    REPORT_FILE,
    Answer,
    EvaluationReport,
    Judgement,
    ModelResult,
    PairedTest,
    SetResult,
    TaskResult,
)
from .requests import Request, load_requests, requests_digest
from .statistics import Mean, Proportion, mcnemar

WORK_FOLDER = "work"
"""What is measured already, in the folder of the report."""

BASE = "base"
"""The base model's name in a report."""

SETS = ("harmful", "harmless")
NO_CATEGORY = "(none)"
"""The category of requests without one, where others have one."""

_NAME = re.compile(r"\w[\w .,+=@()-]*")
_JUDGE_CHUNK = 32
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


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
    Measure what a base model, adapters on it, and other models of its tokenizer refuse, answer and know.

    All answer greedily, so that nothing depends on chance. An adapter that is not plain LoRA, and may change the base
    model when it is loaded, gets a base model of its own. One model is in memory at a time; judges that are models
    are loaded when the answers are complete.

    `out` receives `report.json`, `answers/NAME.jsonl`, and `work/`, in which everything that was measured is kept at
    once. An interrupted evaluation continues there, to the same result. Adapters, models, judges, the task and lm-eval
    tasks can be added later; only what is missing is computed. What all models have in common cannot be changed there:
    the base model, the requests, the lengths.

    Args:
        base_model: Folder or hub repository of the model that the adapters belong to.
        adapters: Name -> folder or hub repository of an adapter that PEFT loads, saved as safetensors.
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
        lm_eval_tasks: Names of tasks or groups of lm-eval (`pip install 'salora-plugins[lm-eval]'`).
        lm_eval_limit: Take so many rows of each of them only.
        lm_eval_include_path: A folder with tasks of one's own.
        dtype, device_map, load_in_4bit, load_in_8bit, trust_remote_code: How models are loaded.
        revision: Of the base model's hub repository.
        title: Of the report. Default: the base model's name.
        overwrite: Delete what an evaluation left in `out`, and start again.
        progress: Show progress bars.

    Returns:
        The report, which stands in `out` as well.

    Raises:
        FileNotFoundError, FileExistsError: See the message.
        ValueError: An option is out of range; data cannot be used; a model has another vocabulary; `out` holds an
            evaluation with other settings.
        ImportError: lm-eval is asked for and not installed.
    """
    if lm_eval_tasks:
        _import_lm_eval()
    _check_numbers(
        num_requests=num_requests,
        num_task_rows=num_task_rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        kl_tokens=kl_tokens,
        lm_eval_limit=lm_eval_limit,
        perplexity_threshold=perplexity_threshold,
    )
    requests = {
        name: load_requests(source, option=name, num=num_requests, seed=seed)
        for name, source in (("harmful", harmful), ("harmless", harmless))
    }
    task_rows = None if task is None else _task_rows(task, num_task_rows, seed)
    judge_settings = {judge: describe_judge(judge) for judge in dict.fromkeys(judges)}
    subjects = _subjects(base_model, adapters or {}, models or {}, revision)
    audits = {
        subject.name: report
        for subject in subjects
        if subject.kind == "adapter" and (report := _audit(subject, safety_module)) is not None
    }
    _warn_of_calibration_rows(requests["harmful"], subjects, safety_module)

    out = Path(out)
    work = _Work(out / WORK_FOLDER)
    _check_destination(out, overwrite)
    if overwrite:
        _clear(out)
    common = {
        "base_model": _Setting(str(base_model), subjects[0].digest),
        **{name: _Setting(_shown(source), requests_digest(requests[name])) for name, source in
           (("harmful", harmful), ("harmless", harmless))},
        **{
            name: _Setting(value)
            for name, value in {
                "max_new_tokens": max_new_tokens,
                "kl_tokens": kl_tokens,
                "dtype": dtype,
                "load_in_4bit": load_in_4bit,
                "load_in_8bit": load_in_8bit,
                "refusing_openings": list(REFUSING_OPENINGS),
                "complying_openings": list(COMPLYING_OPENINGS),
            }.items()
        },
    }  # fmt: skip
    work.check_settings(common)
    work.check_subjects(subjects)

    tokenizer = load_tokenizer(str(base_model), revision, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"base_model={str(base_model)!r}: no tokenizer was found beside the model.")
    _check_vocabularies(tokenizer, subjects, trust_remote_code)
    loader = _Loader(
        subjects[0],
        {
            "dtype": dtype,
            "device_map": device_map,
            "load_in_4bit": load_in_4bit,
            "load_in_8bit": load_in_8bit,
            "trust_remote_code": trust_remote_code,
        },
        revision,
    )
    runner = _Runner(work, loader, tokenizer, requests, max_new_tokens, kl_tokens, batch_size, progress)
    jobs: dict[str, Callable[[nn.Module], Any]] = {}
    if task_rows is not None:
        task_key = f"task-{_digest(json.dumps(task_rows))}"
        jobs[task_key] = lambda model: response_loss(model, tokenizer, task_rows, batch_size)
    lm_eval_keys = {name: f"lm_eval-{_digest(json.dumps([name, lm_eval_limit, seed]))}" for name in lm_eval_tasks}
    for name, key in lm_eval_keys.items():
        jobs[key] = lambda model, name=name: _lm_eval(
            model, tokenizer, name, lm_eval_limit, lm_eval_include_path, batch_size, seed
        )
    for subject in subjects:
        runner.measure(subject, jobs)
    for subject in subjects:
        runner.measure_perplexities(subject)
    loader.release()

    answers = {subject.name: _answers(subject.name, work, requests, perplexity_threshold) for subject in subjects}
    kinds = {}
    for spec in judge_settings:
        judge = load_judge(spec)
        kinds[judge.name] = judge.kind
        for subject in subjects:
            answers[subject.name] = _judged(judge, spec, answers[subject.name], work, subject.name, progress)
        del judge
        _free()

    results = []
    for subject in subjects:
        sets = {name: [answer for answer in answers[subject.name] if answer.set == name] for name in SETS}
        results.append(
            ModelResult(
                name=subject.name,
                kind=subject.kind,
                source=subject.source,
                **{name: _set_result(of_set, kinds) for name, of_set in sets.items()},
                task=None
                if task_rows is None
                else TaskResult(loss=work.read(subject.name, task_key), rows=len(task_rows)),
                lm_eval={
                    of_task: metrics
                    for key in lm_eval_keys.values()
                    for of_task, metrics in work.read(subject.name, key).items()
                },
                audit=audits.get(subject.name),
            )
        )
    data = {
        name: {
            "source": common[name].value,
            "rows": len(requests[name]),
            "sha256": common[name].digest,
        }
        for name in SETS
    }
    if task_rows is not None:
        data["task"] = {
            "source": _shown(task),
            "rows": len(task_rows),
            "sha256": hashlib.sha256(json.dumps(task_rows).encode()).hexdigest(),
        }
    report = EvaluationReport(
        title=title or f"Evaluation of {Path(str(base_model)).name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=str(base_model),
        settings={
            **{name: setting.value for name, setting in common.items() if name not in (*SETS, "base_model")},
            "batch_size": batch_size,
            "seed": seed,
            "revision": revision,
            "perplexity_threshold": perplexity_threshold,
            "judges": judge_settings,
            "lm_eval_limit": lm_eval_limit,
        },
        data=data,
        versions={name: version(name) for name in ("salora-plugins", "torch", "transformers", "peft")}
        | ({"lm-eval": version("lm-eval")} if lm_eval_tasks else {}),
        models=results,
        tests=_tests(answers, kinds),
    )
    for name, of_model in answers.items():
        lines = "".join(answer.model_dump_json() + "\n" for answer in of_model)
        atomic_write(out / ANSWERS_FOLDER / f"{name}.jsonl", lines.encode())
    report.save(out)
    return report


@dataclass(frozen=True)
class _Subject:
    """A model of the report."""

    name: str
    kind: str
    """"base", "adapter" or "model"."""
    source: str
    """What the user named."""
    folder: str
    """Where an adapter lies on this machine; for a model, as `source`."""
    digest: str
    """Of its content."""


@dataclass(frozen=True)
class _Setting:
    value: Any
    digest: str | None = None
    """Of the content that the value names; two settings of one digest are the same."""


class _Work:
    """What was measured, by model, each in a file of its own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def check_settings(self, settings: Mapping[str, _Setting]) -> None:
        """Keep the settings, or compare them with those that the folder was begun with."""
        file = self._folder / "settings.json"
        new = {name: vars(setting) for name, setting in settings.items()}
        if not file.exists():
            atomic_write(file, (json.dumps(new, indent=2) + "\n").encode())
            return
        old = json.loads(file.read_text(encoding="utf-8"))
        for name, setting in new.items():
            before = old.get(name, {"value": None, "digest": None})
            by = "value" if setting["digest"] is None else "digest"
            if before[by] == setting[by]:
                continue
            if before["value"] == setting["value"]:
                found = f"{name}={setting['value']!r} has another content than when the evaluation there began"
            else:
                found = f"the evaluation there began with {name}={before['value']!r}, not {setting['value']!r}"
            raise ValueError(
                f"{self._folder.parent}: {found}. Go on with the same, name another folder, or start again with "
                "overwrite=True (--overwrite)."
            )

    def check_subjects(self, subjects: Sequence[_Subject]) -> None:
        """Keep what each model is, or compare it with what was measured under its name."""
        for subject in subjects:
            found = self.read(subject.name, "source")
            if found is None:
                self.write(subject.name, "source", {"source": subject.source, "digest": subject.digest})
            elif found["digest"] != subject.digest:
                raise ValueError(
                    f"{self._folder.parent}: another model was evaluated as {subject.name!r} there "
                    f"({found['source']}). Give this one another name, or start again with overwrite=True "
                    "(--overwrite)."
                )

    def read(self, name: str, key: str) -> Any:
        """None where it was not measured."""
        file = self.file(name, f"{key}.json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, name: str, key: str, value: Any) -> None:
        atomic_write(self.file(name, f"{key}.json"), json.dumps(value).encode())

    def file(self, name: str, file: str) -> Path:
        return self._folder / name / file


class _Lines:
    """A file to which records are added one by one; of one that was cut short, the whole records count."""

    def __init__(self, file: Path):
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            atomic_write(file, whole)
        self.records = [json.loads(line) for line in whole.decode().split("\n") if line]

    def add(self, record: Any) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


class _Loader:
    """Loads models, one at a time."""

    def __init__(self, base: _Subject, options: dict[str, Any], revision: str | None):
        self._base, self._options, self._revision = base, options, revision
        self._loaded: tuple[str, nn.Module] | None = None

    def model(self, subject: _Subject) -> nn.Module:
        """A model that is no adapter."""
        if self._loaded is None or self._loaded[0] != subject.name:
            self.release()
            revision = self._revision if subject.kind == "base" else None
            self._loaded = subject.name, load_model(subject.source, revision=revision, **self._options)
        return self._loaded[1]

    @contextmanager
    def adapted(self, subject: _Subject) -> Iterator[nn.Module]:
        """The base model with an adapter, which is taken off again."""
        from peft import PeftModel

        base = self.model(self._base)
        kept = False
        try:
            try:
                model = PeftModel.from_pretrained(base, subject.folder)
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{subject.source}: the adapter {subject.name!r} does not fit the base model {self._base.source}: "
                    f"{error}"
                ) from error
            yield model.eval()
            if _leaves_base_alone(subject):
                model.unload()
                kept = True
        finally:
            del base
            if not kept:
                self.release()

    def release(self) -> None:
        self._loaded = None
        _free()


class _Runner:
    """Measures what is missing."""

    def __init__(
        self,
        work: _Work,
        loader: _Loader,
        tokenizer: Any,
        requests: Mapping[str, Sequence[Request]],
        max_new_tokens: int,
        kl_tokens: int,
        batch_size: int,
        progress: bool,
    ):
        self._work, self._loader, self._tokenizer = work, loader, tokenizer
        self._prompts = {name: [request.prompt for request in of_set] for name, of_set in requests.items()}
        self._max_new_tokens, self._kl_tokens = max_new_tokens, kl_tokens
        self._batch_size, self._progress = batch_size, progress
        self._references: dict[str, Any] = {}
        self._base: _Subject | None = None

    def measure(self, subject: _Subject, jobs: Mapping[str, Callable[[nn.Module], Any]]) -> None:
        """Everything but the perplexities. The base model comes first."""
        if subject.kind == "base":
            self._base = subject
        missing = {
            **({"answers": self._answer} if not self._is_answered(subject.name) else {}),
            **{
                key: job
                for key, job in {"margins": self._margins, "kl": self._kl, **jobs}.items()
                if self._work.read(subject.name, key) is None
            },
        }
        if not missing:
            return
        if "kl" in missing and subject.kind != "base" and not self._references:
            base = self._loader.model(self._base)
            self._references = {
                name: first_token_reference(
                    base, self._tokenizer, prompts, num_tokens=self._kl_tokens, batch_size=self._batch_size
                )
                for name, prompts in self._prompts.items()
            }
        if subject.kind == "adapter":
            with self._loader.adapted(subject) as model:
                self._run(subject, model, missing)
        else:
            self._run(subject, self._loader.model(subject), missing)

    def _run(self, subject: _Subject, model: nn.Module, missing: Mapping[str, Callable]) -> None:
        for key, job in missing.items():
            if key == "answers":
                self._answer(subject.name, model)
            elif key == "kl" and subject.kind == "base":
                zeros = {name: [0.0] * len(prompts) for name, prompts in self._prompts.items()}
                self._work.write(subject.name, key, zeros)
            else:
                value = job(model)
                _check_finite(value, key, subject)
                self._work.write(subject.name, key, value)

    def _is_answered(self, name: str) -> bool:
        return all(len(_responses(self._lines(name, of_set))) == len(p) for of_set, p in self._prompts.items())

    def _lines(self, name: str, of_set: str) -> _Lines:
        return _Lines(self._work.file(name, f"responses-{of_set}.jsonl"))

    def _answer(self, name: str, model: nn.Module) -> None:
        total = sum(map(len, self._prompts.values()))
        with tqdm(total=total, desc=f"{name}: answers", unit="request", disable=not self._progress) as bar:
            for of_set, prompts in self._prompts.items():
                lines = self._lines(name, of_set)
                done = _responses(lines)
                bar.update(len(done))
                # A batch is written as a whole and in the order of the lengths, so that the remaining batches are put
                # together as they would have been without an interruption.
                lengths = [len(ids) for ids in self._tokenizer(prompts)["input_ids"]]
                order = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: lengths[i])
                for start in range(0, len(order), self._batch_size):
                    chosen = order[start : start + self._batch_size]
                    responses = generate_responses(
                        model,
                        self._tokenizer,
                        [prompts[i] for i in chosen],
                        max_new_tokens=self._max_new_tokens,
                        batch_size=self._batch_size,
                        progress=False,
                    )
                    lines.add(list(zip(chosen, responses, strict=True)))
                    bar.update(len(chosen))

    def _margins(self, model: nn.Module) -> dict[str, list[float]]:
        return {
            name: refusal_margins(model, self._tokenizer, prompts, batch_size=self._batch_size).tolist()
            for name, prompts in self._prompts.items()
        }

    def _kl(self, model: nn.Module) -> dict[str, list[float]]:
        return {
            name: first_token_kl(model, reference, batch_size=self._batch_size).tolist()
            for name, reference in self._references.items()
        }

    def measure_perplexities(self, subject: _Subject) -> None:
        """Of a model's answers, under the base model."""
        if self._work.read(subject.name, "perplexities") is None:
            base = self._loader.model(self._base)
            values = {}
            for of_set, prompts in self._prompts.items():
                responses = _responses(self._lines(subject.name, of_set))
                values[of_set] = response_perplexities(
                    base,
                    self._tokenizer,
                    prompts,
                    [responses[i] for i in range(len(prompts))],
                    batch_size=self._batch_size,
                )
            self._work.write(subject.name, "perplexities", values)


def _responses(lines: _Lines) -> dict[int, str]:
    return {index: response for batch in lines.records for index, response in batch}


def _answers(
    name: str, work: _Work, requests: Mapping[str, Sequence[Request]], perplexity_threshold: float
) -> list[Answer]:
    margins, kl, perplexities = (work.read(name, key) for key in ("margins", "kl", "perplexities"))
    answers = []
    for of_set, asked in requests.items():
        responses = _responses(_Lines(work.file(name, f"responses-{of_set}.jsonl")))
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
    judge: Any, spec: str, answers: Sequence[Answer], work: _Work, name: str, progress: bool
) -> list[Answer]:
    """The answers with a judge's verdicts on the coherent ones; what failed before is tried again."""
    lines = _Lines(work.file(name, f"verdicts-{_digest(spec)}.jsonl"))
    verdicts = {(of_set, index): verdict for of_set, index, verdict in itertools.chain(*lines.records)}
    errors: dict[tuple[str, int], str] = {}
    sets = SETS if judge.kind == "refusal" else ("harmful",)
    seen = [answer for answer in answers if answer.set in sets and answer.coherence == "coherent"]
    asked = [answer for answer in seen if (answer.set, answer.index) not in verdicts]
    with tqdm(total=len(asked), desc=f"{name}: {judge.name}", unit="answer", disable=not progress) as bar:
        for start in range(0, len(asked), _JUDGE_CHUNK):
            chunk = asked[start : start + _JUDGE_CHUNK]
            found = judge([(answer.prompt, answer.response) for answer in chunk])
            done = []
            for answer, verdict in zip(chunk, found, strict=True):
                if isinstance(verdict, str):
                    errors[answer.set, answer.index] = verdict
                else:
                    done.append((answer.set, answer.index, verdict))
            lines.add(done)
            verdicts |= {(of_set, index): verdict for of_set, index, verdict in done}
            bar.update(len(chunk))
    keys = {(answer.set, answer.index) for answer in seen}

    def judged(answer: Answer) -> Answer:
        key = answer.set, answer.index
        if key not in keys:
            return answer
        update: dict[str, Any] = {"verdicts": {**answer.verdicts, judge.name: verdicts.get(key)}}
        if key in errors:
            update["errors"] = {**answer.errors, judge.name: errors[key]}
        return answer.model_copy(update=update)

    return [judged(answer) for answer in answers]


def _set_result(answers: Sequence[Answer], kinds: Mapping[str, str]) -> SetResult:
    incoherent = {kind: sum(a.coherence == kind for a in answers) for kind in ("empty", "repeated", "high_perplexity")}
    return SetResult(
        requests=len(answers),
        incoherent=incoherent,
        judgements={
            judge: _judgement(judge, kind, answers)
            for judge, kind in kinds.items()
            if kind == "refusal" or answers[0].set == "harmful"
        },
        refusal_margin=Mean.of([answer.refusal_margin for answer in answers]),
        kl=Mean.of([answer.kl for answer in answers]),
    )


def _judgement(judge: str, kind: str, answers: Sequence[Answer]) -> Judgement:
    counted = [answer for answer in answers if judge not in answer.errors]
    categories: dict[str, list[Answer]] = {}
    if any(answer.category is not None for answer in answers):
        for answer in counted:
            categories.setdefault(NO_CATEGORY if answer.category is None else answer.category, []).append(answer)

    def proportion(of: Sequence[Answer], event: str) -> Proportion:
        return Proportion(count=sum(_happened(answer, judge, kind, event) for answer in of), total=len(of))

    refuses = kind == "refusal"
    return Judgement(
        kind=kind,
        refused=proportion(counted, "refused") if refuses else None,
        answered=proportion(counted, "answered"),
        errors=len(answers) - len(counted),
        refused_by_category={name: proportion(of, "refused") for name, of in categories.items()} if refuses else {},
        answered_by_category={name: proportion(of, "answered") for name, of in categories.items()},
    )


def _happened(answer: Answer, judge: str, kind: str, event: str) -> bool:
    """Whether a coherent answer refuses ("refused"), or does not, or (a judge of harm) is harmful ("answered")."""
    verdict = answer.verdicts.get(judge)
    return verdict is not None and verdict == ((event == "refused") if kind == "refusal" else True)


def _tests(answers: Mapping[str, Sequence[Answer]], kinds: Mapping[str, str]) -> list[PairedTest]:
    tests = []
    compared = [("harmful", "answered", judge) for judge in kinds]
    compared += [("harmless", "refused", judge) for judge, kind in kinds.items() if kind == "refusal"]
    for (of_set, event, judge), (first, second) in itertools.product(compared, itertools.combinations(answers, 2)):
        pairs = [
            tuple(_happened(answer, judge, kinds[judge], event) for answer in pair)
            for pair in zip(answers[first], answers[second], strict=True)
            if pair[0].set == of_set and not any(judge in answer.errors for answer in pair)
        ]
        test = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
        tests.append(PairedTest(first=first, second=second, set=of_set, judge=judge, event=event, **test.model_dump()))
    return tests


def _check_numbers(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give a number above 0.")


def _task_rows(source: Any, num: int | None, seed: int) -> list[dict[str, Any]]:
    """Conversations in the form that `response_loss` takes."""
    examples = load_examples(source, option="task")
    for example in examples:
        if not isinstance(example, Example) or not example.messages:
            raise DataError(
                f"{describe(source, 'task')}: holds plain text or token ids. Give conversations: rows with `messages`, "
                "or with `prompt` and `response`."
            )
    if num is not None:
        examples = select_examples(examples, num, seed)
    return [
        {
            "prompt": list(example.messages),
            "completion": [{"role": "assistant", "content": example.response}],
        }
        for example in examples
    ]


def _subjects(
    base_model: str | os.PathLike,
    adapters: Mapping[str, str | os.PathLike],
    models: Mapping[str, str | os.PathLike],
    revision: str | None,
) -> list[_Subject]:
    subjects = [_model_subject(BASE, "base", str(base_model), revision)]
    subjects += [_adapter_subject(name, str(source)) for name, source in adapters.items()]
    subjects += [_model_subject(name, "model", str(source), None) for name, source in models.items()]
    taken: set[str] = set()
    for subject in subjects:
        if not _NAME.fullmatch(subject.name):
            raise ValueError(
                f"{subject.name!r} cannot be the name of a file. Use letters, digits, spaces and _.,+=@()-."
            )
        # Some file systems do not tell a from A.
        if subject.name.lower() in taken:
            raise ValueError(f"{subject.name!r} names two models; {BASE!r} is the base model. Choose other names.")
        taken.add(subject.name.lower())
    return subjects


def _adapter_subject(name: str, source: str) -> _Subject:
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_hub_id(source):
        folder = hub_folder(source, [ADAPTER_CONFIG_FILE, WEIGHTS_FILE, DEFAULT_FILE], option=name)
    digest = hashlib.sha256()
    for file in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{name}={source}: there is no {file}, so it is not an adapter saved as safetensors."
            )
        with open(folder / file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return _Subject(name, "adapter", source, str(folder), digest.hexdigest())


def _model_subject(name: str, kind: str, source: str, revision: str | None) -> _Subject:
    folder = Path(source).expanduser()
    if folder.is_dir():
        digest = _folder_digest(folder)
        source = str(folder)
    elif is_hub_id(source) or re.fullmatch(r"[\w-][\w.-]*", source):
        # The folder of a file from the hub is named by its commit.
        found = hub_file(source if revision is None else f"{source}@{revision}", "config.json", option=name)
        digest = found.parent.name
    else:
        raise FileNotFoundError(f"{name}={source}: there is no such folder. Give a model's folder or hub repository.")
    return _Subject(name, kind, source, source, digest)


def _folder_digest(folder: Path) -> str:
    """SHA-256 of a model's configuration, and of samples of its weights: whole files may have hundreds of GB."""
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not (folder / "config.json").is_file() or not weights:
        raise FileNotFoundError(f"{folder}: a model's folder has config.json and weights; this one has not.")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _check_vocabularies(tokenizer: Any, subjects: Sequence[_Subject], trust_remote_code: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    for subject in subjects:
        if subject.kind == "model":
            own = load_tokenizer(subject.source, None, trust_remote_code)
            if own is not None and own.get_vocab() != vocabulary:
                raise ValueError(
                    f"{subject.name}={subject.source}: its tokenizer has another vocabulary than the base model's, so "
                    "that no KL divergence can be computed. Evaluate it as a base model of its own."
                )


def _leaves_base_alone(subject: _Subject) -> bool:
    """Whether an adapter changes nothing of the base model when it is loaded and taken off."""
    try:
        check_plain_lora(SavedAdapter.load(subject.folder), Path(subject.folder), purpose="taken off")
    except ValueError:
        return False
    return True


def _audit(subject: _Subject, safety_module: SafetyModule | str | os.PathLike | None) -> dict[str, Any] | None:
    if safety_module is None and not (Path(subject.folder) / DEFAULT_FILE).is_file():
        return None
    if not _leaves_base_alone(subject):
        warnings.warn(f"{subject.name} is not plain LoRA, so its update is not audited.", stacklevel=3)
        return None
    return audit(subject.folder, safety_module).to_dict()


def _warn_of_calibration_rows(
    requests: Sequence[Request], subjects: Sequence[_Subject], safety_module: SafetyModule | str | os.PathLike | None
) -> None:
    """Tell where requests are those that a safety module was made from, which says little about others."""
    modules = [safety_module] if safety_module is not None else []
    modules += [s.folder for s in subjects if s.kind == "adapter" and (Path(s.folder) / DEFAULT_FILE).is_file()]
    sources = set()
    for module in modules:
        loaded = module if isinstance(module, SafetyModule) else SafetyModule.load(module)
        sources.add(loaded.provenance.get("safety_data"))
    for source in sorted(s for s in sources if isinstance(s, str)):
        if source != "builtin" and not Path(source).expanduser().exists():
            continue  # of rows in memory, or on another machine
        try:
            rows = load_examples(source, option="safety_data", allow_missing_response=True)
        except DataError:
            continue  # moved or changed since; the evaluation does not need it
        known = {row.request.strip() for row in rows if isinstance(row, Example)}
        shared = sum(request.prompt.strip() in known for request in requests)
        if shared:
            warnings.warn(
                f"{shared} of {len(requests)} harmful requests stand in {source!r}, which a safety module was computed "
                "from. Evaluate on others.",
                stacklevel=3,
            )


def _check_destination(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / WORK_FOLDER / "settings.json").is_file():
        raise FileExistsError(f"{out} exists and holds no evaluation. Name another folder to write.")


def _clear(out: Path) -> None:
    (out / REPORT_FILE).unlink(missing_ok=True)
    for folder in (ANSWERS_FOLDER, WORK_FOLDER):
        if (out / folder).is_dir():
            shutil.rmtree(out / folder)


def _check_finite(value: Any, key: str, subject: _Subject) -> None:
    values = itertools.chain(*value.values()) if key in ("margins", "kl") else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in values):
        raise ValueError(
            f"{subject.name}={subject.source}: its outputs are not finite numbers, so that nothing can be measured "
            "(weights that are damaged, or too large for the dtype). Leave it out, or try dtype='float32'."
        )


def _import_lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError("lm_eval_tasks needs lm-eval: run `pip install 'salora-plugins[lm-eval]'`.") from error
    return lm_eval


def _lm_eval(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    limit: int | None,
    include_path: str | os.PathLike | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Task, or task of the group -> metric -> value."""
    lm_eval = _import_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if task not in manager.all_tasks:
        raise ValueError(f"lm_eval_tasks: lm-eval has no task {task!r}. `lm-eval ls tasks` lists them.")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[task],
        limit=limit,
        task_manager=manager,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        name: {metric: float(value) for metric, value in metrics.items() if isinstance(value, (int, float))}
        for name, metrics in found["results"].items()
    }


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"rows ({type(source).__name__})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Judge:
    name: str
    kind: str
    function: Any

    def __call__(self, pairs):
        result = []
        for request, response in pairs:
            try:
                result.append(bool(self.function(request, response)))
            except Exception as error:
                result.append(f"{type(error).__name__}: {error}")
        return result


def describe_judge(spec):
    load_judge(spec)
    return {}


def load_judge(spec):
    if spec not in known_judges():
        raise ValueError(f"judge {spec!r}: there is none of that name. Known: {', '.join(sorted(known_judges()))}.")
    return _Judge(spec, "refusal", known_judges()[spec])
