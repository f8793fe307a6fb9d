"""What is measured of a model: its held-out loss on a task, and which requests it refuses."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel

from salora_plugins.evaluation import generate_responses, response_loss
from salora_plugins.evaluation.coherence import coherence
from salora_plugins.evaluation.first_tokens import refusal_margins as margins
from salora_plugins.evaluation.judges.keyword import is_refusal
from salora_plugins.evaluation.request_sets import load_requests

from ..runs import Run, read_json, write_json
from ..small_model import RESPONSE_TOKENS, load
from .adapters import changed_afterwards
from .experiment import SAME_LOSS, Experiment, Results
from .methods import METHODS
from .tasks import task_rows

MARGIN_REQUESTS = 16  # of each set, or a quarter of what is asked: margins take longer than answers


def heldout_loss(experiment: Experiment, model: Any, task: str) -> float:
    return response_loss(model, experiment.tokenizer, task_rows(experiment, task, "test"), batch_size=16)


def refusals(experiment: Experiment, model: Any, answers: Path, sets: dict[str, list[str]]) -> Run:
    """Refused requests, broken answers and the mean refusal margin by set, the answers going to a file."""
    tokenizer = experiment.tokenizer
    requests = [request for of_set in sets.values() for request in of_set]
    responses = iter(
        generate_responses(model, tokenizer, requests, max_new_tokens=RESPONSE_TOKENS, batch_size=64, progress=False)
    )
    most = MARGIN_REQUESTS if experiment.num_requests is None else max(1, experiment.num_requests // 4)
    given = {name: [next(responses) for _ in of_set] for name, of_set in sets.items()}
    write_json(answers, given)
    return {
        "refused": {
            name: sum(is_refusal(text) and coherence(text, None) == "coherent" for text in of_set)
            for name, of_set in given.items()
        },
        "broken": {name: sum(coherence(text, None) != "coherent" for text in of_set) for name, of_set in given.items()},
        "margin": {
            name: round(margins(model, tokenizer, of_set[:most], batch_size=32).mean().item(), 3)
            for name, of_set in sets.items()
        },
        "requests": {name: len(of_set) for name, of_set in sets.items()},
    }


def measured_point(experiment: Experiment, model: Any, name: str, task: str, step: int) -> Run:
    """A point of a run: held-out loss, and what is made of the requests; the answers are kept."""
    answers = experiment.out / "answers" / name / f"step{step}.json"
    point = {"step": step, "loss": heldout_loss(experiment, model, task)}
    return point | refusals(experiment, model, answers, experiment.request_sets())


def measure_base(experiment: Experiment, results: Results, tasks: list[str]) -> None:
    """Complete base.json; exits where it is of another model, whose runs these would be mixed with."""
    path = results.base_path
    known = read_json(path) if path.exists() else {"loss": {}}
    before = copy.deepcopy(known)
    model = load(experiment.model)
    for task, loss in list(known["loss"].items())[:1]:
        if abs(heldout_loss(experiment, model, task) - loss) > SAME_LOSS:
            sys.exit(f"--results: {path} is of another model or of other data: its loss on {task} is {loss:.4f}")
    for task in tasks:
        if task not in known["loss"]:
            known["loss"][task] = heldout_loss(experiment, model, task)
    if "refused" not in known:
        answers = experiment.out / "answers" / "base.json"
        known |= refusals(experiment, model, answers, experiment.request_sets())
    if known != before:
        write_json(path, known)


def measure_requests(experiment: Experiment, results: Results, files: dict[str, str], num: int | None) -> None:
    """Add what the base model and the kept adapters make of the requests to their results."""
    sets = {
        name: [request.prompt for request in load_requests(file, option="harmful", num=num)]
        for name, file in files.items()
    }
    measure_base(experiment, results, [])
    base = results.base()
    if missing := _not_asked("base", base, sets):
        found = refusals(experiment, load(experiment.model), _answers(experiment, "base"), missing)
        _add(base, found)
        write_json(results.base_path, base)
        print(f"base: {found['refused']}", flush=True)
    for name, run in results.runs().items():
        if missing := _not_asked(name, run["points"][-1], sets):
            _measure_kept_adapter(experiment, results, name, run, missing)


def _not_asked(name: str, point: Run, sets: dict[str, list[str]]) -> dict[str, list[str]]:
    missing = {set_name: of_set for set_name, of_set in sets.items() if set_name not in point["requests"]}
    if not missing:
        print(f"{name}: was asked all of these before", flush=True)
    return missing


def _measure_kept_adapter(
    experiment: Experiment, results: Results, name: str, run: Run, sets: dict[str, list[str]]
) -> None:
    """The requests of `sets`, asked of the adapter that a run has left, if it is still there."""
    adapter, point = experiment.out / "adapters" / name, run["points"][-1]
    if not adapter.exists():
        print(f"{name}: left alone, since its adapter is not in {adapter.parent}", flush=True)
        return
    model = PeftModel.from_pretrained(load(experiment.model), adapter)
    with changed_afterwards(model, METHODS[run["method"]]):
        if abs(heldout_loss(experiment, model, run["task"]) - point["loss"]) > SAME_LOSS:
            print(f"{name}: left alone, since {adapter} is of another run", flush=True)
            return
        found = refusals(experiment, model, _answers(experiment, name), sets)
    _add(point, found)
    results.write(name, run)
    print(f"{name}: {found['refused']}", flush=True)


def _answers(experiment: Experiment, name: str) -> Path:
    return experiment.out / "answers" / name / "requests.json"


def _add(point: Run, found: Run) -> None:
    """Further request sets to what was measured at a point."""
    for kind, of_sets in found.items():
        point[kind] |= of_sets
