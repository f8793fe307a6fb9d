"""What layers read at the last token of prompts, where it is decided how an answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.running import cheap_forward_options, input_device
from .errors import CalibrationError


def last_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], prompts: Sequence[Sequence[int]], batch_size: int
) -> dict[str, Tensor]:
    """
    One forward pass over prompts, padded on the right.

    Args:
        model: In evaluation mode.
        layers: Name -> linear layer inside `model`.
        prompts: Token ids, none of them empty.
        batch_size: Prompts per forward pass.

    Returns:
        Name -> (prompts, d_in) on the CPU, in the layer's own dtype; layers that read the same tensor share theirs.

    Raises:
        CalibrationError: A layer is not called once a pass, with one vector per token.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    last = torch.zeros(0, dtype=torch.int64)  # of every prompt of a batch, among all its tokens
    size = 0
    read: tuple[Tensor, Tensor] | None = None  # the tensor that was read last, and what was kept of it

    def keep(name: str, tensor: Tensor) -> None:
        nonlocal read
        if read is None or read[0] is not tensor:
            flat = tensor.detach().reshape(-1, tensor.shape[-1])
            if flat.shape[0] != size:
                raise CalibrationError(f"target_modules: {name!r} is not called with one vector per token.")
            read = tensor, flat.index_select(0, last.to(flat.device)).cpu()
        kept[name].append(read[1])

    def check_calls(batches: int) -> None:
        for name, parts in kept.items():
            if len(parts) != batches:
                raise CalibrationError(
                    f"target_modules: {name!r} was called {len(parts)} times in {batches} passes, and not once in each."
                )

    def hook(name: str) -> Any:
        return lambda module, args: keep(name, args[0])

    options, device = cheap_forward_options(model, layers.values()), input_device(model)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = [prompts[index] for index in order[start : start + batch_size]]
                longest = max(map(len, batch))
                ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in batch])
                mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in batch])
                last = torch.tensor([row * longest + len(prompt) - 1 for row, prompt in enumerate(batch)])
                size, read = ids.numel(), None
                model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
                check_calls(start // batch_size + 1)
    finally:
        for handle in handles:
            handle.remove()
    return _in_order(kept, order)


def _in_order(kept: dict[str, list[Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """The rows of all batches, back in the order of the prompts; what was shared stays shared."""
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(order))
    whole: dict[tuple[int, ...], Tensor] = {}
    for parts in kept.values():
        key = tuple(map(id, parts))
        if key not in whole:
            whole[key] = torch.cat(parts)[place]
    return {name: whole[tuple(map(id, parts))] for name, parts in kept.items()}
