"""What is wrong with data, and how it is shown in messages."""

from __future__ import annotations

from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the option or file, what was found and what to do."""


def shortened(value: Any) -> str:
    """A value of a row on one short line."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
