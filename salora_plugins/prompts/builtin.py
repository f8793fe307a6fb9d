"""The built-in prompts: harmful requests in two parts, harmless ones that look alike, and everyday ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files

from ..hookspecs import DataSource, hookimpl

SPLITS = ("calibration", "evaluation")


def builtin_prompts(split: str) -> list[dict[str, str]]:
    """Harmful requests that were written for this package, none of them operational.

    Args:
        split: `"calibration"` (what `safety_data="builtin"` uses) or `"evaluation"` (held out).

    Returns:
        Rows with `prompt`, `category` (a hazard category of the MLCommons taxonomy) and `split`.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the built-in prompts have the splits {', '.join(SPLITS)}")
    return [row for row in _read("safety_prompts.jsonl") if row["split"] == split]


def harmless_prompts() -> list[dict[str, str]]:
    """Harmless requests whose wording resembles harmful ones, to measure over-refusal; rows with `prompt`."""
    return _read("harmless_prompts.jsonl")


def everyday_prompts() -> list[dict[str, str]]:
    """Plain everyday requests, which stand for a task where its own rows are not known; rows with `prompt`."""
    return _read("everyday_prompts.jsonl")


def _read(name: str) -> list[dict[str, str]]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


@hookimpl
def register_data_sources(register: Callable[[str, DataSource], None]) -> None:
    register("builtin", lambda: [{"prompt": row["prompt"]} for row in builtin_prompts("calibration")])
