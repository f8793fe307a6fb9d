"""Sparse autoencoders: reading them, the subspace of their features, and SAILS, whose training starts in it."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from safetensors.torch import save_file

import tiny
from salora_plugins.activations.errors import CalibrationError
from salora_plugins.bases.sae import FeatureMeans, FeatureSubspace, principal_directions, subspace_size, top_features
from salora_plugins.bases.sparse_autoencoder import ARCHITECTURES, autoencoder_of, load_autoencoder
from salora_plugins.models.residual import residual_writer
from salora_plugins.rows.errors import DataError
from salora_plugins.rows.pairs import load_pairs, tokenize_pairs

D_IN, D_SAE = 12, 40


def weights(architecture: str, d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vectors = {name: normal(d_sae) / 4 for name in ARCHITECTURES[architecture]}
    return {"W_enc": normal(d_in, d_sae), "W_dec": normal(d_sae, d_in), "b_dec": normal(d_in), **vectors}


def config(architecture: str, **options) -> dict:
    return {
        "architecture": architecture,
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.0.0"},
        **({"k": 5} if architecture == "topk" else {}),
        **options,
    }


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


def saved(folder, kind: dict, parts: dict[str, torch.Tensor] | None = None):
    """A folder as sae-lens writes it."""
    parts = weights(kind["architecture"]) if parts is None else parts
    shape = {"d_in": parts["W_enc"].shape[0], "d_sae": parts["W_enc"].shape[1]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**shape, "dtype": "float32", "device": "cpu", **kind}))
    save_file(parts, folder / "sae_weights.safetensors")
    return folder


def test_an_autoencoder_of_sae_lens_before_6(tmp_path):
    old = {
        "hook_point": "blocks.1.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 7},
        "normalize_activations": False,
    }
    found = load_autoencoder(str(saved(tmp_path, {**old, "architecture": "standard"})))
    assert (found.architecture, found.k, found.normalization) == ("topk", 7, "none")
    assert (found.hook_point.layer, found.hook_point.kind) == (0, "resid_post")


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
    kind = {"architecture": "standard", "hook_name": hook_name}
    point = autoencoder_of(kind, weights("standard"), "here").hook_point
    assert (None if point is None else (point.layer, point.kind)) == expected


@pytest.mark.parametrize(
    ("kind", "parts", "told"),
    [
        (config("temporal"), {}, "architecture is 'temporal'"),
        (config("standard", normalize_activations="covariance_whitening"), {}, "covariance_whitening"),
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.o_proj", (3, "model.layers.3", "model.layers.3.self_attn", "attn_out")),
        ("model.layers.3.mlp.down_proj", (3, "model.layers.3", "model.layers.3.mlp", "mlp_out")),
        ("model.layers.3.mlp.experts.7.down_proj", (3, "model.layers.3", "model.layers.3.mlp.experts.7", "mlp_out")),
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
