"""How long an API asks to be left alone: `Retry-After` (RFC 9110 section 10.2.3)."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

#: A longer wait is taken for this one, in seconds: a typing error must not park an
#: order for years.
WAIT_MAX_S: Final = 86_400.0
#: More digits than any wait has; Python refuses to read some thousand of them.
_DIGITS_MAX: Final = 12


def wait_s(value: str | None, now: datetime) -> float:
    """The wait that the header's value names, in seconds, from 0 to `WAIT_MAX_S`.

    Args:
        value: seconds, or a date as HTTP writes it; None if there is no such header.
        now: the present time, with its zone.

    What can't be read, and a time that is past, is 0.

    """
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        is_long = len(text) > _DIGITS_MAX
        return WAIT_MAX_S if is_long else min(float(text), WAIT_MAX_S)
    try:
        moment = parsedate_to_datetime(text)
        # HTTP's dates are UTC; the oldest of their three forms does not say so.
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        left_s = (moment - now).total_seconds()
    # Whatever the library makes of foreign text.
    except Exception:  # noqa: BLE001
        return 0.0
    return min(max(left_s, 0.0), WAIT_MAX_S)
