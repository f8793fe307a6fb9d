"""The built-in prompts: harmful requests in two parts, harmless ones that look alike, and everyday ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from ..hookspecs import DataSource, hookimpl

SPLITS = ("calibration", "evaluation")

EVERYDAY = "everyday"
"""The data source of everyday requests: what "builtin" is of utility data."""


def builtin_prompts(split: str) -> list[dict[str, Any]]:
    """Harmful requests that were written for this package, none of them operational.

    Args:
        split: `"calibration"` (what `safety_data="builtin"` uses) or `"evaluation"` (held out).

    Returns:
        Rows with `prompt`, or with `messages` where there are several turns; `category` (a hazard category of the
        MLCommons taxonomy), `form` (a question, an order, a letter, ...), `language` (of ISO 639-1) and `split`.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the built-in prompts have the splits {', '.join(SPLITS)}")
    return [row for row in _read("safety_prompts.jsonl") if row["split"] == split]


def harmless_prompts() -> list[dict[str, Any]]:
    """Harmless requests whose wording resembles harmful ones, to measure over-refusal; rows as of `builtin_prompts`."""
    return _read("harmless_prompts.jsonl")


def everyday_prompts() -> list[dict[str, Any]]:
    """Plain everyday requests, which stand for a task where its own rows are not known; rows with `prompt`."""
    return _read("everyday_prompts.jsonl")


def plain_prompts(rows: list[dict[str, Any]]) -> list[str]:
    """The English ones of a single turn."""
    return [row["prompt"] for row in rows if "prompt" in row and row["language"] == "en"]


def _read(name: str) -> list[dict[str, Any]]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


@hookimpl
def register_data_sources(register: Callable[[str, DataSource], None]) -> None:
    register("builtin", lambda: builtin_prompts("calibration"))
    register(EVERYDAY, everyday_prompts)
