"""The configuration of one adapter of a model, which is saved with the adapter's safety module."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ..config import CONFIG_FILE, DIGEST_KEY, FORM_KEY, FORM_OF_FACTORS, HEADS_ADDED_LATER, NOTES_KEY, SaLoRAConfig
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..support.files import atomic_write, make_folder
from .certificate import check_saved_factors
from .digest import adapter_digest
from .training_card import write_training_card
from .writing import write_adapter_config


def read_config(folder: str | os.PathLike) -> SaLoRAConfig:
    """
    The configuration of a saved SaLoRA adapter, from its `salora_config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be used.
    """
    config = SaLoRAConfig.from_pretrained(folder)
    if not isinstance(config, SaLoRAConfig):
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}, so it is not a SaLoRA adapter.")
    return config


class AdapterConfig(SaLoRAConfig):
    """
    The copy of a [`SaLoRAConfig`] that a tuner keeps for one adapter.

    A configuration is a value, which several models may be given; this one belongs to the adapter, whose safety module
    it has and saves.
    """

    safety_module_in_force: SafetyModule
    """The one that the adapter is trained with, its tensors on the CPU."""

    training_notes: dict[str, str]
    """What it is trained on beside the task, for the model card: name -> text."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Made anew from its fields, as `dataclasses.replace` does, it belongs to no adapter yet.
        return SaLoRAConfig(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __eq__(self, other: object) -> bool:
        """As a configuration is compared with another: by its fields."""
        if not isinstance(other, SaLoRAConfig):
            return NotImplemented
        names = [option.name for option in dataclasses.fields(self)]
        return all(getattr(self, name) == getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]  # as of every dataclass that can be changed

    @classmethod
    def of(cls, config: SaLoRAConfig, safety_module: SafetyModule) -> AdapterConfig:
        """
        A copy for one adapter.

        PEFT writes to the configuration of an adapter (it resolves `target_modules`, for one): what can be changed is
        copied, data and modules given as objects are shared.
        """
        own = cls.__new__(cls)
        for name, value in vars(config).items():
            shared = not isinstance(value, (list, dict, set)) or name in ("safety_data", "task_data")
            setattr(own, name, value if shared else copy.copy(value))
        own.safety_module_in_force = safety_module
        own.training_notes = {}
        own.weights_follow = False
        return own

    def note_heads_added_later(self) -> None:
        """
        What PEFT does to the configuration that it was given once the adapter is there: name the head of a token
        classifier or of a question answering model in `modules_to_save`. The adapter's own copy needs it, too.
        """
        heads = HEADS_ADDED_LATER.get(self.task_type or "", [])
        if missing := [head for head in heads if head not in (self.modules_to_save or [])]:
            self.modules_to_save = [*(self.modules_to_save or []), *missing]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save the configuration as `adapter_config.json`, a plain LoraConfig, which PEFT reads from version 0.4.0 on;
        beside it `salora_config.json` and the safety module (`salora.safetensors`), which `load_for_training` reads,
        and a section of the model card (`README.md`).

        Args:
            save_directory (`str`): Folder to write to; created where it is missing.
            kwargs: As for [`~peft.PeftConfig.save_pretrained`]; `auto_mapping_dict` is written.
        """
        folder = Path(save_directory).absolute()  # PEFT has put the weights into a folder "~", not into the home folder
        make_folder(folder)
        check_saved_factors(folder, self.safety_module_in_force)
        self.safety_module_in_force.save(folder / DEFAULT_FILE)
        lora = self.to_lora_config().to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            lora["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_adapter_config(folder, lora)
        # Behind the files that it belongs to: PEFT has written the weights before.
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        values |= {DIGEST_KEY: adapter_digest(folder), FORM_KEY: FORM_OF_FACTORS}
        if self.training_notes:
            values[NOTES_KEY] = self.training_notes
        atomic_write(folder / CONFIG_FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
        write_training_card(folder, self, self.safety_module_in_force, self.training_notes)
