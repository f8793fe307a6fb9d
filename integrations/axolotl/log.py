"""What the package logs, in Axolotl's own log, which shows nothing below a warning that is not its own."""

from __future__ import annotations

import copy
import logging

# Private parts of Axolotl: the filter that it gives to loggers of others, and its test of the rank that may log.
from axolotl.logging_config import AxolotlOrWarnErrorFilter
from axolotl.utils.logging import is_main_process

PACKAGE = "salora_plugins"
HOST = "axolotl"


class _InHostsLog(logging.Handler):
    """Hands records on to Axolotl's handlers, as records of its own; from the main process only, like its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not is_main_process():
            return
        record = copy.copy(record)
        record.name = f"{HOST}.{record.name}"
        logging.getLogger(HOST).handle(record)


def show_in_hosts_log() -> None:
    """
    Log what the package logs where Axolotl logs, from the level on that AXOLOTL_LOG_LEVEL sets (INFO).

    Only the package's own loggers are changed. Axolotl gives every logger that is made after its start a filter
    against what is not its own; theirs is removed.
    """
    package = logging.getLogger(PACKAGE)
    for name in [PACKAGE, *logging.root.manager.loggerDict]:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            logger = logging.getLogger(name)
            for added in [entry for entry in logger.filters if isinstance(entry, AxolotlOrWarnErrorFilter)]:
                logger.removeFilter(added)
    package.setLevel(logging.getLogger(HOST).getEffectiveLevel())
    if not any(isinstance(handler, _InHostsLog) for handler in package.handlers):
        package.addHandler(_InHostsLog())
        package.propagate = False  # Axolotl's root handlers would show warnings a second time
