"""Weights of a saved model by the names of its modules, without loading it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from salora_plugins.models.checkpoint_weights import CheckpointWeights
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
    with CheckpointWeights(folder) as weights:
        assert all(name in weights for name in names) and "model.layers.9.q_proj" not in weights
        assert_as_loaded(model, names, weights)


def test_of_another_dtype(tmp_path):
    model = tiny.llama().to(torch.bfloat16)
    with CheckpointWeights(saved(model, tmp_path)) as weights:
        assert weights.weight("lm_head").dtype == torch.float32
        assert_as_loaded(model, linear_names(model, ["q_proj"]), weights)


def test_files_of_the_model_without_its_head(tmp_path):
    model = tiny.gpt2()
    folder = saved(model.base_model, tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    with CheckpointWeights(folder) as weights:
        assert_as_loaded(model, linear_names(model, ["c_attn", "c_proj"]), weights)


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
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with CheckpointWeights(folder, like=adapted) as weights:
        assert_as_loaded(model, names, weights)


def test_what_cannot_be_read_is_told(tmp_path):
    model = tiny.llama()
    folder = saved(model, tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    with CheckpointWeights(folder, option="base") as weights:
        with pytest.raises(ValueError, match=r"base='.*model': it has no linear layer 'h.0.attn.c_attn'"):
            weights.weight("h.0.attn.c_attn")
        with pytest.raises(ValueError, match=r"no linear layer 'model\.norm'"):
            weights.weight("model.norm")

    tensors = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    kept = {key: value for key, value in tensors.items() if not key.startswith(name)}
    for value, message in ((tensors[f"{name}.weight"][:32], "shape"), (torch.ones(64, 64, dtype=torch.uint8), "uint8")):
        save_file({**kept, f"{name}.weight": value.contiguous()}, file, metadata={"format": "pt"})
        with CheckpointWeights(folder) as weights, pytest.raises(ValueError, match=message):
            weights.weight(name)
    save_file(kept, file, metadata={"format": "pt"})
    with CheckpointWeights(folder) as weights, pytest.raises(ValueError, match="not complete"):
        weights.weight(name)

    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        CheckpointWeights(folder)


def test_what_is_no_model_of_floating_point_safetensors_is_refused(tmp_path):
    folder = saved(tiny.llama(), tmp_path / "model", max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002.*which its model\.safetensors\.index\.json names"):
        CheckpointWeights(folder)

    config = json.loads((folder / "config.json").read_text())
    quantized = saved(tiny.llama(), tmp_path / "quantized")
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantized"):
        CheckpointWeights(quantized)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights only"):
        CheckpointWeights(pickled)
    with pytest.raises(FileNotFoundError, match="unaligned_model='nobody/nothing'"):
        CheckpointWeights("nobody/nothing", option="unaligned_model")
