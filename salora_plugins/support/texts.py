"""Texts of others (names, descriptions, answers), made safe to show: on a terminal, and in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

LONGEST = 300
"""Characters of a text of others that are shown on one line."""

# Control characters, what reverses or hides text, and halves of surrogate pairs. Joiners stay, which scripts need.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
# What means something in Markdown within a line, or begins HTML.
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")
_REASONING = re.compile(r"^\s*<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text: str) -> str:
    """A text with escapes such as "\\u202e" in the place of characters that hide, reverse or control something."""
    return _HIDDEN.sub(lambda match: _escape(match.group()), text)


def one_line(value: Any, longest: int | None = LONGEST) -> str:
    """A value of others as one line of visible text, cut where it is very long, unless `longest` is None."""
    text = " ".join(visible(str(value)).split())
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."


def shortened(value: Any) -> str:
    """A value as Python writes it, on one short line."""
    try:
        text = " ".join(repr(value).split())
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def how_to_write(value: Any) -> str:
    """What a message adds where a number was wanted, and is given as something else: nothing, or how to write it."""
    if isinstance(value, str):
        try:
            number: float = int(value)
        except ValueError:
            try:
                number = float(value)
            except ValueError:
                return ""
        # YAML takes 1e-3, without a point, for a text.
        return f" (this is a text; the number is {number!r})" if math.isfinite(number) else ""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return f" (this is a {type(value).__module__.partition('.')[0]} scalar; give its .item())"
    return ""


def cell(value: Any) -> Text:
    """The same for a table of rich, without the meaning that brackets have there."""
    from rich.text import Text

    return Text(one_line(value))


def markdown(value: Any, longest: int | None = LONGEST) -> str:
    """The same for Markdown: neither HTML, nor a comment, a link, or the end of a table's cell."""
    text = "".join(_HTML.get(character, character) for character in one_line(value, longest))
    return _MARKDOWN.sub(lambda match: "\\" + match.group(), text)


def markdown_code(value: Any) -> str:
    """A digest or the like in Markdown, set as code where it is nothing but letters and digits."""
    text = one_line(value)
    return f"`{text}`" if text.isascii() and text.isalnum() else markdown(text)


def markdown_table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], *, labels: int = 1) -> str:
    """
    A table in Markdown, whose texts are none.

    Args:
        columns: Titles.
        rows: Cells.
        labels: The first columns, which hold words; the others hold numbers, and stand to the right.
    """
    lines = [" | ".join(map(markdown, row)) for row in (columns, *rows)]
    lines.insert(1, " | ".join(["---"] * labels + ["---:"] * (len(columns) - labels)))
    return "\n".join(f"| {line} |" for line in lines)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def placeholder(value: object) -> str:
    """What a file has in the place of an object that only a process can hold."""
    return f"<{type(value).__name__}>"


def is_placeholder(text: str) -> bool:
    """Whether a text was read where `placeholder` was written."""
    return text.startswith("<") and text.endswith(">")


def without_reasoning(response: str) -> str:
    """A response without the `<think>` block that it begins with; nothing is left where the block is not closed."""
    return _REASONING.sub("", response, count=1)
