"""The embeddings of a model, where it has them and tells."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What turns token ids into vectors; None where the model does not tell."""
    return _told(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """What turns the last hidden states into logits; None where the model does not tell, or has no such head."""
    return _told(model, "get_output_embeddings")


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens a model has an embedding for; None where it does not tell."""
    size = getattr(input_embeddings(model), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _told(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        found = None if get is None else get()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
