"""
The effective weights of a forward pass, computed together.

What a parametrized weight costs on a GPU is the number of operations, not their size. Within a forward pass of the
model the first weight that is asked for computes those of all layers, a few operations for each shape of factor, and
every layer takes its slice. The parametrization stays what a weight means: outside of a forward pass, in compiled code
and for factors that are sharded or elsewhere every layer computes its own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils.weak import WeakIdKeyDictionary

from ..parametrization import SafeFactor, StartFactor, in_backward, safe_factor, stacked_halves, weight_holder
from ..ranks import Side

_Kind = tuple[torch.Size, torch.dtype, torch.device, bool]

# Bases that are slices of a stack already.
_slices = WeakIdKeyDictionary()


class ForwardScope:
    """Knows whether one of a model's entry points is running: its methods are their hooks."""

    def __init__(self) -> None:
        self.batches: dict[str, FactorBatch] = {}
        """Of every adapter."""
        self.running: list[int] = []
        """The ids of the entry points that are running, the outermost first."""
        self.passes = 0

    def watch(self, entry: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Call `enter` and `leave` around every forward pass of a module, also where it fails."""
        return [
            entry.register_forward_pre_hook(self.enter),
            entry.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if id(module) in self.running:
            self.running.clear()  # a pass that Ctrl-C ended, of which hooks hear nothing
        if not self.running:
            self.passes += 1
        self.running.append(id(module))

    def leave(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in self.running:
            return
        del self.running[self.running.index(id(module)) :]
        if not self.running:
            for batch in self.batches.values():
                batch.close()

    def replace_basis(self, old: Tensor, new: Tensor) -> None:
        """Let all factors that share a basis share its copy in a stack, so that the memory of the old one is free."""
        for batch in self.batches.values():
            for factor in batch.factors():
                factor.share_basis(old, new)


@dataclass
class _Weights:
    """What was computed for one forward pass. Lists are in the order of the batch's factors."""

    forward_pass: int
    factors: list[Tensor]
    versions: list[int]
    weights: list[Tensor | None]
    of_groups: list[Tensor]
    """One weight of every group: all of a group share a count of writes."""
    used: list[bool]


class FactorBatch:
    """
    The factors of one adapter.

    Weights with gradients are kept until the next pass: checkpointed layers that are recomputed in the backward pass
    must take the very weights of the forward pass. Reentrant checkpointing runs its layers without gradients first, so
    that they were not handed out, and computes its own then.

    Args:
        adapter_name: The adapter.
        linears: Its parametrized lora_A and lora_B layers.
        scope: Of the model that they are part of.
    """

    def __init__(self, adapter_name: str, linears: Sequence[nn.Module], scope: ForwardScope) -> None:
        # Weak: the factors refer to this object.
        self._holders: list[weakref.ref[Any]] = [weakref.ref(weight_holder(linear)) for linear in linears]
        self._groups: list[_Group] = []
        self.scope = scope
        self.weights: dict[bool, _Weights] = {}
        scope.batches[adapter_name] = self
        for index, linear in enumerate(linears):
            factor = safe_factor(linear)
            factor.batch, factor.index = self, index

    @property
    def in_forward(self) -> bool:
        """Whether a forward pass of the model is running."""
        return bool(self.scope.running)

    def factors(self) -> Iterator[SafeFactor]:
        """The factors that are still there."""
        for reference in self._holders:
            holder = reference()
            if holder is not None:
                yield holder._modules["0"]  # as holder[0], in a tenth of the calls

    def weight_of(self, index: int, factor: Tensor) -> Tensor | None:
        """
        The weight of a factor, where it may be taken from those that were computed together.

        Args:
            index: Of the factor.
            factor: The trained factor, as the parametrization was given it.
        """
        grad = torch.is_grad_enabled()
        if in_backward():
            found = self.weights.get(True) if grad else None
            if found is None or not found.used[index]:
                return None
        elif not self.scope.running:
            return None
        else:
            found = self.weights.get(grad)
            if found is None or found.forward_pass != self.scope.passes:
                self.weights.pop(grad, None)  # the memory of the last pass, before that of this one
                found = self.weights[grad] = self._compute()
        if found.factors[index] is not factor or found.versions[index] != factor._version:
            return None
        found.used[index] = True
        return found.weights[index]

    def _compute(self) -> _Weights:
        count = len(self._holders)
        factors = self._trained_factors()
        if factors is None:
            nothing: list[Any] = [None] * count
            return _Weights(self.scope.passes, nothing, nothing, nothing, [], [False] * count)
        safe_factors = list(self.factors())
        if not self._groups or not all(group.fits(safe_factors, factors) for group in self._groups):
            self._groups = []  # the stacks of the last grouping, before those of this one
            self._groups = _grouped(safe_factors, factors, self.scope)
        weights: list[Tensor | None] = [None] * count
        of_groups = []
        for group in self._groups:
            results = _Together.apply(group, *(factors[i] for i in group.indices))
            for i, weight in zip(group.indices, results, strict=True):
                weights[i] = weight
            of_groups.append(results[0])
        return _Weights(self.scope.passes, factors, [f._version for f in factors], weights, of_groups, [False] * count)

    def close(self) -> None:
        """
        At the end of a forward pass.

        Raises:
            RuntimeError: A weight was written to within it, which the factors do not hear of.
        """
        for found in self.weights.values():
            if any(not weight.is_inference() and weight._version for weight in found.of_groups):
                self.weights.clear()
                raise RuntimeError(
                    "A LoRA weight was written to in place within a forward pass, where it is computed and the change "
                    "would be lost. Write to it outside of the forward pass, or to the trained factor, "
                    "lora_A[...].parametrizations.weight.original."
                )
        self.weights.pop(False, None)

    def _trained_factors(self) -> list[Tensor] | None:
        """The trained factors; None where one is sharded, offloaded, or not an ordinary tensor now."""
        if peek_interpreter_stack() is not None:  # torch.func
            return None
        factors: list[Tensor] = []
        for reference in self._holders:
            holder = reference()
            # DeepSpeed's ZeRO-3 puts a dictionary of its own there, which gathers what it is asked for.
            if holder is None or type(holder._parameters) is not dict:
                return None
            factor = holder._parameters["original"]
            # The shards of FSDP1 have one dimension.
            if type(factor) not in (Tensor, nn.Parameter) or factor.is_meta or factor.dim() != 2 or not factor.numel():
                return None
            factors.append(factor)
        return factors

    def __reduce_ex__(self, protocol: Any) -> Any:
        """
        Raises:
            TypeError: Always. torch does not pickle parametrized modules either, and nothing here reads a pickle.
        """
        raise TypeError(
            "A model with a SaLoRA adapter in training cannot be pickled as a whole, as torch.save(model) does. Save "
            "model.state_dict(), or the adapter with model.save_pretrained(folder)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorBatch:
        result = memo[id(self)] = object.__new__(FactorBatch)
        result._groups, result.weights = [], {}
        holders = [reference() for reference in self._holders]
        # One that is gone stays a reference to nothing.
        result._holders = [
            reference if holder is None else weakref.ref(copy.deepcopy(holder, memo))
            for reference, holder in zip(self._holders, holders, strict=True)
        ]
        result.scope = copy.deepcopy(self.scope, memo)
        return result


@dataclass
class _Group:
    """Factors that one pair of batched products projects."""

    side: Side
    indices: list[int]
    """Of the factors; those that share a basis follow one another."""
    kind: _Kind
    starts: list[StartFactor]
    """Of every factor; empty where they start at a zero update."""
    bases: list[Tensor]
    """Every basis once; empty where there is no projection."""
    stack: Tensor | None
    """The same as one tensor, (m, d, k)."""

    def __post_init__(self) -> None:
        self._sharing = len(self.indices) // max(1, len(self.bases))  # how many factors share a basis

    def fits(self, safe_factors: list[SafeFactor], factors: list[Tensor]) -> bool:
        """Whether everything is still where and what it was when the factors were grouped."""
        for slot, i in enumerate(self.indices):
            factor = safe_factors[i]
            if (
                _kind(factors[i]) != self.kind
                or (self.bases and factor._basis is not self.bases[slot // self._sharing])
                or factor.start is not (self.starts[slot] if self.starts else None)
            ):
                return False
        return True

    def weights(self, factors: tuple[Tensor, ...]) -> Tensor:
        """(n, ...): what `SafeFactor.compute` computes of every factor."""
        stacked = torch.stack(factors)
        if not self.starts:
            return self.projected(stacked.float()).to(stacked.dtype)
        offset = torch.stack([start.value.to(stacked.device) for start in self.starts])
        halves = stacked_halves(stacked.float(), offset, self.side, stacked.dtype)
        return self.projected(halves).to(stacked.dtype)

    def gradients(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """(n, ...): the gradients of the trained factors, of those of the weights: the projection is symmetric."""
        stacked = torch.stack(gradients)
        dtype = stacked.dtype
        if self.starts:
            first, second = stacked.float().chunk(2, dim=1 if self.side == "input" else 2)
            stacked = first if self.side == "input" else first + second
        return self.projected(stacked.float()).to(dtype)

    def projected(self, stacked: Tensor) -> Tensor:
        """`project_out` of all at once; stacked is (n, k, d_in) for the input side and (n, d_out, k) for the output."""
        if not self.bases:
            return stacked
        bases = torch.stack(self.bases) if self.stack is None else self.stack
        if self.side == "output":
            return torch.baddbmm(stacked, bases, bases.mT @ stacked, alpha=-1)
        rows = stacked if self._sharing == 1 else stacked.reshape(len(self.bases), -1, stacked.shape[2])
        rows = torch.baddbmm(rows, rows @ bases, bases.mT, alpha=-1)
        return rows.view(stacked.shape)


class _Together(torch.autograd.Function):
    """A group's weights. Nothing is saved for the backward pass, and a weight that was not used gets no gradient."""

    @staticmethod
    def forward(ctx: Any, group: _Group, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        with torch.autocast(factors[0].device.type, enabled=False):
            return group.weights(factors).unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        some = next(gradient for gradient in gradients if gradient is not None)
        given = tuple(torch.zeros_like(some) if gradient is None else gradient for gradient in gradients)
        with torch.autocast(some.device.type, enabled=False):
            results = ctx.group.gradients(given).unbind()
        return None, *(r if g is not None else None for g, r in zip(gradients, results, strict=True))


def _kind(factor: Tensor) -> _Kind:
    return factor.shape, factor.dtype, factor.device, factor.requires_grad


def _grouped(safe_factors: list[SafeFactor], factors: list[Tensor], scope: ForwardScope) -> list[_Group]:
    """Groups of one side, kind, size of basis and number of factors that share one; without plain parameters."""
    same: dict[Any, list[int]] = {}
    for i, (safe, factor) in enumerate(zip(safe_factors, factors, strict=True)):
        safe.follow(factor.device)
        if safe.start is None and safe._basis is None:
            continue
        # On the output side every layer has a basis of its own.
        basis = i if safe._basis is None or safe.side == "output" else id(safe._basis)
        width = 0 if safe._basis is None else safe._basis.shape[1]
        same.setdefault((safe.side, _kind(factor), width, safe.start is None, basis), []).append(i)
    members: dict[Any, list[int]] = {}
    for (*kind, _), indices in same.items():
        members.setdefault((*kind, len(indices)), []).extend(indices)
    groups = []
    for (side, kind, width, _, sharing), indices in members.items():
        starts = [start for i in indices if (start := safe_factors[i].start) is not None]
        of_bases = [safe_factors[i] for i in indices[::sharing]] if width else []
        stack = _stack_in_place(_bases(of_bases), scope) if width else None
        groups.append(_Group(side, indices, kind, starts, _bases(of_bases), stack))
    return groups


def _bases(safe_factors: list[SafeFactor]) -> list[Tensor]:
    """Of a group, in which all have one."""
    return [factor._basis for factor in safe_factors if factor._basis is not None]


def _stack_in_place(bases: list[Tensor], scope: ForwardScope) -> Tensor | None:
    """
    The bases as one tensor (m, d, k) that holds the memory of them all; None where they are slices of other stacks.

    Bases are most of the memory of an adapter, so that there must not be a second copy.
    """
    first, size = bases[0], bases[0].numel()
    if all(
        basis.is_contiguous()
        and basis.untyped_storage()._cdata == first.untyped_storage()._cdata
        and basis.storage_offset() == first.storage_offset() + i * size
        for i, basis in enumerate(bases)
    ):
        return first.as_strided((len(bases), *first.shape), (size, first.shape[1], 1))
    if any(basis in _slices for basis in bases):
        return None
    stack = torch.stack(bases)
    for old, new in zip(bases, stack.unbind(), strict=True):
        _slices[new] = True
        scope.replace_basis(old, new)
    return stack
