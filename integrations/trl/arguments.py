"""SaLoRA's options as command-line arguments for TRL's `TrlParser`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import trl
from datasets import DatasetDict, load_dataset
from peft import PeftConfig
from trl import ModelConfig, ScriptArguments

from ...config import SaLoRAConfig

_HELP = {option.name: option.metadata.get("help", "") for option in fields(SaLoRAConfig)}


@dataclass
class SaLoRAArguments:
    """
    Options of [`SaLoRAConfig`] beside TRL's `ModelConfig`, whose `--lora_*` options apply as they do to LoRA.

    An option that is not given has SaLoRAConfig's default.
    """

    use_salora: bool = field(default=False, metadata={"help": "Train a SaLoRA adapter."})
    safety_rank: float | None = field(default=None, metadata={"help": _HELP["safety_rank"]})
    variant: Literal["two-sided", "paper"] | None = field(default=None, metadata={"help": _HELP["variant"]})
    input_safety_rank: float | None = field(default=None, metadata={"help": _HELP["input_safety_rank"]})
    safety_positions: Literal["response", "predicting", "prompt", "all"] | None = field(
        default=None, metadata={"help": _HELP["safety_positions"]}
    )
    task_rank: int | None = field(default=None, metadata={"help": _HELP["task_rank"]})
    salora_init: Literal["task", "pissa", "zero"] | None = field(default=None, metadata={"help": _HELP["init"]})
    safety_data: str | None = field(default=None, metadata={"help": _HELP["safety_data"]})
    task_data: str | None = field(default=None, metadata={"help": _HELP["task_data"]})
    safety_module: str | None = field(default=None, metadata={"help": _HELP["safety_module"]})
    basis_method: str | None = field(default=None, metadata={"help": _HELP["basis_method"]})
    num_safety_samples: int | None = field(default=None, metadata={"help": _HELP["num_safety_samples"]})
    num_task_samples: int | None = field(default=None, metadata={"help": _HELP["num_task_samples"]})
    calibration_batch_size: int | None = field(default=None, metadata={"help": _HELP["calibration_batch_size"]})
    calibration_max_length: int | None = field(default=None, metadata={"help": _HELP["calibration_max_length"]})
    calibration_engine: Literal["auto", "exact", "sketched"] | None = field(
        default=None, metadata={"help": _HELP["calibration_engine"]}
    )
    calibration_cache: bool | None = field(default=None, metadata={"help": _HELP["calibration_cache"]})


def get_peft_config(
    model_args: ModelConfig, salora_args: SaLoRAArguments, *, tokenizer: Any = None, seed: int = 0
) -> PeftConfig | None:
    """
    The `peft_config` for a TRL trainer: like [`trl.get_peft_config`], and a [`SaLoRAConfig`] for `--use_salora`.

    Args:
        model_args: TRL's model arguments; their `lora_*` options are taken over.
        salora_args: SaLoRA's arguments.
        tokenizer: Tokenizer for the calibration; None loads the model's own.
        seed: Seed of the calibration.

    Raises:
        ValueError: A SaLoRA option without `--use_salora`, which would be ignored, or an option that SaLoRA refuses.
    """
    given = {
        option.name: getattr(salora_args, option.name)
        for option in fields(salora_args)
        if option.name != "use_salora" and getattr(salora_args, option.name) is not None
    }
    if not salora_args.use_salora:
        if given:
            raise ValueError(f"--{next(iter(given))} has no effect without --use_salora. Add it, or drop the option.")
        return trl.get_peft_config(model_args)
    for name in ("safety_rank", "input_safety_rank"):
        # One field holds both: whole numbers are numbers of directions, fractions are shares.
        if name in given and float(given[name]).is_integer():
            given[name] = int(given[name])
    if "salora_init" in given:
        given["init"] = given.pop("salora_init")
    options = {
        "task_type": model_args.lora_task_type,
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": model_args.lora_target_modules,
        "target_parameters": getattr(model_args, "lora_target_parameters", None),
        "modules_to_save": model_args.lora_modules_to_save,
        "use_rslora": model_args.use_rslora,
        "use_dora": model_args.use_dora,
    }
    return SaLoRAConfig(**options, **given, tokenizer=tokenizer, seed=seed)


def read_dataset(script_args: ScriptArguments) -> DatasetDict:
    """
    The data set of a training script with its splits, like TRL's own scripts read it, or from a local JSON file.

    Args:
        script_args: `dataset_name` is a data set of the hub, a folder, or a JSON or JSONL file, which becomes the
            training split.
    """
    if Path(script_args.dataset_name).is_file():
        return load_dataset("json", data_files={script_args.dataset_train_split: script_args.dataset_name})
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config)
