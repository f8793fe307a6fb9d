"""The states of a model from which parts are removed, for an evaluation: each is made in memory, and undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.positions import CountedPositions
from ..calibration.gathering import safety_statistics
from ..calibration.settings import SafetySettings
from ..evaluation.evaluated_models import EvaluatedModel
from ..evaluation.removal import random_directions, without_parts
from ..evaluation.run_folder import Entry, RunFolder
from ..models.running import evaluation_mode
from ..models.weights import layer_features
from ..rows.examples import TokenizedExample
from .directions import removed_part, top_directions
from .entries import Entries, random_entries, safety_alone, without_entries
from .grid import EntryPoint, Family, RankPoint, State
from .scores import count_of, snip_columns, wanda_columns

REMOVED = Entry("removed", float)
"""Of a state, in the folder: which share of the ranks or of the entries of the layers is gone."""

Rows = dict[str, list[TokenizedExample]]
"""The rows by what they stand for, "safety" and "utility"."""


@dataclass(frozen=True)
class _Found:
    """What was found for a family, on the CPU: module name -> directions, or top columns."""

    family: Family
    safety: dict[str, Tensor]
    utility: dict[str, Tensor]


class StateLoader:
    """
    The model in each of its states. What is to be removed is found when the first state that needs it is asked for, in
    one pass over the rows for all points of the grid; one family is kept at a time.

    Args:
        model: The base model.
        settings: Which layers, and how statistics are kept.
        rows: Reads, and where need be has answered, the safety and the utility rows; called once at the most.
        states: All of them, by name.
        folder: Where it is noted how much of the weights is gone.
        seed: Of the random controls.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SafetySettings,
        rows: Callable[[], Rows],
        states: Mapping[str, State],
        folder: RunFolder,
        seed: int,
    ) -> None:
        self._model, self._settings, self._states, self._folder, self._seed = model, settings, states, folder, seed
        self._read_rows = rows
        self._rows: Rows | None = None
        self._found: _Found | None = None
        self._sizes = {name: layer_features(model.get_submodule(name)) for name in settings.names}

    @property
    def base(self) -> nn.Module:
        """The model as it is."""
        return self._model

    @contextmanager
    def loaded(self, evaluated: EvaluatedModel) -> Iterator[nn.Module]:
        """The model in a state."""
        state = self._states.get(evaluated.name)
        if state is None:
            yield self._model
            return
        point = state.point
        if isinstance(point, RankPoint):
            removal = self._without_ranks(state, point)
        else:
            removal = self._without_entries(state, point)
        with removal as removed:
            self._folder.write(state.name, REMOVED, removed)
            yield self._model

    def release(self) -> None:
        """Forget what was found."""
        self._found = None

    @contextmanager
    def _without_ranks(self, state: State, point: RankPoint) -> Iterator[float]:
        found = self._of_family(state.family)
        parts = {}
        gone = total = 0
        safety = {}
        for name, (safety_rank, _) in self._ranks(point).items():
            safety[name] = found.safety[name][:, :safety_rank]
            gone += safety[name].shape[1]
            total += min(self._sizes[name])
        if state.draw:
            safety = random_directions(safety, self._draw_seed(state))
        for name, (_, utility_rank) in self._ranks(point).items():
            parts[name] = removed_part(safety[name], found.utility[name][:, :utility_rank])
        with without_parts(self._model, parts):
            yield gone / total

    @contextmanager
    def _without_entries(self, state: State, point: EntryPoint) -> Iterator[float]:
        found = self._of_family(state.family)
        indices = {name: index for index, name in enumerate(self._settings.names)}

        def entries_of(name: str, device: torch.device) -> Entries:
            d_in, _ = self._sizes[name]
            safety = found.safety[name][:, : count_of(point.safety, d_in)].to(device)
            utility = found.utility[name][:, : count_of(point.utility, d_in)].to(device)
            chosen = safety_alone(safety, utility, d_in)
            if not state.draw:
                return chosen
            return random_entries(chosen, utility, d_in, self._draw_seed(state) * len(indices) + indices[name])

        with without_entries(self._model, self._settings.names, entries_of) as removed:
            yield removed

    def _draw_seed(self, state: State) -> int:
        """The same whatever other points there are."""
        return 1000 * self._seed + state.draw

    def _ranks(self, point: RankPoint) -> dict[str, tuple[int, int]]:
        return {name: point.of_layer(*size) for name, size in self._sizes.items()}

    def _of_family(self, family: Family) -> _Found:
        if self._found is None or self._found.family != family:
            self._found = None
            rows = self._rows = self._rows or self._read_rows()
            points: list[Any] = list(
                dict.fromkeys(state.point for state in self._states.values() if state.family == family)
            )
            with evaluation_mode(self._model):
                self._found = self._find_ranks(rows, points) if family == "ranks" else self._find(family, rows, points)
        return self._found

    def _find(self, family: Family, rows: Rows, points: Sequence[Any]) -> _Found:
        find = snip_columns if family == "snip" else wanda_columns
        of_kind = partial(find, self._model, self._settings.names, batch_size=self._settings.batch_size)
        return _Found(
            family,
            of_kind(rows["safety"], percent=max(point.safety for point in points), of="safety"),
            of_kind(rows["utility"], percent=max(point.utility for point in points), of="utility"),
        )

    def _find_ranks(self, rows: Rows, points: Sequence[RankPoint]) -> _Found:
        safety, utility = (
            self._directions(rows[kind], points, side, kind) for side, kind in enumerate(("safety", "utility"))
        )
        return _Found("ranks", safety, utility)

    def _directions(
        self, rows: list[TokenizedExample], points: Sequence[RankPoint], side: int, kind: str
    ) -> dict[str, Tensor]:
        """The most that any point takes, of the safety rows (side 0) or of the utility rows (side 1)."""
        ranks = {name: max(point.of_layer(*size)[side] for point in points) for name, size in self._sizes.items()}
        if not any(ranks.values()):
            return {name: torch.empty(d_out, 0) for name, (_, d_out) in self._sizes.items()}
        statistics = safety_statistics(
            self._model, rows, CountedPositions("response"), self._settings, description=f"directions, {kind}"
        )
        # Scaled ranks are nobody's number: they are cut to what there is.
        asked = ", ".join(str(point) for point in points if point.per is None)
        return top_directions(statistics, ranks, rows=f"{kind} rows", asked=asked or None)
