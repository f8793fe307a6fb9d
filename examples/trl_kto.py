"""
Kahneman-Tversky optimization with TRL and SaLoRA: from answers that are good or bad.

    python examples/trl_kto.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/kto-mix-14k \
        --use_salora --safety_rank 32 \
        --lora_r 16 --lora_alpha 16 --lora_target_modules q_proj v_proj \
        --learning_rate 5e-6 \
        --output_dir outputs/kto

`--dataset_name` takes a data set of the hub, a folder, or a JSONL file.
"""

from trl import KTOConfig, KTOTrainer, ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from salora_plugins.integrations.trl import (
    SaLoRAArguments,
    get_peft_config,
    read_dataset,
    say_how_to_evaluate,
    train_on_refusals,
)


def main() -> None:
    parser = TrlParser((ScriptArguments, KTOConfig, ModelConfig, SaLoRAArguments))
    script_args, training_args, model_args, salora_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    dataset = read_dataset(script_args)
    evaluates = training_args.eval_strategy != "no"
    trainer = KTOTrainer(
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
    say_how_to_evaluate(trainer, model_args)


if __name__ == "__main__":
    main()
