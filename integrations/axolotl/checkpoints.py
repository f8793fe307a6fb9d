"""The checkpoint that a run of Axolotl goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault


def checkpoint_to_resume_from(cfg: DictDefault) -> str | None:
    """The checkpoint that training will resume from."""
    # Private part of Axolotl: which folder it resumes from decides which safety module the weights belong to.
    from axolotl.utils.train import determine_last_checkpoint

    return determine_last_checkpoint(cfg)


def pass_over_incomplete_checkpoints(cfg: DictDefault) -> None:
    """
    Let `auto_resume_from_checkpoints` pass over checkpoints that were interrupted while they were written.

    Raises:
        ValueError: `resume_from_checkpoint` names such a folder.
    """
    from ...adapters.checkpoints import checkpoint_problem, last_complete_checkpoint

    chosen = cfg.resume_from_checkpoint
    if chosen is None and cfg.auto_resume_from_checkpoints:
        cfg.resume_from_checkpoint = last_complete_checkpoint(cfg.output_dir)
        if cfg.resume_from_checkpoint is None:
            cfg.auto_resume_from_checkpoints = False  # Axolotl would take the last folder, complete or not
    elif chosen is not None and (problem := checkpoint_problem(chosen)) is not None:
        complete = last_complete_checkpoint(Path(chosen).parent)
        advice = "Remove the option to start from the beginning" if complete is None else f"Resume from {complete}"
        raise ValueError(
            f"resume_from_checkpoint: {chosen}: {problem}. It is not a SaLoRA checkpoint, or was interrupted while it "
            f"was written. {advice}."
        )
