"""U_T of the task initialization: the directions in which the layers answer task data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..activations.capture import collect_statistics
from ..activations.errors import CalibrationError
from ..activations.statistics import ModuleStatistics
from ..config import SaLoRAConfig
from ..models.running import adapters_disabled, evaluation_mode, on_accelerator
from ..models.weights import base_layer
from ..rows.batching import share_of_rank
from ..support.distributed import broadcast
from .rows import task_rows
from .settings import task_settings


def task_bases(model: nn.Module, config: SaLoRAConfig, rows: Any = None) -> dict[str, Tensor]:
    """
    U_T of every target layer: the top left singular vectors of W X_t on task data (the paper, section 4.2).

    Args:
        model: The base model, with or without adapters.
        config: task_data, task_rank, num_task_samples, target_modules, ... are used.
        rows: Task data to use instead of `config.task_data`.

    Returns:
        Module name -> (d_out, r_t) float32, on the device of the layer; fewer columns where the data has fewer
        positions.

    Raises:
        CalibrationError: A layer is not used or gives NaN, or the weights are sharded.
        DataError: The task data cannot be read.
    """
    settings = task_settings(model, config, rows)
    examples = task_rows(settings.rows)
    layers = {name: base_layer(model.get_submodule(name)) for name in settings.names}
    with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
        statistics = collect_statistics(
            model,
            layers,
            share_of_rank(examples, settings.batch_size),
            settings.engine,
            description="calibrating the task initialization",
        )
        bases = {name: task_basis(statistics.pop(name), settings.rank) for name in settings.names}
    # A model that was on the accelerator for this only is back; its bases would stay there, and take memory.
    for name, layer in layers.items():
        weight = layer.weight
        if isinstance(weight, Tensor) and not weight.is_meta:
            bases[name] = bases[name].to(weight.device)
    broadcast(list(bases.values()))
    return bases


def task_basis(statistics: ModuleStatistics, task_rank: int) -> Tensor:
    """U_T (d_out, r_t) of one layer, r_t being cut to the number of positions and directions there are."""
    rows = statistics.output
    if rows.count == 0:
        raise CalibrationError("task_data: no response token in the data, so there is nothing to initialize from.")
    return rows.top(min(task_rank, rows.most_directions))[0]
