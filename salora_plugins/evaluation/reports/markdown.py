"""A comparison as Markdown: the verdict and the tables, for a pull request or a card."""

from __future__ import annotations

import os

from ...support.files import atomic_write
from ...support.texts import markdown, markdown_table
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
    found = markdown_table(section.columns, section.rows, labels=section.labels)
    return "\n".join([f"## {markdown(section.title)}", "", found, "", markdown(section.note, None)])
