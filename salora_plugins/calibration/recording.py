"""The one writer of what a safety module says of its origin."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ..provenance import Provenance
from ..ranks import Side, of_side
from ..rows.examples import data_digest
from ..rows.rendering import has_template, template_digest
from ..safety_module import SideBases
from .leak import Leak
from .refusals import AnsweredRows
from .settings import SafetySettings


def provenance_of(
    settings: SafetySettings,
    answered: AnsweredRows,
    positions_counted: int,
    sides: Mapping[Side, SideBases],
    leak: Leak,
    supplied: Mapping[str, Any],
) -> Provenance:
    """
    Args:
        settings: Of the calibration.
        answered: The rows that it ran over.
        positions_counted: How many of their positions counted.
        sides: What it found.
        leak: What was measured on rows that were held out.
        supplied: What the method got beside the safety rows.
    """
    ranks = {side: [basis.shape[1] for basis in found.bases.values()] for side, found in sides.items()}
    return Provenance.of(
        {
            **settings.asked,
            "base_model": settings.rows.base_model or None,
            **(_of_safety_rows(settings, answered, positions_counted) if settings.reads_safety_rows else {}),
            **supplied,
            **answered.counts,
            **({"safety_sources": answered.by_source} if answered.by_source else {}),
            **_tokenizer_facts(answered.tokenizer),
            "modules": len(settings.names),
            "directions": {side: [min(of), max(of)] for side, of in ranks.items()},
            **_cuts(settings, sides),
            **leak.facts,
            **({"engine": settings.engine.kind, **_sketch_widths(settings)} if _runs_the_model(settings) else {}),
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("salora-plugins", "torch", "transformers", "peft")},
            },
        }
    )


def _of_safety_rows(settings: SafetySettings, answered: AnsweredRows, positions_counted: int) -> dict[str, Any]:
    return {
        "safety_data_sha256": data_digest(answered.examples),
        "safety_samples": len(answered.examples),
        "safety_positions": settings.positions,
        **({"header_weight": settings.header_weight} if settings.header_weight != 1 else {}),
        "positions_counted": positions_counted,
    }


def _runs_the_model(settings: SafetySettings) -> bool:
    """Whether statistics are gathered of the layers."""
    return settings.reads_safety_rows or settings.needs.utility_rows


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Nothing where there is none."""
    if tokenizer is None:
        return {}
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return {
        "tokenizer": str(name),
        "has_chat_template": has_template(tokenizer),
        "chat_template_sha256": template_digest(tokenizer),
    }


def _cuts(settings: SafetySettings, sides: Mapping[Side, SideBases]) -> dict[str, int]:
    """Of default ranks that the data has no directions for: how many modules have fewer."""
    cuts = {}
    for side, found in sides.items():
        wanted = settings.ranks[side]
        if fewer := sum(
            basis.shape[1] < number for name, basis in found.bases.items() if isinstance(number := wanted[name], int)
        ):
            cuts[of_side(side, "safety_rank_cut")] = fewer
    return cuts


def _sketch_widths(settings: SafetySettings) -> dict[str, int]:
    """Nothing where statistics are exact."""
    if settings.engine.kind != "sketched":
        return {}
    widths: dict[Side, int] = {"output": settings.engine.width, "input": settings.engine.input_width}
    return {of_side(side, "sketch_width"): widths[side] for side in settings.ranks}
