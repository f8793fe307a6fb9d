"""`salora validate`: what a model loses without its safety directions."""

from __future__ import annotations

import copy
import io
import json
import logging

import pytest
import torch
from click.testing import CliRunner

import tiny
from salora_plugins import SafetyModule, calibrate
from salora_plugins.cli import create_cli
from salora_plugins.demo.experiment import MODEL, load_demo_model
from salora_plugins.evaluation import own_answers, response_loss
from salora_plugins.evaluation.first_tokens import refusal_margins
from salora_plugins.evaluation.removal import without_directions
from salora_plugins.evaluation.reports.validation_report import RANDOM_SUBSPACES, write_plot
from salora_plugins.evaluation.request_sets import Request, load_requests
from salora_plugins.evaluation.validation import validate
from salora_plugins.safety_module import SideBases

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load_demo_model()
    module = calibrate(
        model,
        tokenizer,
        target_modules=TARGETS,
        num_safety_samples=24,
        safety_rank=8,
        input_safety_rank=8,
        safety_positions="predicting",
        calibration_cache=False,
    )
    requests = {option: load_requests("builtin", option=option, num=8) for option in ("harmful", "harmless")}
    return model, tokenizer, module, requests


@pytest.fixture(scope="module")
def report(demo):
    model, tokenizer, module, requests = demo
    before = copy.deepcopy(model.state_dict())
    result = validate(module, model, tokenizer, **requests, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    return result


@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen2, tiny.gpt2])
@pytest.mark.parametrize("side", ["output", "input"])
def test_hooks_do_what_edited_weights_would(build, side):
    """Also with a bias (Qwen2), which is left alone, and with transposed weights (GPT-2)."""
    model, edited = build(), build()
    targets = ["c_attn", "c_fc"] if build is tiny.gpt2 else ["q_proj", "v_proj"]
    module = calibrate(
        model, safety_data=tiny.token_rows(16), target_modules=targets, safety_rank=5, input_safety_rank=5
    )
    bases = module.bases if side == "output" else module.input_bases
    with torch.no_grad():
        for name, basis in bases.items():
            weight = edited.get_submodule(name).weight
            weight = weight.T if build is tiny.gpt2 else weight
            part = basis @ (basis.T @ weight) if side == "output" else (weight @ basis) @ basis.T
            weight -= part
    tokens = tiny.token_batch()
    original = model(tokens).logits
    with without_directions(model, side, bases):
        assert tiny.relative_difference(model(tokens).logits, edited(tokens).logits) < 1e-5
    assert torch.equal(model(tokens).logits, original)


def test_the_numbers_are_those_of_an_edited_model(demo, report):
    model, tokenizer, module, requests = demo
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for name, basis in module.bases.items():
            weight = edited.get_submodule(name).weight
            weight -= basis @ (basis.T @ weight)
    harmful = [request.prompt for request in requests["harmful"]]
    for state, one in ((report.unchanged, model), (report.sides["output"].safety, edited)):
        margins = refusal_margins(one, tokenizer, harmful)
        assert state.harmful_margin.value == pytest.approx(margins.mean().item(), abs=1e-3)
    assert report.drop("output") == pytest.approx(
        report.unchanged.harmful_margin.value - report.sides["output"].safety.harmful_margin.value
    )


def test_refusals_depend_on_their_directions_more_than_on_random_ones(report):
    for side in ("output", "input"):
        assert len(report.sides[side].random) == RANDOM_SUBSPACES
        assert report.drop(side) > max(report.random_drops(side))
    values = report.to_dict()["sides"]["output"]
    assert (values["special"], values["specific"]) == (report.is_special("output"), report.is_specific("output"))


def test_random_directions_are_not_special(demo):
    model, tokenizer, module, requests = demo
    generator = torch.Generator().manual_seed(7)
    random = {
        name: torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q for name, basis in module.bases.items()
    }
    module = SafetyModule({"output": SideBases(random)}, module.weight_samples, module.provenance)
    report = validate(module, model, tokenizer, **requests, progress=False)
    assert list(report.sides) == ["output"]
    assert not report.is_special("output")
    assert "does not hold refusals" in report.summary()
    again = validate(module, model, tokenizer, **requests, progress=False)
    assert again == report


def test_nothing_is_said_of_the_harmless_rows_as_of_safety_data(caplog, capfd):
    """Their directions are found by the steps of a calibration, and they are enough to measure a leak on."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    module = calibrate(model, tokenizer, safety_data=tiny.refusal_rows(), target_modules=["q_proj"], safety_rank=2)
    harmless = [Request(f"Count to {i} and back!", response=f"{i}, {i + 1}, {i}.") for i in range(48)]
    capfd.readouterr()
    with caplog.at_level(logging.INFO, logger="salora_plugins"):
        validate(module, model, tokenizer, harmful=[Request("?")], harmless=harmless, batch_size=48, progress=False)
    said = caplog.text + "".join(capfd.readouterr())
    assert "leak" not in said.lower() and "Safety module" not in said


def test_answers_in_the_data_are_used(demo):
    model, tokenizer, module, requests = demo
    answered = [Request(request.prompt, response="A loaf of bread.") for request in requests["harmless"]]
    report = validate(module, model, tokenizer, harmful=requests["harmful"], harmless=answered, progress=False)
    rows = [
        {
            "prompt": [{"role": "user", "content": request.prompt}],
            "completion": [{"role": "assistant", "content": "A loaf of bread."}],
        }
        for request in answered
    ]
    assert report.unchanged.harmless_loss == pytest.approx(response_loss(model, tokenizer, rows), rel=1e-5)


def test_harmless_requests_to_which_the_model_says_nothing_are_left_out(demo, monkeypatch, caplog):
    model, tokenizer, module, requests = demo
    monkeypatch.setattr(own_answers, "generate_responses", lambda *_, **__: [""])
    answer = "Two and two make four, as one and three do, and as five less one does."
    harmless = [Request("Two and two?", response=answer), Request("Three and three?")]
    found, expected = (
        validate(module, model, tokenizer, harmful=requests["harmful"][:2], harmless=rows, progress=False)
        for rows in (harmless, harmless[:1])
    )
    assert "says nothing to 1 of 2" in caplog.text
    assert found.to_dict() == expected.to_dict()
    with pytest.raises(ValueError, match=r"harmless: as many directions.*safety_rank=8, but"):
        validate(
            module, model, tokenizer, harmful=requests["harmful"], harmless=[Request("?", response="4")], progress=False
        )
    with pytest.raises(ValueError, match="harmless: the model answers none"):
        validate(module, model, tokenizer, harmful=requests["harmful"][:2], harmless=harmless[1:], progress=False)


def test_another_model_is_refused(demo):
    _, _, module, requests = demo
    with pytest.raises(ValueError, match="computed for another model"):
        validate(module, tiny.llama(), tiny.tokenizer(), **requests, progress=False)
    with pytest.raises(ValueError, match="at least one request of each"):
        validate(module, *demo[:2], harmful=[], harmless=requests["harmless"])


def test_the_command(demo, tmp_path):
    demo[2].save(tmp_path / "safety.safetensors")
    arguments = ["validate", tmp_path / "safety.safetensors", "--model", MODEL, "--num-requests", 4]
    arguments += ["--plot", tmp_path / "plot.png", "--json"]
    result = CliRunner().invoke(create_cli(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout[result.stdout.index("{") :])
    assert values["settings"]["harmful_requests"] == 4
    assert set(values["sides"]) == {"output", "input"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_plot(report, tmp_path):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    assert f"{report.unchanged.harmful_margin.value:.2f}" in console.export_text()
    write_plot(tmp_path / "plot.png", report)
