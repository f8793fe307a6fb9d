"""The real SFTTrainer and DPOTrainer with peft_config=SaLoRAConfig(...)."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import fresh
from certificate import largest_share_inside
from salora_plugins import SafetyModule, SafetyMonitorCallback, SaLoRAConfig, calibrate
from salora_plugins.cli import create_cli
from salora_plugins.evaluation.reports.report import EvaluationReport
from tiny import (
    llama,
    preference_rows,
    qwen3,
    refusal_rows,
    relative_difference,
    sum_rows,
    token_batch,
    token_rows,
    tokenizer,
)
from trainer_helpers import arguments, check_result, config, losses

trl = pytest.importorskip("trl")
from salora_plugins.integrations.trl import SaLoRAArguments, TaskInitializationCallback, get_peft_config  # noqa: E402

row = partial(pytest.mark.compatibility, "TRL")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param(sum_rows(), {}, marks=row("SFT: prompts with completions"), id="prompt-completion"),
        pytest.param(
            sum_rows(),
            {"packing": True, "max_length": 64, "gradient_checkpointing": False},
            marks=row("SFT: `packing`"),
            id="packed",
        ),
        pytest.param(
            Dataset.from_list([{"text": f"Some text number {i}. " * 2} for i in range(24)]),
            {},
            marks=row("SFT: plain text"),
            id="text",
        ),
        pytest.param(
            Dataset.from_list(refusal_rows(24)),
            {"assistant_only_loss": False},
            marks=row("SFT: conversations"),
            id="messages",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_with_a_path(folder, tmp_path, rows, options):
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=arguments(trl.SFTConfig, tmp_path, **options),
        train_dataset=rows,
        peft_config=config(),
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    tokens = token_batch()
    assert relative_difference(trainer.model.eval()(tokens).logits, base(tokens).logits) < 1e-4
    assert trainer.model.base_model.waiting_for_task_data == ["default"]
    trainer.train()
    assert trainer.model.base_model.waiting_for_task_data == []
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_result(trainer, AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


@row("SFT: a model given as an object, with `TaskInitializationCallback`")
def test_sft_with_an_object_and_the_callback(tmp_path):
    """The callback takes the initialization from the training set instead of the first batch."""
    qwen3().save_pretrained(tmp_path / "base")
    trainer = trl.SFTTrainer(
        model=qwen3(),
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=sum_rows(),
        processing_class=tokenizer(),
        peft_config=config(tokenizer=tokenizer(), input_safety_rank=8),
        callbacks=[TaskInitializationCallback()],
    )
    by_hand = get_peft_model(qwen3(), config(tokenizer=tokenizer(), input_safety_rank=8))
    by_hand.base_model.initialize_from_task_data(trainer.train_dataset)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.parametrizations.weight"
    trainer.train()
    offset = trainer.model.get_submodule(name)[0].offset
    assert torch.equal(offset, by_hand.get_submodule(name)[0].offset)
    check_result(trainer, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


OWN_TEMPLATE = tokenizer().chat_template.replace("message['role'] }}", "message['role'] | upper }}")


def trained_with_another_template(kind: str, model: Path, output_dir: Path, **options) -> trl.SFTTrainer:
    """A trainer that renders with OWN_TEMPLATE, which is not the one in the model's folder."""
    own = tokenizer()
    own.chat_template = OWN_TEMPLATE
    peft_config = config(init="zero", calibration_cache=False, **options)
    if kind == "SFT: `chat_template_path`":
        (output_dir / "template.jinja").write_text(OWN_TEMPLATE)
        args = arguments(trl.SFTConfig, output_dir, chat_template_path=str(output_dir / "template.jinja"))
        return trl.SFTTrainer(str(model), args, train_dataset=sum_rows(), peft_config=peft_config)
    if kind == "SFT: `processing_class`":
        args = arguments(trl.SFTConfig, output_dir)
        return trl.SFTTrainer(str(model), args, train_dataset=sum_rows(), peft_config=peft_config, processing_class=own)
    args = arguments(trl.DPOConfig, output_dir)
    return trl.DPOTrainer(
        str(model), args=args, train_dataset=preference_rows(), peft_config=peft_config, processing_class=own
    )


TEMPLATE_KINDS = ["SFT: `chat_template_path`", "SFT: `processing_class`", "DPO: `processing_class`"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=row(f"{kind}, also in calibration")) for kind in TEMPLATE_KINDS]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calibration_renders_as_the_trainer_does(folder, tmp_path, kind):
    trainer = trained_with_another_template(kind, folder, tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    assert trainer.model.peft_config["default"].tokenizer is None
    own = tokenizer()
    options = {"target_modules": ["q_proj", "v_proj"], "safety_rank": 8, "safety_data": refusal_rows()}
    own.chat_template = OWN_TEMPLATE
    expected = calibrate(llama(), own, **options, calibration_cache=False)
    found = SafetyModule.load(tmp_path / "adapter")
    assert all(torch.equal(found.bases[name], basis) for name, basis in expected.bases.items())
    of_the_folder = calibrate(llama(), tokenizer(), **options, calibration_cache=False)
    assert not any(torch.equal(found.bases[name], basis) for name, basis in of_the_folder.bases.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_templates_are_refused(folder, tmp_path):
    message = r"SaLoRAConfig\(tokenizer=...\) has another chat template than the trainer's processing_class \(chat_temp"
    for kind in TEMPLATE_KINDS:
        with pytest.raises(ValueError, match=message):
            trained_with_another_template(kind, folder, tmp_path, tokenizer=tokenizer())
    longer = tokenizer()
    longer.chat_template = OWN_TEMPLATE
    trained_with_another_template(TEMPLATE_KINDS[0], folder, tmp_path, tokenizer=longer)
    longer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="has another vocabulary than the trainer's"):
        trained_with_another_template(TEMPLATE_KINDS[0], folder, tmp_path, tokenizer=longer)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_was_made_for_another_template_is_named(tmp_path, caplog):
    """PEFT alone knows no trainer; our callbacks see both."""
    other = tokenizer()
    other.chat_template = OWN_TEMPLATE
    for own, callback in ((tokenizer(), True), (other, True), (other, False)):
        caplog.clear()
        trainer = trl.SFTTrainer(
            get_peft_model(llama(), config(tokenizer=tokenizer())),
            arguments(trl.SFTConfig, tmp_path, max_steps=1),
            train_dataset=sum_rows(),
            processing_class=own,
            callbacks=[TaskInitializationCallback()] if callback else [],
        )
        if not callback:
            trainer.add_callback(SafetyMonitorCallback(trainer, harmful=["Harm?"], every_steps=1))
        trainer.train()
        assert ("was calibrated with another chat template" in caplog.text) == (own is other)


@pytest.mark.parametrize(
    "precompute",
    [
        pytest.param(False, marks=row("DPO: the reference is the base model")),
        pytest.param(True, marks=row("DPO: `precompute_ref_log_probs`")),
    ],
)
def test_dpo_reference_is_the_base_model(folder, tmp_path, precompute):
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=arguments(trl.DPOConfig, tmp_path, precompute_ref_log_probs=precompute),
        train_dataset=preference_rows(),
        peft_config=config(),
    )
    trainer.train()
    # equal policies: the loss is log 2
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_result(trainer, AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.compatibility("Resuming", "TRL's SFT: equal to an uninterrupted run")
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path):
    def run(resume=None):
        trainer = trl.SFTTrainer(
            model=str(folder),
            args=arguments(trl.SFTConfig, tmp_path, max_steps=6, save_strategy="steps", save_steps=3),
            train_dataset=sum_rows(),
            peft_config=config(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    full = run()
    resumed = run(resume=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(full), rel=1e-5)
    tokens = token_batch()
    assert relative_difference(resumed.model.eval()(tokens).logits, full.model.eval()(tokens).logits) < 1e-5


def test_example_script(folder, tmp_path):
    data, safety = tmp_path / "data.jsonl", tmp_path / "safety.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sum_rows().to_list()))
    safety.write_text("".join(json.dumps(row) + "\n" for row in refusal_rows()))
    command = [EXAMPLES / "trl_sft.py", "--model_name_or_path", folder, "--dataset_name", data]
    command += ["--use_salora", "--safety_rank", "8", "--task_rank", "8", "--safety_data", safety]
    command += ["--lora_r", "4", "--lora_alpha", "4", "--lora_target_modules", "q_proj", "v_proj"]
    command += ["--learning_rate", "1e-2", "--output_dir", tmp_path / "out", "--max_steps", "2", "--use_cpu"]
    command += ["--bf16", "False", "--report_to", "none"]
    result = fresh.run(command, check=True)
    assert largest_share_inside(tmp_path / "out") <= 1e-5
    # The line that is printed at the end measures the very adapter.
    line = re.search("^ *salora (evaluate .*)$", result.stdout, re.MULTILINE).group(1)
    few = ["--num-requests", "2", "--max-new-tokens", "4"]
    evaluated = CliRunner().invoke(create_cli(), [*shlex.split(line), *few])
    assert evaluated.exit_code == 0, evaluated.output
    report = EvaluationReport.load(tmp_path / "out-evaluation")
    assert [(m.name, m.source) for m in report.models] == [("base", str(folder)), ("trained", str(tmp_path / "out"))]


def test_script_arguments():
    model_args = trl.ModelConfig(lora_r=8, lora_target_modules=["q_proj"])
    made = get_peft_config(model_args, SaLoRAArguments(use_salora=True, safety_rank=4, salora_init="zero"), seed=3)
    assert isinstance(made, SaLoRAConfig)
    assert (made.r, made.safety_rank, made.init, made.seed, made.task_rank) == (8, 4, "zero", 3, 32)
    parsed = trl.TrlParser((SaLoRAArguments,)).parse_args_and_config(
        ["--use_salora", "--safety_rank", "48", "--input_safety_rank", "0.9", "--calibration_cache", "false"]
    )
    by_need = get_peft_config(model_args, parsed[0])
    assert (by_need.safety_rank, by_need.input_safety_rank, by_need.calibration_cache) == (48, 0.9, False)
    assert isinstance(by_need.safety_rank, int)
    for given, expected in ((["builtin"], "builtin"), (["builtin", "somebody/data"], ["builtin", "somebody/data"])):
        sources = trl.TrlParser((SaLoRAArguments,)).parse_args_and_config(["--use_salora", "--safety_data", *given])
        assert get_peft_config(model_args, sources[0]).safety_data == expected
    pattern = ["--use_salora", "--safety_rank_pattern", '{"down_proj": 64, "q_proj": 0.9}']
    by_module = get_peft_config(model_args, trl.TrlParser((SaLoRAArguments,)).parse_args_and_config(pattern)[0])
    assert by_module.safety_rank_pattern == {"down_proj": 64, "q_proj": 0.9}
    with pytest.raises(ValueError, match="--input_safety_rank_pattern q_proj=8: give JSON"):
        SaLoRAArguments(use_salora=True, input_safety_rank_pattern="q_proj=8")
    assert get_peft_config(model_args, SaLoRAArguments()) is None
    with pytest.raises(ValueError, match="--safety_rank has no effect without --use_salora"):
        get_peft_config(model_args, SaLoRAArguments(safety_rank=4))
    with pytest.raises(ValueError, match="use_dora=True cannot be combined"):
        get_peft_config(trl.ModelConfig(use_dora=True), SaLoRAArguments(use_salora=True))


def test_task_callback_without_salora_is_refused(folder, tmp_path):
    from peft import LoraConfig

    trainer = trl.SFTTrainer(
        model=str(folder),
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=Dataset.from_list(token_rows(8)),
        peft_config=LoraConfig(target_modules=["q_proj"]),
        callbacks=[TaskInitializationCallback()],
    )
    with pytest.raises(ValueError, match="needs a trainer with peft_config=SaLoRAConfig"):
        trainer.train()


def test_a_salora_adapter_as_the_model_is_refused(tmp_path):
    (tmp_path / "salora_config.json").write_text("{}")
    for salora_args in (SaLoRAArguments(use_salora=True), SaLoRAArguments()):
        with pytest.raises(ValueError, match="load_for_training"):
            get_peft_config(trl.ModelConfig(model_name_or_path=str(tmp_path)), salora_args)
