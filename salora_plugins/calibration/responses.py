"""Completing the safety data with the model's own refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .capture import CalibrationError, input_device
from .data import Example, TokenizedExample, render_prompt

logger = logging.getLogger(__name__)

RESPONSE_TOKENS = 64
"""Length of a generated response; a refusal is decided and mostly complete by then."""

_ENOUGH_REFUSALS = 16


def add_own_refusals(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example | TokenizedExample],
    num: int,
    *,
    is_refusal: Callable[[str, str], bool],
    batch_size: int,
    max_length: int,
) -> tuple[list[Example | TokenizedExample], dict[str, int]]:
    """
    Give requests that have no response the model's own greedy one, and keep those that it refuses.

    Args:
        model: The aligned model, in evaluation mode.
        tokenizer: Its tokenizer.
        examples: Safety examples in the order in which they are to be used.
        num: How many to return at the most; no more are generated than needed.
        is_refusal: Judge called with the request and the response.
        batch_size: Requests per generation.
        max_length: Prompt and response tokens together; longer prompts are left out.

    Returns:
        At most `num` examples, all with a response, and the counts "requests" and "refusals".

    Raises:
        CalibrationError: Too few requests were refused, so the model has no alignment to preserve.
    """
    kept: list[Example | TokenizedExample] = []
    counts = {"requests": 0, "refusals": 0}
    waiting: list[Example] = []
    progress = tqdm(total=min(num, len(examples)), desc="collecting refusals", unit="row", leave=False)
    for index, example in enumerate(examples):
        if isinstance(example, Example) and example.response is None:
            waiting.append(example)
        else:
            kept.append(example)
        if len(waiting) == batch_size or (waiting and index == len(examples) - 1):
            answers = _answer(model, tokenizer, waiting, max_length)
            counts["requests"] += len(answers)
            for request, (tokens, text) in zip(waiting, answers, strict=True):
                if tokens is not None and is_refusal(request.request, text):
                    kept.append(tokens)
                    counts["refusals"] += 1
            waiting.clear()
        progress.n = min(len(kept), num)
        progress.refresh()
        if len(kept) >= num:
            break
    progress.close()
    if counts["refusals"] < min(_ENOUGH_REFUSALS, math.ceil(counts["requests"] / 2)):
        raise CalibrationError(
            f"The model refused {counts['refusals']} of {counts['requests']} requests of safety_data, so there is too "
            "little alignment to preserve. Use an aligned (instruction-tuned, safety-trained) model with its chat "
            "template, or give safety_data with the responses that it should keep."
        )
    if len(kept) < min(num, len(examples)):
        logger.warning(
            "Calibrating on %d safety examples instead of %d: the model refused %d of %d requests.",
            len(kept),
            num,
            counts["refusals"],
            counts["requests"],
        )
    return kept[:num], counts


@torch.no_grad()
def _answer(
    model: nn.Module, tokenizer: Any, requests: Sequence[Example], max_length: int
) -> list[tuple[TokenizedExample | None, str]]:
    """Greedy responses as tokenized examples and as text; None where the prompt leaves no room for one."""
    if not hasattr(model, "generate"):
        raise CalibrationError(
            f"safety_data has rows without a response, and {type(model).__name__} cannot generate one. Give "
            "safety_data with responses, or a safety_module."
        )
    prompts = [render_prompt(request, tokenizer) for request in requests]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < max_length]
    answers: list[tuple[TokenizedExample | None, str]] = [(None, "")] * len(prompts)
    if not fitting:
        return answers
    width = max(len(prompts[index]) for index in fitting)
    end_tokens = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(end_tokens), 0)
    device = input_device(model)
    input_ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in fitting], device=device)
    attention_mask = torch.tensor(
        [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in fitting], device=device
    )
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=min(RESPONSE_TOKENS, max_length - 1),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        use_cache=True,
    )[:, width:].tolist()
    for index, tokens in zip(fitting, generated, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in end_tokens), None)
        response = tokens if end is None else tokens[: end + 1]
        prompt = prompts[index]
        response = response[: max_length - len(prompt)]
        example = TokenizedExample(tuple(prompt + response), tuple([-100] * len(prompt) + response))
        answers[index] = (example, tokenizer.decode(response, skip_special_tokens=True))
    return answers


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a response: the generation configuration's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return tokens - {None}
