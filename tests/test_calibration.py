"""Calibration finds the subspaces of the definition, deterministically, and leaves the model as it was."""

import json
import logging
import os
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from salora_plugins import SafetyModule, SaLoRAConfig, calibrate, load_for_training
from salora_plugins.activations import waiting
from salora_plugins.activations.capture import collect_statistics
from salora_plugins.activations.positions import position_mask
from salora_plugins.activations.statistics import Engine, ModuleStatistics
from salora_plugins.activations.vectors import ExactStatistics
from salora_plugins.calibration import CalibrationError, DataError, calibrate_with, refusals, settings, task_bases
from salora_plugins.calibration.basis import compute_bases, top_singular_vectors
from salora_plugins.calibration.refusals import (
    OPENING_TOKENS,
    RESPONSE_TOKENS,
    VERDICT_TOKENS,
    Answering,
    add_own_refusals,
)
from salora_plugins.calibration.rows import safety_rows
from salora_plugins.calibration.settings import RowSettings
from salora_plugins.inference.greedy import greedy_answers
from salora_plugins.inspection import facts, summary
from salora_plugins.rows.reading import load_examples
from salora_plugins.rows.tokenizing import render_rows
from salora_plugins.support import linear_algebra
from tiny import (
    gpt2,
    llama,
    qwen2,
    refusal_rows,
    smallest_cosine,
    token_rows,
    tokenizer,
)

# Without the cache, since many tests calibrate twice and compare.
OPTIONS = {"target_modules": ["q_proj", "v_proj"], "safety_rank": 8, "calibration_cache": False}


@pytest.mark.parametrize("positions", ["response", "predicting", "prompt", "all"])
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
    chosen = {"response": slice(8, None), "predicting": slice(7, -1), "prompt": slice(8), "all": slice(None)}[positions]
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
    assert SaLoRAConfig().resolved_safety_positions == "prompt"
    assert SaLoRAConfig(input_safety_rank=4).resolved_safety_positions == "prompt"
    assert SaLoRAConfig(input_safety_rank=0).resolved_safety_positions == "response"
    assert SaLoRAConfig(variant="paper").resolved_safety_positions == "response"
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    assert position_mask(labels, "response").tolist() == [[False, False, True, True, False]]
    assert position_mask(labels, "predicting").tolist() == [[False, True, True, False, False]]
    labels = torch.tensor([[-100, 5, -100, -100], [-100, -100, -100, -100]])
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert position_mask(labels, "prompt", padding).tolist() == [[True, False, True, False], [False] * 4]
    assert position_mask(labels, "all", padding).tolist() == [[True, True, True, False], [False] * 4]


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
    options = {**OPTIONS, "target_modules": ["c_attn"], "safety_data": token_rows(16)}
    first = calibrate(model, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.is_gradient_checkpointing and model.config.use_cache
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    quiet = calibrate(gpt2(), **options)
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


def test_text_rows_need_a_tokenizer_and_take_one():
    module = calibrate(llama(), tokenizer(), safety_data=refusal_rows(), **OPTIONS)
    assert module.provenance["safety_samples"] == 16
    with pytest.raises(CalibrationError, match=r"safety_data holds text, and no tokenizer was found"):
        calibrate(llama(), safety_data=refusal_rows(), **OPTIONS)


def test_model_that_refuses_nothing():
    for options in ({}, {"num_safety_samples": 4}):  # however few are wanted, all are asked
        with pytest.raises(CalibrationError, match=r"refused 0 of 20 requests of safety_data, so there is too little"):
            calibrate(llama(), tokenizer(), safety_data=asked(20), **options, **OPTIONS)


def asked(count: int) -> list[dict]:
    return [{"prompt": f"Please do harm number {i}."} for i in range(count)]


@pytest.mark.parametrize(("answered", "unanswered"), [(8, 1), (8, 8), (16, 40), (1, 1)])
def test_answered_rows_suffice_beside_requests_that_the_model_does_not_refuse(answered, unanswered, caplog):
    rows = [*refusal_rows(answered), *asked(unanswered)]
    module = calibrate(llama(), tokenizer(), safety_data=rows, **OPTIONS)
    assert module.provenance["safety_samples"] == answered
    assert (module.provenance["requests"], module.provenance["refusals"]) == (unanswered, 0)
    assert f"Calibrating on {answered} safety examples instead of {answered + unanswered}" in caplog.text


@pytest.mark.parametrize(("answered", "unanswered"), [(8, 9), (1, 2), (15, 40)])
def test_few_answered_rows_do_not_hide_a_model_that_refuses_nothing(answered, unanswered):
    rows = [*refusal_rows(answered), *asked(unanswered)]
    message = rf"refused 0 of {unanswered} requests of safety_data, beside {answered} rows with a response, so there is"
    with pytest.raises(CalibrationError, match=message):
        calibrate(llama(), tokenizer(), safety_data=rows, **OPTIONS)


def test_requests_without_room_for_an_answer_are_not_told_as_not_refused(caplog):
    """Nor is a model called unaligned that was never asked."""
    options = {"is_refusal": lambda *_: True, "max_length": 100}
    rows = rendered([*asked(20), *({"prompt": f"{'x' * 100}{i}"} for i in range(5))])
    kept, counts = add_own_refusals(llama(), tokenizer(), rows, 25, **options)
    assert len(kept) == 20 and counts == {"requests": 20, "refusals": 20}
    assert "5 requests of safety_data are longer than calibration_max_length=100" in caplog.text
    assert "the model refused 20 of 20 requests" in caplog.text
    with pytest.raises(CalibrationError, match=r"5 requests .*calibration_max_length=100.* nothing is left"):
        add_own_refusals(llama(), tokenizer(), rows[20:], 25, **options)


def test_rows_that_repeat_others_count_once(caplog):
    rows, options = token_rows(16), {"target_modules": ["q_proj"], "safety_rank": 4, "input_safety_rank": 4}
    once = calibrate(llama(), safety_data=rows, **options)
    assert "repeat" not in caplog.text
    twice = calibrate(llama(), safety_data=[*rows, *rows[:5]], calibration_cache=False, **options)
    assert "safety_data: 5 of 21 rows repeat others and are left out." in caplog.text
    assert twice.provenance["safety_samples"] == once.provenance["safety_samples"] == 16
    for name, basis in once.bases.items():
        assert torch.allclose(basis @ basis.T, twice.bases[name] @ twice.bases[name].T, atol=1e-3)


@pytest.mark.parametrize(("compliant", "told"), [(2, False), (6, True)])
def test_responses_that_do_not_refuse_are_told(caplog, compliant, told):
    rows = [*refusal_rows(16 - compliant), *({**row, "response": "Sure! First, take"} for row in asked(compliant))]
    calibrate(llama(), tokenizer(), safety_data=rows, **OPTIONS)
    assert (f"{compliant} of 16 responses in safety_data are no refusals" in caplog.text) == told


@pytest.mark.parametrize(("number", "told"), [(15, True), (16, False)])
def test_few_examples_are_told(caplog, number, told):
    calibrate(llama(), safety_data=token_rows(number), **OPTIONS)
    assert (f"calibrating on {number} examples" in caplog.text) == told


def counting(rendered: Counter):
    """A tokenizer that counts the conversations that it renders."""
    counted = tokenizer()

    class Counting(type(counted)):
        def apply_chat_template(self, conversation, *args, **kwargs):
            rendered["".join(turn["content"] for turn in conversation)] += 1
            return super().apply_chat_template(conversation, *args, **kwargs)

    counted.__class__ = Counting
    return counted


def test_every_row_is_rendered_once_and_without_a_model():
    rendered = Counter()
    rows = [*refusal_rows(6), *asked(4)]
    settings = RowSettings(rows, "safety_data", 10, 0, 512, counting(rendered), vocabulary=None, base_model="")
    found = safety_rows(settings)
    assert len(found.rows) == 10 and found.has_requests
    # As it is asked and as it is answered, and once for all what the template writes around a request.
    own = {text: count for text, count in rendered.items() if not text.endswith("salora-content")}
    assert set(own.values()) == {1} and len(own) == 2 * 6 + 4 and rendered["salora-content"] == 3


def test_directions_follow_from_statistics_alone():
    generator = torch.Generator().manual_seed(0)
    data = {"output": torch.randn(50, 12, generator=generator), "input": torch.randn(50, 9, generator=generator)}
    statistics = {side: ExactStatistics(rows.shape[1]) for side, rows in data.items()}
    for side, rows in data.items():
        statistics[side].update(rows)
    layers = {"layer": ModuleStatistics("layer", **statistics)}
    sides = compute_bases(layers, {"output": {"layer": 3}, "input": {"layer": 0.5}}, top_singular_vectors, "salora")
    for side, rows in data.items():
        basis, energy = sides[side].bases["layer"], sides[side].energies["layer"]
        vectors = torch.linalg.svd(rows.double(), full_matrices=False).Vh[: basis.shape[1]].T
        assert smallest_cosine(basis, vectors) > 1 - 1e-5 and energy == pytest.approx(rows.square().sum().item())
    assert sides["output"].least_rank == 3 and 0.5 <= sides["input"].captured_energy["layer"] < 0.7


def test_a_calibration_renders_nothing_again(own_cache):
    rendered = Counter()
    calibrate(llama(), counting(rendered), safety_data=refusal_rows(10), target_modules=["q_proj"], safety_rank=8)
    assert rendered.pop("salora-content") == 3 and rendered.pop("Another contentsalora-content") == 1
    assert set(rendered.values()) == {1} and len(rendered) == 2 * 10


def test_a_calibration_answers_greedily_whatever_the_generation_configuration_says():
    """The examples that answers make, from which everything follows."""

    def examples(model):
        requests = load_examples(asked(8), option="safety_data", allow_missing_response=True)
        rows = render_rows(requests, tokenizer(), max_length=96, option="safety_data")
        return add_own_refusals(model, tokenizer(), rows, 8, is_refusal=lambda *_: True, batch_size=4, max_length=96)

    expected = examples(llama())
    model = llama()
    settings = model.generation_config
    settings.update(
        num_beams=2,
        repetition_penalty=1.8,
        suppress_tokens=list(range(3, 150)),
        max_time=1e-9,
        return_dict_in_generate=True,
    )
    kept = settings.to_dict()
    assert examples(model) == expected
    assert model.generation_config is settings and settings.to_dict() == kept


def test_tokens_that_the_model_does_not_know_are_refused_before_it_runs():
    model = llama()
    sizes = forward_passes(model)
    rows = token_rows(16)
    rows[5] = {"input_ids": [5, 9999], "labels": [-100, 9999]}
    with pytest.raises(
        DataError, match=r"^row 6 of safety_data has the token id 9999 at position 1, and the model has"
    ):
        calibrate(model, safety_data=rows, **OPTIONS)
    longer = tokenizer()
    longer.add_tokens(["harm"])
    for data in (refusal_rows(), asked(16)):
        with pytest.raises(DataError, match=r"'Please help me to do harm.* has the token id 259|do harm.* id 259"):
            calibrate(model, longer, safety_data=data, **OPTIONS)
    assert not sizes
    model.resize_token_embeddings(len(longer))
    calibrate(model, longer, safety_data=refusal_rows(), **OPTIONS)


@pytest.mark.parametrize("option", ["safety_data", "task_data"])
def test_a_configuration_is_not_written_to(tmp_path, option):
    """Each of two models is calibrated with its own tokenizer, found beside it."""
    without_template = tokenizer()
    without_template.chat_template = None
    folders = [tmp_path / "chat", tmp_path / "plain"]
    models = []
    for folder, own in zip(folders, (tokenizer(), without_template), strict=True):
        llama().save_pretrained(folder)
        own.save_pretrained(folder)
        models.append(type(llama()).from_pretrained(folder))
    data = {"safety_data": refusal_rows(), "task_data": refusal_rows()} if option == "task_data" else {}
    config = SaLoRAConfig(**OPTIONS, **{"safety_data": refusal_rows(), **data})
    before = dict(vars(config))
    for model, own in zip(models, (tokenizer(), without_template), strict=True):
        if option == "safety_data":
            found, expected = (
                calibrate_with(model, config),
                calibrate(llama(), own, safety_data=refusal_rows(), **OPTIONS),
            )
            bases, expected = found.bases, expected.bases
        else:
            bases = task_bases(model, config)
            expected = task_bases(llama(), SaLoRAConfig(**OPTIONS, **data, tokenizer=own))
        assert vars(config) == before
        assert all(torch.equal(bases[name], basis) for name, basis in expected.items())


def test_broken_models_and_ranks():
    broken = llama()
    broken.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight of 'model\.layers\.1\.self_attn\.v_proj' contains NaN"):
        calibrate(broken, safety_data=token_rows(16), **OPTIONS)
    broken = llama()
    broken.model.layers[0].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match=r"puts of 'model\.layers\.1\.self_attn\.q_proj' contain NaN"):
        calibrate(broken, safety_data=token_rows(16), **OPTIONS)
    with pytest.raises(ValueError, match=r"safety_rank=64 is not smaller than the 64 outputs of 'model\.layers\.0"):
        calibrate(llama(), safety_data=token_rows(16), target_modules=["q_proj"], safety_rank=64)
    with pytest.raises(ValueError, match="input_safety_rank=70 is not smaller than the 64 inputs"):
        calibrate(llama(), safety_data=token_rows(16), input_safety_rank=70, **OPTIONS)
    with pytest.raises(CalibrationError, match="safety_rank=8, but the safety data has only 6 positions"):
        calibrate(llama(), safety_data=token_rows(1, length=14), variant="paper", **OPTIONS)
    with pytest.raises(CalibrationError, match="'prompt': the safety data has no such position"):
        calibrate(llama(), safety_data=token_rows(16, prompt=0), **OPTIONS)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="is on the meta device, so there is nothing to calibrate on"):
        calibrate(empty, safety_data=token_rows(16), **OPTIONS)


def test_layers_that_are_not_used_or_not_called_per_token():
    model = llama()
    model.model.layers[0].self_attn.spare = nn.Linear(64, 64)
    with pytest.raises(CalibrationError, match=r"1 of 3 layers were not used in any forward pass"):
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
    with pytest.raises(ValueError, match=r"basis_method='contrast' is not registered\. Choose one of .*salora"):
        calibrate(llama(), safety_data=token_rows(16), basis_method="contrast", **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data="no/such/file.jsonl", **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data=[], **OPTIONS)
    with pytest.raises(DataError, match="safety_data"):
        calibrate(llama(), safety_data=[{"question": "?"}], **OPTIONS)
    with pytest.raises(TypeError, match="safety_rnak"):
        calibrate(llama(), safety_rnak=3)


def forward_passes(model: nn.Module) -> list[int]:
    """Sizes of the batches that the model is called with from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("engine", ["exact", "sketched"])
def test_one_pass_for_all_layers_and_both_sides(engine):
    model = llama()
    sizes = forward_passes(model)
    calibrate(
        model,
        safety_data=token_rows(20),
        target_modules="all-linear",
        safety_rank=8,
        input_safety_rank=4,
        calibration_engine=engine,
        calibration_cache=False,
    )
    assert sizes == [16, 4]


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and what of it makes a GPU wait."""

    def __init__(self):
        super().__init__()
        self.all = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.waits += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def operations_of_calibration(layers: int, rows: list[dict], **options) -> tuple[int, int]:
    """Those of a calibration beyond its forward passes, on a device that is launched on."""
    model = llama(num_hidden_layers=layers, num_key_value_heads=1, intermediate_size=224)
    with Operations() as passes, torch.no_grad():
        for batch in torch.tensor([row["input_ids"] for row in rows]).split(8):
            model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False, logits_to_keep=1)
    with Operations() as calibration:
        calibrate(model, safety_data=rows, calibration_batch_size=8, calibration_cache=False, **options)
    return calibration.all - passes.all, calibration.waits


@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch 2.7 takes more operations for some functions")
@pytest.mark.parametrize(
    ("targets", "most_a_batch", "most_a_layer"), [(["q_proj", "v_proj"], 13, 65), ("all-linear", 46, 245)]
)
def test_what_a_calibration_launches_and_waits_for(monkeypatch, targets, most_a_batch, most_a_layer):
    """Of a block of layers little but the taking of its vectors; a device is waited for as often for 8 as for 4."""
    monkeypatch.setattr(linear_algebra, "SYNCHRONOUS", frozenset())
    options = {"target_modules": targets, "calibration_engine": "sketched", "safety_rank": 2, "input_safety_rank": 4}
    counts = {
        (layers, size): operations_of_calibration(layers, token_rows(size, length=24), **options)
        for layers in (4, 8)
        for size in (16, 32)
    }
    for size in (16, 32):
        assert counts[4, size][1] == counts[8, size][1]
    batches = (32 - 16) // 8
    assert (counts[8, 32][1] - counts[8, 16][1]) / batches <= 3
    of_a_layer = {size: (counts[8, size][0] - counts[4, size][0]) / 4 for size in (16, 32)}
    assert (of_a_layer[32] - of_a_layer[16]) / batches <= most_a_batch
    assert of_a_layer[16] - 16 // 8 * most_a_batch <= most_a_layer


@pytest.mark.parametrize("engine", ["exact", "sketched"])
@pytest.mark.parametrize("header_weight", [1.0, 4.0])
@pytest.mark.parametrize("build", [llama, qwen2, gpt2])
def test_layers_calibrated_together_get_what_each_gets_alone(monkeypatch, build, header_weight, engine):
    """On a GPU statistics of one kind are updated and decomposed in batches; nothing else changes."""
    options = {"target_modules": "all-linear", "safety_rank": 6, "input_safety_rank": 8, "calibration_engine": engine}
    options |= {"calibration_cache": False, "header_weight": header_weight, "safety_data": token_rows(24, length=30)}
    alone = calibrate(build(), **options)
    monkeypatch.setattr(linear_algebra, "SYNCHRONOUS", frozenset())
    sizes = []
    update = waiting.update_together
    monkeypatch.setattr(
        waiting, "update_together", lambda group, *others: sizes.append(len(group)) or update(group, *others)
    )
    together = calibrate(build(), **options)
    again = calibrate(build(), **options)
    assert max(sizes) > 1
    for side, found in together.sides.items():
        for name, basis in found.bases.items():
            assert torch.equal(basis, again.sides[side].bases[name])
            assert smallest_cosine(basis, alone.sides[side].bases[name]) > 1 - 1e-6
            assert torch.allclose(
                found.singular_values[name], alone.sides[side].singular_values[name], rtol=1e-4, atol=1e-6
            )
            assert found.energies[name] == pytest.approx(alone.sides[side].energies[name], rel=1e-6)


@pytest.mark.parametrize("build", [llama, qwen2, gpt2])
@pytest.mark.parametrize("input_safety_rank", [0, 6])
def test_sketched_bases_capture_what_exact_ones_do(build, input_safety_rank):
    options = {
        "safety_data": token_rows(64),
        "target_modules": "all-linear",
        "safety_rank": 8,
        "input_safety_rank": input_safety_rank,
        "calibration_cache": False,
    }
    exact, sketched = (calibrate(build(), calibration_engine=engine, **options) for engine in ("exact", "sketched"))
    assert (exact.provenance["engine"], sketched.provenance["engine"]) == ("exact", "sketched")
    for ours, theirs in (
        (sketched.captured_energy, exact.captured_energy),
        (sketched.captured_input_energy, exact.captured_input_energy),
    ):
        assert ours.keys() == theirs.keys()
        # Random weights and tokens leave hardly any decay to find; test_statistics has the bound where there is one.
        assert all(ours[name] >= 0.85 * theirs[name] for name in ours)
    for name, energy in exact.sides["output"].energies.items():
        assert sketched.sides["output"].energies[name] == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("engine", ["exact", "sketched"])
def test_ranks_by_need(engine, tmp_path):
    module = calibrate(
        llama(),
        safety_data=token_rows(32),
        target_modules=["q_proj", "v_proj", "down_proj"],
        safety_rank=0.6,
        input_safety_rank=0.3,
        safety_rank_pattern={"layers.0.mlp.down_proj": 5, "v_proj": 0.4},
        calibration_engine=engine,
        calibration_cache=False,
    )
    module.save(tmp_path)
    module = SafetyModule.load(tmp_path)
    shares = {"q_proj": 0.6, "v_proj": 0.4}
    for name, captured in module.captured_energy.items():
        values = module.singular_values[name].double().square()
        if name == "model.layers.0.mlp.down_proj":
            assert len(values) == 5
            continue
        share = shares.get(name.rpartition(".")[2], 0.6)
        without_the_last = captured * (1 - values[-1] / values.sum()).item()
        assert without_the_last < share <= captured + 1e-5
    assert len({basis.shape[1] for basis in module.bases.values()}) > 2
    assert all(captured >= 0.3 - 1e-5 for captured in module.captured_input_energy.values())
    # An adapter takes them as they are, or fewer.
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "safety_module": str(tmp_path), "init": "zero"}
    for rank, pattern in ((0.6, {"layers.0.mlp.down_proj": 5, "v_proj": 0.4}), (32, {})):
        model = get_peft_model(llama(), SaLoRAConfig(**options, safety_rank=rank, safety_rank_pattern=pattern))
        calibrated = model.base_model.safety_module("default")
        assert all(torch.equal(calibrated.bases[name], basis) for name, basis in module.bases.items())
    few = get_peft_model(llama(), SaLoRAConfig(**options, safety_rank=0.2)).base_model.safety_module()
    assert all(few.bases[name].shape[1] <= basis.shape[1] for name, basis in module.bases.items())
    with pytest.raises(ValueError, match=r"safety_rank=0\.99, but the safety module's \d+ directions for"):
        get_peft_model(llama(), SaLoRAConfig(**options, safety_rank=0.99))


def test_shares_and_ranks_that_cannot_be_had():
    options = {"safety_data": token_rows(32), "calibration_cache": False}
    with pytest.raises(CalibrationError, match=r"safety_rank=0\.9999999: 63 directions capture less than that share"):
        calibrate(llama(), target_modules=["q_proj"], safety_rank=0.9999999, **options)
    with pytest.raises(CalibrationError, match=r"safety_rank=70, but the outputs of '.*gate_proj' have only 64 direct"):
        calibrate(llama(), target_modules=["gate_proj"], safety_rank=70, **options)
    with pytest.raises(ValueError, match=r"safety_rank_pattern: 'k_proj' decides the rank of no target module"):
        calibrate(llama(), target_modules=["q_proj"], safety_rank_pattern={"k_proj": 8}, **options)


def few_directions() -> list[dict]:
    """Many positions of the prompt, eight different ones: one prompt with many responses."""
    first, *others = token_rows(64)
    prompt = first["input_ids"][:8]
    return [first, *({**row, "input_ids": prompt + row["input_ids"][8:]} for row in others)]


@pytest.mark.parametrize("engine", ["exact", "sketched"])
def test_directions_of_rounding_errors_are_not_protected(engine, own_cache, tmp_path):
    """A default takes what there is, and the module is used again; a number that was asked for is an error."""
    options = {"safety_data": few_directions(), "calibration_engine": engine, "target_modules": ["q_proj", "down_proj"]}
    module = calibrate(llama(), safety_positions="prompt", **options)
    assert {basis.shape[1] for basis in (*module.bases.values(), *module.input_bases.values())} == {8}
    assert module.provenance["safety_rank_cut"] == module.provenance["input_safety_rank_cut"] == 4
    for values in (*module.singular_values.values(), *module.input_singular_values.values()):
        assert values[-1] > 1e-3 * values[0]
    for _ in range(2):  # computed, and from the cache
        model = get_peft_model(llama(), SaLoRAConfig(**options))
    model.save_pretrained(tmp_path)
    load_for_training(llama(), tmp_path)
    get_peft_model(llama(), SaLoRAConfig(target_modules=["q_proj"], safety_module=str(tmp_path)))
    few = r"have only 8 directions on the safety data; the rest would be rounding errors"
    with pytest.raises(CalibrationError, match=rf"input_safety_rank=12, but the inputs of .*layers\.0.* {few}"):
        calibrate(llama(), input_safety_rank=12, **options)
    with pytest.raises(CalibrationError, match=rf"safety_rank=12, but the outputs of .*layers\.0.* {few}"):
        calibrate(llama(), safety_rank=12, **options)
    with pytest.raises(
        CalibrationError, match=rf"safety_rank=12, but the outputs of 'model.*0.self_attn.q_proj' {few}"
    ):
        calibrate(llama(), safety_rank_pattern={r"0\.self_attn\.q_proj": 12}, **options)
    shares = calibrate(llama(), safety_rank=0.999999, input_safety_rank=0.999999, **options)
    assert shares.safety_rank <= 8 and shares.input_safety_rank <= 8


def test_layers_whose_outputs_are_zero():
    """As in models that were widened by blocks of zeros; and a model of zeros."""
    widened = llama()
    for layer in widened.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    told = r"The outputs of '.*0\.self_attn\.o_proj', '.*1\.self_attn\.o_proj' are zero .* exclude_modules=r'.*o_proj'"
    for rank in (32, 8, 0.9):
        with pytest.raises(CalibrationError, match=told):
            calibrate(widened, safety_rank=rank, safety_data=token_rows(16), target_modules=["q_proj", "o_proj"])
    zero = llama()
    for parameter in zero.parameters():
        parameter.data.zero_()
    with pytest.raises(CalibrationError, match=r"The outputs of .* are zero on all positions of the safety data"):
        calibrate(zero, safety_data=token_rows(16), target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "a NoneType"),
        ((np.eye(64, 8), np.ones(8)), "a ndarray and a ndarray"),
        (torch.eye(64, 8), "a Tensor"),
        ((torch.eye(64, 9), torch.ones(9)), r"shapes \(64, 9\) and \(9,\)"),
        ((torch.eye(64, 8), torch.ones(9)), r"shapes \(64, 8\) and \(9,\)"),
        ((torch.ones(64, 8), torch.ones(8)), "columns that are not orthonormal"),
        ((torch.eye(64, 8), torch.full((8,), float("nan"))), "NaN or infinity"),
        ((torch.eye(64, 8).int(), torch.ones(8)), r"torch\.int32"),
    ],
)
def test_basis_methods_that_return_something_else(monkeypatch, result, told):
    methods = {"mine": lambda statistics, rank, side: result}
    monkeypatch.setattr(settings, "basis_methods", lambda: methods)
    expected = rf"basis_method='mine' returned {told}.* for 'model\.layers\.0.*; expected a tensor of shape \(64, 8\)"
    with pytest.raises(CalibrationError, match=expected):
        calibrate(llama(), basis_method="mine", safety_data=token_rows(16), input_safety_rank=0, **OPTIONS)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(place, tmp_path):
    """Weights that accelerate fetches for each call: the same bases, and they stay offloaded."""
    from accelerate import cpu_offload, disk_offload

    options = {**OPTIONS, "target_modules": "all-linear", "safety_data": token_rows(16), "input_safety_rank": 4}
    expected = calibrate(qwen2(), **options)
    model = qwen2()
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    found = calibrate(model, **{**options, "calibration_cache": True})
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, basis in expected.bases.items():
        assert smallest_cosine(found.bases[name], basis) > 1 - 1e-5
        assert smallest_cosine(found.input_bases[name], expected.input_bases[name]) > 1 - 1e-5
        assert torch.equal(found.weight_samples[name], expected.weight_samples[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Bases in float32 of what the half-precision model computes."""
    exact = calibrate(llama(), safety_data=token_rows(32), **OPTIONS)
    found = calibrate(llama().to(dtype), safety_data=token_rows(32), **OPTIONS)
    for name, basis in found.bases.items():
        assert basis.dtype == torch.float32
        assert found.captured_energy[name] == pytest.approx(exact.captured_energy[name], rel=2e-2)


def test_sharded_and_absent_weights_are_refused_before_any_forward():
    advice = r"so there is nothing to calibrate on\. Calibrate first, .* `salora calibrate --model MODEL --out"
    with torch.device("meta"):
        absent = llama()
    with pytest.raises(ValueError, match=rf"'model.layers.0.self_attn.q_proj' is on the meta device, {advice}"):
        calibrate(absent, safety_data=token_rows(16), **OPTIONS)
    zero3 = llama()
    sizes = forward_passes(zero3)
    zero3.model.layers[1].self_attn.v_proj.weight.ds_id = 7  # what DeepSpeed marks its parameters with
    with pytest.raises(ValueError, match=rf"layers.1.self_attn.v_proj' is sharded by DeepSpeed ZeRO-3, {advice}"):
        calibrate(zero3, safety_data=token_rows(16), **OPTIONS)
    assert not sizes


def test_fsdp_is_refused_before_any_forward(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = llama()
        sizes = forward_passes(sharded)
        fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"q_proj' is sharded by FSDP, so there is nothing .* `salora calibrate"):
            calibrate(sharded, safety_data=token_rows(16), **OPTIONS)
        assert not sizes
    finally:
        dist.destroy_process_group()


def test_a_second_calibration_is_taken_from_the_cache(own_cache, caplog):
    options = {"target_modules": ["q_proj"], "safety_rank": 8, "safety_data": token_rows(16)}
    first = calibrate(llama(), **options)
    assert len(list(own_cache.iterdir())) == 1 and not caplog.records
    model = llama()
    sizes = forward_passes(model)
    second = calibrate(model, **options)
    assert not sizes
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert all(torch.equal(first.bases[name], second.bases[name]) for name in first.bases)
    assert second.provenance == first.provenance
    other_model = llama()
    with torch.no_grad():
        other_model.lm_head.weight.mul_(1.01)  # not even a target
    for model, changed in (
        (other_model, {}),
        (llama().to(torch.bfloat16), {}),
        (llama(), {"safety_data": token_rows(16, seed=1)}),
        (llama(), {"safety_rank": 9}),
        (llama(), {"safety_positions": "predicting"}),
        (llama(), {"target_modules": ["q_proj", "v_proj"]}),
        (llama(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), {}),
        (llama(), {"calibration_cache": False}),
    ):
        sizes = forward_passes(model)
        calibrate(model, **{**options, **changed})
        assert sizes, changed
    assert len(list(own_cache.iterdir())) == 8


def test_a_damaged_file_in_the_cache_is_computed_again(own_cache, caplog):
    options = {"target_modules": ["q_proj"], "safety_rank": 8, "safety_data": token_rows(16)}
    first = calibrate(llama(), **options)
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    again = calibrate(llama(), **options)
    assert "in the cache cannot be used and is computed again" in caplog.text
    assert all(torch.equal(first.bases[name], again.bases[name]) for name in first.bases)
    assert file.read_bytes() == content


def test_an_interrupted_calibration_leaves_nothing(own_cache, tmp_path, monkeypatch):
    import salora_plugins.safety_module as writer

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama(), target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16))
    assert not list(own_cache.iterdir())


def test_a_cache_that_cannot_be_written_to(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SALORA_CACHE", str(tmp_path / "file" / "cache"))
    calibrate(llama(), target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16))
    assert "is not kept for the next run" in caplog.text and "SALORA_CACHE" in caplog.text


def test_what_lies_under_a_key_is_checked(own_cache, caplog):
    options = {"target_modules": ["q_proj"], "safety_data": token_rows(16)}
    first = calibrate(llama(), safety_rank=8, **options)
    (file,) = own_cache.iterdir()
    for wrong in (
        calibrate(llama(), safety_rank=4, calibration_cache=False, **options),
        calibrate(llama(seed=1), safety_rank=8, calibration_cache=False, **options),
        calibrate(llama(), safety_rank=8, variant="paper", calibration_cache=False, **options),
        calibrate(
            llama(), safety_rank=8, calibration_cache=False, **{**options, "target_modules": ["q_proj", "v_proj"]}
        ),
    ):
        wrong.save(file)
        caplog.clear()
        again = calibrate(llama(), safety_rank=8, **options)
        assert "in the cache cannot be used and is computed again" in caplog.text and str(file) in caplog.text
        assert all(torch.equal(first.bases[name], basis) for name, basis in again.bases.items())


def test_a_cached_calibration_is_found_again_whatever_the_model_is_called(own_cache):
    options = {"target_modules": ["q_proj"], "safety_rank": 8, "safety_data": token_rows(16)}
    calibrate(llama(), **options)
    model = llama(attn_implementation="eager")
    model.config._name_or_path, model.config.pad_token_id, model.config.use_cache = "elsewhere", 2, False
    sizes = forward_passes(model)
    calibrate(model, **options)
    assert not sizes


def test_a_full_disk_and_no_home_are_no_reason_to_stop(own_cache, monkeypatch, caplog):
    from safetensors import SafetensorError

    import salora_plugins.safety_module as writer

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    options = {"target_modules": ["q_proj"], "safety_rank": 8, "safety_data": token_rows(16)}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        calibrate(llama(), **options)
    assert "is not kept for the next run" in caplog.text and not list(own_cache.iterdir())
    monkeypatch.delenv("SALORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    calibrate(llama(), **options)
    assert "Calibrated safety modules are not kept" in caplog.text


@pytest.mark.parametrize("configured", [False, True])
def test_one_line_says_what_was_calibrated(own_cache, capsys, request, configured):
    """Visible once with Python's default logging, and where the application shows INFO; a cached one says so, too."""
    root = logging.getLogger()
    before = root.level, root.handlers
    root.setLevel(logging.INFO if configured else logging.WARNING)
    root.handlers = [logging.StreamHandler()] if configured else []
    request.addfinalizer(lambda: (root.setLevel(before[0]), setattr(root, "handlers", before[1])))
    options = {"target_modules": ["q_proj"], "safety_rank": 8, "input_safety_rank": 4, "safety_data": refusal_rows()}
    module = calibrate(llama(), tokenizer(), **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Safety module: " in line]
    assert len(lines) == 1
    for part in ("16 examples", "prompt positions", "8 output directions", "4 input directions", "2 layers", " s."):
        assert part in lines[0]
    assert "with its chat template" in lines[0] and "cache" not in lines[0]
    assert facts(module.provenance).replace("Safety module", "Calibration") in summary(module)
    calibrate(llama(), tokenizer(), **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Safety module: " in line]
    assert len(lines) == 1 and "from the cache" in lines[0]


def test_layers_that_cannot_be_decomposed_together_are_alone(monkeypatch):
    """For want of memory, for one; what is found is the same."""
    options = {"safety_data": token_rows(16), "target_modules": ["q_proj", "v_proj"], "safety_rank": 4}
    together = calibrate(llama(), **options, calibration_cache=False)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("salora_plugins.activations.vectors._decompose", fail)
    alone = calibrate(llama(), **options, calibration_cache=False)
    for side, found in together.sides.items():
        for name, basis in found.bases.items():
            assert torch.linalg.matrix_norm(basis.T @ alone.sides[side].bases[name], -2) > 1 - 1e-5


@pytest.fixture
def batches_answered(monkeypatch):
    """Sizes of the batches that were answered, each with how many tokens more were asked for."""
    found = []

    def counted(model, tokenizer, prompts, *, max_new_tokens):
        found.append((len(prompts), max_new_tokens, max(map(len, prompts))))
        return greedy_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(refusals, "greedy_answers", counted)
    return found


def rendered(rows: list[dict]) -> list:
    examples = load_examples(rows, option="safety_data", allow_missing_response=True)
    return render_rows(examples, tokenizer(), max_length=512, option="safety_data")


def test_answers_are_short_where_only_the_verdict_counts(batches_answered):
    rows = rendered(asked(40))
    # By the request, so that the verdict needs no words: 36 of 40 are refused at once, the others are looked at longer.
    options = {"is_refusal": lambda request, text: not request.endswith("3."), "max_length": 512, "batch_size": 8}
    whole, whole_counts = add_own_refusals(llama(), tokenizer(), rows, 40, **options)
    assert {tokens for _, tokens, _ in batches_answered} == {RESPONSE_TOKENS}
    batches_answered.clear()
    took = Answering()
    short, counts = add_own_refusals(llama(), tokenizer(), rows, 40, **options, whole_responses=False, answering=took)
    assert counts == whole_counts == {"requests": 40, "refusals": 36}
    assert [row.input_ids for row in short] == [
        row.input_ids[: len(part.input_ids)] for row, part in zip(whole, short, strict=True)
    ]
    assert max(sum(label != -100 for label in row.labels) for row in short) <= OPENING_TOKENS
    first = [size for size, tokens, _ in batches_answered if tokens == OPENING_TOKENS]
    rest = [size for size, tokens, _ in batches_answered if tokens == VERDICT_TOKENS - OPENING_TOKENS]
    # Those that were refused, or whose answer has ended, are not asked again.
    assert sum(first) == 40 and sum(rest) == 4 and len(first) + len(rest) == len(batches_answered)
    assert took.largest_batch == 8 and took.seconds > 0 and 0 < took.tokens <= 40 * VERDICT_TOKENS


def test_no_more_requests_are_answered_than_are_needed(batches_answered):
    kept, counts = add_own_refusals(
        llama(), tokenizer(), rendered(asked(200)), 40, is_refusal=lambda *_: True, max_length=512
    )
    assert len(kept) == 40 and counts == {"requests": 40, "refusals": 40}
    assert sum(size for size, _, _ in batches_answered) == 40


def test_a_batch_holds_a_bounded_number_of_tokens(batches_answered, monkeypatch):
    monkeypatch.setattr(refusals, "TOKENS_AT_ONCE", 1000)
    rows = rendered([{"prompt": "x" * length} for length in (5, 300, 10, 200, 2000, 30)] * 3)
    kept, _ = add_own_refusals(llama(), tokenizer(), rows, 18, is_refusal=lambda *_: True, max_length=4000)
    assert [row.input_ids[: len(prompt.prompt_ids)] for row, prompt in zip(kept, rows, strict=True)] == [
        row.prompt_ids for row in rows
    ]
    assert all(size == 1 or size * (longest + tokens) <= 1000 for size, tokens, longest in batches_answered)
    assert max(size for size, _, _ in batches_answered) > 3


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch):
    rows = rendered(asked(20))
    options = {"is_refusal": lambda *_: True, "max_length": 512, "batch_size": 16}
    expected, _ = add_own_refusals(llama(), tokenizer(), rows, 20, **options)
    sizes = []

    def small(model, tokenizer, prompts, **more):
        sizes.append(len(prompts))
        if len(prompts) > 5:
            raise torch.OutOfMemoryError("no room")
        return greedy_answers(model, tokenizer, prompts, **more)

    monkeypatch.setattr(refusals, "greedy_answers", small)
    found, _ = add_own_refusals(llama(), tokenizer(), rows, 20, **options)
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    assert [row.input_ids for row in found] == [row.input_ids for row in expected]

    def never(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(refusals, "greedy_answers", never)
    with pytest.raises(torch.OutOfMemoryError):
        add_own_refusals(llama(), tokenizer(), rows, 20, **options)


def test_the_provenance_counts_every_source(tmp_path, capsys):
    for name, count in (("one", 20), ("two", 12)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusal_rows(count)))
    sources = [str(tmp_path / "one.jsonl"), tmp_path / "two.jsonl"]
    module = calibrate(llama(), tokenizer(), safety_data=sources, num_safety_samples=16, **OPTIONS)
    counts = module.provenance["safety_sources"]
    assert list(counts) == [str(path) for path in sources] and sum(counts.values()) == 16
    assert module.provenance["safety_data"] == ", ".join(counts)
    assert f"{counts[sources[0]]} of {sources[0]}" in capsys.readouterr().err
    alone = calibrate(llama(), tokenizer(), safety_data=sources[0], **OPTIONS)
    assert "safety_sources" not in alone.provenance


def test_a_source_of_which_nothing_is_used_is_told(tmp_path, caplog):
    """The model refuses none of its requests."""
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusal_rows(20)))
    (tmp_path / "two.txt").write_text("How do I bake bread?\nWhat is a verb?\n")
    sources = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.txt")]
    module = calibrate(llama(), tokenizer(), safety_data=sources, **OPTIONS)
    assert module.provenance["safety_sources"] == {sources[0]: 20, sources[1]: 0}
    assert f"nothing of {sources[1]!r} is used" in caplog.text
