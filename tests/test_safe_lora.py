"""Safe LoRA: against dense float64 references, by names and not by order, for folders and models in memory."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from salora_plugins import SaLoRAConfig, apply_safe_lora
from salora_plugins.adapters.saved import SavedAdapter
from salora_plugins.cli import create_cli
from salora_plugins.models.loading import LoadingOptions, load_model
from salora_plugins.models.weights import linear_weight
from tiny import relative_difference, token_batch


def adapter_of(model, folder: Path, targets, seed: int = 3, **options) -> Path:
    """A random plain LoRA adapter, saved; the ranks of two kinds of modules differ."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def case(request, tmp_path_factory):
    """An architecture's base model, an aligned one and an adapter, in folders; the alignment is of low rank."""
    folder = tmp_path_factory.mktemp(request.param)
    build, targets = tiny.ARCHITECTURES[request.param]
    base = build()
    base.save_pretrained(folder / "base")
    aligned = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in aligned.named_parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                left = torch.randn(rows, 3, generator=generator)
                parameter += 0.02 * left @ torch.randn(3, columns, generator=generator)
            elif name.endswith("bias"):
                parameter += 0.1  # what an order of parameters would pair with weights
    aligned.save_pretrained(folder / "aligned", max_shard_size="60KB")
    adapter_of(aligned, folder / "adapter", targets, rank_pattern={targets[-1]: 2}, alpha_pattern={targets[0]: 3})
    return folder, base, aligned, targets


def references(base, aligned, saved: SavedAdapter):
    """Module name -> C B and cosine, with the dense C of the paper, float64."""
    found = {}
    for name, (a, b) in saved.factors.items():
        with linear_weight(base.get_submodule(name)) as before, linear_weight(aligned.get_submodule(name)) as after:
            delta = after.double() - before.double()
        c = delta @ delta.T / torch.linalg.norm(delta)
        update, projected = (b.double() @ a.double()).flatten(), (c @ b.double() @ a.double()).flatten()
        found[name] = c @ b.double(), torch.nn.functional.cosine_similarity(update, projected, dim=0).item()
    return found


def test_against_the_dense_reference(case, tmp_path):
    folder, base, aligned, _ = case
    saved = SavedAdapter.load(folder / "adapter")
    expected = references(base, aligned, saved)
    cosines = sorted(cosine for _, cosine in expected.values())
    threshold = (cosines[0] + cosines[-1]) / 2
    report = apply_safe_lora(
        folder / "adapter", folder / "base", folder / "aligned", threshold=threshold, out=tmp_path / "out"
    )
    assert 0 < len(report.projected) < len(expected)
    written = SavedAdapter.load(tmp_path / "out")
    for name, (new_b, cosine) in expected.items():
        module, (a, b) = report.modules[name], saved.factors[name]
        assert module.cosine == pytest.approx(cosine, abs=1e-6)
        assert module.projected == (cosine < threshold)
        assert torch.equal(written.factors[name][0], a)
        if module.projected:
            assert relative_difference(written.factors[name][1].double(), new_b) < 1e-6
            size = torch.linalg.norm(new_b @ a.double()) / torch.linalg.norm(b.double() @ a.double())
            assert module.size == pytest.approx(size.item(), rel=1e-5)
        else:
            assert torch.equal(written.factors[name][1], b)
        assert written.scaling(name) == saved.scaling(name)


def test_the_smallest_cosines_and_a_model_in_memory(case, tmp_path):
    folder, base, aligned, _ = case
    expected = references(base, aligned, SavedAdapter.load(folder / "adapter"))
    smallest = sorted(expected, key=lambda name: expected[name][1])[:2]
    model = PeftModel.from_pretrained(aligned, folder / "adapter").eval()
    try:
        before = model(token_batch()).logits.detach()
        apply_safe_lora(folder / "adapter", folder / "base", folder / "aligned", num_layers=2, out=tmp_path / "out")
        report = apply_safe_lora(model, base, aligned, num_layers=2)
        assert sorted(report.projected) == sorted(smallest)
        now = model(token_batch()).logits.detach()
    finally:
        model.unload()
    loaded = PeftModel.from_pretrained(aligned, tmp_path / "out").eval()
    try:
        assert relative_difference(loaded(token_batch()).logits, now) < 1e-5
        assert relative_difference(before, now) > 1e-3
    finally:
        loaded.unload()


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Path:
    """Folders of a Llama: base, aligned (q_proj of the first layer differs, and k_proj of all), and an adapter."""
    folder = tmp_path_factory.mktemp("simple")
    model = tiny.llama()
    model.save_pretrained(folder / "base")
    model.to(torch.bfloat16).save_pretrained(folder / "rounded")
    model = tiny.llama()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0.self_attn.q_proj" in name or "k_proj" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")
    adapter_of(model, folder / "adapter", ["q_proj", "k_proj"])
    return folder


def test_a_module_without_alignment_or_without_an_update_stays(simple, tmp_path):
    adapter = tmp_path / "adapter"
    saved = load_file(simple / "adapter/adapter_model.safetensors")
    zero = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    adapter.mkdir()
    save_file({**saved, zero: torch.zeros_like(saved[zero])}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text((simple / "adapter/adapter_config.json").read_text())
    report = apply_safe_lora(adapter, simple / "base", simple / "aligned", threshold=1.0, out=tmp_path / "out")
    same, still = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    assert report.modules[same].delta_norm == 0 and report.modules[same].cosine is None
    assert report.modules[still].delta_norm > 0 and report.modules[still].cosine is None
    assert len(report.projected) == 2 and "do not differ in 'model.layers.1.self_attn.q_proj'" in report.summary()
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    changed = {key for key, value in written.items() if not torch.equal(value, saved[key])}
    assert changed == {f"base_model.model.{name}.lora_B.weight" for name in report.projected} | {zero}


def test_more_layers_than_have_a_cosine(simple, tmp_path):
    models = simple / "base", simple / "aligned"
    report = apply_safe_lora(simple / "adapter", *models, num_layers=4, out=tmp_path / "out")
    assert len(report.projected) == 3  # the models do not differ in q_proj of the second layer
    assert "3 of 4 modules projected: all that have a cosine, 3 modules and not the 4" in report.summary()
    untrained = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))  # B = 0
    untrained.save_pretrained(tmp_path / "zero")
    with pytest.raises(ValueError, match="no update in the modules where base and aligned differ"):
        apply_safe_lora(tmp_path / "zero", *models, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_trained_beside_the_factors_is_told(simple, tmp_path):
    options = {"modules_to_save": ["lm_head"], "bias": "lora_only", "trainable_token_indices": [1, 2]}
    model = tiny.llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "aligned")
    adapter = adapter_of(model, tmp_path / "adapter", ["q_proj"], **options)
    models = tmp_path / "base", tmp_path / "aligned"
    report = apply_safe_lora(adapter, *models, threshold=1.0, out=tmp_path / "out")
    others = SavedAdapter.load(adapter).other_tensors
    assert set(report.not_covered) == set(others) and len(others) >= 3
    card = (tmp_path / "out/README.md").read_text()
    assert "Not projected" in report.summary() and "| Not projected |" in card
    on_head = adapter_of(model, tmp_path / "head", ["q_proj", "lm_head"])
    assert SavedAdapter.load(on_head).other_tensors  # PEFT's copy of the head
    assert not apply_safe_lora(on_head, *models, threshold=1.0, out=tmp_path / "head-out").not_covered
    found = apply_safe_lora(PeftModel.from_pretrained(model, adapter), *models, threshold=1.0).not_covered
    assert found == ("lm_head", "bias=lora_only", "trainable_token_indices")
    assert (
        apply_safe_lora(simple / "adapter", simple / "base", simple / "aligned", out=tmp_path / "o").not_covered == ()
    )


def test_another_dtype_of_the_same_weights_is_no_alignment(simple, tmp_path):
    out = tmp_path / "out"
    for aligned in ("base", "rounded"):
        with pytest.raises(ValueError, match="base and aligned have the same weights in all 4 modules"):
            apply_safe_lora(simple / "adapter", simple / "base", simple / aligned, out=out)
    report = apply_safe_lora(simple / "adapter", simple / "rounded", simple / "aligned", out=out, dtype="bfloat16")
    assert report.modules["model.layers.1.self_attn.q_proj"].delta_norm == 0
    assert load_file(out / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5, "num_layers": 1}, "threshold and num_layers are both set"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"num_layers": 0}, "num_layers=0: give a whole number of at least 1"),
        ({"num_layers": 5}, "num_layers=5"),
        ({"num_layers": 1.5}, "num_layers=1.5"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"out": None}, "Give `out`"),
    ],
)
def test_options_that_contradict(simple, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        apply_safe_lora(simple / "adapter", simple / "base", simple / "aligned", **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(simple, tmp_path):
    wide, other = tmp_path / "wide", tmp_path / "other"
    tiny.llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=2).save_pretrained(wide)
    tiny.gpt2().save_pretrained(other)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"has the shape \(32, 32\) in one model and \(64, 64\) in the other"):
        apply_safe_lora(simple / "adapter", simple / "base", wide, out=out)
    with pytest.raises(
        ValueError, match=r"base='.*other': GPT2LMHeadModel has no linear layer 'model.layers.0.self_attn.k_proj'"
    ):
        apply_safe_lora(simple / "adapter", other, simple / "aligned", out=out)
    with pytest.raises(ValueError, match="adapter's update of"):
        aligned = tiny.llama(1, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
        apply_safe_lora(simple / "adapter", wide, aligned, out=out)
    with pytest.raises(ValueError, match="adapter's update of"):
        apply_safe_lora(simple / "adapter", wide, wide, out=out)
    with pytest.raises(ValueError, match=r"base='.*adapter': it is no model"):
        apply_safe_lora(simple / "adapter", simple / "adapter", simple / "aligned", out=out)
    assert not out.exists()


def test_quantized_models_are_refused(simple, tmp_path):
    """What they differ by from others is their quantization: another alignment would be found than there is."""
    pytest.importorskip("bitsandbytes")
    quantized = load_model(str(simple / "aligned"), LoadingOptions(load_in_8bit=True))
    for models in ((simple / "base", quantized), (quantized, simple / "aligned")):
        with pytest.raises(ValueError, match="of the model are quantized"):
            apply_safe_lora(simple / "adapter", *models, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_the_user(simple, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(simple))
    monkeypatch.chdir(tmp_path)
    apply_safe_lora("~/adapter", "~/base", "~/aligned", num_layers=1, out="~/projected")
    assert (simple / "projected/adapter_config.json").is_file() and not any(tmp_path.iterdir())


def test_adapters_that_are_not_two_plain_factors(simple, tmp_path):
    adapter = adapter_of(tiny.llama(), tmp_path / "dora", ["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        apply_safe_lora(adapter, simple / "base", simple / "aligned", out=tmp_path / "out")
    salora = get_peft_model(tiny.llama(), tiny.salora_config())
    assert isinstance(salora.peft_config["default"], SaLoRAConfig)
    with pytest.raises(ValueError, match="only LoRA adapters can be projected"):
        apply_safe_lora(salora, simple / "base", simple / "aligned")
    merged = PeftModel.from_pretrained(tiny.llama(), simple / "adapter")
    with pytest.raises(ValueError, match="a model's adapter is changed in memory"):
        apply_safe_lora(merged, simple / "base", simple / "aligned", out=tmp_path / "out")
    with pytest.raises(ValueError, match="adapter_name='other': choose one of 'default'"):
        apply_safe_lora(merged, simple / "base", simple / "aligned", adapter_name="other")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        apply_safe_lora(merged, simple / "base", simple / "aligned")


def test_the_command(simple, tmp_path):
    out = tmp_path / "out"
    command = ["safe-lora", str(simple / "adapter"), "--base", str(simple / "base")]
    command += ["--aligned", str(simple / "aligned"), "--out", str(out)]
    result = CliRunner().invoke(create_cli(), [*command, "--num-layers", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert sum(module["projected"] for module in report["modules"].values()) == 1
    assert "1 of 4 modules: the 1 modules of the smallest cosines" in (out / "README.md").read_text()
    again = CliRunner().invoke(create_cli(), command)
    assert again.exit_code != 0 and isinstance(again.exception, FileExistsError | SystemExit)
    shown = CliRunner().invoke(create_cli(), [*command, "--overwrite"])
    assert shown.exit_code == 0 and "modules with a cosine under 0.5" in shown.output
