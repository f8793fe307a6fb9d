"""Tables of numbers by name, such as that of a module, for a terminal of any width: no name and no number is folded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

from .texts import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

_NARROWEST_CAPTION = 80


@dataclass
class TableOfNames:
    """
    A row a name. Rich draws it in the first form that the terminal is wide enough for: boxed with whole names; boxed
    with what all modules' names begin with above the table instead; the same with headers of several lines; without
    lines; with each name above its numbers.

    Args:
        title: Of the names.
        headers: Of the numbers.
        caption: What the figures mean.
        of_modules: Whether the names have parts, which many of them share.
    """

    title: str
    headers: Sequence[str]
    caption: str
    of_modules: bool = True
    sections: list[list[tuple[str, tuple[str, ...]]]] = field(default_factory=lambda: [[]])

    def add_row(self, name: str, *cells: str) -> None:
        """A name, of others perhaps, and a number under each header."""
        self.sections[-1].append((one_line(name, None) if self.of_modules else name, cells))

    def add_section(self) -> None:
        """What follows is set off."""
        if self.sections[-1]:
            self.sections.append([])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich asks for to print it."""
        from rich.text import Text

        beginning, form, width = self._form(options.max_width)
        if beginning:
            yield Text(f"In {beginning}:", no_wrap=True, overflow="ignore")
        if isinstance(form, str):
            yield Text(form, no_wrap=True, overflow="ignore")
        else:
            yield form
        longest = min(options.max_width, max(width, _NARROWEST_CAPTION))
        yield Text(textwrap.fill(self.caption, longest, break_on_hyphens=False), style="italic")

    def _form(self, available: int) -> tuple[str, Table | str, int]:
        """What stands above the table, the table, and its width."""
        beginning = _shared_beginning([name for name, _ in self._rows()]) if self.of_modules else ""
        for above in dict.fromkeys(("", beginning)):
            names = [name[len(above) :].removeprefix(".") for name, _ in self._rows()]
            first = max(map(_width, (self.title, *names)))
            for one_line_each in (True, False) if above == beginning else (True,):
                widths = [first, *self._widths(one_line_each)]
                boxed = sum(width + 3 for width in widths) + 1
                if boxed <= available:
                    return above, self._boxed(above, widths), boxed
        widths = self._widths(False)
        plain = first + sum(width + 1 for width in widths)
        if plain <= available:
            return beginning, self._plain(beginning, first, widths), plain
        return beginning, self._plain(beginning, 0, widths), first

    def _rows(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for section in self.sections:
            yield from section

    def _widths(self, one_line_each: bool) -> list[int]:
        """Of the numbers' columns, with each header in one line or in as many as it has words."""
        columns = zip(*(cells for _, cells in self._rows()), strict=True)
        return [
            max(map(_width, (*([header] if one_line_each else header.split()), *cells)))
            for header, cells in zip_longest(self.headers, columns, fillvalue="")
        ]

    def _boxed(self, beginning: str, widths: Sequence[int]) -> Table:
        from rich.table import Table
        from rich.text import Text

        result = Table()
        result.add_column(self.title, width=widths[0], no_wrap=True)
        for header, width in zip(self.headers, widths[1:], strict=True):
            result.add_column(header, justify="right", width=width)
        for section in self.sections:
            for name, cells in section:
                result.add_row(Text(name[len(beginning) :].removeprefix(".")), *map(Text, cells))
            result.add_section()
        return result

    def _plain(self, beginning: str, first: int, widths: Sequence[int]) -> str:
        """
        Args:
            beginning: What is left out of the names.
            first: Width of their column; 0: they stand above their numbers.
            widths: Of the other columns.
        """

        def line(name: str, cells: Sequence[str]) -> str:
            numbers = " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            return f"{name.ljust(first)} {numbers}".rstrip()

        headers = list(zip_longest(*([*header.split()] for header in self.headers), fillvalue=""))
        lines = [] if first else [self.title]
        lines += [line("", cells) for cells in headers[:-1]] + [line(self.title if first else "", headers[-1])]
        lines.append("-" * max(map(len, lines)))
        for number, section in enumerate(self.sections):
            lines += [""] if number and section else []
            for name, cells in section:
                shown = name[len(beginning) :].removeprefix(".")
                lines += [line(shown, cells)] if first else [shown, line("", cells)]
        return "\n".join(lines)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _shared_beginning(names: Sequence[str]) -> str:
    """The parts with which all names begin, where there are several names; each has another part behind them."""
    if len(names) < 2:
        return ""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
