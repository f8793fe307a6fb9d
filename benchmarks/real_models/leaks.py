"""The leak of every way to calibrate, by kind of layer, without training: one pass over a model's requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from salora_plugins.activations.last_inputs import last_inputs
from salora_plugins.calibration.leak import energy_left, leak_of
from salora_plugins.evaluation.judges.keyword import is_refusal
from salora_plugins.inference.greedy import greedy_answers
from salora_plugins.models.running import evaluation_mode
from salora_plugins.prompts.builtin import builtin_prompts, everyday_prompts
from salora_plugins.rows.examples import Example
from salora_plugins.rows.headers import Headers
from salora_plugins.rows.tokenizing import render_prompts
from salora_plugins.support.linear_algebra import top_eigenpairs

from ..runs import Run, versions
from .material import NARROW_SAMPLES, plain, plain_english, spread

LAYERS = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
"""The layers that read inputs of their own -> all that read them."""
VARIANTS: dict[str, tuple[bool, float, float]] = {
    "narrow": (True, 1.0, 1.0),
    "narrow, header 10 times": (True, 1.0, 10.0),
    "broad": (False, 1.0, 1.0),
    "broad, header 10 times": (False, 1.0, 10.0),
    "broad, header 100 times": (False, 1.0, 100.0),
    "broad, header alone": (False, 0.0, 1.0),
}
"""Name -> few requests, weight of the tokens of the request, weight of those behind it. All are of the prompt."""
RULE, TARGET = "broad, header 10 times", 0.05
"""What the smallest rank is looked for with, and the leak that it is to reach: `input_safety_rank="leak:0.05"`."""
LINES = len(LAYERS) * (len(VARIANTS) + 1)
"""Of a model."""
LEAST_RANK, MOST_RANK = 16, 512
ANSWER_TOKENS = 8
HELD_OUT, MOST_HELD_OUT = 5, 64  # one of so many requests, as a calibration holds them out

Grams = dict[tuple[str, bool, bool], Tensor]
"""Layer, whether among the few, whether of the header -> sum of the outer products of its inputs (d_in, d_in)."""


@dataclass(frozen=True)
class Inputs:
    """What was gathered of a model."""

    grams: Grams
    last: dict[str, dict[str, Tensor]]
    """Set of requests -> layer -> inputs at the last token of the prompt (n, d_in)."""
    few: int
    """Requests that were refused, of the narrow set."""
    all: int


def leaks(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[str]],
    *,
    num_requests: int,
    num_layers: int,
    batch_size: int,
) -> Iterator[Run]:
    """
    Args:
        model: In float32 or bf16, on any device.
        tokenizer: Its tokenizer.
        sets: Name -> harmful requests, on which the leak is measured, too.
        num_requests: Built-in requests that are asked; those that are refused count.
        num_layers: Decoder layers that are looked at, at equal distances.
        batch_size: Requests at once.

    Yields:
        A line a variant, kind of layer and rank.
    """
    started = time.monotonic()
    layers = _layers(model, num_layers)
    with evaluation_mode(model), torch.no_grad():
        inputs = _gather(model, tokenizer, layers, sets, num_requests, batch_size)
    layer_names = list(layers)
    del model, layers  # room for the decompositions, if nobody else has them
    counts = {True: inputs.few, False: inputs.all}
    common = {"layers": num_layers, "gathering_seconds": round(time.monotonic() - started), "versions": versions()}
    for kind in LAYERS:
        names = [name for name in layer_names if name.endswith(kind)]
        for variant in VARIANTS:
            of_layers = [_of_layer(inputs, name, variant) for name in names]
            for which in of_layers[0]:
                facts = {"kind": kind, "variant": variant, "requests": counts[VARIANTS[variant][0]], "rank": which}
                yield facts | _together([of_layer[which] for of_layer in of_layers]) | common


def _layers(model: Any, number: int) -> dict[str, torch.nn.Module]:
    """Name -> layer, of every kind in some decoder layers."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    total = len(decoder.layers)
    # Not the first one, whose input at the last token is the same for all requests.
    chosen = [(2 * place + 1) * total // (2 * number) for place in range(number)]
    names = [f"{prefix}.layers.{index}.{part}" for index in chosen for part in _parts()]
    return {name: model.get_submodule(name) for name in names}


def _parts() -> list[str]:
    return [f"{'self_attn' if kind[0] in 'qo' else 'mlp'}.{kind}" for kind in LAYERS]


def _gather(
    model: Any,
    tokenizer: Any,
    layers: dict[str, torch.nn.Module],
    sets: Mapping[str, Sequence[str]],
    num_requests: int,
    batch_size: int,
) -> Inputs:
    rows = spread(builtin_prompts("calibration"), num_requests)
    examples = [Example(tuple(row["messages"])) if "messages" in row else plain(row["prompt"]) for row in rows]
    prompts = [tuple(ids) for ids in render_prompts(examples, tokenizer)]
    number = min(MOST_HELD_OUT, len(prompts) // HELD_OUT)
    held_out = spread(list(range(len(prompts))), number)
    seen = [prompt for index, prompt in enumerate(prompts) if index not in set(held_out)]
    few = spread(seen, min(NARROW_SAMPLES, len(seen) // 3))
    grams: Grams = {}
    refused = [
        _add_grams(grams, model, tokenizer, layers, part, is_few, batch_size)
        for is_few, part in ((True, few), (False, [prompt for prompt in seen if prompt not in few]))
    ]
    asked = {"builtin": plain_english([rows[index] for index in held_out]), **sets}
    asked["everyday"] = [row["prompt"] for row in everyday_prompts()]
    last = {}
    for name, requests in asked.items():
        rendered = render_prompts([plain(request) for request in requests], tokenizer)
        last[name] = {layer: x.float() for layer, x in last_inputs(model, layers, rendered, batch_size).items()}
    return Inputs(grams, last, refused[0], sum(refused))


def _add_grams(
    grams: Grams,
    model: Any,
    tokenizer: Any,
    layers: dict[str, torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    is_few: bool,
    batch_size: int,
) -> int:
    """Of the requests that the model refuses, as far as the beginning of its answers tells; and how many they are."""
    headers, number = Headers(tokenizer), 0
    by_length = sorted(prompts, key=len)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        with _recorded(layers) as read:
            answers = greedy_answers(model, tokenizer, batch, max_new_tokens=ANSWER_TOKENS)
        refused = [is_refusal(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        number += sum(refused)
        header, text = _masks(batch, refused, headers)
        for name, tensor in read.items():
            for is_header, mask in ((True, header), (False, text)):
                rows, key = tensor[mask.to(tensor.device)].float(), (name, is_few, is_header)
                gram = (rows.T @ rows).cpu()
                grams[key] = grams[key].add_(gram) if key in grams else gram
    return number


@contextmanager
def _recorded(layers: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What layers read first while this lasts: the prompts, padded on the left."""
    read: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        read.setdefault(name, args[0].detach())

    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _masks(batch: Sequence[Sequence[int]], counts: Sequence[bool], headers: Headers) -> tuple[Tensor, Tensor]:
    """The positions of the header and of what is in front of it, of the prompts that count: (batch, length) bool."""
    longest = max(map(len, batch))
    header, text = (torch.zeros(len(batch), longest, dtype=torch.bool) for _ in range(2))
    for row, (prompt, is_counted) in enumerate(zip(batch, counts, strict=True)):
        if is_counted:
            end = headers.length(prompt)
            header[row, longest - end :] = True
            text[row, longest - len(prompt) : longest - end] = True
    return header, text


def _of_layer(inputs: Inputs, name: str, variant: str) -> dict[str, Run]:
    """With the default rank, and with the smallest that reaches the target: what is measured."""
    gram = weighted(inputs.grams, name, *VARIANTS[variant])
    dimension = len(gram)
    default = min(256, dimension // 4)
    ranks = [rank for rank in (LEAST_RANK << doubling for doubling in range(16)) if rank <= dimension // 2]
    ranks = [rank for rank in ranks if rank <= MOST_RANK]
    most = max(default, *ranks) if variant == RULE else default
    multiply: Callable[[Tensor], Tensor] = partial(torch.matmul, gram)
    _, vectors = top_eigenpairs(multiply, dimension, most, device=gram.device)

    def measured(rank: int) -> Run:
        return {"directions": rank, **_leaks_with(inputs, name, vectors[:, :rank])}

    found = {"default": measured(default)}
    if variant == RULE:
        tried = [measured(rank) for rank in ranks]
        reached = [line for line in tried if line["builtin"] <= TARGET]
        found[f"leak:{TARGET}"] = reached[0] if reached else min(tried, key=lambda line: line["builtin"])
    return found


def weighted(grams: Grams, name: str, only_few: bool, of_text: float, of_header: float) -> Tensor:
    """The sum of the outer products of a layer's inputs (d_in, d_in), in float64, weighted by where a token stands."""
    weights = {False: of_text, True: of_header}
    parts = {key: gram for key, gram in grams.items() if key[0] == name and (key[1] or not only_few)}
    total = torch.zeros_like(next(iter(parts.values())), dtype=torch.float64)
    for (_, _, is_header), gram in parts.items():
        total.add_(gram, alpha=weights[is_header])  # without copies: each may be hundreds of megabytes
    return total


def _leaks_with(inputs: Inputs, name: str, basis: Tensor) -> Run:
    """The leak on every set, and the share of the everyday requests' energy that is left to learn from."""
    everyday = inputs.last["everyday"][name]
    task, compared = everyday[::2], everyday[1::2]
    found = {
        of_set: leak_of(basis, task, compared, of_layers[name])
        for of_set, of_layers in inputs.last.items()
        if of_set != "everyday"
    }
    return found | {"energy_left": energy_left(basis, everyday)}


def _together(of_layers: Sequence[Run]) -> Run:
    """The median over the layers, and of the leak on the built-in requests the range."""
    medians = {key: float(f"{statistics.median(line[key] for line in of_layers):.4g}") for key in of_layers[0]}
    builtin = sorted(line["builtin"] for line in of_layers)
    return medians | {"least": float(f"{builtin[0]:.4g}"), "most": float(f"{builtin[-1]:.4g}")}
