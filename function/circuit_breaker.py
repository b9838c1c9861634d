"""One circuit breaker a process: when most calls fail, orders wait and are not called.

Owns when an order may be called; must never look at the ledger, the API or a clock: it
is told. What it says concerns every order alike, so only it makes partitions wait.

    closed  every order may be called. It counts the *different* subscribers whose
            orders failed in a row; an answer that was final starts the count anew.
            One poisoned subscriber alone never opens it.
    open    no order may be called for 1 s, then twice as long, up to 60 s, or for as
            long as the API asks (`Retry-After`), up to the same.
    trial   after each pause one order alone may be called. If it fails, the pause
            doubles; a final answer, of whatever order, closes the breaker.
"""

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Final, Self

#: Different subscribers whose orders failed in a row before it opens.
FAILING_MAX: Final = 3
#: The first pause, and the longest, in seconds.
PAUSE_S_MIN: Final = 1.0
PAUSE_S_MAX: Final = 60.0


class Permit:
    """Whether the holder may call the API now; false while the breaker is open.

    A context manager: at its end a trial that was not needed is free for the next.
    """

    def __init__(self, breaker: "CircuitBreaker", *, is_given: bool) -> None:
        self._breaker = breaker
        self._is_given = is_given

    def __bool__(self) -> bool:
        """Whether the API may be called, now: it can end while it is held."""
        return self._is_given and not self._breaker.is_closed_to(self)

    def answered(self) -> None:
        """The API gave a final answer: done, accepted, or a definite no."""
        self._breaker.answered()

    def failed(
        self, subscriber: str, reason: str, now: float, retry_after_s: float
    ) -> None:
        """A call ended unknown, unreachable, or answered that nothing was executed.

        Args:
            subscriber: whose order it was; several of one count once.
            reason: a short constant for the alert.
            now: the process's monotonic clock, in seconds.
            retry_after_s: the wait that the API named, in seconds; 0 if none.

        """
        self._breaker.failed(self, subscriber, reason, now, retry_after_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._breaker.put_back(self)


class CircuitBreaker:
    """See the module; safe to share between threads.

    Args:
        alert: told once when it opens (`circuit_opened`) and once when it closes
            (`circuit_closed`).

    """

    def __init__(self, alert: Callable[..., None] = lambda *_, **_fields: None) -> None:
        self._alert = alert
        #: Subscribers that failed since the last final answer; the wait each was told.
        self._failing: dict[str, float] = {}
        self._is_open = False
        self._pause_s = PAUSE_S_MIN
        self._until = 0.0
        self._trial: Permit | None = None
        self._lock = Lock()

    def permit(self, now: float) -> Permit:
        """Ask whether an order may be called.

        Args:
            now: the process's monotonic clock, in seconds.

        """
        with self._lock:
            if not self._is_open:
                return Permit(self, is_given=True)
            if now < self._until or self._trial is not None:
                return Permit(self, is_given=False)
            self._trial = Permit(self, is_given=True)
            return self._trial

    def is_closed_to(self, permit: Permit) -> bool:
        """Whether it has opened since, and this is not its trial."""
        with self._lock:
            return self._is_open and permit is not self._trial

    def is_pausing(self, now: float) -> bool:
        """Whether nobody may call the API now, not even as a trial."""
        with self._lock:
            return self._is_open and (now < self._until or self._trial is not None)

    def answered(self) -> None:
        """As `Permit.answered`."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
            self._failing.clear()
            self._pause_s = PAUSE_S_MIN
            self._trial = None
        if was_open:
            self._alert("circuit_closed", "", "answered")

    def failed(
        self,
        permit: Permit,
        subscriber: str,
        reason: str,
        now: float,
        retry_after_s: float,
    ) -> None:
        """As `Permit.failed`."""
        wait_s = min(retry_after_s, PAUSE_S_MAX)
        with self._lock:
            if self._is_open:
                if permit is self._trial:
                    self._trial = None
                    self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)
                    self._until = now + max(self._pause_s, wait_s)
                else:
                    # It was under way when others opened it.
                    self._until = max(self._until, now + wait_s)
                return
            self._failing[subscriber] = wait_s
            if len(self._failing) < FAILING_MAX:
                return
            self._is_open = True
            self._pause_s = PAUSE_S_MIN
            self._until = now + max(self._pause_s, *self._failing.values())
        self._alert("circuit_opened", "", reason)

    def put_back(self, permit: Permit) -> None:
        """End a permit; a trial that was not made is the next one's."""
        with self._lock:
            if permit is self._trial:
                self._trial = None
