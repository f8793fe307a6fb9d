"""Rows of any common format to chat examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..support.texts import shortened
from .errors import DataError
from .examples import IGNORED, Example, TokenizedExample
from .rendering import common_prefix_length

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
TOKENIZED_COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths", *_MASKS, *chain(*_TOKEN_PAIRS))
_ALPACA = ("instruction", "input", "output", "system", "history")
TEXT_COLUMNS = (*_CONVERSATIONS, "chosen", "rejected", "prompt", *_ANSWERS, *_ALPACA, "text", "label")
"""Columns of rows of text that are looked at."""
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SHAREGPT = {"from": "role", "value": "content"}
_CALLS = ("tool_calls", "function_call")
"""Keys of a message that calls tools, which may then have no content."""


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
        raise DataError(f"{where} is {shortened(row)}; a row must map column names to values")
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
    for asked, answered in _TOKEN_PAIRS:
        if asked in row and answered in row:
            before, after = token_ids(row, asked, where), token_ids(row, answered, where)
            return [TokenizedExample(before + after, (IGNORED,) * len(before) + after)]
    for column in _CONVERSATIONS:
        if column in row:
            return _split(_with_system(row, _messages(row, column, where)), where)
    if "chosen" in row:
        return _answer(row, "chosen", where) if "prompt" in row else _implicit_prompt(row, where)
    for column in _ANSWERS:
        if "prompt" in row and column in row:
            return _answer(row, column, where)
    if "prompt" in row:
        prompt = _prompt(row, where)
        if prompt[-1]["role"] == "assistant":
            raise DataError(f"{where}: the `prompt` ends with an assistant turn; move that into `completion`")
        return [Example(_with_system(row, prompt))]
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


def _with_system(row: Mapping[str, Any], messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """With the column `system`, as LLaMA-Factory has it beside a conversation, where that has no system turn."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    return ({"role": "system", "content": system}, *messages)


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    """The example of a row in Alpaca's columns, with the two of LLaMA-Factory."""
    texts = {name: _text(row, name, where) for name in _ALPACA if name in row and name != "history"}
    if texts["instruction"] is None:
        raise DataError(f"{where}: the `instruction` is empty")
    messages = [] if texts.get("system") is None else [{"role": "system", "content": texts["system"]}]
    for pair in row.get("history", ()):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{where}: `history` must be a list of pairs of request and answer, not {shortened(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    request = "\n\n".join(filter(None, (texts["instruction"], texts.get("input"))))
    return Example((*messages, {"role": "user", "content": request}), texts.get("output"))


def _answer(row: Mapping[str, Any], column: str, where: str) -> list[Example]:
    """The example of a row with a prompt and an answer in `column`, each a string or a list of messages."""
    prompt = _prompt(row, where)
    if isinstance(row[column], str):
        return [Example(_with_system(row, prompt), _text(row, column, where))]
    answer = _messages(row, column, where)
    # Some data sets repeat the prompt in the answer, and then it counts once (as in TRL).
    repeats = answer[0]["role"] != "assistant" if isinstance(row["prompt"], str) else answer[: len(prompt)] == prompt
    return _split(_with_system(row, answer if repeats else prompt + answer), where)


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
        return _split(_with_system(row, _messages(row, "chosen", where)), where)
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
        raise DataError(f"{where}: `{column}` must be {kind} of at least one message, not {shortened(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        name = f"{where}: message {number} of `{column}`"
        if not isinstance(message, Mapping):
            raise DataError(f"{name} must have a role and a content, but is {shortened(message)}")
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
            raise DataError(f"{name} must have a text as `content`, not {shortened(content)}")
        messages.append(message | {"role": _ROLES[role]})
    return tuple(messages)


def _join_text_parts(parts: Sequence[Any], name: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise DataError(f"{name} has content that is not text, which is not supported: {shortened(part)}")
        texts.append(text)
    return "".join(texts)


def _text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """The text of a column; None if it is blank, as in an empty CSV cell."""
    if not isinstance(row[column], str):
        raise DataError(f"{where}: `{column}` must be a text, not {shortened(row[column])}")
    return row[column] if row[column].strip() else None


def _tokenized_row(row: Mapping[str, Any], where: str) -> list[TokenizedExample]:
    input_ids = token_ids(row, "input_ids", where)
    parallel = {name: token_ids(row, name, where) for name in ("labels", "attention_mask", *_MASKS) if name in row}
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
    lengths = token_ids(row, "seq_lengths", where) if "seq_lengths" in row else (len(input_ids),)
    if sum(lengths) != len(input_ids):
        raise DataError(f"{where}: input_ids has {len(input_ids)} entries, but seq_lengths add up to {sum(lengths)}")
    examples = []
    start = 0
    for length in lengths:
        kept = [index for index in range(start, start + length) if attended[index]]
        examples.append(TokenizedExample(tuple(input_ids[i] for i in kept), tuple(labels[i] for i in kept)))
        start += length
    return examples


def token_ids(row: Mapping[str, Any], column: str, where: str) -> tuple[int, ...]:
    """
    The whole numbers of a column.

    Raises:
        DataError: It holds something else.
    """
    value = row[column]
    values = value.tolist() if hasattr(value, "tolist") else value  # a tensor or array
    if not isinstance(values, Sequence) or not all(isinstance(item, int) for item in values):
        raise DataError(f"{where}: `{column}` must be a flat list of integers, not {shortened(value)}")
    return tuple(values)
