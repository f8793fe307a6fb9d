"""Pairs of a safe and an unsafe response to one request, as token ids."""

from __future__ import annotations

from ..rows.examples import Example, TokenizedExample, select_examples
from ..rows.pairs import load_pairs, tokenize_pairs
from ..rows.reading import MAX_ROWS
from .rows import tokenizer_for
from .settings import RowSettings


def contrastive_rows(settings: RowSettings) -> list[tuple[TokenizedExample, TokenizedExample]]:
    """
    Args:
        settings: Which rows: with `prompt`, `chosen` and `rejected`, in the forms that trainers of preferences take.

    Returns:
        At most `settings.num` pairs of the chosen and the rejected example, in a random order.

    Raises:
        DataError: They cannot be read, or no pair is left of them.
        CalibrationError: A row is text, and there is no tokenizer.
    """
    pairs = load_pairs(
        settings.source,
        option=settings.option,
        max_rows=max(MAX_ROWS, settings.num),
        vocabulary=settings.vocabulary,
    )
    selected = select_examples(pairs, settings.num, settings.seed)
    has_text = any(isinstance(example, Example) for pair in selected for example in pair)
    return tokenize_pairs(
        selected,
        tokenizer_for(settings) if has_text else None,
        max_length=settings.max_length,
        option=settings.option,
        vocabulary=settings.vocabulary,
    )
