"""The package's loggers, ``shardemb.<module>``, and their output.

By default only warnings are printed. ``SHARDEMB_LOG`` or ``shardemb --verbose`` prints lines with
ranks to stderr::

    SHARDEMB_LOG=INFO
    SHARDEMB_LOG=WARNING,checkpoint=INFO,comm.shared_memory=DEBUG
"""

import logging
import os
import sys

from shardemb.exceptions import InputError

VARIABLE = "SHARDEMB_LOG"
_FORMAT = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"
_handler: logging.Handler | None = None


def logger(module: str) -> logging.Logger:
    """Return the logger for a ``__name__``; its records have a ``rank``."""
    log = logging.getLogger(module)
    log.addFilter(_add_rank)
    return log


def _add_rank(record: logging.LogRecord) -> bool:
    dist = sys.modules.get("torch.distributed")  # utils work without torch
    grouped = dist is not None and dist.is_available() and dist.is_initialized()
    record.rank = dist.get_rank() if dist and grouped else int(os.environ.get("RANK", "0"))
    return True


def configure(levels: str) -> None:
    """Print log lines to stderr, in this process and those that it starts later.

    Takes a level, or pairs ``module=level``, separated by commas; ValueError for an unknown level.
    """
    global _handler
    for entry in filter(None, (part.strip() for part in levels.split(","))):
        module, _, level = entry.rpartition("=")
        if level.strip().upper() not in logging.getLevelNamesMapping():
            raise InputError(
                f"{VARIABLE}: got {entry!r}, expected a level (DEBUG, INFO, WARNING, ERROR) or"
                " module=level, separated by commas"
            )
        name = "shardemb." + module.strip().removeprefix("shardemb.") if module else "shardemb"
        logging.getLogger(name).setLevel(level.strip().upper())
    if _handler is None:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter(_FORMAT, defaults={"rank": "?"}))
        logging.getLogger("shardemb").addHandler(_handler)
    os.environ[VARIABLE] = levels


def verbose() -> None:
    """Print log lines of level INFO; levels set for single modules stay."""
    configure(f"{os.environ.get(VARIABLE, '')},INFO".lstrip(","))


def environment() -> dict[str, str]:
    """Return variables for ranks that do not inherit this process's environment."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


if os.environ.get(VARIABLE):
    configure(os.environ[VARIABLE])
