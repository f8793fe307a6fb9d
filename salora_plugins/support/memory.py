"""What a machine has room for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

ROOM = 1.2
"""How many times its weights a model needs to be run: the rest is for activations and statistics."""

# Where a container is told how much it may use, how much it does, and what of that is the page cache, which is given up
# where memory is short: control groups of version 2, then of version 1.
_LIMITS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        ("inactive_file", "active_file"),
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_memory() -> int:
    """Bytes of the machine's memory that are free or can be freed, within the limits of a container."""
    free = psutil.virtual_memory().available
    for limit, used, statistics, of_page_cache in _LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            in_use = int(Path(used).read_text()) - _sum_of(Path(statistics), of_page_cache)
            free = min(free, int(Path(limit).read_text()) - in_use)
    return max(0, free)


def _sum_of(file: Path, names: tuple[str, ...]) -> int:
    """Of some lines "name number" of a file; 0 where it cannot be read."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names)


def accelerator_memory() -> dict[str, tuple[int, int]]:
    """Accelerator -> bytes that are free and bytes that there are; empty where there is none, or none that tells."""
    if not torch.cuda.is_available():
        return {}
    return {f"cuda:{index}": torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())}
