"""Sparse autoencoders: reading them, the subspace of their features, and SAILS, whose training starts in it."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

import tiny
from constructed_saes import D_IN, D_SAE, config, saved, weights
from salora_plugins import (
    SafetyModule,
    SaLoRAConfig,
    audit,
    calibrate,
    export_adapter,
    load_for_training,
    project_adapter,
)
from salora_plugins.activations.errors import CalibrationError
from salora_plugins.bases.sae import (
    FeatureMeans,
    FeatureSubspace,
    for_model,
    principal_directions,
    subspace_size,
    top_features,
)
from salora_plugins.bases.sparse_autoencoder import (
    ARCHITECTURES,
    AutoencoderOutline,
    HookPoint,
    autoencoder_of,
    load_autoencoder,
    outline_of,
)
from salora_plugins.inspection import facts, summary
from salora_plugins.models.residual import normalizes_outputs, residual_writer
from salora_plugins.parametrization import safe_factor, trained_factor
from salora_plugins.rows.errors import DataError
from salora_plugins.rows.pairs import load_pairs, tokenize_pairs


def encoded_densely(kind: dict, parts: dict[str, torch.Tensor], rows: torch.Tensor) -> numpy.ndarray:
    """The formulas of the architectures in float64 numpy, one vector after the other."""
    parts = {name: tensor.double().numpy() for name, tensor in parts.items()}
    result = []
    for x in rows.double().numpy():
        if kind.get("normalize_activations") == "layer_norm":
            x = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
        elif kind.get("normalize_activations") == "constant_norm_rescale":
            x = x * math.sqrt(len(x)) / numpy.linalg.norm(x)
        x = x - parts["b_dec"] if kind.get("apply_b_dec_to_input", True) else x
        if kind["architecture"] == "gated":
            gate = x @ parts["W_enc"] + parts["b_gate"] > 0
            amount = x @ (parts["W_enc"] * numpy.exp(parts["r_mag"])) + parts["b_mag"]
            result.append(gate * numpy.maximum(amount, 0))
            continue
        before = x @ parts["W_enc"] + parts["b_enc"]
        if kind["architecture"] == "jumprelu":
            before = before * (before > parts["threshold"])
        elif kind["architecture"] == "topk":
            if kind.get("rescale_acts_by_decoder_norm"):
                before = before * numpy.linalg.norm(parts["W_dec"], axis=1)
            before = numpy.where(before >= numpy.sort(before)[-kind["k"]], before, 0)
        result.append(numpy.maximum(before, 0))
    return numpy.stack(result)


KINDS = [
    config("standard"),
    config("standard", normalize_activations="layer_norm", apply_b_dec_to_input=False),
    config("standard", normalize_activations="constant_norm_rescale"),
    config("topk"),
    config("topk", rescale_acts_by_decoder_norm=True),
    config("jumprelu", apply_b_dec_to_input=False),
    config("gated"),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_features_are_those_of_the_formulas(kind):
    parts, rows = weights(kind["architecture"]), torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    found = autoencoder_of(kind, parts, "here").encode(rows)
    expected = encoded_densely(kind, parts, rows)
    assert 0 < (expected > 0).mean() < 1
    numpy.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_features_are_those_of_sae_lens(kind, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    folder = saved(tmp_path, kind)
    rows = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    theirs = sae_lens.SAE.load_from_disk(folder)
    torch.testing.assert_close(load_autoencoder(str(folder)).encode(rows), theirs.encode(rows).detach())


def test_an_autoencoder_of_sae_lens_before_6(tmp_path):
    old = {
        "hook_point": "blocks.1.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 7},
        "normalize_activations": False,
    }
    found = load_autoencoder(str(saved(tmp_path, {**old, "architecture": "standard"})))
    assert (found.architecture, found.k, found.normalization) == ("topk", 7, "none")
    assert outline_of(str(tmp_path)).hook_point == HookPoint(0, "resid_post")


@pytest.mark.parametrize(
    ("hook_name", "expected"),
    [
        ("blocks.12.hook_resid_post", (12, "resid_post")),
        ("blocks.12.hook_attn_out", (12, "attn_out")),
        ("blocks.12.hook_mlp_out", (12, "mlp_out")),
        ("model.layers.12", (12, "resid_post")),
        ("model.layers.12.output", (12, "resid_post")),
        ("blocks.12.attn.hook_z", None),
        ("blocks.12.hook_resid_mid", None),
        ("", None),
    ],
)
def test_where_an_autoencoder_belongs(hook_name, expected):
    point = AutoencoderOutline("here", hook_name, D_IN, D_SAE).hook_point
    assert (None if point is None else (point.layer, point.kind)) == expected


@pytest.mark.parametrize(
    ("kind", "parts", "told"),
    [
        (config("temporal"), {}, "architecture is 'temporal'"),
        (config("standard", normalize_activations="covariance_whitening"), {}, "covariance_whitening"),
        (config("standard", normalize_activations="expected_average_only_in"), {}, "fold_activation_norm_scaling"),
        (config("standard", normalize_activations=True), {}, "fold_activation_norm_scaling"),
        (config("standard", activation_fn="tanh-relu"), {}, "activation_fn='tanh-relu'"),
        (config("gated", activation_fn_str="tanh-relu"), {}, "activation_fn='tanh-relu'"),
        (config("standard", finetuning_scaling_factor=True), {"scaling_factor": torch.full((D_SAE,), 2.0)}, "scaling"),
        (config("standard"), {"b_enc": None}, "lack b_enc"),
        (config("standard"), {"W_dec": torch.zeros(D_IN, D_SAE)}, "W_dec has the shape"),
        (config("standard"), {"b_enc": torch.full((D_SAE,), math.nan)}, "b_enc holds NaN"),
        (config("topk", k=0), {}, "k=0"),
    ],
)
def test_an_autoencoder_that_is_none_is_refused(kind, parts, told):
    known = kind["architecture"] if kind["architecture"] in ARCHITECTURES else "standard"
    tensors = {name: tensor for name, tensor in {**weights(known), **parts}.items() if tensor is not None}
    with pytest.raises(CalibrationError, match=f"sae='here'.*{told}"):
        autoencoder_of(kind, tensors, "here")


def test_an_autoencoder_of_a_model_with_centered_writing_weights():
    """It gets what these weights would write; models with RMSNorm are not centered."""
    parts, rows = weights("standard"), torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1)) + 3
    metadata = {
        "hook_name": "blocks.1.hook_resid_post",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    found = autoencoder_of(
        config("standard", metadata=metadata), {**parts, "scaling_factor": torch.ones(D_SAE)}, "here"
    )
    usual = autoencoder_of(config("standard"), parts, "here")
    torch.testing.assert_close(found.encode(rows), usual.encode(rows - rows.mean(1, keepdim=True)))
    for build, name, centered in (
        (tiny.gpt2, "transformer.h.1.mlp.c_proj", True),
        (tiny.llama, "model.layers.1.mlp.down_proj", False),
    ):
        assert for_model(found, build(), residual_writer(name)).of_centered_model is centered
    assert for_model(usual, tiny.gpt2(), residual_writer("model.layers.1.mlp.down_proj")) is usual


def test_a_folder_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match=r"no such folder.*RELEASE:ID"):
        load_autoencoder(str(tmp_path / "nothing"))
    with pytest.raises(CalibrationError, match=r"the folder has no cfg.json"):
        load_autoencoder(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    with pytest.raises(CalibrationError, match=r"sae-lens, which is not installed.*salora-plugins\[sae\]"):
        load_autoencoder("some-release:layer_3")
    (saved(tmp_path, config("standard")) / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_autoencoder(str(tmp_path))


def test_means_of_a_stream_and_the_features_that_differ():
    parts = weights("standard")
    parts["W_enc"][:, 0], parts["b_enc"][0] = 0, 0.1  # fires everywhere, and tells nothing
    generator = torch.Generator().manual_seed(2)
    safe, unsafe = torch.randn(700, D_IN, generator=generator), torch.randn(900, D_IN, generator=generator) + 0.3
    means = []
    for rows in (safe, unsafe):
        stream = FeatureMeans(autoencoder_of(config("standard"), parts, "here"))
        for chunk in rows.split(257):
            stream.update(chunk)
        found, count = stream.over_ranks()
        expected = encoded_densely(config("standard"), parts, rows).mean(axis=0)
        assert count == len(rows)
        numpy.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        means.append(found)
    difference = (means[0] - means[1]).abs()
    kept = top_features(*means, 0.3)
    assert kept.tolist() == difference.argsort(descending=True)[: int(0.3 * D_SAE)].tolist()
    assert 0 not in top_features(*means, 1.0) and len(top_features(*means, 1.0)) == D_SAE - 1


@pytest.mark.parametrize("count", [5, 30])
def test_principal_directions_are_those_of_a_dense_decomposition(count):
    rows = torch.randn(count, D_IN, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 9, count)[:, None]
    basis, values = principal_directions(rows)
    units = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    _, expected_values, expected = numpy.linalg.svd(units, full_matrices=False)
    numpy.testing.assert_allclose(values.numpy(), expected_values, rtol=1e-6)
    numpy.testing.assert_allclose((expected @ basis.numpy()) ** 2, numpy.eye(len(values)), atol=1e-6)
    numpy.testing.assert_allclose((basis.T @ basis).numpy(), numpy.eye(len(values)), atol=1e-12)


def test_features_that_point_one_way_are_one_direction():
    direction = torch.randn(D_IN, generator=torch.Generator().manual_seed(4))
    basis, values = principal_directions(torch.stack([direction, 3 * direction, direction / 7]))
    assert basis.shape == (D_IN, 1) and values[0] == pytest.approx(math.sqrt(3))
    assert abs(basis[:, 0] @ direction.double()) == pytest.approx(direction.norm().item())


def test_how_many_directions_a_rank_is():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # of 15: 60 %, 87 %, 93 %, 100 %
    subspace = FeatureSubspace(torch.eye(6)[:, :4], values, 15.0, "here")
    assert subspace_size(subspace, None, "m") == 2  # 80 % of the variance
    assert [subspace_size(subspace, share, "m") for share in (0.5, 0.9, 0.99)] == [1, 3, 4]
    assert subspace_size(subspace, 4, "m") == 4
    with pytest.raises(CalibrationError, match="safety_rank=5, but the kept features of here have 4 directions"):
        subspace_size(subspace, 5, "m")
    whole = FeatureSubspace(torch.eye(2), torch.ones(2), 2.0, "here")
    assert subspace_size(whole, None, "m") == 1  # the layer keeps one
    with pytest.raises(CalibrationError, match="takes all 2 directions"):
        subspace_size(whole, 0.9, "m")


@pytest.mark.parametrize(("kind", "normalizes"), [("Glm4", True), ("Gemma2", True), ("Olmo2", True), ("Llama", False)])
def test_who_normalizes_what_is_written(kind, normalizes):
    config = getattr(transformers, f"{kind}Config")(**tiny._SIZES, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert normalizes_outputs(model.get_submodule(residual_writer("model.layers.1.mlp.down_proj").block)) == normalizes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.o_proj", (3, "model.layers.3", "model.layers.3.self_attn", "attn_out")),
        ("model.layers.3.mlp.down_proj", (3, "model.layers.3", "model.layers.3.mlp", "mlp_out")),
        ("model.layers.3.mlp.experts.7.down_proj", (3, "model.layers.3", "model.layers.3.mlp", "mlp_out")),
        ("transformer.h.0.attn.c_proj", (0, "transformer.h.0", "transformer.h.0.attn", "attn_out")),
        ("transformer.h.0.mlp.c_proj", (0, "transformer.h.0", "transformer.h.0.mlp", "mlp_out")),
        ("model.layers.3.self_attn.q_proj", None),
        ("lm_head", None),
    ],
)
def test_who_writes_into_the_residual_stream(name, expected):
    found = residual_writer(name)
    assert (None if found is None else (found.layer, found.block, found.part, found.adds)) == expected


CHOSEN, REJECTED = "I won't help.", "Sure, here it is."
USER = {"role": "user", "content": "Do harm."}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Do harm.", "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": [USER], "chosen": [turn(CHOSEN)], "rejected": [turn(REJECTED)]},
        {"chosen": [USER, turn(CHOSEN)], "rejected": [USER, turn(REJECTED)], "messages": [USER, turn("Other")]},
    ],
    ids=["texts", "messages", "prompt within"],
)
def test_pairs_of_preference_rows(row):
    tokenizer = tiny.tokenizer()
    [(chosen, rejected)] = tokenize_pairs(
        load_pairs([row], option="contrastive_data"), tokenizer, max_length=512, option="contrastive_data"
    )
    for example, text in ((chosen, CHOSEN), (rejected, REJECTED)):
        response = [label for label in example.labels if label != -100]
        assert tokenizer.decode(response) == f"{text}<|im_end|>"
    start = chosen.labels.count(-100)
    assert chosen.input_ids[:start] == rejected.input_ids[:start]


def test_pairs_of_plain_texts_and_of_token_ids():
    [(chosen, rejected)] = load_pairs(
        [{"chosen": "Human: hi Assistant: no", "rejected": "Human: hi Assistant: yes"}], option="contrastive_data"
    )
    assert (chosen.prompt_text, chosen.response, rejected.response) == ("Human: hi Assistant:", " no", " yes")
    row = {"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [7, 8]}
    [(chosen, rejected)] = load_pairs([row], option="contrastive_data")
    assert chosen.labels == (-100, -100, 6) and rejected.input_ids == (4, 5, 7, 8)
    with pytest.raises(DataError, match="token id 7"):
        load_pairs([row], option="contrastive_data", vocabulary=7)


def test_the_system_column_of_pairs_is_their_system_turn():
    row = {"system": "Be kind.", "prompt": "How?", "chosen": "No.", "rejected": "So.", "source": "x"}
    [(chosen, rejected)] = load_pairs([row], option="contrastive_data")
    assert chosen.messages == rejected.messages and chosen.messages[0] == {"role": "system", "content": "Be kind."}
    [(of_dataset, _)] = load_pairs(Dataset.from_list([row]), option="contrastive_data")
    assert of_dataset == chosen


def test_rows_that_are_no_pairs():
    good = {"prompt": "Do harm.", "chosen": CHOSEN, "rejected": REJECTED}
    with pytest.raises(DataError, match=r"row 2 of contrastive_data.*no `rejected`"):
        load_pairs([good, {"prompt": "x", "chosen": "y"}], option="contrastive_data")
    equal = {**good, "rejected": CHOSEN}
    other = {"chosen": [USER, turn("a")], "rejected": [{**USER, "content": "Else"}, turn("b")]}
    with pytest.warns(UserWarning, match="2 rows without two responses"):
        assert len(load_pairs([good, equal, other], option="contrastive_data")) == 1
    with pytest.raises(DataError, match="row 1 of contrastive_data has not two responses to one request"):
        load_pairs([equal], option="contrastive_data")
    pairs = load_pairs([good], option="contrastive_data")
    with pytest.raises(DataError, match="calibration_max_length=5"):
        tokenize_pairs(pairs, tiny.tokenizer(), max_length=5, option="contrastive_data")
    with pytest.raises(DataError, match="no tokenizer"):
        tokenize_pairs(pairs, None, max_length=5, option="contrastive_data")


# A model with constructed autoencoders: the planted feature fires on the token that all safe responses consist of.

SAFE_TOKEN, UNSAFE_TOKEN = 100, 150
ARCHITECTURES_OF_MODELS = {
    "llama": (tiny.llama, ["o_proj", "down_proj"]),
    "qwen2": (tiny.qwen2, ["o_proj"]),
    "gpt2": (tiny.gpt2, ["attn.c_proj", "mlp.c_proj"]),
}
WIDTH, LAYERS = 64, 2


def pairs(count: int = 6) -> list[dict[str, list[int]]]:
    """Rows of token ids: prompts of other tokens, responses of one token each."""
    prompts = [row["input_ids"][:6] for row in tiny.token_rows(count, seed=8)]
    return [
        {"prompt_ids": prompt, "chosen_ids": [SAFE_TOKEN] * 4, "rejected_ids": [UNSAFE_TOKEN] * 4}
        for prompt in ([token for token in row if token not in (SAFE_TOKEN, UNSAFE_TOKEN)] for row in prompts)
    ]


def blocks(model) -> list[torch.nn.Module]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def stream(model, layer: int, token: int) -> torch.Tensor:
    """What a block puts out at the responses' positions, (n, d)."""
    found = []

    def hook(module, args, output) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0, -4:])

    handle = blocks(model)[layer].register_forward_hook(hook)
    with torch.no_grad():
        for row in pairs():
            model(input_ids=torch.tensor([row["prompt_ids"] + [token] * 4]))
    handle.remove()
    return torch.cat(found)


def reader_of(safe: torch.Tensor, unsafe: torch.Tensor) -> torch.Tensor:
    """A direction (d,) whose product is 1 with the rows of the one, and -1 with those of the other."""
    rows = torch.cat([safe, unsafe]).double()
    sides = torch.cat([torch.ones(len(safe)), -torch.ones(len(unsafe))]).double()
    return (torch.linalg.pinv(rows) @ sides).float()


def planted(folder, model, count: int = 1) -> tuple[str, dict[int, torch.Tensor]]:
    """
    Autoencoders of all layers with `count` features that fire on the safe token only, others that fire everywhere, and
    others that never do. Returns the option `sae`, and layer -> the planted directions (d, count).
    """
    directions = {}
    for layer in range(LAYERS):
        safe, unsafe = stream(model, layer, SAFE_TOKEN), stream(model, layer, UNSAFE_TOKEN)
        reader = reader_of(safe, unsafe)
        parts = weights("standard", WIDTH, 20, seed=layer)
        parts["W_enc"].zero_()
        parts["b_dec"].zero_()
        parts["b_enc"][:] = torch.linspace(-1, 1, 20)
        parts["W_enc"][:, :count] = reader[:, None] * torch.linspace(1, 2, count)
        parts["b_enc"][:count] = 0
        kind = {"architecture": "standard", "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}
        saved(folder / f"layer_{layer}", kind, parts)
        directions[layer] = torch.linalg.qr(parts["W_dec"][:count].double().T).Q
    return f"{folder}/layer_{{layer}}", directions


def overlap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The smallest cosine of the principal angles between two subspaces."""
    return torch.linalg.svdvals(found.double().T @ expected).min().item()


def sae_config(sae: str | dict, **options) -> SaLoRAConfig:
    defaults = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj", "down_proj"],
        "basis_method": "sae",
        "sae": sae,
        "contrastive_data": pairs(),
        "input_safety_rank": 0,
        "init": "zero",
        "task_type": "CAUSAL_LM",
    }
    return SaLoRAConfig(**{**defaults, **options})


@pytest.mark.parametrize("architecture", ARCHITECTURES_OF_MODELS)
def test_a_planted_direction_is_found_and_kept_out_of(architecture, tmp_path):
    make, targets = ARCHITECTURES_OF_MODELS[architecture]
    model = make()
    sae, directions = planted(tmp_path, model, count=3)
    model = get_peft_model(model, sae_config(sae, target_modules=targets, safety_rank=3))
    safety_module = model.base_model.safety_module()
    for name, basis in safety_module.bases.items():
        assert basis.shape == (WIDTH, 3)
        assert overlap(basis, directions[residual_writer(name).layer]) > 1 - 1e-6
    assert set(safety_module.sides) == {"output"} and "safety_samples" not in safety_module.provenance
    assert f"Sparse autoencoders: {sae}, 0.3 of their features" in summary(safety_module)
    assert "6 pairs, response positions" in summary(safety_module)
    assert safety_module.provenance["sae"] == sae and safety_module.provenance["basis_method"] == "sae"
    train_a_little(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert audit(folder).is_outside and audit(folder).largest_shares["output"] < 1e-6


def test_the_default_rank_is_a_share_of_the_variance(tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model, count=10)
    found = calibrate(model, **options_of_calibration(sae_config(sae, sae_feature_share=0.5)))
    for name, basis in found.bases.items():
        _, layer, *_ = name.split("layers")[1].split(".")
        rows = load_autoencoder(sae.replace("{layer}", layer)).decoder[:10].double().numpy()
        values = numpy.linalg.svd(rows / numpy.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
        shares = (values**2).cumsum() / (values**2).sum()
        assert basis.shape[1] == int((shares >= 0.8).argmax()) + 1
        assert found.sides["output"].captured_energy[name] == pytest.approx(shares[basis.shape[1] - 1], rel=1e-4)
    more = calibrate(model, **options_of_calibration(sae_config(sae, sae_feature_share=0.5, safety_rank=0.95)))
    entropy = calibrate(
        model, **options_of_calibration(sae_config(sae, sae_feature_share=0.5, safety_rank="entropy:0.5"))
    )
    for name, basis in found.bases.items():
        assert entropy.bases[name].shape[1] < basis.shape[1] < more.bases[name].shape[1]
    numbers = sorted(basis.shape[1] for basis in found.bases.values())
    extent = f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
    assert f"{extent} output directions (the default with sae: a share of the variance" in facts(found.provenance)
    assert "default with sae" not in facts(more.provenance) and "no more" not in facts(more.provenance)
    asked = calibrate(model, **options_of_calibration(sae_config(sae, sae_feature_share=0.5, safety_rank=32)))
    assert all(torch.equal(asked.bases[name], basis) for name, basis in found.bases.items())  # the default, said aloud
    # All that a file has is taken of it, though the default is a number.
    more.save(tmp_path / "more.safetensors")
    wrapped = get_peft_model(
        tiny.llama(), SaLoRAConfig(target_modules=["o_proj", "down_proj"], safety_module=tmp_path / "more.safetensors")
    )
    assert wrapped.base_model.safety_module().bases.keys() == more.bases.keys()


def test_the_input_side_is_found_as_always(tmp_path):
    model = tiny.llama()
    sae, directions = planted(tmp_path, model)
    options = {"safety_data": tiny.token_rows(16), "input_safety_rank": 8, "calibration_cache": False}
    usual = calibrate(model, target_modules=["o_proj", "down_proj"], safety_rank=4, **options)
    found = calibrate(model, **options_of_calibration(sae_config(sae, **options)))
    for name, basis in found.input_bases.items():
        torch.testing.assert_close(basis, usual.input_bases[name])
        assert overlap(found.bases[name], directions[residual_writer(name).layer]) > 1 - 1e-6
    assert found.provenance["safety_samples"] == 16


def options_of_calibration(config: SaLoRAConfig) -> dict:
    names = ("target_modules", "basis_method", "sae", "contrastive_data", "contrastive_positions", "sae_feature_share")
    more = ("safety_rank", "input_safety_rank", "safety_data", "calibration_cache", "layers_to_transform", "variant")
    return {name: getattr(config, name) for name in (*names, *more)}


def train_a_little(model, steps: int = 3, seed: int = 0) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        batch = tiny.token_batch(seed=seed + step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_one_chunk_of_autoencoders_is_loaded_at_a_time(tmp_path, monkeypatch):
    """What does not fit is found before any is; and chunks of one find what all together do."""
    model, loaded = tiny.llama(), []
    sae, _ = planted(tmp_path, model)
    options = options_of_calibration(sae_config(sae))
    together = calibrate(model, **options)

    def load(source):
        assert all(reference() is None for reference in loaded)
        autoencoder = load_autoencoder(source)
        loaded.append(weakref.ref(autoencoder))
        return autoencoder

    monkeypatch.setattr("salora_plugins.bases.sae.load_autoencoder", load)
    monkeypatch.setattr("salora_plugins.bases.sae._BYTES_AT_ONCE", 1)
    alone = calibrate(model, **options)
    assert len(loaded) == LAYERS
    assert all(torch.equal(basis, alone.bases[name]) for name, basis in together.bases.items())
    kind = {"architecture": "standard", "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    saved(tmp_path / "layer_1", kind, weights("standard", WIDTH, 20))
    with pytest.raises(CalibrationError, match="is for layer 0"):
        calibrate(model, **options)
    assert len(loaded) == LAYERS


def test_mappings_of_layers(tmp_path):
    model = tiny.llama()
    sae, directions = planted(tmp_path, model)
    of_layers = {"1": sae}
    for mapping in (of_layers, {1: Path(sae)}):
        found = calibrate(model, **options_of_calibration(sae_config(mapping, layers_to_transform=[1])))
        assert all(overlap(basis, directions[1]) > 1 - 1e-6 for basis in found.bases.values())
        assert found.provenance["sae"] == of_layers
    with pytest.raises(CalibrationError, match=r"sae has none for layer 0.*it has some for 1.*layers_to_transform"):
        calibrate(model, **options_of_calibration(sae_config(of_layers)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"target_modules": ["q_proj", "o_proj"]},
            r"q_proj' .*do not write into the residual stream.*exclude_modules=",
        ),
        ({"sae": None}, "needs SAEs"),
        ({"sae": "{folder}/layer_0"}, r"is for layer 0 .*down_proj|o_proj is in layer 1"),
        ({"sae": "{folder}/nothing_{layer}"}, "no such folder"),
        ({"contrastive_data": None}, "give contrastive_data"),
        ({"contrastive_positions": "prompt"}, "share their prompt"),
        ({"sae_feature_share": 0.0}, "sae_feature_share=0.0"),
        ({"safety_rank": 40}, r"safety_rank=40, but the kept features of .* have 1 directions"),
        ({"contrastive_data": "same"}, "no feature differs"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, told, tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model)
    options = {"sae": sae, **options}
    if isinstance(options["sae"], str):
        options["sae"] = options["sae"].replace("{folder}", str(tmp_path))
    if options.get("contrastive_data") == "same":
        # Nothing but the order differs, and the planted feature fires as often in both.
        row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [7, 9]}
        options["contrastive_data"] = [row]
        never_firing(tmp_path)
    with pytest.raises(CalibrationError, match=told):
        calibrate(model, **options_of_calibration(sae_config(**options)))


def never_firing(folder) -> None:
    for layer in range(LAYERS):
        parts = weights("standard", WIDTH, 20)
        parts["W_enc"].zero_()
        parts["b_enc"][:] = -1
        kind = {"architecture": "standard", "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}
        saved(folder / f"layer_{layer}", kind, parts)


@pytest.mark.parametrize(
    ("hook", "width", "told"),
    [
        ("blocks.{layer}.hook_resid_post", 32, "activations of 32 numbers, and .* writes 64"),
        ("blocks.{layer}.hook_mlp_out", WIDTH, "into which .*o_proj does not write: leave o_proj out"),
        ("blocks.{layer}.attn.hook_z", WIDTH, r"must be for the residual stream behind its layer"),
    ],
)
def test_an_autoencoder_of_another_place_is_refused(hook, width, told, tmp_path):
    for layer in range(LAYERS):
        kind = {"architecture": "standard", "metadata": {"hook_name": hook.replace("{layer}", str(layer))}}
        saved(tmp_path / f"layer_{layer}", kind, weights("standard", width, 20))
    with pytest.raises(CalibrationError, match=told):
        calibrate(tiny.llama(), **options_of_calibration(sae_config(f"{tmp_path}/layer_{{layer}}")))


def test_an_autoencoder_of_what_the_mlp_adds(tmp_path):
    """Its features are read where the MLP ends."""
    model = tiny.llama()
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(6))
    for layer in range(LAYERS):
        found: list[torch.Tensor] = []
        handle = blocks(model)[layer].mlp.register_forward_hook(
            lambda m, a, output, into=found: into.append(output[0, -4:])
        )
        for token in (SAFE_TOKEN, UNSAFE_TOKEN):
            with torch.no_grad():
                model(input_ids=torch.tensor([pairs()[0]["prompt_ids"] + [token] * 4]))
        handle.remove()
        parts = weights("standard", WIDTH, 20)
        parts["W_enc"].zero_()
        parts["b_enc"][:], parts["b_dec"][:] = -1, 0
        parts["W_enc"][:, 0], parts["b_enc"][0] = reader_of(*found), 0
        parts["W_dec"][0] = direction
        kind = {"architecture": "standard", "metadata": {"hook_name": f"blocks.{layer}.hook_mlp_out"}}
        saved(tmp_path / f"layer_{layer}", kind, parts)
    options = {"target_modules": ["down_proj"], "contrastive_data": pairs()[:1]}
    found = calibrate(model, **options_of_calibration(sae_config(f"{tmp_path}/layer_{{layer}}", **options)))
    expected = (direction / direction.norm()).double()[:, None]
    assert all(overlap(basis, expected) > 1 - 1e-6 for basis in found.bases.values())


# SAILS: a start in the subspace, and no protection.


def sails_config(sae: str | dict, **options) -> SaLoRAConfig:
    own = {"variant": "sails", "init": None, "basis_method": "salora", "input_safety_rank": None}
    return sae_config(sae, **{**own, "sae_feature_share": 0.5, **options})


@pytest.mark.parametrize("architecture", ARCHITECTURES_OF_MODELS)
def test_sails_starts_in_the_subspace_at_the_very_model(architecture, tmp_path):
    make, targets = ARCHITECTURES_OF_MODELS[architecture]
    model = make()
    batch = tiny.token_batch()
    before = model(input_ids=batch).logits.detach()
    sae, directions = planted(tmp_path, model, count=5)
    wrapped = get_peft_model(model, sails_config(sae, target_modules=targets))
    torch.testing.assert_close(wrapped(input_ids=batch).logits, before, rtol=1e-4, atol=1e-4 * before.abs().max())
    subspaces = wrapped.base_model.safety_module().bases
    for name, subspace in subspaces.items():
        layer = wrapped.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        torch.testing.assert_close(trained_factor(b).detach(), 0.1 * subspace[:, :2])
        assert overlap(trained_factor(b).detach() * 10, directions[residual_writer(name).layer]) > 1 - 1e-5
        assert torch.equal(safe_factor(b).offset, trained_factor(b)) and safe_factor(b).basis is None
        assert trained_factor(a).abs().max() > 0 and safe_factor(a).basis is None
        assert not layer.get_delta_weight("default").any()
    assert wrapped.peft_config["default"].init == "sails"


def test_sails_trains_within_and_outside_and_claims_nothing(tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model, count=5)
    wrapped = get_peft_model(model, sails_config(sae))
    train_a_little(wrapped)
    wrapped.eval()
    folder, batch = tmp_path / "adapter", tiny.token_batch()
    wrapped.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny.llama(), folder).eval()
    torch.testing.assert_close(loaded(input_ids=batch).logits, wrapped(input_ids=batch).logits, rtol=1e-4, atol=1e-4)
    assert type(loaded.peft_config["default"]) is LoraConfig and loaded.peft_config["default"].r == 4
    with pytest.raises(ValueError, match="directions that a SAILS adapter starts in, and nothing is kept out of them"):
        audit(folder)
    card = (folder / "README.md").read_text()
    assert "## SAILS" in card and "Protected | nothing" in card and "there is no certificate" in card
    assert "‖" not in card and "salora" not in card.split("---")[1].replace("salora-plugins", "")
    assert not SafetyModule.load(folder).protects
    assert summary(SafetyModule.load(folder)).startswith("SAILS: directions that a training starts in. Nothing is prot")
    project_to = tmp_path / "projected"
    with pytest.raises(ValueError, match="directions that a SAILS adapter starts in"):
        project_adapter(folder, folder, project_to)
    assert not project_to.exists()
    usual = calibrate(
        tiny.llama(), target_modules=["o_proj", "down_proj"], safety_rank=4, safety_data=tiny.token_rows(8)
    )
    assert audit(folder, usual).verdict == "inside"
    assert export_adapter(folder, tmp_path / "exported").safety_shares is None


def test_a_resumed_sails_run_equals_an_uninterrupted_one(tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model, count=5)
    trained = {}
    for interrupted in (False, True):
        torch.manual_seed(3)
        wrapped = get_peft_model(tiny.llama(), sails_config(sae))
        step_with_sgd(wrapped, range(2))
        if interrupted:
            wrapped.save_pretrained(tmp_path / "checkpoint")
            wrapped = load_for_training(tiny.llama(), tmp_path / "checkpoint")
            assert wrapped.peft_config["default"].variant == "sails"
        step_with_sgd(wrapped, range(2, 4))
        trained[interrupted] = get_peft_model_state_dict(wrapped)
    assert trained[True].keys() == trained[False].keys()
    for name, tensor in trained[False].items():
        torch.testing.assert_close(trained[True][name], tensor, rtol=1e-5, atol=1e-6)


def step_with_sgd(model, numbers) -> None:
    """Without a state of the optimizer."""
    for number in numbers:
        batch = tiny.token_batch(seed=number)
        model(input_ids=batch, labels=batch).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-2 * parameter.grad
                    parameter.grad = None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"init": "zero"}, "start of its own"),
        ({"basis_method": "actsvd"}, "takes the directions of 'sae'"),
        ({"safety_data": ["a request"]}, "safety_data=.* protects nothing"),
        ({"input_safety_rank": 4}, "input_safety_rank=.* protects nothing"),
        ({"safety_positions": "prompt"}, "safety_positions=.* protects nothing"),
        ({"variant": "two-sided", "init": "sails", "basis_method": "sae"}, "the start of variant='sails'"),
    ],
    ids=str,
)
def test_options_that_contradict_sails(options, told):
    with pytest.raises(ValueError, match=told):
        sails_config("folder/layer_{layer}", **options)


def test_more_rank_than_the_subspace_has_is_refused(tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model, count=5)
    with pytest.raises(ValueError, match=r"r=9, but the SAE subspace of .*o_proj has \d directions"):
        get_peft_model(model, sails_config(sae, r=9))


def test_directions_to_protect_and_to_start_in_are_not_confused(tmp_path):
    model = tiny.llama()
    sae, _ = planted(tmp_path, model, count=5)
    get_peft_model(tiny.llama(), sails_config(sae)).save_pretrained(tmp_path / "sails")
    with pytest.raises(ValueError, match="variant='two-sided' with the directions that a SAILS adapter starts in"):
        get_peft_model(
            tiny.llama(), SaLoRAConfig(target_modules=["o_proj", "down_proj"], safety_module=tmp_path / "sails")
        )
    protecting = calibrate(model, **options_of_calibration(sae_config(sae)))
    with pytest.raises(ValueError, match="variant='sails' with a safety module"):
        get_peft_model(tiny.llama(), SaLoRAConfig(variant="sails", target_modules=["o_proj"], safety_module=protecting))


@pytest.mark.parametrize("resumed", ["sails", "protecting"])
def test_a_checkpoint_of_the_other_kind_changes_no_basis(resumed, tmp_path):
    sae, _ = planted(tmp_path, tiny.llama(), count=5)
    configs = {"sails": sails_config(sae), "protecting": sae_config(sae, init="pissa")}
    get_peft_model(tiny.llama(), configs.pop(resumed)).save_pretrained(tmp_path / "checkpoint")
    (config,) = configs.values()
    wrapped = get_peft_model(tiny.llama(), config)
    layers = [layer for name, layer in wrapped.named_modules() if name.endswith("lora_B.default")]
    before = [(safe_factor(layer).basis, trained_factor(layer).detach().clone()) for layer in layers]
    with pytest.raises(ValueError, match=r"checkpoint was saved by a .* training.*Resume with the variant"):
        wrapped.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    for layer, (basis, factor) in zip(layers, before, strict=True):
        assert safe_factor(layer).basis is basis and torch.equal(trained_factor(layer), factor)
    assert wrapped.base_model.safety_module().protects == (resumed == "sails")


def test_trl_arguments_make_the_same_configuration(tmp_path):
    trl = pytest.importorskip("trl")
    from salora_plugins.integrations.trl import SaLoRAArguments, get_peft_config

    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pairs()[0]) + "\n")
    sae, _ = planted(tmp_path, tiny.llama(), count=5)
    given = ["--use_salora", "--variant", "sails", "--sae", sae, "--contrastive_data", str(file)]
    parser = trl.TrlParser((trl.ModelConfig, SaLoRAArguments))
    model_args, salora_args = parser.parse_args_and_config(
        [*given, "--sae_feature_share", "0.5", "--lora_r", "2", "--lora_target_modules", "o_proj", "down_proj"]
    )
    found = get_peft_config(model_args, salora_args)
    assert (found.variant, found.init, found.sae, found.contrastive_data) == ("sails", "sails", sae, str(file))
    wrapped = get_peft_model(tiny.llama(), found)
    assert len(wrapped.base_model.safety_module().bases) == 2 * LAYERS
