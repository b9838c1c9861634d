"""The source: one record of a partition after the other, as Knative delivers.

Owns what is delivered when; must never be kinder than Knative's dispatcher: it brings
again at once or late, forgets what it did not commit, gives a partition to two
consumers, and goes on after a non-retryable answer.
"""

from collections.abc import Callable
from typing import Final

from function.model import TopUp
from proof.judge import is_brought_again
from proof.scheduler import MICROS, Scheduler, Task

#: Delivery timeout, longer than the lease; and the pause before the next try.
TIMEOUT_US: Final = 40 * MICROS
BACKOFF_US: Final = 1 * MICROS
#: Deliveries of one record before a source that gives up does so.
TRIES_MAX: Final = 4


class Lane:
    """One consumer's hold on one partition.

    Args:
        partition: whose.
        records: all of them, in order.
        start: where the consumer begins.
        end: before which it stops; the end of the partition if None.

    """

    def __init__(
        self,
        partition: int,
        records: list[TopUp],
        start: int = 0,
        end: int | None = None,
    ) -> None:
        self.partition = partition
        self.records = records
        self.index = start
        self.end = len(records) if end is None else min(end, len(records))
        self.tries = 0
        #: The delivery under way, and when its answer is not waited for any more.
        self.task: Task | None = None
        self.timeout_at = 0
        self.retry_at = 0
        #: Deliveries so far of the record at `index`, over everything.
        self.is_revoked = False

    @property
    def is_done(self) -> bool:
        """Nothing is left to deliver."""
        return self.index >= self.end

    @property
    def record(self) -> TopUp:
        """What is or will be delivered."""
        return self.records[self.index]


class SimulatedSource:
    """All lanes; the world says when each delivers, and to which pod."""

    def __init__(
        self,
        scheduler: Scheduler,
        partitions: list[list[TopUp]],
        gave_up: Callable[[TopUp], None],
        *,
        gives_up: bool,
    ) -> None:
        self._scheduler = scheduler
        self._gave_up = gave_up
        self.gives_up = gives_up
        self.lanes = [Lane(n, records) for n, records in enumerate(partitions)]
        self.dead_letters: list[str] = []
        self.deliveries = 0

    @property
    def is_done(self) -> bool:
        """Every record had an answer that ends it."""
        return all(lane.is_done for lane in self.lanes)

    def idle(self) -> list[Lane]:
        """The lanes that wait to deliver, sooner or later."""
        return [each for each in self.lanes if each.task is None and not each.is_done]

    def ready(self) -> Lane | None:
        """The first lane that delivers by itself now."""
        for lane in self.lanes:
            if (
                lane.task is None
                and not lane.is_done
                and lane.retry_at <= self._scheduler.now
            ):
                return lane
        return None

    def begin(self, lane: Lane, task: Task) -> None:
        """A delivery has begun."""
        self.deliveries += 1
        lane.task = task
        lane.timeout_at = self._scheduler.now + TIMEOUT_US

    def answer(self, lane: Lane, task: Task, http_status: int) -> None:
        """A delivery was answered; too late counts for nothing."""
        if lane.task is not task:
            return
        lane.task = None
        if is_brought_again(http_status):
            self._fail(lane)
            return
        if not 200 <= http_status < 300:  # noqa: PLR2004
            self.dead_letters.append(lane.record.idempotency_key)
        self._advance(lane)

    def lose(self, task: Task) -> None:
        """A delivery's connection has broken."""
        for lane in self.lanes:
            if lane.task is task:
                lane.task = None
                self._fail(lane)

    def time_passes(self) -> None:
        """What takes longer than the delivery timeout has failed."""
        for lane in self.lanes:
            if lane.task is not None and lane.timeout_at <= self._scheduler.now:
                self._scheduler.say(f"the source stops waiting in {lane.partition}")
                lane.task = None
                self._fail(lane)

    def rebalance(self, lane: Lane, *, start: int, is_zombie: bool) -> None:
        """Give a partition to another consumer.

        Args:
            lane: who had it.
            start: the last committed record; what came after is brought again.
            is_zombie: the old one delivers one more record before it notices.

        """
        self.lanes.remove(lane)
        self.lanes.append(Lane(lane.partition, lane.records, start))
        if is_zombie and not lane.is_revoked:
            lane.is_revoked = True
            lane.end = min(lane.end, lane.index + 2)
            self.lanes.append(lane)

    def _fail(self, lane: Lane) -> None:
        lane.tries += 1
        if self.gives_up and lane.tries >= TRIES_MAX:
            self._scheduler.say(f"the source gives up {lane.record.idempotency_key}")
            self.dead_letters.append(lane.record.idempotency_key)
            self._gave_up(lane.record)
            self._advance(lane)
            return
        lane.retry_at = self._scheduler.now + BACKOFF_US * lane.tries

    def _advance(self, lane: Lane) -> None:
        lane.index += 1
        lane.tries = 0
        lane.retry_at = self._scheduler.now
