"""What a chat model answers to a list of requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.capture import evaluation_mode
from ..calibration.rendering import template_options


def generate_responses(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Answer every request greedily, without sampling.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter, on any device.
        tokenizer: its tokenizer. A request is rendered as a user turn of its chat template, with the thinking
            of reasoning models turned off where the template can; without a template the model continues the plain
            text.
        prompts: the requests. They are answered in batches of like length, padded on the left.
        max_new_tokens: longest response, in tokens.
        batch_size: number of requests that are answered at once; affects memory and speed.
        progress: show a progress bar on stderr.

    Returns:
        One response per request, in the order of `prompts`, without special tokens or surrounding white space.

    Training mode, the configuration's `use_cache` and the tokenizer's padding side are left as they were found.
    """
    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                **template_options(tokenizer),
            )
            for prompt in prompts
        ]
    return continue_texts(
        model,
        tokenizer,
        prompts,
        # The template has written the special tokens already.
        add_special_tokens=not tokenizer.chat_template,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def continue_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    add_special_tokens: bool,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[str]:
    """
    The greedy continuation of every text, as `generate_responses` makes and returns it.

    Args:
        texts: Rendered prompts.
        add_special_tokens: Whether the tokenizer adds its own, such as that of the beginning.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    responses = [""] * len(texts)
    with _answering(model, tokenizer), tqdm(total=len(texts), unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt").to(model.device)
            generated = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            new_tokens = generated[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
                responses[i] = text.strip()
            bar.update(len(chosen))
    return responses


@contextmanager
def _answering(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """Evaluation mode, a key-value cache and left padding, and afterwards everything as it was."""
    use_cache = model.config.use_cache
    padding_side, pad_token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        with evaluation_mode(model), torch.no_grad():
            yield
    finally:
        model.config.use_cache = use_cache
        tokenizer.padding_side = padding_side
        tokenizer.pad_token = pad_token
