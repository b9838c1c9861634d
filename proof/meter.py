"""What a soak looks like from outside, once a second.

Owns the samples for the progress and the timeline; must never judge: a number that
can't be had in the middle of a fault is left out, not guessed.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from confluent_kafka import Consumer, KafkaException, TopicPartition
from sqlalchemy import Engine, bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from demo.producers import Config
from function.model import UNSETTLED, Status

_EVERY_S: Final = 1.0
#: The ledger's line is read by its index; the group's offsets are asked at the broker.
_TIMEOUT_S: Final = 2.0
_EXECUTED: Final = b'"entry":"executed"'
_REJECTED: Final = b'"entry":"rejected"'
_CALLED: Final = b'"entry":"called"'


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment; what could not be had is None."""

    at_s: float
    executed: int
    calls: int
    #: Records that the group has not committed.
    lag: int | None
    #: Orders in the ledger by status, unsettled ones only.
    unsettled: dict[str, int] | None


class Tally:
    """Counts the entries of a book that grows, reading each once."""

    def __init__(self, book: Path) -> None:
        self._path = book
        self._read_bytes = 0
        self.executed = self.rejected = self.calls = 0

    def update(self) -> None:
        """Read what has come since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        self.executed += whole.count(_EXECUTED)
        self.rejected += whole.count(_REJECTED)
        self.calls += whole.count(_CALLED)


class Meter:
    """Takes a sample each second in a thread of its own; a context manager.

    Args:
        book: the recharge API's.
        ledger: an engine whose way to the ledger no fault disturbs; None: not asked.
        kafka: how a member of the group connects.
        group: whose lag.
        topic: of which topic.
        partitions: how many it has.

    """

    def __init__(
        self,
        book: Path,
        ledger: Engine | None,
        kafka: Config,
        *,
        group: str,
        topic: str,
        partitions: int,
    ) -> None:
        self.tally = Tally(book)
        self._ledger = ledger
        # Asks for offsets only: it never joins the group.
        self._consumer = Consumer({**kafka, "group.id": group})
        self._partitions = [TopicPartition(topic, n) for n in range(partitions)]
        self._began_s = time.monotonic()
        self.samples: list[Sample] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._every_second, args=(work,), daemon=True)
            for work in (self._sample, self._ask_lag, self._ask_ledger)
        ]
        self._lag: int | None = None
        self._unsettled: dict[str, int] | None = None

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._consumer.close()

    @property
    def last(self) -> Sample:
        """The latest sample."""
        return self.samples[-1] if self.samples else Sample(0.0, 0, 0, None, None)

    @property
    def done(self) -> int:
        """Orders that no longer wait for the function: it, or a person, has them."""
        stuck = self._unsettled or {}
        kept = stuck.get("parked", 0) + stuck.get("held", 0)
        return self.tally.executed + self.tally.rejected + kept

    def ask_lag(self) -> int | None:
        """Records of the topic that the group has not committed; None: no answer."""
        try:
            committed = self._consumer.committed(self._partitions, timeout=_TIMEOUT_S)
            total = 0
            for each in committed:
                at = TopicPartition(each.topic, each.partition)
                marks = self._consumer.get_watermark_offsets(at, timeout=_TIMEOUT_S)
                if marks is None:
                    return None
                total += max(0, marks[1] - max(each.offset, marks[0]))
        except KafkaException:
            return None
        return total

    def _every_second(self, work: Callable[[], None]) -> None:
        due_s = time.monotonic()
        while not self._over.is_set():
            work()
            due_s = max(due_s + _EVERY_S, time.monotonic())
            self._over.wait(due_s - time.monotonic())

    def _sample(self) -> None:
        self.tally.update()
        self.samples.append(
            Sample(
                round(time.monotonic() - self._began_s, 2),
                self.tally.executed,
                self.tally.calls,
                self._lag,
                self._unsettled,
            )
        )

    def _ask_lag(self) -> None:
        self._lag = self.ask_lag()

    def _ask_ledger(self) -> None:
        if self._ledger is None:
            return
        try:
            self._unsettled = unfinished(self._ledger)
        except (SQLAlchemyError, OSError):
            self._unsettled = None


def unfinished(ledger: Engine) -> dict[str, int]:
    """Count the orders that have not come to their end, by status.

    Raises:
        SQLAlchemyError: the ledger does not answer.

    """
    with ledger.connect() as connection:
        rows = connection.execute(_UNFINISHED, {"statuses": _STATUSES}).all()
    return {str(status): int(count) for status, count in rows}


_STATUSES: Final = [*(status.value for status in UNSETTLED), Status.ACCEPTED.value]
# By the index on the status: the settled ones are many.
_UNFINISHED: Final = text(
    "SELECT status, COUNT(*) FROM topup WHERE status IN :statuses GROUP BY status"
).bindparams(bindparam("statuses", expanding=True))
