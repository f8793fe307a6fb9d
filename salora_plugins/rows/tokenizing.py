"""Chat examples to token ids with the response marked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..support.texts import shortened
from .batching import check_token_ids
from .errors import DataError
from .examples import IGNORED, Example, RenderedRequest, TokenizedExample
from .rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_examples(
    examples: Iterable[Example | TokenizedExample],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    option: str,
    vocabulary: int | None = None,
) -> list[TokenizedExample]:
    """Render examples, tokenize them and mark the response, including the end of turn that closes it.

    A conversation is rendered with the tokenizer's chat template. Without one, prompt, response and the
    end-of-sequence token are put together as plain text, as TRL does. Examples are cut to `max_length`
    tokens; those that lose all of their response, or never had one, are left out with a warning.

    Args:
        examples: examples with a response; tokenized ones are only cut.
        tokenizer, max_length, option, vocabulary: as for `render_rows`.

    Raises:
        DataError: as `render_rows`, or an example has no response.
    """
    rows = render_rows(examples, tokenizer, max_length=max_length, option=option, vocabulary=vocabulary)
    tokenized = []
    for row in rows:
        if isinstance(row, RenderedRequest):
            raise DataError(f"the example of {option} that asks {shortened(row.request)} has no response")
        tokenized.append(row)
    return tokenized


def render_rows(
    examples: Iterable[Example | TokenizedExample],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    option: str,
    vocabulary: int | None = None,
) -> list[TokenizedExample | RenderedRequest]:
    """`tokenize_examples` for examples of which some have no response: requests, which are rendered and not cut.

    Args:
        examples: in any form.
        tokenizer: may be None if all examples are tokenized.
        max_length: number of tokens of an example that are kept, from the beginning.
        option: what the user calls this data, for messages.
        vocabulary: number of tokens that the model knows, to refuse those that only the tokenizer does.

    Raises:
        DataError: there is no tokenizer, the chat template refuses a conversation, the model does not know a token, or
            nothing is left.
    """
    rows: list[TokenizedExample | RenderedRequest] = []
    cutter = Cutter(
        tokenizer, max_length, option=option, vocabulary=vocabulary, instead="rows of `input_ids` and `labels`"
    )
    left_out = requests = 0
    for example in examples:
        if isinstance(example, Example) and example.response is None:
            prompt_ids = tuple(_prompt_ids(example, cutter.renderer))
            rows.append(RenderedRequest(example.request, prompt_ids, example.source))
            requests += 1
            continue
        cut = cutter.cut(example)
        if cut.has_response:
            rows.append(cut)
        else:
            left_out += 1
    if left_out:
        found = (
            f"{left_out} of {left_out + len(rows) - requests} examples of {option} have no response token within "
            f"calibration_max_length={max_length} tokens"
        )
        if not rows:
            raise DataError(f"{found}, so nothing is left. Raise it, or give examples with shorter prompts.")
        warnings.warn(f"{found} and are left out", stacklevel=2)
    return rows


@dataclass(frozen=True)
class Cutter:
    """Tokenizes examples where they are text, all with one renderer, and cuts them."""

    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    _: KW_ONLY
    option: str
    """What the user calls this data, for messages."""
    vocabulary: int | None
    instead: str
    """What can be given where there is no tokenizer, for messages."""

    @cached_property
    def renderer(self) -> Renderer:
        """
        Raises:
            DataError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise DataError(
                f"{self.option} holds text, and there is no tokenizer to tokenize it. Pass `tokenizer=`, or give "
                f"{self.instead}."
            )
        return Renderer(self.tokenizer)

    def cut(self, example: Example | TokenizedExample) -> TokenizedExample:
        """
        The first `max_length` tokens of an example with a response, which may lie behind them.

        Raises:
            DataError: There is no tokenizer, the chat template refuses a conversation, or the model does not know a
                token.
        """
        if isinstance(example, Example):
            name = f"the example of {self.option} that asks {shortened(example.request)}"
            example = replace(_tokenized(example, self.renderer, name), source=example.source)
            check_token_ids(example.input_ids, self.vocabulary, name.__str__)
        return TokenizedExample(example.input_ids[: self.max_length], example.labels[: self.max_length], example.source)


def render_prompts(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of what stands before the responses, up to where the model begins to answer."""
    renderer = Renderer(tokenizer)
    return [_prompt_ids(example, renderer) for example in examples]


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> TokenizedExample:
    """
    Render one example and mark its response.

    Args:
        example: With a response.
        tokenizer: With or without a chat template.
        name: What to call the example in messages.

    Raises:
        DataError: See [`tokenize_examples`].
    """
    if example.response is None:
        raise DataError(f"{name} has no response")
    return _tokenized(example, Renderer(tokenizer), name)


def _prompt_ids(example: Example, renderer: Renderer) -> list[int]:
    return renderer.prompt_ids(example, f"the request {shortened(example.request)}")


def _tokenized(example: Example, renderer: Renderer, name: str) -> TokenizedExample:
    input_ids, num_prompt = renderer.prompt_and_response_ids(example, name)
    return TokenizedExample(tuple(input_ids), (IGNORED,) * num_prompt + tuple(input_ids[num_prompt:]))
