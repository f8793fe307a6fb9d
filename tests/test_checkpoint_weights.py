"""Weights of a saved model by the names of its modules, without loading it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from salora_plugins.models.checkpoint_weights import CheckpointWeights, LoadedWeights, weight_delta, weights_of
from salora_plugins.models.weights import linear_weight


def linear_names(model, targets):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def assert_as_loaded(model, names, weights):
    assert names
    for name in names:
        with linear_weight(model.get_submodule(name)) as expected:
            assert torch.equal(weights.weight(name), expected.float()), name


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("shard", ["1GB", "50KB"])
def test_weights_are_those_of_the_loaded_model(tmp_path, architecture, shard):
    build, targets = tiny.ARCHITECTURES[architecture]
    model = build()
    folder = saved(model, tmp_path, max_shard_size=shard)
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    names = [*linear_names(model, targets), "lm_head"]  # tied to the embeddings in two of them
    assert_as_loaded(model, names, weights_of(folder, names, option="model"))
    assert_as_loaded(model, names, weights_of(model, names, option="model"))
    adapted = get_peft_model(build(), LoraConfig(target_modules=targets))
    assert_as_loaded(model, names, LoadedWeights(adapted, names, option="model"))
    assert_as_loaded(model, names, CheckpointWeights(str(folder), adapted.get_base_model(), names, option="model"))


def test_of_a_folder_with_shards_and_a_whole_file_those_that_transformers_loads(tmp_path):
    saved(tiny.llama(seed=1), tmp_path, max_shard_size="50KB")
    later = tiny.llama(seed=2)
    save_file(
        {k: v.contiguous() for k, v in later.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    names = linear_names(later, ["q_proj"])
    assert_as_loaded(AutoModelForCausalLM.from_pretrained(tmp_path), names, weights_of(tmp_path, names, option="model"))
    assert_as_loaded(later, names, weights_of(tmp_path, names, option="model"))


def test_of_another_dtype(tmp_path):
    model = tiny.llama().to(torch.bfloat16)
    weights = weights_of(saved(model, tmp_path), ["lm_head"], option="model")
    assert weights.weight("lm_head").dtype == torch.bfloat16
    assert_as_loaded(model, ["lm_head"], weights)


def test_files_of_the_model_without_its_head(tmp_path):
    model = tiny.gpt2()
    folder = saved(model.base_model, tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    names = linear_names(model, ["c_attn", "c_proj"])
    assert_as_loaded(model, names, weights_of(folder, names, option="model"))


def test_names_of_an_older_transformers_and_a_model_of_another_class(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=LlamaConfig(**tiny._SIZES).to_dict(), image_token_index=5
    )
    model = LlavaForConditionalGeneration(config)
    folder = saved(model, tmp_path)
    names = linear_names(model, ["q_proj"])
    keys = load_file(folder / "model.safetensors")
    assert not any(f"{name}.weight" in keys for name in names)
    assert_as_loaded(model, names, CheckpointWeights(str(folder), model, names, option="model"))


def test_a_difference_is_more_than_the_rounding_of_one_of_them():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert weight_delta(weight, weight.clone(), "layer") is None
    assert weight_delta(weight, weight.bfloat16(), "layer") is None
    assert weight_delta(weight.bfloat16(), weight, "layer") is None
    delta = weight_delta(weight + 1, weight.half(), "layer")
    assert delta is not None and delta.dtype == torch.float64 and (delta - 1).abs().max() < 1e-2
    many = torch.cat([weight := 0.02 * torch.randn(200, 200), 1e-6 * weight])  # the latter are subnormal in float16
    assert weight_delta(many.bfloat16(), many.half(), "layer") is None
    assert weight_delta(many.half(), many.bfloat16(), "layer") is None
    moved = many.bfloat16()
    moved[0] *= 1 + 2**-6  # to the second next number or beyond
    delta = weight_delta(moved, many.half(), "layer")
    assert delta is not None and delta.any(dim=1).nonzero().tolist() == [[0]] and delta[0].all()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    one_row = weight.bfloat16()
    one_row[2] += 1
    delta = weight_delta(one_row, weight, "layer")
    assert delta is not None and delta.any(dim=1).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"'layer' has the shape \(4, 6\) in one model and \(6, 4\)"):
        weight_delta(weight, weight.T, "layer")
    with pytest.raises(ValueError, match="NaN or infinity"):
        weight_delta(weight, weight * torch.inf, "layer")


def test_what_is_no_model_of_floating_point_safetensors_is_refused(tmp_path):
    names = linear_names(tiny.llama(), ["q_proj"])
    folder = saved(tiny.llama(), tmp_path / "model", max_shard_size="50KB")
    with pytest.raises(ValueError, match=r"base='.*model': LlamaForCausalLM has no linear layer 'h\.0\.attn\.c_attn'"):
        weights_of(folder, ["h.0.attn.c_attn"], option="base")
    for shard in folder.glob("model-0000*"):
        shard.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"base='.*model'"):
        weights_of(folder, names, option="base")

    config = json.loads((folder / "config.json").read_text())
    quantized = saved(tiny.llama(), tmp_path / "quantized")
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantized"):
        weights_of(quantized, names, option="base")

    pickled = saved(tiny.llama(), tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has neither"):
        weights_of(pickled, names, option="base")
    with pytest.raises(FileNotFoundError, match="aligned='nobody/nothing'"):
        weights_of("nobody/nothing", names, option="aligned")
