"""
Public sets of requests by short names, for those who have access to them: nothing of them is in this package.

They are data sources as `builtin` is: `safety_data: [builtin, advbench]`. For most, the hub asks for consent to terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..hookspecs import DataSource, hookimpl
from ..support.hub import hub_dataset


@dataclass(frozen=True)
class PublicSet:
    """Where a set is on the hub, and in which columns."""

    repository: str
    config: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    category: str | None = None
    only: tuple[str, str] | None = None
    """A column, and its value in the rows that belong to the set; None: all do."""


PUBLIC_SETS: Mapping[str, PublicSet] = {
    # Zou et al. 2023, arXiv 2307.15043. Its column `target`, an answer that complies, is not read.
    "advbench": PublicSet("walledai/AdvBench"),
    # Mazeika et al. 2024, arXiv 2402.04249: the behaviours that need no context.
    "harmbench": PublicSet("walledai/HarmBench", config="standard", category="category"),
    # Souly et al. 2024, arXiv 2402.10260.
    "strongreject": PublicSet("walledai/StrongREJECT", category="category"),
    # Röttger et al. 2024, arXiv 2308.01263: look-alikes to be answered, and what they look like.
    "xstest-safe": PublicSet("walledai/XSTest", split="test", category="type", only=("label", "safe")),
    "xstest-unsafe": PublicSet("walledai/XSTest", split="test", category="type", only=("label", "unsafe")),
}
"""Name -> set."""


def rows_of(public_set: PublicSet) -> list[dict[str, Any]]:
    """
    The rows of a set, with `prompt` and, where it has them, `category`.

    Raises:
        ImportError: The library `datasets` is not installed.
        FileNotFoundError: The set cannot be had; it says why.
        ValueError: It has other columns than it had.
    """
    rows = hub_dataset(public_set.repository, public_set.config, public_set.split)
    wanted = [public_set.prompt, *filter(None, [public_set.category]), *(public_set.only or ())[:1]]
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise ValueError(
            f"{public_set.repository} has no column {missing[0]!r} (it has {', '.join(rows.column_names)}). Name the "
            "data set by its id, or a file with a column `prompt`."
        )
    found = []
    for row in rows:
        if public_set.only is None or row[public_set.only[0]] == public_set.only[1]:
            of_kind = {} if public_set.category is None else {"category": row[public_set.category]}
            found.append({"prompt": row[public_set.prompt], **of_kind})
    return found


@hookimpl
def register_data_sources(register: Callable[[str, DataSource], None]) -> None:
    for name, public_set in PUBLIC_SETS.items():
        register(name, partial(rows_of, public_set))
