"""Several reports as one, where they can be compared."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .aggregation import paired_tests
from .report import REPORT_FILE, SETS, Answer, EvaluationReport, ModelResult, PairedTest, SetName, read_answers
from .verdict import verdict

MARGIN_TOLERANCE = 0.1
"""Mean difference of the base models' refusal margins, in nats, that rounding on other hardware may explain."""

# Settings that reports may differ in: they do not change what is measured, or are compared apart.
_FREE = ("batch_size", "judges", "seed", "lm_eval_limit", "revision")


@dataclass(frozen=True)
class Comparison:
    """The outcome of [`compare`]."""

    reports: tuple[str, ...]
    """Where the reports lie."""
    report: EvaluationReport
    """All models in one report."""
    answers: dict[str, list[Answer]]
    """Model -> its answers, the harmful set's first, in the order of the requests; the same requests for all."""
    notes: tuple[str, ...]
    """Differences between the reports that do not keep them from being compared."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the reports' places, verdict, notes, and all models in one report, without the answers."""
        return {
            "reports": list(self.reports),
            "verdict": verdict(self.report),
            "notes": list(self.notes),
            "evaluation": self.report.model_dump(mode="json"),
        }


@dataclass
class _Part:
    """One of the reports; its models are taken out as they are merged or changed."""

    path: Path
    label: str
    report: EvaluationReport
    models: list[ModelResult]
    answers: dict[str, list[Answer]]


def compare(reports: Sequence[str | os.PathLike], *, title: str | None = None) -> Comparison:
    """
    Put the models of several evaluations together.

    Reports can be compared where they have the same requests, the same settings and the same base model, which shows
    in its refusal margins. A base model with the same figures in several reports is shown once. Judges, tasks and
    lm-eval tasks that only some reports have are missing in the others. Paired tests are made across reports too.

    Args:
        reports: Report files, or the folders that hold a `report.json`, with the answers beside them.
        title: Of the comparison. Default: the reports' titles.

    Raises:
        FileNotFoundError: A report or its answers are missing.
        ValueError: The reports cannot be compared, and the message says what differs; or one is damaged.
    """
    parts = _load(reports)
    first = parts[0]
    notes: list[str] = []
    for other in parts[1:]:
        _check_comparable(first, other)
    task = next((part.report.data["task"] for part in parts if "task" in part.report.data), None)
    for part in parts:
        _keep_one_task(part, task, notes)
    for other in parts[1:]:
        _merge_base(first, other, notes)
    notes += _differing_versions(parts)
    models, answers = _together(parts)
    return Comparison(
        reports=tuple(str(part.path) for part in parts),
        report=EvaluationReport(
            title=title or " + ".join(dict.fromkeys(part.report.title for part in parts)),
            created=max(part.report.created for part in parts),
            base_model=first.report.base_model,
            settings={key: _setting(key, parts) for key in _keys(parts, "settings")},
            data=_data(first, task),
            versions={package: ", ".join(_values(parts, package)) for package in _keys(parts, "versions")},
            models=models,
            tests=first.report.tests if len(parts) == 1 else _tests(models, answers),
        ),
        answers=answers,
        notes=tuple(notes),
    )


def _together(parts: Sequence[_Part]) -> tuple[list[ModelResult], dict[str, list[Answer]]]:
    """The models of all parts and their answers; of one name, the parts' labels tell them apart."""
    counts = Counter(model.name for part in parts for model in part.models)
    models: list[ModelResult] = []
    answers: dict[str, list[Answer]] = {}
    for part in parts:
        for model in part.models:
            name = model.name
            if counts[name] > 1:
                name = _free_name(f"{part.label}/{name}", {*counts, *answers})
            answers[name] = part.answers[model.name]
            models.append(model.model_copy(update={"name": name}))
    return models, answers


def _data(first: _Part, task: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = {
        of_set: first.report.data[of_set] for of_set in SETS if of_set in first.report.data
    }
    return data if task is None else {**data, "task": task}


def _keys(parts: Sequence[_Part], field: Literal["settings", "versions"]) -> list[str]:
    """Of a field of the reports, each once."""
    return list(dict.fromkeys(key for part in parts for key in getattr(part.report, field)))


def _values(parts: Sequence[_Part], package: str) -> list[str]:
    """The versions of a package, each once."""
    return list(dict.fromkeys(part.report.versions[package] for part in parts if package in part.report.versions))


def _differing_versions(parts: Sequence[_Part]) -> list[str]:
    notes = []
    for package in _keys(parts, "versions"):
        found = list(dict.fromkeys(part.report.versions.get(package, "none") for part in parts))
        if len(found) > 1:
            notes.append(f"The versions of {package} differ: {', '.join(found)}.")
    return notes


def _load(reports: Sequence[str | os.PathLike]) -> list[_Part]:
    if not reports:
        raise ValueError("There is nothing to compare. Give at least one report of `salora evaluate`.")
    parts: list[_Part] = []
    for given in reports:
        report = EvaluationReport.load(given)
        path = Path(given).expanduser().resolve()
        path = path / REPORT_FILE if path.is_dir() else path
        if any(path == part.path for part in parts):
            raise ValueError(f"{given} is given twice. Name each report once.")
        answers = {model.name: _answers(path, model) for model in report.models}
        parts.append(_Part(path, report.title, report, list(report.models), answers))
    asked: dict[Path, list[tuple[SetName, int, str]]] = {}
    for part in parts:
        for model in part.models:
            requests = [(answer.set, answer.index, answer.prompt) for answer in part.answers[model.name]]
            # Of other reports it is known by the requests' SHA-256 whether they are the same.
            if requests != asked.setdefault(part.path, requests):
                raise ValueError(
                    f"{part.path}: the answers of {model.name!r} are to other requests than those of "
                    f"{part.models[0].name!r}. The files of answers are not those of this report; evaluate again."
                )
    if len({part.label for part in parts}) < len(parts):
        for part in parts:
            part.label = part.path.parent.name
    if len({part.label for part in parts}) < len(parts):
        for number, part in enumerate(parts, start=1):
            part.label = f"{part.label} ({number})"
    return parts


def _answers(path: Path, model: ModelResult) -> list[Answer]:
    answers = sorted(read_answers(path, model.name), key=lambda answer: (answer.set, answer.index))
    for of_set in SETS:
        found, expected = sum(answer.set == of_set for answer in answers), model.on(of_set).requests
        if found != expected:
            raise ValueError(
                f"{path}: there are {found} {of_set} answers of {model.name!r} beside it, and the report is about "
                f"{expected}. Let `salora evaluate` finish, and copy the whole folder."
            )
    return answers


def _check_comparable(first: _Part, other: _Part) -> None:
    """Raise what keeps two reports from being compared."""
    differing = []
    for of_set in SETS:
        one, two = (part.report.data.get(of_set, {}) for part in (first, other))
        if one.get("sha256") != two.get("sha256"):
            differing.append(f"the {of_set} requests ({_data_text(one)} against {_data_text(two)})")
    for key in _keys((first, other), "settings"):
        if key not in _FREE:
            differing += _difference(first, other, key)
    judges = [part.report.settings.get("judges", {}) for part in (first, other)]
    differing += [
        f"the settings of judge {name!r}"
        for name in judges[0]
        if judges[0][name] != judges[1].get(name, judges[0][name])
    ]
    if all(any(model.lm_eval for model in part.models) for part in (first, other)):
        for key in ("lm_eval_limit", "seed"):
            differing += _difference(first, other, key, " of the lm-eval tasks")
    if differing:
        raise ValueError(
            f"{first.path} and {other.path} cannot be compared, since these differ: {'; '.join(differing)}. "
            "Evaluate all models in the same way."
        )


def _difference(first: _Part, other: _Part, key: str, of: str = "") -> list[str]:
    """Nothing where a setting is the same."""
    one, two = (part.report.settings.get(key) for part in (first, other))
    return [] if one == two else [f"{key}{of} ({_short(one)} against {_short(two)})"]


def _data_text(data: Mapping[str, Any]) -> str:
    return f"{data.get('rows')} rows, SHA-256 {str(data.get('sha256'))[:12]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keep_one_task(part: _Part, task: Mapping[str, Any] | None, notes: list[str]) -> None:
    """Losses on different tasks are not comparable, so those of another task than the first are left out."""
    own = part.report.data.get("task")
    if own is not None and task is not None and own["sha256"] != task["sha256"]:
        part.models = [model.model_copy(update={"task": None}) for model in part.models]
        notes.append(
            f"{part.label}: its task ({own['source']}, {_data_text(own)}) is another than {task['source']} "
            f"({_data_text(task)}), so its task losses are left out."
        )


def _merge_base(first: _Part, other: _Part, notes: list[str]) -> None:
    """Let the same base model stand once; raise if it is another model."""
    one, two = first.models[0], other.models[0]
    first_answers, other_answers = first.answers[one.name], other.answers[two.name]
    difference = fmean(
        abs(a.refusal_margin - b.refusal_margin) for a, b in zip(first_answers, other_answers, strict=True)
    )
    # A comparison that is no number is false: written so that it refuses.
    if not difference <= MARGIN_TOLERANCE:
        raise ValueError(
            f"{first.path} and {other.path} cannot be compared, since the base models differ: the refusal margins of "
            f"{first.report.base_model} and {other.report.base_model} are {difference:.3g} nats apart on average. "
            "Evaluate all models on one base model."
        )
    if first.report.base_model != other.report.base_model:
        notes.append(
            f"The base models have different names, {first.report.base_model} and {other.report.base_model}; their "
            f"refusal margins differ by {difference:.2g} nats on average, so they are taken for the same."
        )
    if not _same_figures(one, two, first_answers, other_answers):
        notes.append(
            f"{other.label}: its base model answers or is judged a little differently than that of {first.label}, "
            "though its refusal margins are the same up to rounding. Both are shown; KL divergences are from the base "
            "model of the own report."
        )
        return
    update: dict[str, Any] = {"task": one.task or two.task, "lm_eval": {**two.lm_eval, **one.lm_eval}}
    for of_set in SETS:
        judgements = {**two.on(of_set).judgements, **one.on(of_set).judgements}
        update[of_set] = one.on(of_set).model_copy(update={"judgements": judgements})
    first.models[0] = one.model_copy(update=update)
    first.answers[one.name] = [
        a.model_copy(update={"verdicts": {**b.verdicts, **a.verdicts}, "errors": {**b.errors, **a.errors}})
        for a, b in zip(first_answers, other_answers, strict=True)
    ]
    other.models = other.models[1:]


def _same_figures(one: ModelResult, two: ModelResult, first: Sequence[Answer], other: Sequence[Answer]) -> bool:
    """Whether nothing that both reports say of their base models differs."""
    if one.task is not None and two.task is not None and one.task != two.task:
        return False
    if any(two.lm_eval.get(task, found) != found for task, found in one.lm_eval.items()):
        return False
    shared = set(one.harmful.judgements) & set(two.harmful.judgements)
    return all(
        (a.response, a.coherence, a.refusal_margin) == (b.response, b.coherence, b.refusal_margin)
        and all(a.verdicts.get(judge) == b.verdicts.get(judge) for judge in shared)
        for a, b in zip(first, other, strict=True)
    )


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name} ({number})"
    return free


def _setting(key: str, parts: Sequence[_Part]) -> Any:
    """One value, or where reports may differ, the values in the order of the reports; of judges, all of them."""
    values = [part.report.settings.get(key) for part in parts]
    if key == "judges":
        return {name: settings for value in reversed(values) for name, settings in (value or {}).items()}
    return values[0] if all(value == values[0] for value in values) else values


def _tests(models: Sequence[ModelResult], answers: Mapping[str, Sequence[Answer]]) -> list[PairedTest]:
    """Between any two models that a judge saw."""
    kinds = {name: found.kind for model in models for name, found in model.harmful.judgements.items()}
    tests = []
    for judge, kind in kinds.items():
        seen = {model.name: answers[model.name] for model in models if judge in model.harmful.judgements}
        tests += paired_tests(seen, {judge: kind})
    return tests
