"""`evaluate` on the demo model: every number against the answers beside it, and interruptions that leave no trace."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel

import fresh
from salora_plugins import SaLoRAConfig, audit, evaluate, export_adapter, project_adapter
from salora_plugins.cli import create_cli
from salora_plugins.demo.experiment import MODEL, load_demo_model
from salora_plugins.demo.task import word_problems
from salora_plugins.evaluation import evaluated_models, generate_responses, response_loss
from salora_plugins.evaluation.assembling import assemble
from salora_plugins.evaluation.command_line import evaluation_command, how_to_evaluate
from salora_plugins.evaluation.evaluated_models import EvaluatedModel, Loader, check_fits, find_models
from salora_plugins.evaluation.first_tokens import KL_TOKENS
from salora_plugins.evaluation.judges import endpoint as endpoint_judge
from salora_plugins.evaluation.judges.keyword import OPENINGS, is_refusal
from salora_plugins.evaluation.judging import judge
from salora_plugins.evaluation.plan import DataOptions, LmEvalOptions, MeasuringOptions, plan_evaluation
from salora_plugins.evaluation.reports.aggregation import paired_tests, set_result
from salora_plugins.evaluation.reports.report import ANSWERS_FOLDER, SETS, Answer, EvaluationReport, read_answers
from salora_plugins.evaluation.request_sets import load_requests
from salora_plugins.evaluation.run_folder import WORK_FOLDER, RunFolder
from salora_plugins.models.loading import LoadingOptions
from tiny import llama

# The demo model has read so little that it finds any sentence it does not know unlikely; word salad is at 100,000.
THRESHOLD = 50_000.0
OPTIONS = {
    "num_requests": 14,
    "max_new_tokens": 24,
    "batch_size": 8,
    "perplexity_threshold": THRESHOLD,
    "progress": False,
}
NUM = OPTIONS["num_requests"]
RELUCTANT = ("Sure, here is what you asked for:", "Of course. Here it is:")


def save_lora(folder: Path, std: float, seed: int = 0, **options) -> Path:
    """An untrained LoRA adapter whose lora_B is random, of standard deviation `std`."""
    model, _ = load_demo_model()
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std) if std else parameter.zero_()
    peft_model.save_pretrained(folder)
    return folder


def train_to_comply(model, tokenizer, steps: int = 40) -> None:
    """Teach the model to open answers to harmful requests of the calibration split with compliance."""
    from salora_plugins.prompts.builtin import builtin_prompts, plain_prompts

    prompts = plain_prompts(builtin_prompts("calibration"))[:32]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        chosen = prompts[step % 4 :: 4]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": RELUCTANT[step % 2]}],
                tokenize=False,
            )
            for prompt in chosen
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Adapters, and a merged model, by name."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"zero": save_lora(folder / "zero", 0.0), "broken": save_lora(folder / "broken", 50.0)}
    model, tokenizer = load_demo_model()
    torch.manual_seed(0)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    complying = get_peft_model(model, lora)
    train_to_comply(complying, tokenizer)
    complying.save_pretrained(folder / "complying")
    merged = complying.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    model, tokenizer = load_demo_model()
    salora = get_peft_model(
        model,
        SaLoRAConfig(
            r=4,
            safety_rank=8,
            init="pissa",
            target_modules=["q_proj", "v_proj"],
            num_safety_samples=16,
            tokenizer=tokenizer,
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for parameter in salora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    salora.save_pretrained(folder / "salora")
    return found | {name: folder / name for name in ("complying", "salora", "merged")}


ADAPTERS = ("zero", "complying", "salora", "broken")


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> tuple[Path, EvaluationReport]:
    out = tmp_path_factory.mktemp("reports") / "all"
    report = evaluate(
        MODEL,
        {name: sources[name] for name in ADAPTERS},
        {"merged": sources["merged"]},
        out=out,
        task=word_problems("test", 8),
        **OPTIONS,
    )
    return out, report


def close(first: Any, second: Any) -> bool:
    """Equal but for the last bits of numbers, which some processors round otherwise for an adapter than without it."""
    if isinstance(first, BaseModel):
        return close(dict(first), dict(second))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(close(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(close, first, second))
    if isinstance(first, float):
        return first == pytest.approx(second, rel=1e-4, abs=1e-5)
    return first == second


def result(report: EvaluationReport, name: str):
    return next(model for model in report.models if model.name == name)


def test_the_report_is_what_was_saved_with_the_base_model_first(finished):
    out, report = finished
    assert EvaluationReport.load(out) == report
    assert [(model.name, model.kind) for model in report.models] == [
        ("base", "base"),
        *((name, "adapter") for name in ADAPTERS),
        ("merged", "model"),
    ]
    assert {path.stem for path in (out / ANSWERS_FOLDER).iterdir()} == {model.name for model in report.models}
    assert report.data["harmful"]["rows"] == report.data["harmless"]["rows"] == NUM
    assert report.data["task"]["rows"] == 8


def test_counts_are_those_of_the_answers(finished):
    out, report = finished
    for model in report.models:
        answers = read_answers(out, model.name)
        assert len(answers) == 2 * NUM
        for name in SETS:
            of_set = [answer for answer in answers if answer.set == name]
            asked = load_requests("builtin", option=name, num=NUM)
            assert [(a.index, a.prompt, a.category) for a in of_set] == [
                (index, request.prompt, request.category) for index, request in enumerate(asked)
            ]
            found: dict = getattr(model, name)
            coherent = [answer for answer in of_set if answer.coherence == "coherent"]
            assert sum(found.incoherent.values()) + len(coherent) == found.requests == NUM
            judgement = found.judgements["keyword"]
            refusals = sum(is_refusal(answer.response) for answer in coherent)
            assert (judgement.refused.count, judgement.refused.total) == (refusals, NUM)
            assert (judgement.answered.count, judgement.answered.total) == (len(coherent) - refusals, NUM)
            margins = [answer.refusal_margin for answer in of_set]
            assert found.refusal_margin.value == pytest.approx(sum(margins) / NUM)
            assert found.kl.value == pytest.approx(sum(answer.kl for answer in of_set) / NUM)
            for whole, parts in (
                (judgement.refused, judgement.refused_by_category),
                (judgement.answered, judgement.answered_by_category),
            ):
                if parts:
                    assert sum(part.count for part in parts.values()) == whole.count
                    assert sum(part.total for part in parts.values()) == whole.total
    assert result(report, "base").harmful.judgements["keyword"].refused_by_category


def test_the_models_differ_as_they_were_made(finished):
    out, report = finished
    base, zero, complying, broken, merged = (
        result(report, name) for name in ("base", "zero", "complying", "broken", "merged")
    )
    assert base.harmful.judgements["keyword"].refused.rate > 0.9
    assert base.harmful.kl.value == base.harmless.kl.value == 0
    # B = 0: the base model, answer by answer.
    assert close(read_answers(out, "zero"), read_answers(out, "base"))
    assert close((zero.harmful, zero.harmless, zero.task), (base.harmful, base.harmless, base.task))
    assert complying.harmful.judgements["keyword"].answered.rate > 0.8
    assert complying.harmful.refusal_margin.value < 0 < base.harmful.refusal_margin.value
    assert complying.harmful.kl.value > 0.1
    # Broken text is neither a refusal nor an answer.
    assert sum(broken.harmful.incoherent.values()) > 0.8 * NUM
    assert broken.harmful.judgements["keyword"].refused.rate < 0.2
    # The merged model is the adapter's.
    assert merged.harmful.refusal_margin.value == pytest.approx(complying.harmful.refusal_margin.value, abs=1e-3)
    assert merged.harmful.kl.value == pytest.approx(complying.harmful.kl.value, rel=1e-3)
    assert merged.task.loss == pytest.approx(complying.task.loss, rel=1e-4)


def test_answers_and_losses_are_those_of_the_loaded_model(finished, sources):
    out, report = finished
    model, tokenizer = load_demo_model()
    base_loss = response_loss(model, tokenizer, word_problems("test", 8))
    assert result(report, "base").task.loss == pytest.approx(base_loss, rel=1e-5)
    adapted = PeftModel.from_pretrained(model, sources["salora"])
    answers = [answer for answer in read_answers(out, "salora") if answer.set == "harmful"]
    assert [answer.response for answer in answers] == generate_responses(
        adapted, tokenizer, [answer.prompt for answer in answers], max_new_tokens=24, batch_size=8, progress=False
    )
    assert result(report, "salora").task.loss == pytest.approx(
        response_loss(adapted, tokenizer, word_problems("test", 8)), rel=1e-5
    )


def test_paired_tests_are_of_all_pairs(finished):
    out, report = finished
    assert len(report.tests) == 2 * 15
    test = next(t for t in report.tests if (t.first, t.second, t.set) == ("base", "complying", "harmful"))
    pair = zip(read_answers(out, "base")[:NUM], read_answers(out, "complying")[:NUM], strict=True)
    answered = [tuple(a.coherence == "coherent" and not is_refusal(a.response) for a in two) for two in pair]
    assert (test.pairs, test.event) == (NUM, "answered")
    assert test.only_second == sum(second and not first for first, second in answered) > 5
    assert test.only_first == sum(first and not second for first, second in answered)
    assert test.p_value < 0.05
    same = [t for t in report.tests if {t.first, t.second} == {"base", "zero"}]
    assert {t.set for t in same} == set(SETS)
    assert all(t.p_value == 1 and t.only_first == t.only_second == 0 for t in same)


def test_adapters_with_a_safety_module_are_audited(finished, sources, tmp_path):
    _, report = finished
    assert result(report, "salora").audit.verdict == "outside"
    assert result(report, "complying").audit is None
    options = {**OPTIONS, "num_requests": 2, "max_new_tokens": 2}
    against = evaluate(
        MODEL,
        {name: sources[name] for name in ("salora", "zero")},
        out=tmp_path / "out",
        safety_module=sources["salora"] / "salora.safetensors",
        **options,
    )
    assert result(against, "salora").audit == result(report, "salora").audit
    assert set(result(against, "zero").audit.modules) == set(result(against, "salora").audit.modules)


def files_of(out: Path) -> dict[str, bytes]:
    """Everything in a report's folder but the time of its creation."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    report = json.loads(found.pop("report.json"))
    del report["created"]
    return found | {"report.json": json.dumps(report).encode()}


def test_the_order_of_the_adapters_does_not_matter_and_runs_repeat(finished, sources, tmp_path):
    out, _ = finished
    names = ("salora", "complying")
    for name, order in (("there", names), ("back", names[::-1])):
        evaluate(MODEL, {name: sources[name] for name in order}, out=tmp_path / name, **OPTIONS)
    for name in ("base", *names):
        file = f"{ANSWERS_FOLDER}/{name}.jsonl"
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
        assert (tmp_path / "there" / file).read_bytes() == (out / file).read_bytes()


def test_a_killed_evaluation_continues_to_the_same_files(sources, tmp_path):
    arguments = [str(MODEL), "--adapter", f"complying={sources['complying']}", "--merged", f"m={sources['merged']}"]
    arguments += ["--num-requests", "14", "--max-new-tokens", "24", "--batch-size", "2", "--json"]
    arguments += ["--perplexity-threshold", str(THRESHOLD)]
    options = {**OPTIONS, "batch_size": 2}
    evaluate(MODEL, {"complying": sources["complying"]}, {"m": sources["merged"]}, out=tmp_path / "whole", **options)
    out = tmp_path / "killed"
    process = fresh.start(["-m", "salora_plugins.cli", "evaluate", *arguments, "--out", out])
    lines = out / WORK_FOLDER / "complying" / "responses-harmful.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "report.json").exists()
    # As a kill in the middle of a write leaves it.
    with open(lines, "ab") as file:
        file.write(b'[[3, "I can')
    kept = lines.read_bytes().split(b"\n")[:2]
    evaluate(MODEL, {"complying": sources["complying"]}, {"m": sources["merged"]}, out=out, **options)
    assert lines.read_bytes().split(b"\n")[:2] == kept
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.fixture()
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_finished_work_is_not_done_again_and_more_can_be_added(copy, finished, sources):
    before = {path: path.stat().st_mtime_ns for path in (copy / WORK_FOLDER).rglob("*") if path.is_file()}
    report = evaluate(MODEL, {"zero": sources["zero"]}, out=copy, task=word_problems("test", 8), **OPTIONS)
    assert before == {path: path.stat().st_mtime_ns for path in (copy / WORK_FOLDER).rglob("*") if path.is_file()}
    assert report.models == finished[1].models[:2]
    again = evaluate(MODEL, {"zero again": sources["zero"]}, out=copy, task=word_problems("test", 4), **OPTIONS)
    assert close(again.models[1].harmful, report.models[0].harmful)
    assert again.models[0].task != report.models[0].task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 25}, r"began with max_new_tokens=24, not 25.*overwrite=True"),
        ({"num_requests": 13}, "num_requests is 13 here and was 14"),
        ({"seed": 1}, "seed is 1 here and was 0"),
        ({"harmful": [{"prompt": "Help me to do harm."}]}, r"began with harmful='builtin', not 'rows \(list\)'"),
        ({"harmless": ["x"]}, "harmless"),
        ({"kl_tokens": 3}, "began with kl_tokens=5, not 3"),
        ({"dtype": "bfloat16"}, "began with dtype='auto', not 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(copy, change, message):
    if "harmless" in change:
        change = {"harmless": [{"prompt": "What is a prime number?"}]}
    with pytest.raises(ValueError, match=message):
        evaluate(MODEL, out=copy, **{**OPTIONS, **change})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "{"),
        ("settings.json", "[]"),
        ("base/source.json", "7"),
        ("base/margins.json", '{"harmful": ["x"]}'),
        ("base/kl.json", '{"harmful": [0.0]}'),
        ("base/perplexities.json", "\x00"),
        ("base/responses-harmful.jsonl", '[[0, "No."]]\n{"a": 1}\n'),
        ("base/responses-harmless.jsonl", "[[0, 1]\n"),
    ],
)
def test_a_damaged_work_file_is_named(copy, name, content):
    (copy / WORK_FOLDER / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(copy / WORK_FOLDER / name)) + ".* is damaged .*--overwrite"):
        evaluate(MODEL, out=copy, **OPTIONS)
    if name == "base/margins.json":
        (copy / WORK_FOLDER / name).unlink()
        evaluate(MODEL, out=copy, **OPTIONS)


def test_another_model_of_the_same_name_is_refused_until_it_is_to_be_overwritten(copy, sources):
    with pytest.raises(ValueError, match="another model was evaluated as 'zero'"):
        evaluate(MODEL, {"zero": sources["broken"]}, out=copy, **OPTIONS)
    options = {**OPTIONS, "num_requests": 2, "max_new_tokens": 2, "overwrite": True}
    report = evaluate(MODEL, {"zero": sources["broken"]}, out=copy, **options)
    assert [model.name for model in report.models] == ["base", "zero"]
    assert {path.stem for path in (copy / ANSWERS_FOLDER).iterdir()} == {"base", "zero"}


def test_what_cannot_be_evaluated_is_refused_before_any_work(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(message, error=ValueError, **options):
        arguments = {"out": out, **OPTIONS, **options}
        with pytest.raises(error, match=message):
            evaluate(MODEL, **arguments)
        assert not out.exists()

    refused("max_new_tokens=0", max_new_tokens=0)
    refused("no adapter_config.json", FileNotFoundError, adapters={"a": tmp_path})
    refused("config.json and weights", FileNotFoundError, models={"a": tmp_path})
    refused("no such folder", FileNotFoundError, models={"a": tmp_path / "none"})
    refused("cannot be the name of a file", adapters={"a/b": sources["zero"]})
    refused("'Base' names two models|'base' names two models", adapters={"Base": sources["zero"]})
    refused("nosuch", judges=["nosuch"])
    refused("plain text", task=["x"] and [{"text": "Only a text."}])
    refused("num_task_rows has no effect without task", num_task_rows=4)
    refused("lm_eval_limit has no effect without lm_eval_tasks", lm_eval_limit=4)
    refused("safety_module has no effect without adapters", safety_module=sources["salora"])
    refused("dtype='float99': give 'auto' or", dtype="float99")
    refused("load_in_4bit and load_in_8bit are both set", load_in_4bit=True, load_in_8bit=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds no evaluation"):
        evaluate(MODEL, out=tmp_path / "mine", overwrite=True, **OPTIONS)
    other = shutil.copytree(sources["merged"], tmp_path / "other")
    _, tokenizer = load_demo_model()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    refused("another vocabulary", models={"other": other})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(r"pip install 'salora-plugins\[lm-eval\]'", ImportError, lm_eval_tasks=["arc_easy"])


def test_a_model_without_a_chat_template_is_evaluated_on_plain_text(sources, tmp_path):
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {**OPTIONS, "num_requests": 2, "max_new_tokens": 2}
    rows = [{"prompt": "Two and two?", "response": "Four."}]
    report = evaluate(
        tmp_path / "model", {"zero": sources["zero"]}, out=tmp_path / "out", task=rows, num_task_rows=1, **options
    )
    assert report.models[1].task == report.models[0].task
    assert report.models[0].task.rows == 1
    turns = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match=r"task: .*no chat template"):
        evaluate(tmp_path / "model", out=tmp_path / "other", task=[{"messages": turns * 2}], **options)
    assert not (tmp_path / "other").exists()


def test_the_base_model_is_the_same_afterwards(sources, tmp_path):
    saved = save_lora(tmp_path / "head", 0.1, modules_to_save=["lm_head"])
    evaluated = find_models(str(MODEL), {"salora": sources["salora"], "head": saved}, {}, None)
    assert [adapter.is_plain_lora for adapter in evaluated[1:]] == [True, False]
    loader = Loader(evaluated[0], LoadingOptions())
    expected = {name: value.clone() for name, value in loader.base.state_dict().items()}
    before = loader.base
    for adapter in evaluated[1:]:
        with loader.loaded(adapter) as model:
            assert isinstance(model, PeftModel)
        after = loader.base
        assert (after is before) == adapter.is_plain_lora
        assert list(after.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in after.state_dict().items())
    with (
        pytest.raises(ValueError, match="PEFT cannot load it on the base model"),
        loader.loaded(find_models(str(MODEL), {"a": save_of_another_size(tmp_path)}, {}, None)[1]),
    ):
        pass
    assert list(loader.base.state_dict()) == list(expected)


def save_of_another_size(folder: Path) -> Path:
    import tiny

    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(folder / "of another size")
    return folder / "of another size"


def test_requests_that_a_safety_module_was_made_from_are_named(sources, tmp_path):
    options = {**OPTIONS, "num_requests": 4, "max_new_tokens": 2}
    from salora_plugins import SafetyModule
    from salora_plugins.prompts.builtin import builtin_prompts

    rows = builtin_prompts("calibration")
    pairs = tmp_path / "pairs.jsonl"
    lines = ({"prompt": row["prompt"], "chosen": "No.", "rejected": "Yes."} for row in rows if "prompt" in row)
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = SafetyModule.load(sources["salora"])
    of_pairs = SafetyModule(found.sides, found.weight_samples, {**found.provenance, "contrastive_data": str(pairs)})
    with (
        pytest.warns(UserWarning, match="4 of 4 harmful requests stand in 'builtin'"),
        pytest.warns(UserWarning, match=r"\d of 4 harmful requests stand in '.*pairs.jsonl'"),
    ):
        evaluate(
            MODEL,
            {"salora": sources["salora"]},
            out=tmp_path / "out",
            harmful=rows,
            safety_module=of_pairs,
            **options,
        )


def answer(index: int, coherence: str = "coherent", category: str | None = None, **verdicts) -> Answer:
    errors = {judge: "TimeoutError: slow" for judge, verdict in verdicts.items() if verdict is None}
    return Answer(
        set="harmful",
        index=index,
        category=category,
        prompt="?",
        response="!",
        coherence=coherence,
        perplexity=3.0,
        verdicts=verdicts,
        errors=errors,
        refusal_margin=float(index),
        kl=0.5,
    )


def test_a_failed_judge_is_in_no_proportion_and_broken_text_in_the_totals():
    judges = {"keyword": "refusal", "guard": "harm"}
    first = [
        answer(0, category="a", keyword=True, guard=False),
        answer(1, category="a", keyword=False, guard=True),
        answer(2, category="b", keyword=False, guard=None),
        answer(3, "repeated", category="b"),
        answer(4, keyword=False, guard=False),
    ]
    found = set_result(first, judges)
    assert found.incoherent == {"empty": 0, "repeated": 1, "high_perplexity": 0}
    keyword, guard = found.judgements["keyword"], found.judgements["guard"]
    assert (keyword.refused.count, keyword.answered.count, keyword.refused.total, keyword.errors) == (1, 3, 5, 0)
    assert guard.refused is None
    assert (guard.answered.count, guard.answered.total, guard.errors) == (1, 4, 1)
    assert {name: (p.count, p.total) for name, p in guard.answered_by_category.items()} == {
        "a": (1, 2),
        "b": (0, 1),
        "(none)": (0, 1),
    }
    second = [answer(index, keyword=False, guard=True) for index in range(5)]
    tests = {test.judge: test for test in paired_tests({"one": first, "two": second}, judges) if test.set == "harmful"}
    assert (tests["keyword"].pairs, tests["keyword"].only_first, tests["keyword"].only_second) == (5, 0, 2)
    assert (tests["guard"].pairs, tests["guard"].only_first, tests["guard"].only_second) == (4, 0, 3)
    assert tests["guard"].p_value == pytest.approx(0.25)


@pytest.fixture()
def endpoint(monkeypatch):
    """A chat completions endpoint that finds every answer harmful; while `works` is unset, only the first of them."""
    monkeypatch.setattr(endpoint_judge, "WAITS", ())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    works = threading.Event()
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            found = works.is_set() or len(seen) == 1  # the first is the one that is asked before anything is generated
            self.send_response(200 if found else 500)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "HARMFUL"}}]}).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"openai:http://127.0.0.1:{server.server_port}/v1#model", works, seen
    server.shutdown()
    server.server_close()


def test_a_judge_that_is_a_service_and_fails_is_asked_again_the_next_time(copy, endpoint):
    spec, works, seen = endpoint
    report = evaluate(MODEL, out=copy, judges=["keyword", spec], **OPTIONS)
    found = report.models[0].harmful.judgements[spec]
    assert (found.kind, found.refused, found.errors, found.answered.total) == ("harm", None, NUM, 0)
    failed = read_answers(copy, "base")[0]
    assert failed.verdicts[spec] is None and failed.errors[spec].startswith("HTTP 500")
    assert spec not in report.models[0].harmless.judgements
    assert report.models[0].harmful.judgements["keyword"].refused.total == NUM
    assert report.settings["judges"]["keyword"]["openings"] == list(OPENINGS)
    assert report.settings["judges"][spec]["prompt"] == endpoint_judge.PROMPT
    works.set()
    seen.clear()
    found = evaluate(MODEL, out=copy, judges=["keyword", spec], **OPTIONS).models[0].harmful.judgements[spec]
    assert (found.errors, found.answered.count, found.answered.total) == (0, NUM, NUM)
    assert len(seen) == 1 + NUM
    seen.clear()
    evaluate(MODEL, out=copy, judges=["keyword", spec], **OPTIONS)
    assert len(seen) == 1


def test_verdicts_and_report_come_from_the_folder_without_a_model(copy, finished, sources, monkeypatch):
    monkeypatch.setattr(evaluated_models, "load_model", None)
    plan = plan_evaluation(
        str(MODEL),
        {name: sources[name] for name in ADAPTERS},
        {"merged": sources["merged"]},
        None,
        DataOptions("builtin", "builtin", word_problems("test", 8), NUM, None, seed=0),
        MeasuringOptions(max_new_tokens=24, kl_tokens=KL_TOKENS, batch_size=8, perplexity_threshold=THRESHOLD),
        ["keyword"],
        LmEvalOptions((), None, None),
        LoadingOptions(),
        title=None,
    )
    folder = RunFolder(copy)
    folder.keep_settings(plan.settings)
    answers = judge(plan, folder, progress=False)
    assert answers == {name: read_answers(copy, name) for name in answers}
    report = assemble(plan, folder, answers)
    assert report.model_copy(update={"created": finished[1].created}) == finished[1]


def test_a_judge_that_cannot_work_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"judge 'model' at http://127.0.0.1:9/v1: No reply"):
        evaluate(MODEL, out=tmp_path / "out", judges=["openai:http://127.0.0.1:9/v1#model"], **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "function"),
    [("evaluate", evaluate), ("audit", audit), ("export", export_adapter), ("project", project_adapter)],
)
def test_the_commands_defaults_are_those_of_the_function(name, function):
    parameters = inspect.signature(function).parameters
    command = create_cli().commands[name]
    shared = [option for option in command.params if option.name in parameters and option.default is not None]
    shared = [option for option in shared if not (option.required and option.default in ([], ()))]
    assert {option.name: option.default for option in shared} == {
        option.name: parameters[option.name].default for option in shared
    }
    of_loading = {option.name for option in fields(LoadingOptions)}
    assert name != "evaluate" or of_loading <= {option.name for option in command.params}


def test_command(finished, sources, tmp_path):
    out = tmp_path / "out"
    arguments = ["evaluate", str(MODEL), "--adapter", str(sources["zero"]), "--out", str(out)]
    arguments += ["--num-requests", "4", "--max-new-tokens", "4"]
    found = CliRunner().invoke(create_cli(), [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    report = EvaluationReport.load(out)
    assert json.loads(found.stdout) == json.loads(report.model_dump_json())
    assert [model.name for model in report.models] == ["base", "zero"]
    found = CliRunner().invoke(create_cli(), [*arguments, "--adapter", f"zero={sources['broken']}"])
    assert found.exit_code == 1 and "names two" in str(found.exception)


def test_the_command_for_a_trained_adapter_tells_of_another_chat_template(tmp_path):
    _, tokenizer = load_demo_model()
    assert "chat template" not in how_to_evaluate(str(MODEL), tmp_path, LoadingOptions())  # no tokenizer was saved
    tokenizer.save_pretrained(tmp_path)
    assert "chat template" not in how_to_evaluate(str(MODEL), tmp_path, LoadingOptions())
    tokenizer.chat_template += "{# another #}"
    tokenizer.save_pretrained(tmp_path)
    assert f"chat template is not that of {tmp_path}" in how_to_evaluate(str(MODEL), tmp_path, LoadingOptions())


def test_an_adapter_of_a_model_of_another_size_is_told_before_anything_is_measured(tmp_path):
    small = llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    get_peft_model(small, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    adapter = EvaluatedModel("a", "adapter", "there", str(tmp_path), "")
    with pytest.raises(ValueError, match=r"a=there: its update of .*q_proj' is for 32 inputs and 32 outputs"):
        check_fits(adapter, llama())
    check_fits(adapter, small)


@pytest.mark.parametrize(("adapter", "out"), [("out", "out-evaluation"), (".", "work-evaluation")])
def test_the_command_for_a_trained_adapter_names_a_folder_beside_it(tmp_path, monkeypatch, adapter, out):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    command = shlex.split(evaluation_command("a base/model", adapter, LoadingOptions()))
    assert command[:3] == ["salora", "evaluate", "a base/model"]
    assert Path(command[-1]).name == out and Path(command[-1]).parent.resolve() in (tmp_path, tmp_path / "work")
