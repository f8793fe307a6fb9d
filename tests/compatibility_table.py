"""
The table in docs/compatibility.md, made from the tests that ran.

A test that stands for a row carries `@pytest.mark.compatibility(area, what)`; where the combination is refused, it
hands the message to the fixture `refusal`. Every run of the tests compares the rows that ran with the table in the
docs, and `make compatibility` writes the table anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
START, END = "<!-- table: written by `make compatibility` -->", "<!-- end of table -->"
# In this order in the table.
AREAS = (
    "Weights",
    "Models",
    "Options",
    "Adapters",
    "TRL",
    "Transformers",
    "Axolotl",
    "Several processes",
    "Resuming",
    "Saved adapters",
)
_MESSAGE = "compatibility_refusal"
_ROW = "compatibility_row"


@dataclass(frozen=True)
class Row:
    area: str
    what: str
    result: str
    test: str

    def __str__(self) -> str:
        return f"| {self.what} | {self.result} | `{self.test}` |"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility-table",
        choices=("exact", "loose", "write"),
        default="exact",
        help="compare what ran with the table of docs/compatibility.md, exactly or without the results, which "
        "can be others with other releases of the hosts; or write it, which all of its tests must run for",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compatibility(area, what): a row of the table in docs/compatibility.md")
    config.pluginmanager.register(_Recorder(config))


@pytest.fixture
def refusal(record_property):
    """Call it with the error by which a combination is refused; its text goes into the table."""

    def record(error: BaseException, *, hide: str | Path | None = None) -> None:
        """`hide` is a folder of this run that the message names."""
        text = str(error)
        if hide is not None:
            text = text.replace(str(hide), "FOLDER")
        record_property(_MESSAGE, text)

    return record


class _Recorder:
    """
    Collects the rows of the tests that ran, and checks or writes the table at the end.

    Rows travel with the tests' reports, so that pytest-xdist's workers can run them.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: dict[str, Row] = {}
        self.missing: set[str] = set()
        self.skipped: set[str] = set()
        self.complaint = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("compatibility")
            if marker is not None:
                area, what = marker.args
                assert area in AREAS, f"{item.nodeid}: unknown area {area!r}"
                item.user_properties.append((_ROW, (area, what)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "skipped":
            self.skipped.add(_test(report.nodeid))
        elif report.outcome != "passed":
            self.missing.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if _ROW not in properties:
            return
        if report.outcome == "skipped":
            self.skipped.add(_test(report.nodeid))
        elif report.outcome != "passed":
            self.missing.add(report.nodeid)
        elif report.when == "call":
            area, what = properties[_ROW]
            message = properties.get(_MESSAGE)
            result = "works" if message is None else f"refused: {_one_line(message)}"
            self.rows[report.nodeid] = Row(area, what, result, _test(report.nodeid))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        is_worker = hasattr(self.config, "workerinput")
        if is_worker or not self.rows:
            return
        mode = self.config.getoption("--compatibility-table")
        if mode == "write":
            if self.missing:
                self.complaint = f"{DOCUMENT.name} was not written, since these did not pass: {sorted(self.missing)}"
            else:
                _write(list(self.rows.values()), self.skipped)
        else:
            shown = _without_result if mode == "loose" else str
            table = {shown(line) for line in DOCUMENT.read_text().splitlines()}
            absent = [row for row in self.rows.values() if shown(str(row)) not in table]
            if absent:
                self.complaint = f"{DOCUMENT.name} lacks these rows; run `make compatibility`:\n" + "\n".join(
                    map(str, absent)
                )
        if self.complaint:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.complaint:
            terminalreporter.section("compatibility table", red=True)
            terminalreporter.write_line(self.complaint)


def _without_result(line: str) -> str:
    return re.sub(r"\| (works|refused: .*) \| `", "| `", line)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _test(node: str) -> str:
    """A test's name in the table; of a module that was skipped as a whole, its file."""
    return node.removeprefix("tests/").split("[")[0]


def _write(rows: list[Row], skipped: set[str]) -> None:
    text = DOCUMENT.read_text()
    before, table, after = text.split(START)[0], text.split(START)[1].split(END)[0], text.split(END)[1]
    parts = []
    for area in AREAS:
        old = table.partition(f"### {area}\n")[2].partition("\n### ")[0].splitlines()
        # Tests that lack a package here were run by whoever wrote their rows.
        kept = [line for line in old if any(f"| `{test}" in line for test in skipped)]
        # Once for tests with several cases; sorted, since workers finish in any order.
        of_area = sorted({str(row) for row in rows if row.area == area} | set(kept), key=str.casefold)
        if of_area:
            parts.append("\n".join([f"### {area}", "", "| what | result | test |", "|---|---|---|", *of_area]))
    DOCUMENT.write_text(f"{before}{START}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")
