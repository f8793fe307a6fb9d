"""LoRA's options: which of them SaLoRA leaves their meaning, and what their values may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .support.texts import how_to_write, shortened

# LoRA options that SaLoRA leaves their meaning. Every other option of the installed PEFT changes what the two
# factors compute, so it is refused rather than ignored; a list of what is allowed also covers options to come.
COMPATIBLE_LORA_FIELDS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "ensure_weight_tying",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    }
)

WHAT_TO_USE_INSTEAD = {
    "init_lora_weights": "SaLoRA initializes its factors itself: leave it at True and choose init='task', 'pissa' or "
    "'zero'.",
    "use_dora": "DoRA's magnitude vector rescales the whole weight, safety directions included: set use_dora=False.",
    "target_parameters": "Only linear layers have the outputs that the safety module protects: name them in "
    "target_modules.",
    "lora_bias": "A bias on lora_B would be trained outside the safety module: set lora_bias=False.",
    "layer_replication": "Replicated layers share their weights but need safety bases of their own: replicate the "
    "layers in the base model first.",
}

# Of the entries of a LoRA configuration that are needed to read an adapter or to train it: what they may be.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "lora_alpha": (lambda value: _is_number(value) and -math.inf < value < math.inf, "a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a share"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a text"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save"),
        (lambda value: value is None or isinstance(value, str) or _all_texts(value), "a text or a list of texts"),
    ),
}
# And of the others that a configuration may have.
_OF_CONFIGURATIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **_ENTRIES,
    "bias": (lambda value: isinstance(value, str) and value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "layers_to_transform": (lambda value: value is None or _all_numbers(value), "a layer's number or a list of them"),
    "trainable_token_indices": (
        lambda value: value is None or _are_tokens(value),
        "a list of tokens' numbers or a mapping of modules to such",
    ),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"),
        (lambda value: value is None or isinstance(value, Mapping), "a mapping of modules to numbers"),
    ),
    **dict.fromkeys(
        ("fan_in_fan_out", "inference_mode", "ensure_weight_tying"),
        (lambda value: value is None or isinstance(value, bool), "true or false"),
    ),
    **dict.fromkeys(
        ("task_type", "revision"),
        (lambda value: value is None or isinstance(value, str), "a text"),
    ),
    "layers_pattern": (
        lambda value: value is None or isinstance(value, str) or _all_texts(value),
        "a text or a list of texts",
    ),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(part, str) for part in value)


def _all_numbers(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple, range)) else [value]
    return all(isinstance(part, int) and not isinstance(part, bool) for part in parts)


def _are_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(tokens, (list, tuple, range)) and _all_numbers(tokens) for tokens in lists)


def check_lora_options(config: Any) -> None:
    """
    Args:
        config: With LoRA's options as its attributes, as they were given.

    Raises:
        ValueError: One of them is of a kind that PEFT would stumble over later, or train with another meaning.
    """
    for option, (valid, wanted) in _OF_CONFIGURATIONS.items():
        value = getattr(config, option, None)
        if not valid(value):
            raise ValueError(f"{option}={shortened(value)}: give {wanted}{how_to_write(value)}.")
    for option, kind in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        valid, wanted = _ENTRIES[kind]
        for key, value in (getattr(config, option, None) or {}).items():
            if not isinstance(key, str):
                raise ValueError(f"{option}: {shortened(key)} is no text. Give module names or regular expressions.")
            if not valid(value):
                raise ValueError(f"{option}[{key!r}]={shortened(value)}: give {wanted}{how_to_write(value)}.")


def check_lora_entries(config: dict[str, Any], file: Path) -> None:
    """
    Raises:
        ValueError: The file has an entry that no PEFT writes; file and entry are named.
    """

    def check(option: str, kind: str, value: Any) -> None:
        valid, wanted = _ENTRIES[kind]
        if not valid(value):
            raise ValueError(f"{file}: {option} is {value!r:.80}, not {wanted}. Save the adapter again.")

    for option in _ENTRIES:
        if option in config:
            check(option, option, config[option])
    for option, kind in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(option)
        if pattern is not None and not isinstance(pattern, dict):
            raise ValueError(f"{file}: {option} is {pattern!r:.80}, not a mapping of modules to numbers.")
        for key, value in (pattern or {}).items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{file}: {option}: {key!r} is no regular expression ({error}).") from error
            check(f"{option}[{key!r}]", kind, value)
