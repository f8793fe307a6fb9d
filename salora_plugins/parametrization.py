"""The parametrization that turns PEFT's two LoRA weights into SaLoRA's."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from .ranks import Side

# A basis is recognized by what it keeps of this many fixed vectors.
_PROBES = 4
# What bases of the same subspace may differ in: decompositions of other devices and library versions.
_SAME_SUBSPACE = 1e-2


def project_out(matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
    """
    Remove a subspace from a factor: (I - U U^T) M on the output side, M (I - V V^T) on the input side, without
    forming the d x d projector (the paper, section 4.1; the input side goes beyond the paper).

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


LORA_FACTORS: dict[Side, str] = {"input": "lora_A", "output": "lora_B"}
"""Side -> PEFT's name of the factor that is kept out of its directions: A reads the inputs, B writes the outputs."""


def stacked_halves(factor: Tensor, offset: Tensor | None, side: Side, dtype: torch.dtype) -> Tensor:
    """
    [A - A_0; A_0] or [B, B - B_0], in the dtype of `factor`; also of several factors, stacked.

    Args:
        factor: A (..., r, d_in) or B (..., d_out, r), in the dtype to compute in.
        offset: The start factor of the same shape; None where there is none, for the factor itself.
        side: "input" for A, "output" for B.
        dtype: Of the trained factor; the start factor is rounded to it first, so that they are equal at the start.
    """
    if offset is None:
        return factor
    offset = offset.to(device=factor.device, dtype=dtype).to(factor.dtype)
    if side == "input":
        return torch.cat([factor - offset, offset], dim=-2)
    return torch.cat([factor, factor - offset], dim=-1)


graph_task = torch._C._current_graph_task_id
"""The number of the backward pass that is running, another for each; -1 where none is."""


def in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass is a recomputation."""
    return graph_task() != -1


NO_PASS, FORWARD_PASS = -2, -1
"""Numbers of a `RunningPass`; that of a backward pass is what `graph_task` tells."""


@dataclass
class RunningPass:
    """The weights of all layers as they are during one pass. Lists are in one order of the factors."""

    number: int = NO_PASS
    grad: bool = False
    """Whether gradients were enabled when the weights were computed."""
    weights: list[Tensor | None] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    """The trained factors that the weights are of."""
    versions: list[int] = field(default_factory=list)
    """The factors' counts of writes then."""
    used: list[bool] = field(default_factory=list)
    """Whether the forward pass took a weight: only then a backward pass recomputes with it."""


class PassWeight:
    """
    Where a layer finds its weight during a pass. It lies in the layer, since reading it is to take about as long as
    reading a parameter: on a small model all else of a step hardly takes longer.

    Args:
        running: The weights of the pass that runs.
        index: Of this layer's.
        owner: The layer's `id`: a replica of nn.DataParallel has all that lies in the layer, but no weight.
    """

    __slots__ = ("index", "owner", "running")

    def __init__(self, running: RunningPass, index: int, owner: int) -> None:
        self.running, self.index, self.owner = running, index, owner

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the copy of the layer gets its own in its first pass


class WeightSource(Protocol):
    """Computes the weights of several factors at once; see `tuning.batched_factors`."""

    @property
    def in_forward(self) -> bool:
        """Whether a forward pass of the model is running."""

    def weight_of(self, index: int, factor: Tensor) -> Tensor | None:
        """The weight of a factor, by its index; None where it has to be computed alone."""

    def regroup(self) -> None:
        """A factor has another basis, or hooks."""


class SafeFactor(nn.Module):
    """
    Computes a LoRA weight from the trained factor, as a parametrization of `lora_A.weight` or `lora_B.weight`.

    - side "input", for lora_A: [A - A_0; A_0] (I - V_C V_C^T), shape (2r, d_in)
    - side "output", for lora_B: (I - U_C U_C^T) [B, B - B_0], shape (d_out, 2r)

    Their product is that of B (A - A_0) + (B - B_0) A_0 = B A - B_0 A_0, and the two differences are exact: the update
    is zero at the start, and a small one is no difference of large products, neither here nor in a file.

    The basis is a plain attribute and not a buffer, and so is the start factor in [`StartFactor`]: neither is cast with
    the adapter, or broadcast by DistributedDataParallel in every step. In a state dict there is the start factor, and
    what tells whether the factor was trained with this basis, so that loading computes the same or fails.

    Args:
        side: "input" for lora_A, "output" for lora_B.
        basis: (d, r_s) float32 with orthonormal columns, or None for no projection on this side.
        offset: The start factor, A_0 (r, d_in) or B_0 (d_out, r); None where the factor starts at a zero update.
    """

    awaits_task_data: bool
    """Whether the start factor is still to be restricted to the directions of a first training batch."""

    _basis: Tensor | None
    _trace: Tensor | None

    def __init__(self, side: Side, basis: Tensor | None, offset: Tensor | None) -> None:
        super().__init__()
        self.side = side
        self.batch: WeightSource | None = None
        self.index = 0
        self.basis = basis
        self.start = None if offset is None else StartFactor(offset)
        self.awaits_task_data = False
        self._registered = False

    @property
    def basis(self) -> Tensor | None:
        """(d, r_s), float32: what the factor must stay orthogonal to."""
        return self._basis

    @basis.setter
    def basis(self, value: Tensor | None) -> None:
        self._basis, self._trace = value, None
        self._tell_batch()

    def share_basis(self, old: Tensor, new: Tensor) -> None:
        """Take another tensor of the same numbers in the place of its basis, if that is `old`."""
        if self._basis is old:
            self._basis = new  # what tells bases apart, `_trace`, stays true
            self._tell_batch()

    def _tell_batch(self) -> None:
        if self.batch is not None:
            self.batch.regroup()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of any module; from then on this factor's weight is computed alone, so that the hook is called."""
        self._tell_batch()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of any module; from then on this factor's weight is computed alone, so that the hook is called."""
        self._tell_batch()
        return super().register_forward_pre_hook(*args, **kwargs)

    @property
    def offset(self) -> Tensor | None:
        """A_0 or B_0, float32, of the trained factor's shape."""
        return None if self.start is None else self.start.value

    @offset.setter
    def offset(self, value: Tensor) -> None:
        if self.start is None:
            raise AttributeError(f"{self.extra_repr()} starts at a zero update and has no start factor to be replaced.")
        self.start.value = value
        self._tell_batch()

    def forward(self, factor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.compute(factor)
        if self.batch is not None:
            weight = self.batch.weight_of(self.index, factor)
            if weight is not None:
                return weight
        if (self.batch is not None and self.batch.in_forward) or in_backward():
            return self.compute(factor)
        if torch.is_inference_mode_enabled():  # whose tensors count no writes
            with torch.inference_mode(False), torch.no_grad():
                weight = self.compute(factor)
        else:
            weight = self.compute(factor)
        if type(weight) is not Tensor or is_functorch_wrapped_tensor(weight):
            return weight
        return EffectiveWeight.of(weight, self, factor)

    def compute(self, factor: Tensor) -> Tensor:
        """The weight that PEFT's layers compute with, in the dtype of the trained factor and differentiable by it."""
        self.follow(factor.device)
        if self.start is None and self.basis is None:
            return factor
        basis = self.basis
        if basis is not None and basis.device != factor.device:
            basis = basis.to(factor.device, non_blocking=True)
        # Autocast would run the projection in bf16 and let three digits of the safety directions through.
        with torch.autocast(device_type=factor.device.type, enabled=False):
            stacked = stacked_halves(factor.float(), self.offset, self.side, factor.dtype)
            if basis is not None:
                stacked = project_out(stacked, basis, self.side)
            return stacked.to(factor.dtype)

    @torch.no_grad()
    def exact(self, factor: Tensor, offset: Tensor | None = None) -> Tensor:
        """
        The same weight in float32, computed in float64: what is saved.

        Rounding of the training dtype, TF32 and autocast are kept out of the certificate this way.

        Args:
            factor: The trained factor.
            offset: The start factor, where it is not this module's own.
        """
        dtype, factor = factor.dtype, factor.detach().cpu().double()
        offset = self.offset if offset is None else offset.detach()
        stacked = stacked_halves(factor, offset, self.side, dtype)
        if self.basis is not None:
            stacked = project_out(stacked, self.basis.cpu().double(), self.side)
        return stacked.float().contiguous()

    def take_over(self, weight: Tensor) -> Tensor:
        """
        The inverse of `exact`: the trained factor of an effective weight, whose start factor becomes this one's.

        The result is float32 where there is a start factor, and the weight itself where there is none.
        """
        if self.start is None:
            return weight
        if self.side == "input":
            difference, start = weight.float().chunk(2, dim=0)
            trained = difference + start
        else:
            trained, difference = weight.float().chunk(2, dim=1)
            start = trained - difference
        self.start.value = start.contiguous().to(self.start.value.device)
        return trained.contiguous()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """
        Take over a weight that is assigned to `lora_A.weight` or `lora_B.weight`; what is read afterwards is projected.

        Raises:
            ValueError: The weight has another shape than what is read there.
        """
        if self.start is None:
            return weight.detach().clone() if isinstance(weight, EffectiveWeight) else weight
        if not self._registered:  # torch asks for the inverse of the weight that it replaces by this module, too
            return weight
        rows, columns = self.start.value.shape
        expected = (2 * rows, columns) if self.side == "input" else (rows, 2 * columns)
        if weight.shape != expected:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} was assigned where {self.extra_repr()} computes one of shape "
                f"{expected}."
            )
        return self.take_over(weight.detach()).to(weight.dtype)

    @torch.inference_mode(False)  # the start factor that it may make is for training, too
    @torch.no_grad()
    def adopt(self, factor: Tensor, weight: Tensor) -> None:
        """
        Change the trained factor, and the start factor with it, such that `weight` is computed, but for its projection.

        Args:
            factor: The trained factor, changed in place.
            weight: What somebody wrote to the weight that was read.

        Raises:
            RuntimeError: The factor is sharded.
            ValueError: The weight has another shape than what is read.
        """
        if isinstance(factor, DTensor) or hasattr(factor, "ds_id"):
            raise RuntimeError(
                "A LoRA weight was written to while its factor is sharded over processes. Write to it before the model "
                "is given to FSDP or DeepSpeed."
            )
        current = self.compute(factor)
        if weight.shape != current.shape:
            raise ValueError(
                f"A LoRA weight of shape {tuple(current.shape)} was replaced by one of shape {tuple(weight.shape)}."
            )
        weight = weight.detach().to(current)
        if torch.equal(weight, current):
            return
        factor.copy_(self.take_over(weight))

    def get_extra_state(self) -> Tensor:
        """What a state dict tells of this side: a trace of the basis, and whether the start awaits its task data."""
        flag = torch.tensor([self.awaits_task_data], dtype=torch.uint8)
        # Bytes: no cast of a state dict to another floating-point type changes them.
        return torch.cat([flag, self._basis_trace().view(torch.uint8)])

    def set_extra_state(self, state: Tensor) -> None:
        self.awaits_task_data = bool(state[0])

    def check_state(self, state: Tensor, name: str) -> None:
        """
        Raises:
            ValueError: The factor of this state (of `get_extra_state`) was trained with another basis.
        """
        expected = self._basis_trace()
        found = state.detach().cpu().to(torch.uint8)[1:].clone().view(torch.float32)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=_SAME_SUBSPACE):
            raise ValueError(
                f"{name}: the factor was trained with another safety module than this model's, with which it computes "
                "something else. Create the adapter with the one that it was trained with, "
                "SaLoRAConfig(safety_module=...): save it beside the state dict, or keep the folder that "
                "save_pretrained writes."
            )

    def _basis_trace(self) -> Tensor:
        """W^T U U^T W of fixed vectors W, (16,) float32 on the CPU: the same for all bases of one subspace."""
        trace = self._trace
        if trace is None:
            if self.basis is None:
                trace = torch.zeros(_PROBES * _PROBES)
            else:
                basis = self.basis.cpu() if self.basis.device.type == "mps" else self.basis
                kept = basis.detach().double().T @ _probes(basis.shape[0]).to(basis.device)
                trace = (kept.T @ kept).flatten().float().cpu()
            self._trace = trace
        return trace

    def follow(self, device: torch.device) -> None:
        """Dispatching a model over devices moves parameters only; move along once, unless a `BasisStack` streams it."""
        if self._basis is not None and self._basis.device != device and not _streamed(self._basis, device):
            self._basis = moved_once(self._basis, device)
            self._tell_batch()
        if self.start is not None and self.start.value.device != device:
            self.start.value = self.start.value.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SafeFactor:
        """Follow `.to(device)`, but stay float32: a basis in bf16 is not orthonormal any more."""
        super()._apply(fn, recurse)
        if self.basis is not None:
            device = fn(self.basis.new_empty(0)).device
            if device.type != "meta" and not _streamed(self.basis, device):
                self.follow(device)
        return self

    def extra_repr(self) -> str:
        basis = None if self.basis is None else tuple(self.basis.shape)
        return f"side={self.side}, basis={basis}, offset={self.start is not None}"


def _streamed(basis: Tensor, device: torch.device) -> bool:
    """Whether a basis is in the host's page-locked memory, from where a GPU takes it (`tuning.basis_stack`)."""
    return basis.device.type == "cpu" and device.type in ("cpu", "cuda") and basis.is_pinned()


# Basis -> device -> its copy there, as long as both are in use.
_copies = WeakIdKeyDictionary()


def moved_once(basis: Tensor, device: torch.device) -> Tensor:
    """The copy of a basis on another device, one for all factors that share it: bases are most of the memory."""
    copies = _copies.setdefault(basis, {})
    copy_there = copies[device]() if device in copies else None
    if copy_there is None:
        copy_there = basis.to(device)
        copies[device] = weakref.ref(copy_there)
    return copy_there


class StartFactor(nn.Module):
    """
    Holds A_0 or B_0: float32, on the device of its adapter, and in the state dict under a key of its own.

    Args:
        value: The start factor, float32.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Tensor:
        return self.value

    def set_extra_state(self, state: Tensor) -> None:
        self.value = state.detach().to(device=self.value.device, dtype=torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StartFactor:
        super()._apply(fn, recurse)
        like = fn(self.value.new_empty(0))
        if like.device.type != "meta":
            # Rounded as the trained factor is, so that a cast is no update.
            rounded = self.value.to(like.dtype) if like.is_floating_point() else self.value
            self.value = rounded.to(device=like.device, dtype=torch.float32)
        return self


class EffectiveWeight(Tensor):
    """
    The computed weight of a LoRA layer as it is read outside of compiled code. It behaves as any tensor, and what is
    written to it in place, to a view of it or to its `.data`, reaches the trained factor at once
    ([`SafeFactor.adopt`]): PEFT's `reset_lora_parameters`, `torch.nn.init` and the like work as on a parameter.

    Results of operations are plain tensors, but for views of the weight.
    """

    _root: EffectiveWeight | None
    _safe_factor: SafeFactor
    _trained: Tensor

    @classmethod
    def of(cls, weight: Tensor, factor: SafeFactor, trained: Tensor) -> EffectiveWeight:
        """
        Args:
            weight: What `factor` computed.
            factor: The parametrization.
            trained: The trained factor.
        """
        result = weight.as_subclass(cls)
        # No reference to itself: it would keep the graph of every step until the garbage collector comes.
        result._root, result._safe_factor, result._trained = None, factor, trained
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            weights = [value for value in _flat((args, kwargs or {})) if isinstance(value, EffectiveWeight)]
            before = [_state(weight) for weight in weights]
            result = func(*args, **(kwargs or {}))
            for weight, state in zip(weights, before, strict=True):
                if _state(weight) != state:
                    weight._write_back()
            return _as_views_of(result, weights)

    def _write_back(self) -> None:
        root = self if self._root is None else self._root
        root._safe_factor.adopt(root._trained, root.detach().as_subclass(Tensor))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return copy.deepcopy(self.as_subclass(Tensor), memo)


def _flat(value: Any) -> list[Any]:
    """The values in nested arguments, as tensors come to an operation."""
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _flat(part)]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _flat(part)]
    return [value]


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes with every write: torch counts those in place, and `.data = ...` brings another storage."""
    return weight._version, weight.untyped_storage()._cdata


def _as_views_of(result: Any, weights: list[EffectiveWeight]) -> Any:
    """Hand on whose weight a view shows."""
    if isinstance(result, (list, tuple)) and not hasattr(result, "_fields"):
        return type(result)(_as_views_of(part, weights) for part in result)
    if type(result) is not Tensor or result.layout != torch.strided:
        return result
    for weight in weights:
        if result.untyped_storage()._cdata == weight.untyped_storage()._cdata:
            view = result.as_subclass(EffectiveWeight)
            view._root = weight if weight._root is None else weight._root
            view._safe_factor, view._trained = weight._safe_factor, weight._trained
            return view
    return result


def _probes(dimension: int) -> Tensor:
    """(dimension, 4) float64 numbers of about unit size without a pattern, the same everywhere."""
    rows, columns = torch.arange(1, dimension + 1, dtype=torch.float64), torch.arange(1, _PROBES + 1).double()
    return math.sqrt(2) * torch.cos(rows[:, None] ** 2 * columns.sqrt() * 0.6180339887498949)


class _SharedClass(type):
    """
    The class of all layers of a kind whose weight is computed. torch makes one for each layer, and hundreds of classes
    are more than Python remembers attributes of: a small model's step took 3 % longer.

    Where a layer's parametrization is removed, torch takes the property off its class, which the others still need, and
    gives the layer the base class.
    """

    def __delattr__(cls, name: str) -> None:
        if name != "weight" or name not in vars(cls):  # a class made of this one, as FSDP does, has none of its own
            super().__delattr__(name)


_shared_classes: dict[type, _SharedClass] = {}
"""The class of a layer -> that of such a layer whose weight is computed."""


def _shared_class(own_class: Any) -> Any:
    """That of all layers of a kind, for the class that torch made for one; that itself where they have a metaclass."""
    base = own_class.__base__
    if base in _shared_classes:
        return _shared_classes[base]
    shared: Any = own_class
    if type(base) is type:
        shared = _shared_classes[base] = _SharedClass(own_class.__name__, (base,), dict(vars(own_class)))
    shared.__setattr__ = _assign
    shared.weight = property(_weight, own_class.weight.fset)
    return shared


def register_safe_factor(linear: nn.Linear, factor: SafeFactor) -> None:
    """Let `factor` compute the weight of a lora_A or lora_B layer from here on."""
    # unsafe: the effective weight is wider than the trained one, which torch does not expect.
    parametrize.register_parametrization(linear, "weight", factor, unsafe=True)
    factor._registered = True
    vars(linear)["_pass_weight"] = None
    linear.__class__ = _shared_class(type(linear))
    linear.register_load_state_dict_pre_hook(_check_of_factors)
    weight_holder(linear).register_load_state_dict_pre_hook(_check_loaded)
    linear.out_features, linear.in_features = linear.weight.shape


def _weight(linear: Any) -> Tensor:
    """
    What reads the weight of a layer of such a class: within a pass it is at hand, and is taken without the calls of two
    modules that torch's parametrization makes. Spelled out, since on a small model every function that is called here
    counts.

    torch's own getter belongs to one layer, which it keeps alive and whose weight `parametrize.cached` would have it
    return for every layer of a shared class: no weight is kept there.
    """
    place: PassWeight | None = linear.__dict__["_pass_weight"]
    if place is not None and not _is_compiling():
        running = place.running
        number = running.number
        if (number == FORWARD_PASS or number == graph_task()) and running.grad is _is_grad_enabled():
            index = place.index
            found = running.weights[index]
            if (
                found is not None
                and place.owner == id(linear)
                and running.factors[index]._version == running.versions[index]
                and (number == FORWARD_PASS or running.used[index])
            ):
                running.used[index] = True
                return found
    if "weight" not in linear.parametrizations:  # it is being removed from this layer of a shared class
        raise AttributeError("weight")
    return linear.parametrizations["weight"]()


_is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled


def _assign(linear: nn.Module, name: str, value: Any) -> None:
    """Assign to a layer with a computed weight; torch itself takes tensors for the weight but not parameters."""
    if name == "weight" and isinstance(value, nn.Parameter):
        value = value.detach()
    nn.Module.__setattr__(linear, name, value)


def _check_loaded(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict with which this factor would compute something else than the one that was saved."""
    name, factor = prefix.removesuffix(".parametrizations.weight."), module[0]
    if f"{prefix}original" not in state_dict:
        return
    if factor.start is not None and f"{prefix}0.start._extra_state" not in state_dict:
        raise ValueError(
            f"{name}: the state dict holds the trained factor without its start factor (`..._extra_state`), which the "
            "adapter computes with, too. Load a whole state_dict(), or an adapter that save_pretrained wrote; "
            "named_parameters() is not enough with init='task' and 'pissa'."
        )
    if f"{prefix}0._extra_state" in state_dict:
        factor.check_state(state_dict[f"{prefix}0._extra_state"], name)
    else:
        warnings.warn(
            "The state dict does not tell which safety module its factors were trained with; with another than this "
            "model's they compute something else.",
            UserWarning,
            stacklevel=2,
        )


def _check_of_factors(linear: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the weight itself, of which torch tells nobody where it is asked with strict=False."""
    if f"{prefix}weight" in state_dict and has_safe_factor(linear):
        raise ValueError(
            f"{prefix}weight: the state dict is of a model with plain LoRA, and this one computes the weight from a "
            "trained factor, so that nothing would be loaded. A saved SaLoRA adapter is loaded with load_for_training "
            "or set_peft_model_state_dict; weights of plain LoRA cannot be trained on."
        )


def weight_holder(linear: nn.Module) -> Any:
    """
    torch's `ParametrizationList` of a parametrized lora_A or lora_B weight, or what wraps it: the trained factor is its
    `original`, and the `SafeFactor` its first item.
    """
    parametrizations: Any = linear.parametrizations
    return parametrizations.weight


def has_safe_factor(linear: nn.Module) -> bool:
    """Whether the weight of a lora_A or lora_B layer is computed by a `SafeFactor`, and not one of plain LoRA."""
    return parametrize.is_parametrized(linear, "weight") and isinstance(weight_holder(linear)[0], SafeFactor)


def safe_factor(linear: nn.Module) -> SafeFactor:
    """The `SafeFactor` of a lora_A or lora_B layer that has one."""
    return weight_holder(linear)[0]


def trained_factor(linear: nn.Module) -> nn.Parameter:
    """The trainable parameter behind a parametrized lora_A or lora_B weight."""
    return weight_holder(linear).original
