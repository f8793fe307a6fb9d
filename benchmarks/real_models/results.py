"""The lines that a run leaves: one a measured point, and the answers beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import EVIDENCE, Run, write_text

PUBLISHED = EVIDENCE / "real-models"
POINTS, ANSWERS, ERRORS, PREDICTIONS = "points.jsonl", "answers.jsonl.gz", "errors.jsonl", "predictions.txt"
LEAKS = "leaks.jsonl"


@dataclass(frozen=True)
class Results:
    """A folder; one process at a time adds to it, a line at a time."""

    folder: Path

    def points(self) -> list[Run]:
        """Of every job and step the newest one, in the order in which they were measured."""
        found: dict[tuple[str, int], Run] = {}
        for line in _whole_lines(self.folder / POINTS):
            found[line["job"], line["step"]] = line
        return list(found.values())

    def add_point(self, point: Run, answers: dict[str, list[str]]) -> None:
        self._add(POINTS, point)
        line = json.dumps({"job": point["job"], "step": point["step"], "answers": answers}, ensure_ascii=False)
        # A member of its own: what a killed process leaves cannot spoil those before.
        with (self.folder / ANSWERS).open("ab") as file:
            file.write(gzip.compress((line + "\n").encode(errors="replace")))

    def add_error(self, job: str, error: str) -> None:
        self._add(ERRORS, {"job": job, "error": error})

    def predict(self, text: str) -> None:
        """Keep what is predicted, before what comes of it is measured."""
        path = self.folder / PREDICTIONS
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.strip() and text.strip() not in before:
            write_text(path, f"{before}\n{text.strip()}\n".lstrip())

    def add_all(self, others: Iterable[Run]) -> None:
        """The points of another folder, sorted, in the place of those of the same jobs and steps."""
        found = {(point["job"], point["step"]): point for point in (*self.points(), *others)}
        lines = [json.dumps(found[key], ensure_ascii=False) for key in sorted(found)]
        write_text(self.folder / POINTS, "\n".join(lines) + "\n")

    def leaks(self) -> list[Run]:
        """What was measured without training: a line a model, kind of layer, way to calibrate and rank."""
        return _whole_lines(self.folder / LEAKS)

    def add_leaks(self, lines: Iterable[Run]) -> None:
        """In the place of what is there of the same models."""
        new = list(lines)
        models = {line["model"] for line in new}
        kept = [line for line in self.leaks() if line["model"] not in models]
        if new:
            text = "\n".join(json.dumps(line, ensure_ascii=False) for line in kept + new)
            write_text(self.folder / LEAKS, text + "\n")

    def _add(self, name: str, line: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _whole_lines(path: Path) -> list[Any]:
    """The last line may be cut off where a process was killed."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines
