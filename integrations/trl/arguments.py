"""SaLoRA's options as command-line arguments for TRL's `TrlParser`, made from `OPTIONS`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

import trl
from datasets import DatasetDict, load_dataset
from peft import PeftConfig
from transformers import Trainer
from trl import ModelConfig, ScriptArguments

from ...adapters.saved import ADAPTER_CONFIG_FILE
from ...config import CONFIG_FILE, SaLoRAConfig, without_unread_safety_data
from ...evaluation.command_line import how_to_evaluate
from ...models.loading import LoadingOptions
from ...options import OPTIONS, Option, RankPattern
from ...ranks import Rank, rank_of_text
from ...replay import RefusalAnchorCallback, mix_into_training_set
from ...replay.mixing import check_share
from ...rows.sources import named_by_a_host

_LEFT_OUT = frozenset({"seed"})  # TRL's own --seed is the run's
# What `--init` starts would not be clear among the arguments of a training script.
_NAMES = {"init": "salora_init"}
# One type for each argument. A rank is a text at first, which may be a number in a YAML file; what can be an object in
# Python is named; a mapping is JSON on the command line, and may be one in a YAML file.
_TYPES: dict[Any, Any] = {Any: str, Rank: str, RankPattern: RankPattern | str}
# argparse adds "(default: None)" to what has no default in it; this prints nothing.
_NO_DEFAULT = "%(default).0s"

OF_THE_RUN = {
    "refusal_share": "Share of the training rows that are the base model's own refusals of the requests in "
    "safety_data, with SaLoRA or any other adapter. Default: none.",
    "refusal_anchor": "Weight of the KL divergence from the base model where its refusals of the requests in "
    "safety_data begin, beside the loss, with SaLoRA or any other adapter. Default: none.",
}
"""Arguments that are the trainer's, and not options of SaLoRAConfig; see `train_on_refusals`."""


def _arguments() -> Iterator[tuple[str, Any, Any]]:
    """Name, type and field of every argument; one that is not given is None."""
    yield "use_salora", bool, field(default=False, metadata={"help": "Train a SaLoRA adapter."})
    for option in OPTIONS.values():
        if option.name not in _LEFT_OUT:
            kind = (list[str] if option.several else _TYPES.get(option.type, option.type)) | None
            yield _NAMES.get(option.name, option.name), kind, field(default=None, metadata={"help": _help(option)})

    for name, text in OF_THE_RUN.items():
        yield name, float | None, field(default=None, metadata={"help": text + _NO_DEFAULT})


def _help(option: Option) -> str:
    syntax = """ JSON, such as '{"down_proj": 64}'.""" if option.type == RankPattern else ""
    return f"{option.described()}{syntax}".replace("%", "%%") + _NO_DEFAULT


def _read_texts(arguments: Any) -> None:
    for option in OPTIONS.values():
        if not isinstance(text := getattr(arguments, option.name, None), str):
            continue
        if option.type == RankPattern:
            setattr(arguments, option.name, _mapping(option.name, text))
        elif option.type == Rank:
            setattr(arguments, option.name, rank_of_text(text))


# Any: a type checker cannot know the fields.
_Arguments: Any = make_dataclass("_Arguments", _arguments(), namespace={"__post_init__": _read_texts})


class SaLoRAArguments(_Arguments):
    """
    Options of [`SaLoRAConfig`] beside TRL's `ModelConfig`, whose `--lora_*` options apply as they do to LoRA.

    An option that is not given has SaLoRAConfig's default.

    Raises:
        ValueError: A mapping that is not given as JSON.
    """

    def given(self) -> dict[str, Any]:
        """The arguments that were given, by their names here."""
        values = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        return {name: value for name, value in values.items() if name != "use_salora" and value is not None}


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
        ValueError: A SaLoRA option without `--use_salora`, which would be ignored, or an option that SaLoRA refuses; or
            the model is a SaLoRA adapter.
    """
    _check_model(model_args)
    given = {name: value for name, value in salora_args.given().items() if name not in OF_THE_RUN}
    if not salora_args.use_salora:
        if any(getattr(salora_args, name) for name in OF_THE_RUN):
            given.pop("safety_data", None)  # whose requests are refused
        if given:
            raise ValueError(f"--{next(iter(given))} has no effect without --use_salora. Add it, or drop the option.")
        return trl.get_peft_config(model_args)
    salora_options = {option: given[name] for option in OPTIONS if (name := _NAMES.get(option, option)) in given}
    if any(getattr(salora_args, name) for name in OF_THE_RUN):
        salora_options = without_unread_safety_data(salora_options)
    for option, value in salora_options.items():
        if OPTIONS[option].several and isinstance(value, list):
            salora_options[option] = named_by_a_host(value, f"--{option}")
        # One field holds both: whole numbers are numbers of directions, fractions are shares.
        if OPTIONS[option].type == Rank and isinstance(value, float) and value.is_integer():
            salora_options[option] = int(value)
    lora_options: dict[str, Any] = {
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
    return SaLoRAConfig(**lora_options, **salora_options, tokenizer=tokenizer, seed=seed)


def _check_model(model_args: ModelConfig) -> None:
    """
    Raises:
        ValueError: A SaLoRA adapter is named as the model: transformers loads it as plain LoRA on its base model.
    """
    name = model_args.model_name_or_path
    if name is not None and (Path(name) / CONFIG_FILE).is_file():
        raise ValueError(
            f"--model_name_or_path {name} is a SaLoRA adapter, which would be trained further as plain LoRA, without "
            "its safety module. Give the trainer model=load_for_training(base_model, folder) of salora_plugins, and no "
            "peft_config; or merge the adapter, and name the result."
        )


def train_on_refusals(trainer: Trainer, salora_args: SaLoRAArguments, *, seed: int = 0) -> None:
    """
    Do what `--refusal_share` and `--refusal_anchor` say: mix the base model's own refusals into a trainer's training
    set, and add a callback for the anchor. It comes between making the trainer and `trainer.train()`.

    Args:
        trainer: Of TRL, with an adapter, of SaLoRA or another kind.
        salora_args: SaLoRA's arguments; the requests are those of `--safety_data`.
        seed: Of the choice of requests and of their order.

    Raises:
        ValueError: The trainer's rows are preferences or packed, so that nothing can be mixed into them; or see
            `mix_into_training_set` and [`RefusalAnchorCallback`].

    Example:

        >>> trainer = SFTTrainer(..., peft_config=get_peft_config(model_args, salora_args))
        >>> train_on_refusals(trainer, salora_args)
        >>> trainer.train()
    """
    requests = salora_args.safety_data or "builtin"
    if salora_args.refusal_share is not None:
        check_share(salora_args.refusal_share, "--refusal_share")
        mix_into_training_set(trainer, salora_args.refusal_share, requests, seed=seed)
    if salora_args.refusal_anchor is not None:
        trainer.add_callback(RefusalAnchorCallback(requests, weight=salora_args.refusal_anchor, seed=seed))


def say_how_to_evaluate(trainer: Trainer, model_args: ModelConfig) -> None:
    """
    Print the `salora evaluate` command for the adapter that a trainer has saved, on its main process; of a model that
    was trained as a whole, nothing.

    Args:
        trainer: After `trainer.save_model()`.
        model_args: TRL's model arguments, by which the base model was loaded.
    """
    folder = Path(trainer.args.output_dir or "")
    if not trainer.is_world_process_zero() or not (folder / ADAPTER_CONFIG_FILE).is_file():
        return
    revision = model_args.model_revision
    loading = LoadingOptions(
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        revision=None if revision == "main" else revision,
        trust_remote_code=bool(getattr(trainer.args, "trust_remote_code", False)),
    )
    print(how_to_evaluate(str(model_args.model_name_or_path), str(trainer.args.output_dir), loading), flush=True)


def _mapping(name: str, text: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"""--{name} {text}: give JSON, such as '{{"down_proj": 64}}'.""")
    return mapping


def read_dataset(script_args: ScriptArguments) -> DatasetDict:
    """
    The data set of a training script with its splits, like TRL's own scripts read it, or from a local JSON file.

    Args:
        script_args: `dataset_name` is a data set of the hub, a folder, or a JSON or JSONL file, which becomes the
            training split.

    Raises:
        ValueError: No `dataset_name`.
    """
    if script_args.dataset_name is None:
        raise ValueError("--dataset_name is missing. Name a data set of the hub, a folder, or a JSON or JSONL file.")
    if Path(script_args.dataset_name).is_file():
        return load_dataset("json", data_files={script_args.dataset_train_split: script_args.dataset_name})
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config)
