"""What the function tells about itself: one JSON object a line.

Owns the shape of the log, the masking of numbers, and the one rule for text that is not
ours; must never write a body, a secret or a whole MSISDN.

The rule: what others have written (an event's id, the recharge API's reference or code)
stands in a line as it came only where it is short, of a few harmless characters, and
can't be a number that belongs to somebody: at most six digits. Else its hash stands
there, which still tells two apart and can be compared with a text that is known.
The idempotency key is the exception: it is the name by which a person finds an order
everywhere, so a producer must put no number and no name into it (docs/EVENTS.md).
"""

import logging
import re
import sys
from collections.abc import Mapping
from hashlib import sha256
from typing import Final

from pythonjsonlogger.json import JsonFormatter

_LOGGER: Final = logging.getLogger("topup")
_MASK_KEEPS: Final = 3
_HARMLESS: Final = re.compile(r"[A-Za-z0-9._:/#-]{0,64}")
_DIGITS_MAX: Final = 6
_HASH_CHARACTERS: Final = 16
#: Fields whose text is our own, or the key. Every other field follows the rule.
_OURS: Final = frozenset(
    {"key", "attempt", "outcome", "subscriber", "detail", "error", "place", "path"}
)


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
    """Tell what happened: a constant and fields.

    Text that is not ours follows the rule above, whatever its field; a sentence of our
    own is the field `detail`.
    """
    _LOGGER.info(action, extra=_told(fields))


def alert(action: str, key: str, reason: str, **fields: object) -> None:
    """Tell what a person must look at; the fields as in `log`."""
    told = _told({"key": key, "reason": reason, **fields})
    _LOGGER.warning(action, extra={"alert": True, **told})


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
    told = _told({"error": type(failure).__name__, "place": place, **fields})
    _LOGGER.error(action, extra=told)


def is_harmless(text: str) -> bool:
    """Whether foreign text can be shown: neither a number nor a sentence."""
    digits = sum(each.isdigit() for each in text)
    return digits <= _DIGITS_MAX and _HARMLESS.fullmatch(text) is not None


def foreign(text: str) -> str:
    """Foreign text as a log may show it: as it is, or its hash."""
    if is_harmless(text):
        return text
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256:{digest[:_HASH_CHARACTERS]}"


def mask(msisdn: str) -> str:
    """A number as logs may show it: the ends, which tell two apart, are kept short."""
    if len(msisdn) <= 2 * _MASK_KEEPS:
        return "*" * len(msisdn)
    hidden = "*" * (len(msisdn) - 2 * _MASK_KEEPS)
    return f"{msisdn[:_MASK_KEEPS]}{hidden}{msisdn[-_MASK_KEEPS:]}"


def _told(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields as they may be told; what is None is left out."""
    return {
        name: value
        if name in _OURS or isinstance(value, bool | int | float)
        else foreign(str(value))
        for name, value in fields.items()
        if value is not None
    }
