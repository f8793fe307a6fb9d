"""LSSF: against dense float64 references, planted subspaces, and what plain PEFT computes from the written files."""

import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_safe_lora import adapter_of
from transformers import AutoModelForCausalLM

import tiny
from salora_plugins import SafetyModule, StrengthSearch, audit, calibrate, restore
from salora_plugins.adapters.saved import SavedAdapter
from salora_plugins.cli import create_cli
from salora_plugins.models.weights import linear_weight
from salora_plugins.repair import strength_search
from salora_plugins.repair.strength import Strength
from salora_plugins.repair.strength_search import Trial, _chosen
from salora_plugins.repair.updates import with_updates
from tiny import relative_difference, token_batch, token_rows

ROWS = token_rows(12)
ENTROPY = 0.6
ARCHITECTURES = {
    "llama": (tiny.llama, ["q_proj", "v_proj", "down_proj"]),
    "qwen2": (tiny.qwen2, ["q_proj", "v_proj"]),  # with biases
    "gpt2": (tiny.gpt2, ["c_attn", "c_fc"]),  # Conv1D and biases
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory):
    """Folders of an aligned model, one before alignment, a fine-tuned adapter and one that lost its refusals."""
    folder = tmp_path_factory.mktemp(request.param)
    build, targets = ARCHITECTURES[request.param]
    model = build()
    model.save_pretrained(folder / "aligned", max_shard_size="100KB")
    adapter_of(model, folder / "tuned", targets, use_rslora=True, rank_pattern={targets[-1]: 2})
    adapter_of(model, folder / "unsafe", [*targets, "c_proj" if request.param == "gpt2" else "o_proj"], seed=7)
    other = build()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    other.save_pretrained(folder / "before")
    return folder, model, targets


def outputs(model, names) -> dict[str, torch.Tensor]:
    """Module name -> Z^T, (n, d_out) float64: W x at the response's tokens, without the bias."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    mask = torch.tensor(ROWS[0]["labels"]) != -100
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: found[name].append(args[0][0, mask].double())
        )
        for name in names
    ]
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    result = {}
    for name, inputs in found.items():
        with linear_weight(model.get_submodule(name)) as weight:
            result[name] = torch.cat(inputs) @ weight.double().T
    return result


def dense_fusion(z: torch.Tensor, alpha: float, alpha_1: float) -> torch.Tensor:
    """alpha U' U'^T (d_out, d_out) of the paper, of Z^T = z."""
    _, s, vh = torch.linalg.svd(z, full_matrices=False)
    p = s.square() / s.square().sum()
    entropies = torch.cumsum(-torch.xlogy(p, p), 0)
    r = next(rho for rho in range(1, len(s) + 1) if entropies[rho - 1] / entropies[-1] >= ENTROPY)
    assert 1 < r < len(s)
    weights = 1 + (alpha_1 - 1) * (s[:r] - s[r - 1]) / (s[0] - s[r - 1])
    u = vh[:r].T * weights
    return alpha * u @ u.T


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> s B A, dense, float64."""
    saved = SavedAdapter.load(folder)
    return {name: saved.scaling(name) * b.double() @ a.double() for name, (a, b) in saved.factors.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert relative_difference(found[name], value) < 2e-4, name


def test_against_the_dense_reference_with_an_unsafe_adapter(case, tmp_path):
    folder, model, _ = case
    tuned, unsafe = updates(folder / "tuned"), updates(folder / "unsafe")
    assert set(tuned) < set(unsafe)
    z = outputs(model, unsafe)
    report = restore(
        *(folder / "tuned", folder / "aligned", tmp_path / "out"),
        **{"unsafe": folder / "unsafe", "alpha": 0.7, "alpha_1": 1.8, "entropy": ENTROPY, "safety_data": ROWS},
    )
    repairs = {name: dense_fusion(z[name], 0.7, 1.8) @ -update for name, update in unsafe.items()}
    assert_equal(updates(tmp_path / "out"), {n: tuned.get(n, 0) + repair for n, repair in repairs.items()})
    for name, module in report.modules.items():
        assert module.repair_norm == pytest.approx(torch.linalg.norm(repairs[name]).item(), rel=1e-4)
        assert module.delta_norm == pytest.approx(torch.linalg.norm(unsafe[name]).item(), rel=1e-4)
        assert module.rank == 4 and module.lost_share == 0


def test_the_fine_tuned_adapter_itself_loses_what_it_has_in_the_safety_directions(case, tmp_path):
    folder, model, _ = case
    tuned = updates(folder / "tuned")
    z = outputs(model, tuned)
    options = {"entropy": ENTROPY, "safety_data": ROWS}
    report = restore(folder / "tuned", folder / "aligned", tmp_path / "out", **options)
    expected = {name: update - dense_fusion(z[name], 1, 1) @ update for name, update in tuned.items()}
    assert_equal(updates(tmp_path / "out"), expected)
    before, now = SavedAdapter.load(folder / "tuned"), SavedAdapter.load(tmp_path / "out")
    assert {name: a.shape for name, (a, _) in now.factors.items()} == {
        name: a.shape for name, (a, _) in before.factors.items()
    }
    assert all(module.share_before > 0.05 and module.share_after < 1e-6 for module in report.modules.values())
    found = audit(tmp_path / "out")  # against the directions beside it
    assert found.largest_shares["output"] < 1e-5 and found.is_outside
    same = audit(folder / "tuned", tmp_path / "out")
    for name, module in report.modules.items():
        assert module.share_before == pytest.approx(same.modules[name].sides["output"].share, rel=1e-5)


def test_repair_and_adapter_in_peft_are_the_combined_adapter(case, tmp_path):
    folder, model, _ = case
    logits = {}
    for form in ("combined", "repair"):
        options = {"unsafe": folder / "unsafe", "entropy": ENTROPY, "safety_data": ROWS, "form": form}
        restore(folder / "tuned", folder / "aligned", tmp_path / form, **options)
    adapted = PeftModel.from_pretrained(model, tmp_path / "combined").eval()
    logits["combined"] = adapted(token_batch()).logits.detach()
    model = adapted.unload()
    adapted = PeftModel.from_pretrained(model, folder / "tuned").eval()
    logits["tuned"] = adapted(token_batch()).logits.detach()
    adapted.load_adapter(tmp_path / "repair", "repair")
    adapted.base_model.set_adapter(["default", "repair"])
    logits["both"] = adapted(token_batch()).logits.detach()
    adapted.unload()
    assert relative_difference(logits["both"], logits["combined"]) < 1e-5
    assert relative_difference(logits["tuned"], logits["combined"]) > 1e-3


def test_models_before_alignment_and_fine_tuned_ones(case, tmp_path):
    """A repair by the difference of two models; merged, and as an adapter on the fine-tuned model."""
    folder, model, targets = case
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    z = outputs(model, names)
    tuned = AutoModelForCausalLM.from_pretrained(folder / "before")  # any other weights will do
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter *= 1.1
    tuned.save_pretrained(tmp_path / "tuned")
    options = {"unsafe": folder / "before", "alpha": 0.5, "entropy": ENTROPY, "safety_data": ROWS}
    options["target_modules"] = targets
    restore(tmp_path / "tuned", folder / "aligned", tmp_path / "merged", form="merged", **options)
    report = restore(tmp_path / "tuned", folder / "aligned", tmp_path / "repair", **options)
    assert report.form == "repair" and set(report.modules) == set(names)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    before = AutoModelForCausalLM.from_pretrained(folder / "before")
    for name, parameter in merged.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, tuned.get_parameter(name))
    for name in names:
        weights = []
        for each in (model, before, tuned, merged):
            with linear_weight(each.get_submodule(name)) as weight:
                weights.append(weight.double())
        safe, unsafe, own, found = weights
        expected = own + dense_fusion(z[name], 0.5, 1) @ (safe - unsafe)
        assert relative_difference(found - own, expected - own) < 1e-3
    adapted = PeftModel.from_pretrained(tuned.eval(), tmp_path / "repair").eval()
    assert relative_difference(adapted(token_batch()).logits, merged(token_batch()).logits) < 1e-4
    assert json.loads((tmp_path / "repair/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "tuned"
    )


# One tiny Llama for all that follows


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """
    An aligned Llama whose q_proj writes three directions only, and an adapter that writes into them and beside them.
    """
    folder = tmp_path_factory.mktemp("planted")
    model = tiny.llama()
    torch.manual_seed(4)
    directions = torch.linalg.qr(torch.randn(64, 3)).Q
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(directions @ torch.randn(3, 64))
    model.save_pretrained(folder / "aligned")
    tiny.tokenizer().save_pretrained(folder / "aligned")
    adapter_of(model, folder / "tuned", ["q_proj"])
    return folder, directions


def run(planted, out, *args, **options):
    folder, _ = planted
    return restore(folder / "tuned", folder / "aligned", out, *args, **{"safety_data": ROWS, **options})


def test_a_planted_subspace_is_found_and_the_rest_stays(planted, tmp_path):
    folder, directions = planted
    report = run(planted, tmp_path / "out", entropy=0.999)
    assert {module.directions for module in report.modules.values()} == {3}
    inside = directions.double() @ directions.double().T
    before = updates(folder / "tuned")
    assert_equal(updates(tmp_path / "out"), {name: update - inside @ update for name, update in before.items()})
    for name, module in report.modules.items():
        expected = torch.linalg.norm(inside @ before[name]) / torch.linalg.norm(before[name])
        assert module.kept_share == pytest.approx(expected.item(), rel=1e-4)


def test_directions_that_were_computed_before(planted, tmp_path):
    folder, _ = planted
    model = AutoModelForCausalLM.from_pretrained(folder / "aligned")
    options = {"safety_rank": f"entropy:{ENTROPY}", "input_safety_rank": 0, "safety_positions": "response"}
    targets = {"target_modules": ["q_proj", "k_proj"]}
    calibrate(model, safety_data=ROWS, **options, **targets).save(tmp_path / "safety.safetensors")
    run(planted, tmp_path / "own", entropy=ENTROPY)
    given = {"safety_module": tmp_path / "safety.safetensors"}
    restore(folder / "tuned", model, tmp_path / "given", **given)
    assert_equal(updates(tmp_path / "given"), updates(tmp_path / "own"))
    with pytest.raises(ValueError, match="entropy: a safety_module is given"):
        restore(folder / "tuned", model, tmp_path / "other", entropy=0.9, **given)
    with pytest.raises(ValueError, match="computed for another model"):
        restore(folder / "tuned", tiny.llama(seed=5), tmp_path / "other", **given)
    calibrate(model, safety_data=ROWS, **options, target_modules=["k_proj"]).save(tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match=r"no directions for 'model\.layers\.0\.self_attn\.q_proj'"):
        restore(folder / "tuned", model, tmp_path / "other", safety_module=tmp_path / "k.safetensors")


def test_a_repair_cut_to_a_rank_is_the_best_of_that_rank(planted, tmp_path):
    full = run(planted, tmp_path / "full", form="repair")
    cut = run(planted, tmp_path / "cut", form="repair", max_rank=1)
    combined = run(planted, tmp_path / "combined", max_rank=1)
    assert full.lost_share == 0 < cut.lost_share == combined.lost_share
    before, after = updates(tmp_path / "full"), updates(tmp_path / "cut")
    for name, module in cut.modules.items():
        values = torch.linalg.svdvals(before[name])
        lost = torch.linalg.norm(before[name] - after[name]) / torch.linalg.norm(before[name])
        assert module.rank == 1 and lost == pytest.approx(torch.linalg.norm(values[1:]) / torch.linalg.norm(values))
        assert module.lost_share == pytest.approx(lost.item(), rel=1e-4)
    tuned = updates(planted[0] / "tuned")
    assert_equal(updates(tmp_path / "combined"), {name: tuned[name] + after[name] for name in tuned})
    assert "Lost by truncation" in cut.summary()


def test_weights_of_the_directions():
    values = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    assert Strength(1.0, 2.0).weights(values).tolist() == [2.0, 1.5, 1.0]
    assert Strength(1.0, 3.0).weights(values[:1]).tolist() == [3.0]


def test_the_rule_of_the_search():
    weak, strong, strongest = Strength(0.5), Strength(1.0), Strength(2.0)
    before = Trial(None, 1, 10, 1.0)
    tried = {weak: Trial(weak, 5, 10, 1.01), strong: Trial(strong, 5, 10, 1.005)}
    tried[strongest] = Trial(strongest, 9, 10, 1.2)
    assert _chosen(before, tried, 0.05) == strong
    assert _chosen(before, tried, 0.5) == strongest
    assert _chosen(before, tried, 0.0) == strong  # none is within it
    with pytest.raises(ValueError, match="not finite"):
        _chosen(before, {weak: Trial(weak, 5, 10, math.nan)}, 0.05)


def test_the_search_measures_what_is_written(planted, tmp_path):
    from salora_plugins.evaluation.metrics import response_loss

    folder, _ = planted
    task = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(4)]
    search = StrengthSearch(
        task, harmful=[f"Do harm {i}" for i in range(3)], alphas=(0.5, 1.0), alpha_1s=(1.5,), max_new_tokens=4
    )
    reports = [run(planted, tmp_path / str(i), search=search) for i in range(2)]
    assert reports[0].trials == reports[1].trials and len(reports[0].trials) == 3
    assert reports[0].strength in search.strengths and reports[0].trials[0].strength is None
    chosen = next(trial for trial in reports[0].trials if trial.strength == reports[0].strength)
    rows = [
        {"prompt": [{"role": "user", "content": r["prompt"]}], "completion": [{"content": r["response"]}]} for r in task
    ]
    model = AutoModelForCausalLM.from_pretrained(folder / "aligned")
    for adapter, trial in ((folder / "tuned", reports[0].trials[0]), (tmp_path / "0", chosen)):
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        assert response_loss(adapted, tiny.tokenizer(), rows) == pytest.approx(trial.task_loss, rel=1e-4)
        model = adapted.unload()
    assert "0 of 3 refused" in reports[0].summary()
    assert f"| fine-tuned |  | {chosen.refused} of 3 |" in (tmp_path / "0/README.md").read_text()
    json.dumps(reports[0].to_dict())


def test_the_search_runs_on_the_accelerator(planted, tmp_path, monkeypatch):
    inside, losses = [], []

    @contextmanager
    def moved(model):
        inside.append(model)
        yield
        inside.clear()

    monkeypatch.setattr(strength_search, "on_accelerator", moved)
    monkeypatch.setattr(strength_search, "response_loss", lambda *_: losses.append(len(inside)) or 1.0)
    monkeypatch.setattr(strength_search, "generate_responses", lambda model, _, asked, **__: ["No."] * len(asked))
    task = [{"prompt": "What?", "response": "That."}]
    run(planted, tmp_path / "out", search=StrengthSearch(task, harmful=["Do harm"], alphas=(1.0,), alpha_1s=(1.0,)))
    assert losses == [1, 1] and not inside


def test_updates_follow_a_model_to_its_device():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with with_updates(model, {"0": [(torch.ones(1, 6), torch.ones(4, 1))]}):
        assert model.to("meta")(torch.ones(2, 6, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha_1": -1.0}, "alpha_1=-1.0"),
        ({"entropy": 1.0}, "entropy=1.0"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"max_rank": 1.5}, "max_rank=1.5"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"form": "other"}, "form='other': choose one of combined, repair, merged"),
        ({"safety_rank": 8}, "safety_rank: the safety directions follow from `entropy`"),
        ({"target_modules": ["q_proj"]}, "target_modules: an adapter is given"),
        ({"search": StrengthSearch("task", alphas=(0.0,))}, "alpha=0.0"),
        ({"search": StrengthSearch("task"), "alpha": 0.5}, "a search is given"),
        ({"search": StrengthSearch("task", alphas=())}, "alphas and alpha_1s"),
        ({"search": StrengthSearch("task", judge="nobody")}, "nobody"),
    ],
)
def test_options_out_of_range(planted, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(planted, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_restored(planted, tmp_path):
    folder, _ = planted
    out = tmp_path / "out"
    dora = adapter_of(tiny.llama(), tmp_path / "dora", ["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        restore(dora, folder / "aligned", out)
    with pytest.raises(ValueError, match="use_dora=True"):
        run(planted, out, unsafe=dora)
    with pytest.raises(ValueError, match=r"unsafe='.*aligned' has the aligned model's weights in all 2 modules"):
        run(planted, out, unsafe=folder / "aligned")
    zero = adapter_of(tiny.llama(), tmp_path / "zero", ["q_proj"])
    weights = load_file(zero / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in weights.items()}, zero / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing to put back"):
        run(planted, out, unsafe=zero)
    tiny.llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"has the shape \(32, 32\) there and \(64, 64\)"):
        run(planted, out, unsafe=tmp_path / "small")
    with pytest.raises(ValueError, match="has 32 inputs and 32 outputs, the adapter's update 64 and 64"):
        restore(folder / "tuned", tmp_path / "small", out, safety_data=ROWS)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layer"):
        restore(folder / "tuned", tiny.gpt2(), out, safety_data=ROWS)
    with pytest.raises(ValueError, match="aligned: the model carries an adapter"):
        restore(folder / "tuned", PeftModel.from_pretrained(tiny.llama(), folder / "tuned"), out, safety_data=ROWS)
    for wrong, match in (("finetuned", "finetuned='.*nowhere'"), ("aligned", "nowhere: "), ("unsafe", "unsafe='.*now")):
        given = {"finetuned": folder / "tuned", "aligned": folder / "aligned", "safety_data": ROWS}
        with pytest.raises(FileNotFoundError, match=f"{match}.*there is no such folder"):
            restore(out=out, **{**given, wrong: tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="choose one of repair, merged, since the fine-tuned model is no adapter"):
        restore(tmp_path / "small", tmp_path / "small", out, form="combined")
    assert not out.exists()


def test_a_whole_model_is_looked_at_though_only_a_repair_is_written(planted, tmp_path, monkeypatch):
    folder, _ = planted
    options = {"unsafe": folder / "tuned", "safety_data": ROWS}
    with pytest.raises(FileNotFoundError, match=r"finetuned='\./adaptre': there is no such folder"):
        restore("./adaptre", folder / "aligned", tmp_path / "out", **{**options, "safety_data": "nowhere.jsonl"})
    tiny.llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"finetuned='.*small': .* the shape \(32, 32\) there and \(64, 64\)"):
        restore(tmp_path / "small", folder / "aligned", tmp_path / "out", **options)
    # An adapter on the hub, in its cache
    snapshot = tmp_path / "models--team--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(folder / "tuned", snapshot)
    (tmp_path / "models--team--adapter" / "refs").mkdir()
    (tmp_path / "models--team--adapter" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"finetuned='team/adapter' is an adapter on the hub\. Download it first"):
        restore("team/adapter", folder / "aligned", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_fine_tuning_trained_beside_linear_layers_is_told(planted, tmp_path):
    folder, _ = planted
    tuned = adapter_of(tiny.llama(), tmp_path / "tuned", ["q_proj", "v_proj"], modules_to_save=["lm_head"])
    tensors = load_file(tuned / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_" not in key]:
        tensors[key] = tensors[key] + 1
    save_file(tensors, tuned / "adapter_model.safetensors")
    report = restore(tuned, folder / "aligned", tmp_path / "out", unsafe=folder / "tuned", safety_data=ROWS)
    others = SavedAdapter.load(tuned).other_tensors
    values = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]
    assert set(report.not_covered) == {*others, *values} and others
    assert "Not repaired, though fine-tuning has changed it: " in report.summary()
    assert "| Not repaired |" in (tmp_path / "out/README.md").read_text()
    assert run(planted, tmp_path / "other").not_covered == ()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:Model")  # with tied embeddings
def test_an_adapter_on_the_head(tied, tmp_path):
    """It leaves the embeddings as they are: a tied model is merged into an untied one, and stays tied itself."""
    model = tiny.llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "aligned")
    tuned = adapter_of(model, tmp_path / "tuned", ["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in SavedAdapter.load(tuned).other_tensors  # PEFT's copy
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    before, weight = {key: value.clone() for key, value in aligned.state_dict().items()}, aligned.lm_head.weight
    for form in ("combined", "repair", "merged"):
        report = restore(tuned, aligned, tmp_path / form, form=form, safety_data=ROWS)
        assert "lm_head" in report.modules and not report.not_covered
    assert aligned.lm_head.weight is weight and aligned.config.tie_word_embeddings == tied
    assert all(torch.equal(value, before[key]) for key, value in aligned.state_dict().items())

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    change = merged.lm_head.weight.double() - before["lm_head.weight"].double()
    assert relative_difference(change, updates(tmp_path / "combined")["lm_head"]) < 1e-4
    batch = token_batch()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(aligned, tmp_path / "combined")(batch).logits
        assert relative_difference(merged(batch).logits, expected) < 1e-4


def test_embeddings_that_were_trained_beside_the_head_s_adapter_are_not_merged(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "aligned")
    with torch.no_grad():
        model.lm_head.weight[3] += 1  # as of new tokens
    tuned = adapter_of(model, tmp_path / "tuned", ["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight\), with which it can neither be merged"):
        restore(tuned, tmp_path / "aligned", tmp_path / "out", form="merged", safety_data=ROWS)
    report = restore(tuned, tmp_path / "aligned", tmp_path / "out", safety_data=ROWS)
    assert report.not_covered == ("base_model.model.lm_head.base_layer.weight",)


def test_a_combined_adapter_of_more_modules_keeps_the_options_of_the_fine_tuned_one(planted, tmp_path):
    folder, _ = planted
    model = tiny.llama()
    options = {"trainable_token_indices": [1, 2], "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}
    selections = {"layers_to_transform": [0], "layers_pattern": "layers"}
    tuned = adapter_of(model, tmp_path / "tuned", ["q_proj"], **options, **selections)
    tensors = load_file(tuned / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_" not in key]:
        tensors[key] = tensors[key] + 1
    save_file(tensors, tuned / "adapter_model.safetensors")
    unsafe = adapter_of(tiny.llama(), tmp_path / "unsafe", ["q_proj", "v_proj"])
    restore(tuned, folder / "aligned", tmp_path / "out", unsafe=unsafe, safety_data=ROWS)
    written, before = SavedAdapter.load(tmp_path / "out"), SavedAdapter.load(tuned)
    assert len(written.factors) == 4 and len(before.factors) == 1
    assert all(written.config[key] == value for key, value in options.items())
    changed = {key for key, value in written.config.items() if before.config[key] != value}
    assert {"target_modules", *selections} <= changed
    assert changed <= {"target_modules", *selections, "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    state = get_peft_model_state_dict(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out"))
    for key, value in load_file(tmp_path / "out/adapter_model.safetensors").items():
        assert torch.equal(state[key], value), key


def test_destinations(planted, tmp_path):
    folder, _ = planted
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for form in ("combined", "merged"):
        with pytest.raises(FileExistsError, match="full exists"):
            run(planted, full, form=form, overwrite=True)
    with pytest.raises(ValueError, match="holds the adapter that is read"):
        run(planted, folder / "tuned", overwrite=True)


def test_folders_of_the_user(planted, tmp_path, monkeypatch):
    folder, _ = planted
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    restore("~/tuned", "~/aligned", "~/restored", unsafe="~/tuned", safety_data=ROWS)
    assert (folder / "restored/adapter_config.json").is_file() and not any(tmp_path.iterdir())


def test_a_quantized_aligned_model(planted, tmp_path):
    pytest.importorskip("bitsandbytes")
    from salora_plugins.models.loading import LoadingOptions

    loading = LoadingOptions(load_in_4bit=True)
    report = run(planted, tmp_path / "out", loading=loading)
    assert all(module.rank == 4 for module in report.modules.values())
    torch_model = tiny.llama(seed=3)
    torch_model.save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match="is quantized, so that its difference"):
        run(planted, tmp_path / "other", loading=loading, unsafe=tmp_path / "before")
    with pytest.raises(ValueError, match=r"form='merged': .* is quantized"):
        run(planted, tmp_path / "other", loading=loading, form="merged")


def test_the_command(planted, tmp_path):
    folder, _ = planted
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.refusal_rows())))
    command = ["restore", str(folder / "tuned"), "--aligned", str(folder / "aligned"), "--out", str(tmp_path / "out")]
    command += ["--safety-data", str(tmp_path / "rows.jsonl"), "--entropy", "0.5"]
    result = CliRunner().invoke(create_cli(), [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["form"] == "combined"
    shown = CliRunner().invoke(create_cli(), [*command, "--overwrite", "--alpha", "0.5"])
    assert shown.exit_code == 0 and "alpha=0.5" in shown.output
    card = (tmp_path / "out/README.md").read_text()
    assert "alpha = 0.5" in card and "rows.jsonl" in card
    assert isinstance(SafetyModule.load(tmp_path / "out"), SafetyModule)
    lonely = CliRunner().invoke(create_cli(), [*command, "--search-alphas", "1"])
    assert lonely.exit_code != 0
