"""Uploading an adapter to the Hugging Face hub together with its model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ..config import CONFIG_FILE, NOTES_KEY, read_side_config
from ..safety_module import DEFAULT_FILE, SafetyModule
from .adapter_config import read_config
from .digest import check_saved_together
from .saved import ADAPTER_CONFIG_FILE, WEIGHTS_FILE, without_file
from .training_card import write_training_card

# What transformers' trainers leave out of an upload, and files that only resuming needs.
_NOT_UPLOADED = ["_*", "checkpoint-*", "checkpoint-*/*", "runs/*", "*.bin", "*.pt", "*.pth", "trainer_state.json"]


def push_to_hub(
    adapter: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload adapter",
) -> str:
    """
    Upload a SaLoRA adapter with its safety module and its model card.

    A model's own `push_to_hub`, and a trainer's, upload the same files, but write their own README.md last, over the
    part that says how the adapter was trained. This function brings that part up to date and uploads it.

    Args:
        adapter: A [`~peft.PeftModel`] with a SaLoRA adapter, or a folder that one was saved to.
        repo_id: "organization/name"; created where it is missing.
        private: Whether a new repository is private; None: the organization's default.
        token: Access token; None: that of `hf auth login`.
        revision: Branch to upload to.
        create_pr: Open a pull request instead of writing to the branch.
        commit_message: The message.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: The folder does not hold a SaLoRA adapter, or its weights are not in safetensors.
        ValueError: Its weights are not those that its safety module was saved with.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(adapter, str | os.PathLike):
            folder = Path(adapter).expanduser()
            renew_card(folder)
            if not (folder / WEIGHTS_FILE).is_file():  # a pickle is left out of the upload
                raise FileNotFoundError(without_file(folder, WEIGHTS_FILE))
        else:
            folder = Path(scratch)
            adapter.save_pretrained(folder)
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=_NOT_UPLOADED,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    return str(commit)


def renew_card(folder: str | os.PathLike) -> None:
    """
    Bring our part of the model card of a saved SaLoRA adapter up to date, which others may have written over.

    Raises:
        FileNotFoundError, ValueError: See `push_to_hub`.
    """
    folder = Path(folder)
    for name in (ADAPTER_CONFIG_FILE, CONFIG_FILE, DEFAULT_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so it is not a SaLoRA adapter as it was saved.")
    check_saved_together(folder)
    notes = (read_side_config(folder) or {}).get(NOTES_KEY)
    notes = notes if isinstance(notes, dict) else {}
    write_training_card(folder, read_config(folder), SafetyModule.load(folder), notes)
