"""Finding the last checkpoint of a trainer that was written to its end."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..config import CONFIG_FILE
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..support.files import read_json_object
from .digest import adapter_problem
from .saved import ADAPTER_CONFIG_FILE, WEIGHTS_FILE, numbered_checkpoint

logger = logging.getLogger(__name__)

# In the order in which PEFT, SaLoRA and transformers write them.
_FILES = (WEIGHTS_FILE, DEFAULT_FILE, ADAPTER_CONFIG_FILE, CONFIG_FILE, "trainer_state.json")


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run that is whole, for a trainer's `resume_from_checkpoint`.

    `resume_from_checkpoint=True` takes the folder with the highest number, also when the run was killed while it was
    writing that folder, and then fails. This function passes over such folders with a warning.

    Args:
        output_dir: The trainer's `output_dir`, with SaLoRA checkpoints named checkpoint-<step>.

    Returns:
        The folder, or `None` where no checkpoint is complete, with which a trainer starts from the beginning.

    Example:

        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint("outputs"))
    """
    output_dir = Path(output_dir).expanduser()  # as a trainer does
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    steps = {step: folder for folder in folders if (step := numbered_checkpoint(folder)) is not None}
    for step in sorted(steps, reverse=True):
        problem = checkpoint_problem(steps[step])
        if problem is None:
            return str(steps[step])
        logger.warning("%s is passed over: %s. It was probably interrupted while it was written.", steps[step], problem)
    return None


def checkpoint_problem(folder: str | os.PathLike) -> str | None:
    """What a checkpoint of a SaLoRA adapter lacks for a trainer to resume from it, or None."""
    folder = Path(folder)
    for name in _FILES:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        for name in _FILES:
            if name.endswith(".json"):
                read_json_object(folder / name)
        SafetyModule.load(folder)
    except ValueError as error:
        return str(error).rstrip(".")
    return adapter_problem(folder)
