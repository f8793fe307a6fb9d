"""`adapter: salora` for Axolotl. Installed plugins are imported in every run, so nothing heavy is imported here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...support.hosts import explained, in_use, warn_of_unsupported

with explained("axolotl"):
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
    from axolotl.utils.logging import get_logger

    from .args import ADAPTER
    from .checkpoints import checkpoint_to_resume_from, pass_over_incomplete_checkpoints
    from .translation import as_initialized, in_the_terms_of_the_file, salora_config, warn_about_differences

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from ...config import SaLoRAConfig

LOG = get_logger(__name__)


class SaLoRAPlugin(BasePlugin):
    """
    Builds SaLoRA adapters from Axolotl's config. In runs with another adapter it warns where one of SaLoRA is trained
    further, and does nothing else.
    """

    _is_trained = False
    """Whether the run got to its end: Axolotl calls `post_train_unload` after one that failed, too."""

    def get_input_args(self) -> str:
        return "salora_plugins.integrations.axolotl.args.SaLoRAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse what can only be told once the model's type is known, and quantize the base if asked to."""
        if cfg.adapter != ADAPTER:
            return
        warn_of_unsupported(*in_use())
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
            pass_over_incomplete_checkpoints(cfg)
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
            from .attention import attach_plain_projections

            attach_plain_projections(model, cfg)
        if inference or cfg.inference or cfg.merge_lora:
            return _load_for_inference(model, cfg)
        if config_only:
            return None, salora_config(model, cfg)

        adapted = _load_for_training(model, cfg)
        if cfg.local_rank in (None, 0):
            adapted.print_trainable_parameters()
        return adapted, as_initialized(_config_of(adapted))

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Take the task initialization from the prepared training rows, and then mix refusals into them."""
        if cfg.adapter != ADAPTER:
            _warn_of_training_unprotected(cfg)
            return
        if not (cfg.lora_model_dir or checkpoint_to_resume_from(cfg)):
            _initialize_from_training_rows(trainer)
        share = (cfg.salora or {}).get("refusal_share")
        if share:
            from ...replay import mix_into_training_set
            from .log import show_in_hosts_log

            show_in_hosts_log()  # the loggers of what is imported only now, too
            with _as_key("salora.refusal_share"):
                mix_into_training_set(trainer, share, _requests(cfg), seed=cfg.seed or 0, max_length=cfg.sequence_len)

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """The refusal anchor and the safety monitor, where the block asks for them."""
        block = (cfg.salora or {}) if cfg.adapter == ADAPTER else {}
        callbacks: list[TrainerCallback] = []
        if block.get("refusal_anchor"):
            from ...replay import RefusalAnchorCallback

            with _as_key("salora.refusal_anchor"):
                options = _given(block["refusal_anchor"])
                callbacks.append(RefusalAnchorCallback(_requests(cfg), seed=cfg.seed or 0, **options))
        if block.get("monitor"):
            from ...evaluation.monitor import SafetyMonitorCallback

            with _as_key("salora.monitor"):
                callbacks.append(SafetyMonitorCallback(trainer, **_given(block["monitor"])))
        return callbacks

    def post_train(self, cfg: DictDefault, model: PreTrainedModel | PeftModel) -> None:
        """Note that the training is through."""
        self._is_trained = True

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Put our part into the model card, which Axolotl has written anew, and say how to measure the result."""
        is_trained, self._is_trained = self._is_trained, False
        if is_trained and cfg.adapter == ADAPTER and cfg.local_rank in (None, 0):
            from .after_training import renew_card, say_how_to_evaluate

            renew_card(cfg)
            say_how_to_evaluate(cfg)


def _warn_of_training_unprotected(cfg: DictDefault) -> None:
    """A saved SaLoRA adapter is plain LoRA, so that Axolotl trains it further as such, without a word."""
    from ...config import CONFIG_FILE

    for key in ("lora_model_dir", "resume_from_checkpoint"):
        folder = cfg[key]
        if isinstance(folder, str) and (Path(folder) / CONFIG_FILE).is_file():
            LOG.warning(
                f"{key}: {folder} is a SaLoRA adapter, and adapter: {cfg.adapter} trains it further without its safety "
                "module: nothing keeps the refusals. Set adapter: salora."
            )


def _given(options: Any) -> dict[str, Any]:
    """What stands in a block of options, which may be `true`."""
    return {} if options is True else {key: value for key, value in options.items() if value is not None}


def _requests(cfg: DictDefault) -> Any:
    return (cfg.salora or {}).get("safety_data") or "builtin"


@contextmanager
def _as_key(key: str) -> Iterator[None]:
    """Say of errors which key of the file they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _initialize_from_training_rows(trainer: Trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = _config_of(model)
    if config.init != "task" or config.task_data is not None:
        return
    from ...rows.errors import DataError

    rows = _some_rows(trainer.train_dataset, config.num_task_samples, config.seed)
    try:
        model.base_model.initialize_from_task_data(rows)
    except DataError as error:
        LOG.warning(f"The task initialization will come from the first training batch, not from the rows: {error}")


def _load_for_training(model: PreTrainedModel, cfg: DictDefault) -> PeftModel:
    """The model with a new adapter, or with the one that `lora_model_dir` names."""
    from peft import get_peft_model

    from ...resuming import load_for_training

    options = {}
    if cfg.peft_autocast_adapter_dtype is not None:
        options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
    if cfg.lora_model_dir:
        adapted = load_for_training(model, cfg.lora_model_dir, **options)
        warn_about_differences(cfg, _config_of(adapted))
        return adapted
    with in_the_terms_of_the_file():
        return get_peft_model(model, salora_config(model, cfg), **options)


def _config_of(model: PeftModel) -> SaLoRAConfig:
    from ...config import SaLoRAConfig

    config = model.peft_config["default"]
    if not isinstance(config, SaLoRAConfig):
        raise TypeError(f"adapter: salora: the model has an adapter of type {config.peft_type}.")
    return config


def _load_for_inference(
    model: PreTrainedModel, cfg: DictDefault
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """A saved adapter is plain LoRA: Axolotl's own loader has all that is needed."""
    if not cfg.lora_model_dir:
        LOG.warning("lora_model_dir is not set: this is the base model, without an adapter.")
        return model, None
    from axolotl.loaders import load_lora

    return load_lora(model, cfg, inference=True)


def _refuse_embeddings(cfg: DictDefault) -> None:
    # Private part of Axolotl: what the embedding is called in models of this type.
    from axolotl.loaders.utils import get_linear_embedding_layers

    targets = cfg.lora_target_modules
    targets = [targets] if isinstance(targets, str) else targets or []
    embedding = get_linear_embedding_layers(cfg.model_config_type)[0]
    if embedding in targets:
        raise ValueError(
            f"lora_target_modules: {embedding} is an embedding, which adapter: salora does not support. Target linear "
            "layers only."
        )


def _trainer_builds_adapter(cfg: DictDefault) -> bool:
    return cfg.rl in ("dpo", "ipo", "kto") and not cfg.merge_lora and not cfg.inference


def _some_rows(dataset: Any, count: int, seed: int) -> Any:
    """A few rows, the same on every rank; of a stream the first ones."""
    if not hasattr(dataset, "select"):
        return list(islice(dataset, count))
    order = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    return dataset.select(sorted(order))
