"""The logits of first tokens behind prompts, in batches, with the cache of the prompt where the model has one."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.embeddings import vocabulary_size
from ..models.running import evaluation_mode, input_device
from ..rows.batching import check_token_ids, pad_left
from ..rows.examples import Asked, Example, as_messages
from ..rows.tokenizing import render_prompts


def render_requests(tokenizer: Any, requests: Sequence[Asked]) -> list[list[int]]:
    """Token ids of requests, up to where a model begins to answer."""
    return render_prompts([Example(as_messages(request)) for request in requests], tokenizer)


def rendered_prompts(model: nn.Module, tokenizer: Any, requests: Sequence[Asked]) -> list[list[int]]:
    """Rendered requests, whose tokens the model knows."""
    prompts, vocabulary = render_requests(tokenizer, requests), vocabulary_size(model)
    for request, prompt in zip(requests, prompts, strict=True):
        text = as_messages(request)[-1]["content"]
        check_token_ids(prompt, vocabulary, partial("the request {!r}".format, text[:60]))
    return prompts


def token_sequences(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The texts' tokens, without those that begin with another text's: they are counted in its probability."""
    encoded = {tuple(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]) for text in texts} - {()}
    if not encoded:
        raise ValueError("refusing and complying: give at least one opening of each.")
    return sorted(
        tokens for tokens in encoded if not any(tokens[:length] in encoded for length in range(1, len(tokens)))
    )


def opening_scores(model: nn.Module, prompts: list[list[int]], openings: list[tuple[int, ...]]) -> Tensor:
    """Log-probabilities of the openings behind each prompt: (prompts, openings) float64 on the CPU."""
    most = max(map(len, openings))
    prefixes = sorted({opening[:-1] for opening in openings if len(opening) > 1})
    # A prefix is scored on the way through a longer one.
    leaves = [p for p in prefixes if not any(other[: len(p)] == p for other in prefixes if other != p)] or [()]
    logits, cache, mask = _last_logits_and_cache(model, prompts)
    scores = torch.zeros(len(prompts), len(openings), dtype=torch.float64)
    first = logits[:, -1].log_softmax(-1)
    behind = _logits_behind(model, prompts, leaves, cache, mask).log_softmax(-1) if most > 1 else torch.empty(0)
    for column, opening in enumerate(openings):
        total = first[:, opening[0]].double()
        if len(opening) > 1:
            leaf = next(i for i, leaf in enumerate(leaves) if leaf[: len(opening) - 1] == opening[:-1])
            for position, token in enumerate(opening[1:]):
                total = total + behind[:, leaf, position, token].double()
        scores[:, column] = total.cpu()
    return scores


def _logits_behind(
    model: nn.Module, prompts: list[list[int]], leaves: list[tuple[int, ...]], cache: Any, mask: Tensor
) -> Tensor:
    """Logits at every token of every leaf behind every prompt: (prompts, leaves, longest leaf, vocabulary) float32."""
    longest = max(map(len, leaves))
    filled = [[*leaf, *leaf[-1:] * (longest - len(leaf))] for leaf in leaves]
    rows, count = len(prompts), len(leaves)
    name = _cache_name(model)
    if name is not None and _can_repeat(cache):
        cache.batch_repeat_interleave(count)
        tokens = torch.tensor(filled, device=mask.device).repeat(rows, 1)
        mask = mask.repeat_interleave(count, 0)
        mask = torch.cat([mask, mask.new_ones(rows * count, longest)], dim=1)
        logits = _call(model, tokens, mask, use_cache=True, **{name: cache}).logits
    else:  # everything again, prompt included
        sequences = [prompt + leaf for prompt in prompts for leaf in filled]
        logits = last_logits(model, sequences, longest)
    return logits[:, -longest:].float().unflatten(0, (rows, count))


def answer_log_probabilities(
    model: nn.Module,
    prompts: list[list[int]],
    answers: list[list[int]],
    batch_size: int,
    *,
    chosen_only: bool = False,
) -> list[Tensor]:
    """
    The next-token distributions at every token of given answers.

    Args:
        model: In evaluation mode, without gradients.
        prompts: Token ids.
        answers: Token ids behind each prompt, at least one.
        batch_size: Answers per forward pass.
        chosen_only: Only the answers' own tokens.

    Returns:
        Per answer the log-probabilities, (tokens, vocabulary), or (tokens,) if `chosen_only`; float32 on the CPU.
    """
    result: list[Tensor] = [torch.empty(0)] * len(prompts)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    for chosen in by_length(sequences, batch_size, "", False):
        longest = max(len(answers[i]) for i in chosen)
        logits = last_logits(model, [sequences[i][:-1] for i in chosen], longest)
        for row, i in enumerate(chosen):
            values = logits[row, -len(answers[i]) :].log_softmax(-1)
            if chosen_only:
                tokens = torch.tensor(answers[i], device=values.device)
                values = values.gather(1, tokens[:, None]).squeeze(1)
            result[i] = values.cpu()
    return result


def last_logits(model: nn.Module, sequences: list[list[int]], count: int) -> Tensor:
    """The logits of the last `count` positions, (sequences, count, vocabulary) float32."""
    tokens, mask = pad_left(sequences, device=input_device(model))
    return _call(model, tokens, mask, use_cache=False, logits_to_keep=count).logits[:, -count:].float()


def _last_logits_and_cache(model: nn.Module, prompts: list[list[int]]) -> tuple[Tensor, Any, Tensor]:
    tokens, mask = pad_left(prompts, device=input_device(model))
    output = _call(model, tokens, mask, use_cache=True, logits_to_keep=1)
    name = _cache_name(model)
    return output.logits[:, -1:].float(), None if name is None else getattr(output, name, None), mask


def _call(model: nn.Module, tokens: Tensor, mask: Tensor, **options: Any) -> Any:
    """Run a model on left-padded tokens, with the options that its architecture knows."""
    accepted = _accepted(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    options = {name: value for name, value in {**options, "position_ids": positions}.items() if name in accepted}
    return model(input_ids=tokens, attention_mask=mask, **options)


def _accepted(model: nn.Module) -> Collection[str]:
    """The options that the architecture's forward takes."""
    get_base_model = getattr(model, "get_base_model", None)
    architecture = model if get_base_model is None else get_base_model()
    return inspect.signature(type(architecture).forward).parameters


def _cache_name(model: nn.Module) -> str | None:
    """
    What an architecture calls its key-value cache: Transformers renamed `past_key_values` to `cache` in 5.24.

    None where it takes neither: a cache would be dropped, and the prompt with it.
    """
    return next((name for name in ("cache", "past_key_values") if name in _accepted(model)), None)


def _can_repeat(cache: Any) -> bool:
    """Whether every layer's state can be given to several continuations; those of state space layers cannot."""
    return all(hasattr(part, "batch_repeat_interleave") for part in (cache, *getattr(cache, "layers", ())))


def by_length(prompts: list[list[int]], batch_size: int, description: str, progress: bool) -> Iterator[list[int]]:
    """Batches of indices of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(order), desc=description, unit="prompt", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
            bar.update(len(order[start : start + batch_size]))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    with evaluation_mode(model), torch.no_grad():
        yield
