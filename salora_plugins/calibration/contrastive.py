"""Pairs of a safe and an unsafe response to one request, as token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..rows.batching import check_token_ids
from ..rows.errors import DataError, shortened
from ..rows.examples import Example, TokenizedExample, select_examples
from ..rows.formats import TEXT_COLUMNS, TOKENIZED_COLUMNS, parse_row
from ..rows.reading import MAX_ROWS
from ..rows.sources import describe, read_rows
from ..rows.tokenizing import tokenize
from .rows import tokenizer_for
from .settings import RowSettings

logger = logging.getLogger(__name__)

Pair = tuple[TokenizedExample, TokenizedExample]
_PAIRS = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))


def contrastive_rows(settings: RowSettings) -> list[Pair]:
    """
    Args:
        settings: Which rows: with `prompt`, `chosen` and `rejected`, in the forms that trainers of preferences take.

    Returns:
        At most `settings.num` pairs of the chosen and the rejected example, in a random order; those of which one has
        no response within `settings.max_length` tokens are left out.

    Raises:
        DataError: They cannot be read, a row has no two responses, or no pair is left.
        CalibrationError: A row is text, and there is no tokenizer.
    """
    where = describe(settings.source, settings.option)
    columns = (*TOKENIZED_COLUMNS, *TEXT_COLUMNS, *(name for pair in _PAIRS for name in pair))
    rows = read_rows(settings.source, option=settings.option, max_rows=max(MAX_ROWS, settings.num), columns=columns)
    examples = [_examples(row, f"row {number} of {where}") for number, row in rows]
    chosen = select_examples(examples, settings.num, settings.seed)
    pairs = list(_tokenized(chosen, settings))
    if not pairs:
        raise DataError(f"{where}: no pair has two responses within calibration_max_length={settings.max_length}.")
    if len(pairs) < len(chosen):
        left_out = len(chosen) - len(pairs)
        logger.warning("%s: %d pairs without two responses within %d tokens.", where, left_out, settings.max_length)
    return pairs


def _examples(row: Any, where: str) -> tuple[Example | TokenizedExample, Example | TokenizedExample]:
    names = next((names for names in _PAIRS if isinstance(row, Mapping) and all(row.get(n) for n in names)), None)
    if names is None:
        found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else shortened(row)
        raise DataError(f"{where} must have prompt, chosen and rejected; it has {found}.")
    safe, unsafe = names
    found = [parse_row(entry, where, allow_text=True) for entry in (row, {**row, safe: row[unsafe], unsafe: row[safe]})]
    if any(len(of_row) != 1 for of_row in found):
        raise DataError(f"{where}: a response only calls tools. Give responses that are text.")
    return found[0][0], found[1][0]


def _tokenized(
    pairs: Sequence[tuple[Example | TokenizedExample, Example | TokenizedExample]], settings: RowSettings
) -> Iterator[Pair]:
    needs_tokenizer = any(isinstance(example, Example) for pair in pairs for example in pair)
    tokenizer = tokenizer_for(settings) if needs_tokenizer else None
    for pair in pairs:
        safe, unsafe = (_cut(example, tokenizer, settings) for example in pair)
        if safe is not None and unsafe is not None:
            yield safe, unsafe


def _cut(example: Example | TokenizedExample, tokenizer: Any, settings: RowSettings) -> TokenizedExample | None:
    """As token ids; None where no response is left."""
    name = f"an example of {settings.option}"
    if isinstance(example, Example):
        if example.response is None:
            return None
        example = tokenize(example, tokenizer, name)
    check_token_ids(example.input_ids, settings.vocabulary, name.__str__)
    cut = TokenizedExample(example.input_ids[: settings.max_length], example.labels[: settings.max_length])
    return cut if cut.has_response else None
