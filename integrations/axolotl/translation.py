"""Axolotl's config in the terms of `SaLoRAConfig`, and messages in the terms of Axolotl's config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from axolotl.utils.logging import get_logger

from ...options import OF_BASIS_METHODS
from .block_checks import options_of_block
from .checkpoints import checkpoint_to_resume_from

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from transformers import PreTrainedModel

    from ...config import SaLoRAConfig

LOG = get_logger(__name__)


def salora_config(model: PreTrainedModel, cfg: DictDefault) -> SaLoRAConfig:
    """
    Translate Axolotl's config.

    Everything that LoRA has, too, is translated by Axolotl itself, so that no option of either is forgotten.

    Args:
        model: The base model; `lora_target_linear` is resolved on it.
        cfg: Axolotl's config, after validation.
    """
    from axolotl.loaders import load_lora, load_tokenizer

    from ...config import SaLoRAConfig

    _, lora = load_lora(model, cfg, config_only=True)
    options = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if f.init and f.name != "peft_type"}
    for name in ("r", "lora_alpha", "target_modules"):
        if not options[name]:
            del options[name]  # not in the YAML file: SaLoRAConfig's default
    options["seed"] = cfg.seed or 0
    options.update(options_of_block(cfg.salora or {}))
    checkpoint = checkpoint_to_resume_from(cfg)
    if checkpoint:
        options["safety_module"] = checkpoint  # the weights there belong to this one
    tokenizer = load_tokenizer(cfg)
    if "safety_module" not in options:
        _warn_about_other_templates(cfg, tokenizer)
    return SaLoRAConfig(**options, tokenizer=tokenizer)


@contextmanager
def in_the_terms_of_the_file() -> Iterator[None]:
    """Say of errors that advise PEFT's options what those are called in Axolotl's config."""
    try:
        yield
    except ValueError as error:
        if "exclude_modules" not in str(error):
            raise
        raise ValueError(
            f"{error} (In the YAML file: lora_exclude_modules and lora_target_modules, each a list of names, or one "
            "regular expression for whole module names.)"
        ) from error


def as_initialized(config: SaLoRAConfig) -> SaLoRAConfig:
    """What Axolotl is told of the adapter: it draws `lora_A` anew by the seed where there is no start to lose."""
    told = copy.copy(config)
    told.init_lora_weights = config.init == "zero"
    return told


def warn_about_differences(cfg: DictDefault, saved: SaLoRAConfig) -> None:
    """A loaded adapter keeps its own options; say so where the YAML file has others."""
    given = {"lora_r": (cfg.lora_r, saved.r), "lora_alpha": (cfg.lora_alpha, saved.lora_alpha)}
    # Not the data: a saved configuration does not have it.
    of_method = [name for name in OF_BASIS_METHODS if name not in ("utility_data", "contrastive_data")]
    for name in ("variant", "safety_rank", "input_safety_rank", "task_rank", "init", "basis_method", *of_method):
        given[f"salora.{name}"] = ((cfg.salora or {}).get(name), getattr(saved, name))
    for key, (value, saved_value) in given.items():
        if value is not None and value != saved_value:
            LOG.warning(
                f"{key}: {value} is ignored: the adapter in {cfg.lora_model_dir} was made with {saved_value} and keeps "
                "it."
            )


def _warn_about_other_templates(cfg: DictDefault, tokenizer: Any) -> None:
    """The safety data is rendered as the tokenizer renders; a data set may have a template of its own."""
    # Private part of Axolotl: what a data set's own key resolves to, to compare it with the tokenizer's template.
    from axolotl.utils.chat_templates import get_chat_template_from_config

    for dataset in cfg.datasets or []:
        own = dataset.get("chat_template")
        if own in (None, "tokenizer_default") or not str(dataset.get("type")).startswith("chat_template"):
            continue
        if get_chat_template_from_config(cfg, ds_cfg=dataset, tokenizer=tokenizer) != tokenizer.chat_template:
            LOG.warning(
                f"{dataset.get('path')}: chat_template: {own} is not the tokenizer's chat template, with which the "
                "safety data is rendered. Set chat_template for the whole config, to calibrate with it, too."
            )
