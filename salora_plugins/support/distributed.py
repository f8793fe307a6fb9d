"""The little of torch.distributed that is needed to share calibration and to give every rank the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
# How long ranks wait for what the first one does alone: the default group's timeout is minutes.
_PATIENCE = timedelta(days=7)


def is_distributed() -> bool:
    """Whether this process is one of several that work together."""
    return not _ALONE.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) where this process is the only one."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def broadcast(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Overwrite every tensor by that of the rank `source`, in place; all ranks must call it with the same shapes."""
    if not is_distributed():
        return
    for tensor in tensors:
        buffer = _buffer(tensor)
        dist.broadcast(buffer, src=source)
        tensor.data.copy_(buffer)


def gather_from_all_ranks(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, which must have one shape, along the first dimension."""
    if not is_distributed():
        return tensor
    buffer = _buffer(tensor)
    parts = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, buffer)
    return torch.cat(parts).to(tensor.device)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, which must have one shape."""
    if not is_distributed():
        return tensor
    buffer = _buffer(tensor).clone()
    dist.all_reduce(buffer)
    return buffer.to(tensor.device)


def maximum_over_ranks(value: int) -> int:
    """The largest of all ranks' values."""
    return int(gather_from_all_ranks(torch.tensor([value])).max())


def gather_json(value: Any) -> list[Any]:
    """Every rank's value, which must be JSON-serializable, in the order of the ranks."""
    if not is_distributed():
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = gather_from_all_ranks(torch.tensor([content.numel()])).tolist()
    padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
    padded[0, : content.numel()] = content
    rows = gather_from_all_ranks(padded).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def from_first_rank(make: Callable[[], bytes]) -> bytes:
    """
    What `make` gives, which runs on the first rank only, as if that were the only process; all ranks must call this.

    The others wait for as long as it takes, in a group of their own, since the timeout of the default group ends a run.

    Raises:
        Exception: What `make` raises, on the first rank.
        ValueError: The same in words, on the others.
    """
    if not is_distributed():
        return make()
    group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=_PATIENCE)
    if isinstance(group, int):  # what a process gets that is no member, and all are
        raise RuntimeError("torch.distributed gave this process no part in a group of all processes.")
    content, failure = b"", None
    if dist.get_rank() == 0:
        try:
            with _alone():
                content = make()
        except Exception as error:  # whatever it is, the others must be told
            content, failure = f"{type(error).__name__}: {error}".encode(), error
    device = torch.device("cpu") if dist.is_gloo_available() else _communication_device()
    extent = torch.tensor([len(content), failure is not None], device=device)
    dist.broadcast(extent, src=0, group=group)
    length, failed = extent.tolist()
    received = torch.empty(length, dtype=torch.uint8)
    if content:
        received = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    received = received.to(device)
    dist.broadcast(received, src=0, group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    text = received.cpu().numpy().tobytes()
    if failed:
        raise ValueError(f"On the first rank: {text.decode()}")
    return text


@contextmanager
def _alone() -> Iterator[None]:
    """Let the functions here take this process for the only one."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def _buffer(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_communication_device()).contiguous()


def _communication_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if dist.get_backend() == "gloo" or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
