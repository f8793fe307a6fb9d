"""Real Axolotl runs with `adapter: salora`, and what its config validation refuses."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import constructed_saes
import fresh
import tiny
from certificate import largest_share_inside
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate, load_for_training
from salora_plugins.adapters.model_card import START
from salora_plugins.models.fingerprint import weight_samples

pytestmark = pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="Axolotl needs Python 3.12")

EXAMPLES = Path(__file__).parent.parent / "examples"
REFUSALS = "refusals.jsonl"
SAFETY = "safety.safetensors"

# Key -> value that `adapter: salora` refuses, each named in the message.
UNSUPPORTED = {
    "peft_use_dora": True,
    "peft_init_lora_weights": "pissa",
    "peft": {"loftq_config": {"loftq_bits": 4}},
    "lora_target_parameters": ["mlp.experts.down_proj"],
    "peft_layer_replication": [[0, 1], [0, 2]],
    "relora": True,
    "gptq": True,
    "qlora_sharded_model_loading": True,
    "use_onebitllms": True,
    "qat": {"weight_dtype": "int8"},
    "fp8": True,
    "flash_attn_fuse_mlp": True,
    "dsv4_shared_mlp_lora_kernel": True,
    "dsv4_fp8_lora_kernel": True,
    "unfrozen_parameters": ["^model.embed_tokens.weight$"],
    "lora_fp32_gradients": True,
    "lisa_step_interval": 2,
    "lisa_n_layers": 1,
    "spectrum_model_name": "some/model",
    "model_quantization_config": "FineGrainedFP8Config",
    "fsdp_config": {"cpu_ram_efficient_loading": True},
    "deepspeed": {"zero_optimization": {"stage": 3}},
    "tensor_parallel_size": 2,
    "expert_parallel_size": 2,
    "lora_qkv_kernel": True,
    "fix_untrained_tokens": 3,
    "nvfp4_merge_aware": True,
    "nf4_backend": "torchao",
    "quantize_moe_experts": True,
    "optimizer": "polora",
}
# Keys whose refusal names another one, and refusals of Axolotl itself.
NAMED = {"relora": "relora", "optimizer": "polora"}

# Name -> (change of the config, what the message must contain).
REFUSED = {
    "misspelled monitor": ({"salora": {"monitor": {"every_step": 2}}}, ["salora.monitor", "every_step"]),
    "misspelled key": ({"salora": {"safty_rank": 8}}, ["salora.safty_rank", "Did you mean salora.safety_rank?"]),
    "unknown key": ({"salora": {"colour": "red"}}, ["salora.colour", "safety_data"]),
    "rank of zero": ({"salora": {"safety_rank": 0}}, ["salora.safety_rank"]),
    "rank that is no number": ({"salora": {"input_safety_rank": "four"}}, ["salora.input_safety_rank"]),
    "an option beside the block": ({"safety_rank": 8}, ["safety_rank", "salora.safety_rank"]),
    "a rank that trains nothing": ({"lora_r": 0}, ["lora_r: 0"]),
    "an alpha that trains nothing": ({"lora_alpha": 0}, ["lora_alpha: 0"]),
    "a misspelled block": ({"saloar": {"safety_rank": 8}}, ["saloar: there is no such key", "salora:"]),
    "no such adapter to go on with": ({"lora_model_dir": "./gone"}, ["lora_model_dir", "./gone", "no such folder"]),
    "an adapter that is none of SaLoRA": ({"lora_model_dir": "."}, ["lora_model_dir", "salora_config.json"]),
    "unknown init": ({"salora": {"init": "pisa"}}, ["salora.init", "pissa"]),
    "no such safety data": (
        {"salora": {"safety_data": "gone/refusals.jsonl"}},
        ["salora.safety_data", "gone/refusals.jsonl", "no such file"],
    ),
    "no such one of several": (
        {"salora": {"safety_data": ["builtin", "gone/refusals.jsonl"]}},
        ["salora.safety_data", "gone/refusals.jsonl", "no such file"],
    ),
    "sources and requests": (
        {"salora": {"safety_data": ["builtin", "How do I steal a car?"]}},
        ["salora.safety_data", "builtin", "How do I steal a car?"],
    ),
    "no such task data": ({"salora": {"task_data": "gone.json"}}, ["salora.task_data", "gone.json", "no such file"]),
    "no such safety module": ({"salora": {"safety_module": "gone"}}, ["salora.safety_module", "gone", "no such file"]),
    "unknown basis method": ({"salora": {"basis_method": "magic"}}, ["salora.basis_method", "magic", "salora"]),
    "no built-in task data": ({"salora": {"task_data": "builtin"}}, ["task_data", "builtin"]),
    "another adapter": ({"adapter": "lora"}, ["salora: the block has no effect with adapter: lora"]),
    "4 and 8 bits": ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit", "load_in_8bit"]),
    "an embedding": ({"lora_target_modules": ["q_proj", "embed_tokens"]}, ["lora_target_modules", "embed_tokens"]),
    "going on with DPO": ({"rl": "dpo", "lora_model_dir": "somewhere"}, ["lora_model_dir", "somewhere", "merge-lora"]),
    "rl: ebft": ({"rl": "ebft"}, ["rl: ebft"]),
    "8-bit kernels": ({"load_in_8bit": True, "lora_qkv_kernel": True}, ["lora_qkv_kernel", "load_in_8bit"]),
    "refusals among preferences": (
        {"rl": "dpo", "salora": {"refusal_share": 0.05}},
        ["salora.refusal_share", "rl: dpo", "refusal_anchor"],
    ),
    "refusals of a reward model": (
        {"reward_model": True, "salora": {"refusal_anchor": True}},
        ["reward_model", "salora.refusal_anchor"],
    ),
    "refusals in a stream": (
        {"streaming": True, "salora": {"refusal_share": 0.05}},
        ["salora.refusal_share", "streaming", "refusal_anchor"],
    ),
    "an anchor under DeepSpeed": (
        {"deepspeed": {"zero_optimization": {"stage": 2}}, "salora": {"refusal_anchor": True}},
        ["salora.refusal_anchor", "DeepSpeed", "refusal_share"],
    ),
    "an anchor under FSDP": (
        {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "salora": {"refusal_anchor": True}},
        ["salora.refusal_anchor", "FSDP", "refusal_share"],
    ),
    "FSDP with checkpoints in shards": (
        {"fsdp_config": {"reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}},
        ["fsdp_config.state_dict_type: SHARDED_STATE_DICT", "Set it to FULL_STATE_DICT"],
    ),
    "FSDP whose checkpoints are left open": (
        {"fsdp_config": {"reshard_after_forward": True}},
        ["fsdp_config.state_dict_type: not set", "Set it to FULL_STATE_DICT"],
    ),
    "FSDP on a base in 8 bits": (
        {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "load_in_8bit": True},
        ["load_in_8bit", "fsdp_config"],
    ),
    "an option of another method": (
        {"salora": {"basis_method": "actsvd", "unaligned_model": "organization/base"}},
        ["salora: unaligned_model", "actsvd", "weight-delta"],
    ),
    "a start beside that of SAILS": (
        {"salora": {"variant": "sails", "init": "zero"}},
        ["salora", "init='zero'", "sails"],
    ),
    "weights without another model": ({"salora": {"basis_method": "weight-delta"}}, ["salora", "unaligned_model"]),
    "an unaligned model that is not there": (
        {"salora": {"basis_method": "weight-delta", "unaligned_model": "./no/such/folder"}},
        ["salora.unaligned_model", "no/such/folder"],
    ),
    "utility data that is not there": (
        {"salora": {"basis_method": "actsvd", "utility_data": "missing.jsonl"}},
        ["salora.utility_data", "missing.jsonl"],
    ),
    "a share of all rows": ({"salora": {"refusal_share": 1.0}}, ["salora.refusal_share", "less than 1"]),
    "a misspelled anchor": ({"salora": {"refusal_anchor": {"wieght": 2}}}, ["salora.refusal_anchor", "wieght"]),
    "rank for vLLM": (
        {"rl": "grpo", "trl": {"use_vllm": True, "vllm_mode": "server", "vllm_lora_sync": True}},
        ["trl.vllm_lora_sync", "salora.init"],
    ),
    **{key: ({key: value}, [NAMED.get(key, key)]) for key, value in UNSUPPORTED.items()},
}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
REFUSED["the task start under ZeRO 3"] = ({"deepspeed": ZERO3, "salora": {"init": "task"}}, ["salora.init: task", "3"])
REFUSED["refusals under ZeRO 3"] = (
    {"deepspeed": ZERO3, "salora": {"refusal_share": 0.1}},
    ["salora.refusal_share", "ZeRO stage 3"],
)
# Configs that validation accepts, where it refuses what is close to them.
DEQUANTIZED = {"model_quantization_config_kwargs": {"dequantize": True}}
ACCEPTED = {
    kind: {"model_quantization_config": kind, **DEQUANTIZED} for kind in ("Mxfp4Config", "FineGrainedFP8Config")
}
# Refusals of a whole feature: rows of the compatibility table.
ROWS = {
    "4 and 8 bits": "`load_in_4bit` and `load_in_8bit` together",
    "an embedding": "an embedding in `lora_target_modules`",
    "going on with DPO": "`lora_model_dir` with `rl: dpo`",
    "rl: ebft": "`rl: ebft`",
    "8-bit kernels": "fused LoRA kernels with `load_in_8bit`",
    "rank for vLLM": "`trl.vllm_lora_sync` with `salora.init: task` or `pissa`",
    "deepspeed": "`deepspeed` ZeRO stage 3 without `stage3_gather_16bit_weights_on_model_save`",
    "the task start under ZeRO 3": "`salora.init: task` with ZeRO stage 3",
    "refusals under ZeRO 3": "`salora.refusal_share` with ZeRO stage 3",
    "lora_qkv_kernel": "fused LoRA kernels with the task initialization from the training rows",
    **{
        key: f"`{key}: {value}`" if isinstance(value, bool | int | str) else f"`{key}`"
        for key, value in UNSUPPORTED.items()
        if key not in ("deepspeed", "lora_qkv_kernel")
    },
}


def row(what: str, area: str = "Axolotl"):
    return pytest.mark.compatibility(area, what)


# Refusals of Axolotl itself, which come as pydantic's.
OF_AXOLOTL = ("optimizer", "quantize_moe_experts", "lora_fp32_gradients")

# Name of a run -> what it stands for.
TRAINED = {
    "sft": "SFT",
    "dpo": "`rl: dpo`",
    "ipo": "`rl: ipo`, with `salora.refusal_anchor`",
    "kto": "`rl: kto`",
    "orpo": "`rl: orpo`",
    "simpo": "`rl: simpo`",
    "grpo": "`rl: grpo`",
    "reward": "`reward_model: true`",
    "steps": "`process_reward_model: true`",
    "more": "`lora_model_dir`: going on with a saved adapter",
    "4bit": "`load_in_4bit`, `gradient_checkpointing` (reentrant)",
    "8bit": "`load_in_8bit`",
    "kernels": "`lora_qkv_kernel`, `lora_o_kernel` with `salora.init: pissa`",
    "kernels from zero": "`lora_qkv_kernel`, `lora_o_kernel` with the default start",
    "packing": "`sample_packing`, with attention by sdpa and `salora.refusal_share`",
    "options": "`lora_target_linear` with `lora_exclude_modules`, `lora_dropout`, `peft_use_rslora`, "
    "`peft_layers_to_transform`, `lora_on_cpu`",
    "lora+": "`loraplus_lr_ratio`",
    "tokens": "`tokens` with `lora_modules_to_save`",
    "token indices": "`peft_trainable_token_indices`",
    "refusals": "`salora.refusal_share` and `salora.refusal_anchor`",
    "best": "`load_best_model_at_end` and `early_stopping_patience`",
}
# Runs that must give the very losses of "sft", since they change only how it is computed.
SAME_LOSSES = {
    "checkpointing": "`gradient_checkpointing: true`",
    "reentrant": "`gradient_checkpointing: true`, reentrant",
    "compiled": "`torch_compile: true` (backend eager)",
}
ANOTHER_TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
# A reward function and a transform of the rows for `rl: grpo`, as Axolotl wants them: in a module on the path.
REWARDS = """
def small_letters(completions, **_):
    return [float(sum(character.islower() for character in c[0]["content"])) for c in completions]


def transform(cfg, *args, **kwargs):
    def prompt(row, tokenizer=None):
        return {"prompt": row["messages"]}

    return prompt, {"remove_columns": ["messages", "chosen", "rejected"]}
"""


def _write_jsonl(file: Path, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_workspace(folder: Path) -> dict[str, dict]:
    """Models and data on disk; returns the configs of the runs."""
    # On some CPUs bitsandbytes dequantizes rows that are no multiple of 64 wrongly.
    for name, model in (("llama", tiny.llama(intermediate_size=128)), ("qwen3", tiny.qwen3())):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    _write_jsonl(folder / REFUSALS, tiny.refusal_rows())
    targets = ["q_proj", "v_proj"]
    calibrate(
        _base(folder), tiny.tokenizer(), safety_data=tiny.refusal_rows(), target_modules=targets, safety_rank=8
    ).save(folder / SAFETY)
    _write_jsonl(folder / "sums.jsonl", [{"messages": [*row["prompt"], *row["completion"]]} for row in tiny.sum_rows()])
    _write_jsonl(
        folder / "preferences.jsonl",
        [
            {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
            for row in tiny.preference_rows()
        ],
    )
    _write_jsonl(
        folder / "desirable.jsonl",
        [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}.", "label": i % 2 == 0} for i in range(16)],
    )
    _write_jsonl(
        folder / "ranked.jsonl",
        [
            {"system": "", "input": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": "No idea."}
            for i in range(16)
        ],
    )
    _write_jsonl(
        folder / "steps.jsonl",
        [
            {"prompt": f"What is {i} plus {i}?", "completions": ["Add.", f"It is {2 * i}."], "labels": [True, i > 4]}
            for i in range(16)
        ],
    )
    _write_jsonl(
        folder / "conversations.jsonl",
        [{key: [*row["prompt"], *row[key]] for key in ("chosen", "rejected")} for row in tiny.preference_rows()],
    )
    (folder / "rewards.py").write_text(REWARDS)
    for layer in range(2):
        kind = {"architecture": "standard", "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}
        constructed_saes.saved(folder / "sae" / f"layer_{layer}", kind, constructed_saes.weights("standard", 64, 40))

    def data(file: str, kind: str | dict) -> list[dict]:
        return [{"path": str(folder / file), "ds_type": "json", "type": kind}]

    shared = {
        "base_model": str(folder / "llama"),
        "adapter": "salora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "salora": {"safety_rank": 8, "init": "task", "safety_data": str(folder / REFUSALS)},
        "datasets": [{"path": str(folder / "sums.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 128,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_epochs": 1,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 7,
    }
    # As little as a user would write: the rest has SaLoRAConfig's defaults.
    preferences = {k: v for k, v in shared.items() if not k.startswith("lora_")} | {
        "base_model": str(folder / "qwen3"),
        "rl": "dpo",
        "salora": {"safety_rank": 8, "safety_data": str(folder / REFUSALS)},
        "datasets": [{"path": str(folder / "preferences.jsonl"), "ds_type": "json", "type": "chat_template.default"}],
    }
    both_sides = {"salora": {**shared["salora"], "input_safety_rank": 4}}
    with_refusals = {
        "salora": {**both_sides["salora"], "refusal_share": 0.25, "refusal_anchor": {"every": 1, "batch_size": 4}}
    }
    with_kernels = {
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
    }
    changes = {
        "sft": both_sides,
        "resumed": {**both_sides, "resume_from_checkpoint": str(folder / "sft" / "checkpoint-2")},
        "more": {"lora_model_dir": str(folder / "sft"), "lora_r": 2},
        # Reentrant checkpoints need inputs with a gradient, which the preparation for quantized training sets.
        "4bit": {
            "load_in_4bit": True,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "8bit": {"load_in_8bit": True, "max_steps": 1, "save_steps": 1},
        "checkpointing": {
            "salora": {**both_sides["salora"], "monitor": {"num_requests": 4, "every_steps": 2}},
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        "reentrant": {
            **both_sides,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "compiled": {**both_sides, "torch_compile": True, "torch_compile_backend": "eager"},
        "refusals": with_refusals,
        "refusals resumed": {**with_refusals, "resume_from_checkpoint": str(folder / "refusals" / "checkpoint-2")},
        "packing": {
            "salora": {**shared["salora"], "refusal_share": 0.25},
            "sample_packing": True,
            "attn_implementation": "sdpa",
            "sequence_len": 256,
            "micro_batch_size": 1,
            "num_epochs": 10,
        },
        "options": {
            "lora_target_modules": None,
            "lora_target_linear": True,
            "lora_exclude_modules": ["o_proj"],
            "lora_dropout": 0.1,
            "peft_use_rslora": True,
            "peft_layers_to_transform": [1],
            "lora_on_cpu": True,
            "save_safetensors": True,
        },
        "lora+": {"loraplus_lr_ratio": 16},
        "another template": {
            "chat_template": "jinja",
            "chat_template_jinja": ANOTHER_TEMPLATE,
            "lora_target_modules": ["q_proj"],
        },
        "tokens": {"tokens": ["<one>", "<two>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        "token indices": {"peft_trainable_token_indices": [3, 4]},
        # With the criterion turned round the first evaluation is the best one, and the second stops the run.
        "best": {
            "val_set_size": 0.25,
            "eval_steps": 1,
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": True,
            "early_stopping_patience": 1,
        },
        "ipo": {
            "rl": "ipo",
            "salora": {**shared["salora"], "refusal_anchor": {"every": 1}},
            "datasets": data("preferences.jsonl", "chat_template.default"),
        },
        "simpo": {
            "rl": "simpo",
            "rl_beta": 0.1,
            "cpo_alpha": 1.0,
            "simpo_gamma": 0.5,
            "datasets": data("preferences.jsonl", "chat_template.default"),
        },
        "orpo": {
            "rl": "orpo",
            "orpo_alpha": 0.1,
            "remove_unused_columns": False,
            "datasets": data("conversations.jsonl", "chat_template.argilla"),
        },
        "kto": {
            "rl": "kto",
            "rl_beta": 0.5,
            "remove_unused_columns": False,
            "datasets": data(
                "desirable.jsonl",
                {
                    "field_prompt": "prompt",
                    "field_completion": "completion",
                    "field_label": "label",
                    "prompt_format": "{prompt}",
                    "completion_format": "{completion}",
                },
            ),
        },
        "grpo": {
            "rl": "grpo",
            "max_steps": 2,
            "datasets": data("preferences.jsonl", "rewards.transform"),
            "trl": {
                "num_generations": 4,
                "max_completion_length": 8,
                "reward_funcs": ["rewards.small_letters"],
                "use_vllm": False,
            },
        },
        "reward": {
            "reward_model": True,
            "num_labels": 1,
            "chat_template": "chatml",
            "remove_unused_columns": False,
            "datasets": data("ranked.jsonl", "bradley_terry.chat_template"),
        },
        "steps": {
            "process_reward_model": True,
            "num_labels": 2,
            "remove_unused_columns": False,
            "datasets": [{**data("steps.jsonl", "stepwise_supervised")[0], "step_separator": "\n"}],
        },
        "sails": {
            "lora_target_modules": ["o_proj"],
            "salora": {
                "variant": "sails",
                "sae": {0: f"{folder}/sae/layer_0", 1: f"{folder}/sae/layer_{{layer}}"},
                "contrastive_data": str(folder / "conversations.jsonl"),
                "sae_feature_share": 0.5,
            },
        },
        "more as lora": {"adapter": "lora", "salora": None, "lora_model_dir": str(folder / "sft"), "max_steps": 1},
        "killed": both_sides,
        "resumed from half": both_sides,
        "resumed by itself": {**both_sides, "auto_resume_from_checkpoints": True},
        "lora": {"adapter": "lora", "salora": None},
        "lora without plugin": {"adapter": "lora", "salora": None},
        "kernels": {**with_kernels, "salora": {**shared["salora"], "init": "pissa"}},
        "kernels from zero": {**with_kernels, "salora": {**shared["salora"], "init": None}},
    }
    configs = {name: {**shared, **change} for name, change in changes.items()}
    configs["dpo"] = preferences
    for name, config in configs.items():
        config["output_dir"] = str(folder / name)
    for name in ("resumed from half", "resumed by itself"):
        configs[name]["output_dir"] = str(folder / "killed")
    configs["resumed from half"]["resume_from_checkpoint"] = str(folder / "killed" / "checkpoint-4")
    return configs


def _write_example_rows(folder: Path) -> dict[str, str]:
    """Rows in the columns of the examples' data sets; returns type of a data set -> file."""
    sums, pairs = list(tiny.sum_rows()), list(tiny.preference_rows())
    speakers = {"user": "human", "assistant": "gpt"}
    rows = {
        "chat_template": [
            {
                "conversations": [
                    {"from": speakers[message["role"]], "value": message["content"]}
                    for message in (*row["prompt"], *row["completion"])
                ]
            }
            for row in sums
        ],
        "chatml.intel": [
            {
                "system": "",
                "question": row["prompt"][0]["content"],
                "chosen": row["chosen"][0]["content"],
                "rejected": row["rejected"][0]["content"],
            }
            for row in pairs
        ],
        "chatml.ultra": [
            {
                "prompt": row["prompt"][0]["content"],
                "completion": row["chosen" if i % 2 else "rejected"][0]["content"],
                "label": bool(i % 2),
            }
            for i, row in enumerate(pairs)
        ],
    }
    for kind, of_kind in rows.items():
        _write_jsonl(folder / f"{kind}.jsonl", of_kind)
    return {kind: str(folder / f"{kind}.jsonl") for kind in rows}


def _small(example: Path, folder: Path, rows: dict[str, str]) -> dict:
    """An example with stand-ins for model and data, short, and in the numbers of a CPU."""
    config = yaml.safe_load(example.read_text())
    (data,) = config["datasets"]
    data.update(path=rows[data["type"]], ds_type="json")
    key, file = ("safety_data", REFUSALS) if "safety_module" not in config["salora"] else ("safety_module", SAFETY)
    config["salora"].update({"safety_rank": 8, key: str(folder / file)})
    if file := config.pop("deepspeed", None):  # which needs a GPU
        assert (EXAMPLES.parent / file).is_file()
    for key in ("fsdp_config", "fsdp_version"):  # for several processes: test_axolotl_in_processes
        config.pop(key, None)
    return config | {
        "base_model": str(folder / "llama"),
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / example.stem),
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "sequence_len": 256,
        "bf16": False,
        "fp16": False,
        "tf32": False,
    }


def _write_yaml(file: Path, config: dict) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return str(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """The folder with what every run left, and the answers of `axolotl_helpers`."""
    folder = tmp_path_factory.mktemp("axolotl")
    configs = _write_workspace(folder)
    files = {name: _write_yaml(folder / "configs" / f"{name}.yml", config) for name, config in configs.items()}
    # Axolotl rewrites the attention of the whole process for its fused LoRA kernels, so that those runs come last.
    with_kernels = ("more as lora", "lora", "lora without plugin", "kernels", "kernels from zero")
    # The one that is killed is forked, which is safe only before the process has threads: it comes first.
    trained = ["killed", *(name for name in configs if name not in ("killed", "another template", *with_kernels))]
    commands = {name: ["train", files[name], "--launcher", "python"] for name in trained}
    commands["preprocess"] = ["preprocess", files["best"]]
    commands["evaluate"] = [
        "evaluate", files["best"], "--launcher", "python", "--lora-model-dir", str(folder / "best")
    ]  # fmt: skip
    commands["merge sft"] = ["merge-lora", files["sft"]]
    commands["merge dpo"] = ["merge-lora", files["dpo"], "--lora-model-dir", str(folder / "dpo")]
    commands["inference"] = [
        "inference", files["sft"], "--launcher", "python", "--lora-model-dir", str(folder / "sft")
    ]  # fmt: skip
    commands["calibrate"] = ["salora-calibrate", files["sft"]]
    commands["calibrate elsewhere"] = ["salora-calibrate", files["dpo"], "--out", str(folder / "dpo.safetensors")]
    commands["calibrate with another template"] = ["salora-calibrate", files["another template"]]
    commands["calibrate for LoRA"] = ["salora-calibrate", files["lora"]]
    rows = _write_example_rows(folder)
    for example in sorted(EXAMPLES.glob("axolotl-*.yml")):
        file = _write_yaml(folder / "configs" / example.name, _small(example, folder, rows))
        commands[example.stem] = ["train", file, "--launcher", "python"]
    commands.update({name: ["train", files[name], "--launcher", "python"] for name in with_kernels})
    refused = {
        name: _write_yaml(folder / "refused" / f"{number}.yml", {**configs["sft"], **change})
        for number, (name, (change, _)) in enumerate(REFUSED.items())
    }
    accepted = {
        name: _write_yaml(folder / "accepted" / f"{name}.yml", {**configs["sft"], **change})
        for name, change in ACCEPTED.items()
    }
    examples = {}
    for example in sorted(EXAMPLES.glob("axolotl-*.yml")):
        config = yaml.safe_load(example.read_text())
        config.update(base_model=str(folder / "llama"), output_dir=str(folder / "example"))
        if "deepspeed" in config:
            if importlib.util.find_spec("deepspeed") is None:
                continue  # Axolotl's own validation imports it
            config["deepspeed"] = str(EXAMPLES.parent / config["deepspeed"])
            config["salora"]["safety_module"] = str(folder / SAFETY)
        examples[example.name] = _write_yaml(folder / "examples" / example.name, config)
    job = {
        "result": str(folder / "result.json"),
        "validate": {**refused, **accepted, **examples, "lora": files["lora"]},
        "commands": commands,
        "without_plugin": ["lora without plugin"],
        "killed": {"killed": "checkpoint-4/salora.safetensors"},
    }
    (folder / "job.json").write_text(json.dumps(job))
    log = folder / "log.txt"
    with log.open("w") as output:
        subprocess.run(
            [sys.executable, Path(__file__).with_name("axolotl_helpers.py"), folder / "job.json"],
            input=b"What is 2 plus 3?\n",
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
                "AXOLOTL_DO_NOT_TRACK": "1",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(folder / "cache"),
                "OMP_NUM_THREADS": "1",
                "NUMBA_DISABLE_JIT": "1",  # of sample packing: it compiles for 20 seconds what then takes none
            },
            check=False,
            timeout=1200,
        )
    result = folder / "result.json"
    assert result.is_file(), log.read_text()[-5000:]
    return folder, json.loads(result.read_text())


def _ran(runs: tuple[Path, dict], name: str) -> Path:
    folder, answers = runs
    assert name in answers["failed"], f"{name}: the runs stopped before it"
    assert answers["failed"][name] is None, answers["failed"][name]
    return folder / name


def _base(folder: Path, name: str = "llama", **options):
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, **options)


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model.eval()(tiny.token_batch()).logits


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", [pytest.param(name, marks=row(what)) for name, what in TRAINED.items()])
def test_a_trained_adapter_stays_out_of_the_safety_directions(runs, name):
    assert largest_share_inside(_ran(runs, name)) <= 1e-5


def test_a_saved_adapter_loads_as_plain_lora_where_this_package_is_missing(runs):
    folder, _ = runs
    adapters = {"sft": "llama", "dpo": "qwen3", "kernels": "llama", "kernels from zero": "llama"}
    for name in adapters:
        _ran(runs, name)
    torch.save(tiny.token_batch(), folder / "tokens.pt")
    script = f"""
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "salora_plugins":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

for name, base in {adapters!r}.items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, name).eval()
    with torch.no_grad():
        torch.save(model(torch.load("tokens.pt")).logits, f"{{name}}.logits.pt")
assert "salora_plugins" not in sys.modules
"""
    fresh.run(["-c", script], cwd=folder, check=True)
    for name, base in adapters.items():
        trained = _logits(load_for_training(_base(folder, base), folder / name))
        assert tiny.relative_difference(torch.load(folder / f"{name}.logits.pt"), trained) <= 1e-5
        assert tiny.relative_difference(trained, _logits(_base(folder, base))) > 1e-2


@pytest.mark.parametrize(
    ("name", "base"),
    [
        pytest.param("sft", "llama", marks=row("`axolotl merge-lora`")),
        pytest.param("dpo", "qwen3", marks=row("`axolotl merge-lora` after `rl: dpo`")),
    ],
)
def test_merge_lora(runs, name, base):
    folder, _ = runs
    _ran(runs, f"merge {name}")
    adapted = _logits(PeftModel.from_pretrained(_base(folder, base), folder / name))
    assert tiny.relative_difference(_logits(_base(folder / name, "merged")), adapted) <= 1e-5


@row("Axolotl, `resume_from_checkpoint`: the same losses and weights as without the interruption", "Resuming")
def test_sails_starts_in_the_directions_of_features(runs):
    folder = _ran(runs, "sails")
    saved = json.loads((folder / "salora_config.json").read_text())
    assert (saved["variant"], saved["init"], saved["basis_method"]) == ("sails", "sails", "sae")
    assert not SafetyModule.load(folder).protects
    assert "## SAILS" in (folder / "README.md").read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(runs):
    whole, resumed = _ran(runs, "sft"), _ran(runs, "resumed")
    assert _losses(resumed / "checkpoint-4") == pytest.approx(_losses(whole / "checkpoint-4"), rel=1e-5)
    weights = load_file(resumed / "adapter_model.safetensors")
    for key, value in load_file(whole / "adapter_model.safetensors").items():
        assert tiny.relative_difference(weights[key], value) <= 1e-4, key
    assert (resumed / "salora.safetensors").read_bytes() == (whole / "salora.safetensors").read_bytes()


def _divergences(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["refusal_anchor/kl"] for entry in history if "refusal_anchor/kl" in entry]


def test_refusals_are_mixed_in_and_anchored(runs):
    """24 rows with 8 of refusals among them, packed or not; the adapter's card and configuration say so."""
    refusals, packing, ipo = (_ran(runs, name) / "checkpoint-4" for name in ("refusals", "packing", "ipo"))
    card = (refusals / "README.md").read_text()
    assert "| Refusals mixed in | 8 rows of 16 refusals" in card and "| Refusal anchor | KL to the base model" in card
    assert "| Refusals mixed in | 8 rows of 16 refusals" in (packing / "README.md").read_text()
    for checkpoint in (refusals, ipo):
        divergences = _divergences(checkpoint)
        assert len(divergences) == 3 and all(value > 0 for value in divergences)  # none at the first step
    assert json.loads((refusals / "salora_config.json").read_text())["training_notes"].keys() == {
        "Refusals mixed in",
        "Refusal anchor",
    }
    assert "[axolotl.salora_plugins.replay.mixing] 8 rows of 16 refusals are mixed into 24 rows" in (
        (runs[0] / "log.txt").read_text()
    )


def test_a_resumed_run_has_the_same_refusals(runs):
    whole, resumed = _ran(runs, "refusals"), _ran(runs, "refusals resumed")
    assert _losses(resumed / "checkpoint-4") == pytest.approx(_losses(whole / "checkpoint-4"), rel=1e-5)
    weights = load_file(resumed / "adapter_model.safetensors")
    for key, value in load_file(whole / "adapter_model.safetensors").items():
        assert tiny.relative_difference(weights[key], value) <= 1e-4, key


def test_a_saved_adapter_is_trained_further_with_its_safety_module(runs):
    folder, _ = runs
    first, more = _ran(runs, "sft"), _ran(runs, "more")
    assert SafetyModule.load(more).input_safety_rank == 4
    for name, basis in SafetyModule.load(first).bases.items():
        assert torch.equal(SafetyModule.load(more).bases[name], basis)
    assert _losses(more / "checkpoint-4")[0] < _losses(first / "checkpoint-4")[0]
    assert json.loads((more / "salora_config.json").read_text())["r"] == 4
    assert "lora_r: 2 is ignored" in (folder / "log.txt").read_text()


def test_other_options_of_the_basis_method_are_said_to_be_ignored(caplog, monkeypatch):
    from axolotl.utils.dict import DictDefault

    from salora_plugins.integrations.axolotl.translation import warn_about_differences

    saved = SaLoRAConfig(basis_method="actsvd", utility_rank=5)
    block = {"basis_method": "weight-delta", "unaligned_model": "org/before", "utility_rank": 5, "utility_data": "mine"}
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    warn_about_differences(DictDefault({"salora": block, "lora_model_dir": "adapter"}), saved)
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(" is ignored")[0] for message in said] == [
        "salora.basis_method: weight-delta",
        "salora.unaligned_model: org/before",
    ]


def test_layers_of_autoencoders_are_logged_in_order():
    """Axolotl writes its config with sorted keys to its log."""
    from salora_plugins.integrations.axolotl.args import SaLoRAOptions

    block = SaLoRAOptions(sae={20: "release:twenty", "12": "folder"}).model_dump(exclude_none=True)
    assert json.loads(json.dumps(block, sort_keys=True)) == {"sae": {"12": "folder", "20": "release:twenty"}}


def test_axolotls_own_adapter_on_a_saved_one_is_warned_of(runs):
    assert _ran(runs, "more as lora").is_dir()
    log = (runs[0] / "log.txt").read_text()
    assert log.count(f"lora_model_dir: {runs[0] / 'sft'} is a SaLoRA adapter, and adapter: lora trains it further") == 1


def test_what_stands_at_the_end_of_a_run(runs):
    folder = _ran(runs, "sft")
    log = (runs[0] / "log.txt").read_text()
    line = f"    salora evaluate {runs[0] / 'llama'} --adapter trained={folder} --out {folder}-evaluation"
    assert log.count(line) == 1
    assert f"salora evaluate {runs[0] / 'llama'} --adapter trained={runs[0] / 'reward'}" not in log
    # Of the runs into this folder one was killed, one failed, and one went through.
    assert log.count(f"--adapter trained={runs[0] / 'killed'} ") == 1
    # Axolotl has written the card anew, and our part stands in it nevertheless.
    card = ModelCard.load(folder / "README.md").text
    assert card.startswith(START) and "axolotl version" in card and "Certificate" in card


def test_dpo_starts_at_its_reference_and_uses_the_defaults(runs):
    folder = _ran(runs, "dpo")
    losses = _losses(folder / "checkpoint-4")
    assert losses[0] == pytest.approx(0.6931, abs=2e-4)
    assert losses[-1] < losses[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 16)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(("name", "most"), [("4bit", 0.2), ("8bit", 0.02)])
def test_training_on_a_quantized_base(runs, name, most):
    """The safety module keeps samples of the weights that it was computed from: here, quantized ones."""
    folder, _ = runs
    module = SafetyModule.load(_ran(runs, name))
    full_precision = weight_samples(_base(folder), module.weight_samples)
    for layer, sample in module.weight_samples.items():
        error = (sample - full_precision[layer]).norm() / full_precision[layer].norm()
        assert 1e-4 < error < most


def test_the_safety_module_can_be_computed_beforehand(runs):
    """`axolotl salora-calibrate` finds what training with the same config does."""
    folder, _ = runs
    _ran(runs, "calibrate")
    _ran(runs, "calibrate elsewhere")
    for file, trained in ((folder / "sft" / "safety_module.safetensors", "sft"), (folder / "dpo.safetensors", "dpo")):
        module, expected = SafetyModule.load(file), SafetyModule.load(folder / trained)
        assert module.bases.keys() == expected.bases.keys()
        assert all(torch.equal(module.bases[name], basis) for name, basis in expected.bases.items())
    assert "adapter: lora. Set adapter: salora" in runs[1]["failed"]["calibrate for LoRA"]


def test_calibration_renders_with_the_chat_template_of_the_config(runs):
    folder, _ = runs
    _ran(runs, "calibrate with another template")
    module = SafetyModule.load(folder / "another template" / "safety_module.safetensors")
    digests = []
    for template in (tiny.CHAT_TEMPLATE, ANOTHER_TEMPLATE):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        options = {"safety_data": str(folder / REFUSALS), "target_modules": ["q_proj"], "safety_rank": 8, "seed": 7}
        digests.append(calibrate(_base(folder), tokenizer, **options).provenance["safety_data_sha256"])
    assert digests[0] != digests[1] == module.provenance["safety_data_sha256"]


def test_training_starts_from_the_base_model(runs):
    """Axolotl draws `lora_A` anew once the adapter is there, which would undo a start from the weights."""
    expected, *losses = (_losses(_ran(runs, name) / "checkpoint-4")[0] for name in ("lora", "sft", "kernels"))
    assert losses == pytest.approx([expected] * 2, rel=1e-4)


def test_excluded_modules_get_no_adapter(runs):
    config = json.loads((_ran(runs, "options") / "adapter_config.json").read_text())
    assert "o_proj" in config["target_modules"] and config["exclude_modules"] == ["o_proj"]
    modules = {key.split(".")[-3] for key in load_file(_ran(runs, "options") / "adapter_model.safetensors")}
    assert modules == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_the_package_logs_stands_in_axolotls_log(runs):
    log = (runs[0] / "log.txt").read_text()
    assert re.search(r"\[INFO\] \[axolotl\.salora_plugins[\w.]*\]", log)
    warnings = [line for line in log.splitlines() if "checkpoint-4 is passed over" in line]
    assert warnings and all("[WARNING] [axolotl.salora_plugins" in line for line in warnings)  # each of them once


def test_the_monitor_logs_through_the_trainer(runs):
    history = json.loads((_ran(runs, "checkpointing") / "checkpoint-4" / "trainer_state.json").read_text())[
        "log_history"
    ]
    entries = [entry for entry in history if "safety/refusal_margin" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(entry["safety/certificate"] <= 1e-5 for entry in entries)
    assert entries[-1]["safety/kl_harmful"] > 0


@row("`axolotl inference`")
def test_inference_loads_the_adapter(runs):
    folder, _ = runs
    _ran(runs, "inference")
    assert "Give me an instruction" in (folder / "log.txt").read_text()


def test_runs_with_another_adapter_are_unchanged(runs):
    with_plugin, without = _ran(runs, "lora"), _ran(runs, "lora without plugin")
    expected = load_file(without / "adapter_model.safetensors")
    weights = load_file(with_plugin / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not {"salora", "inference", "overrides_of_model_kwargs"} & runs[1]["loaded"]["lora"].keys()


def test_importing_the_plugin_imports_nothing_heavy(runs):
    imported = runs[1]["imported"]
    assert "salora_plugins.integrations.axolotl.plugin" in imported
    light = {"salora_plugins", "salora_plugins.options", "salora_plugins.ranks"}
    light |= {f"salora_plugins.support{name}" for name in ("", ".hosts", ".texts", ".version")}
    assert {name for name in imported if not name.startswith("salora_plugins.integrations")} <= light


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row(ROWS[name]) if name in ROWS else ()) for name in REFUSED]
)
def test_refused_when_the_config_is_validated(runs, name, refusal):
    message = runs[1]["errors"][name]
    assert message is not None, "was accepted"
    for part in REFUSED[name][1]:
        assert part in message
    if name not in OF_AXOLOTL:
        assert "validation error" not in message and "[type=" not in message
    # Without what pydantic puts around it.
    refusal(ValueError(re.sub(r"(?s)^.*?Value error, | \[type=.*$", "", message)))


@pytest.mark.parametrize("size", [None, 1, 2])
def test_an_anchor_needs_whole_sequences(size, refusal):
    """Axolotl itself takes a `context_parallel_size` with several GPUs only."""
    from axolotl.utils.dict import DictDefault

    from salora_plugins.integrations.axolotl.block_checks import check_refusals

    check_refusals(DictDefault({"context_parallel_size": size, "salora": {"refusal_share": 0.05}}))
    cfg = DictDefault({"context_parallel_size": size, "salora": {"refusal_anchor": True}})
    if size != 2:
        return check_refusals(cfg)
    with pytest.raises(ValueError, match=r"salora\.refusal_anchor: with context_parallel_size: 2") as error:
        check_refusals(cfg)
    refusal(error.value)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=row(f"`model_quantization_config: {name}` with `dequantize`")) for name in ACCEPTED],
)
def test_accepted_when_the_config_is_validated(runs, name):
    assert runs[1]["errors"][name] is None


def test_reentrant_checkpoints_with_rl_and_4_bit_on_several_gpus_are_refused():
    from salora_plugins.integrations.axolotl.host_options import check_rl

    config = {"rl": "dpo", "load_in_4bit": True, "gradient_checkpointing": True, "capabilities": {"n_gpu": 2}}
    check_rl(config)
    with pytest.raises(ValueError, match="use_reentrant"):
        check_rl({**config, "gradient_checkpointing_kwargs": {"use_reentrant": True}})


@pytest.mark.parametrize("name", [pytest.param(name, marks=row(what)) for name, what in SAME_LOSSES.items()])
def test_a_run_that_only_computes_it_otherwise(runs, name):
    whole, other = _ran(runs, "sft"), _ran(runs, name)
    assert _losses(other / "checkpoint-4") == pytest.approx(_losses(whole / "checkpoint-4"), rel=1e-5)
    assert largest_share_inside(other) <= 1e-5


def test_the_best_model_is_loaded_at_the_end(runs):
    folder = _ran(runs, "best")
    assert sorted(file.name for file in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    best = folder / "checkpoint-1"
    weights = load_file(folder / "adapter_model.safetensors")
    for key, value in load_file(best / "adapter_model.safetensors").items():
        assert tiny.relative_difference(weights[key], value) <= 1e-5


def test_lora_plus_gives_the_second_factor_its_own_learning_rate(runs):
    """Adam's first step moves every element by its learning rate."""
    weights = load_file(_ran(runs, "lora+") / "checkpoint-2" / "adapter_model.safetensors")
    plain = load_file(_ran(runs, "4bit") / "checkpoint-2" / "adapter_model.safetensors")

    def moved(tensors: dict[str, torch.Tensor], factor: str) -> float:
        """The median movement between start and trained half."""
        key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight"
        halves = tensors[key].chunk(2, dim=0 if factor == "A" else 1)
        return (halves[0] - halves[1] if factor == "A" else halves[0] + halves[1]).abs().median().item()

    assert moved(weights, "A") < 2 * moved(plain, "A")
    assert moved(weights, "B") > 4 * moved(plain, "B")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row(f"`axolotl {name}`")) for name in ("preprocess", "evaluate")]
)
def test_other_commands(runs, name):
    _ran(runs, name)
    assert f"=== axolotl {name}" in (runs[0] / "log.txt").read_text()


@row("Axolotl, killed while it wrote a checkpoint, then `resume_from_checkpoint: checkpoint-4`", "Resuming")
def test_a_half_written_checkpoint_is_refused(runs, refusal):
    folder = _ran(runs, "killed").parent
    message = runs[1]["failed"]["resumed from half"].strip().splitlines()[-1].removeprefix("ValueError: ")
    assert message.startswith(f"resume_from_checkpoint: {folder}/killed/checkpoint-4: salora.safetensors is missing")
    assert message.endswith(f"Resume from {folder}/killed/checkpoint-2.")
    refusal(ValueError(message), hide=folder)


@row("Axolotl, killed while it wrote a checkpoint, then `auto_resume_from_checkpoints`", "Resuming")
def test_the_checkpoint_before_a_half_written_one(runs):
    whole, folder = _ran(runs, "sft"), _ran(runs, "killed")
    _ran(runs, "resumed by itself")
    assert "checkpoint-4 is passed over: salora.safetensors is missing" in (runs[0] / "log.txt").read_text()
    assert _losses(folder / "checkpoint-4") == pytest.approx(_losses(whole / "checkpoint-4"), rel=1e-5)
    weights = load_file(folder / "adapter_model.safetensors")
    for key, value in load_file(whole / "adapter_model.safetensors").items():
        assert tiny.relative_difference(weights[key], value) <= 1e-4, key


@pytest.mark.parametrize("name", [file.name for file in sorted(EXAMPLES.glob("axolotl-*.yml"))])
def test_examples_are_valid(runs, name):
    if "zero3" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("Axolotl validates it with DeepSpeed, which is not installed")
    assert runs[1]["errors"][name] is None


@pytest.mark.parametrize("name", [file.stem for file in sorted(EXAMPLES.glob("axolotl-*.yml"))])
def test_examples_run(runs, name):
    """With stand-ins for model and data, in one process."""
    folder = _ran(runs, name)
    assert largest_share_inside(folder) <= 1e-5
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    if "refusal_share" in (EXAMPLES / f"{name}.yml").read_text():
        assert "| Refusals mixed in |" in (folder / "checkpoint-2" / "README.md").read_text()
