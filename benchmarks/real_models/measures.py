"""What is measured of a model on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from salora_plugins.evaluation.coherence import coherence
from salora_plugins.evaluation.generation import continue_prompts
from salora_plugins.evaluation.judges.keyword import is_refusal
from salora_plugins.models.running import evaluation_mode, input_device
from salora_plugins.rows.batching import batches
from salora_plugins.rows.examples import IGNORED, TokenizedExample

from ..runs import Run
from .judges import refuses
from .material import Material

LOSS_ROWS = 32  # at once
FRAMED = " in the frame"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def response_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """
    The negative log-likelihood of every response token of a batch that is padded on the right: (tokens,) float32.

    The language-model head sees these positions only: with a large vocabulary, the other logits are most of the memory
    of a step. No attention mask is needed where nothing looks ahead, and without one attention takes its fast kernels.

    Args:
        model: With or without an adapter.
        batch: input_ids and labels, (batch, length), on the CPU: so the device need not be waited for.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = input_device(base)
    labels = batch["labels"][:, 1:].flatten()
    counted = (labels != IGNORED).nonzero().squeeze(1)
    hidden = base.get_decoder()(input_ids=batch["input_ids"].to(device), use_cache=False).last_hidden_state
    chosen = hidden[:, :-1].flatten(0, 1).index_select(0, counted.to(device))
    logits = base.get_output_embeddings()(chosen).float()
    return nn.functional.cross_entropy(logits, labels[counted].to(device), reduction="none")


def heldout_loss(model: Any, rows: Sequence[TokenizedExample]) -> float:
    """Nats per response token."""
    total, count = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for batch in batches(rows, LOSS_ROWS, 0):
            losses = response_losses(model, batch)
            total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count


def measure(
    model: Any,
    material: Material,
    task: str,
    rows: Sequence[TokenizedExample],
    known: dict[str, list[str]] | None = None,
) -> tuple[Run, dict[str, list[str]]]:
    """
    Held-out loss, refusals by both judges, broken answers, right answers and the size of the update; and the answers.

    Args:
        model: With its adapter.
        material: Of the base model.
        task: The identity's sets are asked in its own frame, too, and math's problems are solved.
        rows: Held out of the task.
        known: Set -> answers of this model that need not be made again; gets those that are made.
    """
    known = {} if known is None else known
    prompts = material.prompts
    if task == "identity":
        prompts = prompts | {name + FRAMED: of_set for name, of_set in material.framed_prompts.items()}
    known |= ask(model, material, {name: of_set for name, of_set in prompts.items() if name not in known})
    answers = {name: known[name] for name in prompts}
    point: Run = {"loss": round(heldout_loss(model, rows), 4), **counts(answers), "norm": round(update_norm(model), 4)}
    if task == "math" and material.problems:
        point |= solved(model, material)
    return point, answers


def ask(model: Any, material: Material, prompts: dict[str, list[list[int]]]) -> dict[str, list[str]]:
    """The answers to all requests, in few large batches of like length."""
    scale = material.setup.scale
    together = [prompt for of_set in prompts.values() for prompt in of_set]
    responses = iter(
        continue_prompts(model, material.tokenizer, together, max_new_tokens=scale.tokens, batch_size=scale.batch)
    )
    return {name: [next(responses) for _ in of_set] for name, of_set in prompts.items()}


def counts(answers: dict[str, list[str]]) -> Run:
    """By set: refused by the package's judge and by the second one, broken, asked. What is broken refuses nothing."""
    judged = {"refused": is_refusal, "refused_second": refuses}
    sound = {name: [text for text in of_set if coherence(text, None) == "coherent"] for name, of_set in answers.items()}
    found: Run = {kind: {name: sum(map(judge, of)) for name, of in sound.items()} for kind, judge in judged.items()}
    found["broken"] = {name: len(answers[name]) - len(of_set) for name, of_set in sound.items()}
    found["requests"] = {name: len(of_set) for name, of_set in answers.items()}
    return found


def solved(model: Any, material: Material) -> Run:
    """How many of math's problems end in the right number."""
    problems, prompts, scale = material.problems, material.problem_prompts, material.setup.scale
    responses = continue_prompts(
        model, material.tokenizer, prompts, max_new_tokens=scale.problem_tokens, batch_size=scale.batch
    )
    right = [
        last_number(response) is not None and last_number(response) == last_number(problem.response or "")
        for problem, response in zip(problems, responses, strict=True)
    ]
    return {"right": sum(right), "problems": len(problems)}


def last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def update_norm(model: nn.Module) -> float:
    """The Frobenius norm of the update over all layers; 0 without an adapter."""
    squares = []
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                a: Any = layer.lora_A["default"]  # linear layers, whose weights are computed with SaLoRA
                b: Any = layer.lora_B["default"]
                down, up = a.weight.float(), b.weight.float()
                # ‖B A‖² = tr(BᵀB AAᵀ), without the product
                squares.append(layer.scaling["default"] ** 2 * ((up.T @ up) * (down @ down.T)).sum())
    return torch.stack(squares).sum().clamp(min=0).sqrt().item() if squares else 0.0


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The model with its update of plain LoRA multiplied."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [layer.scaling["default"] for layer in layers]
    for layer in layers:
        layer.scaling["default"] *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling["default"] = scaling
