"""`salora attribute`: what a model loses without the directions and entries that matter for refusals alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import planted
import tiny
from salora_plugins import SaLoRAConfig, attribute
from salora_plugins.activations.errors import CalibrationError
from salora_plugins.attribution.entries import random_entries, safety_alone
from salora_plugins.attribution.grid import EntryPoint, RankPoint, State, entry_points, rank_points
from salora_plugins.attribution.scores import gradient_sums, input_norms, snip_columns, top_columns
from salora_plugins.attribution.states import StateLoader
from salora_plugins.calibration.settings import safety_settings
from salora_plugins.cli import create_cli
from salora_plugins.demo.experiment import MODEL
from salora_plugins.evaluation import measuring
from salora_plugins.evaluation.evaluated_models import EvaluatedModel
from salora_plugins.evaluation.reports.report import EvaluationReport
from salora_plugins.evaluation.run_folder import RunFolder
from salora_plugins.rows.errors import DataError
from salora_plugins.rows.examples import TokenizedExample

ARCHITECTURES = {
    "llama": (tiny.llama, ["q_proj", "down_proj", "up_proj"]),
    "qwen2": (tiny.qwen2, ["q_proj", "o_proj"]),  # with biases
    "gpt2": (tiny.gpt2, ["c_attn", "c_fc"]),  # with transposed weights
}


def on_planted(model, out, **options):
    """`attribute` of a planted model on its own requests."""
    data = {"safety_data": planted.SAFETY, "utility_data": planted.UTILITY}
    requests = {"harmful": planted.HARMFUL, "harmless": planted.HARMLESS}
    defaults = {**data, **requests, "target_modules": ["o_proj"], "max_new_tokens": 8, "progress": False}
    return attribute(model, planted.tokenizer(), out=out, **{**defaults, **options})


def without(model, names, state, rows, folder):
    """The model in a state, as a context, with rows of token ids for directions and scores."""
    config = SaLoRAConfig(
        target_modules=names,
        variant="paper",
        safety_positions="response",
        safety_rank=20,
        safety_data=tiny.token_rows(4),
        calibration_batch_size=3,
    )
    settings = safety_settings(model, config)
    loader = StateLoader(model, settings, lambda: rows, {state.name: state}, RunFolder(folder), seed=0)
    return loader.loaded(EvaluatedModel(state.name, "model", "", "", ""))


def examples(seed):
    rows = tiny.token_rows(7, seed=seed)
    rows[0] = {name: values[:15] for name, values in rows[0].items()}  # so that there is padding
    return [TokenizedExample(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]


ROWS = {"safety": examples(1), "utility": examples(2)}


def layers_of(model, names):
    return {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in names}


def dense_weight(layer):
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def dense_inputs(model, layers, rows):
    """Layer -> its inputs at the response tokens, (n, d_in) float64, a row at a time."""
    found = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(lambda _, args, __, name=name: found[name].append(args[0][0].detach()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    masks = [torch.tensor(row.labels) != -100 for row in rows]
    return {name: torch.cat([x[m] for x, m in zip(of, masks, strict=True)]) for name, of in found.items()}


def dense_gradients(model, layers, rows):
    """Layer -> the sum over the rows of |dL/dW|, (d_out, d_in) float64."""
    sums = {name: 0 for name in layers}
    for row in rows:
        model.zero_grad()
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:])).backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad.abs()
            sums[name] = sums[name] + (gradient.T if isinstance(layer, Conv1D) else gradient)
    return sums


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_removed_of_ranks(architecture, tmp_path):
    """(I - U_u U_u^T) U_s U_s^T W, against an edited model in float64."""
    build, names = ARCHITECTURES[architecture]
    model, dense = build(), build().double()
    layers = layers_of(dense, names)
    inputs = {kind: dense_inputs(dense, layers, rows) for kind, rows in ROWS.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            weight = dense_weight(layer)
            tops = {
                kind: torch.linalg.svd(weight @ of[name].T, full_matrices=False).U[:, :rank]
                for (kind, of), rank in zip(inputs.items(), (5, 9), strict=True)
            }
            part = tops["safety"] @ (tops["safety"].T @ weight)
            weight -= part - tops["utility"] @ (tops["utility"].T @ part)
    tokens = tiny.token_batch()
    before = model(tokens).logits
    with without(model, names, State("ranks", RankPoint(5, 9)), ROWS, tmp_path):
        found = model(tokens).logits.double()
    assert tiny.relative_difference(found, dense(tokens).logits) < 1e-4
    assert tiny.relative_difference(found, before.double()) > 1e-2
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_entries(architecture):
    """Of SNIP the gradients, of Wanda the norms, against autograd and inputs in float64, a row at a time."""
    build, names = ARCHITECTURES[architecture]
    model, dense = build(), build().double()
    layers = layers_of(dense, names)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    sums = gradient_sums(model, list(layers), ROWS["safety"], batch_size=3, of="")
    norms = input_norms(model, list(layers), ROWS["safety"], batch_size=3, of="")
    expected = dense_gradients(dense, layers, ROWS["safety"])
    inputs = dense_inputs(dense, layers, ROWS["safety"])
    for name in layers:
        assert tiny.relative_difference(sums[name].double(), expected[name]) < 1e-4
        assert tiny.relative_difference(norms[name].double(), inputs[name].norm(dim=0)) < 1e-5
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_gradients_of_confident_answers_in_float16():
    """Of answers that the model is sure of, in layers that write much: without a scale they would round to zero."""
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in ("embed_tokens", "o_proj", "down_proj"):
                parameter.mul_(300)
    dense = copy.deepcopy(model.half()).double()
    prompts = torch.tensor([row["input_ids"] for row in tiny.token_rows(1500, length=8)])
    with torch.no_grad():
        losses, answers = dense(prompts).logits[:, -1].log_softmax(-1).neg().min(-1)
    sure = ((losses > 1e-6) & (losses < 1e-5)).nonzero()[:6, 0].tolist()
    assert len(sure) > 3
    labels = [(-100,) * 8 + (answers[index].item(),) for index in sure]
    rows = [
        TokenizedExample((*prompts[index].tolist(), answers[index].item()), of)
        for index, of in zip(sure, labels, strict=True)
    ]
    names = list(layers_of(model, ["q_proj", "down_proj"]))
    found, expected = (gradient_sums(of, names, rows, 3, "") for of in (model, dense))
    for name in names:
        assert tiny.relative_difference(found[name].double(), expected[name].double()) < 0.05
    with torch.no_grad():
        model.lm_head.weight[:] = 6e4
    with pytest.raises(CalibrationError, match=r"'model.layers.0.self_attn.q_proj' are not finite. Load the model in"):
        snip_columns(model, names, rows, 5, 3, "")


@pytest.mark.parametrize("family", ["snip", "wanda"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_entries_are_removed(architecture, family, tmp_path):
    """S_s(q) - S_u(p), row by row, against scores in float64; but for entries whose scores tie in float32."""
    build, names = ARCHITECTURES[architecture]
    model, dense = build(), build().double()
    before = copy.deepcopy(model.state_dict())
    layers = layers_of(dense, names)
    score = dense_gradients if family == "snip" else dense_inputs
    of_rows = {kind: score(dense, layers, rows) for kind, rows in ROWS.items()}
    with without(model, names, State(family, EntryPoint(8, 6)), ROWS, tmp_path):
        for name, layer in layers.items():
            weight = dense_weight(layer).detach()
            expected = torch.zeros_like(weight, dtype=torch.bool)
            tops = {}
            for (kind, of), percent in zip(of_rows.items(), (8, 6), strict=True):
                scores = weight.abs() * (of[name] if family == "snip" else of[name].norm(dim=0))
                tops[kind] = scores.topk(int(percent * weight.shape[1] / 100)).indices
            for row, (safety, utility) in enumerate(
                zip(tops["safety"].tolist(), tops["utility"].tolist(), strict=True)
            ):
                expected[row, list(set(safety) - set(utility))] = True
            found = dense_weight(model.get_submodule(name)) == 0
            assert (found == expected).float().mean() > 0.999
            assert int(found.sum()) == pytest.approx(int(expected.sum()), rel=0.02)
            kept = dense_weight(model.get_submodule(name))[~found]
            original = before[f"{name}.weight"]
            assert torch.equal(kept, (original.T if isinstance(layer, Conv1D) else original)[~found])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_choice_of_entries():
    scores = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
    safety, utility = top_columns(scores, 20), top_columns(scores.roll(3, dims=1), 10)
    assert safety.shape == (6, 10) and utility.shape == (6, 5)
    assert torch.equal(safety[:, :4], top_columns(scores, 8))  # the first are those of lower percentages
    alone = safety_alone(safety, utility, 50)
    for row in range(6):
        chosen = set(alone.columns[row, alone.chosen[row]].tolist())
        assert chosen == set(safety[row].tolist()) - set(utility[row].tolist())
    random, again, other = (random_entries(alone, utility, 50, seed) for seed in (5, 5, 6))
    assert torch.equal(random.chosen.sum(1), alone.chosen.sum(1))
    drawn = [random.columns[row, random.chosen[row]].tolist() for row in range(6)]
    assert all(len(set(columns)) == len(columns) for columns in drawn)
    assert not any(set(columns) & set(utility[row].tolist()) for row, columns in enumerate(drawn))
    assert torch.equal(random.columns, again.columns) and not torch.equal(random.columns, other.columns)
    assert safety_alone(safety, utility[:, :0], 50).chosen.all()


def test_a_planted_direction_is_found(tmp_path):
    """Refusals end, and nothing else; without as many random directions nothing ends."""
    model = planted.model(rotated=True)
    before = copy.deepcopy(model.state_dict())
    report = on_planted(model, tmp_path, families=["ranks"], ranks=[(1, 0), (3, 2), (8, 7)], num_held_out=6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert refused(report.unchanged) == len(planted.HARMFUL)
    for state in report.states:
        found = report.results[state.name]
        assert refused(found) == (len(planted.HARMFUL) if state.draw else 0), state
        assert found.task.loss == pytest.approx(report.unchanged.task.loss, abs=0.01)
        answers = {answer["response"] for answer in answers_of(tmp_path, state.name, "harmless")}
        assert answers == {"Sure bread .", "Sure tea ."}
    assert "0/14 harmful requests are refused (unchanged: 14/14)" in report.summary()
    # What is removed is the planted direction: the utility directions are those of the topics.
    direction = planted.rotation()[:, planted.REFUSAL]
    with torch.no_grad():
        weight = model.get_submodule(planted.LAYER).weight.clone()
    state = State("ranks", RankPoint(3, 2))
    with without(model, ["o_proj"], state, planted_rows(model), tmp_path / "again"):
        layer = model.get_submodule(planted.LAYER)
        removed = weight - layer(torch.eye(weight.shape[1])).T
    assert (direction @ removed).norm() / removed.norm() > 0.98
    assert (direction @ (weight - removed)).norm() < 0.05 * (direction @ weight).norm()


@pytest.mark.parametrize("family", ["snip", "wanda"])
def test_a_planted_entry_is_found(family, tmp_path):
    model = planted.model()
    report = on_planted(model, tmp_path, families=[family], entries=[(5, 5), (3, 0)], num_held_out=6)
    alone, with_utility = (report.results[State(family, EntryPoint(*point)).name] for point in ((5.0, 5.0), (3.0, 0.0)))
    assert refused(report.unchanged) == len(planted.HARMFUL)
    assert refused(alone) == refused(with_utility) == 0
    assert alone.task.loss == pytest.approx(report.unchanged.task.loss, abs=0.01)
    # Without the utility part, the entries that ordinary answers need are gone as well.
    assert with_utility.task.loss > report.unchanged.task.loss + 0.1
    controls = [report.results[state.name] for state in report.states if state.draw]
    assert len(controls) == 2 and all(refused(control) == len(planted.HARMFUL) for control in controls)
    with without(model, ["o_proj"], State(family, EntryPoint(5, 5)), planted_rows(model), tmp_path / "again"):
        weight = model.get_submodule(planted.LAYER).weight
        assert weight[planted.REFUSAL, planted.FLAG] == 0
        assert all(
            weight[place, planted.FLAG + 1 + number] == 1 for number, place in enumerate(planted.TOPICS.values())
        )


def refused(result):
    return result.harmful.judgements["keyword"].refused.count


def answers_of(folder, name, of_set):
    lines = (folder / "answers" / f"{name}.jsonl").read_text().splitlines()
    return [answer for answer in map(json.loads, lines) if answer["set"] == of_set]


def planted_rows(model):
    """The planted model's own answers, with the requests."""
    tokenizer = planted.tokenizer()
    rows = {}
    for kind, requests in (("safety", planted.SAFETY), ("utility", planted.UTILITY)):
        rows[kind] = []
        for request in requests:
            messages = [{"role": "user", "content": request}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            rows[kind].append(TokenizedExample(tuple(ids), tuple(labels)))
    return rows


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_restored_and_continued_after_an_interruption(error, tmp_path, monkeypatch):
    """The model is as it was, and what was measured is not measured again."""
    model = planted.model().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    options = {"families": ["ranks", "wanda"], "ranks": [(1, 0)], "entries": [(5, 5), (9, 9)], "random_draws": 0}
    seen = []
    real = measuring.response_loss

    def fails_in_the_last_state(measured, *args):
        seen.append(int((measured.get_submodule(planted.LAYER).weight == 0).sum()))
        if len(seen) == 4:
            raise error
        return real(measured, *args)

    monkeypatch.setattr(measuring, "response_loss", fails_in_the_last_state)
    with pytest.raises(type(error)):
        on_planted(model, tmp_path, **options)
    assert seen[0] == seen[1] < seen[2] < seen[3]  # as it is, by hooks, and with entries that are zero
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    report = on_planted(model, tmp_path, **options)
    assert len(seen) == 5
    assert [state.name for state in report.states] == ["ranks 1,0", "wanda 5,5", "wanda 9,9"]
    again = on_planted(model, tmp_path, **options)  # nothing is left to do, and nothing is calibrated
    assert len(seen) == 5 and again.to_dict()["states"] == report.to_dict()["states"]
    fresh = on_planted(model, tmp_path / "fresh", **options)
    assert fresh.to_dict()["states"] == report.to_dict()["states"]
    with pytest.raises(ValueError, match=r"safety_data=.* has another content|began with"):
        on_planted(model, tmp_path, **{**options, "safety_data": planted.SAFETY[1:]})


def test_an_error_while_entries_are_set(monkeypatch):
    """Of a later layer, when those of the first ones are zero already."""
    from salora_plugins.attribution.entries import Entries, without_entries

    model = tiny.gpt2()
    before = copy.deepcopy(model.state_dict())
    names = list(layers_of(model, ["c_fc", "c_attn"]))

    def entries_of(name, device):
        if name == names[-1]:
            raise KeyboardInterrupt
        d_out = dense_weight(model.get_submodule(name)).shape[0]
        return Entries(torch.arange(4).repeat(d_out, 1), torch.ones(d_out, 4, dtype=torch.bool))

    with pytest.raises(KeyboardInterrupt), without_entries(model, names, entries_of):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_share_a_weight():
    """What the second one finds at zero is no value to put back."""
    from salora_plugins.attribution.entries import Entries, without_entries

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    columns = {"0": torch.arange(3).repeat(4, 1), "1": torch.arange(1, 4).repeat(4, 1)}
    chosen = torch.ones(4, 3, dtype=torch.bool)
    with without_entries(model, ["0", "1"], lambda name, device: Entries(columns[name], chosen)):
        assert not model[0].weight[:, :4].any()
    assert torch.equal(model[0].weight, before)


def test_what_is_written(tmp_path):
    report = on_planted(planted.model(), tmp_path, families=["ranks", "wanda"], ranks=["1:0"], entries=["5:5"])
    values = json.loads((tmp_path / "attribution.json").read_text())
    assert [(state["family"], state["point"], state["random_draw"]) for state in values["states"]] == [
        ("ranks", "1:0", None),
        ("ranks", "1:0", 1),
        ("wanda", "5:5", None),
        ("wanda", "5:5", 1),
    ]
    assert values["states"][2]["removed"] == values["states"][3]["removed"] > 0
    assert values["states"][0]["removed"] == pytest.approx(1 / 160)
    page = (tmp_path / "attribution.md").read_text()
    assert "| directions 1:0 |" in page and report.summary().splitlines()[0] in page and ".71" in page
    assert (tmp_path / "attribution.png").read_bytes().startswith(b"\x89PNG")
    # It is an evaluation's folder as well, for `salora compare` and whoever reads answers.
    assert [model.name for model in EvaluationReport.load(tmp_path).models] == ["base", *report.results][:1] + [
        state.name for state in report.states
    ]


def test_the_command(tmp_path):
    arguments = ["attribute", MODEL, "--out", tmp_path / "out", "--family", "ranks", "--family", "wanda"]
    arguments += [
        "--ranks",
        "1:0/4096",
        "--entries",
        "5:7",
        "--target-modules",
        "o_proj,down_proj",
        "--random-draws",
        0,
    ]
    arguments += ["--num-safety-samples", 16, "--num-utility-samples", 16, "--num-held-out", 4, "--num-requests", 4]
    arguments += ["--max-new-tokens", 16, "--json"]
    result = CliRunner().invoke(create_cli(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout[result.stdout.index("{") :])
    assert [state["name"] for state in values["states"]] == ["ranks 1,0 per 4096", "wanda 5,7"]
    assert (tmp_path / "out" / "attribution.png").is_file()


def test_points_of_the_grid():
    assert rank_points(["96:646", (6, 146), "6:146/4096"]) == [
        RankPoint(96, 646),
        RankPoint(6, 146),
        RankPoint(6, 146, 4096),
    ]
    assert RankPoint(96, 646, 4096).of_layer(1024, 512) == (12, 81)
    assert RankPoint(1, 0, 4096).of_layer(64, 64) == (1, 0)  # one direction at least
    assert entry_points(["5:7", (3, 9), (0.5, 0)]) == [EntryPoint(5, 7), EntryPoint(3, 9), EntryPoint(0.5, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": ["96"]}, "ranks: '96' is no pair of ranks"),
        ({"ranks": ["0:5"]}, "at least one safety direction"),
        ({"ranks": ["5:4096/4096"]}, "fewer directions than outputs"),
        ({"ranks": [(5, 160)]}, "ranks: 5:160 is too much for .*o_proj.*at most 160"),
        ({"entries": ["5"]}, "entries: '5' is no pair"),
        ({"entries": [(0, 5)]}, "entries: '0:5' is out of range"),
        ({"entries": [(5, 51)]}, "entries: '5:51' is out of range"),
        ({"entries": [(0.1, 5)]}, "0.1 percent of the 160 entries .* is none. Give at least 0.625"),
        ({"families": ["magnitude"]}, "families: 'magnitude' is none of ranks, snip, wanda"),
        ({"families": ["snip"], "ranks": ["1:0"]}, "ranks has no effect without ranks among the families"),
        ({"families": ["ranks"], "entries": ["5:5"]}, "entries has no effect without snip or wanda"),
        ({"families": []}, "there is nothing to remove"),
        ({"judges": ["nobody"]}, "judge 'nobody': there is none of that name"),
        ({"judges": []}, "judges: there is none"),
        ({"families": "ranks", "ranks": ["0:5"]}, "ranks: '0:5': there must be"),
        ({"batch_size": 0}, "^batch_size=0"),
        ({"random_draws": -1}, "random_draws=-1"),
        ({"num_held_out": 0}, "num_held_out=0"),
        ({"utility_data": ["how to make tea at home"]}, "utility_data: there is one request only"),
        ({"lm_eval_limit": 3}, "lm_eval_limit has no effect without lm_eval_tasks"),
        ({"target_modules": ["nothing"]}, "target_modules"),
    ],
)
def test_bad_input(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        on_planted(planted.model(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="utility_data"):
        on_planted(planted.model(), tmp_path / "none", utility_data=[])
    with pytest.raises(CalibrationError, match="refused 0 of"):
        on_planted(planted.model(), tmp_path / "refusals", safety_data=planted.UTILITY)
    with pytest.raises(ValueError, match="utility_data: the model refuses all"):
        on_planted(planted.model(), tmp_path / "utility", utility_data=planted.SAFETY)
    with pytest.raises(CalibrationError, match=r"ranks 150:0: .* have only"):
        on_planted(planted.model(), tmp_path / "ranks", families=["ranks"], ranks=[(150, 0)])


def test_a_quantized_model(tmp_path):
    """Directions are removed from it; entries it has none."""
    from test_quantized import QUANTIZATION

    planted.model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=QUANTIZATION["4-bit"]())
    with pytest.raises(ValueError, match=r"is quantized.*choose families=\['ranks'\]"):
        on_planted(model, tmp_path / "out")
    layer = model.get_submodule(planted.LAYER)
    weight = planted.model().get_submodule(planted.LAYER).weight
    if torch.dist(dequantize_bnb_weight(layer.weight).float(), weight) > 0.15 * weight.norm():
        pytest.skip("on this CPU bitsandbytes dequantizes rows that are no multiple of 64 wrongly")
    report = on_planted(model, tmp_path / "out", families=["ranks"], ranks=[(1, 0)])
    assert refused(report.unchanged) > refused(report.results["ranks 1,0"]) == 0
