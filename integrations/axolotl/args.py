"""The `salora:` block of an Axolotl config, and what is refused when the config is validated."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

ADAPTER = "salora"

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

_NO_FSDP = (
    "Axolotl gathers and saves the raw LoRA parameters of an FSDP run, which are not SaLoRA's weights. Use DDP, or "
    "DeepSpeed ZeRO stage 1 or 2."
)
_TRAINS_BASE = "It trains base weights, which the safety module does not protect. Remove it."
_UNSUPPORTED = {
    "peft_use_dora": "DoRA's magnitude vector rescales the whole weight, safety directions included. Remove it.",
    "lora_target_parameters": "Only linear layers have outputs that the safety module protects. Name them in "
    "lora_target_modules.",
    "peft_layer_replication": "Replicated layers share weights but would need safety bases of their own. Replicate the "
    "layers in the base model first.",
    "relora": "ReLoRA merges the adapter into the base weights at every restart; SaLoRA never changes them. Remove it.",
    "gptq": "The initialization needs weights that can be dequantized. Set base_model to the model as it was before "
    "GPTQ.",
    "qlora_sharded_model_loading": "Axolotl has it for adapter: qlora only. Remove it.",
    "use_onebitllms": "Its layers have no weights that the initialization can decompose. Remove it.",
    "qat": "It changes the weights that the safety module was computed from while training. Remove it.",
    "flash_attn_fuse_mlp": "It replaces the layers that the adapter targets. Remove it.",
    "dsv4_shared_mlp_lora_kernel": "Axolotl has it for adapter: lora only. Remove it.",
    "dsv4_fp8_lora_kernel": "Axolotl has it for adapter: lora only. Remove it.",
    "fp8": "It replaces the layers of the adapter, and with them what keeps it out of the safety directions. Use bf16.",
    "unfrozen_parameters": _TRAINS_BASE,
    "lisa_step_interval": _TRAINS_BASE,
    "lisa_n_layers": _TRAINS_BASE,
    "spectrum_model_name": _TRAINS_BASE,
    "lora_fp32_gradients": "Axolotl has it for its own adapters only. Leave peft_autocast_adapter_dtype unset: the "
    "trained factors, and so their gradients, are then float32.",
    "fix_untrained_tokens": "It rewrites embeddings of the base model, which an adapter does not save. Use "
    "peft_trainable_token_indices.",
    "nvfp4_merge_aware": "It trains Axolotl's own adapters against their quantized merge. Remove it.",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
}
_UNSUPPORTED_SIZES = ("tensor_parallel_size", "expert_parallel_size")
_FUSED_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


Share = Annotated[float, Field(gt=0, lt=1)]


class MonitorOptions(BaseModel):
    """The `salora.monitor` block: options of `SafetyMonitorCallback`, whose defaults they have."""

    model_config = ConfigDict(extra="forbid")

    harmful: str | None = Field(
        default=None, description="Harmful requests: `builtin`, a file or a hub data set id. Default: builtin."
    )
    num_requests: PositiveInt | None = Field(default=None, description="How many of them. Default: 32.")
    every_steps: PositiveInt | None = Field(
        default=None, description="Measure at these steps. Default: at every evaluation."
    )
    stop_at_margin_drop: PositiveFloat | None = Field(
        default=None,
        description="Stop training once the refusal margin has fallen by this share of the base model's. Default: "
        "never.",
    )
    max_time_share: PositiveFloat | None = Field(
        default=None, description="Share of the training time that measuring may take. Default: 0.05."
    )
    batch_size: PositiveInt | None = Field(default=None, description="Requests per forward pass. Default: 16.")


class SaLoRAOptions(BaseModel):
    """The `salora:` block. Every key is optional; one that is left out has the default of `SaLoRAConfig`."""

    model_config = ConfigDict(extra="forbid")

    safety_rank: PositiveInt | Share | None = Field(
        default=None,
        description="Output directions per layer that the update may not write into, or the share of the energy that "
        "they capture, such as 0.95. Default: 32.",
    )
    variant: Literal["two-sided", "paper"] | None = Field(
        default=None, description="two-sided, or paper: the output side only. Default: two-sided."
    )
    input_safety_rank: NonNegativeInt | Share | None = Field(
        default=None,
        description="Input directions per layer that the update may not react to, or a share of the energy; 0: none. "
        "Default: those of safety_module, or a quarter of the layer's inputs, at most 256.",
    )
    safety_rank_pattern: dict[str, PositiveInt | Share] | None = Field(
        default=None, description="Module name or regular expression -> safety_rank. Default: {}."
    )
    input_safety_rank_pattern: dict[str, PositiveInt | Share] | None = Field(
        default=None, description="Module name or regular expression -> input_safety_rank. Default: {}."
    )
    safety_positions: Literal["response", "predicting", "prompt", "all"] | None = Field(
        default=None,
        description="Positions of the safety data that count: those whose input is a response token, those that "
        "predict one, those of the prompt, or all. Default: prompt, and response without an input side.",
    )
    task_rank: PositiveInt | None = Field(
        default=None, description="Task directions that `init: task` keeps. Default: 32."
    )
    init: Literal["task", "pissa", "zero"] | None = Field(
        default=None,
        description="Start of the factors. `zero` saves an adapter of rank r, the others of rank 2r. "
        "Default: zero, and task without an input side or where options of the task start are given.",
    )
    safety_data: str | list[str | dict[str, Any]] | None = Field(
        default=None,
        description="Harmful requests, with safe responses or without: `builtin`, a file (of text: a request a line), "
        "a folder, a hub data set id, or a list of requests or rows. Default: builtin.",
    )
    task_data: str | None = Field(
        default=None,
        description="Examples for `init: task`: a file, a folder or a hub data set id. Default: the training rows.",
    )
    safety_module: str | None = Field(
        default=None,
        description="A safety module computed before (a file, a folder that holds one, or a hub repository); skips "
        "calibration.",
    )
    basis_method: str | None = Field(
        default=None, description="Method that computes the safety bases; plugins can add some. Default: salora."
    )
    num_safety_samples: PositiveInt | None = Field(
        default=None, description="Safety examples to calibrate on. Default: 128."
    )
    num_task_samples: PositiveInt | None = Field(
        default=None, description="Task examples for `init: task`. Default: 128."
    )
    calibration_batch_size: PositiveInt | None = Field(
        default=None, description="Examples per forward pass of a calibration. Default: 16."
    )
    calibration_max_length: PositiveInt | None = Field(
        default=None, description="Tokens per calibration example; longer ones are cut. Default: 512."
    )
    calibration_engine: Literal["auto", "exact", "sketched"] | None = Field(
        default=None, description="Statistics as Gram matrices, as sketches, or by size. Default: auto."
    )
    calibration_cache: bool | None = Field(
        default=None, description="Reuse a calibration of the same model, data and settings. Default: True."
    )
    seed: NonNegativeInt | None = Field(
        default=None,
        description="Seed of the selection of examples and of decompositions. Default: Axolotl's `seed`, or else 0.",
    )

    monitor: bool | MonitorOptions | None = Field(
        default=None,
        description="Log the refusal margin, the KL divergence from the base model on harmful requests and the "
        "certificate at every evaluation: true, or a block of options. Default: false.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                guess = f"Did you mean salora.{close[0]}? " if close else ""
                raise ValueError(
                    f"salora.{key}: there is no such option. {guess}The options are {', '.join(cls.model_fields)}."
                )
        return data


class SaLoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's config; Axolotl makes it a base class of its own config class."""

    salora: SaLoRAOptions | None = Field(default=None, description="Options of `adapter: salora`.")
    lora_exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Modules that get no adapter although lora_target_modules or lora_target_linear matches them: "
        "names, or a regular expression. Axolotl's loader reads this key, which its own config lacks.",
    )
    inference: bool | None = Field(
        default=None, description="Set by `axolotl inference`, for `adapter: salora` to load a saved adapter as it is."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_wrong(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("adapter") == ADAPTER:
            _check_host_options(data)
        elif data.get("salora") is not None:
            raise ValueError(
                f"salora: the block has no effect with adapter: {data.get('adapter')}. Set adapter: salora, or remove "
                "the block."
            )
        return data

    @model_validator(mode="after")
    def _check_options(self) -> SaLoRAArgs:
        if getattr(self, "adapter", None) != ADAPTER:
            # Axolotl's config has no such keys: its own runs stay as they are.
            self.inference = self.lora_exclude_modules = None
            return self
        options = {} if self.salora is None else self.salora.model_dump(exclude_none=True, exclude={"monitor"})
        if not (self.inference or self.merge_lora):
            _check_files(options)
            _check_kernels(self, options)
        if "basis_method" in options:
            from ...plugins import basis_methods

            if options["basis_method"] not in basis_methods():
                raise ValueError(
                    f"salora.basis_method: {options['basis_method']} is not registered. Choose one of "
                    f"{', '.join(sorted(basis_methods()))}."
                )
        from ...config import SaLoRAConfig

        try:
            config = SaLoRAConfig(**options)
        except ValueError as error:
            raise ValueError(f"salora: {error}") from error
        if self.trl and self.trl.vllm_lora_sync and config.init != "zero":
            raise ValueError(
                f"trl.vllm_lora_sync: with salora.init: {config.init} the adapter that vLLM loads has twice the rank "
                "lora_r, which is more than `axolotl vllm-serve` makes room for. Set salora.init: zero, or remove it."
            )
        return self

    @model_validator(mode="after")
    def _reserve_quantization_config(self) -> SaLoRAArgs:
        """
        Axolotl quantizes for its own adapters only. Whatever stands in `model_kwargs` goes to `from_pretrained`
        for all of them; the values are filled in before the model is loaded, when the dtype is known.
        """
        if getattr(self, "adapter", None) == ADAPTER and (self.load_in_4bit or self.load_in_8bit):
            self.overrides_of_model_kwargs = {"quantization_config": {}, **(self.overrides_of_model_kwargs or {})}
        return self


def _check_host_options(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: An option of Axolotl that would be ignored with SaLoRA, or that would undo it.
    """
    for key, advice in _UNSUPPORTED.items():
        if data.get(key):
            raise ValueError(f"{key}: not supported with adapter: salora. {advice}")
    for key in _UNSUPPORTED_SIZES:
        if (data.get(key) or 1) > 1:
            raise ValueError(
                f"{key}: {data[key]}: not supported with adapter: salora, because every process would see only a part "
                "of the weights. Use DDP, or DeepSpeed ZeRO stage 1 or 2."
            )
    if data.get("peft_init_lora_weights") not in (None, True):
        raise ValueError(
            f"peft_init_lora_weights: {data['peft_init_lora_weights']}: not supported with adapter: salora, which "
            "initializes its factors itself. Choose salora.init: task, pissa or zero."
        )
    if ((data.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits"):
        raise ValueError(
            "peft.loftq_config: not supported with adapter: salora. LoftQ changes the base weights, which SaLoRA never "
            "does. Use load_in_4bit instead."
        )
    _check_quantization(data)
    _check_rl(data)
    if _uses_zero3(data.get("deepspeed")):
        raise ValueError(
            "deepspeed: ZeRO stage 3 is not supported with adapter: salora, because it splits the weights before "
            "SaLoRA can read them. Use ZeRO stage 1 or 2, or DDP."
        )


def _check_quantization(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A way to load the base model in which its weights cannot be read, or the kernels not be used.
    """
    kind, options = data.get("model_quantization_config"), data.get("model_quantization_config_kwargs") or {}
    if kind and not options.get("dequantize"):
        raise ValueError(
            f"model_quantization_config: {kind}: not supported with adapter: salora, which needs to read the weights. "
            "Set model_quantization_config_kwargs: {dequantize: true}, to load the model in bf16."
        )
    if data.get("nf4_backend") == "torchao":
        raise ValueError(
            "nf4_backend: torchao: not supported with adapter: salora, because Axolotl has it for adapter: qlora only. "
            "Remove it to quantize with bitsandbytes."
        )
    if data.get("load_in_4bit") and data.get("load_in_8bit"):
        raise ValueError("load_in_4bit and load_in_8bit are both set. Choose one.")
    kernels = [key for key in _FUSED_KERNELS if data.get(key)]
    if kernels and data.get("load_in_8bit"):
        raise ValueError(
            f"{kernels[0]}: Axolotl's fused kernels cannot read 8-bit weights. Remove the kernels, or use load_in_4bit "
            "instead of load_in_8bit."
        )


def _check_rl(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A combination with `rl` that does not work, of which Axolotl's own checks name their adapters only.
    """
    if data.get("rl") == "ebft":
        raise ValueError(
            "rl: ebft: not supported with adapter: salora, since its feature network has not been tried with a "
            "parametrized adapter. Use dpo, ipo, kto, orpo, simpo or grpo."
        )
    checkpointing = data.get("gradient_checkpointing") and (data.get("gradient_checkpointing_kwargs") or {})
    several = (data.get("capabilities") or {}).get("n_gpu", 1) > 1
    if data.get("rl") and data.get("load_in_4bit") and several and checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs.use_reentrant: true does not work with rl and load_in_4bit on several GPUs. "
            "Set it to false."
        )
    if data.get("nemo_gym_enabled") and (data.get("trl") or {}).get("vllm_lora_sync"):
        raise ValueError(
            "trl.vllm_lora_sync: NeMo Gym has it for adapter: lora and qlora only. Remove it, to send vLLM the merged "
            "weights."
        )


def _uses_zero3(deepspeed: Any) -> bool:
    from axolotl.utils.schemas.utils import is_deepspeed_zero3_config

    return is_deepspeed_zero3_config(deepspeed) or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def _check_files(options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A file or folder that the block names does not exist.
    """
    for key in ("safety_data", "task_data", "safety_module"):
        if isinstance(options.get(key), str) and _is_missing(key, options[key]):
            raise ValueError(
                f"salora.{key}: {options[key]}: there is no such file or folder (looked in {os.getcwd()}). Check the "
                "path."
            )

    module = options.get("safety_module")
    if module is not None and not Path(module).expanduser().exists():
        from ...safety_module import DEFAULT_FILE
        from ...support.hub import hub_file

        try:
            hub_file(module, DEFAULT_FILE, option="salora.safety_module")
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error


def _is_missing(key: str, value: str) -> bool:
    """Whether a value can only be meant as a file or folder, and there is none."""
    from ...support.hub import is_hub_id

    path = Path(value).expanduser()
    if key == "safety_module":
        return not path.exists() and not is_hub_id(value)
    from ...plugins import data_sources

    if path.exists() or value in data_sources():
        return False
    return path.suffix.lower() in _DATA_SUFFIXES or not _HUB_ID.fullmatch(value)


def _check_kernels(cfg: Any, options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: Axolotl's fused kernels would hide the layers' outputs when the training rows are looked at.
    """
    kernels = [key for key in _FUSED_KERNELS if getattr(cfg, key)]
    if not kernels or "task_data" in options or cfg.lora_model_dir:
        return
    from ...config import SaLoRAConfig

    if SaLoRAConfig(**options).init == "task":
        raise ValueError(
            f"{kernels[0]}: Axolotl attaches its fused kernels before the training rows are at hand, and they hide the "
            "outputs that the task initialization is computed from. Set salora.task_data to the file that you train "
            "on, or salora.init: pissa or zero, or remove the kernels."
        )
