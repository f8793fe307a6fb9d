"""The little of torch.distributed that is needed to give every rank the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast_from_first_rank(tensors: Sequence[Tensor]) -> None:
    """Overwrite every tensor by the first rank's, in place; all ranks must call it with the same shapes."""
    if not is_distributed():
        return
    for tensor in tensors:
        buffer = tensor.detach().to(_communication_device())
        buffer = buffer.contiguous()
        dist.broadcast(buffer, src=0)
        tensor.data.copy_(buffer)


def gather_from_all_ranks(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, which must have one shape, along the first dimension."""
    if not is_distributed():
        return tensor
    buffer = tensor.detach().to(_communication_device()).contiguous()
    parts = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, buffer)
    return torch.cat(parts).to(tensor.device)


def _communication_device() -> torch.device:
    if dist.get_backend() == "gloo" or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
