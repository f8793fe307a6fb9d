"""
The folder of an evaluation: what is measured so far, in `work/`, so that an interrupted one continues; and its outcome.

    work/settings.json                  what all models have in common
    work/MODEL/source.json              which model that is
    work/MODEL/responses-SET.jsonl      its answers, a batch a line
    work/MODEL/margins.json, kl.json, perplexities.json, task-DIGEST.json, lm_eval-DIGEST.json
    work/MODEL/verdicts-DIGEST.jsonl    a judge's verdicts
    answers/MODEL.jsonl, report.json    the outcome
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..support.files import atomic_write, make_folder
from .reports.report import ANSWERS_FOLDER, REPORT_FILE, Answer, EvaluationReport, SetName, write_answers

WORK_FOLDER = "work"
"""What is measured so far, in the folder of the report."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What all models of an evaluation have in common."""

    value: Any
    """As the user gave it; JSON values."""
    digest: str | None = None
    """Of the content that the value names; settings of one digest are the same, wherever it lies."""
    chosen_by: dict[str, Any] | None = None
    """Other options that the content depends on, to say which of them differs."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What is kept of a model: JSON values in a file; or, of what grows, records of one type, one a line."""

    key: str
    """Name of the file, without its ending."""
    shape: type[T]
    """Type of the value, or of a record."""


PerRequest = dict[str, list[float]]
"""Set of requests -> one value a request."""
Responses = list[tuple[int, str]]
"""A batch of answers: number of the request and text."""
Verdicts = list[tuple[str, int, bool]]
"""Set, number of the request, and verdict."""

SOURCE = Entry("source", dict[str, str])
MARGINS = Entry("margins", PerRequest)
KL = Entry("kl", PerRequest)
PERPLEXITIES = Entry("perplexities", dict[str, list[float | None]])


def responses_entry(of_set: SetName) -> Entry[Responses]:
    """A model's answers to a set."""
    return Entry(f"responses-{of_set}", Responses)


def task_entry(digest: str) -> Entry[float]:
    """A model's loss on the task of this SHA-256."""
    return Entry(f"task-{digest[:16]}", float)


def lm_eval_entry(task: str, limit: int | None, seed: int) -> Entry[dict[str, dict[str, float]]]:
    """What lm-eval finds on a task or a group of them."""
    return Entry(f"lm_eval-{_short_digest(task, limit, seed)}", dict[str, dict[str, float]])


def verdicts_entry(judge: str, settings: Mapping[str, Any]) -> Entry[Verdicts]:
    """A judge's verdicts. Other phrases or another rubric make another judge."""
    return Entry(f"verdicts-{_short_digest(judge, settings)}", Verdicts)


class RunFolder:
    """
    The folder of an evaluation, with one file for every measurement of every model.

    Args:
        out: The folder; it need not exist.
    """

    def __init__(self, out: str | os.PathLike) -> None:
        self._out = Path(out).expanduser()
        self._work = self._out / WORK_FOLDER

    @property
    def _settings_file(self) -> Path:
        return self._work / "settings.json"

    def prepare(self, *, overwrite: bool) -> None:
        """
        Make sure that the folder may be written to.

        Args:
            overwrite: Delete what an evaluation left there.

        Raises:
            FileExistsError: It holds something else.
        """
        begun = self._settings_file.is_file()
        if self._out.exists() and not begun and (not self._out.is_dir() or any(self._out.iterdir())):
            raise FileExistsError(f"{self._out} exists and holds no evaluation. Name another folder to write.")
        if overwrite and begun:
            (self._out / REPORT_FILE).unlink(missing_ok=True)
            for folder in (ANSWERS_FOLDER, WORK_FOLDER):
                shutil.rmtree(self._out / folder, ignore_errors=True)

    def keep_settings(self, settings: Mapping[str, Setting]) -> None:
        """
        Raises:
            ValueError: The evaluation was begun with others; the message names the first that differs.
        """
        if not self._settings_file.is_file():
            content = json.dumps({name: asdict(setting) for name, setting in settings.items()}, indent=2) + "\n"
            atomic_write(self._settings_file, content.encode())
            return
        before = _read(self._settings_file, dict[str, Setting])
        for name, setting in settings.items():
            old = before.get(name, Setting(None))
            if setting.digest is None and setting.value == old.value:
                continue
            if setting.digest is not None and setting.digest == old.digest:
                continue
            found = _chosen_otherwise(setting, old)
            if not found and setting.value == old.value:
                found = f"{name}={setting.value!r} has another content than when the evaluation there began"
            elif not found:
                found = f"the evaluation there began with {name}={old.value!r}, not {setting.value!r}"
            raise ValueError(
                f"{self._out}: {found}. Go on with the same, name another folder, or start again with "
                "overwrite=True (--overwrite)."
            )

    def keep_source(self, name: str, source: str, digest: str) -> None:
        """
        Args:
            name: Of a model.
            source: Where it is.
            digest: Of its content.

        Raises:
            ValueError: Another model was measured under this name.
        """
        before = self.read(name, SOURCE)
        if before is None:
            self.write(name, SOURCE, {"source": source, "digest": digest})
        elif before.get("digest") != digest:
            raise ValueError(
                f"{self._out}: another model was evaluated as {name!r} there ({before.get('source')}). Give "
                "this one another name, or start again with overwrite=True (--overwrite)."
            )

    def read(self, name: str, entry: Entry[T]) -> T | None:
        """
        A measurement of a model; None where there is none.

        Args:
            name: Of the model.
            entry: What was measured.

        Raises:
            ValueError: The file is damaged; it is named.
        """
        file = self._work / name / f"{entry.key}.json"
        return _read(file, entry.shape) if file.is_file() else None

    def measured(self, name: str, entry: Entry[T]) -> T:
        """
        A measurement of a model that was made.

        Raises:
            ValueError: Its file is damaged, or not there any more; it is named.
        """
        value = self.read(name, entry)
        if value is None:
            raise self.damaged(name, entry)
        return value

    def write(self, name: str, entry: Entry[T], value: T) -> None:
        """Keep a measurement: JSON values."""
        atomic_write(self._work / name / f"{entry.key}.json", json.dumps(value).encode())

    def lines(self, name: str, entry: Entry[T]) -> Lines[T]:
        """A measurement that grows."""
        return Lines(self._work / name / f"{entry.key}.jsonl", entry.shape)

    def responses(self, name: str, of_set: SetName) -> dict[int, str]:
        """A model's answers so far, by the number of the request."""
        batches = self.lines(name, responses_entry(of_set)).records
        return {index: text for batch in batches for index, text in batch}

    def damaged(self, name: str, entry: Entry) -> ValueError:
        """The error for a measurement that is not complete, though it was written to its end."""
        files = sorted((self._work / name).glob(f"{entry.key}.json*"))
        return _damaged(files[0] if files else self._work / name, "it is not about these requests")

    def save(self, report: EvaluationReport, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Write the outcome: the answers by model, and the report, whose being there says that all is."""
        for name, of_model in answers.items():
            write_answers(self._out, name, of_model)
        report.save(self._out)


class Lines(Generic[T]):
    """Records that are added one by one; of a file that was cut short, the whole ones count."""

    def __init__(self, file: Path, shape: type[T]) -> None:
        self._file = file
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            atomic_write(file, whole)
        self.records: list[T] = []
        for number, line in enumerate(whole.split(b"\n"), start=1):
            if line:
                self.records.append(_parsed(line, shape, file, f"line {number}: "))

    def add(self, record: T) -> None:
        """Append JSON values; they are on the disk when this returns."""
        make_folder(self._file.parent)
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk has no name
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._file)) from error
        self.records.append(record)


def _chosen_otherwise(setting: Setting, old: Setting) -> str | None:
    """Which option of the choice differs, where the same data was named."""
    if setting.value != old.value or not setting.chosen_by or not old.chosen_by:
        return None
    before = old.chosen_by
    differing = [(name, value) for name, value in setting.chosen_by.items() if before.get(name) != value]
    return ", ".join(f"{name} is {value!r} here and was {before.get(name)!r}" for name, value in differing)


def _read(file: Path, shape: type[T]) -> T:
    return _parsed(file.read_bytes(), shape, file)


def _parsed(content: bytes, shape: type[T], file: Path, where: str = "") -> T:
    try:
        return TypeAdapter(shape).validate_python(json.loads(content))
    except ValidationError as error:
        raise _damaged(file, f"{where}{error.errors()[0]['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"{where}{error}") from error


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is damaged ({why}). Delete it, and what it held is measured again; or start again with "
        "overwrite=True (--overwrite)."
    )


def _short_digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
