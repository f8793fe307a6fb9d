"""`salora audit` and `salora project`: updates with a known share in the safety directions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from certificate import largest_share_inside
from salora_plugins import SafetyModule, audit, calibrate, load_for_training, project_adapter
from salora_plugins.adapters.audit import layer_grid, write_heat_map
from salora_plugins.adapters.saved import SavedAdapter
from salora_plugins.cli import create_cli
from tiny import gpt2, llama, relative_difference, token_batch, token_rows

TARGETS = ["q_proj", "down_proj"]
RANK, SAFETY_RANK, INPUT_RANK = 4, 8, 6


def calibrated(model, targets=TARGETS, input_rank=INPUT_RANK) -> SafetyModule:
    return calibrate(
        model,
        safety_data=token_rows(16),
        target_modules=targets,
        safety_rank=SAFETY_RANK,
        input_safety_rank=input_rank,
        calibration_cache=False,
    )


@pytest.fixture(scope="module")
def safety_module() -> SafetyModule:
    return calibrated(llama())


def save_adapter(folder, build=llama, seed=0, **options):
    """A LoRA adapter of random factors; returns the folder."""
    options = {"r": RANK, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(build(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    model.save_pretrained(folder)
    return folder


def replace_factors(folder, make) -> None:
    """Write factors `make(name, a, b)` in the place of an adapter's."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        tensors[key], tensors[other] = (x.contiguous() for x in make(name, tensors[key], tensors[other]))
    save_file(tensors, file, metadata={"format": "pt"})


def leaking(vectors, basis, share):
    """Orthonormal columns (d, k), of which each has `share` of its norm inside of the basis."""
    inside = basis[:, : vectors.shape[1]]
    outside = torch.linalg.qr(vectors - basis @ (basis.T @ vectors)).Q
    return share * inside + math.sqrt(1 - share**2) * outside


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.25, 1.0])
def test_a_known_leak_is_found_on_either_side(tmp_path, safety_module, share):
    save_adapter(tmp_path)
    replace_factors(
        tmp_path,
        lambda name, a, b: (
            a,
            leaking(b.double(), safety_module.bases[name].double(), share).float() @ torch.eye(RANK),
        ),
    )
    # Rows of A with the same singular values, so that the share of dW is that of every column of B.
    replace_factors(tmp_path, lambda name, a, b: (torch.linalg.qr(a.T).Q.T, b))
    report = audit(tmp_path, safety_module)
    for module in report.modules.values():
        assert module.sides["output"].share == pytest.approx(share, abs=1e-6)
        assert module.sides["output"].largest_cosine == pytest.approx(share, abs=1e-6)
        assert module.norm == pytest.approx(2 * math.sqrt(RANK), rel=1e-6)  # scaling 8 / 4
    assert report.totals["output"].share == pytest.approx(share, abs=1e-6)

    def leak_at_the_input(name, a, b):
        rows = leaking(a.T.double(), safety_module.input_bases[name].double(), share)
        return rows.float().T, torch.linalg.qr(b).Q

    replace_factors(tmp_path, leak_at_the_input)
    report = audit(tmp_path, safety_module)
    assert report.totals["input"].share == pytest.approx(share, abs=1e-6)
    assert report.is_outside == (share == 0.0 and report.largest_shares["output"] <= 1e-5)


def test_random_updates_have_the_expected_share(tmp_path, safety_module):
    squares = {"output": [], "input": []}
    for seed in range(20):
        report = audit(save_adapter(tmp_path / str(seed), seed=seed), safety_module)
        for module in report.modules.values():
            for side, values in squares.items():
                values.append((module.sides[side].share / module.sides[side].expected_share) ** 2)
    for values in squares.values():
        spread = torch.tensor(values).std() / len(values) ** 0.5
        assert abs(sum(values) / len(values) - 1) < 4 * spread < 0.2


def test_scalings_weigh_the_modules(tmp_path, safety_module):
    options = {"use_rslora": True, "alpha_pattern": {"down_proj": 40}, "rank_pattern": {"q_proj": 2}}
    save_adapter(tmp_path, **options)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    report = audit(tmp_path, safety_module)
    total, inside = 0.0, 0.0
    for name, module in report.modules.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default").double()
        assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        total += delta.norm() ** 2
        inside += (safety_module.bases[name].double().T @ delta).norm() ** 2
    assert report.totals["output"].share == pytest.approx((inside / total).sqrt().item(), rel=1e-5)


def test_what_the_safety_module_does_not_cover_is_named(tmp_path, safety_module):
    save_adapter(tmp_path, target_modules=[*TARGETS, "v_proj"], modules_to_save=["lm_head"])
    report = audit(tmp_path, safety_module)
    assert len(report.modules) == 4
    assert sum("v_proj" in name for name in report.not_covered) == 2
    assert any("lm_head" in name for name in report.not_covered)
    assert "Not covered" in report.summary()
    projected = project_adapter(tmp_path, safety_module, tmp_path / "out")
    assert set(projected.not_covered) == set(report.not_covered)
    with pytest.raises(ValueError, match="covers none of its 2 modules"):
        audit(save_adapter(tmp_path / "other", target_modules=["v_proj"]), safety_module)
    with pytest.raises(FileNotFoundError, match="salora calibrate"):
        audit(tmp_path)
    with pytest.raises(ValueError, match="max_share=2"):
        audit(tmp_path, safety_module, max_share=2)
    with pytest.raises(ValueError, match=r"use_dora=True.*can be audited"):
        audit(save_adapter(tmp_path / "dora", use_dora=True), safety_module)


@pytest.mark.parametrize(("build", "targets"), [(llama, TARGETS), (gpt2, ["c_attn", "c_fc"])])
@pytest.mark.parametrize("input_rank", [0, INPUT_RANK])
def test_the_projection_is_that_of_the_update(tmp_path, build, targets, input_rank):
    """Also for GPT-2, whose weights are transposed."""
    safety_module = calibrated(build(), targets, input_rank)
    folder = save_adapter(tmp_path / "adapter", build, target_modules=targets)
    report = project_adapter(folder, safety_module, tmp_path / "out")
    assert largest_share_inside(tmp_path / "out") <= 1e-6
    assert audit(tmp_path / "out").is_outside  # with the safety module that lies beside it
    original, projected = (PeftModel.from_pretrained(build(), path) for path in (folder, tmp_path / "out"))
    config = projected.peft_config["default"]
    assert (config.r, config.lora_alpha) == (RANK, 8)
    removed, total = 0.0, 0.0
    for name, share in report.modules.items():
        layers = [model.base_model.model.get_submodule(name) for model in (original, projected)]
        before, after = (layer.get_delta_weight("default").double() for layer in layers)
        if build is gpt2:
            before, after = before.T, after.T
        u = safety_module.bases[name].double()
        expected = before - u @ (u.T @ before)
        if input_rank:
            v = safety_module.input_bases[name].double()
            expected = expected - (expected @ v) @ v.T
        assert (after - expected).norm() < 1e-6 * before.norm()
        assert share == pytest.approx(((before - expected).norm() / before.norm()).item(), rel=1e-5)
        removed += (before - expected).norm() ** 2
        total += before.norm() ** 2
    assert report.removed_share == pytest.approx((removed / total).sqrt().item(), rel=1e-5)


def test_projecting_again_changes_nothing(tmp_path, safety_module):
    folder = save_adapter(tmp_path / "adapter", lora_dropout=0.1)
    project_adapter(folder, safety_module, tmp_path / "once")
    report = project_adapter(tmp_path / "once", safety_module, tmp_path / "twice")
    assert report.removed_share < 1e-6
    once, twice = (PeftModel.from_pretrained(llama(), tmp_path / name) for name in ("once", "twice"))
    assert relative_difference(twice(token_batch()).logits, once(token_batch()).logits) < 1e-6
    card = (tmp_path / "once" / "README.md").read_text()
    assert "salora project" in card
    with pytest.raises(FileNotFoundError, match=r"no salora_config\.json"):
        load_for_training(llama(), tmp_path / "once")
    with pytest.raises(FileExistsError, match="overwrite"):
        project_adapter(folder, safety_module, tmp_path / "once")


def test_16_bit_files_show_their_rounding(tmp_path, safety_module):
    folder = save_adapter(tmp_path / "adapter")
    report = project_adapter(folder, safety_module, tmp_path / "out", dtype="bfloat16")
    assert 1e-5 < max(report.safety_shares.values()) < 1e-2
    found = audit(tmp_path / "out")
    assert not found.is_outside
    assert "bfloat16 numbers" in found.summary()
    assert audit(tmp_path / "out", max_share=1e-2).is_outside
    with pytest.raises(ValueError, match="dtype='int8'"):
        project_adapter(folder, safety_module, tmp_path / "other", dtype="int8")


def test_the_commands(tmp_path, safety_module):
    def run(*arguments):
        return CliRunner().invoke(create_cli(), [str(argument) for argument in arguments])

    safety_module.save(tmp_path / "safety.safetensors")
    folder = save_adapter(tmp_path / "adapter")
    inside = run("audit", folder, "--safety-module", tmp_path / "safety.safetensors", "--json")
    assert inside.exit_code == 3
    values = json.loads(inside.stdout)
    assert values["verdict"] == "inside"
    assert values == audit(folder, safety_module).to_dict()
    allowed = run("audit", folder, "--safety-module", tmp_path / "safety.safetensors", "--max-share", "0.9")
    assert allowed.exit_code == 0
    projected = run(
        "project", folder, "--safety-module", tmp_path / "safety.safetensors", "--out", tmp_path / "out", "--json"
    )
    assert projected.exit_code == 0
    assert 0 < json.loads(projected.stdout)["removed_share"] < 1
    outside = run("audit", tmp_path / "out", "--plot", tmp_path / "map.png")
    assert outside.exit_code == 0
    assert "Outside" in outside.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert run("audit", tmp_path / "out" / "missing").exit_code == 1


def test_where_an_adapter_is_that_the_named_folder_is_not(tmp_path, safety_module, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (9, 10):
        save_adapter(tmp_path / "outputs" / f"checkpoint-{step}")
    save_adapter(tmp_path / "named" / "mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    for folder, message in {
        "outputs": "has no adapter_config.json.* outputs/checkpoint-10 has one: name that, or save",
        "named": "has no adapter_config.json.* named/mine has one: name that",
        "gone": "gone: there is no such folder .looked in ",
        "file": "file is a file",
        "whole": "holds a whole model",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            audit(folder, safety_module)
    (tmp_path / "outputs" / "checkpoint-9" / "salora_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"so it is not a SaLoRA adapter.* outputs/checkpoint-9 has one"):
        load_for_training(llama(), "outputs")


def test_the_heat_maps_rows_are_layers(tmp_path, safety_module):
    report = audit(save_adapter(tmp_path), safety_module)
    layers, kinds, cells = layer_grid(report)
    assert (layers, kinds) == (["0", "1"], TARGETS)
    assert cells[1, 0] == "model.layers.1.self_attn.q_proj"
    write_heat_map(tmp_path / "map.png", report)
    # GPT-2 has a c_proj in its attention and another one in its MLP.
    targets = ["c_attn", "c_proj"]
    report = audit(save_adapter(tmp_path / "gpt2", gpt2, target_modules=targets), calibrated(gpt2(), targets))
    layers, kinds, cells = layer_grid(report)
    assert (layers, kinds) == (["0", "1"], ["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
    assert sorted(cells.values()) == sorted(report.modules)


def test_peft_s_copy_of_a_head_under_factors_is_not_told_as_trained(tmp_path):
    folder = save_adapter(tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in SavedAdapter.load(folder).other_tensors
    module = calibrate(llama(), safety_data=token_rows(16), target_modules=["q_proj", "lm_head"], safety_rank=8)
    assert audit(folder, module).not_covered == ()
    assert project_adapter(folder, module, tmp_path / "out").not_covered == ()
    assert "lm_head.base_layer.weight" in str(list(SavedAdapter.load(tmp_path / "out").other_tensors))
