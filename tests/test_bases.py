"""Basis methods that need more than the safety rows: what they get, ActSVD, the delta of weights, ranks by entropy."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

import tiny
from processes import run_ranks
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate, inspection, load_for_training, plugins
from salora_plugins.activations.statistics import Engine, ModuleStatistics
from salora_plugins.activations.vectors import ExactStatistics, rank_by_need
from salora_plugins.adapters.model_card import provenance_rows
from salora_plugins.adapters.projection import ProjectionReport
from salora_plugins.bases.actsvd import actsvd, isolated_directions
from salora_plugins.calibration import CalibrationError, DataError, utility
from salora_plugins.calibration.contrastive import contrastive_rows
from salora_plugins.calibration.settings import RowSettings
from salora_plugins.calibration.utility import utility_rows
from salora_plugins.hookspecs import BasisNeeds, hookimpl
from salora_plugins.inspection import facts, summary
from salora_plugins.prompts.builtin import everyday_prompts
from salora_plugins.ranks import RankRule, check_rank, rank_for_entropy
from salora_plugins.safety_module import SideBases
from tiny import smallest_cosine, token_rows

MODELS = {
    "llama": (tiny.llama, ["q_proj", "down_proj", "up_proj"]),
    "qwen2": (tiny.qwen2, ["q_proj", "v_proj"]),
    "gemma3": (tiny.gemma3, ["o_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn", "mlp.c_proj"]),
}
architectures = pytest.mark.parametrize(("build", "targets"), MODELS.values(), ids=MODELS)
OPTIONS = {"safety_positions": "all", "input_safety_rank": 6, "safety_rank": 8, "calibration_cache": False}
SAFETY, UTILITY = token_rows(12, seed=1), token_rows(12, seed=2)


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """W (d_out, d_in) float64."""
    weight = module.weight.detach().double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def dense_vectors(model, names, rows) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> W X (d_out, n) and X (d_in, n), float64, over all positions."""
    inputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: inputs[name].append(args[0][0].detach().double())
        )
        for name in names
    ]
    for row in rows:
        model(torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    stacked = {name: torch.cat(parts).T for name, parts in inputs.items()}
    return {name: (dense_weight(model.get_submodule(name)) @ x, x) for name, x in stacked.items()}


def top(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def statistics_of(vectors: torch.Tensor) -> ExactStatistics:
    """Of the columns of a (d, n) matrix."""
    found = ExactStatistics(vectors.shape[0])
    found.update(vectors.T.float())
    return found


# --- Ranks by entropy ---


@pytest.mark.parametrize("share", [0.2, 0.5, 0.85, 0.99])
def test_rank_for_entropy_is_lssf_s(share):
    values = torch.linspace(4, 0.1, 40, dtype=torch.float64)
    p = values**2 / (values**2).sum()
    entropies = [-(p[:rho] * p[:rho].log()).sum().item() for rho in range(1, 41)]
    expected = next(rho for rho, entropy in enumerate(entropies, 1) if entropy >= share * entropies[-1])
    energy = (values**2).sum().item()
    assert rank_for_entropy(values.float(), energy, 40, share) == expected
    # With the top of the spectrum alone as many or more, since the rest is taken as spread evenly; or none is enough.
    for known in (10, 25, 39):
        found = rank_for_entropy(values[:known].float(), energy, 40, share)
        assert found is None or found >= expected


def test_rank_for_entropy_at_the_ends():
    assert rank_for_entropy(torch.tensor([2.0]), 4.0, 1, 0.85) == 1  # one direction has no entropy to be a share of
    assert rank_for_entropy(torch.tensor([1.0, 1.0, 1.0, 1.0]), 4.0, 4, 0.75) == 3
    assert rank_for_entropy(torch.tensor([1.0, 1.0]), 4.0, 4, 0.5) == 2  # the other two are known to be at most these
    assert rank_for_entropy(torch.tensor([1.0, 1.0]), 4.0, 4, 0.75) is None


@pytest.mark.parametrize("rank", ["entropy:0", "entropy:1.5", "entropy:", "disorder:0.5"])
def test_rules_that_are_none(rank):
    with pytest.raises(ValueError, match=r"safety_rank=.*entropy:0.85"):
        check_rank("safety_rank", rank, 1)


@architectures
def test_calibrating_by_entropy(build, targets):
    model = build()
    found = calibrate(model, safety_data=SAFETY, target_modules=targets, **{**OPTIONS, "safety_rank": "entropy:0.6"})
    assert found.provenance["safety_rank"] == "entropy:0.6"
    for name, (outputs, _) in dense_vectors(model, found.bases, SAFETY).items():
        values = torch.linalg.svdvals(outputs)
        wanted = rank_for_entropy(values, values.square().sum().item(), len(values), 0.6)
        assert found.bases[name].shape[1] == wanted
        assert smallest_cosine(found.bases[name], top(outputs, wanted)) > 1 - 1e-4
    # It says what it was asked for, so that the same rule takes all of it.
    assert found.restricted_to({"output": dict.fromkeys(found.bases, "entropy:0.6")}).bases == found.bases


def test_a_sketch_that_does_not_reach_the_entropy_says_so(monkeypatch):
    vectors = Engine("sketched", 16, 16).statistics(64)
    vectors.update(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)))
    assert rank_by_need(vectors, RankRule("entropy", 0.85)) == (8, False)
    exact = statistics_of(torch.randn(64, 500, generator=torch.Generator().manual_seed(0)))
    assert rank_by_need(exact, RankRule("entropy", 0.85))[1]


# --- ActSVD ---


@architectures
def test_actsvd_is_the_definition(build, targets):
    """An orthonormal basis of the range of (I - U_u U_u^T) U_s without small sines, from float64 decompositions."""
    model = build()
    ranks = {"utility_rank": 20, "input_utility_rank": 24}
    found = calibrate(
        model,
        safety_data=SAFETY,
        utility_data=UTILITY,
        basis_method="actsvd",
        target_modules=targets,
        **ranks,
        **OPTIONS,
    )
    names = list(found.bases)
    safety, utility_vectors = dense_vectors(model, names, SAFETY), dense_vectors(model, names, UTILITY)
    for side, number in (("output", 20), ("input", 24)):
        for name in names:
            index = 0 if side == "output" else 1
            of_safety, of_utility = safety[name][index], utility_vectors[name][index]
            u_s, u_u = top(of_safety, 8 if side == "output" else 6), top(of_utility, number)
            left, sines, _ = torch.linalg.svd(u_s - u_u @ (u_u.T @ u_s), full_matrices=False)
            expected = left[:, sines >= 0.1]
            basis = found.sides[side].bases[name]
            assert basis.shape == expected.shape
            assert smallest_cosine(basis, expected) > 1 - 1e-4
            assert (basis.double().T @ u_u).abs().max() < 1e-4
            # Its values are what the safety data has in these directions, most first.
            in_basis = torch.linalg.vector_norm(basis.double().T @ of_safety, dim=1)
            values = found.sides[side].singular_values[name].double()
            assert torch.allclose(values, in_basis, rtol=1e-3)
            assert (values[:-1] >= values[1:]).all()
            captured = in_basis.square().sum() / of_safety.square().sum()
            assert found.sides[side].captured_energy[name] == pytest.approx(captured.item(), rel=1e-3)
    assert found.provenance["utility_rank"] == 20 and found.provenance["utility_samples"] == 12


def test_training_with_shares_that_actsvd_does_not_keep():
    """Utility's directions are taken out of those that make up the share; training takes all that are left."""
    options = {"safety_rank": 0.8, "input_safety_rank": 0.7, "target_modules": ["q_proj"], "calibration_cache": False}
    config = SaLoRAConfig(basis_method="actsvd", safety_data=SAFETY, utility_data=UTILITY, **options)
    found = get_peft_model(tiny.llama(), config).peft_config["default"].safety_module_in_force
    assert all(share < 0.8 for share in found.captured_energy.values())
    with pytest.raises(ValueError, match=r"safety_rank=0.75, but the safety module's .* capture less"):
        get_peft_model(tiny.llama(), SaLoRAConfig(safety_module=found, **{**options, "safety_rank": 0.75}))


def planted(*directions: tuple[int, float], dimension: int = 16) -> torch.Tensor:
    """Vectors (d, n) along unit vectors: (index, length) each."""
    columns = torch.zeros(dimension, len(directions))
    for number, (index, length) in enumerate(directions):
        columns[index, number] = length
    return columns


def test_actsvd_finds_planted_directions():
    """Safety lies in 0 to 3 and utility in 2 to 7: 0 and 1 are safety's own, the one with more of it first."""
    safety = planted((0, 2.0), (1, 3.0), (2, 9.0), (3, 8.0))
    everyday = planted((2, 5.0), (3, 5.0), (4, 4.0), (5, 3.0), (6, 2.0), (7, 1.0))
    entry = ModuleStatistics("layer", statistics_of(safety), utility=ModuleStatistics("layer", statistics_of(everyday)))
    basis, values = actsvd(entry, 4, "output")
    assert torch.allclose(basis, torch.eye(16)[:, [1, 0]], atol=1e-6)
    assert torch.allclose(values, torch.tensor([3.0, 2.0]), atol=1e-5)
    # As many as the utility data has, at most half of the layer.
    few = ModuleStatistics(
        "layer", statistics_of(safety), utility=ModuleStatistics("layer", statistics_of(safety[:, 2:3]))
    )
    assert actsvd(few, 4, "output")[0].shape == (16, 3)


def test_directions_close_to_utility_are_dropped():
    angle = 0.05
    safety = torch.tensor([[1.0, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).T
    everyday = torch.eye(4)[:, 1:2]
    found = isolated_directions(safety, everyday)
    assert found.shape == (4, 1) and abs(found[0, 0]) == pytest.approx(1)
    assert isolated_directions(safety, everyday, least_sine=0.04).shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"utility_data": SAFETY, "utility_rank": 40},
            r"utility_rank=40: the 40 output directions of utility hold all 8",
        ),
        ({"utility_data": UTILITY, "utility_rank": 64}, r"utility_rank=64 is not smaller than the 64 outputs"),
        (
            {"utility_data": UTILITY[:1], "utility_rank": 40},
            r"utility_rank=40, but .* only 19 directions on the utility",
        ),
        ({"utility_data": UTILITY, "input_utility_rank": 64}, r"input_utility_rank=64 is not smaller"),
        ({"utility_data": []}, r"utility_data has no rows"),
        ({"utility_data": [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]}, r"utility_data: no row has a response"),
        ({"utility_data": "no-such-file.jsonl"}, r"utility_data='no-such-file.jsonl': there is no such file"),
        ({"utility_data": ["Say hello."]}, r"utility_data holds text, and no tokenizer"),
        ({"utility_rank": 4, "input_safety_rank": 0, "input_utility_rank": 4}, r"input_utility_rank has no effect"),
        ({"unaligned_model": "x"}, r"unaligned_model='x' has no effect with basis_method='actsvd'.*weight-delta"),
        ({"num_utility_samples": 0}, r"num_utility_samples=0: give a whole number of at least 1"),
    ],
)
def test_what_actsvd_refuses(options, told):
    with pytest.raises((CalibrationError, DataError, ValueError), match=told):
        calibrate(
            tiny.llama(),
            safety_data=SAFETY,
            basis_method="actsvd",
            **{**OPTIONS, "target_modules": ["q_proj"], **options},
        )


def test_own_answers_of_the_utility_rows(monkeypatch):
    """Requests get the model's own greedy answers; what it refuses is left out, and "builtin" is everyday requests."""
    monkeypatch.setattr(utility, "judges", lambda: {"keyword": lambda request, answer: request.startswith("W")})
    rows = RowSettings("builtin", "utility_data", 16, 0, 200, tiny.tokenizer(), tiny.VOCABULARY, "")
    asked = [row["prompt"] for row in everyday_prompts()]
    assert any(text.startswith("W") for text in asked)
    found = utility_rows(tiny.llama(), rows, batch_size=8)
    assert len(found) == 16
    for example in found:
        prompt = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100]
        text = tiny.tokenizer().decode(prompt, skip_special_tokens=True)
        request = text.removeprefix("user\n").removesuffix("\nassistant\n")
        assert request in asked and not request.startswith("W")
        assert example.has_response
    monkeypatch.setattr(utility, "judges", lambda: {"keyword": lambda request, answer: True})
    with pytest.raises(CalibrationError, match=r"utility_data: of 128 requests the model refused \d+"):
        utility_rows(tiny.llama(), rows, batch_size=8)


def test_utility_counts_at_the_positions_of_the_safety_rows():
    """Both change with safety_positions."""
    options = {**OPTIONS, "target_modules": ["q_proj"], "basis_method": "actsvd", "safety_data": SAFETY}
    prompt = [{**row, "labels": row["labels"]} for row in UTILITY]
    other_responses = [
        {"input_ids": row["input_ids"][:8] + [9] * 12, "labels": [-100] * 8 + [9] * 12} for row in UTILITY
    ]
    found = [
        calibrate(tiny.llama(), utility_data=data, **{**options, "safety_positions": positions})
        for positions in ("prompt", "response")
        for data in (prompt, other_responses)
    ]
    same = [torch.equal(*(m.bases["model.layers.0.self_attn.q_proj"] for m in pair)) for pair in (found[:2], found[2:])]
    assert same == [True, False]


# --- The delta of two weights ---


def changed(build, targets, rank: int | None = None, size: float = 0.05):
    """The model, with a change of each target weight, of full or of this rank."""
    model = build()
    generator = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if name.endswith(tuple(targets)):
            shape = module.weight.shape
            delta = torch.randn(shape, generator=generator)
            if rank is not None:
                delta = torch.randn(shape[0], rank, generator=generator) @ torch.randn(
                    rank, shape[1], generator=generator
                )
            module.weight.data += size * delta
    return model


@pytest.fixture
def unaligned(tmp_path):
    def save(build, targets, *, rank: int | None = None, part=lambda model: model, **options) -> str:
        part(changed(build, targets, rank)).save_pretrained(tmp_path / "unaligned", **options)
        return str(tmp_path / "unaligned")

    return save


DELTA = {"basis_method": "weight-delta", "calibration_cache": False, "safety_rank": 8, "input_safety_rank": 6}


@architectures
def test_weight_delta_is_the_definition(build, targets, unaligned):
    """The top singular vectors of W_aligned - W_unaligned, and its energy; also from several files."""
    model, other = build(), changed(build, targets)
    folder = unaligned(build, targets, max_shard_size="60KB")
    found = calibrate(model, unaligned_model=folder, target_modules=targets, **DELTA)
    for name in found.bases:
        delta = dense_weight(model.get_submodule(name)) - dense_weight(other.get_submodule(name))
        u, s, vh = torch.linalg.svd(delta)
        assert smallest_cosine(found.bases[name], u[:, :8]) > 1 - 1e-4
        assert smallest_cosine(found.input_bases[name], vh[:6].T) > 1 - 1e-4
        assert torch.allclose(found.singular_values[name].double(), s[:8], rtol=1e-4)
        assert found.captured_energy[name] == pytest.approx((s[:8].square().sum() / s.square().sum()).item(), rel=1e-4)
    assert "safety_data" not in found.provenance and "positions_counted" not in found.provenance
    assert "reads no safety data" in found.provenance["leak_unknown"]


@pytest.mark.parametrize(("rank", "by_entropy"), [(0.5, False), ("entropy:0.6", True)])
def test_shares_are_of_the_delta_s_spectrum(rank, by_entropy, unaligned):
    model, other = tiny.llama(), changed(tiny.llama, ["q_proj"])
    folder = unaligned(tiny.llama, ["q_proj"])
    found = calibrate(model, unaligned_model=folder, target_modules=["q_proj"], **{**DELTA, "safety_rank": rank})
    for name, basis in found.bases.items():
        s = torch.linalg.svdvals(dense_weight(model.get_submodule(name)) - dense_weight(other.get_submodule(name)))
        parts = s.square() / s.square().sum()
        parts = -(parts * parts.log()) if by_entropy else parts
        expected = int((parts.cumsum(0) < (0.6 if by_entropy else 0.5) * parts.sum()).sum()) + 1
        assert basis.shape[1] == expected


def test_a_planted_delta_is_found_and_nothing_else(unaligned):
    """Of rank 3: no direction of rounding errors beside it, whatever is asked for."""
    folder = unaligned(tiny.llama, ["q_proj"], rank=3)
    options = {"unaligned_model": folder, "target_modules": ["q_proj"], "calibration_cache": False}
    for asked in ({}, {"safety_rank": 8, "input_safety_rank": 8}, {"safety_rank": 0.999}):
        found = calibrate(tiny.llama(), basis_method="weight-delta", **options, **asked)
        assert {basis.shape[1] for basis in found.bases.values()} == {3}
        assert all(share > 1 - 1e-5 for share in found.captured_energy.values())
    assert "(there are no more)" in facts(found.provenance)


@pytest.mark.parametrize(
    ("build", "part"),
    [(tiny.llama, lambda model: model.model), (tiny.gpt2, lambda model: model.transformer)],
    ids=["llama", "gpt2"],
)
def test_a_checkpoint_of_the_model_without_its_head(build, part, unaligned):
    """Its keys have no prefix, as those of GPT-2's own repository."""
    targets = MODELS[build.__name__][1]
    whole = calibrate(build(), unaligned_model=unaligned(build, targets), target_modules=targets, **DELTA)
    bare = calibrate(build(), unaligned_model=unaligned(build, targets, part=part), target_modules=targets, **DELTA)
    assert all(torch.equal(whole.bases[name], bare.bases[name]) for name in whole.bases)


def test_only_the_weights_that_are_needed_are_read(unaligned, monkeypatch):
    """... one after the other, and no model is run."""
    folder = unaligned(tiny.llama, ["q_proj"])
    model = tiny.llama()
    model.forward = None
    monkeypatch.setattr(type(model), "from_pretrained", None)
    found = calibrate(model, unaligned_model=folder, target_modules=["q_proj"], **DELTA)
    assert len(found.bases) == 2


DTYPES = pytest.mark.parametrize(
    ("own", "stored"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)


@DTYPES
@pytest.mark.parametrize("rank", [8, 0.9, "entropy:0.8"])
def test_dtypes_of_the_same_weights_do_not_differ(rank, own, stored, tmp_path):
    """The same weights in another dtype: the delta is zero, and not its rounding, however the rank is given."""
    tiny.llama().to(stored).save_pretrained(tmp_path)
    options = {**DELTA, "unaligned_model": str(tmp_path), "target_modules": ["q_proj"], "safety_rank": rank}
    with pytest.raises(CalibrationError, match=r"unaligned_model: its weight of .* is that of the model itself"):
        calibrate(tiny.llama().to(own), **options)


@DTYPES
def test_a_planted_delta_between_two_dtypes(own, stored, tmp_path):
    """Of three rows in float32: they are found through the rounding of the other, and nothing beside them."""
    model = tiny.llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data[[3, 7, 20]] += 0.5 * torch.randn(3, 64, generator=torch.Generator())
    model.to(stored).save_pretrained(tmp_path)
    options = {**DELTA, "unaligned_model": str(tmp_path), "target_modules": ["q_proj"]}
    for basis in calibrate(tiny.llama().to(own), **options).bases.values():
        assert basis.shape[1] == 3 and basis[[3, 7, 20]].norm() ** 2 == pytest.approx(3, abs=1e-5)


def test_a_delta_a_little_above_the_rounding_between_two_dtypes(tmp_path):
    """Of one direction in all elements, each of them smaller than its rounding."""
    model = tiny.llama()
    left, right = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) / 8
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.01 * torch.outer(left, right)
    model.save_pretrained(tmp_path)
    options = {**DELTA, "unaligned_model": str(tmp_path), "target_modules": ["q_proj"]}
    for basis in calibrate(tiny.llama().to(torch.bfloat16), **options).bases.values():
        assert basis.shape[1] == 1 and torch.linalg.norm(left @ basis) > 0.9 * torch.linalg.norm(left)


def _quantized_checkpoint(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {key: value.to(torch.int8) if "q_proj" in key else value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


BAD_CHECKPOINTS = {
    "the model itself": (tiny.llama, {}, None, r"its weight of 'model.layers.0.self_attn.q_proj' is that of the model"),
    "other shapes": (
        lambda: tiny.llama(hidden_size=32),
        {},
        None,
        r"unaligned_model=.*'model.layers.0.self_attn.q_proj' has the shape \(32, 32\) there and \(64, 64\)",
    ),
    "fewer layers": (
        lambda: tiny.llama(num_hidden_layers=1),
        {},
        None,
        r"no weight for 1 of 2 target modules: 'model.layers.1.self_attn.q_proj'",
    ),
    "another architecture": (tiny.gpt2, {}, None, r"no weight for 2 of 2 target modules.*same architecture"),
    "a quantized one": (tiny.llama, {}, _quantized_checkpoint, r"q_proj' is stored as I8, quantized perhaps"),
    "a file that is cut short": (
        tiny.llama,
        {},
        lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
        r"unaligned_model=.*model.safetensors cannot be read",
    ),
    "no weights": (
        tiny.llama,
        {},
        lambda folder: (folder / "model.safetensors").unlink(),
        r"unaligned_model=.*has neither model.safetensors nor",
    ),
    "a rank by the leak": (
        lambda: changed(tiny.llama, ["q_proj"]),
        {"input_safety_rank": "leak:0.05"},
        None,
        r"input_safety_rank='leak:0.05': the leak cannot be measured.*reads no safety data",
    ),
    "safety data": (
        tiny.llama,
        {"safety_data": SAFETY},
        None,
        r"safety_data=.*has no effect with.*reads no safety data",
    ),
    "positions": (tiny.llama, {"safety_positions": "prompt"}, None, r"safety_positions='prompt' has no effect"),
    "an engine": (tiny.llama, {"calibration_engine": "exact"}, None, r"calibration_engine='exact' has no effect"),
    "utility": (tiny.llama, {"utility_rank": 3}, None, r"utility_rank=3 has no effect.*actsvd"),
}


@pytest.mark.parametrize(("build", "options", "spoil", "told"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_what_weight_delta_refuses(build, options, spoil, told, tmp_path):
    build().save_pretrained(tmp_path)
    if spoil is not None:
        spoil(tmp_path)
    options = {**DELTA, "unaligned_model": str(tmp_path), "target_modules": ["q_proj"], **options}
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        calibrate(tiny.llama(), **options)


def test_names_of_unaligned_models_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, told in (
        (str(tmp_path / "missing"), r"unaligned_model=.*missing': there is no such folder"),
        ("organization/no-such-model", r"unaligned_model='organization/no-such-model' is neither"),
    ):
        with pytest.raises(FileNotFoundError, match=told):
            calibrate(tiny.llama(), unaligned_model=name, target_modules=["q_proj"], **DELTA)
    with pytest.raises(ValueError, match=r"basis_method='weight-delta' compares the model with the one before"):
        SaLoRAConfig(basis_method="weight-delta")


def test_a_quantized_base_is_refused(unaligned, monkeypatch):
    from salora_plugins.calibration import needs

    monkeypatch.setattr(needs, "is_quantized", lambda module: True)
    with pytest.raises(
        CalibrationError, match=r"unaligned_model, and the weights of .*q_proj.* are quantized.*salora cal"
    ):
        calibrate(tiny.llama(), unaligned_model=unaligned(tiny.llama, ["q_proj"]), target_modules=["q_proj"], **DELTA)


def test_salora_trains_in_the_complement_of_a_delta(unaligned, tmp_path):
    """From a configuration alone; what is saved says where its directions come from, and loads again."""
    config = SaLoRAConfig(
        r=4,
        target_modules=["q_proj"],
        unaligned_model=unaligned(tiny.llama, ["q_proj"]),
        task_type="CAUSAL_LM",
        **DELTA,
    )
    model = get_peft_model(tiny.llama(), config)
    tokens = tiny.token_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    found = SafetyModule.load(tmp_path / "adapter")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    update = layer.get_delta_weight("default").double()
    name = "model.layers.1.self_attn.q_proj"
    assert update.norm() > 0
    assert (found.bases[name].double().T @ update).norm() < 1e-5 * update.norm()
    assert (update @ found.input_bases[name].double()).norm() < 1e-5 * update.norm()
    text = summary(found)
    assert "Unaligned model: " in text and "Safety data" not in text and "Method: weight-delta" in text
    rows = provenance_rows(found)
    assert rows["Unaligned model"].startswith("unaligned, fingerprint") and "Safety data" not in rows
    assert SaLoRAConfig.from_pretrained(tmp_path / "adapter").basis_method == "weight-delta"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert (
        "weights differ most from the unaligned model's. That does not" in card and "refusals on the safety" not in card
    )


@pytest.mark.parametrize(
    ("provenance", "told", "captured"),
    [
        ({}, "the base model's refusals on the safety data,", "the layers' outputs on the safety data, the layers' in"),
        ({"basis_method": "salora"}, "the base model's refusals on the safety data,", "the layers' outputs on the saf"),
        ({"basis_method": "actsvd"}, "that the utility data does not use,", "the layers' outputs on the safety data"),
        ({"basis_method": "weight-delta"}, "from the unaligned model's,", "the weights' change by alignment. V"),
        (
            {"basis_method": "sae", "safety_samples": 3},
            "tell safe from unsafe responses, and, on the input side, those in which the safety data comes in,",
            "the decoder directions of the kept features, the layers' inputs on the safety data. V",
        ),
        ({"basis_method": "[a](b)"}, r"that the basis method '\[a\](b)' found,", "what the basis method decomposed. V"),
    ],
    ids=str,
)
def test_what_is_said_of_the_directions(provenance, told, captured, tmp_path, monkeypatch):
    """On the card of a projected adapter, under the table and above the plots; a card after a training is above."""
    of_layer = SideBases({"layer": torch.eye(8)[:, :2]}, {"layer": torch.tensor([2.0, 1.0])}, {"layer": 6.0})
    found = SafetyModule({"output": of_layer, "input": of_layer}, {"layer": torch.ones(4)}, provenance)
    report = ProjectionReport(0.5, {"layer": 0.5}, (), {"output": 1e-8, "input": 1e-8})
    card = " ".join(report.card_section(found, "0" * 64).split())
    assert told in card
    assert ("carried the base model's refusals" in card) == (
        provenance.get("basis_method") in (None, "salora", "actsvd")
    )
    assert captured in inspection.table(found).caption
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(inspection, "save_png", lambda path, figure: figures.append(figure))
    inspection.write_plot(tmp_path / "plot.png", found)
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles[0].removeprefix("Singular values of ") in inspection.table(found).caption
    assert titles[3] == "Share of their energy that the input directions capture"


def test_a_given_module_of_another_method_is_refused(tmp_path, caplog):
    caplog.set_level("INFO")
    common = {"target_modules": ["q_proj"], "safety_rank": 4, "input_safety_rank": 3}
    rows = {"safety_data": SAFETY, "calibration_cache": False}
    of_salora = calibrate(tiny.llama(), **rows, **common)
    actsvd_options = {"basis_method": "actsvd", "utility_rank": 5, "utility_data": UTILITY, "num_utility_samples": 20}
    of_actsvd = calibrate(tiny.llama(), **rows, **actsvd_options, **common)
    refused = [
        (of_salora, actsvd_options, "basis_method='actsvd', but the safety module was computed by 'salora'"),
        (of_salora, {"utility_rank": 5}, "utility_rank=5, but .* by 'salora' without it. Leave utility_rank unset"),
        (of_actsvd, {"utility_rank": 6}, "utility_rank=6, but .* by 'actsvd' with 5"),
        (of_actsvd, {"num_utility_samples": 11}, "num_utility_samples=11, but .* with 12"),
        (of_actsvd, {"utility_data": "mine.jsonl"}, "utility_data='mine.jsonl', but .* with '<list>'"),
    ]
    for given, options, told in refused:
        with pytest.raises(ValueError, match=told):
            get_peft_model(tiny.llama(), SaLoRAConfig(safety_module=given, **options, **common))
    for options in ({}, actsvd_options):
        config = SaLoRAConfig(r=4, safety_module=of_actsvd, task_type="CAUSAL_LM", **options, **common)
        model = get_peft_model(tiny.llama(), config)
        assert model.base_model.safety_module().provenance["basis_method"] == "actsvd"
        assert ("computed by basis_method='actsvd'" in caplog.text) == (not options)
        caplog.clear()
    # What is saved has the options of its training, but not the data, and loads with them.
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_for_training(tiny.llama(), tmp_path / "adapter")
    assert loaded.peft_config["default"].utility_rank == 5
    again = SaLoRAConfig.from_pretrained(tmp_path / "adapter")
    get_peft_model(tiny.llama(), again)


# --- What a method gets ---


@pytest.fixture
def method():
    """Registers a basis method "mine" with its needs."""
    manager, registered = plugins.plugin_manager(), []

    def register(function, *needs) -> None:
        class Plugin:
            @hookimpl
            def register_basis_methods(self, register):
                register("mine", function, *needs)

        plugin = Plugin()
        manager.register(plugin)
        registered.append(plugin)

    yield register
    for plugin in registered:
        manager.unregister(plugin)


MINE = {"basis_method": "mine", "target_modules": ["q_proj"], "safety_rank": 4, "input_safety_rank": 3}
MINE |= {"calibration_cache": False}


def first_columns(statistics, rank, side):
    dimension = statistics.of(side).dimension
    return torch.eye(dimension)[:, :rank], torch.ones(rank)


def test_a_method_without_needs_gets_none(method):
    def mine(statistics, rank, side):
        assert statistics.utility is None and statistics.prepared is None
        for read in (statistics.weight, statistics.unaligned_weight):
            with pytest.raises(ValueError, match=r"registered without BasisNeeds\("):
                read()
        return first_columns(statistics, rank, side)

    method(mine)
    assert calibrate(tiny.llama(), safety_data=SAFETY, **MINE).safety_rank == 4


def test_a_method_gets_each_need(method, unaligned):
    folder, seen = unaligned(tiny.llama, ["q_proj"]), []
    model, other = tiny.llama(), changed(tiny.llama, ["q_proj"])

    def prepare(preparation):
        assert not preparation.model.training and preparation.options["safety_rank"] == 4
        (safe, unsafe), *_ = preparation.contrastive_rows()
        assert safe.input_ids[:2] == unsafe.input_ids[:2] == (5, 6) and preparation.batch_size == 16
        return {name: number for number, name in enumerate(preparation.names)}

    def mine(statistics, rank, side):
        layer = model.get_submodule(statistics.name)
        assert torch.equal(statistics.weight(), layer.weight)
        assert torch.equal(statistics.unaligned_weight(), other.get_submodule(statistics.name).weight)
        assert statistics.utility.of(side).count == 12 * 8 and statistics.of(side).count == 12 * 8
        assert statistics.options["utility_rank"] == 7
        assert not statistics.has_default_rank(side)
        seen.append(statistics.prepared)
        return *first_columns(statistics, rank, side), 10.0

    needs = BasisNeeds(
        utility_rows=True,
        weights=True,
        unaligned_model=True,
        prepare=prepare,
        options=("utility_rank", "contrastive_data"),
    )
    method(mine, needs)
    pairs = [{"prompt_ids": [5, 6], "chosen_ids": [7, i + 3], "rejected_ids": [8, 9]} for i in range(4)]
    found = calibrate(
        model,
        safety_data=SAFETY,
        utility_data=UTILITY,
        unaligned_model=folder,
        contrastive_data=pairs,
        utility_rank=7,
        **MINE,
    )
    assert sorted(seen) == [0, 0, 1, 1]
    assert set(found.captured_energy.values()) == {0.4}
    assert not model.training


def test_a_method_without_safety_rows_reads_none(method):
    def mine(statistics, rank, side):
        assert statistics.of(side).count == 0
        return first_columns(statistics, rank, side)

    method(mine, BasisNeeds(safety_rows=False))
    model = tiny.llama()
    model.forward = None
    assert calibrate(model, **MINE).safety_rank == 4
    with pytest.raises(
        CalibrationError, match=r"safety_rank=0.5: basis_method='mine' takes a number of directions only"
    ):
        calibrate(model, **{**MINE, "safety_rank": 0.5})


@pytest.mark.parametrize(
    ("columns", "asked", "fits"), [(2, 4, True), (5, 4, False), (0, 4, False), (40, None, True), (64, None, False)]
)
def test_a_method_that_chooses_its_rank(method, columns, asked, fits):
    """Fewer than asked for, and more where nothing was asked for."""

    def mine(statistics, rank, side):
        assert statistics.has_default_rank(side) == (asked is None or side == "input")
        return first_columns(statistics, columns, side)

    method(mine, BasisNeeds(safety_rows=False, chooses_rank=True))
    options = {**MINE, "input_safety_rank": 0}
    del options["safety_rank"]
    if asked is not None:
        options["safety_rank"] = asked
    if fits:
        assert calibrate(tiny.llama(), **options).safety_rank == columns
    else:
        with pytest.raises(CalibrationError, match=r"expected a tensor of shape \(64, 1 to (4|63)\)"):
            calibrate(tiny.llama(), **options)


@pytest.mark.parametrize(
    ("needs", "told"),
    [("weights", "must be a BasisNeeds, not str"), (BasisNeeds(options=("raank",)), "option 'raank'")],
)
def test_needs_that_are_none(method, needs, told):
    method(first_columns, needs)
    with pytest.warns(RuntimeWarning, match=told):
        assert "mine" not in plugins.basis_methods()


def test_contrastive_rows():
    def rows(source, **changes) -> RowSettings:
        settings = {"option": "contrastive_data", "num": 10, "seed": 0, "max_length": 64, "tokenizer": tiny.tokenizer()}
        return RowSettings(source, **{**settings, **changes}, vocabulary=tiny.VOCABULARY, base_model="")

    text = [{"prompt": f"Say {i}", "chosen": "No, I will not.", "rejected": f"Yes: {i}"} for i in range(20)]
    pairs = contrastive_rows(rows(text))
    assert len(pairs) == 10
    for safe, unsafe in pairs:
        answers = [tiny.tokenizer().decode([t for t in e.labels if t != -100]) for e in (safe, unsafe)]
        assert answers[0].startswith("No, I will not.") and answers[1].startswith("Yes: ")
        start = safe.labels.index(safe.input_ids[len([t for t in safe.labels if t == -100])])
        assert safe.input_ids[:start] == unsafe.input_ids[:start]
    for source, told in (
        (
            [{"prompt": "a", "chosen": "b"}],
            r"row 1 of contrastive_data has no `rejected`. Give rows of `prompt`, `chosen`",
        ),
        (text[:1] * 2 + ["Yes"], r"row 3 of contrastive_data is .Yes.; a row must map column names"),
        ("missing.jsonl", r"contrastive_data='missing.jsonl': there is no such file"),
    ):
        with pytest.raises(DataError, match=told):
            contrastive_rows(rows(source))
    with pytest.raises(
        DataError,
        match="10 of 10 pairs of contrastive_data have a response without a token within calibration_max_length=4",
    ):
        contrastive_rows(rows(text, max_length=4))


# --- The cache, and two processes ---


def test_the_cache_knows_what_decides(unaligned, tmp_path, monkeypatch):
    """A second calibration runs nothing; one with any other option or content does."""
    monkeypatch.setenv("SALORA_CACHE", str(tmp_path / "cache"))

    def files() -> int:
        return len(list((tmp_path / "cache").glob("*")))

    common = {"safety_rank": 4, "input_safety_rank": 3, "target_modules": ["q_proj"], "seed": 0}
    actsvd_options = {**common, "basis_method": "actsvd", "safety_data": SAFETY, "utility_data": UTILITY}
    first = calibrate(tiny.llama(), **actsvd_options)
    model = tiny.llama()
    model.forward = None
    again = calibrate(model, **actsvd_options)
    assert files() == 1 and dict(again.provenance) == dict(first.provenance)
    assert all(torch.equal(first.bases[name], again.bases[name]) for name in first.bases)
    for number, change in enumerate(
        ({"utility_rank": 9}, {"input_utility_rank": 9}, {"num_utility_samples": 6}, {"utility_data": token_rows(12)}),
        2,
    ):
        calibrate(tiny.llama(), **{**actsvd_options, **change})
        assert files() == number, change

    delta_options = {**common, "basis_method": "weight-delta"}
    folder = unaligned(tiny.llama, ["q_proj"])
    for rank, expected in ((None, 6), (None, 6), (2, 7)):  # another model under the same name
        if rank is not None:
            folder = unaligned(tiny.llama, ["q_proj"], rank=rank)
        calibrate(tiny.llama(), unaligned_model=folder, **delta_options)
        assert files() == expected
    # A single element of the other model or of this one, and the same weights in another dtype.
    other = changed(tiny.llama, ["q_proj"], 2)
    other.model.layers[1].self_attn.q_proj.weight.data[10, 3] += 0.1
    own = tiny.llama()
    own.model.layers[1].self_attn.q_proj.weight.data[10, 3] += 0.1
    for number, (model, dtype) in enumerate(
        ((tiny.llama(), torch.float32), (own, torch.float32), (own, torch.float64)), 8
    ):
        other.to(dtype).save_pretrained(folder)
        for _ in range(2):
            calibrate(model, unaligned_model=folder, **delta_options)
            assert files() == number


PROGRAM = """
from salora_plugins import calibrate
dist.init_process_group("gloo")
rank = dist.get_rank()
TARGETS = sys.argv[3].split(",")
common = {"safety_rank": 6, "input_safety_rank": 4, "calibration_cache": False, "target_modules": TARGETS}
for engine in ("exact", "sketched"):
    rows = {"safety_data": token_rows(20, seed=1), "utility_data": token_rows(20, seed=2)}
    found = calibrate(llama(), basis_method="actsvd", calibration_engine=engine, **rows, **common)
    found.save(folder / f"actsvd-{engine}-{rank}.safetensors")
delta = calibrate(llama(), basis_method="weight-delta", unaligned_model=sys.argv[2], **common)
delta.save(folder / f"delta-{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_ranks_end_with_the_same_bits(tmp_path, unaligned):
    targets = ["q_proj", "k_proj", "up_proj"]
    folder = unaligned(tiny.llama, targets)
    run_ranks(PROGRAM, tmp_path, str(folder), ",".join(targets))
    common = {
        "safety_rank": 6,
        "input_safety_rank": 4,
        "calibration_cache": False,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
    }
    rows = {"safety_data": token_rows(20, seed=1), "utility_data": token_rows(20, seed=2)}
    for kind in ("actsvd-exact", "actsvd-sketched", "delta"):
        files = [tmp_path / f"{kind}-{rank}.safetensors" for rank in (0, 1)]
        assert files[0].read_bytes() == files[1].read_bytes()
        found = SafetyModule.load(files[0])
        if kind != "actsvd-sketched":
            source = {"unaligned_model": folder} if kind == "delta" else rows
            method = "weight-delta" if kind == "delta" else "actsvd"
            alone = calibrate(tiny.llama(), basis_method=method, **source, **common)
            for name in alone.bases:
                assert smallest_cosine(alone.bases[name], found.bases[name]) > 1 - 1e-4
                assert smallest_cosine(alone.input_bases[name], found.input_bases[name]) > 1 - 1e-4
