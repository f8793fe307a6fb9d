"""What is predicted without training: how strongly an adapter would react to harmful requests that were not seen."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salora_plugins.options import Positions
from salora_plugins.prompts.builtin import builtin_prompts

from ..small_model import RANK, load, request_sets
from .directions import DIRECTIONS, Grams, input_grams, strongest
from .experiment import Experiment
from .tasks import TokenRow, assistant, harmful_rows, harmless_rows, task_rows, tokenized, user

POSITIONS: tuple[Positions, ...] = ("response", "predicting", "all", "prompt")
RANKS = (4, 16, 32, 64, 128, 256)
TASKS, SOURCES = ("sure", "math"), ("advbench", "builtin")


@dataclass(frozen=True)
class Layers:
    """The layers of a model that are looked at."""

    experiment: Experiment
    model: Any
    names: list[str]

    def grams(self, rows: Sequence[TokenRow], positions: Positions) -> Grams:
        return input_grams(self.model, self.names, rows, positions)

    def reacting_grams(self, requests: Sequence[str]) -> Grams:
        """Of the last tokens of the requests, where it is decided whether to refuse."""
        return self.grams([self.last_prompt_tokens(request) for request in requests], "response")

    def last_prompt_tokens(self, request: str, count: int = 4) -> TokenRow:
        """The rendered request with labels on its last tokens, those of the generation prompt."""
        tokenizer = self.experiment.tokenizer
        ids = list(tokenizer.apply_chat_template([user(request)], add_generation_prompt=True, return_dict=False))
        return {"input_ids": ids, "labels": [-100] * (len(ids) - count) + ids[-count:]}


def leak(experiment: Experiment) -> None:
    """
    Print how strongly adapters would react to harmful requests of other sources, as the input side's calibration
    lets them (see `reaction`): by directions, positions and rank, then by hazard categories.
    """
    model = load(experiment.model).eval()
    # v_proj has the same inputs; every third layer, since it is a mean over layers
    layers = Layers(experiment, model, [name for name, _ in model.named_modules() if name.endswith("q_proj")][::3])
    sets = request_sets(experiment.data)
    unseen = {source: layers.reacting_grams(sets[source]) for source in SOURCES}
    for task in TASKS:
        unseen[task] = layers.grams(tokenized(experiment, task_rows(experiment, task, "test")), "response")
    by_directions(layers, unseen)
    print()
    by_categories(layers, unseen["math"], unseen["advbench"])


def by_directions(layers: Layers, unseen: dict[str, Grams]) -> None:
    """For the ways to choose directions, from the built-in requests and everyday ones."""
    rows = {"harmful": harmful_rows(layers.experiment, "builtin"), "harmless": harmless_rows(layers.experiment)}
    seen = {(kind, at): layers.grams(of_kind, at) for kind, of_kind in rows.items() for at in POSITIONS}
    columns = ["directions", "positions", "r_in"]
    columns += [f"{task}: {what}" for task in TASKS for what in (*SOURCES, "energy left")]
    print_header(columns)
    for (kind, find), at, rank in itertools.product(DIRECTIONS.items(), POSITIONS, RANKS):
        harmful, harmless = seen["harmful", at], seen["harmless", at]
        bases = {name: find(harmful[name], harmless[name], rank) for name in layers.names}
        cells = [cell for task in TASKS for cell in reaction(bases, unseen[task], *(unseen[s] for s in SOURCES))]
        print_row([kind, at, rank], cells)


def by_categories(layers: Layers, task: Grams, advbench: Grams) -> None:
    """The same for 14 requests of two hazard categories and for 14 of all; means over seven choices of each."""
    calibration, evaluation = (prompts_by_category(split) for split in ("calibration", "evaluation"))
    categories = list(calibration)
    pairs = [categories[start : start + 2] for start in range(0, len(categories), 2)]
    few = [[p for name in pair for p in calibration[name][: len(pairs)]] for pair in pairs]
    spread = [[calibration[name][number] for name in categories] for number in range(len(pairs))]
    everything = [[p for given in calibration.values() for p in given]]
    of_category = {name: layers.reacting_grams(given) for name, given in evaluation.items()}
    print_header(["calibrated on", "r_in", "its categories", "other categories", "AdvBench", "energy left"])
    for label, choices in (
        ("two categories", few),
        ("all", spread),
        (f"all, {len(everything[0])} requests", everything),
    ):
        cells: dict[int, list[list[float]]] = {rank: [] for rank in RANKS}
        for choice, pair in zip(choices, pairs, strict=False):
            same, other = (
                {
                    layer: total(
                        of_category[category][layer] for category in categories if (category in pair) == inside
                    )
                    for layer in layers.names
                }
                for inside in (True, False)
            )
            rows = [{"prompt": [user(prompt)], "completion": [assistant("No.")]} for prompt in choice]
            seen = layers.grams(tokenized(layers.experiment, rows), "prompt")
            for rank in RANKS:
                bases = {name: strongest(seen[name], None, rank) for name in layers.names}
                cells[rank].append(reaction(bases, task, same, other, advbench))
        for rank, values in cells.items():
            print_row([label, rank], [statistics.geometric_mean(column) for column in zip(*values, strict=True)])


def total(grams: Iterable[Tensor]) -> Tensor:
    return sum(grams, start=torch.zeros((), dtype=torch.float64))


def prompts_by_category(split: str) -> dict[str, list[str]]:
    by_category: dict[str, list[str]] = {}
    for row in builtin_prompts(split):
        if "prompt" in row:
            by_category.setdefault(row["category"], []).append(row["prompt"])
    return by_category


def reaction(bases: Grams, of_task: Grams, *requests: Grams) -> list[float]:
    """
    For an adapter whose A takes the 16 strongest directions of the task's response tokens that `bases` leave: how it
    reacts to each set of requests over how it does to the task, then what is left of the task's energy. Squared norms
    with every set's total energy as the unit; geometric means over the layers.
    """
    measured = []
    for name, basis in bases.items():
        task, *others = (grams[name] / grams[name].trace() for grams in (of_task, *requests))
        outside = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) - basis @ basis.T
        left = outside @ task @ outside
        filters = torch.linalg.eigh(left).eigenvectors[:, -RANK:]
        reactions = torch.stack([(filters.T @ gram @ filters).trace() for gram in (task, *others)])
        measured.append(torch.stack([*(reactions[1:] / reactions[0]), left.trace()]))
    return torch.stack(measured).log().mean(0).exp().tolist()


def print_header(columns: Sequence[str]) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def print_row(labels: Sequence[object], numbers: Sequence[float]) -> None:
    print("| " + " | ".join([*map(str, labels), *(f"{number:.3f}" for number in numbers)]) + " |", flush=True)
