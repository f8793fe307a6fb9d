"""Lines that a user is to see with the logging that they have, or without any."""

from __future__ import annotations

import logging
import sys
from typing import Any

from .distributed import rank_and_world_size


def tell(logger: logging.Logger, message: str, *args: Any) -> None:
    """
    Log at INFO, on the first rank; where no handler would show it, since the root is at WARNING unless an application
    says otherwise, write it to stderr, as transformers does with its own messages.

    Not where the application has set a level for this package, or disabled logging: then it has decided.
    """
    if rank_and_world_size()[0] != 0:
        return
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, args, None)
    logger.info(message, *args, stacklevel=2)
    if not _decided(logger) and not _is_shown(logger, record):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        handler.emit(record)


def _decided(logger: logging.Logger) -> bool:
    """Whether a level is set for this logger or one above it, short of the root."""
    if logging.root.manager.disable >= logging.INFO:
        return True
    while logger.parent is not None:
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return False


def _is_shown(logger: logging.Logger, record: logging.LogRecord) -> bool:
    """Whether some handler puts a record on the terminal."""
    if not logger.isEnabledFor(record.levelno) or not logger.filter(record):
        return False
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            stream = getattr(handler, "stream", sys.stderr)  # handlers without one, such as rich's, draw themselves
            terminal = stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
            if terminal and record.levelno >= handler.level and handler.filter(record):
                return True
        current = current.parent if current.propagate else None
    return False
