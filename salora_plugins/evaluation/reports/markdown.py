"""A comparison as Markdown: the verdict and the tables, for a pull request or a card."""

from __future__ import annotations

import os

from ...support.files import atomic_write
from ...support.texts import markdown
from .comparison import Comparison
from .tables import Section, sections
from .verdict import verdict


def markdown_report(comparison: Comparison) -> str:
    """The same sentences and figures as on the page; texts of others are neither HTML nor Markdown."""
    parts = [f"# {markdown(comparison.report.title)}"]
    parts += [markdown(sentence, None) for sentence in verdict(comparison.report)]
    if comparison.notes:
        parts.append("\n".join(f"- {markdown(note, None)}" for note in comparison.notes))
    parts += [_table(section) for section in sections(comparison.report)]
    return "\n\n".join(parts) + "\n"


def write_markdown(path: str | os.PathLike, comparison: Comparison) -> None:
    """Write it, all of it or nothing."""
    atomic_write(path, markdown_report(comparison).encode())


def _table(section: Section) -> str:
    rows = [section.columns, tuple(["---"] * section.labels + ["---:"] * (len(section.columns) - section.labels))]
    lines = [f"| {' | '.join(cell if cell.startswith('---') else markdown(cell) for cell in row)} |" for row in rows]
    lines += [f"| {' | '.join(map(markdown, row))} |" for row in section.rows]
    return "\n".join([f"## {markdown(section.title)}", "", *lines, "", markdown(section.note, None)])
