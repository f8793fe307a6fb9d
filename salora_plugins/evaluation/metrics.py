"""Numbers about responses: how many refuse, and how likely a model finds given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..calibration.capture import evaluation_mode
from ..calibration.data import Example
from ..calibration.rendering import prompt_and_response_ids
from ..judges import is_refusal


def refusal_rate(responses: Sequence[str]) -> float:
    """Share of the responses that refuse, from 0 to 1, by `salora_plugins.judges.is_refusal`.

    Raises:
        ValueError: there are no responses.
    """
    if not responses:
        raise ValueError("responses is empty: a refusal rate needs at least one response")
    return sum(map(is_refusal, responses)) / len(responses)


def response_loss(model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = 16) -> float:
    """Mean negative log-likelihood per response token, in nats.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter, on any device.
        tokenizer: its tokenizer.
        rows: conversations in TRL's prompt-completion form: `prompt` and `completion`, each a list of messages
            with `role` and `content`. Response tokens are those that the chat template adds for the completion;
            without a template, those of the plain text behind a single request, and the end of text.
        batch_size: number of conversations in a forward pass; affects memory and speed, not the value.

    Returns:
        The sum over all response tokens of all rows divided by their number, so long responses weigh more.

    Raises:
        ValueError: there is no row, a row's rendered prompt is not how its rendered conversation begins, or there
            is no chat template for a conversation of several turns.

    Training mode is left as it was found.
    """
    if not rows:
        raise ValueError("rows is empty: a loss needs at least one conversation")
    encoded = [encode_conversation(tokenizer, row) for row in rows]
    encoded.sort(key=lambda pair: len(pair[0]))
    total, count = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            width = max(len(ids) for ids, _ in batch)
            input_ids = torch.zeros(len(batch), width, dtype=torch.long, device=model.device)
            attention_mask = torch.zeros_like(input_ids)
            labels = torch.full_like(input_ids, -100)
            for i, (ids, prompt_length) in enumerate(batch):
                input_ids[i, : len(ids)] = torch.tensor(ids)
                attention_mask[i, : len(ids)] = 1
                labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            total += nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels[:, 1:] != -100).sum())
    return total / count


def encode_conversation(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """
    Token ids of a conversation, and how many of them are its prompt.

    Args:
        tokenizer: see `response_loss`.
        row: one of its rows.

    Raises:
        ValueError: see `response_loss`.
    """
    prompt, completion = list(row["prompt"]), list(row["completion"])
    asked = repr(prompt[-1]["content"][:80])
    if not tokenizer.chat_template:
        example = Example(tuple(prompt), "".join(message["content"] for message in completion))
        return prompt_and_response_ids(example, tokenizer, f"the row that asks {asked}")
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise ValueError(
            "the tokenizer's chat template renders a conversation that does not begin with its rendered prompt, so "
            f"the response tokens cannot be told apart: {asked}"
        )
    return ids, len(prompt_ids)
