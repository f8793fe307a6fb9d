"""Rows of any common format to chat examples, and chat examples to token ids with the response marked.

Nothing here knows models, PEFT or trainers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from .batching import check_token_ids
from .rendering import common_prefix_length, prompt_and_response_ids, prompt_ids
from .sources import DataError, describe, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataError",
    "Example",
    "TokenizedExample",
    "data_digest",
    "load_examples",
    "parse_row",
    "render_prompt",
    "select_examples",
    "tokenize",
    "tokenize_examples",
]

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not part of a response."""

MAX_ROWS = 4_000
"""How many rows of a larger data set are read; calibration needs some hundreds."""

FORMATS = (
    "messages; prompt + response; prompt + completion; prompt + chosen; chosen (+ rejected); "
    "conversations (from/value); instruction (+ input) + output; text; input_ids (+ labels)"
)
"""The columns that a row can have, for messages."""

# Prepared rows of preference trainers: TRL's names today, and those it had before.
_TOKEN_PAIRS = (
    ("prompt_ids", "chosen_ids"),
    ("prompt_ids", "completion_ids"),
    ("prompt_input_ids", "chosen_input_ids"),
    ("prompt_input_ids", "completion_input_ids"),
)
_MASKS = ("completion_mask", "assistant_masks")
_CONVERSATIONS = ("messages", "conversations")
_ANSWERS = ("completion", "response")
_TOKENIZED = ("input_ids", "labels", "attention_mask", "seq_lengths", *_MASKS, *chain(*_TOKEN_PAIRS))
_ALPACA = ("instruction", "input", "output", "system", "history")
TEXT_COLUMNS = (*_CONVERSATIONS, "chosen", "rejected", "prompt", *_ANSWERS, *_ALPACA, "text", "label")
"""Columns of rows of text that are looked at."""
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SHAREGPT = {"from": "role", "value": "content"}
_CALLS = ("tool_calls", "function_call")
"""Keys of a message that calls tools, which may then have no content."""


@dataclass(frozen=True)
class Example:
    """One exchange: a conversation, or plain text if there are no messages."""

    messages: tuple[dict[str, Any], ...] = ()
    """Everything before the response, each with `role` and `content`; empty for plain text."""

    response: str | None = None
    """The assistant's answer; None: the model's own is to be used."""

    prompt_text: str = ""
    """Of plain text, what stands before the response; may be empty."""

    @property
    def request(self) -> str:
        """What is asked: the last user turn, or the text before the response."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message.get("content", "")
        return self.prompt_text


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids with the response marked."""

    input_ids: tuple[int, ...]
    """Token ids, (length,)."""

    labels: tuple[int, ...]
    """-100 where a token is not part of the response, (length,)."""

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise DataError(f"input_ids has {len(self.input_ids)} entries, but labels has {len(self.labels)}")

    @property
    def has_response(self) -> bool:
        """Whether any token belongs to a response."""
        return any(label != IGNORED for label in self.labels)


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

    `prompt`, `completion` and `chosen` are strings or lists of messages. A plain-string `prompt` is a user
    turn where the tokenizer has a chat template. An answer that is marked as undesirable (KTO's `label` is
    False, 0, or the text "false" or "0") is not used, nor are further columns. A row whose last turn only calls tools
    is left out with a warning.

    Args:
        source: the name of a registered data source; a file (.jsonl, .json, .csv, .parquet, or .txt with a request
            a line); a folder with one of the others or one that `datasets` saved; a hub data set id (`id` or
            `id:config`, its `train` split); a `datasets` object; rows (mappings, or examples that are passed on).
        option: what the user calls this data, for messages.
        allow_missing_response: keep requests without an answer (response None), and refuse plain `text`,
            which does not tell request and response apart. Otherwise rows without an answer are left out
            with a warning.
        max_rows: of a larger data set, a fixed random subset of this size is read (of a stream, the
            first rows).
        vocabulary: number of tokens that the model knows (`batching.vocabulary_size`), to refuse other ids in rows.

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
    where = describe(source, option)
    examples: list[Example | TokenizedExample] = []
    left_out = _LeftOut(where)
    for number, row in read_rows(source, option=option, max_rows=max_rows, columns=(*_TOKENIZED, *TEXT_COLUMNS)):
        row_name = f"row {number} of {where}"
        if is_undesirable(row):
            left_out.undesirable.append((row_name, row["label"]))
            continue
        found = parse_row(row, row_name, allow_text=not allow_missing_response)
        if not found:
            left_out.only_calls.append(row_name)
        for example in found:
            if isinstance(example, Example) and example.response is None and not allow_missing_response:
                left_out.unanswered.append(row_name)
            else:
                if isinstance(example, TokenizedExample):
                    check_token_ids(example.input_ids, vocabulary, row_name.__str__)
                examples.append(example)
    if not examples:
        raise DataError(left_out.nothing_usable())
    left_out.report()
    if not any(isinstance(example, Example) or example.has_response for example in examples):
        raise DataError(
            f"{where}: no row has a response token (every label is -100, or every mask is 0). Mark "
            "the response tokens in `labels`."
        )
    return examples


def select_examples(examples: Sequence[Any], num: int, seed: int) -> list[Any]:
    """A random subset, the same for the same seed on every machine; all if there are fewer than `num`.

    The subset of a smaller `num` is the beginning of the one of a larger `num`.
    """
    if num < 1:
        raise ValueError(f"the number of examples to select must be at least 1, not {num}")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in order[:num]]


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
        tokenizer: may be None if all examples are tokenized.
        max_length: number of tokens that are kept, from the beginning.
        option: what the user calls this data, for messages.
        vocabulary: number of tokens that the model knows, to refuse those that only the tokenizer does.

    Raises:
        DataError: there is no tokenizer, the chat template refuses a conversation, the model does not know a token, or
            nothing is left.
    """
    tokenized: list[TokenizedExample] = []
    left_out = 0
    for example in examples:
        if isinstance(example, Example):
            if tokenizer is None:
                raise DataError(
                    f"{option} holds text, and there is no tokenizer to tokenize it. Pass `tokenizer=`, or give rows "
                    "of `input_ids` and `labels`."
                )
            name = f"the example of {option} that asks {_short(example.request)}"
            example = tokenize(example, tokenizer, name)
            check_token_ids(example.input_ids, vocabulary, name.__str__)
        cut = TokenizedExample(example.input_ids[:max_length], example.labels[:max_length])
        if cut.has_response:
            tokenized.append(cut)
        else:
            left_out += 1
    if left_out:
        found = (
            f"{left_out} of {left_out + len(tokenized)} examples of {option} have no response token within "
            f"calibration_max_length={max_length} tokens"
        )
        if not tokenized:
            raise DataError(f"{found}, so nothing is left. Raise it, or give examples with shorter prompts.")
        warnings.warn(f"{found} and are left out", stacklevel=2)
    return tokenized


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands before the response, up to where the model begins to answer."""
    return prompt_ids(example, tokenizer, f"the request {_short(example.request)}")


def data_digest(examples: Iterable[Example | TokenizedExample]) -> str:
    """SHA-256 of the content of the examples, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for example in examples:
        content = {"type": type(example).__name__, **vars(example)}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


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
    input_ids, num_prompt = prompt_and_response_ids(example, tokenizer, name)
    return TokenizedExample(tuple(input_ids), (IGNORED,) * num_prompt + tuple(input_ids[num_prompt:]))


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


def is_undesirable(row: Any) -> bool:
    """Whether this is a row of unpaired preferences (KTO) whose answer is a bad one."""
    if not isinstance(row, Mapping) or row.get("label") is None:
        return False
    label = row["label"]
    if isinstance(label, str):
        is_false = label.strip().casefold() in ("false", "0", "0.0")
    else:  # also a number of numpy
        is_false = not getattr(label, "shape", ()) and not isinstance(label, (Sequence, Mapping)) and bool(label == 0)
    return is_false and any(name in row for name in (*_ANSWERS, "completion_ids", "completion_input_ids"))


def parse_row(row: Any, where: str, *, allow_text: bool) -> Sequence[Example | TokenizedExample]:
    """
    The examples of a row: one, several if the row is packed, or none if its last turn only calls tools.

    Args:
        row: In any format of [`load_examples`].
        where: What to call the row in messages.
        allow_text: Whether a row of plain `text` is understood, and a string is not a request.

    Raises:
        DataError: The row is not understood.
    """
    if isinstance(row, str) and not allow_text:
        row = {"prompt": row}
    if isinstance(row, (Example, TokenizedExample)):
        examples: Sequence[Example | TokenizedExample] = [row]
    elif isinstance(row, Mapping):
        examples = _examples({name: value for name, value in row.items() if value is not None}, where, allow_text)
    else:
        raise DataError(f"{where} is {_short(row)}; a row must map column names to values")
    for example in examples:
        if isinstance(example, Example):
            _check_text(example, where)
    return examples


def _check_text(example: Example, where: str) -> None:
    """
    Raises:
        DataError: A text cannot be encoded: half of a character that UTF-16 writes as two, as cutting a text leaves it.
    """
    try:
        json.dumps(vars(example), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(
            f"{where}: there is a lone surrogate (U+{code:04X}) in a text, which is half of a character. Remove it."
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: its values are nested too deeply, or in a circle ({error})") from error


def _examples(row: dict[str, Any], where: str, allow_text: bool) -> Sequence[Example | TokenizedExample]:
    if "input_ids" in row:
        return _tokenized_row(row, where)
    for prompt, response in _TOKEN_PAIRS:
        if prompt in row and response in row:
            before, after = _integers(row, prompt, where), _integers(row, response, where)
            return [TokenizedExample(before + after, (IGNORED,) * len(before) + after)]
    for column in _CONVERSATIONS:
        if column in row:
            return _split(_messages(row, column, where), where)
    if "chosen" in row:
        return _answer(row, "chosen", where) if "prompt" in row else _implicit_prompt(row, where)
    for column in _ANSWERS:
        if "prompt" in row and column in row:
            return _answer(row, column, where)
    if "prompt" in row:
        prompt = _prompt(row, where)
        if prompt[-1]["role"] == "assistant":
            raise DataError(f"{where}: the `prompt` ends with an assistant turn; move that into `completion`")
        return [Example(prompt)]
    if "instruction" in row and not (allow_text and "text" in row):
        return [_alpaca(row, where)]
    if "text" in row:
        if not allow_text:
            raise DataError(
                f"{where} has only `text`, which does not tell the request from the response. Use "
                "`messages`, or `prompt` and `response`."
            )
        return [Example(response=_text(row, "text", where))]
    raise DataError(
        f"{where} has no known columns; it has {', '.join(map(repr, row)) or 'no values'}. Give rows with "
        f"one of: {FORMATS}."
    )


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    """The example of a row in Alpaca's columns, with the two of LLaMA-Factory."""
    texts = {name: _text(row, name, where) for name in _ALPACA if name in row and name != "history"}
    if texts["instruction"] is None:
        raise DataError(f"{where}: the `instruction` is empty")
    messages = [] if texts.get("system") is None else [{"role": "system", "content": texts["system"]}]
    for pair in row.get("history", ()):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{where}: `history` must be a list of pairs of request and answer, not {_short(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    request = "\n\n".join(filter(None, (texts["instruction"], texts.get("input"))))
    return Example((*messages, {"role": "user", "content": request}), texts.get("output"))


def _answer(row: Mapping[str, Any], column: str, where: str) -> list[Example]:
    """The example of a row with a prompt and an answer in `column`, each a string or a list of messages."""
    prompt = _prompt(row, where)
    if isinstance(row[column], str):
        return [Example(prompt, _text(row, column, where))]
    answer = _messages(row, column, where)
    # Some data sets repeat the prompt in the answer, and then it counts once (as in TRL).
    repeats = answer[0]["role"] != "assistant" if isinstance(row["prompt"], str) else answer[: len(prompt)] == prompt
    return _split(answer if repeats else prompt + answer, where)


def _prompt(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(row["prompt"], str):
        return _messages(row, "prompt", where)
    if not row["prompt"].strip():
        raise DataError(f"{where}: the `prompt` is empty")
    return ({"role": "user", "content": row["prompt"]},)


def _implicit_prompt(row: Mapping[str, Any], where: str) -> list[Example]:
    """The example of a preference row that holds the prompt within `chosen`."""
    chosen, rejected = row["chosen"], row.get("rejected")
    if not isinstance(chosen, str):
        return _split(_messages(row, "chosen", where), where)
    if not isinstance(rejected, str):
        raise DataError(
            f"{where} has a plain-text `chosen`, and neither `prompt` nor a plain-text `rejected` to tell "
            "where the response begins. Add the column `prompt`."
        )
    prompt = chosen[: common_prefix_length(chosen, rejected)].removesuffix(" ")
    return [Example(response=chosen[len(prompt) :] or None, prompt_text=prompt)]


def _split(messages: tuple[dict[str, Any], ...], where: str) -> list[Example]:
    """Take the last turn of a conversation as the response if it is the assistant's; nothing if it only calls tools."""
    *context, last = messages
    if last["role"] != "assistant":
        return [Example(messages)]
    if not context:
        raise DataError(f"{where}: there must be a turn before the response")
    response = last.get("content") or ""
    calls = [last[key] for key in _CALLS if last.get(key)]
    if calls and (not response.strip() or response in calls):
        return []
    return [Example(tuple(context), response if response.strip() else None)]


def _messages(row: Mapping[str, Any], column: str, where: str) -> tuple[dict[str, Any], ...]:
    """A checked list of messages; what a message has besides role and content is for the chat template."""
    value = row[column]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        kind = "a list" if column in _CONVERSATIONS else "a text or a list"
        raise DataError(f"{where}: `{column}` must be {kind} of at least one message, not {_short(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        name = f"{where}: message {number} of `{column}`"
        if not isinstance(message, Mapping):
            raise DataError(f"{name} must have a role and a content, but is {_short(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        if "from" in message and "role" not in message:
            message = {_SHAREGPT.get(key, key): item for key, item in message.items()}
        role, content = message.get("role"), message.get("content")
        if role == "function_call":  # ShareGPT's way to say that this text calls a tool
            message |= {"function_call": content}
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{name} has the role {role!r}; use one of {', '.join(_ROLES)}")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = message["content"] = _join_text_parts(content, name)
        if not isinstance(content, str) and not (content is None and any(key in message for key in _CALLS)):
            raise DataError(f"{name} must have a text as `content`, not {_short(content)}")
        messages.append(message | {"role": _ROLES[role]})
    return tuple(messages)


def _join_text_parts(parts: Sequence[Any], name: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise DataError(f"{name} has content that is not text, which is not supported: {_short(part)}")
        texts.append(text)
    return "".join(texts)


def _text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """The text of a column; None if it is blank, as in an empty CSV cell."""
    if not isinstance(row[column], str):
        raise DataError(f"{where}: `{column}` must be a text, not {_short(row[column])}")
    return row[column] if row[column].strip() else None


def _tokenized_row(row: Mapping[str, Any], where: str) -> list[TokenizedExample]:
    input_ids = _integers(row, "input_ids", where)
    parallel = {name: _integers(row, name, where) for name in ("labels", "attention_mask", *_MASKS) if name in row}
    for name, values in parallel.items():
        if len(values) != len(input_ids):
            raise DataError(f"{where}: input_ids has {len(input_ids)} entries, but {name} has {len(values)}")
    labels = parallel.get("labels")
    if labels is None:
        masks = [parallel[name] for name in _MASKS if name in parallel]
        labels = tuple(
            token if all(mask[index] for mask in masks) else IGNORED for index, token in enumerate(input_ids)
        )
    attended = parallel.get("attention_mask", (1,) * len(input_ids))
    lengths = _integers(row, "seq_lengths", where) if "seq_lengths" in row else (len(input_ids),)
    if sum(lengths) != len(input_ids):
        raise DataError(f"{where}: input_ids has {len(input_ids)} entries, but seq_lengths add up to {sum(lengths)}")
    examples = []
    start = 0
    for length in lengths:
        kept = [index for index in range(start, start + length) if attended[index]]
        examples.append(TokenizedExample(tuple(input_ids[i] for i in kept), tuple(labels[i] for i in kept)))
        start += length
    return examples


def _integers(row: Mapping[str, Any], column: str, where: str) -> tuple[int, ...]:
    value = row[column]
    values = value.tolist() if hasattr(value, "tolist") else value  # a tensor or array
    if not isinstance(values, Sequence) or not all(isinstance(item, int) for item in values):
        raise DataError(f"{where}: `{column}` must be a flat list of integers, not {_short(value)}")
    return tuple(values)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
