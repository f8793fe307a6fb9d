"""The `salora evaluate` line for an adapter that has just been trained."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

import torch
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from ..models.loading import LoadingOptions, load_tokenizer
from ..rows.rendering import template_digest

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
    if folder.name in ("", ".."):  # beside "." is not in it
        folder = folder.resolve()
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
        f"\n\n    {evaluation_command(base_model, adapter, loading)}\n{_other_template(base_model, adapter, loading)}"
    )


def _other_template(base_model: str, adapter: str | os.PathLike, loading: LoadingOptions) -> str:
    """What to know where the tokenizer that was saved with the adapter has another chat template than the base's."""
    if not (Path(adapter) / TOKENIZER_CONFIG_FILE).is_file():
        return ""
    trained_with = load_tokenizer(os.fspath(adapter), loading.without_revision())
    of_base = load_tokenizer(base_model, loading)
    if trained_with is None or of_base is None or template_digest(trained_with) == template_digest(of_base):
        return ""
    return (
        f"\nIt renders with the tokenizer of {base_model}, whose chat template is not that of {adapter}:\n"
        f"the numbers may be others than in use. Give it, instead of {base_model}, a folder with that model and the\n"
        f"tokenizer of {adapter}.\n"
    )
