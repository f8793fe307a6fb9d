"""Names of repositories of the Hugging Face hub, and their files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PART = r"[\w-][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}/{_PART}(@[\w./-]+)?", re.ASCII)
_MODEL_NAME = re.compile(rf"{_PART}(/{_PART})?", re.ASCII)
_DATASET_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a text has the form of a hub repository: "organization/name", with "@revision" or without."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".safetensors")


def is_model_name(name: str) -> bool:
    """Whether a text has the form of what `from_pretrained` takes from the hub: "name" or "organization/name"."""
    return _MODEL_NAME.fullmatch(name) is not None


def is_dataset_id(name: str) -> bool:
    """Whether a text has the form of a data set: "name" or "organization/name", with ":configuration" or without."""
    return _DATASET_ID.fullmatch(name) is not None


def hub_dataset(name: str, config: str | None, split: str) -> Any:
    """
    A split of a hub data set, downloaded or from the cache; the library `datasets` must be installed.

    Raises:
        FileNotFoundError: It cannot be had; it says why, and what can be done about it.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # dozens of types, from the library's own to those of the HTTP client
        told = f"loading the {split} split of the hub data set {name!r} failed: {type(error).__name__}: {error}."
        if datasets.config.HF_HUB_OFFLINE:
            told += " HF_HUB_OFFLINE is set: only what was downloaded before is there. Unset it to download."
        elif "gated" in str(error).lower() or "401" in str(error):
            told += " Accept its terms on its page and log in (`hf auth login`)."
        raise FileNotFoundError(told) from error


def hub_file(name: str, file: str, *, option: str) -> Path:
    """
    A file of a hub repository, downloaded or from the hub's cache.

    Args:
        name: "organization/name" or "organization/name@revision".
        file: The file in the repository.
        option: What the user calls the repository, for messages.

    Raises:
        FileNotFoundError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download

    return _from_hub(name, file, option, lambda **where: hf_hub_download(filename=file, **where))


def hub_folder(name: str, patterns: list[str], *, option: str) -> Path:
    """
    The files of a hub repository that match patterns such as "*.json", downloaded or from the hub's cache.

    Args:
        name: "organization/name" or "organization/name@revision".
        patterns: Which files.
        option: What the user calls the repository, for messages.

    Raises:
        FileNotFoundError: They cannot be had.
    """
    from huggingface_hub import snapshot_download

    return _from_hub(name, "its files", option, lambda **where: snapshot_download(allow_patterns=patterns, **where))


def _from_hub(name: str, wanted: str, option: str, download: Callable[..., str]) -> Path:
    repository, _, revision = name.partition("@")
    try:
        return Path(download(repo_id=repository, revision=revision or None))
    except Exception as error:  # dozens of types, from the library's own to those of the HTTP client
        raise FileNotFoundError(
            f"{option}={name!r} is neither a file nor a folder here, and {wanted} could not be had from a hub "
            f"repository of that name: {type(error).__name__}: {error}"
        ) from error
