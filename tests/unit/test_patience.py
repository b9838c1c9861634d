"""How long a record that can't become an order is delivered again, by a clock."""

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from function.api_profile import load_profile
from function.circuit_breaker import CircuitBreaker
from function.config import Settings
from function.model import Outcome, Position, Refused, Status
from function.patience import UNFORESEEN_MAX, Patience
from function.rules import Rules
from proof.memory_ledger import MemoryLedger
from tests.orders import order

A, B = "+393330000001", "+393330000002"
WAIT_S = 600.0


@dataclass
class Process:
    """One process of the function, on a ledger that others may share."""

    ledger: MemoryLedger
    now: float = 1_000.0
    alerts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = CircuitBreaker(self._alert)
        self.patience = Patience(
            self.ledger,
            self.breaker,
            unknown_type_s=WAIT_S,
            alert=self._alert,
            monotonic=lambda: self.now,
        )

    def _alert(self, action: str, _key: str, reason: str, **_fields: Any) -> None:
        self.alerts.append((action, reason))

    def sees_type(self, refused: Refused, name: str = "other") -> Outcome:
        return self.patience.with_unknown_type(name, refused, A).outcome

    def raises_at(self, refused: Refused, subscriber: str | None = A) -> Outcome:
        return self.patience.with_unforeseen(refused, subscriber).outcome


@dataclass
class Clock:
    """The database's: it goes with the process's."""

    process: "Process | None" = None

    def __call__(self) -> int:
        return round((self.process.now if self.process else 1_000.0) * 1_000_000)


def make_process() -> Process:
    settings = Settings.from_env(
        {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "http://api"}
    )
    clock = Clock()
    ledger = MemoryLedger(
        load_profile(settings), lease_s=30, now=clock, rules=Rules(0, 10_000)
    )
    clock.process = Process(ledger)
    return clock.process


@pytest.fixture
def process() -> Process:
    return make_process()


def record(
    offset: int, outcome: Outcome = Outcome.UNKNOWN_TYPE, *, is_placed: bool = True
) -> Refused:
    position = Position("recharge.orders", 0, offset) if is_placed else None
    raw = f"bytes {offset}".encode()
    return Refused(outcome, "why", raw, len(raw), {"ce-id": f"{offset}"}, position)


def unforeseen(offset: int) -> Refused:
    return record(offset, Outcome.UNFORESEEN)


def test_unknown_type_is_waited_for_ten_minutes_from_its_first_sight(
    process: Process,
) -> None:
    assert process.sees_type(record(1)) is Outcome.UNKNOWN_TYPE
    process.now += WAIT_S - 1
    assert process.sees_type(record(1)) is Outcome.UNKNOWN_TYPE
    assert not process.ledger.quarantined
    process.now += 1

    # The time is the type's: later events of it wait no more.
    for offset in (1, 2, 3):
        assert process.sees_type(record(offset)) is Outcome.QUARANTINED

    assert len(process.ledger.quarantined) == 3
    assert process.sees_type(record(4), "another") is Outcome.UNKNOWN_TYPE
    actions = {action for action, _ in process.alerts}
    assert actions == {"unknown_event_type"}
    # Each once a minute at most, however many there are.
    assert len(process.alerts) <= 4


def test_later_orders_of_its_subscriber_are_held_in_their_order(
    process: Process,
) -> None:
    ledger = process.ledger
    process.sees_type(record(5))
    process.now += WAIT_S
    assert process.sees_type(record(5)) is Outcome.QUARANTINED

    assert ledger.claim(order("later", msisdn=A, offset=6)) is None
    assert ledger.hold(order("later", msisdn=A, offset=6))
    assert ledger.look(order("later", msisdn=A, offset=6))[1].is_stuck
    assert ledger.claim(order("other", msisdn=B, offset=7)) is not None
    # Nobody can look up what was never sent.
    due = ledger.due(given_up_s=0, again_s=0, is_parked_due=True, limit=9)
    assert due == []


def test_record_without_a_place_or_a_subscriber_is_kept_all_the_same(
    process: Process,
) -> None:
    process.sees_type(record(1))
    process.now += WAIT_S
    nowhere = record(2, is_placed=False)

    assert process.sees_type(nowhere) is Outcome.QUARANTINED
    assert process.patience.with_unknown_type("other", record(3), None).outcome is (
        Outcome.QUARANTINED
    )

    assert len(process.ledger.quarantined) == 2
    assert not process.ledger.orders


def test_record_that_raises_is_kept_at_the_third_time(process: Process) -> None:
    outcomes = [process.raises_at(unforeseen(1)) for _ in range(UNFORESEEN_MAX + 1)]

    assert (
        outcomes
        == [Outcome.UNFORESEEN] * (UNFORESEEN_MAX - 1) + [Outcome.QUARANTINED] * 2
    )
    (kept,) = process.ledger.quarantined.values()
    assert kept.raw == b"bytes 1"
    (place,) = process.ledger.orders.values()
    assert (place.status, place.reason) == (Status.PARKED, "unforeseen")
    assert ("record_quarantined", "unforeseen") in process.alerts


def test_its_row_in_the_ledger_keeps_its_place_already(process: Process) -> None:
    """It raised behind the claim: the resolver brings the order on."""
    assert process.ledger.claim(order("r1", msisdn=A, offset=1))

    for _ in range(UNFORESEEN_MAX):
        process.raises_at(unforeseen(1))

    assert list(process.ledger.orders) == ["app:r1"]
    assert len(process.ledger.quarantined) == 1


def test_build_that_raises_for_every_record_quarantines_a_few(
    process: Process,
) -> None:
    """1,000 orders in eight partitions for ten minutes, delivered again each 100 ms."""
    waiting = {partition: count(partition, 8) for partition in range(8)}
    heads = {partition: next(line) for partition, line in waiting.items()}
    end = process.now + 600
    while process.now < end:
        for partition, offset in heads.items():
            subscriber = f"+3933300{offset:05}"
            if process.raises_at(unforeseen(offset), subscriber) is Outcome.QUARANTINED:
                heads[partition] = next(waiting[partition])
        process.now += 0.1

    assert 1 <= len(process.ledger.quarantined) <= 15
    assert process.alerts.count(("circuit_opened", "unforeseen")) == 1
