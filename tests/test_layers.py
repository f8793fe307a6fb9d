"""Which layers can be targets is known before the calibration, and all that cannot are in one message."""

import logging
import re

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from salora_plugins import calibrate, load_for_training
from salora_plugins.calibration import CalibrationError
from salora_plugins.support.module_names import listed, pattern_for


def qwen2_moe() -> Qwen2MoeForCausalLM:
    """With a gate of one output."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**tiny._SIZES, **experts, shared_expert_intermediate_size=64)).eval()


def with_vision() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(**tiny._SIZES)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=5)
    return LlavaForConditionalGeneration(config).eval()


def refused_before_any_forward(model: nn.Module, match: str, **options) -> str:
    def never(*args):
        raise AssertionError("the model was run")

    handle = model.register_forward_pre_hook(never)
    try:
        with pytest.raises(ValueError, match=match) as caught:
            get_peft_model(model, tiny.salora_config(**options))
    finally:
        handle.remove()
    return str(caught.value)


@pytest.mark.parametrize("targets", [["out_proj"], ["in_proj", "conv1d"], "all-linear"])
def test_what_peft_refuses_for_lora_on_mamba(targets):
    with pytest.raises(ValueError) as lora:
        get_peft_model(tiny.mamba(), LoraConfig(target_modules=targets))
    told = refused_before_any_forward(tiny.mamba(), r"Mamba|not support", target_modules=targets)
    assert "Mamba" not in str(lora.value) or "out_proj" in told or "conv1d" in told


def test_experts_that_transformers_has_fused():
    """PEFT would train fused parameters for LoRA, and ignore these names for other types."""
    refused_before_any_forward(
        tiny.mixtral(), r"'w1', 'w2', 'w3' .*hold all experts", target_modules=["q_proj", "w1", "w2", "w3"]
    )


@pytest.mark.skipif(
    Qwen2MoeConfig.model_type in _MODEL_TO_CONVERSION_PATTERN,
    reason="with this release of Transformers PEFT takes the shared expert for one of the fused ones",
)
@pytest.mark.parametrize(
    "ranks",
    [{"safety_rank": 8}, {}, {"safety_rank": 0.9}, {"safety_rank": 8, "input_safety_rank": 0.9}, {"variant": "paper"}],
)
def test_layers_with_few_outputs_are_left_out_of_all_linear(ranks, caplog, own_cache, tmp_path):
    with caplog.at_level(logging.WARNING, "salora_plugins"):
        config = tiny.salora_config(target_modules="all-linear", init=None, task_rank=32, **ranks)
        model = get_peft_model(qwen2_moe(), config)
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(told) == 1 and "shared_expert_gate" in told[0]
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert adapted and not any("shared_expert_gate" in name for name in adapted)
    model.save_pretrained(tmp_path)
    again = load_for_training(qwen2_moe(), tmp_path)
    assert [name for name, module in again.named_modules() if isinstance(module, BaseTunerLayer)] == adapted


def test_narrow_layers_that_were_named():
    named = {"target_modules": ["q_proj", "shared_expert_gate"]}
    for rank in (8, 0.9):
        told = refused_before_any_forward(qwen2_moe(), f"safety_rank={rank}", safety_rank=rank, **named)
        assert "0.mlp.shared_expert_gate" in told and "1.mlp.shared_expert_gate" in told
        assert re.search(r"exclude_modules=r'.*shared_expert_gate'", told)
        assert "at most 0" not in told
    told = refused_before_any_forward(
        qwen2_moe(), "safety_rank=3", target_modules="all-linear", safety_rank_pattern={"shared_expert_gate": 3}
    )
    assert "1.mlp.shared_expert_gate" in told
    told = refused_before_any_forward(
        tiny.llama(), "safety_rank=64", target_modules=["q_proj", "up_proj"], safety_rank=64
    )
    assert re.search(r"safety_rank_pattern=\{r'.*q_proj': 16\}", told)


def test_models_that_carry_adapters_already(tmp_path):
    saved = get_peft_model(tiny.llama(), tiny.salora_config())
    saved.save_pretrained(tmp_path)
    for wrapped in (saved, get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])), saved.base_model):
        refused_before_any_forward(wrapped, r"is a (PeftModel\w*|SaLoRAModel) already.*merge_and_unload")
    with pytest.raises(ValueError, match=r"is a PeftModel.* already"):
        load_for_training(saved, tmp_path)


def test_a_weight_that_two_layers_share():
    """Merged, one layer would get the update of the other, not kept out of its directions; modules may be shared."""
    model, module = tiny.llama(), tiny.llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    told = refused_before_any_forward(model, "2 of 4 have their weight in common with another layer")
    options = {"init": "zero", "safety_data": tiny.token_rows(8), "input_safety_rank": 8}
    pattern = re.search(r"exclude_modules=r'(.*?)'", told).group(1)
    get_peft_model(model, tiny.salora_config(exclude_modules=pattern, **options))
    module.model.layers[1].self_attn.q_proj = module.model.layers[0].self_attn.q_proj
    get_peft_model(module, tiny.salora_config(**options))


def test_targets_that_other_options_leave_out_are_told_with_them():
    refused_before_any_forward(
        tiny.llama(),
        r"matches no module of LlamaForCausalLM together with layers_to_transform=\[7\].*the first is 'model.layers.0.",
        layers_to_transform=[7],
    )


def test_layers_without_weights_in_this_process(tmp_path):
    """Offloaded by accelerate, some of them, or not loaded; and offloaded when the adapter is there."""
    offloaded = tiny.llama()
    disk_offload(offloaded.model.layers[1], str(tmp_path), torch.device("cpu"))
    told = refused_before_any_forward(offloaded, "device_map: 2 of 4 target layers are offloaded")
    pattern = re.search(r"exclude_modules=r'(.*?)'", told).group(1)
    options = {"init": "zero", "safety_data": tiny.token_rows(8), "input_safety_rank": 8, "exclude_modules": pattern}
    model = get_peft_model(offloaded, tiny.salora_config(**options))
    module = model.base_model.safety_module()
    with torch.device("meta"):
        absent = tiny.llama()
    refused_before_any_forward(absent, "on the meta device, without weights", **options, safety_module=module)
    with pytest.raises(RuntimeError, match="factors are on the meta device"):
        model.to("meta").save_pretrained(tmp_path / "adapter")


def test_encoder_decoders():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    refused_before_any_forward(model, "an encoder and a decoder", target_modules=["q"], task_type="SEQ_2_SEQ_LM")


def test_layers_that_text_does_not_pass():
    """All of them in one message, with advice that works."""
    told = refused_before_any_forward(with_vision(), "4 of 8 are outside of the language model")
    pattern = re.search(r"exclude_modules=r'(.*?)'", told).group(1)
    targets = re.search(r"lora_target_modules: '(.*?)'", told).group(1)
    for options in ({"exclude_modules": pattern}, {"target_modules": targets}):
        model = get_peft_model(with_vision(), tiny.salora_config(**options))
        assert len(model.targeted_module_names) == 4
        assert all("language_model" in name for name in model.targeted_module_names)
    refused_before_any_forward(with_vision(), "vision_tower", target_modules="all-linear")


def test_layers_that_turn_out_unused():
    model = tiny.llama()
    for layer in model.model.layers:
        layer.self_attn.spare, layer.mlp.spare = nn.Linear(64, 64), nn.Linear(64, 64)
    with pytest.raises(CalibrationError, match=r"4 of 6 layers were not used in any forward pass") as caught:
        calibrate(model, safety_data=tiny.token_rows(16), target_modules=["q_proj", "spare"], safety_rank=8)
    pattern = re.search(r"exclude_modules=r'(.*?)'", str(caught.value)).group(1)
    calibrate(
        model,
        safety_data=tiny.token_rows(16),
        target_modules=["q_proj", "spare"],
        exclude_modules=pattern,
        safety_rank=8,
    )
    module = calibrate(tiny.llama(), safety_data=tiny.token_rows(16), target_modules=["q_proj"], safety_rank=8)
    with pytest.raises(
        ValueError, match=r"no basis for 2 of 4 target modules: .*0.*v_proj.*1.*v_proj.*exclude_modules=r"
    ):
        get_peft_model(tiny.llama(), tiny.salora_config(safety_module=module))


def test_patterns_match_what_they_should():
    layers = [f"model.layers.{i}.{part}" for i in range(3) for part in ("attn.q", "attn.v", "mlp.gate")]
    tower = [f"model.tower.layers.{i}.attn.{part}" for i in range(2) for part in "qv"]
    for names, others in (
        (tower, layers),
        (layers, tower),
        ([n for n in layers if "gate" in n], [n for n in layers if "gate" not in n]),
        (layers[:1], layers[1:]),
        (layers[:4], layers[4:]),
        (layers, []),
    ):
        pattern = pattern_for(names, others)
        assert all(re.fullmatch(pattern, name) for name in names)
        assert not any(re.fullmatch(pattern, name) for name in others)
    assert pattern_for(tower, layers) == r"model\.tower\..*"
    assert listed(tower) == f"{tower[0]!r}, {tower[1]!r}, {tower[2]!r} and 1 more"
