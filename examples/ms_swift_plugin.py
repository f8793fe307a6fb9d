"""
SaLoRA as a tuner of ms-swift, loaded by its `--external_plugins`.

    SALORA='{"safety_rank": 32}' swift sft \
        --external_plugins examples/ms_swift_plugin.py --tuner_type salora \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --use_hf true \
        --dataset data.jsonl --target_modules q_proj v_proj --lora_rank 16 --lora_alpha 16

ms-swift's `--lora_rank`, `--lora_alpha`, `--lora_dropout`, `--use_rslora`, `--target_modules` and `--modules_to_save`
apply as they do to LoRA; options of SaLoRAConfig are JSON in the environment variable SALORA.
"""

import json
import os

from peft import PeftModel, get_peft_model
from swift import PeftTuner, tuners_map
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

from salora_plugins import SaLoRAConfig, load_adapter, load_for_training

LORA_ONLY = {"tuner_backend": "peft", "lora_dtype": None, "lorap_lr_ratio": None, "target_parameters": None}


class SaLoRATuner(PeftTuner):
    @staticmethod
    def prepare_model(args, model):
        for name, default in LORA_ONLY.items():
            if getattr(args, name) != default:
                raise ValueError(f"--{name} {getattr(args, name)} has no effect with --tuner_type salora. Remove it.")
        config = SaLoRAConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            bias=args.lora_bias,
            init_lora_weights=args.init_weights,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            task_type=args.task_type.upper(),
            seed=args.seed,
            **json.loads(os.environ.get("SALORA", "{}")),
        )
        return get_peft_model(model, config)

    @staticmethod
    def from_pretrained(model, model_id, adapter_name="default", is_trainable=False, **kwargs):
        if not is_trainable:
            return PeftModel.from_pretrained(model, model_id, adapter_name, **kwargs)
        if isinstance(model, PeftModel):  # --ref_adapters, a frozen copy
            load_adapter(model, model_id, adapter_name)
            return model
        return load_for_training(model, model_id, adapter_name, **kwargs)


tuners_map["salora"] = SaLoRATuner
