"""Which weights the files beside an adapter were saved with."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import CONFIG_FILE, DIGEST_KEY, read_side_config
from ..safety_module import content_digest
from .saved import CARD_FILE, WEIGHTS_FILE, unreadable


def adapter_digest(folder: str | os.PathLike) -> str | None:
    """
    SHA-256 of an adapter's weights: of the tensors' names, shapes, dtypes and bytes, in the order of the names, so that
    neither the order within the file nor its metadata matter.

    Args:
        folder: With `adapter_model.safetensors`; without it there is no digest: None.

    Raises:
        ValueError: The file cannot be read.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return content_digest((key, opened.get_tensor(key)) for key in sorted(opened.keys()))
    except SafetensorError as error:
        raise ValueError(f"{file} {unreadable(error)}") from error


def adapter_problem(folder: str | os.PathLike) -> str | None:
    """
    Why the safety module and the certificate beside an adapter do not hold for its weights, or None.

    They name the weights that they were saved with: by the digest in `salora_config.json` and, where there is none (an
    adapter that was exported or projected), by that in the model card. A folder that names none has no problem.
    """
    folder = Path(folder)
    try:
        digest, source = _recorded_digest(folder)
        if digest is None:
            return None
        found = adapter_digest(folder)
    except ValueError as error:
        return str(error)
    if found is None:
        return f"{folder} has no {WEIGHTS_FILE}, though {source} names its weights"
    if found == digest:
        return None
    return (
        f"{folder}: the weights in {WEIGHTS_FILE} are not those that were saved with {source} (their SHA-256 "
        "differs from the one that it names). They were trained further, combined or converted without "
        "salora-plugins, so that neither its safety module nor its certificate is theirs"
    )


def check_saved_together(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: The weights of a saved SaLoRA adapter are not those that its safety module was saved with, or a file
            cannot be read; the message names it.
    """
    if (problem := adapter_problem(folder)) is not None:
        raise ValueError(
            f"{problem.rstrip('.')}. Go on with the adapter as it was saved (a checkpoint before); or, to keep these "
            "weights, take out of them what lies in the safety directions: `salora project`."
        )


def card_mark(digest: str) -> str:
    """How a model card names the weights that its certificate is for."""
    return f"weights of SHA-256 `{digest}`"


_CARD_MARK = re.compile(card_mark("([0-9a-f]{64})"))


def _recorded_digest(folder: Path) -> tuple[str | None, str]:
    """The digest of the weights that side files name, and which file it is."""
    config = read_side_config(folder)
    if config is not None and DIGEST_KEY in config:
        digest = config[DIGEST_KEY]
        if digest is not None and not isinstance(digest, str):
            raise ValueError(f"{folder / CONFIG_FILE}: {DIGEST_KEY} is {digest!r}, not a text. Save it again.")
        return digest, CONFIG_FILE
    if (folder / CARD_FILE).is_file():
        found = _CARD_MARK.search((folder / CARD_FILE).read_text(encoding="utf-8", errors="replace"))
        return (None if found is None else found.group(1)), CARD_FILE
    return None, CONFIG_FILE
