"""Options of Axolotl that are refused with `adapter: salora`: they would be ignored, or undo it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
}
_UNSUPPORTED_SIZES = ("tensor_parallel_size", "expert_parallel_size")
FUSED_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""Keys of Axolotl's fused LoRA kernels."""


def check_host_options(data: Mapping[str, Any]) -> None:
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
    for key in ("lora_r", "lora_alpha"):
        if data.get(key) == 0:
            raise ValueError(
                f"{key}: 0: nothing would be trained. Give at least 1, or leave it out for the default, 16."
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
    _check_fsdp(data)
    check_rl(data)
    if uses_zero3(data.get("deepspeed")) and not _gathers_when_saving(data.get("deepspeed")):
        raise ValueError(
            f"deepspeed: {data['deepspeed']}: ZeRO stage 3 saves an adapter only with "
            "stage3_gather_16bit_weights_on_model_save in its zero_optimization. Set it to true, as "
            "examples/deepspeed-zero3.json does."
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
    kernels = [key for key in FUSED_KERNELS if data.get(key)]
    if kernels and data.get("load_in_8bit"):
        raise ValueError(
            f"{kernels[0]}: Axolotl's fused kernels cannot read 8-bit weights. Remove the kernels, or use load_in_4bit "
            "instead of load_in_8bit."
        )


def _check_fsdp(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A way to run FSDP2 in which the processes would not have what the adapter computes with.
    """
    options = data.get("fsdp_config") or {}
    if not options:
        return
    for key in ("cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading"):
        if options.get(key):
            raise ValueError(
                f"fsdp_config.{key}: true: not supported with adapter: salora, whose layers keep more than weights: it "
                "would not be handed out by the first process. Set it to false, as examples/axolotl-fsdp2.yml does."
            )
    found = options.get("state_dict_type", options.get("fsdp_state_dict_type"))
    if found != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_config.state_dict_type: {found or 'not set'}: adapter: salora saves an adapter whole, and "
            "checkpoints in shards, accelerate's default, would fail. Set it to FULL_STATE_DICT, as "
            "examples/axolotl-fsdp2.yml does."
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if data.get(key):
            raise ValueError(
                f"{key}: not supported with adapter: salora and fsdp_config, because Axolotl prepares a quantized base "
                "for FSDP with its own adapters only. Remove it, or use DDP or DeepSpeed ZeRO stage 1 or 2."
            )


def check_rl(data: Mapping[str, Any]) -> None:
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


def uses_zero3(deepspeed: Any) -> bool:
    """Whether the weights are sharded before the adapter is made."""
    # Private part of Axolotl: its own test of a DeepSpeed configuration, which may be a file, a dictionary or a name.
    from axolotl.utils.schemas.utils import is_deepspeed_zero3_config

    return is_deepspeed_zero3_config(deepspeed) or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def _gathers_when_saving(deepspeed: Any) -> bool:
    """Where the configuration cannot be read here, such as one that accelerate has, it is taken to."""
    if isinstance(deepspeed, str) and Path(deepspeed).is_file():
        from ...support.files import read_json_object

        deepspeed = read_json_object(Path(deepspeed))
    if not isinstance(deepspeed, Mapping):
        return True
    return bool((deepspeed.get("zero_optimization") or {}).get("stage3_gather_16bit_weights_on_model_save"))
