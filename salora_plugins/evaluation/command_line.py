"""The `salora evaluate` line for an adapter that has just been trained."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

import torch

from ..models.loading import LoadingOptions

NAME = "trained"
"""What the adapter is called in the report."""


def evaluation_command(base_model: str, adapter: str | os.PathLike, loading: LoadingOptions) -> str:
    """
    A command for a shell that measures the base model and an adapter on it, into a folder beside the adapter.

    Args:
        base_model: Folder or hub repository, as it was named for the training.
        adapter: The folder that the adapter was saved to.
        loading: How the base model was loaded.
    """
    folder = Path(adapter)
    words = ["salora", "evaluate", base_model, "--adapter", f"{NAME}={folder}", "--out", f"{folder}-evaluation"]
    for option in dataclasses.fields(loading):
        value = getattr(loading, option.name)
        if value != option.default:
            flag = "--" + option.name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def how_to_evaluate(base_model: str, adapter: str | os.PathLike, loading: LoadingOptions) -> str:
    """What is printed at the end of a training; on a machine with an accelerator the models are to run there."""
    if loading.device_map is None and torch.accelerator.is_available():
        loading = dataclasses.replace(loading, device_map="auto")
    return (
        "\nWhether the refusals are kept, beside the base model's (--task FILE adds the loss on held-out data):"
        f"\n\n    {evaluation_command(base_model, adapter, loading)}\n"
    )
