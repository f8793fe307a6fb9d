"""One run after the other: train an adapter and measure it on the way."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from ..runs import Run, versions
from ..small_model import load, sft_options, step_losses
from .adapters import cap_norms, changed_afterwards, peft_config, write_repaired
from .experiment import Experiment, Results
from .measures import measure_base, measured_point
from .methods import METHODS
from .tasks import task_rows


def run_all(
    experiment: Experiment,
    results: Results,
    methods: list[str],
    tasks: list[str],
    rates: list[float],
    seeds: list[int],
    steps: list[int],
) -> None:
    """Train and measure what is not among the results yet."""
    measure_base(experiment, results, tasks)
    known = results.runs()
    for seed, rate, task, method in itertools.product(seeds, rates, tasks, methods):
        name = run_name(task, method, rate, seed)
        repairs = METHODS[method].repair is not None
        if name in known and ("train_loss" in known[name] or repairs):
            measured = {point["step"] for point in known[name]["points"]}
            if ({max(steps)} if repairs else set(steps)) <= measured:
                print(f"{name}: not run again, measured after {steps} steps", flush=True)
                continue
        run = {
            "task": task,
            "method": method,
            "options": METHODS[method].options,
            "learning_rate": rate,
            "seed": seed,
            "batch_size": experiment.batch_size,
            "safety_rows": experiment.num_safety_rows,
            "versions": versions(),
        }
        if repairs:
            repair(experiment, results, name, run, max(steps))
        else:
            train(experiment, results, name, run, steps)


def run_name(task: str, method: str, rate: float, seed: int) -> str:
    return f"{task}-{method}-lr{rate:g}-seed{seed}"


def repair(experiment: Experiment, results: Results, name: str, run: Run, step: int) -> None:
    """A run without training: the adapter that "lora" has left on the task is repaired, and measured."""
    started = time.monotonic()
    trained = run_name(run["task"], "lora", run["learning_rate"], run["seed"])
    source, repaired = (experiment.out / "adapters" / of for of in (trained, name))
    of_lora = results.runs().get(trained, {})
    if "train_loss" not in of_lora or not source.exists():
        sys.exit(f"--methods {run['method']}: there is no adapter of {trained} in {source.parent}. Run lora first.")
    if (last := of_lora["points"][-1]["step"]) != step:
        sys.exit(f"--methods {run['method']}: the adapter of {trained} is of step {last}. Give --steps {last}.")
    run["repair"] = write_repaired(experiment, METHODS[run["method"]], source, repaired)
    model = PeftModel.from_pretrained(load(experiment.model), repaired)
    run["points"] = [measured_point(experiment, model, name, run["task"], step)]
    run["minutes"] = round((time.monotonic() - started) / 60, 2)
    results.write(name, run)
    print(f"{name}: {run['points']}", flush=True)


@dataclass
class MeasureCallback(TrainerCallback):
    """Measures after some of the steps, and writes the run with what was measured so far."""

    experiment: Experiment
    results: Results
    name: str
    run: Run
    steps: list[int]
    points: list[dict[str, Any]] = field(default_factory=list)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step not in self.steps:
            return
        with changed_afterwards(model, METHODS[self.run["method"]]):
            point = measured_point(self.experiment, model, self.name, self.run["task"], state.global_step)
        self.points.append(point)
        self.results.write(self.name, self.run | {"points": self.points})
        print(f"{self.name}: {point}", flush=True)


@dataclass
class NormCapCallback(TrainerCallback):
    """Keeps the update small after every step."""

    cap: float

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        cap_norms(model, self.cap)


def train(experiment: Experiment, results: Results, name: str, run: Run, steps: list[int]) -> None:
    """One run, which adds to `run` and writes what was measured after each of the steps, and the training loss."""
    started = time.monotonic()
    method, seed = METHODS[run["method"]], run["seed"]
    measure = MeasureCallback(experiment, results, name, run, steps)
    # The cap comes first, so that what is measured is within it.
    callbacks = [*([NormCapCallback(method.norm_cap)] if method.norm_cap is not None else []), measure]
    set_seed(seed)
    trainer = SFTTrainer(
        model=load(experiment.model),
        args=SFTConfig(
            **sft_options(),
            output_dir=str(experiment.out / "trainer" / name),
            max_steps=max(steps),
            per_device_train_batch_size=experiment.batch_size,
            learning_rate=run["learning_rate"],
            # Constant, so that the points on the way are those of shorter runs, too.
            lr_scheduler_type="constant_with_warmup",
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(task_rows(experiment, run["task"], "train")),
        processing_class=experiment.tokenizer,
        peft_config=peft_config(experiment, method, seed),
        callbacks=callbacks,
    )
    trainer.train()
    trained: Any = trainer.model  # a PeftModel, which the trainer has made
    trained.save_pretrained(experiment.out / "adapters" / name)
    run |= {
        "points": measure.points,
        "train_loss": step_losses(trainer.state.log_history),
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    results.write(name, run)
