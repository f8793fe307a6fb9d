"""What an evaluation measures on its models: answers and numbers, on disk as soon as they are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .coherence import response_perplexities
from .evaluated_models import EvaluatedModel, Loader, ModelLoader, check_fits
from .first_tokens import FirstTokenReference, first_token_kl, first_token_reference, refusal_margins
from .generation import generate_responses
from .lm_eval_tasks import run_lm_eval
from .metrics import response_loss
from .plan import EvaluationPlan, HeldOutTask
from .reports.report import SetName
from .run_folder import KL, MARGINS, PERPLEXITIES, Entry, PerRequest, RunFolder, responses_entry


def measure(
    plan: EvaluationPlan, folder: RunFolder, *, loader: ModelLoader | None = None, progress: bool = True
) -> None:
    """
    Measure what is not in the folder yet, with one model in memory at a time.

    Args:
        plan: What is measured on which models.
        folder: Where it is kept.
        loader: Gives the models; None: from where the plan says that they lie.
        progress: Show progress bars.

    Raises:
        ValueError: An adapter does not fit the base model, or a model's outputs are not finite.
    """
    loader = loader or Loader(plan.base, plan.loading)
    measuring = _Measuring(plan, folder, loader, progress)
    for evaluated in plan.models:
        measuring.measure(evaluated)
    for evaluated in plan.models:
        measuring.measure_perplexities(evaluated)
    loader.release()


class _Measuring:
    """The measurements of one plan."""

    def __init__(self, plan: EvaluationPlan, folder: RunFolder, loader: ModelLoader, progress: bool) -> None:
        self._plan, self._folder, self._loader, self._progress = plan, folder, loader, progress
        self._prompts = plan.prompts
        self._batch_size = plan.measuring.batch_size
        self._references: dict[SetName, FirstTokenReference] = {}

    def measure(self, evaluated: EvaluatedModel) -> None:
        """Everything but the perplexities, for which the base model is needed."""
        name = evaluated.name
        missing = {
            entry: run for entry, run in self._measurements(evaluated).items() if self._folder.read(name, entry) is None
        }
        unanswered = any(len(self._folder.responses(name, of)) < len(asked) for of, asked in self._prompts.items())
        if not missing and not unanswered:
            return
        if KL in missing and evaluated.kind != "base":
            self._kl_references()  # before another model takes the base model's place in memory
        with self._loader.loaded(evaluated) as model:
            if evaluated.kind == "base":  # rather now than after hours
                for adapter in self._plan.models:
                    if adapter.kind == "adapter":
                        check_fits(adapter, model)
            if unanswered:
                self._answer(name, model)
            for entry, run in missing.items():
                value = run(model)
                _check_finite(value, evaluated)
                self._folder.write(name, entry, value)

    def measure_perplexities(self, evaluated: EvaluatedModel) -> None:
        """Of a model's answers, under the base model."""
        if self._folder.read(evaluated.name, PERPLEXITIES) is not None:
            return
        values: dict[str, list[float | None]] = {}
        for of_set, asked in self._prompts.items():
            responses = self._folder.responses(evaluated.name, of_set)
            values[of_set] = response_perplexities(
                self._loader.base,
                self._plan.tokenizer,
                asked,
                [responses[index] for index in range(len(asked))],
                batch_size=self._batch_size,
            )
        self._folder.write(evaluated.name, PERPLEXITIES, values)

    def _measurements(self, evaluated: EvaluatedModel) -> dict[Entry[Any], Callable[[nn.Module], Any]]:
        """What is to be measured of a model besides its answers, and how."""
        plan = self._plan
        found: dict[Entry[Any], Callable[[nn.Module], Any]] = {
            MARGINS: self._margins,
            KL: self._no_kl if evaluated.kind == "base" else self._kl,
        }
        if plan.task is not None:
            found[plan.task.entry] = partial(self._task_loss, plan.task)
        for task in plan.lm_eval.tasks:
            found[plan.lm_eval_entry(task)] = partial(self._lm_eval, task)
        return found

    def _kl_references(self) -> dict[SetName, FirstTokenReference]:
        """The base model's side of the KL divergences; the first call loads it."""
        if not self._references:
            self._references = {
                of_set: first_token_reference(
                    self._loader.base,
                    self._plan.tokenizer,
                    asked,
                    num_tokens=self._plan.measuring.kl_tokens,
                    batch_size=self._batch_size,
                )
                for of_set, asked in self._prompts.items()
            }
        return self._references

    def _answer(self, name: str, model: nn.Module) -> None:
        tokenizer, batch_size = self._plan.tokenizer, self._batch_size
        total = sum(map(len, self._prompts.values()))
        with tqdm(total=total, desc=f"{name}: answers", unit="request", disable=not self._progress) as bar:
            for of_set, asked in self._prompts.items():
                done = self._folder.responses(name, of_set)
                bar.update(len(done))
                # Batches are written whole and in the order of their lengths, so that what remains is batched as
                # without an interruption.
                texts = [request.prompt for request in self._plan.requests[of_set]]
                lengths = [len(tokens) for tokens in tokenizer(texts)["input_ids"]]
                order = sorted((i for i in range(len(asked)) if i not in done), key=lambda i: lengths[i])
                lines = self._folder.lines(name, responses_entry(of_set))
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    responses = generate_responses(
                        model,
                        tokenizer,
                        [asked[index] for index in chosen],
                        max_new_tokens=self._plan.measuring.max_new_tokens,
                        batch_size=batch_size,
                        progress=False,
                    )
                    lines.add(list(zip(chosen, responses, strict=True)))
                    bar.update(len(chosen))

    def _margins(self, model: nn.Module) -> PerRequest:
        return {
            of_set: refusal_margins(model, self._plan.tokenizer, asked, batch_size=self._batch_size).tolist()
            for of_set, asked in self._prompts.items()
        }

    def _kl(self, model: nn.Module) -> PerRequest:
        return {
            of_set: first_token_kl(model, reference, batch_size=self._batch_size).tolist()
            for of_set, reference in self._kl_references().items()
        }

    def _no_kl(self, model: nn.Module) -> PerRequest:
        """The base model's, from itself."""
        return {of_set: [0.0] * len(asked) for of_set, asked in self._prompts.items()}

    def _task_loss(self, task: HeldOutTask, model: nn.Module) -> float:
        return response_loss(model, self._plan.tokenizer, task.rows, self._batch_size)

    def _lm_eval(self, task: str, model: nn.Module) -> dict[str, dict[str, float]]:
        return run_lm_eval(
            model,
            self._plan.tokenizer,
            task,
            limit=self._plan.lm_eval.limit,
            include_path=self._plan.lm_eval.include_path,
            batch_size=self._batch_size,
            seed=self._plan.seed,
        )


def _check_finite(value: Any, evaluated: EvaluatedModel) -> None:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_finite(part, evaluated)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{evaluated.name}={evaluated.source}: its outputs are not finite numbers, so that nothing can be measured."
            " Its weights are damaged, or too large for the dtype: try dtype='float32' (--dtype), or leave it out."
        )
