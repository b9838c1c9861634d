"""What the function tells about itself: one JSON object a line.

Owns the shape of the log and the masking of numbers; must never write a body, a
secret or a whole MSISDN.
"""

import logging
import sys
from typing import Final

from pythonjsonlogger.json import JsonFormatter

_LOGGER: Final = logging.getLogger("topup")
_MASK_KEEPS: Final = 3


def configure(level: str) -> None:
    """Send the project's log lines to standard error, as JSON, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "%(levelname)s %(message)s",
            rename_fields={"levelname": "level", "message": "action"},
            timestamp="at",
        )
    )
    _LOGGER.handlers = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False


def log(action: str, **fields: object) -> None:
    """Tell what happened: a constant and fields."""
    _LOGGER.info(action, extra={k: v for k, v in fields.items() if v is not None})


def alert(action: str, key: str, reason: str, **fields: object) -> None:
    """Tell what a person must look at."""
    _LOGGER.warning(
        action, extra={"alert": True, "key": key, "reason": reason, **fields}
    )


def error(action: str, failure: BaseException, **fields: object) -> None:
    """Tell of a failure nobody foresaw: class and place, never its text.

    The text of a foreign error may quote a row or a body.
    """
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = (
        f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace else ""
    )
    kept = {k: v for k, v in fields.items() if v is not None}
    _LOGGER.error(
        action, extra={"error": type(failure).__name__, "place": place, **kept}
    )


def mask(msisdn: str) -> str:
    """A number as logs may show it: the ends, which tell two apart, are kept short."""
    if len(msisdn) <= 2 * _MASK_KEEPS:
        return "*" * len(msisdn)
    hidden = "*" * (len(msisdn) - 2 * _MASK_KEEPS)
    return f"{msisdn[:_MASK_KEEPS]}{hidden}{msisdn[-_MASK_KEEPS:]}"
