"""Updates of statistics that wait for those of other layers, since a device takes many small operations slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..support.linear_algebra import is_asynchronous
from .vectors import RandomRows, VectorStatistics, update_together

# In float64: what one update of several statistics may copy. It takes about twice that for a while, and the vectors
# that wait, in the model's dtype, less than half of it for each kind.
_BYTES_TOGETHER = 512 * 2**20


class WaitingUpdates:
    """
    Vectors of one forward pass on their way to the statistics of many layers, which get them a kind at a time: as soon
    as enough wait, and at `flush`. On a CPU nothing waits.

    Args:
        scales: What the vectors are multiplied with, on a device; None: nothing.
    """

    def __init__(self, scales: Callable[[torch.device], Tensor | None]) -> None:
        self._scales = scales
        self._random_rows = RandomRows()
        self._groups: dict[Any, list[tuple[VectorStatistics, Tensor]]] = {}
        self._waiting: set[int] = set()

    def add(self, statistics: VectorStatistics, rows: Tensor) -> None:
        """
        Args:
            statistics: What is to be updated.
            rows: (n, d), any floating dtype; must not change any more.
        """
        if not is_asynchronous(rows.device):
            update_together([statistics], [rows], self._scales(rows.device), self._random_rows)
            return
        if id(statistics) in self._waiting:
            self.flush()  # of a layer that is called twice in a pass
        key = statistics.kind, rows.shape, rows.dtype, rows.device
        group = self._groups.setdefault(key, [])
        group.append((statistics, rows))
        self._waiting.add(id(statistics))
        if (len(group) + 1) * statistics.bytes_of_update(rows.shape[0]) > _BYTES_TOGETHER:
            self._update(self._groups.pop(key))

    def flush(self) -> None:
        """Update all that wait."""
        while self._groups:
            _, group = self._groups.popitem()
            self._update(group)

    def forget(self) -> None:
        """Drop what waits, of a pass that failed."""
        self._groups.clear()
        self._waiting.clear()

    def _update(self, group: list[tuple[VectorStatistics, Tensor]]) -> None:
        self._waiting.difference_update(id(statistics) for statistics, _ in group)
        statistics, rows = zip(*group, strict=True)
        update_together(statistics, rows, self._scales(rows[0].device), self._random_rows)
