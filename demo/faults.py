"""The faults of the sandbox recharge API: which there are, and which request gets one.

Owns their names, the scripts that ask for them and the choice by chance: the same seed,
key and attempt always draw the same fault. It must never answer a request or write the
book: recharge_api.py plays what is chosen here.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, Self

#: How long a scripted or random fault waits unless it says otherwise.
FAULT_DELAY_S = 2.0


class Fault(StrEnum):
    """What goes wrong with one request."""

    #: Nothing; a script with it lets calls pass that a later script would match.
    NONE = "none"

    #: Close the connection with no answer; not executed.
    DROP_BEFORE = "drop_before"
    #: No answer for `delay_s` or until the faults are cleared, then 503; not executed.
    HANG = "hang"
    #: `status` (500 or 503) without executing.
    ERROR_BEFORE = "error_before"
    #: 429 with Retry-After; not executed.
    RATE_LIMITED = "rate_limited"
    #: 409 `similar_recently`; not executed.
    SAME_CONTENT = "same_content"
    #: 401; not executed.
    UNAUTHORIZED = "unauthorized"
    #: 307 to a page that doesn't exist; not executed.
    REDIRECT = "redirect"

    #: The definite no: `status` (422) with `code`; the key is used by it.
    REJECT = "reject"
    #: 202; executed after `delay_s`.
    ACCEPT = "accept"
    #: 202; fails for good after `delay_s`.
    ACCEPT_THEN_FAIL = "accept_then_fail"
    #: Executed and answered; taken back after `delay_s`.
    REVERSE_LATER = "reverse_later"
    #: Executed after `delay_s`, though the caller may have gone; then answered.
    LATE_EXECUTE = "late_execute"

    #: Executed; close the connection with no answer.
    EXECUTE_THEN_DROP = "execute_then_drop"
    #: Executed at once; answered after `delay_s`.
    EXECUTE_THEN_LATE = "execute_then_late"
    #: Executed; SIGKILL to the process group `pgid`; close with no answer.
    EXECUTE_THEN_KILL = "execute_then_kill"
    #: Executed; then `status` (500).
    ERROR_AFTER = "error_after"
    #: Executed; headers and half the body, then close.
    HALF_BODY = "half_body"
    #: Executed; the answer comes one byte every `delay_s`.
    DRIP = "drip"
    #: Executed; 200 with a body that isn't JSON.
    GARBAGE = "garbage"


#: What chance picks from unless told: the faults that leave the order executable.
RANDOM_FAULTS = (
    Fault.DROP_BEFORE,
    Fault.HANG,
    Fault.ERROR_BEFORE,
    Fault.RATE_LIMITED,
    Fault.LATE_EXECUTE,
    Fault.EXECUTE_THEN_DROP,
    Fault.EXECUTE_THEN_LATE,
    Fault.ERROR_AFTER,
    Fault.HALF_BODY,
    Fault.DRIP,
    Fault.GARBAGE,
)


@dataclass(frozen=True, slots=True)
class Script:
    """A fault on request, for the requests that it matches.

    Raises:
        ValueError: a field makes no sense.

    """

    fault: Fault
    #: How many requests it is for; None: until it is cleared.
    times: int | None = 1
    #: Only for this subscriber, or for this key; empty: for all.
    msisdn: str = ""
    key: str = ""
    #: Which request it spoils: the recharge itself, or the look-up.
    on: Literal["recharge", "lookup"] = "recharge"
    #: Of the answer of `error_before`, `error_after`, `reject`; 0: the usual one.
    status: int = 0
    #: The error code of that answer; empty: the usual one.
    code: str = ""
    #: Seconds; None: `FAULT_DELAY_S`, or `finish_after_s` for what ends later.
    delay_s: float | None = None
    #: The process group that `execute_then_kill` kills.
    pgid: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fault", Fault(self.fault))
        if self.times is not None and self.times < 1:
            raise ValueError("times is a positive number, or null for always")
        if self.on not in {"recharge", "lookup"}:
            raise ValueError("on is recharge or lookup")
        if self.delay_s is not None and self.delay_s < 0:
            raise ValueError("delay_s is not negative")
        # 0, 1 and our own group would kill the judge, or the machine.
        killable = self.pgid > 1 and self.pgid != os.getpgrp()
        if self.fault is Fault.EXECUTE_THEN_KILL and not killable:
            raise ValueError("execute_then_kill needs the pgid of another group")

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Read one script of the control's list.

        Raises:
            ValueError: it isn't a script.

        """
        if not isinstance(document, dict):
            raise ValueError("a script is an object")  # noqa: TRY004
        # The control's users write null for "not given".
        given = {k: v for k, v in document.items() if v is not None or k == "times"}
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def wait_s(self) -> float:
        """Seconds that the fault takes."""
        return FAULT_DELAY_S if self.delay_s is None else self.delay_s

    def matches(self, on: str, key: str, msisdn: str) -> bool:
        """Whether it is for this request."""
        return (
            self.on == on
            and self.key in {"", key}
            and (not self.msisdn or self.msisdn == msisdn)
        )


#: No fault: the request is carried out and answered.
UNTOUCHED = Script(Fault.NONE, times=None)


class Scripts:
    """The scripted faults; consumed one by one, whoever asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scripts: list[Script] = []
        self._wake = threading.Event()

    def add(self, scripts: Iterable[Script]) -> None:
        """Append scripts."""
        with self._lock:
            self._scripts += scripts

    def clear(self) -> None:
        """Forget all scripts, and end every hang that has begun."""
        with self._lock:
            self._scripts = []
        self.wake()

    def wake(self) -> None:
        """End every hang that has begun."""
        with self._lock:
            self._wake.set()
            self._wake = threading.Event()

    def left(self) -> list[Script]:
        """The scripts that are left."""
        with self._lock:
            return list(self._scripts)

    def take(
        self, on: str, key: str, msisdn: str = ""
    ) -> tuple[Script | None, threading.Event]:
        """The first script that matches, and what wakes a hang of it."""
        with self._lock:
            for index, script in enumerate(self._scripts):
                if script.matches(on, key, msisdn):
                    if script.times == 1:
                        del self._scripts[index]
                    elif script.times is not None:
                        self._scripts[index] = replace(script, times=script.times - 1)
                    return script, self._wake
            return None, self._wake


def draw(
    key: str, attempt: int, *, seed: int, fault_rate: float, faults: Sequence[Fault]
) -> Script:
    """Chance as a function of seed, key and attempt: threads can't change it."""
    digest = hashlib.sha256(f"{seed}:{attempt}:{key}".encode())
    drawn, pick = (int.from_bytes(digest.digest()[i : i + 8]) for i in (0, 8))
    if drawn >= fault_rate * 2**64:
        return UNTOUCHED
    return Script(faults[pick % len(faults)])
