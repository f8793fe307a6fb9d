"""The methods that are compared, each one frozen record that says how it is calibrated and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..retention.methods import TARGETS

Requests = Literal["narrow", "broad"]
"""The 196 built-in requests of 0.1, of which a model refuses about 130; or all that the built-in set has now."""

Targets = Literal["qv", "all-linear"]
TARGET_MODULES = {"qv": TARGETS["qv"], "all-linear": TARGETS["all-linear"]}
"""Name -> names of the layers with adapters."""


@dataclass(frozen=True)
class Calibration:
    """What a safety module is computed from. What is None is SaLoRA's default."""

    requests: Requests = "narrow"
    variant: Literal["two-sided", "paper"] = "two-sided"
    safety_positions: str | None = None
    header_weight: float | None = None
    """How much more a token of the template behind the request counts than one of its text."""
    input_safety_rank: int | float | str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of `SaLoRAConfig`, beside the requests."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "requests"}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def name(self) -> str:
        """Short, for a file."""
        return "-".join([self.requests, *(str(value).replace(":", "") for value in self.options.values())])


@dataclass(frozen=True)
class Anchor:
    """KL to the base model's answers to requests that it refuses, at some steps (`salora_plugins.replay`)."""

    weight: float = 1.0
    every: int | None = None
    """None: as often as costs 5 % of the time."""


@dataclass(frozen=True)
class Method:
    """How an adapter is calibrated and trained, and what happens to its update."""

    calibration: Calibration | None = None
    """None: plain LoRA."""
    replay: float = 0.0
    """Share of the rows that are the base model's own refusals of the broad set."""
    anchor: Anchor | None = None
    second_adapter: bool = False
    """Only a second adapter, which reacts to nothing but V_C, is trained by the anchor."""
    constrained: bool = False
    """The loss of constrained SFT (Qi et al. 2024, arXiv 2406.05946), heavy on a response's first tokens."""
    random_directions: bool = False
    """Directions drawn at random, as many as the calibration has."""
    norm_of: str | None = None
    """The method to whose size of update (Frobenius norm over all layers) this one's is scaled to be measured."""


REPLAY = 0.05  # of issue 22: what costs a user nothing
BROAD = Calibration(requests="broad")
NEW = Calibration(requests="broad", header_weight=10.0)
LORA, ANCHOR = Method(), Anchor()

METHODS: dict[str, Method] = {
    "lora": LORA,
    "lora+replay": Method(replay=REPLAY),
    "lora+anchor": Method(anchor=ANCHOR),
    "constrained-sft": Method(constrained=True),
    "paper": Method(Calibration(variant="paper")),
    "paper+anchor": Method(Calibration(variant="paper"), anchor=ANCHOR),
    "default": Method(Calibration()),
    "broad": Method(BROAD),
    "header": Method(replace(BROAD, safety_positions="header")),
    "new": Method(NEW),
    "new+replay": Method(NEW, replay=REPLAY),
    "new+anchor": Method(NEW, anchor=ANCHOR),
    "new+second-anchor": Method(NEW, anchor=ANCHOR, second_adapter=True),
    "new-leak": Method(replace(NEW, input_safety_rank="leak:0.05")),
    "new-64+anchor": Method(replace(NEW, input_safety_rank=64), anchor=ANCHOR),
    "random-directions": Method(NEW, random_directions=True),
    "lora-at-norm": Method(norm_of="new"),
}
"""
Name -> method, in the order of the tables. "default" is calibrated as in 0.1; "new" on the broad set, with the tokens
behind the request weighted more, and "header" on those alone; "new-leak" takes the smallest rank whose leak is below
the target.
"""
