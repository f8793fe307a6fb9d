"""`salora doctor`: what it finds in the installation, on the machine, and of a model."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

from salora_plugins.cli import create_cli
from salora_plugins.doctor import examine_installation, installation
from salora_plugins.doctor import model as of_models
from salora_plugins.models.loading import load_model
from salora_plugins.support import memory
from tiny import llama, tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Safety data of one row, which is quickly rendered."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "How?", "response": "I can't help with that."}) + "\n")
    return file


def doctor(*arguments):
    """Exit code, and finding by name."""
    result = CliRunner().invoke(create_cli(), ["doctor", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    answer = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    return result.exit_code, {finding["name"]: finding for finding in answer["findings"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "model"
    llama().save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_whole_installation_and_a_whole_model(folder):
    code, found = doctor(folder)
    assert code == 0 and not [f for f in found.values() if f["status"] == "problem"]
    assert found["salora-plugins"]["status"] == found["torch"]["status"] == found["PEFT"]["status"] == "ok"
    assert "4 linear layers (2 q_proj, 2 v_proj), outputs and inputs" in found["target modules"]["found"]
    assert "the model knows 259" in found["tokenizer"]["found"]
    assert "rows rendered" in found["safety data"]["found"]
    files = list(folder.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    assert len(files) > 1 and found["weights"]["found"] == f"{len(files)} files, {stored / 1e6:.1f} MB"


def test_options_are_those_of_a_calibration(folder, rows):
    _, found = doctor(folder, "--target-modules", "all-linear", "--variant", "paper", "--safety-data", rows)
    assert "14 linear layers" in found["target modules"]["found"] and "outputs only" in found["target modules"]["found"]
    code, found = doctor(folder, "--target-modules", "gone")
    assert code == 1 and "matches no module" in found["targets"]["found"]
    code, found = doctor(folder, "--safety-data", folder / "gone.jsonl")
    assert code == 1 and "gone.jsonl" in found["safety data"]["found"]
    with pytest.raises(ValueError, match="salora doctor MODEL"):
        doctor("--safety-rank", "8")


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()


BROKEN = {
    "a shard is missing": (lambda f: next(f.glob("*.safetensors")).unlink(), "weights", "files are missing"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("*safetensors*")], "weights", "model.safetensors"),
    "no tokenizer": (remove_tokenizer, "tokenizer", "has none"),
    "quantized": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization",
        "gptq",
    ),
    "to be dequantized": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "mxfp4"}),
        "quantization",
        "mxfp4",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "configuration", "config.json"),
    "an unknown token": (lambda f: change(f / "config.json", vocab_size=200), "safety data", "embedding"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_stands_in_the_way_of_a_model(folder, rows, name):
    damage, where, text = BROKEN[name]
    damage(folder)
    code, found = doctor(folder, "--safety-data", rows)
    assert code == 1 and found[where]["status"] == "problem" and text in found[where]["found"]


def in_the_hubs_cache(folder, cache, monkeypatch, left_out):
    """The folder as the repository team/model, without the files of a pattern."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--team--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(left_out))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


@pytest.mark.parametrize("left_out, what", [("*safetensors*", "the weights"), ("model-*", "of 5 files")])
def test_weights_that_are_not_in_the_hubs_cache_are_downloaded_where_that_may_be(
    folder, tmp_path, monkeypatch, left_out, what
):
    in_the_hubs_cache(folder, tmp_path / "hub", monkeypatch, left_out)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found, stored = of_models._weights("team/model", of_models.LoadingOptions())
    assert (found.status, stored) == ("problem", None) and what in found.found and "HF_HUB_OFFLINE" in found.remedy
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found, stored = of_models._weights("team/model", of_models.LoadingOptions())
    assert (found.status, stored) == ("ok", None) and f"{what} are still to download" in found.found


def test_no_pickle_is_read(folder):
    state = load_model(str(folder), of_models.LoadingOptions()).state_dict()
    for file in folder.glob("*safetensors*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    found, _ = of_models._weights(str(folder), of_models.LoadingOptions())
    assert found.status == "problem" and "Pickles are not read" in found.remedy
    with pytest.raises(OSError, match=r"neither model.safetensors nor .*\. Pickles are not read"):
        load_model(str(folder), of_models.LoadingOptions())


def test_no_chat_template_is_a_warning(folder, rows):
    (folder / "chat_template.jinja").unlink()
    code, found = doctor(folder, "--safety-data", rows)
    assert code == 0 and found["chat template"]["status"] == "warning"
    lines = CliRunner().invoke(create_cli(), ["doctor", str(folder), "--safety-data", str(rows)]).output.splitlines()
    assert lines[-1] == "Nothing stands in the way."
    assert any(line.startswith("- chat template: none") for line in lines[lines.index("Worth a look:") :])


def test_a_path_that_leads_nowhere(tmp_path):
    code, found = doctor(tmp_path / "gone")
    assert code == 1 and found["configuration"]["found"].startswith(f"{tmp_path / 'gone'}: there is no such folder")


def test_memory(folder, rows, monkeypatch):
    monkeypatch.setattr(of_models, "accelerator_memory", lambda: {"cuda:0": (10**5, 10**6)})
    monkeypatch.setattr(of_models, "free_memory", lambda: 10**5)
    code, found = doctor(folder, "--safety-data", rows)
    assert code == 1 and found["memory"]["status"] == "problem" and "0.1 MB on cuda:0" in found["memory"]["found"]
    monkeypatch.setattr(of_models, "free_memory", lambda: 10**9)
    assert doctor(folder, "--safety-data", rows)[1]["memory"]["status"] == "ok"
    monkeypatch.setattr(of_models, "accelerator_memory", lambda: {"cuda:0": (10**9, 10**9)})
    monkeypatch.setattr(of_models, "free_memory", lambda: 10**5)
    found = doctor(folder, "--safety-data", rows)[1]["memory"]
    assert found["status"] == "warning" and "--device-map auto" in found["remedy"]
    assert doctor(folder, "--safety-data", rows, "--device-map", "auto")[1]["memory"]["status"] == "ok"
    whole = of_models._bytes_of_weights(llama(), of_models.LoadingOptions())
    assert whole == sum(p.numel() * 4 for p in llama().parameters()) + sum(b.nbytes for b in llama().buffers())
    assert of_models._bytes_of_weights(llama(), of_models.LoadingOptions(load_in_4bit=True)) < 0.6 * whole


@pytest.mark.parametrize("version", [0, 1])
def test_the_page_cache_of_a_container_counts_as_free(tmp_path, monkeypatch, version):
    limit, used, statistics = (tmp_path / name for name in ("limit", "used", "statistics"))
    names = memory._LIMITS[version][3]
    monkeypatch.setattr(memory, "_LIMITS", ((limit, used, statistics, names),))
    limit.write_text("1000000\n")
    used.write_text("900000\n")
    assert memory.free_memory() == 100_000
    inactive, active = names
    statistics.write_text(f"anon 5\n{inactive} 500000\n{active} 200000\nx_{active} 7\n")
    assert memory.free_memory() == 800_000
    machine = memory.psutil.virtual_memory().available
    limit.write_text("max\n")
    assert memory.free_memory() == pytest.approx(machine, rel=0.5)


def test_versions_outside_of_the_declared_ranges(monkeypatch):
    declared = [
        "torch>=99",
        "no-such-package>=1",
        'transformers>=1; python_version >= "3"',
        'datasets>=99; extra == "x"',
    ]
    monkeypatch.setattr(installation, "requires", lambda _: declared)
    found = {finding.name: finding for finding in examine_installation()}
    assert found["torch"].status == "problem" and found["torch"].remedy == 'pip install "torch>=99"'
    assert found["no-such-package"].status == "problem" and found["transformers"].status == "ok"
    assert found["datasets"].status == "warning"  # of an extra


def test_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SALORA_CACHE", str(tmp_path / "new" / "cache"))
    assert "0 kept" in {f.name: f for f in examine_installation()}["safety modules"].found
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALORA_CACHE", str(tmp_path / "file" / "cache"))
    found = {f.name: f for f in examine_installation()}["safety modules"]
    assert found.status == "warning" and "SALORA_CACHE" in found.remedy
