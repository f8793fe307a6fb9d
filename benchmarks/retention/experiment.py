"""The model, the data and the folders of an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runs import EVIDENCE, MERGED, Run, read_json, read_runs, write_json, write_runs

PUBLISHED = EVIDENCE / "safety-retention"


@dataclass(frozen=True)
class Experiment:
    """All runs on one model."""

    model: str
    """Folder of the aligned model."""
    data: Path
    out: Path
    """Gets all that is made on the way: tasks, answers, safety modules, adapters."""
    everyday: slice
    """Lines of harmless_prompts.txt for the model's own answers; not those that it was aligned on."""
    own_tasks: Mapping[str, str]
    """Name -> file of conversations."""

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class Results:
    """A folder with base.json, and with the runs in one file (published) or in one file each (in progress)."""

    folder: Path

    @property
    def base_path(self) -> Path:
        return self.folder / "base.json"

    def base(self) -> Run:
        return read_json(self.base_path)

    def runs(self) -> dict[str, Run]:
        """Name -> run, sorted by name."""
        return read_runs(self.folder / MERGED, (self.folder / "runs").glob("*.json"))

    def write(self, name: str, run: Run) -> None:
        write_json(self.folder / "runs" / f"{name}.json", run)

    def publish_to(self, other: Results) -> None:
        """
        Add what is here to the merged file and the base model's results of another folder.

        Raises:
            ValueError: The results are of another base model.
        """
        base, known = self.base(), other.base() if other.base_path.exists() else {}
        write_json(other.base_path, _united(known, base, str(other.base_path)))
        write_runs(other.folder / MERGED, other.runs() | self.runs())


def _united(known: Run, new: Run, where: str) -> Run:
    """What was measured of the base model in both, entry by entry."""
    united = dict(known)
    for kind, entries in new.items():
        before = known.get(kind, {})
        if differing := [name for name in entries if name in before and before[name] != entries[name]]:
            raise ValueError(
                f"{where}: its {kind} of {differing[0]} is {json.dumps(before[differing[0]])}, not "
                f"{json.dumps(entries[differing[0]])}: these are results of another model."
            )
        united[kind] = before | entries
    return united
