"""The files of measured runs: one JSON file a run while an experiment goes on, one line a run where it is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
"""Where what was measured is published."""

MERGED = "runs.jsonl"
"""Name of the file with one run a line, sorted by the runs' names."""

Run = dict[str, Any]
"""What was measured in one run, as JSON values."""


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def made_once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value of a file, which is made where it is not there yet."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def read_runs(merged: Path, single: Iterable[Path] = ()) -> dict[str, Run]:
    """
    Name -> run, sorted by name.

    Args:
        merged: A file with one run a line, each with its "name"; need not be there.
        single: Files of one run each, whose stem is its name; these are newer than what is merged.
    """
    runs: dict[str, Run] = {}
    if merged.exists():
        for line in merged.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            runs[run.pop("name")] = run
    runs |= {path.stem: read_json(path) for path in single}
    return dict(sorted(runs.items()))


def write_runs(merged: Path, runs: dict[str, Run]) -> None:
    """Write all runs to one file, a line each, sorted by name."""
    lines = [json.dumps({"name": name} | run, ensure_ascii=False) for name, run in sorted(runs.items())]
    write_text(merged, "\n".join(lines) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run gives."""
    return {package: version(package) for package in ("salora-plugins", "torch", "transformers", "peft", "trl")}
