"""Examples from wherever the user keeps them: the rows that are used, and what is said of those that are not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .batching import check_token_ids
from .errors import DataError
from .examples import Example, TokenizedExample
from .formats import FORMATS, TEXT_COLUMNS, TOKENIZED_COLUMNS, is_undesirable, parse_row
from .sources import describe, read_rows, sources_of

logger = logging.getLogger(__name__)

MAX_ROWS = 4_000
"""How many rows of a larger data set are read; calibration needs some hundreds."""

GROUP_COLUMNS = ("category", "form", "language")
"""Columns that say what kind of request a row is."""


def load_examples(
    source: Any,
    *,
    option: str,
    allow_missing_response: bool = False,
    max_rows: int = MAX_ROWS,
    vocabulary: int | None = None,
) -> list[Example | TokenizedExample]:
    """Read examples from wherever the user keeps them.

    A row is recognized by its columns, in this order:

    - `input_ids`, with `labels` or with TRL's masks, else every token counts; with `seq_lengths` the row is
      packed and is taken apart; TRL's prepared preference rows (`prompt_ids` and `chosen_ids` or
      `completion_ids`);
    - `messages` or `conversations`, whose last turn is the response if it is the assistant's;
    - `chosen`, with or without `prompt`; for two plain strings without `prompt`, it is what `chosen` and
      `rejected` share at their beginning, as in TRL;
    - `prompt` with `completion` or `response`;
    - Alpaca's `instruction`, with or without `input`, `system` and `history`, and `output`;
    - `text`, all of which counts as response; where requests are wanted, `instruction` comes first.

    Where `allow_missing_response`, a row that is a plain string is a request.

    A text in `system` is the system turn of a conversation or a prompt that has none.

    `prompt`, `completion` and `chosen` are strings or lists of messages. A plain-string `prompt` is a user
    turn where the tokenizer has a chat template. An answer that is marked as undesirable (KTO's `label` is
    False, 0, or the text "false" or "0") is not used, nor are further columns. A row whose last turn only calls tools
    is left out with a warning.

    Args:
        source: one of these, or a list of several (`sources_of`): the name of a registered data source; a file (.jsonl,
            .json, .csv, .parquet, or .txt with a request a line); a folder with one of the others or one that
            `datasets` saved; a hub data set id (`id` or `id:config`, its `train` split). Or a `datasets` object, or
            rows (mappings, or examples that are passed on).
        option: what the user calls this data, for messages.
        allow_missing_response: keep requests without an answer (response None), and refuse plain `text`,
            which does not tell request and response apart. Otherwise rows without an answer are left out
            with a warning.
        max_rows: of a larger data set, a fixed random subset of this size is read (of a stream, the
            first rows).
        vocabulary: number of tokens that the model knows (`models.embeddings`), to refuse other ids in rows.

    Returns:
        At least one example, in the order of the rows.

    Raises:
        DataError: the data does not exist, cannot be read, or holds nothing usable.
    """
    if isinstance(source, str) and source == "builtin" and not allow_missing_response:
        raise DataError(
            f"{option}='builtin': the built-in set holds harmful requests for safety_data, and no answers to "
            f"train on. Give {option} the data that you fine-tune on."
        )
    if (several := sources_of(source, option)) is not None:
        return [
            replace(example, source=str(each))
            for each in several
            for example in load_examples(
                each,
                option=option,
                allow_missing_response=allow_missing_response,
                max_rows=max_rows,
                vocabulary=vocabulary,
            )
        ]
    where = describe(source, option)
    left_out = _LeftOut(where)
    columns = (*TOKENIZED_COLUMNS, *TEXT_COLUMNS)
    rows = read_rows(source, option=option, max_rows=max_rows, columns=columns, beside=GROUP_COLUMNS)
    examples = list(_usable(rows, left_out, allow_missing_response, vocabulary))
    if not examples:
        raise DataError(left_out.nothing_usable())
    left_out.report()
    if not any(isinstance(example, Example) or example.has_response for example in examples):
        raise DataError(
            f"{where}: no row has a response token (every label is -100, or every mask is 0). Mark "
            "the response tokens in `labels`."
        )
    return examples


def _usable(
    rows: Iterable[tuple[int, Any]], left_out: _LeftOut, allow_missing_response: bool, vocabulary: int | None
) -> Iterator[Example | TokenizedExample]:
    """The examples of numbered rows; the rows that are not used are noted in `left_out`."""
    for number, row in rows:
        row_name = f"row {number} of {left_out.where}"
        if is_undesirable(row):
            left_out.undesirable.append((row_name, row["label"]))
            continue
        found = parse_row(row, row_name, allow_text=not allow_missing_response)
        if not found:
            left_out.only_calls.append(row_name)
        group = _group(row)
        for example in found:
            if isinstance(example, TokenizedExample):
                check_token_ids(example.input_ids, vocabulary, row_name.__str__)
            elif example.response is None and not allow_missing_response:
                left_out.unanswered.append(row_name)
                continue
            elif group:
                example = replace(example, group=group)
            yield example


def _group(row: Any) -> str:
    """What kind of request a row says that it is; nothing where it does not."""
    if not isinstance(row, Mapping):
        return ""
    return " ".join(str(row[name]) for name in GROUP_COLUMNS if row.get(name) is not None)


@dataclass
class _LeftOut:
    """The rows of a source that are not used."""

    where: str
    unanswered: list[str] = field(default_factory=list)
    only_calls: list[str] = field(default_factory=list)
    undesirable: list[tuple[str, Any]] = field(default_factory=list)

    def nothing_usable(self) -> str:
        """Why no row is left."""
        if self.unanswered:
            return f"{self.unanswered[0]} has no response, nor has any other row. Give rows with one of: {FORMATS}."
        if self.only_calls:
            return (
                f"{self.only_calls[0]} ends with a turn that only calls tools, as all do. Give answers that are text."
            )
        if self.undesirable:
            return f"{self.where}: every row has label False (an undesirable answer). Give desirable answers too."
        return f"{self.where} has no rows. Give data with at least one."

    def report(self) -> None:
        """Say how many rows are not used, and why."""
        if self.unanswered:
            warnings.warn(
                f"{self.where}: {len(self.unanswered)} rows without a response are left out (first: "
                f"{self.unanswered[0]})",
                stacklevel=3,
            )
        if self.only_calls:
            warnings.warn(
                f"{self.where}: {len(self.only_calls)} rows whose last turn only calls tools are left out (first: "
                f"{self.only_calls[0]})",
                stacklevel=3,
            )
        if self.undesirable:
            logger.info(
                "%s: %d rows with label False (undesirable answers) are not used", self.where, len(self.undesirable)
            )
        unclear = [(name, label) for name, label in self.undesirable if not isinstance(label, bool)]
        if unclear:
            warnings.warn(
                f"{self.where}: {len(unclear)} answers with label {unclear[0][1]!r} are taken as undesirable, as in "
                f"KTO, and not used (first: {unclear[0][0]}). If the column means something else, leave it out.",
                stacklevel=3,
            )
