"""What is wrong with data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the option or file, what was found and what to do."""
