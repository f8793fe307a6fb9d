"""A whole model with low-rank updates in its weights, written to a folder, all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.model_card import END, START
from ..adapters.saved import CARD_FILE
from ..models.embeddings import input_embeddings, output_embeddings
from ..models.weights import base_layer, is_quantized
from ..support.files import scratch_folder
from .updates import Factors


def check_folder(out: Path) -> None:
    """
    Raises:
        FileExistsError: `out` is there, and no empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists. Name a new folder for the merged model.")


def check_mergeable(model: PreTrainedModel, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: A layer's weight is quantized, is not here, or is another's, too.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        layer: Any = base_layer(model.get_submodule(name))
        if is_quantized(layer):
            raise ValueError(f"form='merged': {name!r} is quantized. Load the model unquantized, or write an adapter.")
        if layer.weight.is_meta:
            raise ValueError(f"form='merged': {name!r} is offloaded. Load the model without a device_map.")
        if tied := [key for key, value in parameters.items() if value is layer.weight and key != f"{name}.weight"]:
            raise ValueError(f"form='merged': the weight of {name!r} is that of {tied[0]!r}, too. Write an adapter.")


@contextmanager
def untied_head(model: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """
    While it is open, a head among these modules that shares the input embeddings' weight has a copy of it, since an
    adapter on the head alone leaves the embeddings as they are. A model saved meanwhile has no tied embeddings.
    """
    embeddings, head = input_embeddings(model), output_embeddings(model)
    layer: Any = None if head is None else base_layer(head)
    shared = getattr(embeddings, "weight", None)
    is_target = any(base_layer(model.get_submodule(name)) is layer for name in names)
    if not is_target or shared is None or layer.weight is not shared:
        yield
        return
    config = model.config.get_text_config()
    was_tied = [(part, part.tie_word_embeddings) for part in (model.config, config)]
    try:
        layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        for part, _ in was_tied:
            part.tie_word_embeddings = False
        yield
    finally:
        layer.weight = shared
        for part, value in was_tied:
            part.tie_word_embeddings = value


def write_merged(
    model: PreTrainedModel,
    updates: Iterable[tuple[str, Sequence[Factors]]],
    out: Path,
    *,
    tokenizer: Any,
    section: str,
) -> None:
    """
    Save W + sum B A of every layer in the model's dtype, as safetensors; the model itself stays as it is.

    Args:
        model: Unquantized, without adapters.
        updates: Module names with their updates, scaling included; a layer's are only asked for when it is its turn.
        out: The folder, see `check_folder`.
        tokenizer: Written beside it; None: none.
        section: Markdown for the model card.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, factors in updates:
        weight = state[f"{name}.weight"]
        delta = sum((b.double() @ a.double() for a, b in factors), start=weight.new_zeros((), device="cpu").double())
        delta = delta.T if isinstance(model.get_submodule(name), Conv1D) else delta
        state[f"{name}.weight"] = (weight.double() + delta.to(weight.device)).to(weight.dtype).contiguous()
    scratch = scratch_folder(out)
    try:
        new = scratch / "new"
        model.save_pretrained(new, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        card = f"---\nlibrary_name: transformers\n---\n\n{START}\n{section.strip()}\n{END}\n"
        (new / CARD_FILE).write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty
        os.replace(new, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
