"""What the `salora:` block names or asks for, checked when the config is validated: files, methods, the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .host_options import FUSED_KERNELS, uses_zero3

if TYPE_CHECKING:
    from ...config import SaLoRAConfig


OF_THE_RUN = ("monitor", "refusal_share", "refusal_anchor")
"""Keys of the block that are the trainer's, and not options of `SaLoRAConfig`."""


def options_of_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """
    The options of `SaLoRAConfig` in the block. `safety_data` is not among them where the run trains on refusals of its
    requests and the basis method reads none.
    """
    from ...config import without_unread_safety_data

    options = {key: value for key, value in block.items() if key not in OF_THE_RUN}
    on_refusals = ("basis_method" in options or options.get("variant") == "sails") and (
        block.get("refusal_share") or block.get("refusal_anchor")
    )
    return without_unread_safety_data(options) if on_refusals else options


def check_files(options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A file or folder that the block names does not exist.
    """
    for key in ("safety_data", "task_data", "utility_data", "contrastive_data", "safety_module", "unaligned_model"):
        for name in _names(key, options.get(key)):
            if _is_missing(key, name):
                raise ValueError(
                    f"salora.{key}: {name}: there is no such file or folder (looked in {os.getcwd()}). Check the path."
                )
    module = options.get("safety_module")
    if module is not None and not Path(module).expanduser().exists():
        from ...safety_module import DEFAULT_FILE
        from ...support.hub import hub_file

        try:
            hub_file(module, DEFAULT_FILE, option="salora.safety_module")
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error


def check_adapter_folder(cfg: Any) -> None:
    """
    Raises:
        ValueError: `lora_model_dir` names no saved SaLoRA adapter, as far as this machine can tell.
    """
    from ...adapters.saved import adapter_within
    from ...config import CONFIG_FILE
    from ...support.hub import is_hub_id

    if not cfg.lora_model_dir or cfg.rl:  # what is refused of preference training is told later, with its reason
        return
    folder = Path(cfg.lora_model_dir).expanduser()
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
        within = adapter_within(folder, CONFIG_FILE)
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir} has no {CONFIG_FILE}, so that it is no SaLoRA adapter to train "
            f"further. {within or 'Name the output_dir of a run with adapter: salora, or take adapter: lora.'}"
        )
    if not folder.is_dir() and not is_hub_id(cfg.lora_model_dir):
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir}: there is no such folder (looked in {os.getcwd()}). Check the path."
        )


def _names(key: str, value: Any) -> list[str]:
    """The sources that a key names: one, several, or none where it holds rows."""
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    from ...rows.sources import sources_of

    return [str(source) for source in sources_of(value, f"salora.{key}") or ()]


def _is_missing(key: str, value: str) -> bool:
    """Whether a value can only be meant as a file or folder, and there is none."""
    from ...support.hub import is_dataset_id, is_hub_id, is_model_name

    path = Path(value).expanduser()
    if key == "safety_module":
        return not path.exists() and not is_hub_id(value)
    if key == "unaligned_model":
        return not path.is_dir() and not (is_hub_id(value) or is_model_name(value))
    from ...plugins import data_sources
    from ...rows.sources import SUFFIXES

    if path.exists() or value in data_sources():
        return False
    return path.suffix.lower() in SUFFIXES or not is_dataset_id(value)


def check_basis_method(options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: The block names a method that no plugin has registered.
    """
    if "basis_method" not in options:
        return
    from ...plugins import basis_methods

    if options["basis_method"] not in basis_methods():
        raise ValueError(
            f"salora.basis_method: {options['basis_method']} is not registered. Choose one of "
            f"{', '.join(sorted(basis_methods()))}."
        )


def as_config(options: Mapping[str, Any]) -> SaLoRAConfig:
    """
    The block alone as a configuration, to check its values together.

    Raises:
        ValueError: They contradict one another.
    """
    from ...config import SaLoRAConfig

    try:
        return SaLoRAConfig(**options)
    except ValueError as error:
        raise ValueError(f"salora: {error}") from error


def check_kernels(cfg: Any, config: SaLoRAConfig) -> None:
    """
    Raises:
        ValueError: Axolotl's fused kernels would hide the layers' outputs when the training rows are looked at.
    """
    kernels = [key for key in FUSED_KERNELS if getattr(cfg, key)]
    if kernels and config.init == "task" and config.task_data is None and not cfg.lora_model_dir:
        raise ValueError(
            f"{kernels[0]}: Axolotl attaches its fused kernels before the training rows are at hand, and they hide the "
            "outputs that the task initialization is computed from. Set salora.task_data to the file that you train "
            "on, or salora.init: pissa or zero, or remove the kernels."
        )


def check_sharded(cfg: Any, config: SaLoRAConfig) -> None:
    """
    Raises:
        ValueError: The block asks for what needs a model that can be run before it is trained, and ZeRO 3 shards it.
    """
    if not uses_zero3(cfg.deepspeed):
        return
    if config.init == "task" and not cfg.lora_model_dir:
        raise ValueError(
            "salora.init: task: ZeRO stage 3 shards the weights before the training rows can be run through them. Set "
            "salora.init: zero or pissa, or use ZeRO stage 1 or 2."
        )
    if getattr(cfg.salora, "refusal_share", None):
        raise ValueError(
            "salora.refusal_share: ZeRO stage 3 shards the weights before the model can answer. Remove it, or use ZeRO "
            "stage 1 or 2."
        )


def check_refusals(cfg: Any) -> None:
    """
    Raises:
        ValueError: The block asks for refusals in a run that cannot be trained on them.
    """
    share, anchor = (getattr(cfg.salora, key, None) for key in ("refusal_share", "refusal_anchor"))
    classifies = _first_set(cfg, "reward_model", "process_reward_model")
    streamed = _first_set(cfg, "streaming", "pretraining_dataset")
    if (share or anchor) and classifies:
        raise ValueError(
            f"{classifies}: a model that rates answers gives none, so that there are no refusals of its own. Remove "
            f"salora.{'refusal_share' if share else 'refusal_anchor'}."
        )
    if share and cfg.rl:
        raise ValueError(
            f"salora.refusal_share: with rl: {getattr(cfg.rl, 'value', cfg.rl)} there are no rows of one answer that "
            "refusals could be mixed into. Set salora.refusal_anchor: true instead."
        )
    if share and streamed:
        raise ValueError(
            f"salora.refusal_share: with {streamed} the number of rows is not known, of which refusals could be a "
            f"share. Remove {streamed}, or set salora.refusal_anchor: true instead."
        )
    sharded = {"DeepSpeed": cfg.deepspeed, "FSDP": cfg.fsdp_config}
    if anchor and (host := next((name for name, options in sharded.items() if options), None)):
        raise ValueError(
            f"salora.refusal_anchor: under {host}, a gradient that is made before the step's own would not arrive. "
            "Use DDP, or set salora.refusal_share instead."
        )
    if anchor and (getattr(cfg, "context_parallel_size", None) or 1) > 1:
        raise ValueError(
            f"salora.refusal_anchor: with context_parallel_size: {cfg.context_parallel_size} every process would see a "
            "part of its own request and take it for one of a common sequence. Remove context_parallel_size, or set "
            "salora.refusal_share instead."
        )


def _first_set(cfg: Any, *keys: str) -> str | None:
    return next((key for key in keys if getattr(cfg, key, None)), None)


def check_rank_for_vllm(cfg: Any, config: SaLoRAConfig) -> None:
    """
    Raises:
        ValueError: The adapter that is sent to vLLM would have a higher rank than it is told.
    """
    if cfg.trl and cfg.trl.vllm_lora_sync and config.init != "zero":
        raise ValueError(
            f"trl.vllm_lora_sync: with salora.init: {config.init} the adapter that vLLM loads has twice the rank "
            "lora_r, which is more than `axolotl vllm-serve` makes room for. Set salora.init: zero, or remove it."
        )
