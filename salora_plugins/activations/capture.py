"""Running a model over batches and updating statistics of what passes its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.running import cheap_forward_options, input_device
from ..options import Positions
from .collector import StatisticsCollector
from .positions import CountedPositions
from .statistics import Engine, ModuleStatistics


def collect_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    engine: Engine,
    *,
    positions: Positions | CountedPositions = "response",
    with_inputs: bool = False,
    description: str = "calibrating",
) -> dict[str, ModuleStatistics]:
    """
    One pass over the data that gathers the statistics of all layers at once.

    Under torch.distributed every rank passes batches of its own, and gets the statistics over those of all ranks.

    Args:
        model: Called with input_ids and attention_mask; must be in evaluation mode.
        layers: Name -> linear layer inside `model`.
        batches: Dicts of input_ids, labels and attention_mask, (batch, length) int64.
        engine: How the statistics are kept.
        positions: Which positions count, see `position_mask`; or these, with a weight.
        with_inputs: Whether to gather the layers' inputs, too.
        description: Shown beside the progress bar.

    Raises:
        CalibrationError: A layer is not used, is not called once per token, or gives NaN.
    """
    options = cheap_forward_options(model, layers.values())
    device = input_device(model)
    counted = positions if isinstance(positions, CountedPositions) else CountedPositions(positions)
    tokens = 0
    with StatisticsCollector(layers, engine, with_inputs=with_inputs) as collector, torch.no_grad(), full_float32():
        progress = tqdm(batches, desc=description, unit="batch", leave=False)
        for batch in progress:
            tokens += int(batch["attention_mask"].sum())
            mask, scales = counted.of_batch(batch)
            batch = {key: value.to(device) for key, value in batch.items()}
            with collector.positions(mask, scales):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
            if elapsed := progress.format_dict["elapsed"]:
                progress.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        return collector.result()


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32, not in TF32 or bf16, whatever the trainer has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
