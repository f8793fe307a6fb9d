"""Token ids to padded batches, and the check that a model has an embedding for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..support.distributed import rank_and_world_size
from .errors import DataError
from .examples import IGNORED, TokenizedExample


def collate(examples: Sequence[TokenizedExample], pad_token_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest of them.

    Args:
        examples: at least one example.
        pad_token_id: fills `input_ids` behind an example; any id of the vocabulary does, since the attention
            mask hides it.

    Returns:
        `input_ids`, `labels` (-100: not a response token, or padding) and `attention_mask` (1: a token, 0:
        padding), int64, each of shape (batch, longest).
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), longest), -100, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def batches(examples: Sequence[TokenizedExample], batch_size: int, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """Batches of examples of similar length, as `collate` returns them.

    The longest come first, so that a batch that does not fit into memory fails at once; examples of one
    length keep their order, so that the batches are the same every time.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    by_length = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad_token_id)


def pad_left(
    sequences: Sequence[Sequence[int]], pad_token_id: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left, so that all end where a model is to go on.

    Returns:
        Token ids and attention mask (1: a token, 0: padding), int64, each of shape (sequences, longest).
    """
    width = max(map(len, sequences))
    tokens = torch.tensor([[pad_token_id] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return tokens, mask


def check_token_ids(input_ids: Sequence[int], vocabulary: int | None, name: Callable[[], str]) -> None:
    """
    Refuse ids that a model has no embedding for; on a GPU they would end every later use of it in the process.

    Args:
        input_ids: Of one sequence.
        vocabulary: How many tokens the model has an embedding for; None is not known.
        name: What to call the sequence in messages.

    Raises:
        DataError: There is such an id.
    """
    for position, token in enumerate(input_ids):
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            known = "" if vocabulary is None else f", and the model has embeddings for 0 to {vocabulary - 1}"
            raise DataError(
                f"{name()} has the token id {token} at position {position}{known}. Tokenize with the model's own "
                "tokenizer; where tokens were added to that, call model.resize_token_embeddings(len(tokenizer)) first."
            )


def share_of_rank(examples: Sequence[TokenizedExample], batch_size: int) -> list[dict[str, Tensor]]:
    """The batches of this rank of torch.distributed."""
    rank, world_size = rank_and_world_size()
    share = examples[rank::world_size]
    if not share:  # more ranks than examples: one whose positions do not count, since every rank must run the model
        share = [TokenizedExample(examples[0].input_ids, (IGNORED,) * len(examples[0].input_ids))]
    # Padding is masked, so that any id will do.
    return list(batches(share, batch_size, pad_token_id=0))
