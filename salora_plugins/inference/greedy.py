"""Greedy answers as token ids, whatever the model's generation configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.embeddings import vocabulary_size
from ..models.running import input_device
from ..models.weights import is_sharded_data_parallel
from ..rows.batching import check_token_ids, pad_left


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a response: the generation configuration's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured.tolist() if isinstance(configured, torch.Tensor) else configured
    ends = [*configured] if isinstance(configured, (list, tuple)) else [configured]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


@torch.no_grad()
def greedy_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[list[int]]:
    """
    The most probable token after the other, for one batch of prompts.

    Of the model's generation configuration only the tokens of beginning, end and padding count: beams, penalties,
    suppressed tokens, time limits and whatever else it holds are out of force meanwhile.

    Args:
        model: In evaluation mode, with a `generate` of transformers.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one prompt.
        max_new_tokens: Longest answer.

    Returns:
        The tokens of every answer, up to the first that ends it, with that one.

    Raises:
        DataError: The model has no embedding for a token of a prompt.
    """
    from transformers import GenerationConfig

    vocabulary = vocabulary_size(model)
    for prompt in prompts:
        check_token_ids(prompt, vocabulary, partial(_shown, tokenizer, prompt))
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    tokens = {
        "bos_token_id": getattr(getattr(model, "generation_config", None), "bos_token_id", None),
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": pad,
    }
    input_ids, attention_mask = pad_left(prompts, pad, input_device(model))
    greedy = GenerationConfig(**tokens, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True)
    # `generate` takes from the model's own configuration whatever the given one leaves open.
    with _generation_config(model, GenerationConfig(**tokens)):
        generate: Any = model.generate
        # Under ZeRO-3 `generate` would wait for the other ranks, also with a model that is whole in this one alone.
        synced = None if is_sharded_data_parallel(model) else False
        generated = generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=greedy, synced_gpus=synced
        )
    answers = generated[:, input_ids.shape[1] :].tolist()
    return [answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), None)] for answer in answers]


def _shown(tokenizer: Any, prompt: Sequence[int]) -> str:
    return f"the prompt that ends with {tokenizer.decode(prompt)[-60:]!r}"


@contextmanager
def _generation_config(model: nn.Module, config: Any) -> Iterator[None]:
    """Another generation configuration for a model; PEFT copies that of a wrapper to the module inside."""
    own = {module: vars(module)["generation_config"] for module in model.modules() if _has_config(module)}
    try:
        for module in own:
            module.generation_config = config
        yield
    finally:
        for module in filter(_has_config, list(model.modules())):
            if module in own:
                module.generation_config = own[module]
            else:
                del module.generation_config


def _has_config(module: nn.Module) -> bool:
    return "generation_config" in vars(module)
