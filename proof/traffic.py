"""The orders of a soak: thousands of subscribers, a few of them busy, and duplicates.

Owns what is written into the topic and how fast; must never know what becomes of it.
Order number n is the same in every run of a seed; how many there are is not.
"""

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Self

from demo.judge import Sent
from demo.producers import App, Config, Order, Records, Shape

SUBSCRIBERS: Final = 5000
#: Share of a subscriber ~ 1 / rank ** this: the first has 4 % of all orders.
ZIPF_EXPONENT: Final = 0.8
DUPLICATES: Final = 0.03
REFUSED: Final = 0.002
#: An order is written again at once or up to so many orders later.
_DUPLICATE_WITHIN: Final = 5000
#: So many seconds' worth may wait; then the producers wait, too.
BACKLOG_S: Final = 10.0
APPS: Final[tuple[tuple[str, Shape], ...]] = (
    ("app", "binary"),
    ("shop", "structured"),
    ("server", "plain"),
)
_AMOUNTS_MINOR: Final = (500, 1000, 2000)
_TICK_S: Final = 0.05


def number_of(rank: int) -> str:
    """A number that is kept for films (555-01xx), of one of many area codes."""
    return f"+1{201 + rank // 100}55501{rank % 100:02d}"


class Traffic:
    """Producers that write until they are stopped; a context manager.

    Args:
        seed: of who orders what, and which order is written twice.
        kafka: how the producers connect.
        topic: where they write.
        rate_max: orders a second.
        waiting: orders that are written and not yet done.
        has_refused: whether some records are such as nobody may execute.

    """

    def __init__(
        self,
        seed: int,
        kafka: Config,
        topic: str,
        *,
        rate_max: float,
        waiting: Callable[[int], int],
        has_refused: bool,
    ) -> None:
        self._chance = random.Random(f"{seed}:orders")  # noqa: S311 # not for secrets.
        self._records = Records()
        self._apps = [App(*app, kafka, topic, self._records) for app in APPS]
        self._rate_max = rate_max
        self._waiting = waiting
        self._has_refused = has_refused
        weights = [1 / rank**ZIPF_EXPONENT for rank in range(1, SUBSCRIBERS + 1)]
        self._weights = list(itertools.accumulate(weights))
        self._written: deque[tuple[App, Order]] = deque(maxlen=_DUPLICATE_WITHIN)
        #: Different orders written so far.
        self.orders = 0
        self._over = threading.Event()
        #: What ended the producers, unless they were stopped.
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def stop(self) -> None:
        """Write no more; on return the broker has acknowledged everything.

        Raises:
            KafkaException: it has not.

        """
        self._over.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        for app in self._apps:
            app.flush()

    @property
    def acknowledged(self) -> int:
        """Records that the broker has."""
        return len(self._records)

    def sent(self) -> list[Sent]:
        """Every record that the broker has acknowledged."""
        return self._records.all()

    def _run(self) -> None:
        due, before_s = 0.0, time.monotonic()
        try:
            while not self._over.wait(_TICK_S):
                now_s = time.monotonic()
                due += (now_s - before_s) * self._rate_max
                before_s = now_s
                if self._waiting(self.orders) > self._rate_max * BACKLOG_S:
                    # What could not be written in time is not made up for.
                    due = 0.0
                while due >= 1:
                    self._write_one()
                    due -= 1
        except Exception as error:  # noqa: BLE001 # raised by `stop`.
            self.failure = error

    def _write_one(self) -> None:
        chance = self._chance
        rank = chance.choices(range(SUBSCRIBERS), cum_weights=self._weights)[0]
        app = self._apps[self.orders % len(self._apps)]
        order = Order(
            f"{self.orders:07d}",
            app.channel,
            number_of(rank),
            amount_minor=chance.choice(_AMOUNTS_MINOR),
            currency="USD",
        )
        app.send(order)
        self.orders += 1
        self._written.append((app, order))
        if chance.random() < DUPLICATES:
            again_by, again = chance.choice(self._written)
            again_by.send(again)
        if chance.random() < REFUSED and self._has_refused:
            self._write_refused(app, order)

    def _write_refused(self, app: App, order: Order) -> None:
        """Write what nobody may execute."""
        kind = self._chance.randrange(3)
        if kind == 0:
            app.send_garbage(order.msisdn, b"\xff not JSON")
            return
        # The same key with another amount, or an amount that nobody can pay.
        amount = order.amount_minor + 1 if kind == 1 else -1
        data = {**order.data(), "amountMinor": amount}
        app.send_data(order, data, "refused")
