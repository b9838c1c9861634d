"""A record that came to the wrong place is told of: once an order, not too often."""

from dataclasses import replace

import pytest

from function.model import TopUp
from function.placement import (
    OTHER_KEY,
    OTHER_PARTITION,
    PlacementWatch,
    misplacement,
)
from tests.orders import order

OTHER = "+393330000009"


class Watched:
    """A watch with a clock and an ear for its alerts."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.alerts: list[tuple[str, str, object]] = []
        self.watch = PlacementWatch(self._hear, lambda: self.now)

    def _hear(self, action: str, key: str, reason: str, **fields: object) -> None:
        assert action == "record_misplaced"
        self.alerts.append((key, reason, fields["count"]))

    def see(self, name: str, **where: int) -> None:
        self.watch.see(order(name, **where))  # type: ignore[arg-type]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def keyed(key: str | None) -> TopUp:
    return replace(order(offset=1), record_key=key)


@pytest.mark.parametrize(
    ("topup", "before", "reason"),
    [
        (keyed(order().msisdn), None, ""),
        (keyed(order().msisdn), 0, ""),
        (keyed(None), 0, ""),
        (keyed(None), 1, OTHER_PARTITION),
        (keyed(OTHER), 0, OTHER_KEY),
        (keyed(order().msisdn.removeprefix("+")), None, OTHER_KEY),
        (order(), 1, ""),
    ],
)
def test_place_is_judged_by_key_and_partition(
    topup: TopUp, before: int | None, reason: str
) -> None:
    assert misplacement(topup, before) == reason


def test_subscriber_that_comes_from_two_partitions_is_told(watched: Watched) -> None:
    watched.see("r1", offset=1, partition=0)
    watched.see("r2", offset=2, partition=0)
    assert watched.alerts == []

    watched.see("r3", offset=1, partition=1)

    assert watched.alerts == [("app:r3", OTHER_PARTITION, 1)]


def test_topics_are_apart(watched: Watched) -> None:
    watched.see("r1", offset=1, partition=0)
    watched.watch.see(order("r2", offset=1, partition=1, topic="other"))

    assert watched.alerts == []


def test_redelivery_is_told_once(watched: Watched) -> None:
    for _ in range(3):
        watched.watch.see(keyed(OTHER))
        watched.now += 3600

    assert watched.alerts == [("app:r1", OTHER_KEY, 1)]


def test_alerts_are_a_minute_apart_and_say_how_many_there_were(
    watched: Watched,
) -> None:
    for number in range(100):
        watched.watch.see(replace(order(f"r{number}"), record_key=OTHER))
    watched.now += 60
    watched.watch.see(replace(order("last"), record_key=OTHER))

    assert watched.alerts == [("app:r0", OTHER_KEY, 1), ("app:last", OTHER_KEY, 101)]
