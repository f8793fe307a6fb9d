"""What a chat model answers to a list of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..inference.greedy import greedy_answers
from ..inference.logits import render_requests
from ..models.running import evaluation_mode
from ..rows.examples import Asked


def generate_responses(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Asked],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Answer every request greedily: the most probable token, whatever the model's generation configuration says.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter, on any device.
        tokenizer: its tokenizer. A request is rendered as a user turn of its chat template, with the thinking
            of reasoning models turned off where the template can; without a template the model continues the plain
            text.
        prompts: the requests, each a text or the messages of several turns. They are answered in batches of like
            length, padded on the left.
        max_new_tokens: longest response, in tokens.
        batch_size: number of requests that are answered at once; affects memory and speed.
        progress: show a progress bar on stderr.

    Returns:
        One response per request, in the order of `prompts`, without special tokens or surrounding white space.

    Raises:
        DataError: the chat template refuses a request, or the model has no embedding for one of its tokens.

    Training mode, the model's generation configuration and the tokenizer are left as they were found.
    """
    return continue_prompts(
        model,
        tokenizer,
        render_requests(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def continue_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[str]:
    """
    The greedy continuation of every prompt, as `generate_responses` makes and returns it.

    Args:
        prompts: Token ids.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
    with evaluation_mode(model), tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            answers = greedy_answers(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens=max_new_tokens)
            for i, answer in zip(chosen, answers, strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True).strip()
                # No file could hold half a character, as some tokenizers decode cut answers.
                responses[i] = text.encode(errors="replace").decode()
            bar.update(len(chosen))
    return responses
