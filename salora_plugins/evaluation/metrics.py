"""Numbers about responses: how many refuse, and how likely a model finds given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.embeddings import vocabulary_size
from ..models.running import evaluation_mode, input_device
from ..rows.batching import check_token_ids, collate
from ..rows.examples import IGNORED, Example, TokenizedExample
from ..rows.tokenizing import tokenize
from .judges.keyword import is_refusal


def refusal_rate(responses: Sequence[str]) -> float:
    """Share of the responses that refuse, from 0 to 1, by `salora_plugins.evaluation.judges.keyword.is_refusal`.

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
            with `role` and `content`. The response is the last turn. Its tokens are those that a model that is asked
            would write, up to the one that ends the turn, with that one
            (`salora_plugins.rows.rendering.Renderer.prompt_and_response_ids`).
        batch_size: number of conversations in a forward pass; affects memory and speed, not the value.

    Returns:
        The sum over all response tokens of all rows divided by their number, so long responses weigh more.

    Raises:
        ValueError: there is no row, a row's response cannot be told apart, there is no chat template for a conversation
            of several turns, or the model has no embedding for a token (the last three as DataError).

    Training mode is left as it was found.
    """
    if not rows:
        raise ValueError("rows is empty: a loss needs at least one conversation")
    encoded = [encode_conversation(tokenizer, row) for row in rows]
    vocabulary = vocabulary_size(model)
    for number, example in enumerate(encoded, start=1):
        check_token_ids(example.input_ids, vocabulary, partial("row {}".format, number))
    encoded.sort(key=lambda example: len(example.input_ids))
    total, count, device = 0.0, 0, input_device(model)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = collate(encoded[start : start + batch_size], pad_token_id=0)
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits
            total += nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            count += int((labels != IGNORED).sum())
    return total / count


def encode_conversation(tokenizer: Any, row: Mapping[str, Any]) -> TokenizedExample:
    """
    Token ids of a conversation, with those of its response as labels: the same as in calibration.

    Args:
        tokenizer: see `response_loss`.
        row: one of its rows.

    Raises:
        DataError: see `response_loss`.
    """
    turns: list[dict[str, Any]] = [*row["prompt"], *row["completion"]]
    last = turns.pop()
    example = Example(tuple(turns), last["content"])
    return tokenize(example, tokenizer, f"the row that asks {example.request[:80]!r}")
