"""Saved adapters outside of this package: older PEFT, servers, the hub; and `salora export`."""

import json
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import hub as transformers_hub

from certificate import largest_share_inside
from salora_plugins import (
    SafetyModule,
    SaLoRAConfig,
    audit,
    export_adapter,
    last_complete_checkpoint,
    load_for_training,
    project_adapter,
    push_to_hub,
)
from salora_plugins.adapters.certificate import largest, safety_shares
from salora_plugins.adapters.digest import adapter_digest, adapter_problem
from salora_plugins.adapters.model_card import END, START, write_card
from salora_plugins.adapters.saved import SavedAdapter
from salora_plugins.cli import create_cli
from salora_plugins.evaluation.monitor import largest_live_share
from tiny import gpt2, llama, relative_difference, token_batch, token_rows

saved_adapters = pytest.mark.compatibility
AREA = "Saved adapters"

# The fields of LoraConfig and PeftConfig in the source of PEFT 0.4.0 (src/peft/tuners/lora.py, utils/config.py), the
# first release that loads adapter_model.safetensors. PEFT 0.6 to 0.13 fail on keys that are new to them.
KEYS_OF_PEFT_0_4 = {
    *("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r"),
    *("revision", "target_modules", "task_type"),
}
NAME = "organization/model"


def base(build=llama) -> PreTrainedModel:
    model = build()
    model.config._name_or_path = model.name_or_path = NAME
    return model


def trained(model: PreTrainedModel, folder: Path, **options) -> PeftModel:
    """A SaLoRA adapter after a few steps, saved."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "safety_rank": 8,
        "input_safety_rank": 4,
        "safety_data": token_rows(8),
        "task_data": token_rows(8, seed=1),
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(model, SaLoRAConfig(**{**defaults, **options}))
    train(model)
    model.save_pretrained(folder)
    return model.eval()


def train(model: PeftModel) -> None:
    tokens = token_batch(4, 16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A two-sided adapter of rank 8 (r = 4), its logits beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = trained(base(), folder / "adapter")
    torch.save(model(token_batch()).logits.detach(), folder / "logits.pt")
    return folder / "adapter"


@pytest.fixture
def own(adapter, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder: Path, **values) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **values}))


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> s B A, dense, float64, as PEFT computes it."""
    saved = SavedAdapter.load(folder)
    return {name: saved.scaling(name) * b.double() @ a.double() for name, (a, b) in saved.factors.items()}


def test_a_tilde_is_the_home_folder_as_the_host_has_it(own, tmp_path, monkeypatch, hub):
    """PEFT writes into a folder of that name, trainers into the home folder: no adapter is in two places."""
    model = load_for_training(base(), own)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("~/saved")
    assert {path.name for path in (tmp_path / "~" / "saved").iterdir()} == {path.name for path in own.iterdir()}
    assert not (tmp_path / "home").exists()
    checkpoint = Path(shutil.copytree(own, tmp_path / "home" / "outputs" / "checkpoint-2"))
    (checkpoint / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint("~/outputs") == str(checkpoint)
    assert push_to_hub("~/outputs/checkpoint-2", NAME) == "commit"


# Older PEFT and servers


@saved_adapters(AREA, "PEFT 0.4.0 and newer: keys of `adapter_config.json`")
def test_the_configuration_has_only_keys_of_the_oldest_peft(adapter):
    assert set(config_of(adapter)) == KEYS_OF_PEFT_0_4
    model = PeftModel.from_pretrained(base(), adapter).eval()
    expected = torch.load(adapter.parent / "logits.pt")
    assert relative_difference(model(token_batch()).logits, expected) <= 1e-5


def test_options_that_are_not_default_are_written_and_read_back(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    options = {"use_rslora": True, "exclude_modules": ["lm_head"], **patterns, "input_safety_rank": 0}
    model = trained(base(), tmp_path, **options)
    written = config_of(tmp_path)
    assert written["use_rslora"] is True and written["rank_pattern"] == {"v_proj": 4}
    assert "peft_version" not in written and written["exclude_modules"] == ["lm_head"]
    assert LoraConfig.from_pretrained(tmp_path).alpha_pattern["v_proj"] == pytest.approx(3 * 2**0.5)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert relative_difference(loaded(token_batch()).logits, model(token_batch()).logits) <= 1e-5


def vllm_problems(folder: Path, supported: set[str], max_rank: int) -> list[str]:
    """
    Why vLLM would refuse an adapter: the rules of vllm/lora/peft_helper.py (`PEFTHelper.from_dict`, `validate_legal`),
    vllm/lora/utils.py (`parse_fine_tuned_lora_name`) and vllm/lora/lora_model.py (`check_unexpected_modules`).
    """
    config = config_of(folder)
    problems = [f"lacks {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    problems += [option for option in ("modules_to_save", "use_dora") if config.get(option)]
    if config.get("bias", "none") != "none":
        problems.append("bias")
    if config["r"] > max_rank:
        problems.append("rank")
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None or match.group(1).rpartition(".")[2] not in supported:
            problems.append(key)
        # Older releases take one scaling, from r and lora_alpha, and would scale ranks by module wrongly.
        elif tensor.shape[match.group(2) == "lora_B"] != config["r"]:
            problems.append(f"{key}: rank")
    return problems


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@saved_adapters(AREA, "vLLM: checks of an adapter (`--max-lora-rank` at least the saved rank, 2r)")
def test_vllm_would_take_it(adapter, own):
    assert vllm_problems(adapter, LINEAR, max_rank=8) == []
    assert vllm_problems(adapter, LINEAR, max_rank=4) == ["rank"]
    change_config(own, bias="all", use_dora=True)
    assert vllm_problems(own, LINEAR, max_rank=8) == ["use_dora", "bias"]


@saved_adapters(AREA, "text-generation-inference: checks of an adapter")
def test_text_generation_inference_would_take_it(adapter):
    """
    It reads the configuration with PEFT (server/text_generation_server/adapters/lora.py, `LoraConfig.load`), compares
    the base model's name (utils/adapter.py, `load_module_map`), takes every weight that is named after a layer of the
    model, with both factors, and stacks those of one kind, so that they must have one rank in all layers.
    """
    config = LoraConfig.from_pretrained(adapter)
    assert config.base_model_name_or_path == NAME
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.v_proj")]
    layers += [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    expected = {f"base_model.model.{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")}
    assert set(weights) == expected
    assert {weights[f"base_model.model.{layer}.lora_A.weight"].shape[0] for layer in layers} == {config.r}


# The model card


@saved_adapters(AREA, "model card in the saved folder")
def test_the_card_names_method_ranks_provenance_and_certificate(adapter):
    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model == NAME and card.data.library_name == "peft"
    assert {"lora", "salora", f"base_model:adapter:{NAME}"} <= set(card.data.tags)
    section = card.text[card.text.index(START) : card.text.index(END)]
    module = SafetyModule.load(adapter)
    for part in (
        *("https://arxiv.org/abs/2501.01765", "r = 4 trained, 8 saved; scaling 2", "load_for_training"),
        *("8 output directions per layer, 4 input directions", f"Safety module of | {NAME}", module.fingerprint),
        *(
            module.provenance["safety_data_sha256"],
            "8 samples",
            "prompt positions",
            "salora, exact statistics",
            "torch 2",
        ),
    ):
        assert part in section
    output, inputs = (float(x) for x in re.findall(r"≤ (\S+?),? ", section))
    assert max(output, inputs) == pytest.approx(largest_share_inside(adapter), rel=0.1) and max(output, inputs) < 1e-5


def test_the_card_is_renewed_and_the_users_text_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My adapter\n\nWords of mine.\n")
    model = trained(base(), tmp_path)
    first = ModelCard.load(tmp_path / "README.md")
    train(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.parametrizations.weight.original"):
                parameter.mul_(3)
    model.save_pretrained(tmp_path)
    second = ModelCard.load(tmp_path / "README.md")
    for card in (first, second):
        assert card.text.count(START) == card.text.count(END) == card.text.count("## SaLoRA") == 1
        assert card.text.startswith("# My adapter") and "Words of mine." in card.text and card.data.license == "mit"
        assert "salora" in card.data.tags
    certificates = [re.search(r"Certificate \| (.*) \|", card.text).group(1) for card in (first, second)]
    assert certificates[0] != certificates[1]


def test_the_card_begins_with_our_section_and_has_no_placeholders(adapter):
    text = ModelCard.load(adapter / "README.md").text
    assert text.startswith(START) and "[More Information Needed]" not in text and "<!-- Provide" not in text
    behind = text.partition(END)[2]
    assert re.fullmatch(r"\s*### Framework versions\s+- PEFT \S+\s*", behind)
    assert "is_trainable=True" in text and "load_for_training" in text


def test_what_was_filled_in_of_the_hubs_template_stays(tmp_path):
    card = ModelCard.from_template(ModelCardData())
    card.text = card.text.replace("**Developed by:** [More Information Needed]", "**Developed by:** somebody")
    code = "```python\n# Not a heading\n\n\nprint(1)\n```"
    begin = "Use the code below to get started with the model.\n\n"
    assert f"{begin}[More Information Needed]" in card.text
    card.text = card.text.replace(f"{begin}[More Information Needed]", f"{begin}{code}") + "\n## Mine\n\nWords.\n"
    card.save(tmp_path / "README.md")
    for _ in range(2):  # renewed, too
        write_card(tmp_path, None, "Ours.", tags=())
        text = ModelCard.load(tmp_path / "README.md").text
        assert text.startswith(START) and text.count("Ours.") == 1 and "[More Information Needed]" not in text
        kept = re.findall("^#+ .*$", text.replace(code, ""), re.MULTILINE)
        assert kept == [
            "## Model Details",
            "### Model Description",
            "## How to Get Started with the Model",
            "## Mine",
        ]
        assert "- **Developed by:** somebody" in text and code in text and begin.strip() in text and "Words." in text


def test_a_base_model_on_disk_is_not_named_in_the_metadata(tmp_path):
    model = base()
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A folder that stands for a repository of the hub; what would be uploaded lands there."""
    from huggingface_hub.utils import filter_repo_objects

    repository = tmp_path / "hub"

    class Created:
        repo_id = NAME

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        assert repo_id == NAME
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (repository / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / file, repository / file)
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Created)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return repository


@saved_adapters(AREA, "`push_to_hub`: model, safety module and card")
def test_push_to_hub(adapter, own, hub):
    (own / "README.md").write_text("---\nlibrary_name: transformers\n---\nA trainer's card.\n")
    (own / "checkpoint-1").mkdir()
    (own / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    assert push_to_hub(own, NAME) == "commit"
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "salora.safetensors",
        "salora_config.json",
        "README.md",
    }
    assert {path.name for path in hub.iterdir()} == files
    text = (hub / "README.md").read_text()
    assert "A trainer's card." in text and "Certificate" in text
    shutil.rmtree(hub)
    assert push_to_hub(load_for_training(base(), own), NAME) == "commit"
    assert {path.name for path in hub.iterdir()} == files
    assert "Certificate" in (hub / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match=r"salora_config.json"):
        (own / "salora_config.json").unlink()
        push_to_hub(own, NAME)


def test_no_repository_without_weights(adapter, tmp_path, hub):
    """Pickles are not uploaded, and an adapter without its weights is none."""
    load_for_training(base(), adapter).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle.*safe_serialization=True"):
        push_to_hub(tmp_path, NAME)
    assert not hub.exists()


def test_pefts_own_push_uploads_the_same_files_without_our_part_of_the_card(adapter, monkeypatch, hub):
    """Why there is a function of our own: transformers writes its card last, over the one that was saved."""
    uploaded = {}

    def create_commit(self, *, repo_id, operations, **options):
        uploaded.update({op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations})

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for name in ("create_repo", "create_commit"):  # older Transformers has them as functions
        if hasattr(transformers_hub, name):
            monkeypatch.setattr(transformers_hub, name, getattr(HfApi(), name))
    card = ModelCard("---\nlibrary_name: transformers\n---\nFrom transformers.\n")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    load_for_training(base(), adapter).push_to_hub(NAME)
    assert {"adapter_model.safetensors", "adapter_config.json", "salora.safetensors", "salora_config.json"} < set(
        uploaded
    )
    assert uploaded["salora.safetensors"] == (adapter / "salora.safetensors").read_bytes()
    assert "Certificate" not in uploaded["README.md"].decode()


# What is certified are these weights


def test_the_digest_is_that_of_the_tensors(adapter, own):
    file = own / "adapter_model.safetensors"
    tensors = load_file(file)
    assert adapter_digest(own) == adapter_digest(adapter) and adapter_problem(own) is None
    assert json.loads((own / "salora_config.json").read_text())["adapter_sha256"] == adapter_digest(adapter)
    assert adapter_digest(adapter) in (adapter / "README.md").read_text()
    reordered = sorted(tensors.items(), key=lambda item: item[1].shape[0])
    save_file(dict(reordered), file, metadata={"format": "pt", "other": "words"})
    assert file.read_bytes() != (adapter / "adapter_model.safetensors").read_bytes()
    assert adapter_digest(own) == adapter_digest(adapter)
    for change in (
        lambda t: next(iter(t.values())).view(-1)[0].add_(1e-3),
        lambda t: t.update({key + "x": t.pop(key) for key in [next(iter(t))]}),
        lambda t: t.update({key: t[key].bfloat16() for key in [next(iter(t))]}),
        lambda t: t.update({key: t[key].T.contiguous() for key in [next(iter(t))]}),
    ):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        change(changed)
        save_file(changed, file)
        assert adapter_digest(own) != adapter_digest(adapter)
        assert "are not those that were saved with salora_config.json" in adapter_problem(own)


def second_stage(folder: Path) -> None:
    """Trained further by plain PEFT, and saved in its place: the side files stay."""
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    train(model)
    model.save_pretrained(folder)


@saved_adapters(AREA, "a second stage by plain PEFT in the same folder: `load_for_training`, `audit`, `push_to_hub`")
def test_a_second_stage_by_plain_peft_is_not_certified(adapter, own, tmp_path, hub, refusal):
    (own / "trainer_state.json").write_text('{"global_step": 1}')
    os.rename(own, tmp_path / "checkpoint-2")
    own = tmp_path / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path) == str(own)
    second_stage(own)
    digest = adapter_digest(adapter)
    row = next(line for line in (own / "README.md").read_text().splitlines() if line.startswith("| Certificate"))
    assert f"for the weights of SHA-256 `{digest}` and no others" in row and adapter_digest(own) != digest
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"not those that were saved with salora_config.json.*project") as caught:
        load_for_training(base(), own)
    refusal(caught.value, hide=tmp_path)
    with pytest.raises(ValueError, match="not those that were saved with"):
        push_to_hub(own, NAME)
    found = audit(own)
    assert found.to_dict()["verdict"] == "changed" and not found.is_outside
    assert "not those that were saved with" in found.summary() and "Outside" not in found.summary()
    assert CliRunner().invoke(create_cli(), ["audit", str(own)]).exit_code == 3
    measured = audit(own, SafetyModule.load(adapter))
    assert measured.verdict == "inside" and "not those that were saved" in measured.summary()
    with pytest.warns(UserWarning, match="exported as a plain LoRA adapter"):
        report = export_adapter(own, tmp_path / "out")
    assert report.safety_shares is None and report.lost_share == 0
    assert "Certificate" not in (tmp_path / "out" / "README.md").read_text()
    project_adapter(own, SafetyModule.load(adapter), tmp_path / "projected")
    assert audit(tmp_path / "projected").verdict == "outside"
    second_stage(tmp_path / "projected")
    assert audit(tmp_path / "projected").verdict == "changed"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_certificate(own, tmp_path, value):
    """In the last module as in the first, in either factor."""
    assert all(largest(values) != largest(values) for values in ([0.1, torch.nan], [torch.nan, 0.1], [2, torch.nan, 3]))
    file, module = own / "adapter_model.safetensors", SafetyModule.load(own)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written again
    for key in tensors:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[key][-1, -1] = value
        save_file(changed, file)
        with pytest.raises(ValueError, match="not finite"):
            safety_shares(SavedAdapter.load(own), module)
        for refused in (lambda: audit(own, module), lambda: project_adapter(own, module, tmp_path / "out")):
            with pytest.raises(ValueError, match="not finite"):
                refused()
    save_file(tensors, file)
    model = load_for_training(base(), own)
    factor = next(p for n, p in reversed(list(model.named_parameters())) if "lora_" in n and p.requires_grad)
    with torch.no_grad():
        factor[-1, -1] = value
    share = largest_live_share(model, module)
    assert share != share
    model.save_pretrained(tmp_path / "saved")
    row = next(x for x in (tmp_path / "saved" / "README.md").read_text().splitlines() if x.startswith("| Certificate"))
    assert "not computed" in row and "not finite" in row and "≤" not in row


@pytest.mark.parametrize("name", ["adapter_config.json", "salora_config.json"])
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("r", value) for value in (0, "4", None, True, 2.5)),
        *(("lora_alpha", value) for value in (None, "8", float("nan"))),
        *(("rank_pattern", value) for value in ({"(": 4}, [4], {"q_proj": "4"}, {"q_proj": 0})),
        *(("alpha_pattern", value) for value in ({"*": 4}, {"q_proj": None})),
        *(("target_modules", 5), ("lora_dropout", "x"), ("base_model_name_or_path", 5)),
    ],
)
def test_entries_of_other_types_are_named(own, tmp_path, name, entry, value):
    values = json.loads((own / name).read_text())
    (own / name).write_text(json.dumps({**values, entry: value}))
    reads = [lambda: load_for_training(base(), own)]
    if name == "adapter_config.json":
        module = SafetyModule.load(own)
        reads = [lambda: audit(own), lambda: export_adapter(own, tmp_path / "out")]
        reads.append(lambda: project_adapter(own, module, tmp_path / "out"))
    for read in reads:
        with pytest.raises(ValueError, match=rf"{name}: {entry}.* is ") as caught:
            read()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000], ids=lambda c: repr(c[:4]))
@pytest.mark.parametrize("name", ["adapter_config.json", "salora_config.json", "trainer_state.json"])
def test_damaged_files_are_named(own, tmp_path, name, content):
    (own / "trainer_state.json").write_text('{"global_step": 1}')
    folder = own.rename(tmp_path / "checkpoint-1")
    (folder / name).write_bytes(content)
    assert last_complete_checkpoint(tmp_path) is None
    read = {"adapter_config.json": audit, "salora_config.json": lambda folder: load_for_training(base(), folder)}
    if name in read:
        with pytest.raises(ValueError, match=rf"{name} (cannot be read|holds a)"):
            read[name](folder)


@pytest.mark.parametrize("length", [0, 5, 500, -10])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "salora.safetensors"])
def test_files_that_were_cut_short_are_named(own, tmp_path, name, length):
    (own / name).write_bytes((own / name).read_bytes()[:length])
    for read in (audit, lambda folder: load_for_training(base(), folder)):
        with pytest.raises(ValueError, match=rf"{name}:? (is )?not a readable safetensors file, perhaps cut short"):
            read(own)


def test_a_card_that_is_none_is_named_and_left(adapter, own):
    (own / "README.md").write_text("---\nlicense: [\n---\n")
    before = everything(own)
    with pytest.raises(ValueError, match=re.escape(f"{own / 'README.md'} is not a model card")):
        export_adapter(adapter, own, overwrite=True)
    assert everything(own) == before


@pytest.fixture
def small_files():
    """No file can be larger than some kilobytes, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_that_names_the_file(adapter, own, tmp_path, small_files, capfd):
    module = SafetyModule.load(adapter)
    before = everything(own)
    for write, file in (
        (lambda: module.save(tmp_path / "safety.safetensors"), tmp_path / "safety.safetensors"),
        (lambda: export_adapter(adapter, tmp_path / "out"), tmp_path / "out" / "adapter_model.safetensors"),
        (lambda: export_adapter(adapter, own, overwrite=True), own / "adapter_model.safetensors"),
        (lambda: project_adapter(adapter, module, own, overwrite=True), own / "adapter_model.safetensors"),
    ):
        with pytest.raises(OSError, match="File too large") as caught:
            write()
        assert caught.value.filename == str(file) and not (tmp_path / "out").exists()
    assert everything(own) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    result = CliRunner().invoke(create_cli(), ["export", str(adapter), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, OSError)


# Export


@saved_adapters(AREA, "`salora export` at SaLoRA's r: the best approximation, certificate kept")
def test_export_is_the_best_approximation_and_keeps_the_certificate(adapter, tmp_path):
    report = export_adapter(adapter, tmp_path / "out")
    before, after = updates(adapter), updates(tmp_path / "out")
    lost = kept = 0.0
    for name, update in before.items():
        values = torch.linalg.svdvals(update)
        best = values[4:].norm()
        assert torch.linalg.norm(after[name] - update) == pytest.approx(best.item(), rel=1e-4)
        assert report.modules[name].lost_share == pytest.approx((best / values.norm()).item(), rel=1e-6)
        assert 1 < report.modules[name].effective_rank <= 8
        lost, kept = lost + best.item() ** 2, kept + values.norm().item() ** 2
    assert report.rank == 4 and report.lost_share == pytest.approx((lost / kept) ** 0.5, rel=1e-6)
    assert 1e-4 < report.lost_share < 0.9

    module = SafetyModule.load(adapter)
    inside = [
        s for by_side in safety_shares(SavedAdapter.load(tmp_path / "out"), module).values() for s in by_side.values()
    ]
    assert max(inside) == max(report.safety_shares.values()) <= 1e-5
    shutil.copy(adapter / "salora.safetensors", tmp_path / "out")
    assert largest_share_inside(tmp_path / "out") <= 1e-5

    shapes = {
        t.shape[k.endswith("lora_B.weight")]
        for k, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
    }
    assert shapes == {4}
    assert set(config_of(tmp_path / "out")) == KEYS_OF_PEFT_0_4
    loaded, reference = PeftModel.from_pretrained(base(), tmp_path / "out"), base()
    with torch.no_grad():
        for name, update in after.items():
            reference.get_submodule(name).weight += update.float()
    assert relative_difference(loaded(token_batch()).logits, reference(token_batch()).logits) <= 1e-5


@pytest.mark.parametrize(
    ("options", "rank", "keeps"),
    [
        ({"task_data": None, "init": "zero"}, 4, True),
        ({"task_data": None, "init": "zero", "rank_pattern": {"v_proj": 6, "q_proj": 2}}, 6, True),
        ({"task_data": None, "init": "pissa"}, 4, False),
        ({"rank_pattern": {"q_proj": 6}}, 6, False),
    ],
)
def test_the_default_rank_is_that_of_the_training(tmp_path, options, rank, keeps):
    trained(base(), tmp_path / "adapter", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = export_adapter(tmp_path / "adapter", tmp_path / "out")
    said = [str(w.message) for w in caught if "is lost. Give max_rank=" in str(w.message)]
    assert (report.rank, report.lost_share == 0, len(said)) == (rank, keeps, 0 if keeps else 1)
    (tmp_path / "adapter" / "salora_config.json").unlink()
    report = export_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert report.lost_share == 0 and report.rank == SavedAdapter.load(tmp_path / "adapter").rank


def test_full_rank_loses_nothing_and_zeros_fill_up(own, tmp_path):
    tensors = load_file(own / "adapter_model.safetensors")
    for key in list(tensors):
        if ".0.self_attn.q_proj.lora_A" in key:
            tensors[key] = tensors[key][:3].contiguous()
        elif ".0.self_attn.q_proj.lora_B" in key:
            tensors[key] = tensors[key][:, :3].contiguous()
    save_file(tensors, own / "adapter_model.safetensors")
    change_config(
        own, use_rslora=True, lora_alpha=5, rank_pattern={"0.self_attn.q_proj": 3}, alpha_pattern={"v_proj": 2.5}
    )
    report = export_adapter(own, tmp_path / "out", max_rank=64)
    assert report.rank == 8 and report.lost_share < 1e-12
    before, after = updates(own), updates(tmp_path / "out")
    for name, update in before.items():
        assert torch.linalg.norm(after[name] - update) <= 1e-6 * torch.linalg.norm(update)
    written = config_of(tmp_path / "out")
    assert (written["r"], written["lora_alpha"]) == (8, 8) and "rank_pattern" not in written
    model, exported = (PeftModel.from_pretrained(base(), folder).eval() for folder in (own, tmp_path / "out"))
    assert relative_difference(exported(token_batch()).logits, model(token_batch()).logits) <= 1e-5


@pytest.mark.parametrize("share", [0.6, 0.99, 1.0])
def test_the_smallest_rank_that_keeps_a_share(adapter, tmp_path, share):
    rank = export_adapter(adapter, tmp_path / "out", share=share).rank
    kept = [torch.linalg.svdvals(u).square() for u in updates(adapter).values()]
    assert min((v[:rank].sum() / v.sum()).item() for v in kept) >= share - 1e-12
    assert rank == 1 or min((v[: rank - 1].sum() / v.sum()).item() for v in kept) < share


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_dtype_of_the_export(adapter, tmp_path, dtype, tolerance):
    report = export_adapter(adapter, tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    # what the report and the card say is measured on what was written
    assert 1e-6 < max(report.safety_shares.values()) < tolerance
    assert f"{report.safety_shares['output']:.1e}" in (tmp_path / "out" / "README.md").read_text()


@saved_adapters(AREA, "`salora export` of a plain LoRA adapter")
def test_plain_lora_is_exported_too(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        base(gpt2), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    )
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    report = export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert report.safety_shares is None and report.rank == 4 and report.lost_share == 0
    exported = PeftModel.from_pretrained(base(gpt2), tmp_path / "out").eval()
    assert relative_difference(exported(token_batch()).logits, model.eval()(token_batch()).logits) <= 1e-5
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "salora" not in card.data.tags and "Certificate" not in card.text


@saved_adapters(AREA, "`load_for_training` of an exported adapter")
def test_an_exported_adapter_is_not_trained_further(adapter, tmp_path, refusal):
    export_adapter(adapter, tmp_path / "out")
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    with pytest.raises(FileNotFoundError, match="comes from `salora export`") as caught:
        load_for_training(base(), tmp_path / "out")
    refusal(caught.value, hide=tmp_path)


def _dora(own: Path) -> None:
    change_config(own, use_dora=True)


def _other_base(own: Path) -> None:
    change_config(own, init_lora_weights="pissa")


def _not_lora(own: Path) -> None:
    change_config(own, peft_type="IA3")


def _bias(own: Path) -> None:
    _add(own, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", torch.zeros(64))


def _embedding(own: Path) -> None:
    _add(own, "base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 259))


def _not_finite(own: Path) -> None:
    _add(own, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.full((8, 64), torch.nan))


def _codes(own: Path, dtype: torch.dtype) -> None:
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({key: value.to(dtype) for key, value in tensors.items()}, own / "adapter_model.safetensors")


def _add(own: Path, key: str, value: torch.Tensor) -> None:
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({**tensors, key: value}, own / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_dora, "use_dora=True", marks=saved_adapters(AREA, "`salora export` of DoRA")),
        pytest.param(_other_base, "init_lora_weights='pissa'", marks=saved_adapters(AREA, "`salora export` of PiSSA")),
        pytest.param(_not_lora, "peft_type='IA3'", marks=saved_adapters(AREA, "`salora export` of other methods")),
        pytest.param(_bias, "lora_B.bias", marks=saved_adapters(AREA, "`salora export` with `lora_bias`")),
        pytest.param(_embedding, "lora_embedding_A", marks=saved_adapters(AREA, "`salora export` of embeddings")),
        (_not_finite, "not finite"),
        (partial(_codes, dtype=torch.float8_e4m3fn), "are torch.float8_e4m3fn, which are not read as numbers"),
        (partial(_codes, dtype=torch.int8), "are torch.int8, which are not read as numbers"),
    ],
)
def test_what_cannot_be_exported(own, tmp_path, spoil, message, refusal):
    spoil(own)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export_adapter(own, tmp_path / "out")
    refusal(caught.value, hide=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_nothing_is_overwritten_unasked(adapter, own, tmp_path):
    out = tmp_path / "out"
    export_adapter(adapter, out, max_rank=2)
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        export_adapter(adapter, out)
    assert config_of(out)["r"] == 2
    export_adapter(adapter, out, overwrite=True)
    assert config_of(out)["r"] == 4
    with pytest.raises(ValueError, match="holds the adapter that is read"):
        export_adapter(own, own, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a saved adapter"):
        export_adapter(adapter, tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "out"]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run_folder(own) -> Path:
    """A trainer's output_dir: an adapter, and all that lies beside it."""
    (own / "checkpoint-100").mkdir()
    (own / "checkpoint-100" / "optimizer.pt").write_bytes(b"x")
    (own / "notes.txt").write_text("mine")
    (own / "adapter_model.bin").write_bytes(b"old")
    card = (own / "README.md").read_text()
    (own / "README.md").write_text(card + "\nWords of mine.\n")
    return own


def test_overwriting_replaces_an_adapters_own_files_only(adapter, run_folder, tmp_path):
    export_adapter(adapter, run_folder, max_rank=2, overwrite=True)
    left = {"README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-100/optimizer.pt", "notes.txt"}
    assert set(everything(run_folder)) == left
    card = (run_folder / "README.md").read_text()
    assert "Words of mine." in card and "## Exported" in card and "## SaLoRA" not in card
    project_adapter(adapter, SafetyModule.load(adapter), run_folder, overwrite=True)
    assert set(everything(run_folder)) == left | {"salora.safetensors"}
    assert "## Exported" not in (run_folder / "README.md").read_text() and audit(run_folder).is_outside
    # A checkpoint into the folder that holds it.
    shutil.copytree(adapter, run_folder / "checkpoint-200")
    export_adapter(run_folder / "checkpoint-200", run_folder, overwrite=True)
    assert set(everything(run_folder / "checkpoint-200")) == set(everything(adapter))


@pytest.mark.parametrize("broken", ["once", "for good"])
@pytest.mark.parametrize("done", [False, True])
def test_an_interruption_leaves_no_mixture(adapter, run_folder, tmp_path, monkeypatch, broken, done):
    """At every rename, before it or behind it; what puts the old adapter back may fail, too."""
    before, replace, calls = everything(run_folder), os.replace, []
    step = 0

    def interrupted(source, target):
        calls.append(target)
        stops = len(calls) == step if broken == "once" else len(calls) >= step
        if not stops or done:
            replace(source, target)
        if stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    for step in range(1, 100):
        calls.clear()
        folder = Path(shutil.copytree(run_folder, tmp_path / str(step) / "run"))
        try:
            export_adapter(adapter, folder, max_rank=2, overwrite=True)
            break
        except KeyboardInterrupt:
            after = everything(folder)
        if broken == "once":
            assert after == before, step
            assert [path.name for path in folder.parent.iterdir()] == ["run"]
        else:
            # Whole, or nothing that loads; then all that is missing lies beside it.
            assert after == before or "adapter_config.json" not in after
            kept = everything(folder.parent)
            assert set(before.values()) <= set(kept.values()), step
    assert step > 8 and config_of(folder)["r"] == 2


def test_what_a_killed_writer_left_is_removed_when_it_is_old(adapter, tmp_path):
    from salora_plugins.support.files import TAKEN_AWAY, atomic_write

    out = tmp_path / "out"
    old, new, kept = (tmp_path / f".out.{name}.tmp" for name in ("old", "new", "kept"))
    for folder in (old, new, kept):
        (folder / "new").mkdir(parents=True)
    (kept / TAKEN_AWAY).mkdir()
    (kept / TAKEN_AWAY / "adapter_config.json").write_text("{}")
    files = [tmp_path / name for name in (".a.json.x1.tmp", ".a.json.x2.tmp", ".b.json.x3.tmp", "a.json.x4.tmp")]
    for file in files:
        file.write_text("half")
    for path in (old, kept, *files):
        if path != files[1]:
            os.utime(path, (0, 0))
    export_adapter(adapter, out, max_rank=2)
    assert not old.exists() and new.exists() and (kept / TAKEN_AWAY / "adapter_config.json").exists()
    atomic_write(tmp_path / "a.json", b"{}")
    assert [file.exists() for file in files] == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "max_rank=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"max_rank": 2, "share": 0.9}, "Choose one"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_options_out_of_range(adapter, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_adapter(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command(adapter, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(create_cli(), ["export", *map(str, arguments)])

    result = run(adapter, "--max-rank", 3, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    for part in ("effective rank", "6 modules at rank 3", "safety directions: output side", "a plain LoRA adapter"):
        assert part in result.output
    described = json.loads(run(adapter, "--share", 0.9, "--out", tmp_path / "b", "--json").output)
    assert described["rank"] == config_of(tmp_path / "b")["r"]
    assert set(described["modules"]) == set(updates(adapter)) and described["safety_shares"]["input"] <= 1e-5
    missing = run(tmp_path / "none", "--out", tmp_path / "c")
    assert isinstance(missing.exception, FileNotFoundError)
