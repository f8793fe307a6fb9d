"""Scores of the entries of weights by what they matter for some rows, and the columns that come first in each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..activations.errors import CalibrationError
from ..models.running import hooked, input_device
from ..models.weights import layer_features, linear_weight
from ..rows.batching import batches
from ..rows.examples import IGNORED, TokenizedExample
from .entries import narrow_columns

SCORES_AT_ONCE = 2 * 2**30
"""Bytes of float32 sums of gradients that are kept at once; more layers than that are done in several passes."""

HALF_SCALE = 2.0**10
"""What losses are multiplied with in float16, where the gradients of confident answers would round to zero."""


def count_of(percent: float, d_in: int) -> int:
    """How many entries of a row of d_in are so many percent, rounded down."""
    return int(percent * d_in / 100)


def top_columns(scores: Tensor, percent: float) -> Tensor:
    """
    The columns of the highest scores of each row.

    Args:
        scores: (d_out, d_in).
        percent: Of d_in, rounded down.

    Returns:
        (d_out, k) on the CPU, int16 where that does, the highest score first, so that the first columns are those of
        any lower percentage.
    """
    d_in = scores.shape[1]
    return narrow_columns(scores.topk(count_of(percent, d_in), dim=1).indices, d_in)


def wanda_columns(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[TokenizedExample],
    percent: float,
    batch_size: int,
    of: str,
) -> dict[str, Tensor]:
    """
    `top_columns` of every layer by Wanda's score |W_ij| ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695), X_j being the
    layer's input j at the response tokens, as Wei et al. 2024 (section 3.1) take it.

    Args:
        model: In evaluation mode.
        names: The layers.
        examples: With responses.
        percent: See `top_columns`.
        batch_size: Examples per forward pass.
        of: What the rows are called, beside the progress bar.

    Raises:
        CalibrationError: A layer is not called once per token, or not at all, or scores are not finite.
    """
    norms = input_norms(model, names, examples, batch_size, of)
    found = {}
    for name in names:
        with linear_weight(model.get_submodule(name)) as weight:
            scores = weight.float().abs() * norms.pop(name).to(weight.device)
        found[name] = top_columns(_finite(scores, name), percent)
    return found


def input_norms(
    model: nn.Module, names: Sequence[str], examples: Sequence[TokenizedExample], batch_size: int, of: str
) -> dict[str, Tensor]:
    """||X_j||_2 of every input of every layer over the response tokens: module name -> (d_in,) float32."""
    squares: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def hook(layer: nn.Module, args: tuple[Any, ...], name: str) -> None:
        rows = _by_token(args[0], mask, name).detach()[mask.to(args[0].device)]
        total = rows.double().square().sum(0)
        squares[name] = squares[name] + total if name in squares else total

    with hooked(model, names, lambda layer, name: layer.register_forward_pre_hook(partial(hook, name=name))):
        for batch in _progress(examples, batch_size, f"norms of inputs, {of}"):
            mask = batch["labels"] != IGNORED
            with torch.no_grad():
                _forward(model, batch)
    _check_used(names, squares)
    return {name: total.sqrt().float() for name, total in squares.items()}


def snip_columns(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[TokenizedExample],
    percent: float,
    batch_size: int,
    of: str,
) -> dict[str, Tensor]:
    """
    `top_columns` of every layer by the SNIP score of Wei et al. 2024 (section 3.1): the mean over the rows of
    |W * dL/dW|, L being a row's mean negative log-likelihood per response token.

    Layers are done a group at a time, so that the sums of their gradients take at most `SCORES_AT_ONCE`; every group
    takes a forward and a backward pass over the rows. For arguments and errors see `wanda_columns`.
    """
    found = {}
    for group in _groups(model, names):
        sums = gradient_sums(model, group, examples, batch_size, of)
        for name in group:
            with linear_weight(model.get_submodule(name)) as weight:
                scores = sums.pop(name).mul_(weight.float().abs())
            found[name] = top_columns(_finite(scores, name), percent)
    return found


def gradient_sums(
    model: nn.Module, names: Sequence[str], examples: Sequence[TokenizedExample], batch_size: int, of: str
) -> dict[str, Tensor]:
    """
    The sum over the rows of |dL/dW|, float32: module name -> (d_out, d_in).

    No gradient of a weight is computed by autograd: of a layer's inputs x and the gradients g of its outputs, that of
    one row is the sum of g x^T over its tokens. Rows of one batch do not mix, and no weight need be trainable.
    """
    sums: dict[str, Tensor] = {}
    mask = torch.empty(0)
    is_half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    scale = HALF_SCALE if is_half else 1.0

    def add(gradient: Tensor, name: str, inputs: Tensor) -> None:
        shape = mask.shape
        if name not in sums:
            sums[name] = torch.zeros(gradient.shape[-1], inputs.shape[-1], device=gradient.device)
        of_rows = gradient.reshape(*shape, -1), inputs.reshape(*shape, -1)
        for row_gradient, row_inputs in zip(*of_rows, strict=True):
            sums[name] += (row_gradient.float().T @ row_inputs.float()).abs_()

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor, name: str) -> Tensor:
        inputs = _by_token(args[0], mask, name)
        if not output.requires_grad:  # the first such layers: here the graph begins
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(add, name=name, inputs=inputs.detach()))
        return output

    hooks = hooked(model, names, lambda layer, name: layer.register_forward_hook(partial(hook, name=name)))
    with hooks, _frozen(model), torch.enable_grad():
        for batch in _progress(examples, batch_size, f"gradients, {of}"):
            mask = batch["labels"] != IGNORED
            (scale * _sum_of_row_losses(_forward(model, batch), batch["labels"])).backward()
    _check_used(names, sums)
    return {name: total.div_(scale) for name, total in sums.items()} if is_half else sums


def _finite(scores: Tensor, name: str) -> Tensor:
    if not torch.isfinite(scores).all():
        raise CalibrationError(
            f"The scores of {name!r} are not finite. Load the model in bfloat16 or float32 (--dtype) where it is in "
            "float16, which is too small for them; otherwise its weights are broken."
        )
    return scores


def _sum_of_row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).sum()


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = input_device(model)
    return model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
    ).logits


def _progress(examples: Sequence[TokenizedExample], batch_size: int, description: str) -> Iterator[dict[str, Tensor]]:
    # Padding is masked, so that any id will do.
    found = list(batches(examples, batch_size, pad_token_id=0))
    yield from tqdm(found, desc=description, unit="batch", leave=False)


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        d_in, d_out = layer_features(model.get_submodule(name))
        if group and size + 4 * d_in * d_out > SCORES_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += 4 * d_in * d_out
    yield group


def _by_token(tensor: Tensor, mask: Tensor, name: str) -> Tensor:
    """A layer's inputs as (batch, length, d)."""
    if tensor.shape[:-1].numel() != mask.numel():
        raise CalibrationError(
            f"target_modules: {name!r} is called with tensors of shape {tuple(tensor.shape)}, not with one vector per "
            f"token of a batch of {mask.numel()} tokens. Leave it out of target_modules."
        )
    return tensor.reshape(*mask.shape, tensor.shape[-1])


def _check_used(names: Sequence[str], used: Mapping[str, Tensor]) -> None:
    if unused := [name for name in names if name not in used]:
        raise CalibrationError(f"target_modules: {unused[0]!r} is not used in any forward pass. Leave it out.")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient; each gets its own wish back."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
