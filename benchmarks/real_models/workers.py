"""Several processes side by side on one device, each with one model at a time; this one gives them jobs and writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..runs import Run, versions
from .jobs import Job
from .material import Material
from .methods import METHODS
from .results import Results
from .settings import Setup

REPORT_SECONDS = 15.0
ATTEMPTS = 3
"""Of a job that runs out of memory, or whose process dies."""
LOOK_AHEAD = 6
"""A worker keeps its model where one of so many next jobs is of it."""

USABLE_MEMORY = 0.9
_OWN_BYTES = 2.4e9
"""Of a process beside weights and activations: the context, kernels, the logits of a batch's response tokens."""
_ANSWERING_BYTES = 2.5e9
_LONG, _SHORT = 2048, 1000
"""Tokens of a batch of 8 rows, at the most."""

_ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Size:
    """What a model needs of a device's memory."""

    weights: float
    per_token: float
    """Of activations that the backward pass needs, with adapters on q and v."""
    per_token_of_all: float
    """With adapters on all linear layers, which keep their inputs in float32."""

    @classmethod
    def of(cls, folder: Path) -> Size:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        few = layers * (20 * hidden + 6 * inner)
        return cls(
            weights=float(sum(file.stat().st_size for file in folder.glob("*.safetensors"))),
            per_token=few,
            per_token_of_all=few + layers * (24 * hidden + 4 * inner),
        )

    def needed_by(self, job: Job) -> float:
        tokens = _SHORT if job.task in ("sure", "identity", "definitions") else _LONG
        activations = tokens * (self.per_token_of_all if job.targets == "all-linear" else self.per_token)
        return self.weights + _OWN_BYTES + max(activations, _ANSWERING_BYTES)


@dataclass(eq=False)
class Worker:
    process: Any
    connection: Connection
    job: Job | None = None
    model: str = ""
    """That it has loaded."""
    bytes: float = 0.0
    """That it is taken to need."""
    started: float = 0.0


@dataclass
class Queue:
    """What is left to do, in order, and what has become of the rest."""

    setup: Setup
    results: Results
    waiting: list[Job]
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    """Run -> step -> size of its update."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """What was done -> how long each took."""

    def __post_init__(self) -> None:
        for point in self.results.points():
            self.note(point)
        for job in list(self.waiting):
            made = job.output(self.setup)
            steps = set(job.steps(self.setup))
            if made.exists() if made is not None else set(self.norms.get(job.name, {})) >= steps:
                self.waiting.remove(job)
                self.done.add(job.name)

    def note(self, point: Run) -> None:
        self.norms.setdefault(point["job"], {})[point["step"]] = point["norm"]

    def ready(self) -> list[Job]:
        """Those that can start, in order; what needs something that failed, fails."""
        for job in list(self.waiting):
            if broken := [name for name in job.needs if name in self.failed]:
                self.waiting.remove(job)
                self.fail(job, f"it needs {broken[0]}, which failed")
        return [job for job in self.waiting if self.done.issuperset(job.needs)]

    def fail(self, job: Job, error: str) -> None:
        self.failed.add(job.name)
        self.results.add_error(job.name, error)
        print(f"FAILED {job.name}: {error.strip().splitlines()[-1]}", flush=True)

    def finish(self, job: Job, seconds: float) -> None:
        self.done.add(job.name)
        kind = f"{job.model} {job.task or job.kind} {job.targets}"
        self.seconds.setdefault(kind, []).append(seconds)


class Pool:
    """
    The workers and the queue.

    Args:
        jobs: In the order of their priority; what is done is left out.
        num_workers: Processes at the most; fewer run where the device's memory does not hold their jobs.
    """

    def __init__(self, setup: Setup, results: Results, jobs: Sequence[Job], num_workers: int) -> None:
        self.setup = setup
        self.results = results
        self.queue = Queue(setup, results, list(jobs))
        self.total = len(self.queue.waiting)
        self.sizes = {model: Size.of(Path(folder)) for model, folder in setup.models.items()}
        self.memory = float("inf")
        self.attempts: dict[str, int] = {}
        self.versions = versions()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # of the processes, before they import anything
        self.workers = [self._start() for _ in range(min(num_workers, self.total))]

    def run(self, deadline: float) -> bool:
        """
        Work until all is done, or until so many seconds have passed: then the workers are ended, wherever they are.

        Returns:
            Whether all is done.
        """
        started = last_report = time.monotonic()
        print(f"{self.total} jobs to do, {len(self.queue.done)} done before", flush=True)
        try:
            while (self.queue.waiting or self._busy()) and time.monotonic() - started < deadline:
                self._give_jobs()
                if not self._busy():
                    self._give_up()
                    break
                self._take_messages()
                if time.monotonic() - last_report > REPORT_SECONDS:
                    last_report = time.monotonic()
                    self._tell(last_report - started)
        finally:
            self._end_workers()
        self._tell(time.monotonic() - started)
        for kind, of_kind in self.queue.seconds.items():
            print(f"  {kind}: {len(of_kind)} jobs, {sum(of_kind) / len(of_kind):.0f} s each", flush=True)
        return len(self.queue.done) >= self.total and not self.queue.failed

    def _end_workers(self) -> None:
        for worker in self.workers:
            worker.connection.close()  # who waits for a job ends by that
        for worker in self.workers:
            worker.process.join(0 if worker.job is not None else 2)
            worker.process.kill()

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.setup), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _give_jobs(self) -> None:
        ready = self.queue.ready()
        for worker in self.workers:
            if worker.job is not None:
                continue
            room = self.memory - sum(other.bytes for other in self.workers if other is not worker)
            fitting = [job for job in ready if self.sizes[job.model].needed_by(job) <= room]
            if not fitting and not self._busy():
                fitting = ready  # there will not be more room
            if not fitting:
                continue
            job = next((job for job in fitting[:LOOK_AHEAD] if job.model == worker.model), fitting[0])
            ready.remove(job)
            self.queue.waiting.remove(job)
            scaled_to = job.kind == "train" and METHODS[job.method].norm_of is not None
            worker.job, worker.model, worker.started = job, job.model, time.monotonic()
            worker.bytes = self.sizes[job.model].needed_by(job)
            worker.connection.send((job, self.queue.norms.get(job.needs[-1], {}) if scaled_to else {}))

    def _give_up(self) -> None:
        """Nothing runs, and nothing can start."""
        for job in list(self.queue.waiting):
            missing = set(job.needs) - self.queue.done
            self.queue.waiting.remove(job)
            self.queue.fail(job, f"it needs {', '.join(sorted(missing))}, which is not among the jobs")

    def _take_messages(self) -> None:
        by_connection: dict[Any, Worker] = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection), timeout=1.0):
            worker = by_connection[connection]
            try:
                self._take(worker, *worker.connection.recv())
            except (EOFError, ConnectionError, OSError):
                worker.process.join(5)
                self._again(worker, f"the process ended with {worker.process.exitcode}")
                self.workers[self.workers.index(worker)] = self._start()

    def _take(self, worker: Worker, kind: str, *content: Any) -> None:
        job = worker.job
        if kind == "memory":
            self.memory = USABLE_MEMORY * content[0]
        elif job is None:
            return
        elif kind == "point":
            point, answers = content
            line = {"job": job.name, **job.record, **point, "versions": self.versions}
            self.results.add_point(line, answers)
            self.queue.note(line)
        elif kind == "again":
            self._again(worker, content[0])
        else:
            worker.job, worker.bytes = None, self.sizes[job.model].weights + _OWN_BYTES
            if kind == "done":
                self.queue.finish(job, time.monotonic() - worker.started)
            else:
                self.queue.fail(job, content[0])

    def _again(self, worker: Worker, error: str) -> None:
        """Put a job back to the front, a few times."""
        job, worker.job = worker.job, None
        if job is None:
            return
        self.attempts[job.name] = self.attempts.get(job.name, 0) + 1
        if self.attempts[job.name] < ATTEMPTS:
            print(f"again: {job.name}: {error.strip().splitlines()[-1]}", flush=True)
            self.queue.waiting.insert(0, job)
        else:
            self.queue.fail(job, error)

    def _tell(self, seconds: float) -> None:
        running = ", ".join(worker.job.name for worker in self._busy() if worker.job is not None)
        print(
            f"[{seconds:.0f} s] {len(self.queue.waiting)} of {self.total} jobs wait, {len(self.queue.failed)} failed; "
            f"running: {running or 'nothing'}",
            flush=True,
        )


def work(connection: Connection, setup: Setup) -> None:
    """One process: jobs come through the connection, and points, "done" or an error go back."""
    import torch
    import transformers

    from .training import do

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if setup.device == "cuda":
        # Kernels of cuDNN gave NaN gradients on padded bf16 batches (torch 2.11, H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
        connection.send(("memory", float(torch.cuda.get_device_properties(0).total_memory)))
    name, model, materials = "", None, {model: Material(setup, model) for model in setup.models}
    while True:
        try:
            job, norms = connection.recv()
        except EOFError:
            return
        try:
            if job.model != name:
                model, name = None, job.model
                _free_memory(setup)
                model = load(setup, name)
            do(job, model, materials[name], lambda *point: connection.send(("point", *point)), norms)
            connection.send(("done",))
        except torch.cuda.OutOfMemoryError as error:
            model, name = None, ""  # it may carry a half-made adapter
            connection.send(("again", f"{type(error).__name__}: {error}"))
            time.sleep(5)
        except Exception as error:
            traceback.print_exc()
            model, name = None, ""
            connection.send(("failed", "".join(traceback.format_exception(error))))
        _free_memory(setup)


def load(setup: Setup, model: str) -> Any:
    """The base model of a run."""
    from transformers import AutoModelForCausalLM

    dtype = setup.dtype or ("bfloat16" if setup.device == "cuda" else "float32")
    loaded: Any = AutoModelForCausalLM.from_pretrained(setup.models[model], dtype=dtype)
    return loaded.to(setup.device).eval().requires_grad_(False)


def _free_memory(setup: Setup) -> None:
    if setup.device == "cuda":
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()
