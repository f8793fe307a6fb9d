"""Tasks of lm-eval in `salora evaluate` and `salora attribute`: a small one of our own, which needs no network."""

from __future__ import annotations

import json

import pytest
import torch

from salora_plugins import attribute, evaluate
from salora_plugins.demo.experiment import MODEL, load_demo_model

pytest.importorskip("lm_eval.models.huggingface")

QUESTIONS = [f"Is {number} smaller than 5?" for number in range(12)]
CHOICES = ["yes", "no"]
RIGHT = [0 if number < 5 else 1 for number in range(12)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of lm-eval."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "right": right} for question, right in zip(QUESTIONS, RIGHT, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "smaller",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "smaller.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def accuracy() -> float:
    """That of the demo's model, from the likelihoods of both answers."""
    model, tokenizer = load_demo_model()
    right = 0
    for question, answer in zip(QUESTIONS, RIGHT, strict=True):
        found = []
        start = len(tokenizer(question)["input_ids"])
        for choice in CHOICES:
            tokens = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
            with torch.inference_mode():
                logs = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=-1)
            found.append(logs.gather(1, tokens[0, 1:, None])[start - 1 :].sum().item())
        right += found.index(max(found)) == answer
    return right / len(QUESTIONS)


def test_evaluate_runs_a_task_and_can_add_it_later(tasks, tmp_path):
    options = {"out": tmp_path / "out", "num_requests": 2, "max_new_tokens": 4, "progress": False}
    evaluate(MODEL, **options)
    report = evaluate(MODEL, **options, lm_eval_tasks=["smaller"], lm_eval_include_path=tasks)
    found = report.models[0].lm_eval["smaller"]
    assert found["acc,none"] == pytest.approx(accuracy())
    assert 0 < found["acc,none"] < 1


def test_an_unknown_task_is_named_before_anything_is_measured(tasks, tmp_path):
    with pytest.raises(ValueError, match="no task 'larger'"):
        evaluate(MODEL, out=tmp_path / "out", lm_eval_tasks=["larger"], lm_eval_include_path=tasks)
    assert not (tmp_path / "out").exists()


def test_attribute_runs_a_task_in_every_state(tasks, tmp_path):
    report = attribute(
        *load_demo_model(),
        out=tmp_path / "out",
        families=["ranks"],
        ranks=["6:16"],
        target_modules=["o_proj"],
        num_requests=2,
        num_safety_samples=8,
        num_utility_samples=8,
        num_held_out=4,
        max_new_tokens=4,
        lm_eval_tasks=["smaller"],
        lm_eval_include_path=tasks,
        progress=False,
    )
    assert report.unchanged.lm_eval["smaller"]["acc,none"] == pytest.approx(accuracy())
    assert len(report.results) == 3  # as it is, without the directions, and without as many at random
    assert all("acc,none" in result.lm_eval["smaller"] for result in report.results.values())
