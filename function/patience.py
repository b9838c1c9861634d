"""How long a record that can't become an order is delivered again, and what is kept.

Owns the bound of such a record at the head of its partition (docs/GUARANTEES.md), and
what the ledger keeps of it afterwards; must never read an event or answer one.

    of an unknown type   while the type was first seen less than ten minutes ago, all of
                         it is delivered again: a roll-out may be under way
    unforeseen           two times; where every record raises, the circuit breaker opens
                         and lets one record a pause be counted

Then the record is in quarantine with its bytes, and its subscriber's later orders are
held behind a row that keeps its place, so that `topup replay` still comes first.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from threading import Lock
from typing import Final, Protocol

from function.circuit_breaker import CircuitBreaker
from function.ledger import identity_of
from function.model import (
    Outcome,
    Receipt,
    Refused,
    Sighting,
    TopUp,
    kept_place,
    key_of_place,
)

#: Deliveries of one record that end in an error which nobody foresaw; the last one of
#: them records it.
UNFORESEEN_MAX: Final = 3
#: Between two alerts of one kind, in seconds: such records may come without end.
_ALERT_PAUSE_S: Final = 60.0


class RecordsPort(Protocol):
    """What is needed of the ledger; `function.ledger.Ledger` promises it."""

    def see(self, name: str) -> Sighting: ...
    def put_in_quarantine(self, refused: Refused) -> bool: ...
    def keep_place(self, place: TopUp, reason: str) -> bool: ...


class Patience:
    """See the module; safe to share between threads.

    Args:
        ledger: counts, and keeps.
        breaker: the process's; an error that nobody foresaw is a failed call to it.
        unknown_type_s: how long a type is waited for, in seconds from its first sight.
        alert: told of each kind at most once a minute, with how many there were since
            the process began.
        monotonic: the process's clock, in seconds.

    Each method may raise LedgerUnavailable: answer 503, the record comes again.

    """

    def __init__(
        self,
        ledger: RecordsPort,
        breaker: CircuitBreaker,
        *,
        unknown_type_s: float,
        alert: Callable[..., None] = lambda *_, **_fields: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._breaker = breaker
        self._unknown_type_s = unknown_type_s
        self._alert = alert
        self._monotonic = monotonic
        self._counts: Counter[str] = Counter()
        self._quiet_until: dict[str, float] = {}
        self._lock = Lock()

    def with_unknown_type(
        self, event_type: str, refused: Refused, subscriber: str | None
    ) -> Receipt:
        """Wait for a version that knows the type, or keep the record.

        Args:
            event_type: as the event has it.
            refused: the record, whole.
            subscriber: whose later orders are held; None if the record names nobody.

        """
        name = sha256(b"type:" + event_type.encode("utf-8", "replace")).hexdigest()
        is_waited_for = self._ledger.see(name).age_s < self._unknown_type_s
        if not is_waited_for:
            self._keep(refused, subscriber)
        self._tell("unknown_event_type", "waits" if is_waited_for else "quarantined")
        outcome = Outcome.UNKNOWN_TYPE if is_waited_for else Outcome.QUARANTINED
        return Receipt(outcome, reason=refused.outcome.value)

    def with_unforeseen(self, refused: Refused, subscriber: str | None) -> Receipt:
        """Have a record that raised an error delivered again, or keep it.

        Args:
            refused: the record, whole.
            subscriber: as above.

        """
        now = self._monotonic()
        name = identity_of(refused)
        with self._breaker.permit(now) as permit:
            if not permit:
                # Every record may raise: only what the breaker lets through counts.
                return Receipt(Outcome.UNFORESEEN, reason="circuit_open")
            permit.failed(subscriber or name, refused.outcome.value, now, 0)
            if self._ledger.see(name).times < UNFORESEEN_MAX:
                return Receipt(Outcome.UNFORESEEN)
            self._keep(refused, subscriber)
        self._tell("record_quarantined", refused.outcome.value)
        return Receipt(Outcome.QUARANTINED, reason=refused.outcome.value)

    def _keep(self, refused: Refused, subscriber: str | None) -> None:
        """Record it, and its place first: what follows must not pass between the two.

        Crash here: the place is kept, and the next delivery records the bytes.
        """
        if refused.position is not None and subscriber is not None:
            key = key_of_place(refused.position)
            refused = replace(refused, idempotency_key=key)
            place = kept_place(refused, subscriber)
            self._ledger.keep_place(place, refused.outcome.value)
        self._ledger.put_in_quarantine(refused)

    def _tell(self, action: str, reason: str) -> None:
        kind = f"{action}:{reason}"
        with self._lock:
            self._counts[kind] += 1
            now = self._monotonic()
            if now < self._quiet_until.get(kind, now):
                return
            self._quiet_until[kind] = now + _ALERT_PAUSE_S
            count = self._counts[kind]
        self._alert(action, "", reason, count=count)
