"""The parametrization that turns PEFT's two LoRA weights into SaLoRA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Side = Literal["output", "input"]


def project_out(matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
    """
    Remove a subspace from a factor: (I - U U^T) M on the output side, M (I - V V^T) on the input side, without
    forming the d x d projector (SaLoRA, section 4.1; the input side goes beyond the paper).

    Args:
        matrix: (d, k) for the output side, (k, d) for the input side.
        basis: (d, r) with orthonormal columns, of the matrix's dtype.
        side: Which side of the matrix the basis spans.

    Returns:
        The projected matrix, of the shape and dtype of `matrix`.
    """
    if side == "output":
        return matrix - basis @ (basis.T @ matrix)
    return matrix - (matrix @ basis) @ basis.T


class SafeFactor(nn.Module):
    """
    Computes a LoRA weight from the trained factor, as a parametrization of `lora_A.weight` or `lora_B.weight`.

    - side "input", for lora_A: [A; A_0] (I - V_C V_C^T), shape (2r, d_in)
    - side "output", for lora_B: (I - U_C U_C^T) [B, -B_0], shape (d_out, 2r)

    The frozen start factor enters both halves by the same operations and in the same dtype, so that the halves
    cancel exactly as long as the factor has not been trained. Basis and start factor are plain attributes and not
    buffers: they never change, so they need not be saved with the model's state, cast with the adapter or
    broadcast by DistributedDataParallel in every step.

    Args:
        side: "input" for lora_A, "output" for lora_B.
        basis: (d, r_s) float32 with orthonormal columns, or None for no projection on this side.
        offset: The start factor, A_0 (r, d_in) or B_0 (d_out, r); None where the factor starts at a zero update.
    """

    basis: Tensor | None
    """(d, r_s), float32: what the factor must stay orthogonal to."""

    offset: Tensor | None
    """A_0 or B_0, float32, of the factor's shape."""

    def __init__(self, side: Side, basis: Tensor | None, offset: Tensor | None) -> None:
        super().__init__()
        self.side = side
        self.basis = basis
        self.offset = offset

    def forward(self, factor: Tensor) -> Tensor:
        self._follow(factor.device)
        stacked = self._stack(factor, self.offset)
        if self.basis is None:
            return stacked
        # Autocast would run the projection in bf16 and let three digits of the safety directions through.
        with torch.autocast(device_type=factor.device.type, enabled=False):
            return project_out(stacked.float(), self.basis, self.side).to(factor.dtype)

    @torch.no_grad()
    def exact(self, factor: Tensor) -> Tensor:
        """
        The same weight in float32, projected in float64: what is saved.

        Rounding of the training dtype, TF32 and autocast are kept out of the certificate this way.
        """
        stacked = self._stack(factor.detach(), self.offset).cpu()
        if self.basis is not None:
            stacked = project_out(stacked.double(), self.basis.cpu().double(), self.side)
        return stacked.float().contiguous()

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of `forward` on what was saved: the trained factor and the start factor."""
        if self.offset is None:
            return weight, None
        if self.side == "input":
            trained, start = weight.chunk(2, dim=0)
            return trained.contiguous(), start.float().contiguous()
        trained, start = weight.chunk(2, dim=1)
        return trained.contiguous(), -start.float().contiguous()

    def _stack(self, factor: Tensor, offset: Tensor | None) -> Tensor:
        if offset is None:
            return factor
        offset = offset.to(device=factor.device, dtype=factor.dtype)
        return torch.cat([factor, offset], dim=0) if self.side == "input" else torch.cat([factor, -offset], dim=1)

    def _follow(self, device: torch.device) -> None:
        """Dispatching a model over devices moves parameters only; move along once."""
        if self.basis is not None and self.basis.device != device:
            self.basis = self.basis.to(device)
        if self.offset is not None and self.offset.device != device:
            self.offset = self.offset.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SafeFactor:
        """Follow `.to(device)`, but stay float32: a basis in bf16 is not orthonormal any more."""
        super()._apply(fn, recurse)
        for name in ("basis", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:
                device = fn(tensor.new_empty(0)).device
                if device.type != "meta":
                    setattr(self, name, tensor.to(device))
        return self

    def extra_repr(self) -> str:
        basis = None if self.basis is None else tuple(self.basis.shape)
        return f"side={self.side}, basis={basis}, offset={self.offset is not None}"


def safe_factor(linear: nn.Module) -> SafeFactor | None:
    """The `SafeFactor` of a lora_A or lora_B layer, or None where it is a plain LoRA weight."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    module = linear.parametrizations.weight[0]
    return module if isinstance(module, SafeFactor) else None


def trained_factor(linear: nn.Module) -> nn.Parameter:
    """The trainable parameter behind a parametrized lora_A or lora_B weight."""
    return linear.parametrizations.weight.original
