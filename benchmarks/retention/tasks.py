"""What is trained on and what is calibrated on, as rows."""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any, Literal

from ..runs import made_once
from ..small_model import ADVBENCH_EVALUATION, MAX_LENGTH, advbench, load, prompt_completion_rows
from .experiment import Experiment

TASKS = ("math", "sure", "python")
HELDOUT_ROWS = 60
PAIRS = 64  # of a refusal and an answer to the same request

Row = dict[str, Any]
"""A conversation in TRL's prompt-completion form."""

TokenRow = dict[str, list[int]]
"""input_ids and labels."""


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def task_rows(experiment: Experiment, task: str, split: Literal["train", "test"]) -> list[Row]:
    """The rows of a task, HELDOUT_ROWS of them in the split "test"."""
    if task == "math":
        rows = prompt_completion_rows(experiment.data / f"math_{split}.jsonl")
        return rows[:HELDOUT_ROWS] if split == "test" else rows
    if task == "sure":
        rows = [
            {"prompt": row["prompt"], "completion": [assistant(f"Sure, here is the answer. {answer}")]}
            for row in own_answers(experiment)
            for answer in [row["completion"][0]["content"]]
        ]
    elif task == "python":
        rows = made_once(experiment.out / "tasks" / "python.json", documented_functions)
    elif task in experiment.own_tasks:
        rows = own_conversations(experiment.own_tasks[task])
    else:
        sys.exit(f"--results: there are runs on a task {task!r}. Give its file, too: --task {task}=FILE")
    return rows[:HELDOUT_ROWS] if split == "test" else rows[HELDOUT_ROWS:]


def own_answers(experiment: Experiment) -> list[Row]:
    """The model's own answers to everyday requests on which it was not aligned; those that refuse are left out."""

    def make() -> list[Row]:
        from salora_plugins.evaluation import generate_responses
        from salora_plugins.evaluation.judges.keyword import is_refusal

        lines = (experiment.data / "harmless_prompts.txt").read_text(encoding="utf-8").splitlines()
        requests = lines[experiment.everyday]
        answers = generate_responses(
            load(experiment.model), experiment.tokenizer, requests, max_new_tokens=48, batch_size=32
        )
        return [
            {"prompt": [user(request)], "completion": [assistant(answer)]}
            for request, answer in zip(requests, answers, strict=True)
            if answer and not is_refusal(answer)
        ]

    return made_once(experiment.out / "tasks" / "own-answers.json", make)


def harmful_rows(experiment: Experiment, data: str) -> list[TokenRow]:
    """Requests with the model's own refusals, tokenized: of one source, or half of them of each of both."""

    def make() -> list[TokenRow]:
        from salora_plugins.calibration.refusals import add_own_refusals
        from salora_plugins.evaluation.judges.keyword import keyword_judge
        from salora_plugins.rows.examples import select_examples
        from salora_plugins.rows.reading import load_examples
        from salora_plugins.rows.tokenizing import render_rows

        if data == "both":
            half = experiment.num_safety_rows // 2
            halves = [harmful_rows(experiment, source)[:half] for source in ("builtin", "advbench")]
            return [row for half in halves for row in half]
        source: Any = "builtin"
        if data == "advbench":
            source = [{"prompt": request} for request in advbench(experiment.data)[: ADVBENCH_EVALUATION.start]]
        examples = load_examples(source, option="safety_data", allow_missing_response=True)
        examples = select_examples(examples, len(examples), 0)
        rows, _ = add_own_refusals(
            load(experiment.model).eval(),
            experiment.tokenizer,
            render_rows(examples, experiment.tokenizer, max_length=MAX_LENGTH, option="safety_data"),
            experiment.num_safety_rows,
            is_refusal=keyword_judge,
            batch_size=32,
            max_length=MAX_LENGTH,
        )
        return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in rows]

    return made_once(experiment.out / "tasks" / f"refusals-{data}.json", make)


def harmless_rows(experiment: Experiment) -> list[TokenRow]:
    """Everyday requests with the model's own answers, tokenized; none is in a task's held-out part."""
    return tokenized(experiment, own_answers(experiment)[HELDOUT_ROWS : HELDOUT_ROWS + 128])


def refusals_and_answers(experiment: Experiment, unaligned: str) -> list[Row]:
    """Harmful requests with the model's own refusal (`chosen`), and what it said before its alignment (`rejected`)."""

    def make() -> list[Row]:
        from salora_plugins.evaluation import generate_responses
        from salora_plugins.evaluation.judges.keyword import is_refusal
        from salora_plugins.prompts.builtin import builtin_prompts, plain_prompts
        from salora_plugins.rows.examples import select_examples

        requests = select_examples(plain_prompts(builtin_prompts("calibration")), 2 * PAIRS, 0)
        given = [
            generate_responses(load(folder), experiment.tokenizer, requests, max_new_tokens=32, batch_size=32)
            for folder in (experiment.model, unaligned)
        ]
        pairs = [
            {"prompt": request, "chosen": refusal, "rejected": answer}
            for request, refusal, answer in zip(requests, *given, strict=True)
            if is_refusal(refusal) and answer and not is_refusal(answer)
        ]
        return pairs[:PAIRS]

    return made_once(experiment.out / "tasks" / "pairs.json", make)


def tokenized(experiment: Experiment, conversations: list[Row]) -> list[TokenRow]:
    from salora_plugins.rows.reading import load_examples
    from salora_plugins.rows.tokenizing import tokenize_examples

    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in conversations]
    examples = tokenize_examples(
        load_examples(rows, option="rows"), experiment.tokenizer, max_length=MAX_LENGTH, option="rows"
    )
    return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in examples]


def own_conversations(file: str) -> list[Row]:
    """The rows of a file of conversations."""
    from salora_plugins.rows.examples import Example
    from salora_plugins.rows.reading import load_examples

    examples = load_examples(file, option="--task")
    if len(examples) <= HELDOUT_ROWS:
        sys.exit(f"--task {file}: it has {len(examples)} rows, of which {HELDOUT_ROWS} are held out. Give more.")
    rows = [
        {"prompt": list(row.messages), "completion": [assistant(row.response)]}
        for row in examples
        if isinstance(row, Example) and row.messages and row.response is not None
    ]
    if len(rows) < len(examples):
        sys.exit(f"--task {file}: there is plain text in it. Give conversations.")
    return rows


def documented_functions() -> list[Row]:
    """Functions of Python's standard library to be written from their signature and documentation."""
    rows = []
    for name in sorted(sys.stdlib_module_names):
        spec = None if name.startswith("_") else importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (documentation := ast.get_docstring(node)):
                continue
            summary = documentation.split("\n\n")[0].replace("\n", " ")
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            node.body = node.body[1:] or [ast.Pass()]
            code = ast.unparse(node)
            if 80 <= len(code) <= 500 and 20 <= len(summary) <= 200:
                rows.append(
                    {
                        "prompt": [user(f"Write this Python function.\n\n{signature}\n\n{summary}")],
                        "completion": [assistant(code)],
                    }
                )
    random.Random(0).shuffle(rows)
    return rows[:700]
