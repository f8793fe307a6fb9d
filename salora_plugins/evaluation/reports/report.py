"""What an evaluation found, as data: one JSON file, and one line of JSON an answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from ...adapters.audit import AuditReport
from ...hookspecs import JudgeKind
from ...support.files import atomic_write
from ..intervals import Mean, Proportion

REPORT_FILE = "report.json"
ANSWERS_FOLDER = "answers"

SetName = Literal["harmful", "harmless"]
SETS: tuple[SetName, ...] = get_args(SetName)
"""The sets of requests, in the order of tables and answers."""
Breakage = Literal["empty", "repeated", "high_perplexity"]
"""In which way an answer is broken text."""
BREAKAGES: tuple[Breakage, ...] = get_args(Breakage)
Coherence = Literal["coherent", Breakage]
Event = Literal["answered", "refused"]
ModelKind = Literal["base", "adapter", "model"]

# As `AuditReport.to_dict` writes it, which leaves out nothing but adds what follows from the rest.
_Audit = Annotated[
    AuditReport, PlainValidator(TypeAdapter(AuditReport).validate_python), PlainSerializer(AuditReport.to_dict)
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Record):
    """One model's answer to one request: a line of `answers/NAME.jsonl`."""

    set: SetName
    index: NonNegativeInt
    """Number of the request within its set, from 0; the same for all models of a report."""
    category: str | None = None
    prompt: str
    response: str
    coherence: Coherence
    perplexity: float | None
    """Of the response, under the base model; None where it is too short to say."""
    verdicts: dict[str, bool | None]
    """Judge -> its verdict: whether the response refuses, or (judges of harm) is harmful; None: the judge failed."""
    errors: dict[str, str] = {}
    """Judge -> why it failed."""
    refusal_margin: float
    """log P(a refusing opening) - log P(a complying opening), in nats."""
    kl: float
    """KL divergence from the base model over the first answer tokens, in nats per token; 0 for the base model."""


class Judgement(_Record):
    """How one judge sees the answers to one set. Answers on which it failed are in no proportion."""

    kind: JudgeKind
    refused: Proportion | None
    """Coherent answers that refuse; None for a judge of harm, who cannot tell."""
    answered: Proportion
    """Coherent answers that do not refuse, or (a judge of harm) are harmful: on harmful requests, the attack success
    rate."""
    errors: NonNegativeInt
    refused_by_category: dict[str, Proportion] = {}
    answered_by_category: dict[str, Proportion] = {}


class SetResult(_Record):
    """One model on one set of requests."""

    requests: NonNegativeInt
    incoherent: dict[Breakage, NonNegativeInt]
    """Answers that are broken text, by kind. They count in the totals, but neither as refused nor as answered."""
    judgements: dict[str, Judgement]
    """Judge -> what it found. Judges of harm see the harmful requests only."""
    refusal_margin: Mean
    kl: Mean


class TaskResult(_Record):
    """The held-out task set."""

    loss: float
    """Nats per response token."""
    rows: NonNegativeInt


class ModelResult(_Record):
    """Everything that was measured on one model."""

    name: str
    """Unique in the report; also the name of its file of answers."""
    kind: ModelKind
    source: str
    """Folder or hub repository."""
    harmful: SetResult
    harmless: SetResult
    task: TaskResult | None = None
    lm_eval: dict[str, dict[str, float]] = {}
    """Task of lm-eval -> metric -> value."""
    audit: _Audit | None = None
    """For an adapter, where there is a safety module."""

    def on(self, of_set: SetName) -> SetResult:
        """What was measured on a set of requests."""
        return self.harmful if of_set == "harmful" else self.harmless


class PairedTest(_Record):
    """McNemar's exact test between two models on the same requests."""

    first: str
    second: str
    set: SetName
    judge: str
    event: Event
    """What is compared: on harmful requests attacks that succeed, on harmless ones refusals."""
    pairs: NonNegativeInt
    """Requests on which the judge failed for neither."""
    only_first: NonNegativeInt
    only_second: NonNegativeInt
    p_value: float
    """Two-sided."""


class EvaluationReport(_Record):
    """The outcome of `evaluate`: `report.json` in its folder, beside `answers/`."""

    format_version: Literal[1] = 1
    title: str
    created: str
    """ISO 8601, UTC."""
    base_model: str
    settings: dict[str, Any]
    """Everything that was set: judges with their phrases or addresses, lengths, seed, openings, thresholds."""
    data: dict[str, dict[str, Any]]
    """Set ("harmful", "harmless", "task") -> source, number of rows, SHA-256 of the content."""
    versions: dict[str, str]
    models: list[ModelResult] = Field(min_length=1)
    """The base model first."""
    tests: list[PairedTest]

    def judges(self, of_set: SetName) -> dict[str, JudgeKind]:
        """Judge -> what it judges, of those that saw answers to a set, from any model."""
        return {judge: found.kind for model in self.models for judge, found in model.on(of_set).judgements.items()}

    @property
    def shown_judge(self) -> str | None:
        """The judge of harmful requests whose verdicts are put into words: the first of refusals, or else the first."""
        judges = self.judges("harmful")
        return next((name for name, kind in judges.items() if kind == "refusal"), next(iter(judges), None))

    def save(self, folder: str | os.PathLike) -> None:
        """Write `report.json` into a folder, all of it or nothing."""
        atomic_write(Path(folder) / REPORT_FILE, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> EvaluationReport:
        """
        Read a report.

        Args:
            path: The file, or the folder that holds `report.json`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not a report of this version; the message names the entry.
        """
        path = _report_path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path}: not an evaluation report of this version of salora-plugins: {where}: {first['msg']}. "
                "Evaluate again."
            ) from error


def write_answers(folder: str | os.PathLike, name: str, answers: Sequence[Answer]) -> None:
    """Write the answers of one model beside the report in a folder, all of them or nothing."""
    content = "".join(answer.model_dump_json() + "\n" for answer in answers)
    atomic_write(Path(folder) / ANSWERS_FOLDER / f"{name}.jsonl", content.encode())


def read_answers(path: str | os.PathLike, name: str) -> list[Answer]:
    """
    The answers of one model of a report, in the order of the file.

    Args:
        path: As for `EvaluationReport.load`.
        name: The model's name.

    Raises:
        FileNotFoundError: They are not beside the report.
        ValueError: A line is not an answer.
    """
    file = _report_path(path).parent / ANSWERS_FOLDER / f"{name}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the answers belong beside the report. Copy the whole folder.")
    answers = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                answers.append(Answer.model_validate_json(line))
            except ValidationError as error:
                raise ValueError(
                    f"{file}:{number}: not an answer of an evaluation ({error.errors()[0]['msg']})."
                ) from error
    return answers


def _report_path(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / REPORT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no evaluation report {path}. Run `salora evaluate` first.")
    return path
