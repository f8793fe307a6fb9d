"""The bases of several factors as one tensor, which a GPU holds only while it projects."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)

# Bases that are slices of a stack already.
_slices = WeakIdKeyDictionary()
_streams: dict[torch.device, torch.cuda.Stream] = {}


class BasisStack:
    """
    Bases (m, d, k) that are used on `device`, and where they are between their uses.

    Bases are most of an adapter's memory, and nothing needs them between the start of a forward pass and the end of its
    backward pass, where memory is scarce. A GPU's bases are kept in page-locked memory of the host: copied while the
    backward pass of the lower layers runs, used for its gradients and for the next step's weights, then dropped.

    Args:
        kept: The bases, on `device` or in page-locked memory.
        device: Where they are used.
        slices: Tensors that show them one by one.
    """

    def __init__(self, kept: Tensor, device: torch.device, slices: Sequence[Tensor]) -> None:
        self.kept, self.device, self.slices = kept, device, list(slices)
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._expects_backward = True

    @property
    def streamed(self) -> bool:
        """Whether the bases are on the host between their uses."""
        return self.kept.device != self.device

    @property
    def is_there(self) -> bool:
        """Whether the device has them now."""
        return self._copy is not None or not self.streamed

    def on_device(self) -> Tensor:
        """The bases, where they are used; waits for the copy in the stream that runs, not in Python."""
        if not self.streamed:
            return self.kept
        copy_there = self.prefetch()
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None
        return copy_there

    def prefetch(self) -> Tensor:
        """Begin to copy the bases to the device, beside what runs there, unless they are there."""
        if self._copy is not None:
            return self._copy
        with torch.cuda.device(self.device):
            stream = _streams.get(self.device) or _streams.setdefault(self.device, torch.cuda.Stream(self.device))
            copy_there = torch.empty_like(self.kept, device=self.device, pin_memory=False)
            stream.wait_stream(torch.cuda.current_stream(self.device))  # its memory may still be in use
            with torch.cuda.stream(stream):
                copy_there.copy_(self.kept, non_blocking=True)
                self._copied = stream.record_event()
            copy_there.record_stream(stream)
        self._copy = copy_there
        return copy_there

    def used_in_backward(self) -> None:
        """The next forward pass is probably that of a training step."""
        self._expects_backward = True

    def release(self) -> None:
        """After the weights of a pass with gradients: free the copy, unless no backward pass followed the last one."""
        if self._expects_backward:
            self._copy = self._copied = None
        self._expects_backward = False


def stacked(bases: Sequence[Tensor], device: torch.device) -> BasisStack | None:
    """
    Bases as a stack, whose slices are to take their place: there must not be a second copy of them.

    Args:
        bases: (d, k) each, of one shape, together on one device or on the host.
        device: Where they are used.

    Returns:
        None where they are slices of other stacks.
    """
    with torch.inference_mode(False):  # what is made in an evaluation is trained with, too
        return _stacked(bases, device)


def _stacked(bases: Sequence[Tensor], device: torch.device) -> BasisStack | None:
    first, size = bases[0], bases[0].numel()
    if device.type == "cuda" and not first.is_pinned() and (kept := _page_locked(len(bases), first)) is not None:
        for slot, basis in zip(kept, bases, strict=True):
            slot.copy_(basis)
        return _of(kept, device)
    if all(
        basis.is_contiguous()
        and basis.untyped_storage()._cdata == first.untyped_storage()._cdata
        and basis.storage_offset() == first.storage_offset() + i * size
        for i, basis in enumerate(bases)
    ):
        return BasisStack(first.as_strided((len(bases), *first.shape), (size, first.shape[1], 1)), device, bases)
    if any(basis in _slices for basis in bases):
        return None
    return _of(torch.stack([basis.to(device) for basis in bases]), device)


def _page_locked(count: int, like: Tensor) -> Tensor | None:
    """Room for so many tensors like one; None where there is none: the memory that a process may lock is limited."""
    try:
        return torch.empty((count, *like.shape), dtype=like.dtype, pin_memory=True)
    except RuntimeError as error:
        logger.info("The safety module's bases stay on the GPU: no page-locked memory for them (%s).", error)
        return None


def _of(kept: Tensor, device: torch.device) -> BasisStack:
    stack = BasisStack(kept, device, kept.unbind())
    for basis in stack.slices:
        _slices[basis] = True
    return stack
