"""The methods beside each other at one learning rate and step, for docs/methods/index.md ("choose a method")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import tables
from ..runs import EVIDENCE, Run
from .experiment import Results
from .summary import Key, Row, broken, losses, of, percentages, pooled

DOCUMENT = EVIDENCE.parent / "methods" / "index.md"
COMPARED = EVIDENCE / "methods"
"""A folder of results for each model."""

LABELS = {
    "lora": "LoRA",
    "paper": "paper's form",
    "two-sided": "default",
    "actsvd": "actsvd",
    "weight-delta": "weight-delta",
    "projected": "LoRA, projected",
    "restored": "LoRA, restored (LSSF), from itself",
    "restored-unaligned": "LoRA, restored (LSSF), from the unaligned model",
    "safe-lora": "LoRA, Safe LoRA",
    "lora-residual": "LoRA on o_proj, down_proj",
    "two-sided-residual": "default on o_proj, down_proj",
    "sae": "sae on o_proj, down_proj",
}
"""Method -> what the table calls it, in its order."""

SETS = {"advbench": "AdvBench", "builtin": "built-in", "harmless": "look-alikes"}
"""Request set -> its name in the tables."""


def document_tables(compared: Path = COMPARED) -> dict[str, str]:
    """Model -> table, from the published runs of each."""
    folders = sorted(path.parent for path in compared.glob("*/base.json"))
    return {folder.name: comparison(Results(folder)) for folder in folders}


def comparison(results: Results) -> str:
    """One row a task and method, below the base model's row of each task; seeds are taken together."""
    base, measured = results.base(), pooled(results.runs().values())
    rows = []
    for task in sorted({task for task, *_ in measured}):
        rows.append([task, "before", "-", "-", f"{base['loss'][task]:.3f}", *shares(base, base), broken(base)])
        rows += [cells(key, row, base) for key, row in of_task(measured, task).items()]
    columns = ["task", "method", "steps", "seeds", "held-out loss", *SETS.values(), "broken"]
    return tables.markdown(columns, rows)


def of_task(measured: Mapping[Key, Row], task: str) -> dict[Key, Row]:
    """What the table has of a task, in the order of LABELS."""
    order = list(LABELS)
    found = {key: row for key, row in measured.items() if key[0] == task and key[1] in LABELS}
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][1]), item[0][2:])))


def cells(key: Key, row: Row, base: Run) -> list[str]:
    task, method, rate, step = key
    return [
        *(task, LABELS[method], f"{step} at {rate:g}", str(len(row["losses"])), losses(row)),
        *(*shares(row, base), broken(row)),
    ]


def shares(row: Row, base: Run) -> list[str]:
    """Refused of each set, with the Wilson interval over its requests in percent."""
    return [share(row, name, base) for name in SETS]


def share(row: Row, name: str, base: Run) -> str:
    total = row["requests"].get(name, 0)
    if not total:
        return "-"
    _, lower, upper = percentages(row, name, base)
    return f"{of(row['refused'][name], total)} [{lower:.0f}, {upper:.0f}]"


def write() -> None:
    """Write the tables into the page."""
    tables.write(DOCUMENT, document_tables())
    print(f"wrote the tables of {DOCUMENT}")
