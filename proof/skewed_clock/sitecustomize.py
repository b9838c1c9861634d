# ruff: noqa: INP001 -- a folder for PYTHONPATH, no package.
"""A pod whose wall clock is wrong by CLOCK_SKEW_S seconds.

Owns what Python code of one process reads as the time of day; must never touch
`time.monotonic`, as a wrong wall clock doesn't either. Python loads it at its start
where this folder is on PYTHONPATH. C code (OpenSSL's look at certificates) is not
fooled: only what our code could use for leases and ages is.
"""

import datetime as dt
import os
import time
from typing import Self

_SKEW_S = float(os.environ["CLOCK_SKEW_S"])
_time, _time_ns = time.time, time.time_ns
_Datetime = dt.datetime


class _SkewedDatetime(_Datetime):
    """`datetime.datetime` by the wrong clock."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Self:
        return cls.now(dt.UTC).replace(tzinfo=None)


time.time = lambda: _time() + _SKEW_S
time.time_ns = lambda: _time_ns() + round(_SKEW_S * 10**9)
dt.datetime = _SkewedDatetime  # type: ignore[misc]
