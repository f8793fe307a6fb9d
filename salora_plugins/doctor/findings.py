"""What an examination found, as JSON values, a table and words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..support.texts import cell, one_line

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "absent", "warning", "problem"]
"""As it should be; optional and not there; worth a look; in the way."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """Such as "Packages"."""
    name: str
    found: str
    status: Status = "ok"
    remedy: str = ""
    """What to do: a command where there is one."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at."""

    findings: Sequence[Finding]

    @property
    def problems(self) -> list[Finding]:
        """What stands in the way."""
        return [finding for finding in self.findings if finding.status == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"ok": not self.problems, "findings": [dataclasses.asdict(finding) for finding in self.findings]}

    def table(self) -> Table:
        """One row a finding, a section an area."""
        from rich.table import Table

        result = Table(show_header=False)
        result.add_column()
        result.add_column()
        result.add_column(overflow="fold")
        for number, finding in enumerate(self.findings):
            begins = number == 0 or self.findings[number - 1].area != finding.area
            if begins and number:
                result.add_section()
            text = cell(finding.found)
            if finding.remedy:
                text.append("\n").append(cell(finding.remedy))
            result.add_row(_MARKS[finding.status], cell(finding.name), text)
        return result

    def summary(self) -> str:
        """What is worth a look and the problems once more, each with what to do; the last line is the verdict's."""
        looked_at = self._lines("warning")
        lines = ["Worth a look:", *looked_at] if looked_at else []
        problems = self._lines("problem")
        if not problems:
            return "\n".join([*lines, "Nothing stands in the way."])
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return "\n".join([*lines, f"{number}:", *problems])

    def _lines(self, status: Status) -> list[str]:
        return [f"- {one_line(f.name)}: {_sentences(f.found, f.remedy)}" for f in self.findings if f.status == status]


def _sentences(*texts: str) -> str:
    return " ".join(f"{one_line(text).rstrip('.')}." for text in texts if text)


_MARKS: dict[Status, str] = {"ok": "ok", "absent": "-", "warning": "[yellow]![/]", "problem": "[red]problem[/]"}
