"""Watches that each record came where its subscriber's records must come.

A producer must use the subscriber's number as the record's key, and one partitioner
(docs/EVENTS.md): else the orders of a subscriber stand in two partitions, and nobody
knows which of them came first. A misplaced order is executed all the same; a person is
told, because only the producer can be mended.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Final, Protocol

from function.model import TopUp

OTHER_KEY: Final = "key_is_not_the_subscriber"
OTHER_PARTITION: Final = "subscriber_in_two_partitions"

#: Subscribers whose partition is remembered, and orders that were told of: about 2 MB.
_REMEMBERED_MAX: Final = 10_000
#: Between two alerts of one reason, in seconds: a wrong producer misplaces every order.
_ALERT_PAUSE_S: Final = 60.0


class Alert(Protocol):
    """Tells a person; `telemetry.alert`."""

    def __call__(self, action: str, key: str, reason: str, **fields: object) -> None:
        """Tell of an action about an order's key, and why."""


def misplacement(order: TopUp, partition_before: int | None) -> str:
    """Why a record is in the wrong place, or nothing (pure).

    Args:
        order: with its position and record key, as far as the delivery tells them.
        partition_before: where the subscriber's last record of this topic was seen.

    """
    if order.record_key is not None and order.record_key != order.msisdn:
        return OTHER_KEY
    if (
        order.position is not None
        and partition_before is not None
        and order.position.partition != partition_before
    ):
        return OTHER_PARTITION
    return ""


class PlacementWatch:
    """What one process has seen of partitions; safe to share between threads.

    The number of partitions is unknown here, so a record in the wrong partition shows
    only when this process has seen another of its subscriber elsewhere.

    Args:
        alert: told once an order, and at most once a minute for each reason, with how
            many there were since the process began.
        monotonic: the process's clock, in seconds.

    """

    def __init__(
        self, alert: Alert, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._alert = alert
        self._monotonic = monotonic
        self._partitions: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._told: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._quiet_until: dict[str, float] = {}
        self._lock = Lock()

    def see(self, order: TopUp) -> None:
        """Look at where an order came from; tell of a misplaced one."""
        with self._lock:
            reason = misplacement(order, self._partition_before(order))
            is_new = bool(reason) and order.idempotency_key not in self._told
            if not is_new:
                return
            _remember(self._told, order.idempotency_key, None)
            self._counts[reason] += 1
            now = self._monotonic()
            if now < self._quiet_until.get(reason, now):
                return
            self._quiet_until[reason] = now + _ALERT_PAUSE_S
            count = self._counts[reason]
        self._alert("record_misplaced", order.idempotency_key, reason, count=count)

    def _partition_before(self, order: TopUp) -> int | None:
        at = order.position
        if at is None:
            return None
        before = self._partitions.get((at.topic, order.msisdn))
        _remember(self._partitions, (at.topic, order.msisdn), at.partition)
        return before


def _remember(memory: OrderedDict[Any, Any], key: object, value: object) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _REMEMBERED_MAX:
        memory.popitem(last=False)
