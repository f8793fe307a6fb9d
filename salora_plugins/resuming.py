"""Loading a saved SaLoRA adapter with its safety module, to train it further or beside one in training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn

from .adapters.adapter_config import read_config
from .adapters.digest import check_saved_together
from .adapters.saved import adapter_within, without_file
from .config import CONFIG_FILE, SaLoRAConfig
from .support.hub import hub_folder, is_hub_id
from .tuner import SaLoRAModel

_BY_THE_HUB = "download the repository with huggingface_hub.snapshot_download, which takes it, and name its folder"
# Of what `PeftModel.from_pretrained` takes, what would be passed over here, and what to do instead.
_NOT_PASSED_ON = {
    "revision": 'name it with the repository, "organization/name@revision"',
    "subfolder": "name the folder that the adapter is in; of a repository, download it first",
    "is_trainable": "what is loaded here is trained; PeftModel.from_pretrained loads it for inference",
    "config": "it is read from the folder",
    **dict.fromkeys(("token", "cache_dir", "force_download", "local_files_only", "proxies"), _BY_THE_HUB),
}


def load_for_training(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """
    Load a saved SaLoRA adapter to go on training it, with its safety module in force.

    `PeftModel.from_pretrained` loads the same folder as a plain LoRA adapter: right for inference, but training it
    further would not be held back from the safety directions.

    Args:
        model: The base model that the adapter was trained on.
        folder: A folder written by `save_pretrained`, a trainer's checkpoint, or a repository of the Hugging Face hub
            ("organization/name", or "organization/name@revision").
        adapter_name: Name of the adapter in the returned model.
        kwargs: Passed on to [`~peft.PeftModel.from_pretrained`].

    Returns:
        A [`~peft.PeftModel`] whose adapter is trainable.

    Raises:
        FileNotFoundError: The folder has no `salora_config.json`, so there is no safety module to train with.
        SafetyModuleError: The safety module is damaged or belongs to another model.
        TypeError: `model` is no model, or an argument is one that PEFT takes and this function does not.
        ValueError: A file cannot be read, or the weights are not those that were saved with the safety module.

    Example:

        >>> model = load_for_training(AutoModelForCausalLM.from_pretrained(base), "outputs/checkpoint-100")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load_for_training takes the base model and then the adapter's folder, not a {type(model).__name__}. "
            "Load it: AutoModelForCausalLM.from_pretrained(...)."
        )
    for name in _NOT_PASSED_ON.keys() & kwargs.keys():
        raise TypeError(f"{name}={kwargs[name]!r}: load_for_training does not take it: {_NOT_PASSED_ON[name]}.")
    folder, config = _saved_config(folder)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    return cls.from_pretrained(
        model, str(folder), adapter_name=adapter_name, is_trainable=True, config=config, **kwargs
    )


def load_adapter(model: PeftModel, folder: str | os.PathLike, adapter_name: str, *, is_trainable: bool = False) -> None:
    """
    Load a saved SaLoRA adapter into a model that has one already, such as a frozen reference in a training loop of
    your own. TRL's trainers make their reference themselves.

    `model.load_adapter` finds a plain LoRA adapter in the folder, which PEFT does not combine with one in training.

    Args:
        model: What `get_peft_model` gave for a [`SaLoRAConfig`], or `load_for_training`.
        folder: As for `load_for_training`.
        adapter_name: Name of the new adapter in the model. It is not made the active one.
        is_trainable: Whether it is to be trained; it has its own safety module in force then.

    Raises:
        FileNotFoundError, SafetyModuleError: As for `load_for_training`.
        ValueError: The model has no SaLoRA adapter, or one of that name.

    Example:

        >>> model = load_for_training(base_model, "outputs", adapter_name="policy")
        >>> load_adapter(model, "outputs", "reference")
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SaLoRAModel):
        raise ValueError(
            f"{type(model).__name__} has no SaLoRA adapter, beside which another could be loaded. Use "
            "load_for_training, or PeftModel.from_pretrained for inference."
        )
    folder, config = _saved_config(folder)
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    model.set_requires_grad(adapter_name, requires_grad=is_trainable)


def _saved_config(folder: str | os.PathLike) -> tuple[Path, SaLoRAConfig]:
    """The folder of a saved adapter, downloaded if it is on the hub, and its configuration, weights to follow."""
    source = os.path.expanduser(folder)
    if not os.path.exists(source) and is_hub_id(source):
        source = hub_folder(source, ["*.json", "*.safetensors"], option="folder")
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(without_file(folder, CONFIG_FILE))
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}, so it is not a SaLoRA adapter with its safety module, or was interrupted "
            "while it was written (last_complete_checkpoint finds the checkpoint before it), or comes from `salora "
            "export` (train the adapter that was exported). A plain LoRA adapter is loaded with "
            f"PeftModel.from_pretrained. {adapter_within(folder, CONFIG_FILE)}".rstrip()
        )
    check_saved_together(folder)
    config = read_config(folder)
    config.weights_follow = True
    return folder, config
