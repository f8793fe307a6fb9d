"""Calibration finds the subspaces of the definition, deterministically, and leaves the model as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from salora_plugins import SaLoRAConfig, calibrate
from salora_plugins.calibration import CalibrationError, DataError
from salora_plugins.calibration.capture import collect_statistics, position_mask
from salora_plugins.calibration.statistics import Engine, ExactStatistics
from tiny import (
    gpt2,
    llama,
    qwen2,
    refusal_rows,
    token_rows,
    tokenizer,
)

# Without the cache, since many tests calibrate twice and compare.
OPTIONS = {"target_modules": ["q_proj", "v_proj"], "safety_rank": 8, "calibration_cache": False}


def smallest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the largest principal angle between two subspaces."""
    return torch.linalg.svdvals(a.double().T @ b.double()).min().item()


@pytest.mark.parametrize("positions", ["response", "predicting"])
@pytest.mark.parametrize("build", [llama, qwen2])
def test_bases_are_the_top_singular_vectors(build, positions):
    """U_C of W X_h and V_C of X_h, from the definition: float64 SVDs of what the layer sees."""
    model, rows = build(), token_rows(12)
    layer = model.model.layers[1].self_attn.q_proj
    inputs = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0][0].double()))
    for row in rows:
        model(torch.tensor([row["input_ids"]]))
    handle.remove()
    chosen = slice(8, None) if positions == "response" else slice(7, -1)
    x = torch.cat([sequence[chosen] for sequence in inputs]).T
    wx = layer.weight.double() @ x
    module = calibrate(model, safety_data=rows, safety_positions=positions, input_safety_rank=4, **OPTIONS)
    name = "model.layers.1.self_attn.q_proj"
    for basis, values, data in (
        (module.bases[name], module.singular_values[name], wx),
        (module.input_bases[name], module.input_singular_values[name], x),
    ):
        u, s, _ = torch.linalg.svd(data, full_matrices=False)
        rank = basis.shape[1]
        assert smallest_cosine(basis, u[:, :rank]) > 1 - 1e-5
        assert torch.allclose(values.double(), s[:rank], rtol=1e-4)


def test_default_positions():
    assert SaLoRAConfig().resolved_safety_positions == "response"
    assert SaLoRAConfig(input_safety_rank=4).resolved_safety_positions == "predicting"
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    assert position_mask(labels, "response").tolist() == [[False, False, True, True, False]]
    assert position_mask(labels, "predicting").tolist() == [[False, True, True, False, False]]


def test_batch_size_and_padding_do_not_matter():
    rows = token_rows(6, length=14) + token_rows(6, length=30, seed=1)
    one, four = (calibrate(llama(), safety_data=rows, calibration_batch_size=size, **OPTIONS) for size in (1, 4))
    for name in one.bases:
        assert smallest_cosine(one.bases[name], four.bases[name]) > 1 - 1e-5


def test_same_bits_every_time():
    first, second = (calibrate(llama(), safety_data=token_rows(16), **OPTIONS) for _ in range(2))
    assert all(torch.equal(first.bases[name], second.bases[name]) for name in first.bases)


def test_model_is_left_as_it_was():
    model = gpt2().train()
    model.transformer.h[0].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    first = calibrate(model, safety_data=token_rows(16), target_modules=["c_attn"], safety_rank=8, calibration_cache=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.is_gradient_checkpointing and model.config.use_cache
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    quiet = calibrate(gpt2(), safety_data=token_rows(16), target_modules=["c_attn"], safety_rank=8, calibration_cache=False)
    assert all(torch.equal(first.bases[name], quiet.bases[name]) for name in first.bases)


def test_adapters_on_the_model_do_not_count():
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = calibrate(llama(), safety_data=token_rows(16), **OPTIONS)
    found = calibrate(adapted, safety_data=token_rows(16), **OPTIONS)
    assert found.bases.keys() == expected.bases.keys()
    assert all(torch.equal(found.bases[name], expected.bases[name]) for name in expected.bases)
    assert any(parameter.requires_grad for parameter in adapted.parameters())
    assert not adapted.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_layers_with_one_input_share_its_statistics():
    module = calibrate(
        llama(), safety_data=token_rows(16), target_modules="all-linear", safety_rank=8, input_safety_rank=4
    )
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert module.input_bases[f"{attention}q_proj"] is module.input_bases[f"{attention}v_proj"]
    assert module.input_bases[f"{mlp}gate_proj"] is module.input_bases[f"{mlp}up_proj"]
    assert module.input_bases[f"{attention}q_proj"] is not module.input_bases[f"{attention}o_proj"]


@settings(max_examples=40, deadline=None)
@given(
    dimension=st.integers(2, 24),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_streamed_statistics_equal_a_float64_svd(dimension, sizes, seed, data):
    count = sum(sizes)
    if count == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, dimension)
    rows = torch.randn(count, dimension, generator=generator) * scale
    statistics = ExactStatistics(dimension)
    for part in rows.split(sizes):
        statistics.update(part)
    rank = data.draw(st.integers(1, min(count, dimension)))
    basis, values = statistics.top(rank)
    reference = torch.linalg.svdvals(rows.double())[:rank]
    captured = torch.linalg.norm(rows.double() @ basis.double()) ** 2
    assert torch.allclose(values.double(), reference, rtol=1e-3, atol=1e-6)
    assert captured >= reference.square().sum() * (1 - 1e-5)
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    assert statistics.count == count
    assert torch.allclose(statistics.gram(), rows.double().T @ rows.double(), atol=1e-6)


def test_text_rows_need_a_tokenizer_and_take_one():
    module = calibrate(llama(), tokenizer(), safety_data=refusal_rows(), **OPTIONS)
    assert module.provenance["safety_samples"] == 16
    with pytest.raises(CalibrationError, match=r"safety_data holds text, and no tokenizer was found"):
        calibrate(llama(), safety_data=refusal_rows(), **OPTIONS)


def test_model_that_refuses_nothing():
    requests = [{"prompt": f"Please do harm number {i}."} for i in range(20)]
    with pytest.raises(CalibrationError, match=r"refused 0 of 20 requests of safety_data, so there is too little"):
        calibrate(llama(), tokenizer(), safety_data=requests, **OPTIONS)
    with pytest.raises(CalibrationError, match=r"refused 0 of \d+ requests of safety_data"):
        calibrate(llama(), tokenizer(), num_safety_samples=4, **OPTIONS)


def test_broken_models_and_ranks():
    broken = llama()
    broken.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight of 'model\.layers\.1\.self_attn\.v_proj' contains NaN"):
        calibrate(broken, safety_data=token_rows(16), **OPTIONS)
    broken = llama()
    broken.model.layers[0].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match=r"outputs of 'model\.layers\.1\.self_attn\.q_proj' contain NaN"):
        calibrate(broken, safety_data=token_rows(16), **OPTIONS)
    with pytest.raises(ValueError, match=r"safety_rank=64 is not smaller than the 64 outputs of 'model\.layers\.0"):
        calibrate(llama(), safety_data=token_rows(16), target_modules=["q_proj"], safety_rank=64)
    with pytest.raises(ValueError, match="input_safety_rank=70 is not smaller than the 64 inputs"):
        calibrate(llama(), safety_data=token_rows(16), input_safety_rank=70, **OPTIONS)
    with pytest.raises(CalibrationError, match="safety_rank=8, but the safety data has only 6 positions"):
        calibrate(llama(), safety_data=token_rows(1, length=14), **OPTIONS)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="is on the meta device, so there is nothing to calibrate on"):
        calibrate(empty, safety_data=token_rows(16), **OPTIONS)


def test_layers_that_are_not_used_or_not_called_per_token():
    model = llama()
    model.model.layers[0].self_attn.spare = nn.Linear(64, 64)
    with pytest.raises(CalibrationError, match="was not used in any forward pass"):
        calibrate(model, safety_data=token_rows(16), target_modules=["q_proj", "spare"], safety_rank=8)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(300, 16), nn.Linear(16, 16)

        def forward(self, input_ids, attention_mask):
            return self.linear(self.embed(input_ids).mean(dim=1))

    pooled = Pooled()
    row = {key: torch.ones(2, 5, dtype=torch.long) for key in ("input_ids", "labels", "attention_mask")}
    with pytest.raises(CalibrationError, match="not with one vector per token"):
        collect_statistics(pooled, {"linear": pooled.linear}, [row], Engine("exact"))


def test_unknown_options_and_data():
    with pytest.raises(ValueError, match=r"basis_method='contrast' is not registered\. Choose one of salora"):
        calibrate(llama(), safety_data=token_rows(16), basis_method="contrast", **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data="no/such/file.jsonl", **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data=[], **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data=[{"question": "?"}], **OPTIONS)
    with pytest.raises(TypeError, match="safety_rnak"):
        calibrate(llama(), safety_rnak=3)
