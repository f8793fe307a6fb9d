"""Sets of requests to evaluate on."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..options import check_number
from ..prompts.builtin import builtin_prompts, everyday_prompts, harmless_prompts
from ..rows.errors import DataError
from ..rows.examples import Asked, Example
from ..rows.formats import TEXT_COLUMNS, is_undesirable, parse_row
from ..rows.reading import MAX_ROWS
from ..rows.sources import describe, read_rows, sources_of

logger = logging.getLogger(__name__)

_BUILTIN = {
    "harmful": lambda: builtin_prompts("evaluation"),
    "harmless": lambda: [row for row in harmless_prompts() if row["split"] == "evaluation"],
    "utility_data": everyday_prompts,
}


@dataclass(frozen=True)
class Request:
    """A request, of one turn or of several."""

    prompt: str
    """Its text; of several turns, who said what."""
    category: str | None = None
    response: str | None = None
    """The answer that stands in the data, where there is one."""
    messages: tuple[dict[str, Any], ...] = ()
    """The turns, where there are several; else empty."""

    @property
    def asked(self) -> Asked:
        """As a model is asked it."""
        return self.messages or self.prompt


def load_requests(source: Any, *, option: str, num: int | None = None, seed: int = 0) -> list[Request]:
    """
    Read requests from wherever the user keeps them.

    Args:
        source: "builtin" (the held-out part of the built-in prompts of that kind); a text file of one request a line;
            or whatever `salora_plugins.rows.reading.load_examples` reads, or a list that names several of these. A
            column `category` is kept.
        option: "harmful", "harmless" or "utility_data" (everyday requests): which built-in set, and what the user calls
            this data, for messages.
        num: Take at most so many, spread evenly over the categories; None takes all.
        seed: Seed of that choice.

    Returns:
        At least one request, in the order of the data, each once.

    Raises:
        DataError: The data does not exist, cannot be read, or holds something else than requests.
        ValueError: `num` is below 1.
    """
    if num is not None:
        check_number("num_requests", num, 1)
    rows = _rows(source, option)
    where = describe(source, option)
    requests: dict[str, Request] = {}
    only_calls = 0
    for name, row in rows:
        request = _request(row, name)
        if request is None:
            only_calls += 1
        else:
            requests.setdefault(request.prompt, request)
    if not requests:
        raise DataError(f"{where}: there is no request in it. Give at least one.")
    if only_calls:
        logger.warning("%s: %d rows whose last turn only calls tools are left out", where, only_calls)
    if len(requests) + only_calls < len(rows):
        logger.info("%s: %d requests stand there more than once", where, len(rows) - only_calls - len(requests))
    return _spread(list(requests.values()), num, seed)


def requests_digest(requests: Sequence[Request]) -> str:
    """SHA-256 of the requests in their order, as 64 hexadecimal digits."""
    contents = [asdict(request) for request in requests]
    for content in contents:
        if not content["messages"]:
            del content["messages"]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _rows(source: Any, option: str) -> list[tuple[str, Any]]:
    """The rows, each with what to call it in messages."""
    if (several := sources_of(source, option)) is not None:
        return [row for each in several for row in _rows(each, option)]
    where = describe(source, option)
    if isinstance(source, str) and source == "builtin":
        rows: Iterable[tuple[int, Any]] = enumerate(_BUILTIN[option](), start=1)
    else:
        rows = read_rows(source, option=option, max_rows=MAX_ROWS, columns=TEXT_COLUMNS, beside=("category",))
    return [(f"row {number} of {where}", row) for number, row in rows]


def _request(row: Any, where: str) -> Request | None:
    """None where the answer only calls tools."""
    examples = parse_row(row, where, allow_text=False)
    if not examples:
        return None
    example = examples[0] if len(examples) == 1 else None
    if not isinstance(example, Example) or not _is_request(example):
        raise DataError(
            f"{where}: not a request. Give rows with `prompt`, a text, or `messages` that end with a user's."
        )
    category = row.get("category") if isinstance(row, Mapping) else None
    category = "" if category is None else str(category).strip()
    response = None if is_undesirable(row) else example.response
    messages = example.messages if len(example.messages) > 1 else ()
    # An empty cell of a CSV file is no category.
    return Request(example.transcript, category or None, response, messages)


def _is_request(example: Example) -> bool:
    """Whether somebody asks something, behind turns of text only."""
    roles = [message["role"] for message in example.messages]
    return roles[-1:] == ["user"] and all(isinstance(message.get("content"), str) for message in example.messages)


def _spread(requests: list[Request], num: int | None, seed: int) -> list[Request]:
    if num is None or len(requests) <= num:
        return requests
    by_category: dict[str | None, list[int]] = {}
    for index in random.Random(seed).sample(range(len(requests)), len(requests)):
        by_category.setdefault(requests[index].category, []).append(index)
    chosen: list[int] = []
    while len(chosen) < num:
        for category in sorted(by_category, key=str):
            if by_category[category] and len(chosen) < num:
                chosen.append(by_category[category].pop())
    return [requests[index] for index in sorted(chosen)]
