"""How long poisoned orders stand at the head of a partition, in virtual time.

`python -m benchmarks.head_of_partition`: N poisoned orders in a row of N subscribers,
in one partition or at the head of each of eight, nothing else under way, and one good
order behind them. The production code of processing, attempt_end and circuit_breaker
runs on the ledger in memory, so that hours take seconds; a delivery is repeated as the
KafkaSource of the manifests does. Owns only numbers; must never assert any.
"""

import heapq
from dataclasses import replace
from typing import Final

from function.api_profile import ApiProfile, Kind, load_profile
from function.config import Settings
from function.model import (
    Answer,
    AnswerClass,
    Finding,
    LookUp,
    Position,
    TopUp,
)
from function.processing import Processing
from function.rules import Rules
from proof.judge import is_brought_again, read_status_table
from proof.memory_ledger import MICROS, MemoryLedger

#: As manifests/base/source-kafkasource.yaml: linear, so the n-th wait is n times it.
BACKOFF_S: Final = 0.5
ANSWER_S: Final = 0.05
POISONS: Final = {
    "500": Answer(AnswerClass.UNKNOWN, http_status=500, reason="internal"),
    "429": Answer(AnswerClass.RETRY, http_status=429, reason="http_429"),
    "429, Retry-After: 30": Answer(
        AnswerClass.RETRY, http_status=429, reason="http_429", retry_after_s=30
    ),
    "similar order": Answer(
        AnswerClass.SAME_CONTENT, http_status=409, reason="similar_recently"
    ),
}
GOOD: Final = Answer(AnswerClass.DONE, http_status=201, reference="R")


class World:
    """A clock, an API that fails for the poisoned, and one process of the function."""

    def __init__(self, poison: Answer) -> None:
        self.now = 1_000.0
        self._poison = poison
        settings = Settings.from_env(
            {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "http://api"}
        )
        profile: ApiProfile = replace(load_profile(settings), kind=Kind.REFUSE)
        ledger = MemoryLedger(
            profile,
            lease_s=settings.ledger_lease_s,
            now=lambda: round(self.now * MICROS),
            rules=Rules(settle_s=profile.settle_s, second_person_above_minor=10**9),
        )
        self.processing = Processing(
            ledger,
            self,
            profile,
            deadline_s=settings.recharge_api_deadline_s,
            lease_s=settings.ledger_lease_s,
            monotonic=lambda: self.now,
        )

    def recharge(self, order: TopUp, _rendered_key: str, _deadline: float) -> Answer:
        """Answer as done, or as the poison says."""
        return GOOD if order.recharge_id.startswith("good") else self._poison

    def look_up(self, _rendered_key: str) -> LookUp:
        """Nobody knows."""
        return LookUp(Finding.UNKNOWN, reason="internal")


def order(name: str, number: int, position: Position) -> TopUp:
    """An order of a subscriber of its own."""
    return TopUp(
        idempotency_key=f"app:{name}",
        fingerprint="f",
        channel="app",
        recharge_id=name,
        msisdn=f"+39333{number:07}",
        amount_minor=500,
        currency="EUR",
        requested_at="2026-01-02T03:04:05Z",
        donor_msisdn=None,
        payload=b"",
        position=position,
        event_id=name,
        event_source="/benchmark",
    )


def partition_of(number: int, poisoned: int) -> list[TopUp]:
    """The records of one partition: the poisoned, and a good one behind them."""
    names = [f"poisoned-{number}-{each}" for each in range(poisoned)]
    names.append(f"good-{number}")
    return [
        order(name, 1_000 * number + offset, Position("t", number, offset))
        for offset, name in enumerate(names)
    ]


def seconds_until_all_is_taken(poison: Answer, poisoned: int, partitions: int) -> float:
    """How long until the good order of every partition is executed, in seconds."""
    world = World(poison)
    statuses = read_status_table()
    started = world.now
    lanes = [partition_of(number, poisoned) for number in range(partitions)]
    due = [(started, number, 0, 0) for number in range(partitions)]
    while due:
        now, lane, offset, attempt = heapq.heappop(due)
        world.now = max(world.now, now)
        outcome = world.processing.process(lanes[lane][offset]).outcome
        if is_brought_again(statuses[outcome]):
            wait_s = BACKOFF_S * (attempt + 1)
            heapq.heappush(
                due, (world.now + ANSWER_S + wait_s, lane, offset, attempt + 1)
            )
        elif offset + 1 < len(lanes[lane]):
            heapq.heappush(due, (world.now + ANSWER_S, lane, offset + 1, 0))
    return world.now - started


def main() -> None:
    """Measure each poison with each length and print a table."""
    print("| the API answers for ever | in a row | partitions | until the good order |")
    print("|---|---|---|---|")
    for name, poison in POISONS.items():
        for partitions in (1, 8):
            for poisoned in (1, 2, 10, 100):
                took_s = seconds_until_all_is_taken(poison, poisoned, partitions)
                print(f"| {name} | {poisoned} | {partitions} | {took_s:,.0f} s |")


if __name__ == "__main__":
    main()
