"""What a run is made of: models, data, folders, and how much is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Scale:
    """How much is trained, asked and generated."""

    steps: tuple[int, ...] = (60, 240)
    """After which is measured."""
    seeds: int = 3
    requests: int = 100
    """Of each set."""
    tokens: int = 32
    """Of the answers that are judged."""
    heldout: int = 100
    """Rows of a task that are not trained on."""
    problems: int = 200
    """Of math, whose answers are compared; with 0 none is solved."""
    problem_tokens: int = 120
    own_tokens: int = 64
    """Of the model's own answers to everyday requests, which tasks are made of."""
    refusal_tokens: int = 48
    everyday: int = 700
    harmful: int = 4000
    """The most requests of the broad set that are answered, from all categories."""
    anchored: int = 128
    """Requests of the anchor."""
    anchor_every: int | None = None
    """At which steps the anchor counts, in the place of what its method says."""
    batch: int = 400
    """Answers at once."""
    tried: tuple[float, ...] = (1.0, 0.5, 2.0)
    """LoRA's learning rates, as multiples."""
    rows: int = 8
    """Of a step."""
    longest: int | None = None
    """Tokens; longer rows of a task are not trained on."""


FULL = Scale()
CPU = Scale(
    steps=(20, 50),
    seeds=2,
    requests=24,
    tokens=16,
    heldout=24,
    problems=0,
    own_tokens=24,
    refusal_tokens=16,
    everyday=180,
    harmful=400,
    anchored=48,
    batch=72,
    tried=(1.0,),
    rows=4,
    longest=128,
)
"""For a model of about 100 million parameters on one core: minutes a run."""
SMOKE = Scale(
    steps=(1, 2),
    seeds=1,
    requests=4,
    tokens=4,
    heldout=4,
    problems=4,
    problem_tokens=4,
    own_tokens=8,
    refusal_tokens=16,
    everyday=40,
    harmful=64,
    anchored=8,
    anchor_every=1,
    batch=32,
)


@dataclass(frozen=True)
class Setup:
    """Of all workers."""

    models: Mapping[str, str]
    """Name -> folder, in the order of their priority."""
    data: Path
    cache: Path
    """Gets what is made once: answers, refusals, safety modules."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """Name -> file of requests, one a line."""
    task_files: Mapping[str, str] = field(default_factory=dict)
    """Name -> file of conversations: further tasks."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Model -> LoRA's learning rate on q and v, where it is not the default."""
    device: str = "cpu"
    dtype: str | None = None
    """Of the base model; None: bfloat16 on a GPU, float32 on a CPU."""
    scale: Scale = FULL

    def folder(self, model: str) -> Path:
        """Of what is made once for a model."""
        return self.cache / model
