"""SaLoRA in every stable trainer of TRL and in transformers' own, and resuming after a killed process."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import fresh
from salora_plugins import SafetyModule, calibrate, last_complete_checkpoint, load_for_training
from salora_plugins.initialization import restrict_to_task
from salora_plugins.parametrization import has_safe_factor, safe_factor, trained_factor
from tiny import (
    llama,
    preference_rows,
    refusal_rows,
    relative_difference,
    sum_rows,
    token_batch,
    token_rows,
    tokenizer,
    with_training_kernels,
)
from trainer_helpers import arguments, check_result, config, logits_of, losses

trl = pytest.importorskip("trl")
import interrupted_training  # noqa: E402

row = partial(pytest.mark.compatibility, "TRL")
transformers_row = partial(pytest.mark.compatibility, "Transformers")
resuming_row = partial(pytest.mark.compatibility, "Resuming")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUERIES = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def safety() -> SafetyModule:
    """The model's safety module, so that not every test calibrates."""
    return calibrate(llama(), safety_data=token_rows(16), target_modules=QUERIES, safety_rank=8)


def base_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def first_factor(model) -> torch.nn.Module:
    return model.base_model.model.model.layers[0].self_attn.q_proj.lora_B


def desirability_rows(count: int = 16) -> Dataset:
    rows = enumerate(preference_rows(count))
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r["chosen"] if i % 2 else r["rejected"], "label": bool(i % 2)}
            for i, r in rows
        ]
    )


def prompt_rows(count: int = 16) -> Dataset:
    return preference_rows(count).select_columns("prompt")


def many_small_letters(completions, **_) -> list[float]:
    """A reward that differs between the completions of a model that answers noise."""
    return [sum(c.islower() for c in completion[0]["content"]) + 0.01 * i for i, completion in enumerate(completions)]


GENERATION = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}
# Name -> (trainer, arguments, data, other parameters)
TRAINERS = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, {}, sum_rows, {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, {}, preference_rows, {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, {}, desirability_rows, {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, GENERATION, prompt_rows, {"reward_funcs": many_small_letters}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, GENERATION, prompt_rows, {"reward_funcs": many_small_letters}),
}


def make(name: str, model, output_dir: Path, peft_config=None, trainer=None, **options):
    """A trainer of TRL."""
    cls, kind, defaults, rows, parameters = TRAINERS[name]
    return (trainer or cls)(
        model=model,
        args=arguments(kind, output_dir, **{"max_steps": 3, **defaults, **options}),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **parameters,
    )


# TRL's trainers with a configuration


@pytest.mark.parametrize("name", [pytest.param("KTO", marks=row("KTO")), pytest.param("RLOO", marks=row("RLOO"))])
def test_trainer_with_a_configuration(name, folder, tmp_path, safety):
    trainer = make(name, base_model(folder), tmp_path, config(safety_module=safety))
    assert relative_difference(logits_of(trainer.model), logits_of(base_model(folder))) < 1e-4
    trainer.train()
    assert trainer.model.base_model.waiting_for_task_data == []
    assert all(torch.tensor(losses(trainer)).isfinite()) and len(losses(trainer)) == 3
    check_result(trainer, base_model(folder), tmp_path / "adapter")


class RecordingGRPO(trl.GRPOTrainer):
    """Keeps what every step computes its loss from."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append((inputs, list(self.model.base_model.waiting_for_task_data)))
        return super().compute_loss(model, inputs, *args, **kwargs)


@row("GRPO")
def test_grpo(folder, tmp_path, safety):
    """Generation leaves the start values alone; they come from the first batch's completions."""
    trainer = make("GRPO", base_model(folder), tmp_path, config(safety_module=safety), RecordingGRPO)
    start = safe_factor(first_factor(trainer.model)["default"]).offset.clone()
    trainer.train()
    assert [waiting for _, waiting in trainer.seen] == [["default"], [], []]

    base = base_model(folder)
    first, _ = trainer.seen[0]
    ids = torch.cat([first["prompt_ids"], first["completion_ids"]], dim=1)
    mask = torch.cat([first["prompt_mask"], first["completion_mask"]], dim=1)
    outputs = []
    handle = base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        base(input_ids=ids, attention_mask=mask)
    handle.remove()
    of_completions = outputs[0][:, first["prompt_ids"].shape[1] :][first["completion_mask"].bool()]
    task_basis = torch.linalg.svd(of_completions.T, full_matrices=False).U[:, :8]
    offset = safe_factor(first_factor(trainer.model)["default"]).offset
    assert relative_difference(offset, restrict_to_task(start, task_basis)) < 1e-4

    # The reference is the base model, also after training has gone on.
    last, _ = trainer.seen[-1]
    ids = torch.cat([last["prompt_ids"], last["completion_ids"]], dim=1)
    mask = torch.cat([last["prompt_mask"], last["completion_mask"]], dim=1)
    length = last["completion_ids"].shape[1]
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, last["completion_ids"][..., None])[..., 0]
    chosen = last["completion_mask"].bool()
    assert relative_difference(last["ref_per_token_logps"][chosen], expected[chosen]) < 1e-4
    check_result(trainer, base, tmp_path / "adapter")


@row("Reward: the head is trained, saved, and named as not protected")
def test_reward(folder, tmp_path, safety):
    base = partial(AutoModelForSequenceClassification.from_pretrained, folder, num_labels=1)
    torch.manual_seed(0)
    base().save_pretrained(tmp_path / "classifier")  # with a head
    base = partial(AutoModelForSequenceClassification.from_pretrained, tmp_path / "classifier")
    with pytest.warns(UserWarning, match="modules_to_save=.*score.* trains weights that the safety module does not"):
        trainer = trl.RewardTrainer(
            model=base(),
            args=arguments(trl.RewardConfig, tmp_path, max_steps=3),
            train_dataset=preference_rows(),
            processing_class=tokenizer(),
            peft_config=config(safety_module=safety, task_type="SEQ_CLS"),
        )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    reloaded = check_result(trainer, base(), tmp_path / "adapter")
    head = reloaded.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, trainer.model.base_model.model.score.modules_to_save["default"].weight)
    assert not torch.equal(head, base().score.weight)


@row("Distillation")
def test_distillation(folder, tmp_path, safety):
    trainer = trl.DistillationTrainer(
        model=base_model(folder),
        teacher_model=llama(seed=1),
        args=arguments(trl.DistillationConfig, tmp_path, max_steps=3, max_completion_length=8),
        train_dataset=prompt_rows(),
        processing_class=tokenizer(),
        peft_config=config(safety_module=safety),
    )
    trainer.train()
    assert trainer.model.base_model.waiting_for_task_data == []
    assert all(torch.tensor(losses(trainer)).isfinite()) and len(losses(trainer)) == 3
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ORPO", marks=row("ORPO (trl.experimental)")),
        pytest.param("CPO", marks=row("CPO (trl.experimental)")),
    ],
)
def test_experimental_trainer(name, folder, tmp_path, safety):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    trainer = getattr(module, f"{name}Trainer")(
        model=base_model(folder),
        args=arguments(getattr(module, f"{name}Config"), tmp_path, max_steps=3),
        train_dataset=preference_rows(),
        processing_class=tokenizer(),
        peft_config=config(safety_module=safety),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_result(trainer, base_model(folder), tmp_path / "adapter")


# A ready PeftModel


def trained_peft_model(folder: Path, safety: SafetyModule):
    """A SaLoRA model whose adapter has been trained already."""
    model = get_peft_model(base_model(folder), config(safety_module=safety, init="pissa"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = token_batch()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("SFT", marks=row("SFT: a ready `PeftModel`")),
        pytest.param("DPO", marks=row('DPO: a ready `PeftModel`, copied as "ref"')),
        pytest.param("KTO", marks=row('KTO: a ready `PeftModel`, copied as "ref"')),
        pytest.param("GRPO", marks=row('GRPO: a ready `PeftModel`, copied as "ref"')),
        pytest.param("RLOO", marks=row('RLOO: a ready `PeftModel`, copied as "ref"')),
    ],
)
def test_a_trained_peft_model(name, folder, tmp_path, safety):
    """The reference adapter is the adapter as it was given, and stays it."""
    model = trained_peft_model(folder, safety)
    before = logits_of(model)
    assert relative_difference(before, logits_of(base_model(folder))) > 1e-3
    module = model.base_model.safety_module("default")
    trainer = make(name, model, tmp_path)
    model = trainer.model
    if name != "SFT":
        assert set(model.peft_config) == {"default", "ref"}
        assert model.base_model.safety_module("ref") is module
        assert not trained_factor(first_factor(model)["ref"]).requires_grad
    trainer.train()
    if name in ("DPO", "KTO"):
        assert losses(trainer)[0] == pytest.approx({"DPO": 0.693147, "KTO": 0.5}[name], abs=1e-5)
    assert relative_difference(logits_of(model), before) > 1e-3
    if name != "SFT":
        model.set_adapter("ref")
        assert relative_difference(logits_of(model), before) < 1e-5
        model.set_adapter("default")
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@row("DPO: a ready `PeftModel` that waits for its first batch")
def test_a_fresh_peft_model_in_dpo(folder, tmp_path, safety):
    """Both adapters take their start values from the first batch, and the reference stays the base model."""
    trainer = make("DPO", get_peft_model(base_model(folder), config(safety_module=safety)), tmp_path)
    assert trainer.model.base_model.waiting_for_task_data == ["default", "ref"]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert trainer.model.base_model.waiting_for_task_data == []
    offsets = [safe_factor(first_factor(trainer.model)[name]).offset for name in ("default", "ref")]
    assert torch.equal(*offsets)
    trainer.model.set_adapter("ref")
    assert relative_difference(logits_of(trainer.model), logits_of(base_model(folder))) < 1e-4
    trainer.model.set_adapter("default")
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@row("a ready `PeftModel` together with `peft_config`")
def test_a_peft_model_and_a_configuration(folder, tmp_path, safety, refusal):
    model = get_peft_model(base_model(folder), config(safety_module=safety))
    with pytest.raises(ValueError, match="together with a `peft_config`") as caught:
        make("SFT", model, tmp_path, config(safety_module=safety))
    refusal(caught.value)


# Quantized bases

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param("SFT", "argument", marks=row("SFT: `quantization_config` (4-bit)")),
        pytest.param("SFT", "model_init_kwargs", marks=row("SFT: `model_init_kwargs` with a quantization")),
        pytest.param("DPO", "object", marks=row("DPO: a quantized model given as an object")),
    ],
)
def test_quantized_base(name, way, folder, tmp_path):
    """TRL casts the trained factors to bf16; start, reference and certificate are exact all the same."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)

    def load():
        return with_training_kernels(AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization))

    cls, kind, _, rows, _ = TRAINERS[name]
    init = {"quantization_config": quantization} if way == "model_init_kwargs" else None
    trainer = cls(
        model=load() if way == "object" else str(folder),
        # A quantized model is on the GPU where there is one, and its trainer must be, too.
        args=arguments(kind, tmp_path, max_steps=3, model_init_kwargs=init, use_cpu=not torch.cuda.is_available()),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=config(tokenizer=tokenizer()),
        **({"quantization_config": quantization} if way == "argument" else {}),
    )
    with_training_kernels(trainer.model)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert trained_factor(layer.lora_A["default"]).dtype == torch.bfloat16
    assert safe_factor(layer.lora_B["default"]).basis.dtype == torch.float32
    assert relative_difference(logits_of(trainer.model), logits_of(load())) < 1e-4
    trainer.train()
    if name == "DPO":
        assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(trainer)[-1] < losses(trainer)[0]
    # The effective weights are rounded to bf16 in training, and not where they are saved.
    check_result(trainer, load(), tmp_path / "adapter", tolerance=2e-2)


# Options of SFT

GENERATION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def plain_losses(folder, safety, tmp_path_factory) -> list[float]:
    """Of SFT without options."""
    trainer = make("SFT", base_model(folder), tmp_path_factory.mktemp("plain"), config(safety_module=safety))
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"padding_free": True, "max_length": None}, marks=row("SFT: `padding_free`")),
        pytest.param({"gradient_checkpointing": False}, marks=row("SFT: `gradient_checkpointing=False`")),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=row("SFT: `gradient_checkpointing`, re-entrant"),
        ),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            marks=row("SFT: `gradient_checkpointing`, not re-entrant"),
        ),
        pytest.param({"loss_type": "nll"}, marks=row('SFT: `loss_type="nll"`')),
    ],
)
def test_sft_options_that_change_no_loss(options, folder, tmp_path, safety, plain_losses):
    trainer = make("SFT", base_model(folder), tmp_path, config(safety_module=safety), **options)
    trainer.train()
    assert losses(trainer) == pytest.approx(plain_losses, rel=1e-5)
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"loss_type": "dft"}, marks=row('SFT: `loss_type="dft"`')),
        pytest.param({"completion_only_loss": False}, marks=row("SFT: `completion_only_loss=False`")),
        pytest.param({"neftune_noise_alpha": 5.0}, marks=row("SFT: `neftune_noise_alpha`")),
        pytest.param({"bf16": True}, marks=row("SFT: `bf16`")),
        pytest.param(
            {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
            marks=row('SFT: `packing_strategy="wrapped"`'),
        ),
    ],
)
def test_sft_options(options, folder, tmp_path, safety):
    trainer = make("SFT", base_model(folder), tmp_path, config(safety_module=safety), **options)
    trainer.train()
    assert trainer.model.base_model.waiting_for_task_data == []
    assert all(torch.tensor(losses(trainer)).isfinite()) and len(losses(trainer)) == 3
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@row("SFT: `assistant_only_loss`")
def test_assistant_only_loss(folder, tmp_path, safety):
    processing = tokenizer()
    processing.chat_template = GENERATION_TEMPLATE
    trainer = trl.SFTTrainer(
        model=base_model(folder),
        args=arguments(trl.SFTConfig, tmp_path, assistant_only_loss=True),
        train_dataset=Dataset.from_list(refusal_rows(16)),
        processing_class=processing,
        peft_config=config(safety_module=safety),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_result(trainer, base_model(folder), tmp_path / "adapter")


@row("SFT: `torch_compile`")
def test_torch_compile(tmp_path):
    """Traced without a compiler behind it, which is what can go wrong on our side."""
    load = partial(llama, num_hidden_layers=1)
    make_trainer = partial(make, "SFT", output_dir=tmp_path, loss_type="nll", gradient_checkpointing=False)
    plain = make_trainer(model=load(), peft_config=config(tokenizer=tokenizer()))
    plain.train()
    trainer = make_trainer(
        model=load(),
        peft_config=config(tokenizer=tokenizer()),
        torch_compile=True,
        torch_compile_backend="eager",
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    check_result(trainer, load(), tmp_path / "adapter")


@row("SFT: evaluation during training")
def test_evaluation_during_training(folder, tmp_path, safety):
    """Evaluating first does not take the start values from evaluation data."""
    common = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    cls, kind, _, rows, _ = TRAINERS["SFT"]
    trainers = [
        cls(
            model=base_model(folder),
            args=arguments(kind, tmp_path, max_steps=3, **options),
            train_dataset=rows(),
            eval_dataset=rows(4),
            processing_class=tokenizer(),
            peft_config=config(safety_module=safety),
        )
        for options in ({}, {**common, "eval_on_start": True})
    ]
    for trainer in trainers:
        trainer.train()
    plain, evaluated = trainers
    assert losses(evaluated) == pytest.approx(losses(plain), rel=1e-6)
    evaluations = [entry["eval_loss"] for entry in evaluated.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4 and evaluations[-1] < evaluations[0]


# transformers' own Trainer


def token_trainer(folder: Path, output_dir: Path, safety: SafetyModule, cls=Trainer, peft_config=None, **options):
    """transformers' Trainer on tokenized rows."""
    model = get_peft_model(base_model(folder), peft_config or config(safety_module=safety))
    rows = Dataset.from_list(token_rows(24))
    return cls(
        model=model,
        args=arguments(TrainingArguments, output_dir, **{"label_names": ["labels"], "push_to_hub": False, **options}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
    )


@transformers_row("Trainer: `load_best_model_at_end`, `save_total_limit`")
def test_load_best_model_at_end(folder, tmp_path, safety):
    trainer = token_trainer(
        folder,
        tmp_path,
        safety,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(best / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    layer = trainer.model.get_submodule(f"{module}.default")
    assert relative_difference(layer.weight.detach(), saved[f"{module}.weight"]) < 1e-6
    assert has_safe_factor(layer) and trained_factor(layer).requires_grad
    check_result(trainer, base_model(folder), tmp_path / "adapter")
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(again[key], saved[key], atol=1e-6) for key in saved)
    # It is still SaLoRA: training goes on, within the certificate.
    trainer.args.load_best_model_at_end = False
    trainer.train()
    check_result(trainer, base_model(folder), tmp_path / "adapter")


def test_the_best_of_another_adapter_is_not_loaded(folder, tmp_path, safety):
    """transformers loads what lies in the checkpoint itself, which is "default", into the active adapter."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = token_trainer(folder, tmp_path, safety, **options, load_best_model_at_end=True)
    trainer.model.add_adapter("second", config(safety_module=safety))
    trainer.model.set_adapter("second")
    with pytest.raises(ValueError, match=r"'default' of .*checkpoint-1 into 'second'.*yourself: model.load_adapter"):
        trainer.train()
    before = logits_of(trainer.model)
    trainer.model.load_adapter(tmp_path / "checkpoint-1" / "second", "second")
    assert relative_difference(logits_of(trainer.model), before) < 1e-5


class ShortOfMemory(Trainer):
    """Fails as an accelerator does where more than two examples do not fit."""

    def train(self, *args, **kwargs):
        layer = self.model.base_model.model.model.layers[0]
        handle = layer.register_forward_pre_hook(self.fail, with_kwargs=True)
        try:
            return super().train(*args, **kwargs)
        finally:
            handle.remove()

    def fail(self, module, args, kwargs):
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@transformers_row("Trainer: `auto_find_batch_size`")
def test_auto_find_batch_size(folder, tmp_path, safety):
    """The start values come from the first batch that fits."""
    trainer = token_trainer(
        folder, tmp_path, safety, cls=ShortOfMemory, per_device_train_batch_size=3, auto_find_batch_size=True
    )
    start = safe_factor(first_factor(trainer.model)["default"]).offset.clone()
    trainer.train()
    assert trainer._train_batch_size <= 2
    assert trainer.model.base_model.waiting_for_task_data == []
    assert relative_difference(safe_factor(first_factor(trainer.model)["default"]).offset, start) > 1e-2
    check_result(trainer, base_model(folder), tmp_path / "adapter")


# Resuming


@resuming_row("transformers' Trainer: equal to an uninterrupted run, optimizer state kept")
def test_trainer_resumes(folder, tmp_path, safety):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    full = token_trainer(folder, tmp_path, safety, **options)
    full.train()
    resumed = token_trainer(folder, tmp_path, safety, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(full), rel=1e-5)
    assert relative_difference(logits_of(resumed.model), logits_of(full.model)) < 1e-5
    moments = [
        torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state.values()])
        for trainer in (full, resumed)
    ]
    assert relative_difference(*moments) < 1e-4
    # Without the optimizer's state the run would have been another one.
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    fresh = token_trainer(folder, tmp_path, safety, **options)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(fresh)[-1] != pytest.approx(losses(full)[-1], rel=1e-5)


@resuming_row("TRL's DPO with a ready `PeftModel` as it was at the start")
def test_dpo_with_a_peft_model_does_not_start_over(folder, tmp_path, safety, refusal):
    """Of such a checkpoint transformers 5.20 loads the reference alone, which is refused; 5.23 loads both adapters."""
    options = {"save_strategy": "steps", "save_steps": 2}
    full = make("DPO", trained_peft_model(folder, safety), tmp_path, **options)
    full.train()
    fresh = get_peft_model(base_model(folder), config(safety_module=safety))
    for model in (trained_peft_model(folder, safety), fresh):
        resumed = make("DPO", model, tmp_path, **options)
        try:
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        except ValueError as error:
            assert "would train it from the beginning" in str(error)
            refusal(error)
        else:
            assert losses(resumed) == pytest.approx(losses(full), rel=1e-5)


@resuming_row("TRL's DPO with a ready `PeftModel` from `load_for_training(base_model, checkpoint)`")
def test_dpo_with_a_peft_model_resumes_from_load_for_training(folder, tmp_path, safety):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    full = make("DPO", trained_peft_model(folder, safety), tmp_path, **options)
    full.train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed = make("DPO", load_for_training(base_model(folder), checkpoint), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(full), rel=1e-5)
    for adapter in ("default", "ref"):
        for trainer in (full, resumed):
            trainer.model.set_adapter(adapter)
        assert relative_difference(logits_of(resumed.model), logits_of(full.model)) < 1e-5


@pytest.fixture(scope="module")
def killed_runs(folder, safety, tmp_path_factory) -> dict[str, Path]:
    """File of checkpoint-4 -> the output folder of a run that was killed when it was about to write that file."""
    path = tmp_path_factory.mktemp("killed")
    safety.save(path / "safety.safetensors")
    script = Path(__file__).parent / "interrupted_training.py"
    command = [script, folder, path / "safety.safetensors", path, *BROKEN]
    # They are forked, which CUDA does not survive once a library has asked for the GPU; they train on the CPU anyway.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    fresh.run(command, env=environment, check=True)
    return {name: path / name for name in BROKEN}


# File of checkpoint-4 -> what a trainer says that is told to resume from the last checkpoint
BROKEN = {
    "README.md": (ValueError, "Can't find a valid checkpoint at .*checkpoint-4"),
    "salora.safetensors": (FileNotFoundError, "checkpoint-4/trainer_state.json"),
    "adapter_config.json": (FileNotFoundError, "checkpoint-4/trainer_state.json"),
    "trainer_state.json": (FileNotFoundError, "checkpoint-4/trainer_state.json"),
}


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            name,
            marks=resuming_row(f"TRL's SFT, killed before `{name}` was written, then `resume_from_checkpoint=True`"),
        )
        for name in BROKEN
    ],
)
def test_a_half_written_checkpoint_is_refused(file, killed_runs, folder, tmp_path, refusal):
    output_dir = shutil.copytree(killed_runs[file], tmp_path / "out")
    assert get_last_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    kind, message = BROKEN[file]
    with pytest.raises(kind, match=message) as caught:
        interrupted_training.trainer(folder, killed_runs[file].parent / "safety.safetensors", output_dir).train(
            resume_from_checkpoint=True
        )
    refusal(caught.value, hide=output_dir)


@resuming_row("TRL's SFT, killed while it wrote a checkpoint, then `last_complete_checkpoint(output_dir)`")
def test_the_checkpoint_before_a_half_written_one(killed_runs, folder, tmp_path, caplog):
    safety_file = next(iter(killed_runs.values())).parent / "safety.safetensors"
    full = interrupted_training.trainer(folder, safety_file, tmp_path / "full")
    full.train()
    for file, killed in killed_runs.items():
        caplog.clear()
        checkpoint = last_complete_checkpoint(killed)
        assert checkpoint == str(killed / "checkpoint-2")
        assert "checkpoint-4 is passed over" in caplog.text
        assert not (killed / "checkpoint-4" / file).exists()
        output_dir = shutil.copytree(killed, tmp_path / file)
        resumed = interrupted_training.trainer(folder, safety_file, output_dir)
        resumed.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
        assert losses(resumed) == pytest.approx(losses(full), rel=1e-5)
        assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-6")
    assert relative_difference(logits_of(resumed.model), logits_of(full.model)) < 1e-5
    check_result(resumed, base_model(folder), tmp_path / "adapter")


def test_what_is_no_complete_checkpoint(killed_runs, folder, tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path / "absent") is None
    broken = shutil.copytree(killed_runs["trainer_state.json"], tmp_path / "out")
    shutil.rmtree(broken / "checkpoint-2")
    (broken / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.5, ')
    assert last_complete_checkpoint(broken) is None
    assert "trainer_state.json cannot be read, perhaps cut short" in caplog.text
    with pytest.raises(FileNotFoundError, match="interrupted while it was written"):
        load_for_training(base_model(folder), killed_runs["salora.safetensors"] / "checkpoint-4")
