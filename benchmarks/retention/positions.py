"""
Which positions, how many requests and how many directions keep an adapter from reacting to unseen harmful requests: the
leak (`salora_plugins.calibration.leak`) of every variant, without training.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salora_plugins.activations.last_inputs import last_inputs
from salora_plugins.calibration.leak import energy_left, leak_of
from salora_plugins.prompts.builtin import builtin_prompts
from salora_plugins.rows.examples import Asked, Example, as_messages, select_examples
from salora_plugins.rows.headers import Headers
from salora_plugins.rows.tokenizing import render_prompts

from ..small_model import ADVBENCH_EVALUATION, advbench, load
from .experiment import Experiment
from .leak import print_header, print_row

KINDS = {"q/k/v": "q_proj", "o_proj": "o_proj", "gate/up": "gate_proj", "down_proj": "down_proj"}
"""What has one input -> one of the layers that read it."""
LAYERS = {"q/k/v": 1, "o_proj": 4, "gate/up": 4, "down_proj": 8}
"""Every so many layers of a kind are looked at."""
WEIGHTS = {"prompt": 1.0, "prompt, header x 10": 10.0, "prompt, header x 30": 30.0, "header": float("inf")}
"""Positions -> weight of the header against the request's text and what is before it."""
RANKS = (64, 128, 224, 256, 448, 1024)
EVERYDAY = slice(400, 528)
"""Lines of harmless_prompts.txt: every second one stands for the task, the others for what harmful ones are held to."""
UNSEEN = 128
"""Requests of the built-in evaluation split."""
BATCH = 16
_SMALL = 1024  # matrices of this size are decomposed as a whole

Prompt = list[int]


@dataclass(frozen=True)
class Sums:
    """Of a layer's inputs over some requests: sums of outer products, (d_in, d_in) float64."""

    text: Tensor
    """Of the tokens of the request and before it."""

    header: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.text + other.text, self.header + other.header)

    def weighted(self, weight: float) -> Tensor:
        return self.header if weight == float("inf") else self.text + weight * self.header


def positions(experiment: Experiment, more: Mapping[str, Sequence[str]]) -> None:
    """
    Print the leak by positions, requests and rank, for every kind of layer.

    Args:
        experiment: Its model and data.
        more: Name -> further requests to calibrate on.
    """
    model = load(experiment.model).eval()
    layers = {kind: names_of(model, end)[:: LAYERS[kind]] for kind, end in KINDS.items()}
    modules = {name: model.get_submodule(name) for names in layers.values() for name in names}
    headers, start = Headers(experiment.tokenizer), time.monotonic()

    def rendered(requests: Iterable[Asked]) -> list[Prompt]:
        examples = [Example(messages=as_messages(request)) for request in requests]
        return render_prompts(examples, experiment.tokenizer)

    lines = (experiment.data / "harmless_prompts.txt").read_text(encoding="utf-8").splitlines()[EVERYDAY]
    seen: dict[str, Sequence[Asked]] = {"AdvBench": advbench(experiment.data)[ADVBENCH_EVALUATION], "everyday": lines}
    seen["built-in, other"] = asked(builtin_prompts("evaluation"))[:UNSEEN]
    last = {name: last_inputs(model, modules, rendered(requests), BATCH) for name, requests in seen.items()}
    everyday = last.pop("everyday")
    columns = ["calibrated on", "positions", "inputs of", "r_in", *last, "energy left"]
    total: dict[str, Sums] = {}
    number = 0
    print_header(columns)
    for source, requests in calibration_sets(experiment, more):
        new = sums(model, modules, rendered(requests), headers)
        total = {name: total[name] + new[name] if total else new[name] for name in new}
        number += len(requests)
        for (kind, names), (label, weight) in itertools.product(layers.items(), WEIGHTS.items()):
            ranks = [rank for rank in RANKS if 2 * rank <= modules[names[0]].in_features]
            bases = {name: leading(total[name].weighted(weight), ranks[-1]) for name in names}
            for rank in ranks:
                cells = [
                    statistics.median(
                        leak_of(bases[name][:, :rank], everyday[name][::2], everyday[name][1::2], harmful[name])
                        for name in names
                    )
                    for harmful in last.values()
                ]
                left = statistics.median(energy_left(bases[name][:, :rank], everyday[name][1::2]) for name in names)
                print_row([f"{number}: {source}", label, kind, rank], [*cells, left])
    print(f"\n{time.monotonic() - start:.0f} s; medians over {', '.join(f'{len(n)} {k}' for k, n in layers.items())}")


def calibration_sets(
    experiment: Experiment, more: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, Sequence[Asked]]]:
    """What is added to the requests to calibrate on, with the name of all so far."""
    rows = asked(builtin_prompts("calibration"))
    rows = select_examples(rows, len(rows), 0)
    for start, stop in itertools.pairwise((0, 128, 512, len(rows))):
        if rows[start:stop]:
            yield "of the built-in" if stop < len(rows) else "built-in", rows[start:stop]
    yield "built-in and AdvBench", advbench(experiment.data)[: ADVBENCH_EVALUATION.start]
    for name, requests in more.items():
        yield f"and {name}", requests


def asked(rows: Iterable[Mapping[str, Any]]) -> list[Asked]:
    return [row["prompt"] if "prompt" in row else row["messages"] for row in rows]


def names_of(model: Any, end: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(f".{end}")]


def sums(model: Any, modules: Mapping[str, Any], prompts: Sequence[Prompt], headers: Headers) -> dict[str, Sums]:
    """Module name -> sums over all tokens of the prompts."""
    found: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []

    def hook(name: str) -> Any:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = [args[0][mask].double() for mask in masks]
            products = [of.T @ of for of in rows]
            found[name] = [a + b for a, b in zip(found[name], products, strict=True)] if name in found else products

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    ordered = sorted(prompts, key=len)
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in batch], device=device)
            places = torch.arange(longest, device=device)[None]
            lengths = torch.tensor([[len(prompt)] for prompt in batch], device=device)
            ends = lengths - torch.tensor([[headers.length(prompt)] for prompt in batch], device=device)
            masks[:] = [places < ends, (places >= ends) & (places < lengths)]
            model(input_ids=ids, attention_mask=(places < lengths).long(), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {name: Sums(*of) for name, of in found.items()}


def leading(gram: Tensor, rank: int, iterations: int = 4) -> Tensor:
    """The top eigenvectors, (d, rank) float64; of large matrices by subspace iteration."""
    if len(gram) <= _SMALL:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(gram), rank + 32, generator=generator, dtype=gram.dtype).to(gram)
    for _ in range(iterations):
        block = torch.linalg.qr(gram @ block).Q
    rotation = torch.linalg.eigh(block.T @ gram @ block).eigenvectors[:, -rank:].flip(1)
    return block @ rotation
