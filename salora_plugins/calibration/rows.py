"""The rows of a calibration: read, selected and rendered once, before a model runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..activations.errors import CalibrationError
from ..models.loading import find_tokenizer
from ..rows.examples import IGNORED, Example, RenderedRequest, TokenizedExample, data_digest, select_examples
from ..rows.reading import MAX_ROWS, load_examples
from ..rows.rendering import tokenizer_of, trainer_tokenizer
from ..rows.tokenizing import render_rows, tokenize_examples
from .settings import RowSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SafetyRows:
    """Safety data in the order in which it is to be used, as token ids."""

    rows: list[TokenizedExample | RenderedRequest]
    """All there are where some have no response, else as many as are used."""

    tokenizer: Any
    """What they were rendered with; as it was given where they came as token ids."""

    @cached_property
    def digest(self) -> str:
        """Of the requests and then of the rows with a response; another with another tokenizer or chat template."""
        requests = [row.prompt_ids for row in self.rows if isinstance(row, RenderedRequest)]
        return data_digest(
            [TokenizedExample(prompt, (IGNORED,) * len(prompt)) for prompt in requests]
            + [row for row in self.rows if isinstance(row, TokenizedExample)]
        )

    @property
    def has_requests(self) -> bool:
        """Whether rows are to be answered by the model."""
        return any(isinstance(row, RenderedRequest) for row in self.rows)


def safety_rows(settings: RowSettings) -> SafetyRows:
    """
    Rows with and without a response.

    Raises:
        DataError: They cannot be read or rendered.
        CalibrationError: A row is text, and there is no tokenizer.
    """
    examples = _without_repeats(_selected(settings, allow_missing_response=True), settings.option)
    if not any(isinstance(example, Example) and example.response is None for example in examples):
        examples = examples[: settings.num]
    tokenizer = _tokenizer(settings, examples)
    rows = render_rows(
        examples,
        tokenizer,
        max_length=settings.max_length,
        option=settings.option,
        vocabulary=settings.vocabulary,
    )
    return SafetyRows(rows, tokenizer)


def _without_repeats(examples: list[Example | TokenizedExample], option: str) -> list[Example | TokenizedExample]:
    """One of each, so that none counts twice and none that is held out is calibrated on."""
    first = list({data_digest([example]): example for example in reversed(examples)}.values())[::-1]
    if repeats := len(examples) - len(first):
        logger.warning("%s: %d of %d rows repeat others and are left out.", option, repeats, len(examples))
    return first


def task_rows(settings: RowSettings) -> list[TokenizedExample]:
    """
    Rows with a response.

    Raises:
        DataError, CalibrationError: As `safety_rows`.
    """
    examples = _selected(settings, allow_missing_response=False)[: settings.num]
    return tokenize_examples(
        examples,
        _tokenizer(settings, examples),
        max_length=settings.max_length,
        option=settings.option,
        vocabulary=settings.vocabulary,
    )


def _selected(settings: RowSettings, *, allow_missing_response: bool) -> list[Example | TokenizedExample]:
    """All rows in a random order, of which the first are to be used."""
    examples = load_examples(
        settings.source,
        option=settings.option,
        allow_missing_response=allow_missing_response,
        max_rows=max(MAX_ROWS, settings.num),
        vocabulary=settings.vocabulary,
    )
    return select_examples(examples, len(examples), settings.seed)


def _tokenizer(settings: RowSettings, examples: Sequence[Example | TokenizedExample]) -> Any:
    """That of `tokenizer_for` where a row is text; else as it was given."""
    if not any(isinstance(example, Example) for example in examples):
        return settings.tokenizer
    return tokenizer_for(settings)


def tokenizer_for(settings: RowSettings) -> Any:
    """
    What text is rendered with: the tokenizer that was given, the one of the trainer that is being made, or the one in
    the model's own folder.

    Raises:
        CalibrationError: There is none.
        ValueError: The given one renders otherwise than the trainer's.
    """
    trainers = trainer_tokenizer()
    if settings.tokenizer is not None:
        given = tokenizer_of(settings.tokenizer)
        if trainers is not None:
            _check_renders_alike(given, trainers)
        return given
    return _own_tokenizer(settings) if trainers is None else trainers


def _check_renders_alike(given: Any, trainers: Any) -> None:
    differences = []
    if given is not trainers:
        if (given.chat_template or None) != (trainers.chat_template or None):
            differences.append("chat template")
        if given.get_vocab() != trainers.get_vocab():
            differences.append("vocabulary")
    if differences:
        raise ValueError(
            f"SaLoRAConfig(tokenizer=...) has another {' and '.join(differences)} than the trainer's processing_class "
            "(chat_template_path changes that), so that calibration would see other tokens than training. Leave "
            "`tokenizer` out of SaLoRAConfig, which then takes the trainer's, or give both the same."
        )


def _own_tokenizer(settings: RowSettings) -> Any:
    try:
        if not settings.base_model:
            raise ValueError("the model has no name or path")
        return find_tokenizer(settings.base_model)
    except Exception as error:
        raise CalibrationError(
            f"{settings.option} holds text, and no tokenizer was found for the model ({error}). Pass "
            "SaLoRAConfig(tokenizer=...), or rows with input_ids and labels."
        ) from error
