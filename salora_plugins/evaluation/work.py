"""What an evaluation has measured so far, on disk, so that an interrupted one continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write


@dataclass(frozen=True)
class Setting:
    """What all models of an evaluation have in common."""

    value: Any
    """As the user gave it; JSON values."""
    digest: str | None = None
    """Of the content that the value names; settings of one digest are the same, wherever it lies."""


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
        before = {
            name: Setting(**values) for name, values in json.loads(self._settings_file.read_text("utf-8")).items()
        }
        for name, setting in settings.items():
            old = before.get(name, Setting(None))
            if setting.digest is None and setting.value == old.value:
                continue
            if setting.digest is not None and setting.digest == old.digest:
                continue
            if setting.value == old.value:
                found = f"{name}={setting.value!r} has another content than when the evaluation there began"
            else:
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
        before = self.read(name, "source")
        if before is None:
            self.write(name, "source", {"source": source, "digest": digest})
        elif before["digest"] != digest:
            raise ValueError(
                f"{self._folder.parent}: another model was evaluated as {name!r} there ({before['source']}). Give this "
                "one another name, or start again with overwrite=True (--overwrite)."
            )

    def read(self, name: str, key: str) -> Any:
        """A measurement of a model; None where there is none."""
        file = self._folder / name / f"{key}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, name: str, key: str, value: Any) -> None:
        """Keep a measurement: JSON values."""
        atomic_write(self._folder / name / f"{key}.json", json.dumps(value).encode())

    def lines(self, name: str, key: str) -> Lines:
        """A measurement that grows."""
        return Lines(self._folder / name / f"{key}.jsonl")


class Lines:
    """Records that are added one by one; of a file that was cut short, the whole ones count."""

    def __init__(self, file: Path):
        self._file = file
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            atomic_write(file, whole)
        self.records: list[Any] = [json.loads(line) for line in whole.decode().split("\n") if line]

    def add(self, record: Any) -> None:
        """Append JSON values; they are on the disk when this returns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
