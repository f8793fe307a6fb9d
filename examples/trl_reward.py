"""
A reward model with TRL and SaLoRA.

A classifier cannot answer harmful requests, so the safety module comes from the chat model, before:

    salora calibrate \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --target-modules q_proj,v_proj --out safety.safetensors

    python examples/trl_reward.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --use_salora --safety_module safety.safetensors \
        --lora_task_type SEQ_CLS --lora_r 16 --lora_alpha 16 --lora_target_modules q_proj v_proj \
        --learning_rate 1e-4 \
        --output_dir outputs/reward

`--dataset_name` takes a data set of the hub, a folder, or a JSONL file. The new head is trained, too; the
safety module does not protect it.
"""

from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser, get_quantization_config

from salora_plugins.integrations.trl import SaLoRAArguments, get_peft_config, read_dataset, train_on_refusals


def main() -> None:
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig, SaLoRAArguments))
    script_args, training_args, model_args, salora_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    dataset = read_dataset(script_args)
    evaluates = training_args.eval_strategy != "no"
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args, salora_args, seed=training_args.seed),
    )
    train_on_refusals(trainer, salora_args, seed=training_args.seed)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
