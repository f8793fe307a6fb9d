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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..parametrization import (
    FORWARD_PASS,
    NO_PASS,
    PassWeight,
    RunningPass,
    SafeFactor,
    StartFactor,
    graph_task,
    safe_factor,
    stacked_halves,
    weight_holder,
)
from ..ranks import Side
from .basis_stack import BasisStack, stacked

_Kind = tuple[torch.Size, torch.dtype, torch.device, bool]


class ForwardScope:
    """
    Knows whether one of a model's entry points is running: its methods are their hooks.

    Only one thread at a time has a pass here. In others that run the model meanwhile, a layer takes the weight that the
    pass has computed, where gradients are enabled as they are in it, or computes its own.
    """

    def __init__(self) -> None:
        self.batches: dict[str, FactorBatch] = {}
        """Of every adapter."""
        self.running: list[int] = []
        """The ids of the entry points that are running, the outermost first."""
        self.thread = 0
        """Where they run."""
        self.passes = 0
        self.with_gradients = False
        """Whether the pass that runs was entered with gradients, so that a backward pass may follow."""

    def is_here(self) -> bool:
        """Whether an entry point is running in this thread."""
        return bool(self.running) and self.thread == get_ident()

    def watch(self, entry: nn.Module) -> list[RemovableHandle]:
        """Call `enter` and `leave` around every forward pass of a module, also where it fails."""
        return [
            entry.register_forward_pre_hook(self.enter),
            entry.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or (self.running and self.thread != get_ident()):
            return
        if id(module) in self.running:
            self.running.clear()  # a pass that Ctrl-C ended, of which hooks hear nothing
            for batch in self.batches.values():
                batch.close()
        if not self.running:
            self.passes += 1
            self.thread = get_ident()
            self.with_gradients = torch.is_grad_enabled()
        self.running.append(id(module))

    def leave(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or self.thread != get_ident() or id(module) not in self.running:
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
        self._linears: list[weakref.ref[Any]] = [weakref.ref(linear) for linear in linears]
        self._holders: list[weakref.ref[Any]] = [weakref.ref(weight_holder(linear)) for linear in linears]
        self._no_weights: list[Tensor | None] = [None] * len(linears)  # no empty list: another thread may look
        self._groups: list[_Group] = []
        self._grouped: list[tuple[Tensor, int, torch.dtype, bool]] = []
        """The factors as they were grouped, and what tells whether they are still so."""
        self._running = RunningPass()
        self._prefetches: RemovableHandle | None = None
        self.scope = scope
        self.weights: dict[bool, _Weights] = {}
        scope.batches[adapter_name] = self
        for index, linear in enumerate(linears):
            factor = safe_factor(linear)
            factor.batch, factor.index = self, index

    @property
    def in_forward(self) -> bool:
        """Whether a forward pass of the model is running."""
        return self.scope.is_here()

    def factors(self) -> list[SafeFactor]:
        """The factors that are still there."""
        holders = [reference() for reference in self._holders]
        return [holder[0] for holder in holders if holder is not None]

    def weight_of(self, index: int, factor: Tensor) -> Tensor | None:
        """
        The weight of a factor, where it may be taken from those that were computed together.

        Args:
            index: Of the factor.
            factor: The trained factor, as the parametrization was given it.
        """
        grad, task = torch.is_grad_enabled(), graph_task()
        if task != FORWARD_PASS:
            found = self.weights.get(True) if grad else None
            if found is None:
                return None
            if self._running.number != task:
                self._run(found, task)
            if not found.used[index]:
                return None
        elif not self.scope.is_here():
            return None
        else:
            found = self.weights.get(grad)
            if found is None or found.forward_pass != self.scope.passes:
                self._stop()
                self.weights.pop(grad, None)  # the memory of the last pass, before that of this one
                if self.scope.with_gradients:
                    self._forget_earlier_pass()
                found = self.weights[grad] = self._compute()
                self._run(found, task)
        if found.weights[index] is None or found.factors[index] is not factor:
            return None
        if found.versions[index] != factor._version:
            return None
        found.used[index] = True
        return found.weights[index]

    def _forget_earlier_pass(self) -> None:
        """
        Reentrant checkpointing takes no weights with gradients, and its backward pass is not to find those of a pass
        before: the factors' counts of writes do not tell them, since fused optimizers write uncounted.
        """
        found = self.weights.get(True)
        if found is not None and found.forward_pass != self.scope.passes:
            del self.weights[True]

    def _run(self, found: _Weights, number: int) -> None:
        """Let the layers find these weights at once in a pass."""
        running = self._running
        running.grad, running.weights = torch.is_grad_enabled(), found.weights
        running.factors, running.versions, running.used = found.factors, found.versions, found.used
        running.number = number  # by which other threads see that the rest is there

    def _stop(self) -> None:
        """Let the layers' weights be computed again."""
        self._running.number, self._running.weights = NO_PASS, self._no_weights

    def _compute(self) -> _Weights:
        count = len(self._holders)
        if not self._as_grouped():
            factors = self._trained_factors()
            if factors is None:
                nothing: list[Any] = [None] * count
                return _Weights(self.scope.passes, nothing, nothing, nothing, [], [False] * count)
            self.regroup()  # the stacks of the last grouping, before those of this one
            self._groups = _grouped(self.factors(), factors, self.scope)
            self._grouped = [(f, f.data_ptr(), f.dtype, f.requires_grad) for f in factors]
            self._place()
            self._watch_middle()
        factors = [factor for factor, *_ in self._grouped]
        weights: list[Tensor | None] = [None] * count
        of_groups = []
        for group in self._groups:
            results = _Together.apply(group, *[factors[i] for i in group.indices])
            for i, weight in zip(group.indices, results, strict=True):
                weights[i] = weight
            of_groups.append(results[0])
            if group.stack is not None and torch.is_grad_enabled():
                group.stack.release()
        return _Weights(self.scope.passes, factors, [f._version for f in factors], weights, of_groups, [False] * count)

    def regroup(self) -> None:
        """A factor has another basis or start, is another tensor, or is looked at by a hook."""
        self._stop()
        self._groups, self._grouped = [], []

    def _as_grouped(self) -> bool:
        """Whether the trained factors are what and where they were when they were grouped."""
        if not self._grouped or peek_interpreter_stack() is not None:  # torch.func
            return False
        for reference, (factor, pointer, dtype, requires_grad) in zip(self._holders, self._grouped, strict=True):
            holder = reference()
            # Spelled out: this is asked of every factor in every pass.
            if (
                holder is None
                or type(parameters := holder._parameters) is not dict
                or parameters["original"] is not factor
                or factor.data_ptr() != pointer
                or factor.dtype is not dtype
                or factor.requires_grad is not requires_grad
                or holder._forward_hooks
                or holder._forward_pre_hooks
                or "1" in holder._modules
            ):
                return False
        return True

    def _place(self) -> None:
        """Tell the layers where they find their weights, unless somebody else has a part in what these are."""
        for index, (of_linear, of_holder) in enumerate(zip(self._linears, self._holders, strict=True)):
            linear, holder = of_linear(), of_holder()
            if linear is None or holder is None:
                continue
            # A wrapper, another parametrization, or hooks.
            alone = type(holder) is parametrize.ParametrizationList and len(holder) == 1
            alone = alone and not any(m._forward_hooks or m._forward_pre_hooks for m in (holder, holder[0]))
            vars(linear)["_pass_weight"] = PassWeight(self._running, index, id(linear)) if alone else None

    def _watch_middle(self) -> None:
        """Where bases are on the host, let the backward pass fetch them when it has half of the layers behind it."""
        if self._prefetches is not None:
            self._prefetches.remove()
            self._prefetches = None
        middle = self._linears[len(self._linears) // 2]()
        if middle is not None and any(group.stack is not None and group.stack.streamed for group in self._groups):
            self._prefetches = middle.register_forward_hook(self._at_middle)

    def _at_middle(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not torch.compiler.is_compiling() and output.requires_grad:
            output.register_hook(self._prefetch)

    def _prefetch(self, gradient: Tensor) -> None:
        for group in self._groups:
            if group.stack is not None and group.stack.streamed:
                group.stack.prefetch()

    def close(self) -> None:
        """
        At the end of a forward pass.

        Raises:
            RuntimeError: A weight was written to within it, which the factors do not hear of.
        """
        self._stop()
        for found in list(self.weights.values()):
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
        result.weights, result._prefetches, result._running = {}, None, RunningPass()
        result._no_weights = self._no_weights
        result.regroup()
        result._linears, result._holders = (_copied(references, memo) for references in (self._linears, self._holders))
        result.scope = copy.deepcopy(self.scope, memo)
        return result


def _copied(references: list[weakref.ref[Any]], memo: dict[int, Any]) -> list[weakref.ref[Any]]:
    """References to the copies; one to what is gone stays one to nothing."""
    modules = [reference() for reference in references]
    return [
        reference if module is None else weakref.ref(copy.deepcopy(module, memo))
        for reference, module in zip(references, modules, strict=True)
    ]


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
    stack: BasisStack | None
    """The same as one tensor; None where they are parts of other groups' stacks, too."""

    def __post_init__(self) -> None:
        self._sharing = len(self.indices) // max(1, len(self.bases))  # how many factors share a basis

    def weights(self, factors: tuple[Tensor, ...]) -> Tensor:
        """(n, ...): what `SafeFactor.compute` computes of every factor."""
        stacked = torch.stack(factors)
        if not self.starts:
            return self.projected(stacked.float()).to(stacked.dtype)
        offset = torch.stack([start.value.to(stacked.device) for start in self.starts])
        halves = stacked_halves(stacked.float(), offset, self.side, stacked.dtype)
        return self.projected(halves).to(stacked.dtype)

    def gradients(self, gradients: list[Tensor]) -> Tensor:
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
        if self.stack is None:
            bases = torch.stack([basis.to(stacked.device, non_blocking=True) for basis in self.bases])
        else:
            bases = self.stack.on_device()
        if self.side == "output":
            return torch.baddbmm(stacked, bases, torch.bmm(bases.mT, stacked), alpha=-1)
        rows = stacked if self._sharing == 1 else stacked.reshape(len(self.bases), -1, stacked.shape[2])
        rows = torch.baddbmm(rows, torch.bmm(rows, bases), bases.mT, alpha=-1)
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
        unused = [i for i, gradient in enumerate(gradients) if gradient is None]
        given = [gradient for gradient in gradients if gradient is not None]
        for i in unused:
            given.insert(i, torch.zeros_like(given[0]))
        if ctx.group.stack is not None:
            ctx.group.stack.used_in_backward()
        with torch.autocast(given[0].device.type, enabled=False):
            results: list[Tensor | None] = list(ctx.group.gradients(given).unbind())
        for i in unused:
            results[i] = None
        return None, *results


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
        stack = None
        if width:
            bases = _bases(safe_factors[i] for i in indices[::sharing])
            stack = stacked(bases, kind[2])
            for old, new in zip(bases, bases if stack is None else stack.slices, strict=True):
                if new is not old:
                    scope.replace_basis(old, new)
        of_bases = _bases(safe_factors[i] for i in indices[::sharing]) if width else []
        groups.append(_Group(side, indices, kind, starts, of_bases, stack))
    return groups


def _bases(safe_factors: Iterable[SafeFactor]) -> list[Tensor]:
    """Of a group, in which all have one."""
    return [factor._basis for factor in safe_factors if factor._basis is not None]
