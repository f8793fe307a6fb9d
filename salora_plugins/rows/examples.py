"""Chat examples and tokenized examples, the two forms that every row takes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import DataError

IGNORED = -100
"""The label of a token that is not part of a response."""

Asked = str | Sequence[Mapping[str, Any]]
"""A request as a model is asked it: the text of one user turn, or the messages of several turns."""

_NO_CONTENT = ("group", "source")
"""What examples say of where they come from."""


@dataclass(frozen=True)
class Example:
    """One exchange: a conversation, or plain text if there are no messages."""

    messages: tuple[dict[str, Any], ...] = ()
    """Everything before the response, each with `role` and `content`; empty for plain text."""

    response: str | None = None
    """The assistant's answer; None: the model's own is to be used."""

    prompt_text: str = ""
    """Of plain text, what stands before the response; may be empty."""

    group: str = field(default="", compare=False)
    """What kind of request it is, for a selection to be spread over the kinds; no part of its content."""

    source: str = field(default="", compare=False)
    """Which of several sources it comes from; no part of its content."""

    @property
    def request(self) -> str:
        """What is asked: the last user turn, or the text before the response."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message.get("content", "")
        return self.prompt_text

    @property
    def transcript(self) -> str:
        """All that is asked, as a judge or a reader gets it: the request, or of several turns who said what."""
        if len(self.messages) < 2:
            return self.request
        return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.messages)


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids with the response marked."""

    input_ids: tuple[int, ...]
    """Token ids, (length,)."""

    labels: tuple[int, ...]
    """-100 where a token is not part of the response, (length,)."""

    source: str = field(default="", compare=False)
    """Which of several sources it comes from; no part of its content."""

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise DataError(f"input_ids has {len(self.input_ids)} entries, but labels has {len(self.labels)}")

    @property
    def has_response(self) -> bool:
        """Whether any token belongs to a response."""
        return any(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class RenderedRequest:
    """A request that a model is to answer."""

    request: str
    """What is asked, without chat markup."""

    prompt_ids: tuple[int, ...]
    """Token ids up to where the model begins to answer."""

    source: str = field(default="", compare=False)
    """Which of several sources it comes from."""


def as_messages(request: Asked) -> tuple[dict[str, Any], ...]:
    """The messages of a request, each with `role` and `content`."""
    if isinstance(request, str):
        return ({"role": "user", "content": request},)
    return tuple(dict(message) for message in request)


def select_examples(examples: Sequence[Any], num: int, seed: int) -> list[Any]:
    """A random subset, the same for the same seed on every machine; all if there are fewer than `num`.

    The subset of a smaller `num` is the beginning of the one of a larger `num`, and examples of every `group` are
    spread over it evenly: each has about the share in every beginning that it has in all.
    """
    if num < 1:
        raise ValueError(f"the number of examples to select must be at least 1, not {num}")
    order = list(range(len(examples)))
    generator = random.Random(seed)
    generator.shuffle(order)
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault(getattr(examples[index], "group", ""), []).append(index)
    if len(members) > 1:
        places = {}
        for of_group in members.values():
            # One of a group in every so many, at a random place among these.
            for number, index in enumerate(of_group):
                places[index] = (number + generator.random()) / len(of_group)
        order.sort(key=places.__getitem__)
    return [examples[index] for index in order[:num]]


def data_digest(examples: Iterable[Example | TokenizedExample]) -> str:
    """SHA-256 of the content of the examples, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for example in examples:
        content = {"type": type(example).__name__, **vars(example)}
        for name in _NO_CONTENT:
            content.pop(name, None)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()
