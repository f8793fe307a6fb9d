"""The task initialization from the first training batch, where nothing else has set it before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..activations.positions import position_mask
from ..activations.vectors import ExactStatistics
from ..models.running import adapters_disabled, evaluation_mode
from ..parametrization import SafeFactor, safe_factor, trained_factor
from ..support.distributed import gather_from_all_ranks
from .layers import lora_linears, salora_layers, salora_linears
from .start_values import check_writable, is_at_start, is_managed, restrict_layers_to_task

logger = logging.getLogger(__name__)

# Positions of the first training batch that the task initialization looks at, per rank: several times the task rank.
_TASK_POSITIONS = 1024


@dataclass
class _Start:
    factors: list[SafeFactor]
    """Of the output side. The first stands for all: they are restricted, loaded and copied together."""
    task_rank: int


class FirstBatchStarts:
    """
    The adapters of a tuner whose start the first training batch may set.

    The first forward pass of training runs the base model on its own batch first, without gradients. That is no
    different from doing it before: the initialization does not change what the model computes. Whether it is still to
    come is part of the factors' state, so that a state dict that is loaded brings its own answer.

    Args:
        tuner: The model with the adapters.
    """

    def __init__(self, tuner: LoraModel) -> None:
        self._tuner = tuner
        self._starts: dict[str, _Start] = {}
        self.watches = False
        """Whether an adapter was added that needs the hooks of `watch`."""

    @property
    def waiting(self) -> list[str]:
        """Adapters whose start is still to come."""
        return [name for name, start in self._starts.items() if start.factors[0].awaits_task_data]

    def add(self, adapter_name: str, task_rank: int) -> None:
        """Let the first training batch set the start of an adapter, with `task_rank` directions."""
        layers = salora_layers(self._tuner.model, adapter_name)
        factors = [safe_factor(lora_linears(layer, adapter_name)["output"]) for _, layer in layers]
        for factor in factors:
            factor.awaits_task_data = True
        self._starts[adapter_name] = _Start(factors, task_rank)
        self.watches = True

    def settle(self, adapter_name: str) -> None:
        """The start of an adapter is set; a state dict that is loaded may make it wait again."""
        for factor in self._starts[adapter_name].factors if adapter_name in self._starts else ():
            factor.awaits_task_data = False

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter that is gone."""
        self._starts.pop(adapter_name, None)

    def clear(self) -> None:
        """Forget all adapters."""
        self._starts.clear()

    def watch(self, entry: nn.Module) -> list[RemovableHandle]:
        """Look at what an entry point of the model is called with."""
        # A method and no closure: in a deep copy of the model it is the copy's. Not put in front of hooks that
        # are there (`prepend`), after which torch.compile (2.11) takes one for the other.
        return [entry.register_forward_pre_hook(self.before_forward, with_kwargs=True)]

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the starts that are still to come, where this is a forward pass of training."""
        if torch.is_grad_enabled():
            for adapter_name in self.waiting:
                if module.training:
                    self._initialize(adapter_name, module, args, kwargs)
                else:
                    self._notice_training(adapter_name)

    @torch.compiler.disable
    @torch.no_grad()
    def _notice_training(self, adapter_name: str) -> None:
        """In evaluation mode, where a pass with gradients may be anything: whether an optimizer has made a step."""
        linears = [linear for _, linear in salora_linears(self._tuner.model, adapter_name)]
        if any(is_managed(trained_factor(linear)) for linear in linears) or all(map(is_at_start, linears)):
            return
        self.settle(adapter_name)
        logger.warning(
            "Adapter %r: it is trained in evaluation mode, in which no batch sets its start: that is the one of "
            "init='pissa'. Stop, and call model.train() before the first step, or give task_data.",
            adapter_name,
        )

    # torch.compile would trace it for the one time that it runs.
    @torch.compiler.disable
    @torch.no_grad()
    def _initialize(self, adapter_name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers = dict(salora_layers(self._tuner.model, adapter_name))
        for layer in layers.values():
            check_writable(trained_factor(lora_linears(layer, adapter_name)["output"]))
        if not all(is_at_start(linear) for _, linear in salora_linears(self._tuner.model, adapter_name)):
            self.settle(adapter_name)
            logger.warning(
                "Adapter %r: its factors were changed before the first training batch, so they stay as they are; the "
                "start is that of init='pissa'.",
                adapter_name,
            )
            return
        base_layers = {name: layer.get_base_layer() for name, layer in layers.items()}
        index, task_rank = _training_positions(args, kwargs), self._starts[adapter_name].task_rank
        with adapters_disabled(self._tuner.model), evaluation_mode(self._tuner.model):
            # The very same call: trainers replace the forward method by ones that need all of their arguments.
            bases = _task_bases(base_layers, task_rank, index, lambda: module(*args, **kwargs))
        restrict_layers_to_task(layers, adapter_name, bases)
        # Only now: after an out-of-memory error the trainer may try again, with a smaller batch.
        self.settle(adapter_name)
        logger.info("Adapter %r: task initialization from the first training batch.", adapter_name)


def _task_bases(
    layers: Mapping[str, nn.Module], task_rank: int, index: Tensor, run: Callable[[], Any]
) -> dict[str, Tensor]:
    """
    Module name -> U_T, from what the layers compute while the model runs.

    Args:
        layers: Base layers, by name.
        task_rank: r_t.
        index: Flat indices of the positions that count.
        run: Runs the model once on the batch.
    """
    bases: dict[str, Tensor] = {}

    def capture(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            rows = output.detach().reshape(-1, output.shape[-1])[index.to(output.device)]
            if isinstance(layer.bias, Tensor):
                rows = rows - layer.bias
            bases[name] = _task_basis_of_batch(rows, task_rank)

        return hook

    handles = [layer.register_forward_hook(capture(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return bases


def _training_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """
    Flat indices of the positions of a training batch that count, evenly thinned to at most `_TASK_POSITIONS`.

    Response tokens where the batch tells (labels, or the number of logits that a loss asks for), else all tokens.
    """
    given = kwargs.get("input_ids", args[0] if args else None)
    tokens: Tensor = kwargs["inputs_embeds"] if given is None else given
    batch, length = tokens.shape[:2]
    mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.shape == mask.shape:
        mask &= attention_mask.bool()
    labels, logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep")
    if isinstance(labels, Tensor) and labels.shape == mask.shape and (labels != -100).any():
        mask &= position_mask(labels, "response")
    elif isinstance(logits_to_keep, int) and 1 < logits_to_keep <= length:
        # The first of these logits is that of the last prompt token, which predicts the first response token.
        mask[:, : length - logits_to_keep + 1] = False
    index = mask.flatten().nonzero().squeeze(1)
    if index.numel() > _TASK_POSITIONS:
        index = index[torch.linspace(0, index.numel() - 1, _TASK_POSITIONS, device=index.device).long()]
    return index


def _task_basis_of_batch(rows: Tensor, task_rank: int) -> Tensor:
    """
    U_T from one batch, the same on all ranks: every rank contributes its rows' top 2 r_t scaled directions.

    Args:
        rows: W x, (n, d_out).
        task_rank: r_t.
    """
    rows = rows.float()
    dimension = rows.shape[1]
    width = min(2 * task_rank, dimension)
    summary = rows.new_zeros(width, dimension)
    if rows.shape[0]:
        local = ExactStatistics(dimension)
        local.update(rows)
        basis, values = local.top(min(width, rows.shape[0], dimension))
        summary[: values.shape[0]] = (basis * values).T
    statistics = ExactStatistics(dimension)
    statistics.update(gather_from_all_ranks(summary))
    basis, values = statistics.top(min(task_rank, dimension, statistics.count))
    return basis[:, values > values[0] * 1e-6]
