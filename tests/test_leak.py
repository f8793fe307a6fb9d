"""The header's positions, by templates of several families, and the leak: what it says, and the ranks that follow."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salora_plugins import SafetyModule, SaLoRAConfig, calibrate, load_for_training, plugins
from salora_plugins.activations.capture import collect_statistics
from salora_plugins.activations.last_inputs import last_inputs
from salora_plugins.activations.positions import CountedPositions
from salora_plugins.activations.statistics import Engine
from salora_plugins.adapters.model_card import provenance_rows
from salora_plugins.calibration import CalibrationError
from salora_plugins.calibration.leak import _split, leak_of, prompt_of
from salora_plugins.cli import create_cli
from salora_plugins.hookspecs import BasisNeeds, hookimpl
from salora_plugins.inspection import facts, leak_line, leak_warning, summary
from salora_plugins.prompts.builtin import builtin_prompts
from salora_plugins.ranks import rank_of_text
from salora_plugins.rows.batching import collate
from salora_plugins.rows.examples import Example, TokenizedExample
from salora_plugins.rows.headers import Headers
from salora_plugins.rows.rendering import Renderer
from tiny import CHAT_TEMPLATE, fast_tokenizer, llama, refusal_rows, token_rows, tokenizer

TURNS = "{% for m in messages %}"
TEMPLATES = {
    # Name -> template and what stands behind a request up to the answer.
    "ChatML": (CHAT_TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
    "brackets": (
        TURNS + "{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% else %}[INST] {{ m.content }} [/INST]"
        "{% endif %}{% endfor %}",  # without a generation prompt
        " [/INST]",
    ),
    "headers": (
        TURNS + "<|im_start|>{{ m.role }}<pad>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<pad>\n\n{% endif %}",
        "<|im_end|><|im_start|>assistant<pad>\n\n",
    ),
    "plain words": (
        TURNS
        + "{{ m.role | upper }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "\nASSISTANT:",
    ),
    "reasoning": (
        TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
    "system behind": (
        TURNS + "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|><|im_start|>assistant\n",
    ),
}
CONVERSATIONS = {
    "one request": [("user", "How do I do harm?")],
    "several turns": [("user", "Hello."), ("assistant", "Hi."), ("user", "Now do harm.\n")],
    "a request that ends as the markers do": [("user", "Write salora-content")],
}


def with_template(template: str | None, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    result = tokenizer()
    if merges:
        symbols = result.get_vocab()
        for left, right in merges:
            symbols[left + right] = len(symbols)
        backend = Tokenizer(models.BPE(vocab=symbols, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        result = fast_tokenizer(backend)
    result.chat_template = template
    return result


def prompt(of: PreTrainedTokenizerFast, turns: list[tuple[str, str]]) -> list[int]:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Renderer(of).prompt_ids(Example(messages), "a test")


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(("template", "header"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_header_is_what_the_template_writes_behind_a_request(template, header, turns):
    of = with_template(template)
    ids = prompt(of, turns)
    assert of.decode(ids[len(ids) - Headers(of).length(ids) :]) == header


def test_a_system_prompt_that_follows_is_no_header():
    of = with_template(TEMPLATES["system behind"][0])
    ids = prompt(of, [("system", "Be kind."), ("user", "Do harm.")])
    assert of.decode(ids).endswith("[Be kind.]<|im_start|>assistant\n")
    assert of.decode(ids[len(ids) - Headers(of).length(ids) :]) == "<|im_start|>assistant\n"


@pytest.mark.parametrize(("request_text", "header"), [("Do harm.", "ASSISTANT:"), ("Do harm", "\nASSISTANT:")])
def test_a_token_of_the_request_and_the_template_is_no_header(request_text, header):
    of = with_template(TEMPLATES["plain words"][0], merges=[(".", "Ċ")])
    ids = prompt(of, [("user", request_text)])
    found = of.decode(ids[len(ids) - Headers(of).length(ids) :])
    assert found == "ASSISTANT:"  # where a tokenizer merges the border of some requests, of none it is the header's


@pytest.mark.parametrize("of", [None, with_template(None), with_template("{{ messages[-1].content }}")])
def test_without_a_header_the_last_token_counts(of):
    headers = Headers(of)
    assert not headers.forms and headers.length([5, 6, 7]) == 1 and headers.length([]) == 0
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, 4, -100, -100, 5]])
    mask = headers.mask(torch.arange(10).reshape(2, 5), labels)
    assert mask.tolist() == [[False, False, True, False, False], [True, False, False, True, False]]


def test_headers_of_a_batch_and_of_answers_that_drop_a_part_of_it():
    """DeepSeek-R1's template leaves out "<think>" in a finished conversation."""
    of = with_template(TEMPLATES["reasoning"][0])
    example, start = Renderer(of).prompt_and_response_ids(
        Example(({"role": "user", "content": "Do harm."},), "I can't."), "a test"
    )
    rows = [
        TokenizedExample(tuple(example), (-100,) * start + tuple(example[start:])),
        TokenizedExample((5, 6), (-100, 6)),
    ]
    batch = collate(rows, 0)
    mask = Headers(of).mask(batch["input_ids"], batch["labels"])
    assert of.decode(batch["input_ids"][0][mask[0]]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert mask[1].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("kind", ["exact", "sketched"])
@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_a_weight_counts_the_headers_vectors_so_many_times(positions, kind):
    """The Gram matrix is that of data in which each header vector stands so many times."""
    model, of = llama(), tokenizer()
    layers = {name: model.get_submodule(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.down_proj")}
    rendered = [
        Renderer(of).prompt_and_response_ids(Example(tuple(row["messages"][:1]), "No."), "row")
        for row in refusal_rows(2)
    ]
    rows = [TokenizedExample(tuple(ids), (-100,) * start + tuple(ids[start:])) for ids, start in rendered]
    engine, batches = Engine(kind, 256, 256), [collate(rows, 0)]

    def grams(counted: CountedPositions) -> dict:
        found = collect_statistics(model, layers, batches, engine, positions=counted, with_inputs=True)
        return {(name, side): found[name].of(side).gram() for name in layers for side in ("input", "output")}

    headers = Headers(of).mask
    plain = grams(CountedPositions(positions))
    header = grams(CountedPositions("header", headers))
    weighted, without = (grams(CountedPositions(positions, headers, weight)) for weight in (10.0, 0.0))
    for key in plain:
        assert torch.allclose(weighted[key], plain[key] + 9 * header[key], rtol=1e-4, atol=1e-4 * plain[key].max())
        assert torch.allclose(without[key], plain[key] - header[key], rtol=1e-4, atol=1e-4 * plain[key].max())
        assert not torch.allclose(weighted[key], plain[key], rtol=0.1)


def test_what_has_no_effect_is_refused():
    for options in ({"safety_positions": "header"}, {"safety_positions": "response"}, {"variant": "paper"}):
        with pytest.raises(ValueError, match=r"header_weight=10 has no effect with safety_positions="):
            SaLoRAConfig(header_weight=10, **options)
    with pytest.raises(ValueError, match=r"header_weight=-1: give a number of at least 0"):
        SaLoRAConfig(header_weight=-1)


OPTIONS = {"target_modules": ["q_proj", "down_proj"], "safety_rank": 4, "calibration_cache": False}


def test_the_header_of_a_template_that_wants_a_system_turn():
    own = tokenizer()
    own.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert [own.decode(form) for form in Headers(own).forms] == ["<|im_end|>\n<|im_start|>assistant\n"]


def calibrated(**options) -> SafetyModule:
    return calibrate(llama(), tokenizer(), **{"safety_data": refusal_rows(60), **OPTIONS, **options})


def test_positions_and_weight_are_told():
    header = calibrated(safety_positions="header").provenance
    length = len("\nassistant\n") + 2
    assert header["safety_positions"] == "header" and header["positions_counted"] == 60 * length
    weighted, plain = calibrated(header_weight=10), calibrated()
    assert weighted.provenance["header_weight"] == 10 and "header_weight" not in plain.provenance
    options = {"target_modules": ["q_proj"], "safety_rank": 4, "r": 4, "header_weight": 10}
    get_peft_model(llama(), SaLoRAConfig(**options, safety_module=weighted))
    with pytest.raises(ValueError, match=r"header_weight=10, but the safety module was computed with 1"):
        get_peft_model(llama(), SaLoRAConfig(**options, safety_module=plain))


def test_rows_of_token_ids_without_a_tokenizer_have_a_notice(caplog):
    calibrate(llama(), safety_data=token_rows(16), safety_positions="header", input_safety_rank=8, **OPTIONS)
    assert "no tokenizer was given with these rows of token ids, so that the last token" in caplog.text


def planted(seed: int, direction: torch.Tensor, noise: float) -> torch.Tensor:
    """Inputs (40, 64) along a direction, with noise in the first 40 coordinates."""
    generator = torch.Generator().manual_seed(seed)
    rows = 5 * torch.randn(40, 1, generator=generator) * direction
    rows[:, :40] += noise * torch.randn(40, 40, generator=generator)
    return rows


def test_the_leak_of_a_planted_direction():
    """The task moves along one direction, as harmful requests do, and has inputs of its own beside it."""
    direction, other = torch.eye(64)[50], torch.eye(64)[51]
    task, everyday, harmful = planted(1, direction, 1), planted(2, direction, 1), planted(3, direction, 0.05)

    def calibrated_on(seen: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(planted(4, seen, 0.05), full_matrices=False).Vh[:1].T

    assert leak_of(calibrated_on(direction), task, everyday, harmful) < 0.01
    assert 0.3 < leak_of(calibrated_on(other), task, everyday, harmful) < 3
    assert leak_of(torch.eye(64), task, everyday, harmful) == 0  # nothing is left of the task


def test_inputs_at_the_last_token_in_the_order_of_the_prompts():
    model = llama()
    layers = {name: model.get_submodule(f"model.layers.1.self_attn.{name}") for name in ("q_proj", "v_proj", "o_proj")}
    prompts = [[5, 6, 7], [9], [4, 3, 2, 8, 11]]
    found = last_inputs(model, layers, prompts, batch_size=2)
    assert found["q_proj"] is found["v_proj"] and found["q_proj"] is not found["o_proj"]
    for index, ids in enumerate(prompts):
        alone = last_inputs(model, layers, [ids], batch_size=1)
        for name in layers:
            assert torch.allclose(found[name][index], alone[name][0], atol=1e-5)


def test_the_leak_costs_the_safety_module_nothing_and_is_kept(tmp_path, caplog):
    module = calibrated()
    ids = [
        Renderer(tokenizer()).prompt_and_response_ids(
            Example(tuple(row["messages"][:1]), row["messages"][1]["content"]), ""
        )
        for row in refusal_rows(60)
    ]
    rows = [{"input_ids": whole, "labels": [-100] * start + whole[start:]} for whole, start in ids]
    unmeasured = calibrate(llama(), safety_data=rows, **OPTIONS)
    assert "leak" not in unmeasured.provenance and "no everyday requests" in unmeasured.provenance["leak_unknown"]
    for side in ("output", "input"):
        bases, others = module.sides[side].bases, unmeasured.sides[side].bases
        assert all(torch.equal(bases[name], others[name]) for name in bases)
    again = calibrated()
    assert again.provenance["leak"] == module.provenance["leak"] and set(module.provenance["leak"]) == set(module.bases)
    assert module.provenance["leak_requests"] == 16 and module.provenance["leak_everyday"] == "builtin"
    module.save(tmp_path)
    assert SafetyModule.load(tmp_path).provenance["leak"] == module.provenance["leak"]
    assert "Leak at the last prompt token, on 16 harmful requests" in summary(module)
    assert "The safety module leaks" in caplog.text and "header_weight=10" in caplog.text


def test_no_prompt_that_is_held_out_is_calibrated_on():
    """Sets such as BeaverTails have several responses to one request."""
    rows = token_rows(300)
    prompts = [row["input_ids"][:8] for row in rows[:60]]
    examples = []
    for index, row in enumerate(rows):
        ids = (*prompts[index % 60], *row["input_ids"][8:])
        examples.append(TokenizedExample(ids, (-100,) * 8 + ids[8:]))
    part, held_out = _split(examples)
    assert len(set(held_out)) == len(held_out) == 16 and len(part) == 300 - 16 * 5
    assert not {prompt_of(example) for example in part} & set(held_out)
    part, held_out = _split(examples[:40] * 5)
    assert len(part) == 200 and not held_out


def test_the_head_has_a_leak_and_takes_none_from_the_others():
    """It sees the last position alone where nobody asks for more."""
    alone = calibrated(target_modules=["q_proj"]).provenance["leak"]
    both = calibrated(target_modules=["q_proj", "lm_head"]).provenance["leak"]
    assert set(both) == {*alone, "lm_head"} and 0 < both["lm_head"] < 2
    assert {name: both[name] for name in alone} == pytest.approx(alone, rel=1e-2)


def test_a_layer_where_all_ranks_leak_alike_gets_no_fewer_directions_than_by_default():
    """Of the first layer, which sees the same last token in all prompts."""
    requests = [row["prompt"] for row in builtin_prompts("calibration") if "prompt" in row]
    rows = [{"prompt": request, "response": "I can't help with that."} for request in requests[:60]]
    options = {"safety_data": rows, "safety_rank": 8, "target_modules": ["q_proj"]}
    module = calibrate(llama(hidden_size=256), tokenizer(), input_safety_rank="leak:0.001", **options)
    first = module.input_bases["model.layers.0.self_attn.q_proj"]
    assert module.provenance["leak"]["model.layers.0.self_attn.q_proj"] == pytest.approx(1, rel=1e-3)
    assert first.shape[1] == 32  # there are fewer than 64 characters; and not the 16 that are tried first


def test_the_weight_of_the_header_is_told_and_not_advised_where_it_is_there():
    plain, weighted, header = calibrated(), calibrated(header_weight=10), calibrated(safety_positions="header")
    assert "header" not in facts(plain.provenance)
    assert all("(those of the header 10 times)" in text for text in (facts(weighted.provenance), summary(weighted)))
    assert "(those of the header 10 times)" in provenance_rows(weighted)["Positions"]
    leaks = [{**module.provenance, "leak": {"q_proj": 0.5}} for module in (plain, weighted, header)]
    assert ["header_weight=10" in leak_warning(provenance) for provenance in leaks] == [True, False, False]
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    assert "1: as to those of task_data" in leak_line(calibrated(task_data=rows).provenance)


def test_several_sources_are_told_with_how_much_is_of_each(tmp_path):
    """In the card without the folders that they are in."""
    for name, first in (("one", 0), ("two", 30)):
        rows = refusal_rows(60)[first : first + 30]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    module = calibrated(safety_data=sources)
    assert f"(30 of {sources[0]}, 30 of {sources[1]})" in summary(module)
    card = provenance_rows(module)["Safety data"]
    assert "one.jsonl, two.jsonl, 60 samples (30 of one.jsonl, 30 of two.jsonl)" in card and str(tmp_path) not in card


def test_too_few_rows_and_no_input_side_are_told():
    few = calibrated(safety_data=refusal_rows(40)).provenance
    assert few["leak_unknown"].startswith("of 40 safety rows none can be held out")
    assert "Leak: not measured, since of 40 safety rows" in leak_line(few)
    paper = calibrated(variant="paper").provenance
    assert "no input side" in paper["leak_unknown"] and not leak_warning(paper)
    assert leak_line({}) == leak_warning({}) == ""  # a safety module from before


def test_the_tasks_own_rows_where_they_are_known():
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    assert calibrated(task_data=rows).provenance["leak_everyday"] == "task_data"
    assert calibrated(task_data=rows, init="zero").provenance["leak_everyday"] == "task_data"
    assert calibrated(task_data=rows[:8]).provenance["leak_everyday"] == "builtin"


def test_a_part_with_fewer_directions_says_no_leak():
    module = calibrated(input_safety_rank=16)
    names = list(module.bases)

    def part(**ranks: int) -> SafetyModule:
        of_input = {name: ranks["first" if name == names[0] else "others"] for name in names}
        return module.restricted_to({"output": dict.fromkeys(names, 4), "input": of_input})

    assert part(first=16, others=16).provenance is module.provenance
    assert list(part(first=16, others=8).provenance["leak"]) == names[:1]
    without = part(first=8, others=8).provenance
    assert "leak" not in without and "fewer directions were taken" in without["leak_unknown"]


def test_layers_that_share_inputs_leak_as_their_own_directions_do():
    """q_proj and v_proj have the same inputs; a method that looks at their weights finds other directions."""

    class Plugin:
        @hookimpl
        def register_basis_methods(self, register):
            register("mine", of_weights, BasisNeeds(weights=True))

    def of_weights(statistics, rank, side):
        if side == "output":
            return statistics.of(side).top(rank)
        _, values, directions = torch.linalg.svd(statistics.weight(), full_matrices=False)
        return directions[:rank].T.contiguous(), values[:rank]

    options = {"target_modules": ["q_proj", "v_proj"], "input_safety_rank": 16}
    plugin = Plugin()
    plugins.plugin_manager().register(plugin)
    try:
        mine = calibrated(basis_method="mine", **options).provenance["leak"]
    finally:
        plugins.plugin_manager().unregister(plugin)
    usual = calibrated(**options).provenance["leak"]
    q, v = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj"))
    assert mine[q] != mine[v] and usual[q] == usual[v]


def test_ranks_by_leak(caplog, tmp_path):
    options = {"target_modules": ["layers.1.self_attn.q_proj", "down_proj"]}  # which have 32 directions at least
    numbers = {rank: calibrated(input_safety_rank=rank, **options).provenance["leak"] for rank in (16, 32)}
    target = 0.12  # which one layer reaches with 16, one with 32, and one not
    module = calibrated(input_safety_rank=f"leak:{target}", **options)
    for name, basis in module.input_bases.items():
        grid = [rank for rank in (16, 32) if 2 * rank <= basis.shape[0]]
        reached = [rank for rank in grid if numbers[rank][name] <= target]
        best = min(grid, key=lambda rank: numbers[rank][name])
        assert basis.shape[1] == (reached[0] if reached else best)
        assert module.provenance["leak"][name] == numbers[basis.shape[1]][name]
    assert len({basis.shape[1] for basis in module.input_bases.values()}) > 1
    assert "input_safety_rank='leak:0.12' is not reached by 1 of 3 layers" in caplog.text
    assert module.provenance["input_safety_rank"] == "leak:0.12"
    pattern = calibrated(input_safety_rank=8, input_safety_rank_pattern={"down_proj": "leak:0.12"}, **options)
    for name, basis in pattern.input_bases.items():
        assert basis.shape[1] == (module.input_bases[name].shape[1] if name.endswith("down_proj") else 8)


def test_a_rank_by_leak_is_saved_resumed_and_exported(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    options = {**OPTIONS, "safety_data": refusal_rows(60), "input_safety_rank": "leak:0.15", "r": 4}
    model = get_peft_model(llama(), SaLoRAConfig(**options, tokenizer=tokenizer(), task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "salora_config.json").read_text())["input_safety_rank"] == "leak:0.15"
    assert "Leak" in (tmp_path / "adapter" / "README.md").read_text()
    resumed = load_for_training(llama(), tmp_path / "adapter")
    saved = SafetyModule.load(tmp_path / "adapter")
    config = resumed.peft_config["default"]
    assert config.input_safety_rank == "leak:0.15"
    assert config.safety_module_in_force.provenance["leak"] == saved.provenance["leak"]
    given = get_peft_model(llama(), SaLoRAConfig(**{**options, "safety_module": saved}, task_type="CAUSAL_LM"))
    assert given.peft_config["default"].safety_module_in_force.input_bases.keys() == saved.input_bases.keys()
    numbers = calibrated(input_safety_rank=16)
    with pytest.raises(ValueError, match=r"input_safety_rank='leak:0.15', but the safety module was calibrated with"):
        get_peft_model(llama(), SaLoRAConfig(**{**options, "safety_module": numbers}, task_type="CAUSAL_LM"))


def test_rules_that_cannot_be():
    with pytest.raises(ValueError, match=r"safety_rank='leak:0.05': give a whole number of at least 1, or a share"):
        SaLoRAConfig(safety_rank="leak:0.05")
    for wrong in ("leak", "leak:", "leak:2", "leak:x", "other:0.5"):
        with pytest.raises(ValueError, match=rf"input_safety_rank='{wrong}': give a whole number .* 'leak:0.05'"):
            SaLoRAConfig(input_safety_rank=wrong)
    with pytest.raises(CalibrationError, match=r"'leak:0.05': the leak cannot be measured: of 16 safety rows"):
        calibrated(safety_data=refusal_rows(16), input_safety_rank="leak:0.05")
    assert [rank_of_text(text) for text in ("4", "0.9", "leak:0.1")] == [4, 0.9, "leak:0.1"]
    arguments = ["calibrate", "--model", "m", "--out", "o", "--input-safety-rank", "leak:7"]
    assert CliRunner().invoke(create_cli(), arguments).exit_code != 0


def test_trls_and_axolotls_forms_of_a_rule():
    pytest.importorskip("trl")
    from transformers import HfArgumentParser

    from salora_plugins.integrations.axolotl.args import SaLoRAOptions
    from salora_plugins.integrations.trl import SaLoRAArguments

    parse = HfArgumentParser(SaLoRAArguments).parse_args_into_dataclasses
    (given,) = parse(
        ["--use_salora", "--input_safety_rank", "leak:0.05", "--safety_rank", "8", "--header_weight", "10"]
    )
    assert given.given() == {"input_safety_rank": "leak:0.05", "safety_rank": 8, "header_weight": 10.0}
    block = SaLoRAOptions(input_safety_rank="leak:0.05", header_weight=10, input_safety_rank_pattern={"q": "leak:0.1"})
    assert block.input_safety_rank == "leak:0.05" and block.input_safety_rank_pattern == {"q": "leak:0.1"}
    with pytest.raises(ValueError, match="safety_rank"):
        SaLoRAOptions(safety_rank="leak:0.05")


def test_a_layer_that_is_called_twice_in_a_pass_has_no_leak():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    layers = {"model.layers.0.self_attn.q_proj": model.model.layers[0].self_attn.q_proj}
    with pytest.raises(CalibrationError, match=r"q_proj' was called 2 times in 1 passes"):
        last_inputs(model.eval(), layers, [[1, 2, 3], [4, 5]], batch_size=2)
