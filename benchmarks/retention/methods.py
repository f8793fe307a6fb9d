"""The methods that are compared, each one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from salora_plugins.options import Positions

from ..small_model import QV

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "qv": QV,
    "attention": ATTENTION,
    "residual": ["o_proj", "down_proj"],
    "all-linear": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
}
"""Name -> names of the layers with adapters; "residual" are those that write to the residual stream."""

Repair = Literal["projected", "restored", "restored-unaligned", "safe-lora"]
"""
What is made of a trained LoRA adapter: `salora project`, `salora restore` (LSSF) with the adapter itself or with the
model before its alignment as the unsafe one, `salora safe-lora`.
"""


@dataclass(frozen=True)
class Calibration:
    """What a safety module is computed from; by default as in the paper."""

    safety_rank: int | str = 32
    input_safety_rank: int | float | None = 0
    """None: SaLoRA's default."""
    positions: Positions = "response"
    safety_data: Literal["builtin", "advbench", "both"] = "builtin"
    basis_method: Literal["salora", "contrastive", "ratio", "actsvd", "weight-delta", "sae"] = "salora"
    """"contrastive" and "ratio" are those of directions.py, for the input side."""


@dataclass(frozen=True)
class Method:
    """How an adapter is made and trained, and what happens to its update."""

    kind: Literal["lora", "pissa", "salora"]
    targets: Literal["qv", "attention", "residual", "all-linear"] = "qv"
    layers: Literal["all", "upper half"] = "all"
    calibration: Calibration | None = None
    """Of the safety module that training respects or, with the repair "projected", the update is projected by."""
    init: Literal["task", "zero"] = "task"
    """SaLoRA's start values: the paper's, or B = 0."""
    repair: Repair | None = None
    """Nothing is trained: this is done to the adapter that the run of "lora" on the task has left."""
    scale: float | None = None
    """What the update is multiplied with after training."""
    norm_cap: float | None = None
    """The share of ‖W‖ that ‖ΔW‖ may have after every step of training."""

    @property
    def target_modules(self) -> list[str]:
        return TARGETS[self.targets]

    @property
    def options(self) -> dict[str, Any]:
        """What differs from q and v, the paper's calibration and start values, as the files of the runs have it."""
        options: dict[str, Any] = {}
        for record in (self.calibration, self):
            for field in fields(record) if record is not None else ():
                value = getattr(record, field.name)
                if field.name not in ("kind", "calibration", "repair") and value != field.default:
                    options[field.name] = value
        return options | ({"targets": self.target_modules} if self.targets != "qv" else {})


LORA = Method("lora")
PROMPT = Calibration(input_safety_rank=None, positions="prompt")
ALL = Calibration(input_safety_rank=None, positions="all")
ENTROPY = Calibration(safety_rank="entropy:0.85")
PAPER = Method("salora", calibration=Calibration())
TWO_SIDED = Method("salora", calibration=PROMPT, init="zero")

METHODS: dict[str, Method] = {
    "lora": LORA,
    "pissa": Method("pissa"),
    "paper": PAPER,
    "projected": replace(LORA, calibration=PROMPT, repair="projected"),
    "restored": replace(LORA, calibration=ENTROPY, repair="restored"),
    "restored-unaligned": replace(LORA, calibration=ENTROPY, repair="restored-unaligned"),
    "safe-lora": replace(LORA, repair="safe-lora"),
    "scaled-0.5": replace(LORA, scale=0.5),
    "capped-0.012": replace(LORA, norm_cap=0.012),
    "two-sided": TWO_SIDED,
    "two-sided-32": replace(TWO_SIDED, calibration=replace(PROMPT, input_safety_rank=32)),
    "two-sided-256": replace(TWO_SIDED, calibration=replace(PROMPT, input_safety_rank=256)),
    "two-sided-all": replace(TWO_SIDED, calibration=ALL),
    "two-sided-all-task": replace(PAPER, calibration=ALL),
    "two-sided-all-64-task": replace(PAPER, calibration=replace(ALL, input_safety_rank=64)),
    "two-sided-all-128-task": replace(PAPER, calibration=replace(ALL, input_safety_rank=128)),
    "two-sided-all-0.97-task": replace(PAPER, calibration=replace(ALL, input_safety_rank=0.97)),
    "two-sided-all-128-upper-task": replace(
        PAPER, calibration=replace(ALL, input_safety_rank=128), layers="upper half"
    ),
    "two-sided-all-safety-rank-1-task": replace(PAPER, calibration=replace(ALL, safety_rank=1)),
    "two-sided-both": replace(TWO_SIDED, calibration=replace(PROMPT, safety_data="both")),
    "two-sided-safety-rank-128": replace(TWO_SIDED, calibration=replace(PROMPT, safety_rank=128)),
    "two-sided-contrastive": replace(TWO_SIDED, calibration=replace(ALL, basis_method="contrastive")),
    "two-sided-ratio": replace(TWO_SIDED, calibration=replace(ALL, basis_method="ratio")),
    "two-sided-capped-0.025": replace(TWO_SIDED, norm_cap=0.025),
    "actsvd": replace(TWO_SIDED, calibration=replace(PROMPT, basis_method="actsvd")),
    "weight-delta": replace(TWO_SIDED, calibration=replace(PROMPT, basis_method="weight-delta")),
    "lora-attention": replace(LORA, targets="attention"),
    "two-sided-attention": replace(TWO_SIDED, targets="attention"),
    "lora-residual": replace(LORA, targets="residual"),
    "two-sided-residual": replace(TWO_SIDED, targets="residual"),
    "sae": Method("salora", targets="residual", calibration=Calibration(basis_method="sae"), init="zero"),
    "lora-all-linear": replace(LORA, targets="all-linear"),
    "two-sided-all-linear": replace(TWO_SIDED, targets="all-linear"),
}
"""Name -> method, in the order of the tables."""
