"""What a machine has room for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

ROOM = 1.2
"""How many times its weights a model needs to be run: the rest is for activations and statistics."""

# Where a container is told how much it may use and how much it does: control groups of version 2, then of version 1.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory() -> int:
    """Bytes of the machine's memory that are free or can be freed, within the limits of a container."""
    free = psutil.virtual_memory().available
    for limit, used in _LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, free)


def accelerator_memory() -> dict[str, tuple[int, int]]:
    """Accelerator -> bytes that are free and bytes that there are; empty where there is none, or none that tells."""
    if not torch.cuda.is_available():
        return {}
    return {f"cuda:{index}": torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())}
