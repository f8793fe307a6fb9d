"""The model, the data and the folders of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runs import EVIDENCE, MERGED, Run, read_json, read_runs, write_json, write_runs
from ..small_model import request_sets

PUBLISHED = EVIDENCE / "safety-retention"
SAME_LOSS = 2e-3  # held-out losses of the same model and rows on two machines


def spread(entries: list[str], number: int) -> list[str]:
    """So many of the entries, or all that there are, evenly spaced: sets are sorted by their kinds of requests."""
    number = min(number, len(entries))
    return [entries[i * len(entries) // number] for i in range(number)]


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
    unaligned: str | None = None
    """Folder of the model before its alignment, for methods that need it."""
    sae: str | None = None
    """Sparse autoencoders, as the option `sae` takes them."""
    num_requests: int | None = None
    """How many of each set are asked, evenly spread over it; None: all."""
    num_safety_rows: int = 128
    """Refusals that are calibrated on, at most."""
    batch_size: int = 8

    def request_sets(self) -> dict[str, list[str]]:
        """The requests to evaluate on, by set."""
        sets = request_sets(self.data)
        if self.num_requests is None:
            return sets
        return {name: spread(of_set, self.num_requests) for name, of_set in sets.items()}

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
        Add what is here to the merged file and the base model's results of another folder; of what is in both, the
        runs are these, and the base model's results stay.

        Raises:
            ValueError: The results are of another base model.
        """
        base, known = self.base(), other.base() if other.base_path.exists() else {}
        for task, loss in known.get("loss", {}).items():
            if task in base["loss"] and abs(base["loss"][task] - loss) > SAME_LOSS:
                raise ValueError(f"{other.base_path} is of another model: its loss on {task} is {loss:.4f}")
        write_json(other.base_path, known | {kind: entries | known.get(kind, {}) for kind, entries in base.items()})
        write_runs(other.folder / MERGED, other.runs() | self.runs())
