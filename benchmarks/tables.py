"""Markdown tables, and their places between markers in the documents that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

END = "<!-- end of table -->"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without a line break at its end."""
    return "\n".join([line(columns), "|---" * len(columns) + "|", *map(line, rows)])


def line(cells: Sequence[str]) -> str:
    """One row of a table."""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def start(name: str) -> str:
    return f"<!-- table: {name} -->"


def shown(document: Path, name: str) -> str:
    """
    What stands in a document between the markers of a table.

    Raises:
        ValueError: The document does not have such markers.
    """
    return _around(document, name)[1].strip("\n")


def write(document: Path, tables: dict[str, str]) -> None:
    """Put tables between their markers."""
    for name, table in tables.items():
        before, _, after = _around(document, name)
        document.write_text(f"{before}{start(name)}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _around(document: Path, name: str) -> tuple[str, str, str]:
    text = document.read_text(encoding="utf-8")
    before, marker, rest = text.partition(start(name))
    between, end, after = rest.partition(END)
    if not (marker and end):
        raise ValueError(f"{document}: there is no place for a table between {start(name)!r} and {END!r}")
    return before, between, after
