"""What is wrong with a config, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from pydantic import BaseModel, ValidationError


class ConfigError(click.ClickException):
    """
    A config that is refused.

    No ValueError: pydantic would put it behind the name of a class and in front of the whole config. Axolotl's commands
    print it in one line.
    """


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Raise what a check finds as a `ConfigError`."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_block(model: type[BaseModel], block: Any, name: str) -> None:
    """
    Args:
        model: What the block is to be.
        block: As it stands in the file.
        name: Its key.

    Raises:
        ValueError: It is not; a line for each key, with its whole name.
    """
    try:
        model.model_validate(block)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for entry in error.errors():
            key, message = _key(entry["loc"], block, name), entry["msg"]
            if entry["type"] == "value_error":
                key, message = "", message.removeprefix("Value error, ")
            elif entry["type"] == "extra_forbidden":
                message = "there is no such option"
            else:
                message = f"{entry['input']!r}: {message[:1].lower()}{message[1:]}"
            if message not in found.setdefault(key, []):
                found[key].append(message)
        # Of a value that may be several things, what it was most like.
        deepest = [key for key in found if not any(other.startswith(f"{key}.") for other in found)]
        lines = [f"{key}: {'; or '.join(found[key])}." if key else "; ".join(found[key]) for key in deepest]
        raise ValueError("\n".join(lines)) from None


def _key(location: tuple[int | str, ...], block: Any, name: str) -> str:
    """The parts of pydantic's location that are keys of the file, and not names of types."""
    for part in location:
        if isinstance(block, Mapping) and part in block:
            name, block = f"{name}.{part}", block[part]
    return name
