"""`adapter: salora` for Axolotl. Installed plugins are imported in every run, so nothing heavy is imported here."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.logging import get_logger

from .args import ADAPTER

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from ...config import SaLoRAConfig

LOG = get_logger(__name__)


class SaLoRAPlugin(BasePlugin):
    """Builds SaLoRA adapters from Axolotl's config; does nothing in runs with another adapter."""

    def get_input_args(self) -> str:
        return "salora_plugins.integrations.axolotl.args.SaLoRAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse what can only be told once the model's type is known, and quantize the base if asked to."""
        if cfg.adapter != ADAPTER:
            return
        from .log import show_in_hosts_log

        show_in_hosts_log()
        _refuse_embeddings(cfg)
        if _trainer_builds_adapter(cfg) and cfg.lora_model_dir:
            raise ValueError(
                f"lora_model_dir: with rl: {cfg.rl.value} Axolotl lets the trainer build a new adapter and would "
                f"ignore {cfg.lora_model_dir}. Merge it first (axolotl merge-lora) and set base_model to it, or "
                "remove lora_model_dir."
            )
        if not (cfg.inference or cfg.merge_lora):
            _choose_checkpoint(cfg)
        from .quantization import fill_in_quantization_config

        fill_in_quantization_config(cfg)

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Prepare a quantized base for training, as Axolotl does for its own adapters."""
        if cfg.adapter != ADAPTER or cfg.inference or cfg.merge_lora:
            return
        if not (cfg.load_in_4bit or cfg.load_in_8bit) or cfg.model_config_type == "qwen":
            return  # Axolotl leaves the first Qwen as it is, too
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(cfg.gradient_checkpointing))

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None] | None:
        """Build the adapter, load a saved one, or (`config_only`) only describe it to the trainer that builds it."""
        if cfg.adapter != ADAPTER:
            return None
        from .quantization import check_quantized, refuse_nvfp4

        check_quantized(model, cfg)
        refuse_nvfp4(model)
        if cfg.unfrozen_parameters:
            raise ValueError(
                "unfrozen_parameters: a plugin (Spectrum is one) has set it, to train base weights, which the safety "
                "module does not protect. Remove the plugin."
            )
        if cfg.lora_qkv_kernel or cfg.lora_o_kernel:
            _attach_plain_projections(model, cfg)
        if inference or cfg.inference or cfg.merge_lora:
            return _load_for_inference(model, cfg)
        if config_only:
            return None, salora_config(model, cfg)

        from peft import get_peft_model

        from ...resuming import load_for_training

        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            model = load_for_training(model, cfg.lora_model_dir, **options)
            _warn_about_differences(cfg, model.peft_config["default"])
        else:
            with in_the_terms_of_the_file():
                model = get_peft_model(model, salora_config(model, cfg), **options)
        if cfg.local_rank in (None, 0):
            model.print_trainable_parameters()
        return model, _as_initialized(model.peft_config["default"])

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Take the task initialization from the prepared training rows."""
        if cfg.adapter != ADAPTER or cfg.lora_model_dir or _checkpoint(cfg):
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = model.peft_config["default"]
        if config.init != "task" or config.task_data is not None:
            return
        from ...rows.reading import DataError

        rows = _some_rows(trainer.train_dataset, config.num_task_samples, config.seed)
        try:
            model.base_model.initialize_from_task_data(rows)
        except DataError as error:
            LOG.warning(f"The task initialization will come from the first training batch, not from the rows: {error}")

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """The safety monitor, where `salora.monitor` asks for it."""
        monitor = (cfg.salora or {}).get("monitor") if cfg.adapter == ADAPTER else None
        if not monitor:
            return []
        from ...evaluation.monitor import SafetyMonitorCallback

        options = {} if monitor is True else {key: value for key, value in monitor.items() if value is not None}
        try:
            return [SafetyMonitorCallback(trainer, **options)]
        except ValueError as error:
            raise ValueError(f"salora.monitor: {error}") from error


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
    options.update({key: value for key, value in (cfg.salora or {}).items() if key != "monitor"})
    checkpoint = _checkpoint(cfg)
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


def _as_initialized(config: SaLoRAConfig) -> SaLoRAConfig:
    """What Axolotl is told of the adapter: it draws `lora_A` anew by the seed where there is no start to lose."""
    told = copy.copy(config)
    told.init_lora_weights = config.init == "zero"
    return told


def _warn_about_other_templates(cfg: DictDefault, tokenizer: Any) -> None:
    """The safety data is rendered as the tokenizer renders; a data set may have a template of its own."""
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


def _load_for_inference(
    model: PreTrainedModel, cfg: DictDefault
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """A saved adapter is plain LoRA: Axolotl's own loader has all that is needed."""
    if not cfg.lora_model_dir:
        LOG.warning("lora_model_dir is not set: this is the base model, without an adapter.")
        return model, None
    from axolotl.loaders import load_lora

    return load_lora(model, cfg, inference=True)


def _attach_plain_projections(model: PreTrainedModel, cfg: DictDefault) -> None:
    """
    Let the model run before Axolotl has attached its fused kernels.

    Axolotl has rewritten the attention to call `apply_qkv` and `apply_o`, but sets them only once there is an adapter;
    calibration comes before. These are the stand-ins that Axolotl itself uses for layers without a kernel.
    """
    from types import MethodType

    from axolotl.monkeypatch.lora_kernels import (
        get_attention_cls_from_config,
        original_apply_o,
        original_apply_qkv_optional_v,
    )

    attention = get_attention_cls_from_config(cfg)
    for module in model.modules():
        if isinstance(module, attention):
            module.apply_qkv = MethodType(original_apply_qkv_optional_v, module)
            module.apply_o = MethodType(original_apply_o, module)


def _trainer_builds_adapter(cfg: DictDefault) -> bool:
    return cfg.rl in ("dpo", "ipo", "kto") and not cfg.merge_lora and not cfg.inference


def _refuse_embeddings(cfg: DictDefault) -> None:
    from axolotl.loaders.utils import get_linear_embedding_layers

    targets = cfg.lora_target_modules
    targets = [targets] if isinstance(targets, str) else targets or []
    embedding = get_linear_embedding_layers(cfg.model_config_type)[0]
    if embedding in targets:
        raise ValueError(
            f"lora_target_modules: {embedding} is an embedding, which adapter: salora does not support. Target linear "
            "layers only."
        )


def _checkpoint(cfg: DictDefault) -> str | None:
    """The checkpoint that training will resume from."""
    from axolotl.utils.train import determine_last_checkpoint

    return determine_last_checkpoint(cfg)


def _choose_checkpoint(cfg: DictDefault) -> None:
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


def _some_rows(dataset: Any, count: int, seed: int) -> Any:
    """A few rows, the same on every rank; of a stream the first ones."""
    if not hasattr(dataset, "select"):
        return list(islice(dataset, count))
    order = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    return dataset.select(sorted(order))


def _warn_about_differences(cfg: DictDefault, saved: SaLoRAConfig) -> None:
    """A loaded adapter keeps its own options; say so where the YAML file has others."""
    given = {"lora_r": (cfg.lora_r, saved.r), "lora_alpha": (cfg.lora_alpha, saved.lora_alpha)}
    for name in ("variant", "safety_rank", "input_safety_rank", "task_rank", "init"):
        given[f"salora.{name}"] = ((cfg.salora or {}).get(name), getattr(saved, name))
    for key, (value, saved_value) in given.items():
        if value is not None and value != saved_value:
            LOG.warning(
                f"{key}: {value} is ignored: the adapter in {cfg.lora_model_dir} was made with {saved_value} and keeps "
                "it."
            )
