"""A trainer callback that takes the task initialization from the training set."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...evaluation.monitor import warn_of_another_template
from ...tuner import SaLoRAModel


class TaskInitializationCallback(TrainerCallback):
    """
    Set SaLoRA's task initialization from `num_task_samples` rows of the training set, before the first step.

    Without it the initialization comes from the first training batch, which is enough for most; with it, from as
    many rows as the paper uses. A resumed run keeps the factors of its checkpoint. It warns if the trainer renders with
    another chat template than the adapter was calibrated with.

    Example:

        >>> SFTTrainer(..., peft_config=SaLoRAConfig(), callbacks=[TaskInitializationCallback()])
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, SaLoRAModel):
            raise ValueError("TaskInitializationCallback needs a trainer with peft_config=SaLoRAConfig(...).")
        if train_dataloader is None:
            raise ValueError("TaskInitializationCallback needs a trainer with a training set.")
        warn_of_another_template(model, kwargs.get("processing_class"))
        for adapter_name in model.base_model.waiting_for_task_data:
            model.base_model.initialize_from_task_data(train_dataloader.dataset, adapter_name)
