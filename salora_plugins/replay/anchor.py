"""A penalty that keeps a model at its base where refusals begin."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..inference.logits import by_length, last_logits
from ..models.embeddings import vocabulary_size
from ..models.running import adapters_disabled, check_base_is_unchanged, evaluation_mode, on_accelerator
from ..options import check_number
from ..rows.batching import check_token_ids
from ..rows.examples import IGNORED
from ..rows.rendering import tokenizer_of
from ..rows.tokenizing import tokenize_examples
from ..support.distributed import rank_and_world_size
from .refusals import Refusal, own_refusals, refusals_digest

Direction = Literal["forward", "reverse"]
"""Of the KL divergence: base from adapted model's side, or the other way round."""

NUM_TOKENS = 8
"""How many tokens of a refusal are anchored; the first one is what the last token of the prompt predicts."""

COST = 0.05
"""What penalties may take of the time of a training."""

_SHORT_PASS = 2048
"""A pass takes as long as so many tokens take to be computed, and they: a GPU waits for its kernels to be launched."""
_OWN_COST = 1.5
"""A penalty's passes take up to so much longer than those of as many tokens of a training (docs/choose.md)."""
OFTEN = 8
"""Where penalties cost little, they come at every so many steps."""

_MAX_LENGTH = 2048
"""Tokens of a request with the beginning of its refusal."""


@dataclass(frozen=True)
class AnchorOptions:
    """
    What an anchor looks at.

    Args:
        num_requests: How many refusals, at the most.
        batch_size: How many of them a penalty looks at, over all processes of torch.distributed together.
        num_tokens: At how many tokens of a refusal the divergence is taken; fewer where it is shorter.
        top_tokens: How many of the base's most probable tokens are told apart at each position.
        direction: "forward": KL(base || adapted), which holds whatever the base might say; "reverse": KL(adapted ||
            base), which punishes most what the base would not say.
        seed: Of the choice of requests and of their order.

    Raises:
        ValueError: A number is below 1, or there is no such direction.
    """

    num_requests: int = 128
    batch_size: int = 8
    num_tokens: int = NUM_TOKENS
    top_tokens: int = 256
    direction: Direction = "forward"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "batch_size", "num_tokens", "top_tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("seed", self.seed, 0)
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"direction={self.direction!r}: choose 'forward', KL(base || adapted), or 'reverse', KL(adapted || "
                "base)."
            )


@dataclass(frozen=True)
class _Reference:
    """What the base model predicts at the first tokens of one refusal."""

    sequence: list[int]
    """Token ids of the request and of all but the last of the refusal's first tokens."""
    top: Tensor
    """Ids of the most probable tokens at each position, (tokens, k) int64 on the CPU."""
    log_probabilities: Tensor
    """Of those, and last of all others together, (tokens, k + 1) float32 on the CPU."""


class RefusalAnchor:
    """
    The KL divergence of an adapted model from its base, where the base's own refusals begin.

    At the last token of a harmful request's prompt and at the first tokens of the base model's refusal, which both
    models are given. The base is the model itself with its adapters disabled; its distributions are computed once and
    kept, so that a penalty costs one forward and one backward pass over a few short rows.

    Of each distribution the most probable tokens of the base are kept, and the probability of all others as one more
    outcome. The divergence of what is kept is at most that of the whole distributions, and 0 with it.

    Example:

        >>> anchor = RefusalAnchor.of(model, tokenizer)
        >>> for number, batch in enumerate(batches):
        ...     anchor.backward(model, number, weight=1.0)
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, references: Sequence[_Reference], options: AnchorOptions, digest: str) -> None:
        self.options = options
        self.digest = digest
        """Of the refusals, SHA-256 as 64 hexadecimal digits."""
        self._references = list(references)
        self._batch_size = min(options.batch_size, len(self._references))

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, requests: Any = "builtin", **options: Any) -> RefusalAnchor:
        """
        Compute the base model's side.

        Args:
            model: With or without adapters; its base is what it computes with them disabled.
            tokenizer: Its tokenizer, or a processor with one.
            requests: Refusals, as `own_refusals` returns them, or what that takes: then the base model answers first,
                and those that it refuses are taken.
            options: num_requests (128): how many refusals at most; batch_size (8): how many a penalty looks at, over
                all processes; num_tokens (8): at how many tokens of each; top_tokens (256): how many of the base's most
                probable tokens are told apart; direction ("forward", or "reverse"); seed (0): of their order.

        Raises:
            ValueError: An option cannot have its value, or an adapter has changed the base model's weights.
            CalibrationError, DataError: As `own_refusals`.
        """
        chosen = AnchorOptions(**options)
        check_base_is_unchanged(model)
        tokenizer = tokenizer_of(tokenizer)
        if isinstance(requests, Sequence) and requests and all(isinstance(entry, Refusal) for entry in requests):
            refusals = list(requests)[: chosen.num_requests]
        else:
            refusals = own_refusals(model, tokenizer, requests, num=chosen.num_requests, seed=chosen.seed)
        sequences = _sequences(refusals, tokenizer, chosen.num_tokens, vocabulary_size(model))
        with adapters_disabled(model), on_accelerator(model), evaluation_mode(model), torch.no_grad():
            references = _references(model, sequences, chosen.top_tokens)
        return cls(references, chosen, refusals_digest(refusals))

    def __len__(self) -> int:
        return len(self._references)

    def affordable_every(self, tokens: float = 0.0, passes: int = 1) -> int:
        """
        At every how many optimizer steps penalties cost at most 5 % of a training's time: an estimate by the number of
        tokens, in which a pass over few takes as long as one over 2,048 more.

        Args:
            tokens: Of one pass of the training, on one process; 0: unknown, and taken to be few.
            passes: Of one step, as many as gradients are accumulated.

        Returns:
            At least 8.
        """
        _, world_size = rank_and_world_size()
        lengths = [len(reference.sequence) for reference in self._references]
        own = sum(lengths) / len(lengths) * math.ceil(self._batch_size / world_size)
        cost = _OWN_COST * (own + _SHORT_PASS) / (passes * (tokens + _SHORT_PASS))
        return max(OFTEN, math.ceil(cost / COST))

    def loss(self, model: nn.Module, number: int = 0) -> Tensor:
        """
        The divergence on one batch, with a gradient.

        Args:
            model: The adapted model, with its adapters in use; its dropout is off meanwhile.
            number: Which batch: 0, 1, 2, ... go through all requests in a random order, and then in another one.

        Returns:
            Mean over requests and tokens, in nats, a scalar in float32. In a distributed run this process's part of it,
            times the number of processes, so that the mean over them is the mean over the batch; 0 without a gradient
            where there is none for it.
        """
        rank, world_size = rank_and_world_size()
        chosen = [self._references[i] for i in self._batch(number)]
        share = chosen[rank::world_size]
        if not share:
            return torch.zeros(())
        return self._divergences(model, share).sum() * world_size / len(chosen)

    def backward(
        self, model: nn.Module, number: int = 0, *, weight: float = 1.0, scale: Tensor | float | None = None
    ) -> Tensor:
        """
        Add the gradient of `weight` times the divergence on one batch to that of the model's parameters.

        It belongs between `zero_grad()` and the step's own backward pass: then gradient clipping sees it, and
        DistributedDataParallel averages it with the step's own gradients.

        Args:
            model: As in `loss`; not the wrapper that DistributedDataParallel makes.
            number: As in `loss`.
            weight: What the divergence counts beside the loss.
            scale: What a gradient scaler multiplies losses with, in fp16.

        Returns:
            The divergence without weight, detached, as in `loss`.
        """
        with torch.enable_grad():
            loss = self.loss(model, number)
            if loss.requires_grad:
                factor = weight if scale is None else weight * scale
                (loss * factor).backward()
        return loss.detach()

    @torch.no_grad()
    def kl(self, model: nn.Module, *, batch_size: int = 16) -> Tensor:
        """The divergence of every request, (requests,) float32 on the CPU, in nats per token."""
        values = torch.empty(len(self))
        for chosen in by_length([reference.sequence for reference in self._references], batch_size, "", False):
            values[chosen] = self._divergences(model, [self._references[i] for i in chosen]).cpu()
        return values

    def _batch(self, number: int) -> list[int]:
        """Which requests; the last ones of a round are left out where they do not fill a batch."""
        round_, place = divmod(number, len(self) // self._batch_size)
        order = random.Random(f"{self.options.seed} {round_}").sample(range(len(self)), len(self))
        return sorted(order[place * self._batch_size : (place + 1) * self._batch_size])

    def _divergences(self, model: nn.Module, references: Sequence[_Reference]) -> Tensor:
        """One value per request, (requests,) float32."""
        longest = max(len(reference.top) for reference in references)
        with evaluation_mode(model):
            logits = last_logits(model, [reference.sequence for reference in references], longest)
        # Where a refusal is shorter, its tokens are the last ones, as those of the logits.
        top = torch.stack([_padded(reference.top, longest) for reference in references]).to(logits.device)
        base = torch.stack([_padded(reference.log_probabilities, longest) for reference in references])
        base = base.to(logits.device)
        ours = _coarse(logits, top)
        first, second = (base, ours) if self.options.direction == "forward" else (ours, base)
        counts = torch.tensor([len(reference.top) for reference in references], device=logits.device)
        counted = torch.arange(longest, device=logits.device) >= longest - counts[:, None]
        return ((first.exp() * (first - second)).sum(-1) * counted).sum(-1) / counts


def _padded(values: Tensor, length: int) -> Tensor:
    """(tokens, k) to (length, k): the first row stands in front, once for each that is missing."""
    return torch.cat([values[:1].expand(length - len(values), -1), values])


def _sequences(
    refusals: Sequence[Refusal], tokenizer: Any, num_tokens: int, vocabulary: int | None
) -> list[tuple[list[int], int]]:
    """Token ids up to the `num_tokens`th token of each refusal, without that one, and how many tokens are predicted."""
    rows = tokenize_examples(
        [refusal.example for refusal in refusals],
        tokenizer,
        max_length=_MAX_LENGTH,
        option="requests",
        vocabulary=vocabulary,
    )
    sequences = []
    for row in rows:
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        end = min(start + num_tokens, len(row.input_ids))
        check_token_ids(row.input_ids, vocabulary, lambda: "a refusal")
        sequences.append((list(row.input_ids[: end - 1]), end - start))
    return sequences


def _references(model: nn.Module, sequences: Sequence[tuple[list[int], int]], top_tokens: int) -> list[_Reference]:
    found: dict[int, _Reference] = {}
    ids = [sequence for sequence, _ in sequences]
    for chosen in by_length(ids, 16, "", False):
        longest = max(sequences[i][1] for i in chosen)
        logits = last_logits(model, [ids[i] for i in chosen], longest)
        for row, i in enumerate(chosen):
            own = logits[row, -sequences[i][1] :]
            # All but one at the most, so that there are others.
            top = own.topk(min(top_tokens, own.shape[-1] - 1), dim=-1).indices.sort(dim=-1).values
            found[i] = _Reference(ids[i], top.cpu(), _coarse(own, top).cpu())
    return [found[i] for i in range(len(ids))]


def _coarse(logits: Tensor, top: Tensor) -> Tensor:
    """
    Args:
        logits: (..., vocabulary) float32.
        top: (..., k) int64.

    Returns:
        Log-probabilities of those k outcomes and of all others together, (..., k + 1) float32.
    """
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, top), others], dim=-1) - total
