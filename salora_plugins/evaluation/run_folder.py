"""What an evaluation has measured so far, on disk, so that an interrupted one continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..support.files import atomic_write


@dataclass(frozen=True)
class Setting:
    """What all models of an evaluation have in common."""

    value: Any
    """As the user gave it; JSON values."""
    digest: str | None = None
    """Of the content that the value names; settings of one digest are the same, wherever it lies."""
    chosen_by: dict[str, Any] | None = None
    """Other options that the content depends on, to say which of them differs."""


class Work:
    """A folder with one file for every measurement of every model."""

    def __init__(self, folder: Path):
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether an evaluation was begun here."""
        return self._settings_file.is_file()

    @property
    def _settings_file(self) -> Path:
        return self._folder / "settings.json"

    def keep_settings(self, settings: Mapping[str, Setting]) -> None:
        """
        Raises:
            ValueError: The evaluation was begun with others; the message names the first that differs.
        """
        if not self.exists:
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
                f"{self._folder.parent}: {found}. Go on with the same, name another folder, or start again with "
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
        before = self.read(name, "source", dict[str, str])
        if before is None:
            self.write(name, "source", {"source": source, "digest": digest})
        elif before.get("digest") != digest:
            raise ValueError(
                f"{self._folder.parent}: another model was evaluated as {name!r} there ({before.get('source')}). Give "
                "this one another name, or start again with overwrite=True (--overwrite)."
            )

    def read(self, name: str, key: str, shape: Any) -> Any:
        """
        A measurement of a model; None where there is none.

        Args:
            name: Of the model.
            key: Of the measurement.
            shape: Its type, such as `dict[str, list[float]]`.

        Raises:
            ValueError: The file is damaged; it is named.
        """
        file = self._folder / name / f"{key}.json"
        return _read(file, shape) if file.is_file() else None

    def write(self, name: str, key: str, value: Any) -> None:
        """Keep a measurement: JSON values."""
        atomic_write(self._folder / name / f"{key}.json", json.dumps(value).encode())

    def lines(self, name: str, key: str, shape: Any) -> Lines:
        """A measurement that grows, by records of a type."""
        return Lines(self._folder / name / f"{key}.jsonl", shape)

    def damaged(self, name: str, key: str) -> ValueError:
        """The error for a measurement that is not complete, though it was written to its end."""
        files = sorted((self._folder / name).glob(f"{key}.json*"))
        return _damaged(files[0] if files else self._folder / name, "it is not about these requests")


class Lines:
    """Records that are added one by one; of a file that was cut short, the whole ones count."""

    def __init__(self, file: Path, shape: Any):
        self._file = file
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            atomic_write(file, whole)
        self.records: list[Any] = []
        for number, line in enumerate(whole.split(b"\n"), start=1):
            if line:
                self.records.append(_parsed(line, shape, file, f"line {number}: "))

    def add(self, record: Any) -> None:
        """Append JSON values; they are on the disk when this returns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
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
    differing = [(name, value) for name, value in setting.chosen_by.items() if old.chosen_by.get(name) != value]
    return ", ".join(f"{name} is {value!r} here and was {old.chosen_by.get(name)!r}" for name, value in differing)


def _read(file: Path, shape: Any) -> Any:
    return _parsed(file.read_bytes(), shape, file)


def _parsed(content: bytes, shape: Any, file: Path, where: str = "") -> Any:
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
