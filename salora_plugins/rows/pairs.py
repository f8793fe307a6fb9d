"""Pairs of responses to one request, a safe and an unsafe one, from the rows of preference data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..support.texts import shortened
from .batching import check_token_ids
from .errors import DataError
from .examples import IGNORED, Example, TokenizedExample
from .formats import parse_row, token_ids
from .reading import MAX_ROWS
from .sources import describe, read_rows, sources_of
from .tokenizing import Cutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[Example, Example] | tuple[TokenizedExample, TokenizedExample]
"""The chosen and the rejected response, each with the request before it."""

_TEXT = ("prompt", "chosen", "rejected")
_READ = (*_TEXT, "system")
# Prepared rows of preference trainers: TRL's names today, and those it had before.
_TOKENS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)


def load_pairs(source: Any, *, option: str, max_rows: int = MAX_ROWS, vocabulary: int | None = None) -> list[Pair]:
    """
    Read rows of `chosen` and `rejected` in the formats of TRL's preference trainers: with a `prompt`, or with the
    request within both; as texts, or as lists of messages; or prepared token ids (`prompt_ids`, `chosen_ids`,
    `rejected_ids`).

    Rows without two responses to the same request are left out with a warning.

    Args:
        source: As for `load_examples`.
        option: What the user calls this data, for messages.
        max_rows: Of a larger data set, a fixed random subset of this size is read.
        vocabulary: Number of tokens that the model knows, to refuse other ids.

    Returns:
        At least one pair, in the order of the rows.

    Raises:
        DataError: The data does not exist, cannot be read, or holds no pair.
    """
    if (several := sources_of(source, option)) is not None:
        return [
            pair
            for each in several
            for pair in load_pairs(each, option=option, max_rows=max_rows, vocabulary=vocabulary)
        ]
    where = describe(source, option)
    columns = (*_READ, *(column for names in _TOKENS for column in names))
    pairs, left_out = [], []
    for number, row in read_rows(source, option=option, max_rows=max_rows, columns=columns, beside=()):
        name = f"row {number} of {where}"
        pair = _pair(row, name, vocabulary)
        if pair is None:
            left_out.append(name)
        else:
            pairs.append(pair)
    if not pairs:
        found = (
            f"{left_out[0]} has not two responses to one request, nor has any other" if left_out else "there are none"
        )
        raise DataError(
            f"{where}: {found}. Give rows of `prompt`, `chosen` (a safe response) and `rejected` (an unsafe one)."
        )
    if left_out:
        warnings.warn(
            f"{where}: {len(left_out)} rows without two responses to one request are left out (first: {left_out[0]})",
            stacklevel=2,
        )
    return pairs


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    option: str,
    vocabulary: int | None = None,
) -> list[tuple[TokenizedExample, TokenizedExample]]:
    """
    Render pairs, tokenize them and mark the responses, as `tokenize_examples` does. Pairs of which a response lies
    behind the cut are left out with a warning.

    Args:
        pairs: As `load_pairs` gives them.
        tokenizer: May be None if all are tokenized.
        max_length: Number of tokens of an exchange that are kept, from the beginning.
        option: What the user calls this data, for messages.
        vocabulary: Number of tokens that the model knows.

    Raises:
        DataError: There is no tokenizer, the chat template refuses a conversation, the model does not know a token, or
            nothing is left.
    """
    instead = "rows of `prompt_ids`, `chosen_ids` and `rejected_ids`"
    cutter = Cutter(tokenizer, max_length, option=option, vocabulary=vocabulary, instead=instead)
    tokenized = []
    for chosen, rejected in pairs:
        both = cutter.cut(chosen), cutter.cut(rejected)
        if all(example.has_response for example in both):
            tokenized.append(both)
    if (lost := len(pairs) - len(tokenized)) > 0:
        found = (
            f"{lost} of {len(pairs)} pairs of {option} have a response without a token within "
            f"calibration_max_length={max_length} tokens"
        )
        if not tokenized:
            raise DataError(f"{found}, so nothing is left. Raise it, or give pairs with shorter prompts.")
        warnings.warn(f"{found} and are left out", stacklevel=2)
    return tokenized


def _pair(row: Any, where: str, vocabulary: int | None) -> Pair | None:
    """The pair of a row; None where it has not two responses to one request."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {shortened(row)}; a row must map column names to values")
    row = {name: value for name, value in row.items() if value is not None}
    for asked, *answers in _TOKENS:
        if asked in row and all(name in row for name in answers):
            before = token_ids(row, asked, where)
            safe, unsafe = (
                TokenizedExample(before + ids, (IGNORED,) * len(before) + ids)
                for ids in (token_ids(row, name, where) for name in answers)
            )
            check_token_ids(safe.input_ids, vocabulary, where.__str__)
            check_token_ids(unsafe.input_ids, vocabulary, where.__str__)
            return (safe, unsafe) if safe.has_response and unsafe.has_response else None
    row = {name: row[name] for name in _READ if name in row}  # others decide what a row is where answers are wanted
    if missing := [name for name in _TEXT[1:] if name not in row]:
        raise DataError(
            f"{where} has no `{missing[0]}`. Give rows of `prompt`, `chosen` (a safe response) and `rejected` (an "
            "unsafe one)."
        )
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    found = [parse_row(each, where, allow_text=True) for each in (row, swapped)]
    texts = [example for of_row in found for example in of_row if isinstance(example, Example) and example.response]
    if len(texts) != 2 or [len(of_row) for of_row in found] != [1, 1]:
        return None
    chosen, rejected = texts
    same = chosen.messages == rejected.messages and chosen.prompt_text == rejected.prompt_text
    return (chosen, rejected) if same and chosen.response != rejected.response else None
