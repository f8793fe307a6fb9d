"""SaLoRA on the quantized layers of bitsandbytes and torchao, on a CPU or where they put a model: on the GPU."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from certificate import largest_share_inside
from salora_plugins import SaLoRAConfig, attribute, calibrate
from salora_plugins.evaluation import generate_responses, response_loss
from salora_plugins.models.weights import is_quantized
from salora_plugins.parametrization import trained_factor
from tiny import (
    llama,
    refusal_rows,
    relative_difference,
    sum_rows,
    token_batch,
    token_rows,
    tokenizer,
    with_training_kernels,
)

pytest.importorskip("bitsandbytes")


def torchao_config(kind, **options):
    """Skips where torchao is not installed; Axolotl brings it."""
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, kind)(**options))


QUANTIZATION = {
    "4-bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: torchao_config("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao_config("Float8WeightOnlyConfig"),
    "torchao int4": lambda: torchao_config("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}


ROWS = {
    "4-bit": "bitsandbytes 4-bit (NF4, double quantization)",
    "8-bit": "bitsandbytes 8-bit",
    "torchao": "torchao int8, weight only",
    "torchao float8": "torchao float8, weight only",
    "torchao int4": "torchao int4, weight only (`IntxWeightOnlyConfig`)",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.compatibility("Weights", ROWS[kind])) for kind in QUANTIZATION]
)
@pytest.mark.parametrize("init", ["task", "zero"])
def test_training_on_a_quantized_base(kind, init, tmp_path):
    llama().save_pretrained(tmp_path / "base")

    def load():
        options = QUANTIZATION[kind]()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options)
        return with_training_kernels(model.eval())

    base = load()
    tokens = token_batch().to(base.device)
    expected = base(tokens).logits
    config = SaLoRAConfig(
        r=4, safety_rank=8, task_rank=8, init=init, safety_data=token_rows(16), task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    model = get_peft_model(prepare_model_for_kbit_training(load()), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert is_quantized(layer)
    # 8-bit layers quantize their activations, whose rounding differs in the last bits between two runs
    assert relative_difference(model.eval()(tokens).logits, expected) < (1e-2 if kind == "8-bit" else 1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(model.eval()(tokens).logits, load()(tokens).logits)
    model.save_pretrained(tmp_path / "adapter")
    assert largest_share_inside(tmp_path / "adapter") <= 1e-5
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    trained = model(tokens).logits
    assert relative_difference(reloaded(tokens).logits, trained) < (1e-2 if kind == "8-bit" else 1e-4)
    # Merging quantizes the sum again; it must be far closer to the trained model than the base is.
    merged = model.merge_and_unload()(tokens).logits
    assert (merged - trained).norm() < 0.5 * (expected - trained).norm()


def test_our_passes_leave_4_bit_weights_trainable(tmp_path):
    """On some CPUs bitsandbytes repacks them in evaluation mode, for a kernel without gradients."""
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZATION["4-bit"]())
    response_loss(model, tokenizer(), sum_rows(4))
    generate_responses(model, tokenizer(), ["What is 1 plus 2?"], max_new_tokens=2, progress=False)
    model = get_peft_model(
        model, SaLoRAConfig(target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16), task_type="CAUSAL_LM")
    )
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    tokens = token_batch().to(model.device)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    factor = trained_factor(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"])
    assert factor.grad.norm() > 0


def test_an_attribution_leaves_4_bit_weights_as_they_are(tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZATION["4-bit"]())
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    before = [layer.weight.data.clone() for layer in layers]
    data = {"safety_data": refusal_rows(16), "utility_data": [f"What is {i}?" for i in range(16)], "num_held_out": 4}
    requests = {"harmful": ["Do harm."], "harmless": ["Do good."], "target_modules": ["q_proj"]}
    options = {"families": ["ranks"], "ranks": [(1, 0)], "max_new_tokens": 2, "progress": False}
    attribute(model, tokenizer(), out=tmp_path / "out", **data, **requests, **options)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.data, weight)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_4_bit_weights_repacked_by_others_are_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZATION["4-bit"]())
    # What bitsandbytes sets in a forward pass on a CPU with AVX512-BF16, whose layers must be wider than these.
    model.model.layers[0].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="bitsandbytes has repacked its weights"):
        get_peft_model(model, SaLoRAConfig(target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16)))


@pytest.mark.compatibility("Weights", "torchao int8, activations too")
def test_quantized_activations_are_refused(tmp_path, refusal):
    llama().save_pretrained(tmp_path)
    quantization = torchao_config("Int8DynamicActivationInt8WeightConfig")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    options = {"target_modules": ["q_proj"], "safety_rank": 8, "safety_data": token_rows(16)}
    with pytest.raises(ValueError, match="q_proj' quantizes its activations, too") as caught:
        get_peft_model(model, SaLoRAConfig(**options))
    refusal(caught.value)


def test_a_safety_module_of_the_full_model_fits_its_quantized_form(tmp_path):
    llama().save_pretrained(tmp_path)
    options = {"target_modules": ["q_proj", "v_proj"], "safety_rank": 8}
    module = calibrate(llama(), safety_data=token_rows(16), **options)
    other = calibrate(llama(seed=1), safety_data=token_rows(16), **options)
    for kind in QUANTIZATION.values():
        load = lambda kind=kind: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kind())
        get_peft_model(load(), SaLoRAConfig(safety_module=module, task_rank=8, **options))
        with pytest.raises(ValueError, match="computed for another model"):
            get_peft_model(load(), SaLoRAConfig(safety_module=other, task_rank=8, **options))
