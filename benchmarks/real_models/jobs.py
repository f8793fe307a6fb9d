"""What there is to do, the most telling first, and what has to be there before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..runs import Run
from .material import TASKS
from .methods import METHODS, Calibration, Targets
from .settings import Setup

RATE = 1e-3
"""LoRA's learning rate on q and v, unless the setup has another for a model."""
RATE_OF_ALL_LINEAR = 0.2
"""Of that on q and v."""

MAIN = ("lora", "lora+replay", "paper", "default", "new", "header", "new+anchor", "new+replay", "lora+anchor")
FURTHER = ("new-64+anchor", "new+second-anchor", "paper+anchor", "new-leak", "broad", "constrained-sft")
ON_ALL_LINEAR = ("lora", "lora+replay", "default", "new", "header", "new+anchor")
NAMED = ("lora", "lora+replay", "lora+anchor", "default", "new", "new+anchor")
"""The methods that get all seeds."""
CONTROLS = ("random-directions", "lora-at-norm")


@dataclass(frozen=True)
class Job:
    """One piece of work of one worker: something made once for a model ("answers", "module"), or a run."""

    kind: str
    """"answers", "module", "base" or "train"."""
    model: str
    task: str = ""
    method: str = "base"
    targets: Targets = "qv"
    calibration: Calibration | None = None
    rate: float = 0.0
    seed: int = 0
    needs: tuple[str, ...] = ()
    """Names of the jobs whose results this one uses."""

    @property
    def name(self) -> str:
        if self.kind == "train":
            return f"{self.model}-{self.task}-{self.method}-{self.targets}-lr{self.rate:g}-seed{self.seed}"
        parts = [self.kind, self.model, self.task]
        if self.calibration is not None:
            parts += [self.calibration.name, self.targets]
        return "-".join(part for part in parts if part)

    @property
    def record(self) -> Run:
        """What stands in every line of its results."""
        if self.kind == "base":
            return {"model": self.model, "task": self.task, "method": "base"}
        return {
            "model": self.model,
            "task": self.task,
            "method": self.method,
            "targets": self.targets,
            "learning_rate": self.rate,
            "seed": self.seed,
        }

    def output(self, setup: Setup) -> Path | None:
        """The file that it makes; None: its results are lines."""
        if self.kind == "answers":
            return setup.folder(self.model) / "answers.json"
        return module_file(self, setup) if self.kind == "module" else None

    def steps(self, setup: Setup) -> tuple[int, ...]:
        return (0,) if self.kind == "base" else setup.scale.steps[:1] if self.task == "identity" else setup.scale.steps


def module_file(job: Job, setup: Setup) -> Path:
    """The safety module that a job makes or uses."""
    if job.calibration is None:
        raise ValueError(f"{job.name}: it has no calibration")
    return setup.folder(job.model) / f"{job.calibration.name}-{job.targets}.safetensors"


def all_jobs(setup: Setup, tasks: Iterable[str], methods: Iterable[str], targets: Iterable[str]) -> list[Job]:
    """Every job of a run, in the order of their priority; each after those that it needs."""
    chosen = {"tasks": set(tasks), "methods": set(methods), "targets": set(targets)}
    jobs: dict[str, Job] = {}
    for job in _wanted(setup):
        if job.task in chosen["tasks"] and job.method in chosen["methods"] and job.targets in chosen["targets"]:
            for needed in _with_needed(job):
                jobs.setdefault(needed.name, needed)
    return list(jobs.values())


def _wanted(setup: Setup) -> Iterator[Job]:
    """The runs, by priority: see benchmarks/README.md."""
    models = list(setup.models)
    others = [task for task in (*TASKS, *setup.task_files) if task not in ("sure", "math")]
    for task in ("sure", "math"):
        for model in models:
            yield from _runs(setup, model, task, MAIN)
    for model in models:
        yield from _runs(setup, model, "sure", ON_ALL_LINEAR, "all-linear")
    for model in models:
        yield from _runs(setup, model, "sure", FURTHER)
        yield from _runs(setup, model, "sure", CONTROLS)
    for model in models:
        yield from _runs(setup, model, "math", ON_ALL_LINEAR, "all-linear")
    for task in others:
        for model in models:
            yield from _runs(setup, model, task, NAMED)
    for task in ("sure", "math"):
        for model in models:
            yield from _rates(setup, model, task, "qv")
    for seed in range(1, setup.scale.seeds):
        for task in ("sure", "math"):
            for model in models:
                yield from _runs(setup, model, task, NAMED, seed=seed)
    for model in models:
        yield from _runs(setup, model, "math", FURTHER)
        yield from _runs(setup, model, "math", CONTROLS)
        yield from _rates(setup, model, "sure", "all-linear")
        yield from _rates(setup, model, "math", "all-linear")
        yield from _runs(setup, model, "sure", ("random-directions", "new-64+anchor"), "all-linear")
    for seed in range(1, setup.scale.seeds):
        for task in [task for task in others if task != "identity"]:
            for model in models:
                yield from _runs(setup, model, task, NAMED, seed=seed)


def _runs(
    setup: Setup, model: str, task: str, methods: Iterable[str], targets: Targets = "qv", seed: int = 0
) -> Iterator[Job]:
    for method in methods:
        yield _run(setup, model, task, method, targets, seed)


def _rates(setup: Setup, model: str, task: str, targets: Targets) -> Iterator[Job]:
    """LoRA at the other learning rates."""
    for multiple in setup.scale.tried:
        yield _run(setup, model, task, "lora", targets, 0, multiple)


def _run(setup: Setup, model: str, task: str, method: str, targets: Targets, seed: int, multiple: float = 1.0) -> Job:
    rate = setup.rates.get(model, RATE) * (RATE_OF_ALL_LINEAR if targets == "all-linear" else 1) * multiple
    rate = float(f"{rate:.6g}")
    return Job("train", model, task, method, targets, METHODS[method].calibration, rate, seed)


def _with_needed(job: Job) -> Iterator[Job]:
    """What comes before a run, and the run, which names it."""
    answers = Job("answers", job.model)
    yield answers
    needs = [answers.name]
    if job.calibration is not None:
        module = Job(
            "module", job.model, method="", targets=job.targets, calibration=job.calibration, needs=(answers.name,)
        )
        yield module
        needs.append(module.name)
    yield Job("base", job.model, job.task, needs=(answers.name,))
    if (other := METHODS[job.method].norm_of) is not None:
        needs.append(replace(job, method=other).name)
    yield replace(job, needs=tuple(needs))
