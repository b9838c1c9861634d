"""Durations as people and Kubernetes write them, in seconds.

Owns the two notations; must never know what a duration is for.
"""

import re
from typing import Final

#: Seconds of each unit that a person may write; none is seconds.
UNIT_S: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

_AGE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd]?)")
_ISO: Final = re.compile(
    r"P(?:(\d+(?:\.\d+)?)D)?"
    r"(?:T(?=\d)(?:(\d+(?:\.\d+)?)H)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)S)?)?"
)
_ISO_UNITS: Final = ("d", "h", "m", "s")


def age_s(text: str) -> float | None:
    """The seconds of `90`, `250ms`, `15m`, `36h` or `44d`; None if it is none."""
    parts = _AGE.fullmatch(text.strip())
    if parts is None:
        return None
    if parts[2] == "ms":
        return float(parts[1]) / 1000
    return float(parts[1]) * UNIT_S[parts[2]]


def iso_s(text: object) -> float | None:
    """The seconds of an ISO 8601 duration such as `PT1M30S`; None if it is none.

    Years, months and weeks, which are no fixed time or nobody's backoff, are none.
    """
    parts = _ISO.fullmatch(text) if isinstance(text, str) else None
    if parts is None or not any(parts.groups()):
        return None
    found = zip(parts.groups(), _ISO_UNITS, strict=True)
    return sum(float(number) * UNIT_S[unit] for number, unit in found if number)


def shown(seconds: float) -> str:
    """A duration for a person: the largest unit of which there are at least two."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * UNIT_S[unit]:
            return f"{seconds / UNIT_S[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
