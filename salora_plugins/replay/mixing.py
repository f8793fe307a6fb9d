"""Refusals among training rows, in the rows' own format."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..options import check_real
from ..rows.examples import IGNORED, TokenizedExample
from ..rows.rendering import tokenizer_of
from ..rows.tokenizing import tokenize_examples
from ..support.notices import tell
from .refusals import Refusal, refusals_digest

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_REPEATS = 4
"""How often a refusal may stand among the rows without a warning."""

_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt"}
_UNKNOWN_LENGTH = 1 << 30


def check_share(share: float, option: str = "share") -> None:
    """
    Raises:
        ValueError: It is no share of rows.
    """
    check_real(option, share, "a share of the rows between 0 and 1, such as 0.05", lambda number: 0 < number < 1)


def check_can_be_mixed_into(dataset: Any) -> None:
    """
    Raises:
        ValueError: It is no training set whose rows are supervised examples, one each.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"refusals can be mixed into a datasets.Dataset, and this is a {type(dataset).__name__}. Give the training "
            "split, loaded and not streamed."
        )
    if not len(dataset):
        raise ValueError("refusals cannot be mixed into a training set without rows.")
    columns = set(dataset.column_names)
    if preferences := columns & {"chosen", "rejected", "chosen_ids", "chosen_input_ids", "label"}:
        raise ValueError(
            f"refusals cannot be mixed into preferences (the rows have {sorted(preferences)[0]!r}): there is no answer "
            "of the model that would be the worse one. Use salora_plugins.replay.RefusalAnchorCallback instead."
        )
    positions = dataset.with_format(None)[0].get("position_ids") or []
    if "seq_lengths" in columns or 0 in positions[1:]:
        raise ValueError(
            "refusals cannot be mixed into rows that are packed already (seq_lengths, position_ids). Mix them in "
            "before the rows are packed, or pack in the data loader."
        )


def number_of_refusals(rows: int, share: float) -> int:
    """How many refusals a training set needs for each to stand there no more than MAX_REPEATS times, at least 128."""
    return max(128, -(-_number_of_rows(rows, share) // MAX_REPEATS))


def _number_of_rows(rows: int, share: float) -> int:
    """How many rows are to be mixed into `rows`."""
    return max(1, round(share / (1 - share) * rows))


def mix_refusals(
    dataset: Dataset,
    refusals: Sequence[Refusal],
    share: float,
    *,
    seed: int = 0,
    max_repeats: int = MAX_REPEATS,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Dataset:
    """
    Mix refusals into a training set, in the format of its rows: `messages`, `conversations` (role/content or
    from/value), `prompt` and `completion` (messages or text), `text`, or token ids (`input_ids`).

    The rows of the data set stay in their order, with the refusals spread evenly among them.

    Args:
        dataset: The training set of a supervised trainer, with a length.
        refusals: Such as those of `own_refusals`.
        share: Which share of the rows of the result are refusals, as closely as whole rows allow; at least one is.
        seed: Of the order of the refusals.
        max_repeats: How often each may stand in the result without a warning.
        tokenizer: Of the trainer; needed for rows of text or of token ids.
        max_length: Tokens of a refusal's row that are kept, where rows are token ids.

    Returns:
        A data set with the same columns; those that are not needed are None in the refusals' rows.

    Raises:
        ValueError: The rows are preferences, packed or of no known format, there are no rows or no refusals, or a
            tokenizer is missing.
    """
    from datasets import Dataset, concatenate_datasets

    check_share(share)
    check_can_be_mixed_into(dataset)
    if not refusals:
        raise ValueError("there are no refusals to mix in: give at least one.")
    count = _number_of_rows(len(dataset), share)
    repeats = -(-count // len(refusals))
    if repeats > max_repeats:
        logger.warning(
            "%d rows of refusals are mixed in and there are %d refusals, so that each stands there up to %d times. "
            "Give more requests (num of own_refusals), or a smaller share.",
            count,
            len(refusals),
            repeats,
        )
    rows = _rows(dataset, refusals, tokenizer, max_length)
    order = _rounds(len(rows), count, seed)
    features = dataset.features
    filled = [{name: row.get(name) for name in features} for row in rows]
    # As plain columns first: what the data set's own types leave out is filled by their encoding.
    mixed_in = Dataset.from_list([features.encode_example(filled[i]) for i in order], features=features)
    total = len(dataset) + count
    places = {(2 * j + 1) * total // (2 * count): len(dataset) + j for j in range(count)}
    own = iter(range(len(dataset)))
    mixed = concatenate_datasets([dataset.with_format(None), mixed_in])
    mixed = mixed.select([places[i] if i in places else next(own) for i in range(total)])
    tell(
        logger,
        "%d rows of %d refusals are mixed into %d rows (%.1f %%; SHA-256 of the refusals %s).",
        count,
        len(refusals),
        len(dataset),
        100 * count / total,
        refusals_digest(refusals)[:16],
    )
    return mixed


def _rounds(size: int, count: int, seed: int) -> list[int]:
    """`count` indices below `size`: all of them in a random order, then in another one, and so on."""
    draw, order = random.Random(seed), list[int]()
    while len(order) < count:
        order += draw.sample(range(size), size)
    return order[:count]


def _rows(
    dataset: Dataset, refusals: Sequence[Refusal], tokenizer: Any, max_length: int | None
) -> list[dict[str, Any]]:
    """The refusals as rows of the data set; only the columns of its format."""
    columns, first = set(dataset.column_names), dataset.with_format(None)[0]
    if "input_ids" in columns:
        return _token_rows(dataset.features, refusals, tokenizer, max_length)
    for column in ("messages", "conversations"):
        if column in columns:
            return [{column: _conversation(refusal, first[column])} for refusal in refusals]
    if {"prompt", "completion"} <= columns:
        if isinstance(first["prompt"], str):
            texts = _texts(refusals, tokenizer, "prompt and completion of text")
            return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
        return [
            {
                "prompt": [_message(message, first["prompt"]) for message in refusal.messages],
                "completion": [_message({"role": "assistant", "content": refusal.response}, first["completion"])],
            }
            for refusal in refusals
        ]
    if "text" in columns:
        return [{"text": "".join(parts)} for parts in _texts(refusals, tokenizer, "text")]
    raise ValueError(
        f"refusals cannot be mixed into rows with the columns {', '.join(sorted(columns))}. Give rows with messages, "
        "conversations, prompt and completion, text, or input_ids."
    )


def _conversation(refusal: Refusal, like: Any) -> list[dict[str, Any]]:
    messages = [*refusal.messages, {"role": "assistant", "content": refusal.response}]
    if isinstance(like, Sequence) and like and isinstance(like[0], Mapping) and "from" in like[0]:
        return [{"from": _SHAREGPT_ROLES.get(m["role"], m["role"]), "value": m["content"]} for m in messages]
    return [_message(message, like) for message in messages]


def _message(message: Mapping[str, Any], like: Any) -> dict[str, Any]:
    """A message with the keys of the rows' messages, its content a list of parts where theirs is."""
    example = like[0] if isinstance(like, Sequence) and like and isinstance(like[0], Mapping) else message
    made = {key: value for key, value in message.items() if key in example}
    if not isinstance(example.get("content"), (str, type(None))):
        made["content"] = [{"type": "text", "text": message["content"]}]
    return made


def _texts(refusals: Sequence[Refusal], tokenizer: Any, kind: str) -> Iterator[tuple[str, str]]:
    """What stands before a refusal and the refusal with its end, as text that a trainer tokenizes again."""
    tokenizer = _needed(tokenizer, kind)
    for row in _tokenized(refusals, tokenizer):
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        whole, prompt, completion = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (row.input_ids, row.input_ids[:start], row.input_ids[start:])
        )
        if whole.startswith(prompt):  # with the space between the two, which a part alone may lose
            completion = whole.removeprefix(prompt)
        before = _as_read_again(tokenizer, whole, row.input_ids)
        yield prompt.removeprefix(before), completion


def _as_read_again(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """
    What to leave out at the beginning of a text for the tokenizer to read these token ids from the rest: the token of
    the beginning, where the tokenizer itself writes it, and a space that decoding has put behind that.
    """
    bos = tokenizer.bos_token or ""
    if not bos or not text.startswith(bos):
        return ""
    candidates = ["", bos, *([f"{bos} "] if text.startswith(f"{bos} ") else [])]
    for candidate in candidates:
        if tuple(tokenizer(text.removeprefix(candidate))["input_ids"]) == tuple(ids):
            return candidate
    writes_it = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    return bos if writes_it else ""


def _token_rows(
    features: Mapping[str, Any], refusals: Sequence[Refusal], tokenizer: Any, max_length: int | None
) -> list[dict[str, Any]]:
    made = {
        "input_ids": lambda row: list(row.input_ids),
        "labels": lambda row: list(row.labels),
        "attention_mask": lambda row: [1] * len(row.input_ids),
        "token_type_ids": lambda row: [0] * len(row.input_ids),
        "position_ids": lambda row: list(range(len(row.input_ids))),
        "completion_mask": lambda row: [int(label != IGNORED) for label in row.labels],
        "assistant_masks": lambda row: [int(label != IGNORED) for label in row.labels],
        "length": lambda row: len(row.input_ids),
    }
    if unknown := [name for name, feature in features.items() if name not in made and _holds_numbers(feature)]:
        raise ValueError(
            f"refusals cannot be mixed into tokenized rows with the column {unknown[0]!r}, whose value for them is not "
            "known. Remove the column."
        )
    tokenizer = _needed(tokenizer, "input_ids")
    examples = [
        cut
        for row in _tokenized(refusals, tokenizer)
        if (cut := TokenizedExample(row.input_ids[:max_length], row.labels[:max_length])).has_response
    ]
    if not examples:
        raise ValueError(
            f"max_length={max_length}: no refusal has a token of its response within it, so that there is nothing to "
            "mix in. Raise it, or give shorter requests."
        )
    return [{name: make(row) for name, make in made.items() if name in features} for row in examples]


def _holds_numbers(feature: Any) -> bool:
    """Whether a column is of numbers, or of lists of them, which a collator may look at."""
    inner = getattr(feature, "feature", feature)
    return str(getattr(inner, "dtype", "")).startswith(("int", "uint", "float", "bool"))


def _tokenized(refusals: Sequence[Refusal], tokenizer: Any) -> list[TokenizedExample]:
    examples = [refusal.example for refusal in refusals]
    return tokenize_examples(examples, tokenizer, max_length=_UNKNOWN_LENGTH, option="refusals")


def _needed(tokenizer: Any, kind: str) -> Any:
    if tokenizer is None:
        raise ValueError(
            f"refusals can be mixed into rows with {kind} only with the trainer's tokenizer. Pass tokenizer=."
        )
    return tokenizer_of(tokenizer)
