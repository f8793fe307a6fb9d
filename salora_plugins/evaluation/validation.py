"""Whether a safety module's directions carry the model's refusals: what happens when they are taken out of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..activations.errors import CalibrationError
from ..calibration import directions_of_rows
from ..config import SaLoRAConfig
from ..models.fingerprint import check_belongs
from ..models.running import adapters_disabled
from ..ranks import Side, of_side
from ..rows.examples import Asked
from ..safety_module import SafetyModule, SideBases
from .first_tokens import refusal_margins
from .intervals import Mean
from .metrics import response_loss
from .own_answers import with_own_answers
from .removal import random_directions, without_directions
from .reports.validation_report import RANDOM_SUBSPACES, Measures, SideValidation, ValidationReport
from .request_sets import Request


def validate(
    safety_module: SafetyModule | str | os.PathLike,
    model: nn.Module,
    tokenizer: Any,
    *,
    harmful: Sequence[Request],
    harmless: Sequence[Request],
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> ValidationReport:
    """
    Remove the safety directions from the layers that they belong to, in memory only, and measure what the model loses.

    With the output side, a layer's output y = W x + b becomes y - U_C U_C^T W x; with the input side, its input x
    becomes x - V_C V_C^T x. If the directions carry the refusals, the refusal margin on harmful requests falls further
    than without as many random directions. If ordinary answers depend on them as well, the loss on harmless data rises,
    and the comparison to be made is the one with the most important directions of the harmless data, which are
    computed here in the same way and number: those take out as much of what the layers do, but not for its safety.

    Args:
        safety_module: The module, or its file.
        model: The model that it was computed for; adapters that it carries are disabled meanwhile. No weight is
            changed.
        tokenizer: Its tokenizer.
        harmful: Requests to which it refuses an answer (`salora_plugins.evaluation.request_sets.load_requests`).
        harmless: Other requests; where one has no response, the model's own greedy one is taken.
        batch_size: Requests per forward pass.
        seed: Seed of the random directions.
        progress: Show a progress bar.

    Raises:
        SafetyModuleError: The safety module is another model's.
        ValueError: There are no requests, or the model says nothing to the harmless ones.
    """
    if not harmful or not harmless:
        raise ValueError("harmful and harmless: give at least one request of each.")
    if not isinstance(safety_module, SafetyModule):
        safety_module = SafetyModule.load(safety_module)
    get_base_model = getattr(model, "get_base_model", None)
    model = model if get_base_model is None else get_base_model()
    names = list(safety_module.bases)
    _check_layers(model, names)
    check_belongs(safety_module, model, names)
    with adapters_disabled(model):
        rows = with_own_answers(model, tokenizer, harmless, option="harmless", batch_size=batch_size, progress=progress)
        ordinary = _ordinary_directions(model, tokenizer, rows, safety_module, batch_size)
        total = 1 + len(safety_module.sides) * (2 + RANDOM_SUBSPACES)
        with tqdm(total=total, desc="validating", unit="state", disable=not progress) as bar:
            probe = _Probe(model, tokenizer, [request.asked for request in harmful], rows, batch_size, bar)
            unchanged = probe.measure()
            sides = {
                side: _without_side(probe, side, found.bases, ordinary[side].bases, seed)
                for side, found in safety_module.sides.items()
            }
    settings = {
        "base_model": getattr(model.config, "_name_or_path", ""),
        "safety_data": safety_module.provenance.get("safety_data"),
        "layers": len(names),
        "safety_rank": safety_module.safety_rank,
        "input_safety_rank": safety_module.input_safety_rank,
        "harmful_requests": len(harmful),
        "harmless_requests": len(rows),
        "random_subspaces": RANDOM_SUBSPACES,
        "seed": seed,
    }
    return ValidationReport(unchanged, sides, settings)


def _without_side(
    probe: _Probe, side: Side, safety: Mapping[str, Tensor], ordinary: Mapping[str, Tensor], seed: int
) -> SideValidation:
    random = (random_directions(safety, RANDOM_SUBSPACES * seed + draw) for draw in range(RANDOM_SUBSPACES))
    return SideValidation(
        safety=probe.measure(side, safety),
        random=tuple(probe.measure(side, directions) for directions in random),
        ordinary=probe.measure(side, ordinary),
    )


@dataclass(frozen=True)
class _Probe:
    """What is measured on a model, in whatever state it is."""

    model: nn.Module
    tokenizer: Any
    harmful: Sequence[Asked]
    harmless: Sequence[Mapping[str, Any]]
    """Conversations with answers, as `response_loss` takes them."""
    batch_size: int
    bar: tqdm

    def measure(self, side: Side = "output", directions: Mapping[str, Tensor] | None = None) -> Measures:
        """The model without these directions of a side; None: as it is."""
        removed = nullcontext() if directions is None else without_directions(self.model, side, directions)
        with removed:
            measured = Measures(
                harmful_margin=self._margin(self.harmful),
                harmless_margin=self._margin([row["prompt"][0]["content"] for row in self.harmless]),
                harmless_loss=response_loss(self.model, self.tokenizer, self.harmless, self.batch_size),
            )
        self.bar.update()
        return measured

    def _margin(self, requests: Sequence[Asked]) -> Mean:
        margins = refusal_margins(self.model, self.tokenizer, requests, batch_size=self.batch_size)
        return Mean.of(margins.tolist())


def _ordinary_directions(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], safety_module: SafetyModule, batch_size: int
) -> dict[Side, SideBases]:
    """The top directions on the harmless rows, as many as the safety module has, on the same sides of each layer."""
    ranks: dict[str, Any] = {"input_safety_rank": 0}
    for side, found in safety_module.sides.items():
        ranks[of_side(side, "safety_rank")] = found.least_rank
        ranks[of_side(side, "safety_rank_pattern")] = _exact(found.bases)
    try:
        config = SaLoRAConfig(
            tokenizer=tokenizer,
            safety_data=[{"messages": [*row["prompt"], *row["completion"]]} for row in rows],
            target_modules=list(safety_module.bases),
            safety_positions=safety_module.provenance.get("safety_positions"),
            num_safety_samples=len(rows),
            calibration_batch_size=batch_size,
            **ranks,
        )
        return directions_of_rows(model, config)
    except CalibrationError as error:
        raise ValueError(
            f"harmless: as many directions as the safety module has cannot be found in these {len(rows)} rows. Give "
            f"more of them, or ones with longer answers. ({error})"
        ) from error


def _exact(bases: Mapping[str, Tensor]) -> dict[str, int]:
    return {name.replace(".", r"\."): basis.shape[1] for name, basis in bases.items()}


def _check_layers(model: nn.Module, names: Sequence[str]) -> None:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(
                f"The safety module was computed for another model: {type(model).__name__} has no {name!r}. Name the "
                "model that it belongs to."
            )
