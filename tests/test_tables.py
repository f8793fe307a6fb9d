"""Tables of the commands: neither a module's name nor a number is folded, in a terminal of 80 columns and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from salora_plugins.commands.printing import print_table
from salora_plugins.support.tables import TableOfNames

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.gate_up_proj")
]
LONG = [
    f"{tower}.layers.{layer}.self_attn.q_proj"
    for tower in ("vision_tower.encoder", "language_model.model")
    for layer in range(30)
]
OF_RESTORE = ("directions", "rank", "safety vector", "kept", "repair", "before", "now")
OF_AUDIT = ("norm", "output share", "random", "cosine", "input share", "random", "cosine")


def table(names: list[str], headers: tuple[str, ...]) -> TableOfNames:
    result = TableOfNames("Module", headers, "Share: of the norm of the module's update, inside the safety directions.")
    for number, name in enumerate(names):
        result.add_row(name, *(f"{number + column / 100:.1e}" for column in range(len(headers))))
    return result


def printed(shown, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(shown, crop=False)
    return file.getvalue()


def words(text: str) -> list[str]:
    return re.split(r"[^\w.+-]+", text)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 10_000])
@pytest.mark.parametrize("headers", [("removed",), OF_RESTORE, OF_AUDIT], ids=len)
@pytest.mark.parametrize("names", [NAMES, LONG, NAMES[:1]], ids=["layers", "towers", "one"])
def test_names_and_numbers_are_whole_at_every_width(names, headers, width):
    shown = table(names, headers)
    text = printed(shown, width)
    beginning = re.match(r"In (\S+):", text)
    found, expected = words(text), []
    for name, cells in shown.sections[0]:
        expected.append(name.removeprefix(f"{beginning[1]}.") if beginning else name)
        expected += cells
    # In their order, and each as one word.
    position = 0
    for word in expected:
        position = found.index(word, position) + 1
    # A table is not wider than the terminal, unless a name or a line of numbers is.
    needed = max(len(max(names, key=len)), 8 * len(headers) + len(headers))
    assert max(map(len, text.splitlines())) <= max(width, needed)


def test_what_all_names_begin_with_is_shown_once_where_the_width_is_needed():
    narrow, wide = printed(table(NAMES, OF_RESTORE), 80), printed(table(NAMES, OF_RESTORE), 200)
    assert narrow.startswith("In model.layers:\n") and narrow.count("model.layers") == 1
    assert wide.count("model.layers") == len(NAMES) and "In model" not in wide
    assert "In" not in printed(table(["lm_head"], OF_RESTORE), 20)
    assert printed(table(NAMES, ("removed",)), 80).count("model.layers") == len(NAMES)  # there is room for them


def test_a_pipe_has_no_width_unless_the_user_says_one(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(table(NAMES, OF_AUDIT))
    assert capsys.readouterr().out.count("model.layers") == len(NAMES)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(table(NAMES, OF_AUDIT))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "In model.layers:" and max(map(len, lines)) <= 80
