"""Rows of any common format to chat examples, and chat examples to token ids with the response marked.

Nothing here knows models, PEFT or trainers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins import data_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not part of a response."""

MAX_ROWS = 20_000
"""How many rows of a larger data set are read; calibration needs some hundreds."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

FORMATS = (
    "messages; prompt + response; prompt + completion; prompt + chosen; chosen (+ rejected); "
    "conversations (from/value); text; input_ids (+ labels)"
)

_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
}

# Prepared rows of preference trainers: TRL's names today, and those it had before.
_TOKEN_PAIRS = (
    ("prompt_ids", "chosen_ids"),
    ("prompt_ids", "completion_ids"),
    ("prompt_input_ids", "chosen_input_ids"),
    ("prompt_input_ids", "completion_input_ids"),
)


class DataError(ValueError):
    """Data that cannot be used; the message names the option or file, what was found and what to do."""


@dataclass(frozen=True)
class Example:
    """One exchange: a conversation, or plain text if there are no messages."""

    messages: tuple[dict[str, Any], ...] = ()
    """Everything before the response, as `role` and `content`; empty for plain text."""

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
    source: Any, *, option: str, allow_missing_response: bool = False, max_rows: int = MAX_ROWS
) -> list[Example | TokenizedExample]:
    """Read examples from wherever the user keeps them.

    A row is recognized by its columns, in this order: `input_ids` (with `labels`, or with the masks of TRL,
    or every token counts; packed rows with `seq_lengths` are taken apart), TRL's tokenized preference columns,
    `messages` (the last assistant turn is the response), `conversations`, `chosen` (with or without `prompt`; for
    two plain strings the prompt is what `chosen` and `rejected` share), `prompt` with `completion` or
    `response`, and `text` (all of it counts as response). Each of `prompt`, `completion` and `chosen` is a
    string or a list of messages. A plain-string `prompt` is a user turn where the tokenizer has a chat template.
    Answers that a row marks as undesirable (KTO's `label` = False) are not used, nor are further columns.

    Args:
        source: the name of a registered data source; a file (.jsonl, .json, .csv, .parquet); a folder with such
            files or one that `datasets` saved; a hub data set id (`id` or `id:config`, its `train` split); a
            `datasets` object; rows (mappings, or examples that are passed on).
        option: what the user calls this data, for messages.
        allow_missing_response: keep rows that ask without an answer (response None), and refuse plain `text`,
            where request and response cannot be told apart. Otherwise such rows are left out with a warning.
        max_rows: of a larger data set, a fixed random subset of this size is read (of a stream, the first rows).

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
    where = option if not isinstance(source, (str, Path)) else f"{option}={str(source)!r}"
    examples: list[Example | TokenizedExample] = []
    num_rows = 0
    undesirable = 0
    without_response: list[str] = []
    for number, row in _read(source, option, where, max_rows):
        num_rows += 1
        row_name = f"row {number} of {where}"
        if isinstance(row, (Example, TokenizedExample)):
            parsed = [row]
        elif isinstance(row, Mapping):
            row = {key: value for key, value in row.items() if value is not None}
            if row.get("label") is False:
                undesirable += 1
                continue
            parsed = _parse_row(row, row_name, text_allowed=not allow_missing_response)
        else:
            raise DataError(f"{row_name} is of type {type(row).__name__}; a row must be a mapping of columns")
        for example in parsed:
            if isinstance(example, Example) and example.response is None and not allow_missing_response:
                without_response.append(row_name)
            else:
                examples.append(example)
    if num_rows == 0:
        raise DataError(f"{where} has no rows. Give data with at least one.")
    if undesirable:
        logger.info("%s: %d rows with label False (an undesirable answer) are not used", where, undesirable)
    if without_response and examples:
        warnings.warn(
            f"{where}: {len(without_response)} of {num_rows} rows have no response and are left out (the first is "
            f"{without_response[0]})",
            stacklevel=2,
        )
    if not examples:
        if without_response:
            raise DataError(
                f"{without_response[0]} has no response, nor has any other row. {option} needs the answers as well: "
                f"{FORMATS}."
            )
        raise DataError(f"{where}: every row has label False (an undesirable answer). Give desirable answers too.")
    if not any(isinstance(example, Example) or example.has_response for example in examples):
        raise DataError(
            f"{where}: no row has a response token (each label is -100, or each mask 0). Mark the response tokens "
            "in `labels`."
        )
    return examples


def select_examples(examples: Sequence[Any], num: int, seed: int) -> list[Any]:
    """A random subset, the same for the same seed on every machine; all of them if there are fewer than `num`.

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
) -> list[TokenizedExample]:
    """Render examples, tokenize them and mark the tokens of the response, with the end of turn that closes it.

    A conversation is rendered with the tokenizer's chat template. Without one, prompt, response and the end-of-
    sequence token are put together as plain text, as TRL does. Examples are cut at `max_length` tokens; those
    that lose all of their response, or never had any, are left out with a warning.

    Args:
        examples: examples with a response; tokenized ones are only cut.
        tokenizer: may be None if all examples are tokenized.
        max_length: number of tokens that are kept, from the beginning.
        option: what the user calls this data, for messages.

    Raises:
        DataError: there is no tokenizer, the chat template refuses a conversation, or nothing is left.
    """
    tokenized: list[TokenizedExample] = []
    left_out = 0
    for example in examples:
        if isinstance(example, Example):
            if tokenizer is None:
                raise DataError(
                    f"{option} holds text, and there is no tokenizer to tokenize it. Pass `tokenizer=`, or give "
                    "rows of `input_ids` and `labels`."
                )
            example = _tokenize(example, tokenizer, option)
        cut = TokenizedExample(example.input_ids[:max_length], example.labels[:max_length])
        if cut.has_response:
            tokenized.append(cut)
        else:
            left_out += 1
    if left_out:
        found = f"{left_out} of {left_out + len(tokenized)} examples of {option} have no response token within "
        found += f"calibration_max_length={max_length} tokens"
        if not tokenized:
            raise DataError(f"{found}; none is left. Raise calibration_max_length, or give shorter prompts.")
        warnings.warn(f"{found} and are left out", stacklevel=2)
    return tokenized


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands before the response, up to where the model begins to answer."""
    return _encode(*_prompt_text(example, tokenizer, "an example"), tokenizer)


def data_digest(examples: Iterable[Example | TokenizedExample]) -> str:
    """SHA-256 of the content of the examples, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for example in examples:
        content = {"type": type(example).__name__, **vars(example)}
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# ---- reading ----------------------------------------------------------------------------------------------------


def _read(source: Any, option: str, where: str, max_rows: int) -> Iterable[tuple[int, Any]]:
    """The rows of a source, numbered from 1."""
    if isinstance(source, str) and source in data_sources():
        try:
            return _numbered(list(data_sources()[source]()), max_rows, where)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: the data source failed: {type(error).__name__}: {error}") from error
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return _read_folder(path, where, max_rows)
        if path.is_file():
            return _numbered(_read_file(path, where), max_rows, where)
        if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise DataError(f"{where}: there is no such file or folder. Check the path.")
        if path.suffix.lower() in (*SUFFIXES, ".txt"):
            raise DataError(f"{where}: there is no such file (looked in {Path.cwd()}). Check the path.")
        return _read_hub(source, option, where, max_rows)
    datasets = sys.modules.get("datasets")  # an object of this library cannot exist before it is imported
    if datasets is not None:
        if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            if "train" not in source:
                raise DataError(
                    f"{where}: a DatasetDict without a 'train' split (it has {', '.join(map(repr, source))}). "
                    "Pass the split that you want."
                )
            source = source["train"]
        if isinstance(source, datasets.Dataset):
            return _numbered(source.with_format(None), max_rows, where)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"{where}: data of type {type(source).__name__} is not understood. Give the name of a data source, a file, a folder, "
            "a hub data set id, a `datasets.Dataset`, or a list of rows."
        )
    if isinstance(source, Sequence):
        return _numbered(source, max_rows, where)
    return enumerate(islice(source, max_rows), start=1)


def _numbered(rows: Sequence[Any], max_rows: int, where: str) -> list[tuple[int, Any]]:
    if len(rows) <= max_rows:
        return list(enumerate(rows, start=1))
    logger.info("%s: reading a random %d of %d rows", where, max_rows, len(rows))
    chosen = sorted(random.Random(0).sample(range(len(rows)), max_rows))
    return [(index + 1, rows[index]) for index in chosen]


def _read_hub(name: str, option: str, where: str, max_rows: int) -> list[tuple[int, Any]]:
    datasets = _import("datasets", where, "A hub data set")
    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split="train")
    except Exception as error:  # it raises dozens of types, from its own ones to those of the HTTP client
        raise DataError(
            f"{where} is neither a registered data source ({', '.join(sorted(data_sources()))}) nor a file, and loading it "
            f"as the train split of a hub data set failed: {type(error).__name__}: {error}. Check the name, or load "
            f"the data yourself and pass it to {option} as a file, a `datasets.Dataset` or a list of rows."
        ) from error
    return _numbered(dataset, max_rows, where)


def _read_folder(folder: Path, where: str, max_rows: int) -> list[tuple[int, Any]]:
    is_dict = (folder / "dataset_dict.json").is_file()
    if is_dict or (folder / "state.json").is_file():
        datasets = _import("datasets", where, "A folder that `save_to_disk` wrote")
        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise DataError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
        return list(_read(dataset, where, where, max_rows))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) > 1:
        # Several files may be splits, and calibrating on test rows would go unnoticed.
        files = [path for path in files if path.name.startswith("train")] or files
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(
            f"{where}: a folder must hold one data file ({', '.join(SUFFIXES)}), or one whose name starts with "
            f"'train'; found: {found}. Name the file."
        )
    return _numbered(_read_file(files[0], f"{where} ({files[0].name})"), max_rows, where)


def _read_file(path: Path, where: str) -> Sequence[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        parquet = _import("pyarrow.parquet", where, "A Parquet file")
        try:
            return parquet.read_table(path).to_pylist()
        except Exception as error:
            raise DataError(f"{where}: is not a readable Parquet file: {error}") from error
    if suffix not in SUFFIXES:
        raise DataError(f"{where}: files of type {suffix or '(no suffix)'} are not read. Use {', '.join(SUFFIXES)}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if suffix == ".csv":
        return _read_csv(text, where)
    if suffix == ".json" and text.lstrip().startswith("["):
        return _parse_json(text, path, first_line=1)
    # Not splitlines(): it also splits at characters that JSON strings may hold as they are.
    lines = text.split("\n")
    rows = [_parse_json(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    for row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected one JSON object a line, found {type(row).__name__}")
    return rows


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: not valid JSON: {error.msg} (column {error.colno}). A data file "
            "holds one JSON object a line, or (.json) a list of objects."
        ) from error


def _read_csv(text: str, where: str) -> list[dict[str, str]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{where}: line {reader.line_num} is not valid CSV: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(f"row {number} of {where} has more cells than the header has columns. Quote the commas in it.")
    return rows


def _import(module: str, where: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{where}: {what} needs the package {module.partition('.')[0]}: pip install salora-plugins[data]"
        ) from error


# ---- rows -------------------------------------------------------------------------------------------------------


def _parse_row(
    row: Mapping[str, Any], where: str, *, text_allowed: bool
) -> Sequence[Example | TokenizedExample]:
    """The examples of a row: one, or several if the row is packed. Values of None are removed already."""
    if "input_ids" in row:
        return _tokenized_row(row, where)
    for prompt, response in _TOKEN_PAIRS:
        if prompt in row and response in row:
            prompt_ids, response_ids = (_integers(row, column, where) for column in (prompt, response))
            return [TokenizedExample(prompt_ids + response_ids, (IGNORED,) * len(prompt_ids) + response_ids)]
    if "messages" in row:
        return [_conversation(_messages(row["messages"], "messages", where), where)]
    if "conversations" in row:
        return [_conversation(_messages(row["conversations"], "conversations", where), where)]
    if "chosen" in row:
        return [_chosen(row, where)]
    if "prompt" in row:
        for column in ("completion", "response"):
            if column in row:
                return [_prompt_and_answer(row, column, where)]
        if isinstance(row["prompt"], str):
            return [Example(_user_turn(row, where))]
        messages = _messages(row["prompt"], "prompt", where)
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{where}: without `completion`, its `prompt` must not end with an assistant turn")
        return [Example(messages)]
    if "text" in row:
        if not text_allowed:
            raise DataError(
                f"{where} has only `text`, which does not tell the request from the response. Use `messages`, or "
                "`prompt` and `response`."
            )
        return [Example(response=_text(row, "text", where))]
    raise DataError(
        f"{where} has no known columns; it has {', '.join(map(repr, row)) or 'no values'}. Rows need one of: {FORMATS}."
    )


def _prompt_and_answer(row: Mapping[str, Any], column: str, where: str) -> Example:
    if isinstance(row[column], str):
        prompt = (
            _user_turn(row, where)
            if isinstance(row["prompt"], str)
            else _messages(row["prompt"], "prompt", where)
        )
        return Example(prompt, _text(row, column, where))
    answer = _messages(row[column], column, where)
    if isinstance(row["prompt"], str):
        # Some data sets repeat the prompt in the answer's conversation; TRL then uses only the conversation.
        return _conversation((*_user_turn(row, where), *answer) if answer[0]["role"] == "assistant" else answer, where)
    prompt = _messages(row["prompt"], "prompt", where)
    return _conversation(answer if answer[: len(prompt)] == prompt else (*prompt, *answer), where)


def _chosen(row: Mapping[str, Any], where: str) -> Example:
    if "prompt" in row:
        return _prompt_and_answer(row, "chosen", where)
    if not isinstance(row["chosen"], str):
        return _conversation(_messages(row["chosen"], "chosen", where), where)
    if not isinstance(row.get("rejected"), str):
        raise DataError(
            f"{where} has a plain-text `chosen`, but neither `prompt` nor a plain-text `rejected` to tell where the "
            "response begins. Add the column `prompt`."
        )
    chosen = row["chosen"]
    prompt = os.path.commonprefix([chosen, row["rejected"]]).removesuffix(" ")
    return Example(response=chosen[len(prompt) :] or None, prompt_text=prompt)


def _conversation(messages: tuple[dict[str, Any], ...], where: str) -> Example:
    """Split a conversation at its last turn if that is the assistant's."""
    last = messages[-1]
    if last["role"] != "assistant":
        return Example(messages)
    if len(messages) == 1:
        raise DataError(f"{where}: a conversation must have a turn before the response")
    if "content" not in last:
        raise DataError(f"{where}: the last assistant turn has no text (`content`)")
    return Example(messages[:-1], last["content"] if last["content"].strip() else None)


def _messages(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """Check and normalize a list of messages; keys other than role and content are kept for the chat template."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: `{column}` must be a list of messages that is not empty, not {_short(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        name = f"{where}: message {number} of `{column}`"
        if not isinstance(message, Mapping):
            raise DataError(f"{name} must be a mapping with role and content, not {_short(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        if "from" in message and "value" in message:
            message = {"role": message["from"], "content": message["value"]}
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{name} has the role {role!r}; a role is one of {', '.join(_ROLES)}")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _join_text_parts(content, name)
        if isinstance(content, str):
            message["content"] = content
        elif content is not None or "tool_calls" not in message:
            raise DataError(f"{name} must have a text as `content`, not {_short(content)}")
        messages.append(message | {"role": _ROLES[role]})
    return tuple(messages)


def _join_text_parts(parts: Sequence[Any], name: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise DataError(f"{name} has content other than text ({_short(part)}), which calibration cannot use")
        texts.append(text)
    return "".join(texts)


def _user_turn(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    prompt = _text(row, "prompt", where)
    if prompt is None:
        raise DataError(f"{where}: its `prompt` is empty")
    return ({"role": "user", "content": prompt},)


def _text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """The text of a column; None if it is blank, as in an empty CSV cell."""
    if not isinstance(row[column], str):
        raise DataError(f"{where}: `{column}` must be a text, not {_short(row[column])}")
    return row[column] if row[column].strip() else None


def _tokenized_row(row: Mapping[str, Any], where: str) -> list[TokenizedExample]:
    input_ids = _integers(row, "input_ids", where)
    columns = ["labels"] if "labels" in row else [c for c in ("completion_mask", "assistant_masks") if c in row]
    others = {column: _integers(row, column, where) for column in [*columns, "attention_mask"] if column in row}
    for column, values in others.items():
        if len(values) != len(input_ids):
            raise DataError(f"{where}: input_ids has {len(input_ids)} entries, but {column} has {len(values)}")
    attended = others.pop("attention_mask", (1,) * len(input_ids))
    labels = others.pop("labels", input_ids)
    for mask in others.values():
        labels = tuple(label if bit else IGNORED for label, bit in zip(labels, mask, strict=True))
    lengths = _integers(row, "seq_lengths", where) if "seq_lengths" in row else (len(input_ids),)
    if sum(lengths) != len(input_ids):
        raise DataError(f"{where}: seq_lengths add up to {sum(lengths)}, but input_ids has {len(input_ids)} entries")
    examples = []
    start = 0
    for length in lengths:
        kept = [index for index in range(start, start + length) if attended[index]]
        examples.append(
            TokenizedExample(tuple(input_ids[index] for index in kept), tuple(labels[index] for index in kept))
        )
        start += length
    return examples


def _integers(row: Mapping[str, Any], column: str, where: str) -> tuple[int, ...]:
    value = row[column]
    values = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    if not isinstance(values, Sequence) or not all(isinstance(item, int) for item in values):
        raise DataError(f"{where}: `{column}` must be a flat list of integers, not {_short(value)}")
    return tuple(values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- tokens -----------------------------------------------------------------------------------------------------


def _tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, option: str) -> TokenizedExample:
    """Mark as response what follows the longest beginning that the prompt and the whole share.

    Usually that is the whole prompt. It is less where a template opens the answer differently when it asks for
    one (DeepSeek-R1's `<think>`), or where a token spans the border.
    """
    if example.response is None:
        raise DataError(f"an example of {option} has no response: {_short(example.request)}")
    prompt, is_chat = _prompt_text(example, tokenizer, f"an example of {option}")
    if is_chat:
        answer = {"role": "assistant", "content": example.response}
        whole = _render((*example.messages, answer), tokenizer, f"an example of {option}", ask=False)
        # What a template writes behind the end of the turn (ChatML: a line break) no model generates.
        stripped = whole.rstrip()
        if stripped.endswith(tuple(tokenizer.all_special_tokens)):
            whole = stripped
    else:
        whole = prompt + example.response
        end = tokenizer.eos_token or ""
        if not whole.endswith(end):
            whole += end
    prompt_ids = _encode(prompt, is_chat, tokenizer)
    input_ids = _encode(whole, is_chat, tokenizer)
    shared = 0
    for prompt_id, token_id in zip(prompt_ids, input_ids, strict=False):
        if prompt_id != token_id:
            break
        shared += 1
    return TokenizedExample(tuple(input_ids), (IGNORED,) * shared + tuple(input_ids[shared:]))


def _prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, bool]:
    """What stands before the response as text, and whether a chat template wrote it."""
    if not example.messages:
        return example.prompt_text, False
    single = len(example.messages) == 1 and example.messages[0]["role"] == "user"
    if not tokenizer.chat_template:
        if not single:
            raise DataError(
                f"{name} is a conversation of several turns, but the tokenizer has no chat template to render it. Set "
                "`tokenizer.chat_template`, or give rows of `prompt` and `completion` as plain text."
            )
        return example.request, False
    if single and _is_rendered(example.request, tokenizer, name):
        return example.request, False
    return _render(example.messages, tokenizer, name, ask=True), True


def _is_rendered(prompt: str, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether a prompt went through the chat template before, as in data that was prepared for plain-text training."""
    marker = "request"
    end_of_request = _render(({"role": "user", "content": marker},), tokenizer, name, ask=True, options={})
    end_of_request = end_of_request.rpartition(marker)[2].strip()
    return bool(end_of_request) and end_of_request in prompt


def _render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    ask: bool,
    options: dict[str, Any] | None = None,
) -> str:
    """A conversation as text; `ask`: up to where the model is to answer."""
    from jinja2 import TemplateError

    if options is None:
        # Without its thinking, a reasoning model's answer begins at once: the response is what the user reads.
        options = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **options)
    except (TemplateError, ValueError) as error:
        if messages[0]["role"] in ("system", "developer") and len(messages) > 1 and messages[1]["role"] == "user":
            # Gemma's template and others refuse a system turn; their models read it in front of the request.
            system, user = messages[0], messages[1]
            merged = user | {"content": f"{system['content']}\n\n{user['content']}"}
            return _render((merged, *messages[2:]), tokenizer, name, ask=ask, options=options)
        raise DataError(
            f"the tokenizer's chat template refuses {name}: {error} (roles: "
            f"{', '.join(message['role'] for message in messages)})"
        ) from error


def _encode(text: str, is_chat: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids; a chat template writes the special tokens itself, plain text gets the tokenizer's."""
    has_start = is_chat or bool(tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    input_ids = tokenizer(text, add_special_tokens=not has_start)["input_ids"]
    if not has_start and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
        # Some tokenizers close every text, also one that is to be continued.
        while input_ids and input_ids[-1] == tokenizer.eos_token_id:
            input_ids = input_ids[:-1]
    return input_ids
