"""The artifact: what is written is read again, and damage of each kind is named."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from salora_plugins import SafetyModule, SaLoRAConfig, calibrate, load_for_training
from salora_plugins.adapters.model_card import END, START
from salora_plugins.cli import create_cli
from salora_plugins.inspection import summary
from salora_plugins.models.fingerprint import check_belongs
from salora_plugins.safety_module import SafetyModuleError, content_digest
from tiny import llama, qwen3, token_rows

OPTIONS = {"target_modules": ["q_proj", "k_proj"], "safety_rank": 8, "input_safety_rank": 4}
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def module() -> SafetyModule:
    return calibrate(llama(), safety_data=token_rows(16), **OPTIONS)


def change_description(metadata, **values):
    description = json.loads(metadata["salora_safety_module"])
    return {"salora_safety_module": json.dumps({**description, **values})}


def rewrite(path, change):
    """Change tensors of a file and write it with the old metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_round_trip(module, tmp_path):
    module.save(tmp_path / "a.safetensors")
    read = SafetyModule.load(tmp_path / "a.safetensors")
    for attribute in ("bases", "input_bases", "singular_values", "input_singular_values", "weight_samples"):
        ours, theirs = getattr(module, attribute), getattr(read, attribute)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read.provenance == module.provenance
    assert read.fingerprint == module.fingerprint
    read.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


PROVENANCE = {
    "two-sided": {"energy": {NAME: 10.0}, "input_energy": {NAME: 20.5}, "safety_rank": 0.5, "seed": 10**400 // 10**200},
    "one-sided": {"energy": {NAME: 10.0}, "input_energy": {}, "base_model": None, "safety_rank": 3},
    "a newer version's": {"energy": {NAME: 1}, "input_energy": {}, "by": {"keys": [1, None]}, "keys": 1},
    "a stranger's": {},
}


@pytest.mark.parametrize("kind", PROVENANCE)
def test_a_file_is_written_anew_with_the_same_bytes(kind, tmp_path):
    """The format, spelled out: what an earlier version wrote is read, and written as it wrote it."""
    tensors = {
        f"{NAME}.output_basis": torch.eye(6)[:, :3].contiguous(),
        f"{NAME}.output_singular_values": torch.tensor([2.0, 1.0, 0.5]),
        f"{NAME}.weight_sample": torch.tensor([0.1, 0.2]),
    }
    if kind == "two-sided":
        tensors[f"{NAME}.input_basis"] = torch.eye(4)[:, 1:3].contiguous()
        tensors[f"{NAME}.input_singular_values"] = torch.tensor([3.0, 0.0])
    sample = tensors[f"{NAME}.weight_sample"].bfloat16().view(torch.int16).numpy().tobytes()
    description = {
        "format_version": 2,
        "fingerprint": hashlib.sha256(NAME.encode() + sample).hexdigest(),
        "provenance": PROVENANCE[kind],
    }
    content = content_digest(tensors) + json.dumps(description, sort_keys=True)
    description["content_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    metadata = {"salora_safety_module": json.dumps(description, sort_keys=True)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    read = SafetyModule.load(tmp_path / "a.safetensors")
    read.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert list(read.sides) == (["output", "input"] if kind == "two-sided" else ["output"])
    said = {key: value for key, value in PROVENANCE[kind].items() if key not in ("energy", "input_energy")}
    assert dict(read.provenance) == said and "requests" not in read.provenance
    assert read.captured_energy == ({} if kind == "a stranger's" else {NAME: 5.25 / PROVENANCE[kind]["energy"][NAME]})


def test_folder_stands_for_the_file_in_it(module, tmp_path):
    module.save(tmp_path)
    assert SafetyModule.load(tmp_path).fingerprint == module.fingerprint
    with pytest.raises(FileNotFoundError, match="safety_module: there is no file"):
        SafetyModule.load(tmp_path / "absent")


def test_shapes_ranks_and_provenance(module):
    assert module.bases[NAME].shape == (64, 8) and module.input_bases[NAME].shape == (64, 4)
    assert (module.safety_rank, module.input_safety_rank) == (8, 4)
    assert module.provenance["safety_positions"] == "prompt"
    assert module.provenance["positions_counted"] == 16 * 8
    assert 0 < module.captured_energy[NAME] < 1


def test_restriction_takes_the_leading_directions(module):
    part = module.restricted_to({"output": {NAME: 3}})
    assert list(part.bases) == [NAME] and not part.input_bases
    assert torch.equal(part.bases[NAME], module.bases[NAME][:, :3])
    with pytest.raises(SafetyModuleError, match="safety_rank=9, but the safety module has only 8"):
        module.restricted_to({"output": {NAME: 9}})
    with pytest.raises(SafetyModuleError, match="input_safety_rank=5, but the safety module has only 4"):
        module.restricted_to({"output": {NAME: 8}, "input": {NAME: 5}})
    with pytest.raises(SafetyModuleError, match="no basis for 1 of 1 target modules: 'lm_head'"):
        module.restricted_to({"output": {"lm_head": 8}})


def test_truncated_file(module, tmp_path):
    module.save(tmp_path)
    path = tmp_path / "salora.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SafetyModuleError, match="not a readable safetensors file, perhaps cut short"):
        SafetyModule.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(SafetyModuleError, match="not a readable safetensors file"):
        SafetyModule.load(path)


def test_changed_content(module, tmp_path):
    """A rotated basis is still orthonormal, so only the checksum tells."""

    def rotate(tensors, metadata):
        rotation = torch.linalg.qr(torch.randn(64, 64)).Q
        tensors[f"{NAME}.output_basis"] = rotation @ tensors[f"{NAME}.output_basis"]

    module.save(tmp_path)
    rewrite(tmp_path / "salora.safetensors", rotate)
    with pytest.raises(SafetyModuleError, match="the checksum differs"):
        SafetyModule.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t[f"{NAME}.output_basis"].mul_(2), f"{NAME}: output basis is not orthonormal"),
        (lambda t, m: t[f"{NAME}.input_basis"].fill_(np.nan), f"{NAME}: input basis is not finite"),
        (lambda t, m: t.update({f"{NAME}.output_basis": torch.ones(64)}), "output basis has shape"),
        (lambda t, m: t[f"{NAME}.output_singular_values"].fill_(np.inf), "singular values are not finite"),
        (lambda t, m: t.pop(f"{NAME}.input_basis"), "has no input basis, although other modules have one"),
        (lambda t, m: t.update({f"{NAME}.extra": torch.ones(1)}), "which is no part of a safety module"),
        (lambda t, m: m.update(change_description(m, format_version=99)), "format version 99, this salora-plugins"),
        (lambda t, m: m.update(salora_safety_module="{"), "its description cannot be read"),
        (lambda t, m: m.pop("salora_safety_module"), "a safetensors file, but not a safety module"),
    ],
)
def test_damage_is_named(module, tmp_path, change, message):
    module.save(tmp_path)
    rewrite(tmp_path / "salora.safetensors", change)
    with pytest.raises(SafetyModuleError, match=message):
        SafetyModule.load(tmp_path)


NO_TEXT = r"provenance: {} is .*, not a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "provenance is None, not a mapping"),
        ([], "not a mapping"),
        ({"energy": "much"}, NO_TEXT.format("energy")),
        ({"energy": {NAME: "much"}}, NO_TEXT.format("energy")),
        ({"input_energy": {NAME: float("nan")}}, NO_TEXT.format("input_energy")),
        ({"versions": "x"}, NO_TEXT.format("versions")),
        ({"versions": {"torch": 2}}, NO_TEXT.format("versions")),
        ({"base_model": ["x"]}, NO_TEXT.format("base_model")),
        ({"safety_positions": {}}, NO_TEXT.format("safety_positions")),
        ({"requests": "many"}, NO_TEXT.format("requests")),
        ({"seed": True}, NO_TEXT.format("seed")),
        ({"directions": {"output": "many"}}, NO_TEXT.format("directions")),
        ({"base_model": "another/model"}, "the checksum differs"),
        ({"by": "a newer version"}, "the checksum differs"),
    ],
)
def test_a_description_that_was_changed_or_is_of_other_types_is_named(module, tmp_path, change, message):
    def write(tensors, metadata):
        provenance = change if not isinstance(change, dict) else {**module.provenance, **change}
        metadata.update(change_description(metadata, provenance=provenance))

    module.save(tmp_path)
    rewrite(tmp_path / "salora.safetensors", write)
    with pytest.raises(SafetyModuleError, match=message) as caught:
        SafetyModule.load(tmp_path)
    assert str(tmp_path / "salora.safetensors") in str(caught.value)


def test_files_of_format_1_are_read_with_a_word_about_them(module, tmp_path, caplog):
    def as_format_1(tensors, metadata):
        metadata.update(change_description(metadata, format_version=1, content_sha256=content_digest(tensors)))

    module.save(tmp_path)
    rewrite(tmp_path / "salora.safetensors", as_format_1)
    read = SafetyModule.load(tmp_path)
    assert read.provenance == module.provenance and "is under no checksum" in caplog.text
    caplog.clear()
    read.save(tmp_path / "new.safetensors")
    SafetyModule.load(tmp_path / "new.safetensors")
    assert not caplog.text
    rewrite(tmp_path / "salora.safetensors", lambda t, m: t[f"{NAME}.output_singular_values"].mul_(2))
    with pytest.raises(SafetyModuleError, match="the checksum differs"):
        SafetyModule.load(tmp_path)


HOSTILE = [
    "\x1b]0;title\x07\x1b[2J",
    "a\u202eb\nOutside: no module has more",
    "x <!-- end of the part by salora-plugins --> <script>alert(1)</script> | `y` [z](javascript:1) ![i](j) [/red]",
    "\n---\ntags: [other]\n---\n# Heading",
    "<!-- salora-plugins: renewed with every save --> **bold**",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_others_are_only_shown(module, tmp_path, text):
    """By `salora inspect`, in an error message, and in the card, which does not grow."""
    known = {"base_model": text, "safety_data": text, "safety_positions": "prompt", "engine": text}
    known |= {"basis_method": text, "safety_data_sha256": text, "versions": {text: text}}
    hostile = replace(module, provenance={**module.provenance, **known})
    hostile.save(tmp_path / "h.safetensors")
    read = SafetyModule.load(tmp_path / "h.safetensors")
    assert len(summary(read).splitlines()) == len(summary(module).splitlines())
    result = CliRunner().invoke(create_cli(), ["inspect", str(tmp_path / "h.safetensors")])
    assert result.exit_code == 0
    for shown in (summary(read), result.output):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)

    config = SaLoRAConfig(
        r=2, init="zero", target_modules=OPTIONS["target_modules"], safety_rank=8, safety_module=read, safety_data=[]
    )
    model = get_peft_model(llama(), config)
    model.peft_config["default"].base_model_name_or_path = text
    sizes = []
    for _ in range(3):
        model.save_pretrained(tmp_path / "adapter")
        sizes.append(len((tmp_path / "adapter" / "README.md").read_text()))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    part = card.text[card.text.index(START) + len(START) : card.text.index(END)]
    assert sizes[0] == sizes[1] == sizes[2] and card.text.count(START) == card.text.count(END) == 1
    assert "<" not in part and "\x1b" not in part and "\n# Heading" not in part and "](j" not in part.replace("\\]", "")
    assert part.count("| Safety module of |") == 1 and part.count("\n```") % 2 == 0
    assert card.data.base_model is None and "other" not in card.data.tags


def test_belongs_to_one_model(module):
    names = list(module.bases)
    check_belongs(module, llama(), names)
    check_belongs(module, llama().to(torch.bfloat16), names)
    check_belongs(module, llama().half(), names)
    with pytest.raises(SafetyModuleError, match="computed for another model: the weight of"):
        check_belongs(module, llama(seed=1), names)
    with pytest.raises(SafetyModuleError, match="computed for another model: its basis for"):
        check_belongs(module, llama(hidden_size=32), names)
    slightly_tuned = llama()
    with torch.no_grad():
        for parameter in slightly_tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.02)
    with pytest.raises(SafetyModuleError, match="computed for another model"):
        check_belongs(module, slightly_tuned, names)


def test_model_of_other_architecture_is_refused_by_get_peft_model(module):
    from peft import get_peft_model

    from salora_plugins import SaLoRAConfig

    options = {"target_modules": ["q_proj", "k_proj"], "safety_rank": 8, "safety_module": module}
    with pytest.raises(SafetyModuleError, match="computed for another model"):
        get_peft_model(qwen3(seed=1), SaLoRAConfig(**options))
    with pytest.raises(ValueError, match="safety_positions='response', but the safety module was computed from"):
        get_peft_model(llama(), SaLoRAConfig(**options, safety_positions="response"))


def test_fingerprint_is_that_of_the_checkpoint():
    options = {"safety_data": token_rows(16), "target_modules": ["q_proj"], "safety_rank": 8}
    first = calibrate(llama(), **options).fingerprint
    assert calibrate(llama().to(torch.bfloat16), **options).fingerprint == first
    assert calibrate(llama(seed=1), **options).fingerprint != first


def test_a_hub_repository_stands_for_the_file_in_it(module, tmp_path, monkeypatch):
    """From the hub's cache on disk, as it is after a download."""
    import huggingface_hub.constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some-team--llama-safety"
    module.save(repository / "snapshots" / revision / "salora.safetensors")
    for name in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("some-team/llama-safety", "some-team/llama-safety@v1"):
        assert SafetyModule.load(name).fingerprint == module.fingerprint
    with pytest.raises(FileNotFoundError, match="safety_module='some-team/other' is neither a file nor a folder here"):
        SafetyModule.load("some-team/other")


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    """Where a file is written as where it is read, and an adapter is continued."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(llama(), SaLoRAConfig(**OPTIONS, safety_data=token_rows(8), calibration_cache=False))
    safety_module = model.base_model.safety_module()
    safety_module.save("~/safety.safetensors")
    assert SafetyModule.load(tmp_path / "home" / "safety.safetensors").fingerprint == safety_module.fingerprint
    model.save_pretrained(tmp_path / "home" / "adapter")
    load_for_training(llama(), "~/adapter")
    assert not (tmp_path / "~").exists()
