"""What the tests of TRL's and transformers' trainers share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from certificate import largest_share_inside
from tiny import refusal_rows, relative_difference, salora_config, token_batch

config = partial(salora_config, lora_alpha=4, safety_data=refusal_rows())


def arguments(kind: type[TrainingArguments], output_dir: str | Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(**{**defaults, **options})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor | None = None) -> Tensor:
    """In evaluation mode, of a model on any device."""
    tokens = token_batch() if tokens is None else tokens
    device = next(model.parameters()).device
    return model.eval()(input_ids=tokens.to(device)).logits.float()


def check_result(
    trainer: Trainer, base: PreTrainedModel, output_dir: str | Path, *, tolerance: float = 1e-5
) -> PeftModel:
    """
    The base is untouched, the saved adapter is plain LoRA with the model's logits, and the certificate holds.

    Args:
        trainer: After training.
        base: The base model, loaded anew.
        output_dir: Where to save the adapter.
        tolerance: Largest relative difference of the reloaded model's logits.

    Returns:
        The reloaded model.
    """
    trainer.save_model(str(output_dir))
    # Without the autocast of mixed precision.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    expected = logits_of(base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    trained = logits_of(model)
    assert relative_difference(trained, expected) > 1e-3
    reloaded = PeftModel.from_pretrained(base, str(output_dir))
    assert relative_difference(logits_of(reloaded), trained) < tolerance
    assert largest_share_inside(output_dir) <= 1e-5
    return reloaded
