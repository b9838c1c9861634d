"""What an outage of the recharge API leaves behind, in virtual time.

`python -m benchmarks.outage`: twelve pods, each restarted once while the API answers
500 to all, a resolver, and 24 partitions that never run dry. The production code of
processing, attempt_end, circuit_breaker and resolver runs on the ledger in memory, so
that ten hours take seconds; a delivery is repeated as the KafkaSource of the manifests
does, and goes to any pod. Owns only numbers; must never assert any.
"""

import heapq
import json
from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from benchmarks.head_of_partition import ANSWER_S, BACKOFF_S
from function.api_profile import Kind, load_profile
from function.config import Settings
from function.model import (
    Answer,
    AnswerClass,
    Finding,
    LookUp,
    Position,
    Status,
    TopUp,
)
from function.processing import Processing
from function.resolver import Resolver
from function.rules import Rules
from proof.judge import is_brought_again, read_status_table
from proof.memory_ledger import MICROS, MemoryLedger

PODS: Final = 12
PARTITIONS: Final = 24
OUTAGES_S: Final = {"10 minutes": 600.0, "1 hour": 3_600.0, "10 hours": 36_000.0}
#: Before and behind the outage, in seconds.
CALM_S: Final = 2.0
_ROUND_DOWN_S: Final = 60.0
_DOWN: Final = Answer(AnswerClass.UNKNOWN, http_status=500, reason="internal")


@dataclass
class Left:
    """What was measured."""

    #: Orders by status when the API is back, settled ones left out.
    open_orders: Counter[str]
    opened: int
    closed: int
    #: Alerts about single orders.
    of_orders: int
    #: Seconds from the API's return until each partition has an order executed.
    first_s: list[float]
    #: Seconds from the API's return until the resolver's first round that finds nothing
    #: parked or postponed any more.
    settled_s: float


class World:
    """A clock, an API that is down for a time, twelve pods and a resolver."""

    def __init__(self, outage_s: float) -> None:
        self.now = 1_000.0
        self.down_from = self.now + CALM_S
        self.back_at = self.down_from + outage_s
        self.alerts: Counter[str] = Counter()
        self._executed: dict[str, str] = {}
        self.settings = Settings.from_env(
            {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "http://api"}
        )
        self.profile = replace(load_profile(self.settings), kind=Kind.REFUSE)
        self.ledger = MemoryLedger(
            self.profile,
            lease_s=self.settings.ledger_lease_s,
            now=lambda: round(self.now * MICROS),
            rules=Rules(self.profile.settle_s, second_person_above_minor=10**9),
        )
        self.pods = [self.processing() for _ in range(PODS)]
        self.resolver = Resolver(
            self.ledger,
            self.processing(is_resolver=True),
            self,
            self.profile,
            given_up_s=self.settings.event_redelivery_max_s,
            again_s=self.settings.resolver_interval_s,
            watch_s=0,
            accepted_max_s=self.settings.recharge_api_accepted_max_s,
            alert=self.alert,
            monotonic=lambda: self.now,
        )

    def processing(self, *, is_resolver: bool = False) -> Processing:
        """A process that has just begun."""
        return Processing(
            self.ledger,
            self,
            self.profile,
            deadline_s=self.settings.recharge_api_deadline_s,
            lease_s=self.settings.ledger_lease_s,
            is_resolver=is_resolver,
            alert=self.alert,
            monotonic=lambda: self.now,
        )

    def alert(self, action: str, *_: object, **_fields: object) -> None:
        """Count it."""
        self.alerts[action] += 1

    @property
    def _is_down(self) -> bool:
        return self.down_from <= self.now < self.back_at

    def recharge(self, order: TopUp, rendered_key: str, _deadline: float) -> Answer:
        """Execute it, unless the API is down."""
        if self._is_down:
            return _DOWN
        reference = self._executed.setdefault(rendered_key, f"R-{order.recharge_id}")
        return Answer(AnswerClass.DONE, http_status=201, reference=reference)

    def look_up(self, rendered_key: str) -> LookUp:
        """Tell what was executed, unless the API is down."""
        if self._is_down:
            return LookUp(Finding.UNKNOWN, reason="http_500")
        reference = self._executed.get(rendered_key)
        return LookUp(Finding.EXECUTED if reference else Finding.ABSENT, reference)


def order(partition: int, offset: int) -> TopUp:
    """An order of a subscriber of its own."""
    number = partition * 100_000 + offset
    name, msisdn = f"o-{number}", f"+39333{number:07}"
    data = {
        "rechargeId": name,
        "channel": "app",
        "msisdn": msisdn,
        "amountMinor": 500,
        "currency": "EUR",
        "requestedAt": "2026-01-02T03:04:05Z",
    }
    return TopUp(
        idempotency_key=f"app:{name}",
        fingerprint="f",
        channel="app",
        recharge_id=name,
        msisdn=msisdn,
        amount_minor=500,
        currency="EUR",
        requested_at="2026-01-02T03:04:05Z",
        donor_msisdn=None,
        payload=json.dumps(data).encode(),
        position=Position("t", partition, offset),
        event_id=name,
        event_source="/benchmark",
    )


def measure(outage_s: float, seed: int = 1) -> Left:
    """Play an outage, with each pod restarted once in it."""
    world, random = World(outage_s), Random(seed)  # noqa: S311 # no cryptography
    statuses = read_status_table()
    due = [(world.now, number, 0, 0) for number in range(PARTITIONS)]
    heapq.heapify(due)
    restarts = [
        (world.down_from + outage_s * (pod + 1) / (PODS + 1), pod)
        for pod in range(PODS)
    ]
    round_at = world.now
    first: dict[int, float] = {}
    left: Counter[str] | None = None
    end = world.back_at + world.settings.event_redelivery_max_s
    settled_at = world.back_at
    while world.now < end and (len(first) < PARTITIONS or _waits_for_resolver(world)):
        now, lane, offset, attempt = due[0]
        if restarts and restarts[0][0] <= min(now, round_at):
            at, pod = restarts.pop(0)
            world.now = max(world.now, at)
            world.pods[pod] = world.processing()
            continue
        if round_at <= now:
            world.now = max(world.now, round_at)
            world.resolver.run_once()
            # While the API is down a round ends at its first call: fewer are played.
            is_down = world.now < world.back_at - _ROUND_DOWN_S
            wait_s = _ROUND_DOWN_S if is_down else world.settings.resolver_interval_s
            round_at = world.now + wait_s
            if world.now >= world.back_at and _waits_for_resolver(world):
                settled_at = round_at
            continue
        heapq.heappop(due)
        world.now = max(world.now, now)
        if left is None and world.now >= world.back_at:
            left = Counter(
                row.status.value
                for row in world.ledger.orders.values()
                if row.status is not Status.SUCCEEDED
            )
        pod = random.randrange(PODS)
        outcome = world.pods[pod].process(order(lane, offset)).outcome
        if is_brought_again(statuses[outcome]):
            wait_s = ANSWER_S + BACKOFF_S * (attempt + 1)
            heapq.heappush(due, (world.now + wait_s, lane, offset, attempt + 1))
            continue
        if world.now >= world.back_at:
            first.setdefault(lane, world.now - world.back_at)
        # Slower once all is well: what comes then is not the question.
        pause_s = ANSWER_S if world.now < world.back_at else 5.0
        heapq.heappush(due, (world.now + pause_s, lane, offset + 1, 0))
    alerts = world.alerts
    opened, closed = alerts.pop("circuit_opened", 0), alerts.pop("circuit_closed", 0)
    return Left(
        left or Counter(),
        opened,
        closed,
        alerts.total(),
        sorted(first.values()),
        settled_at - world.back_at,
    )


def _waits_for_resolver(world: World) -> bool:
    waiting = (Status.PARKED, Status.HELD)
    return any(row.status in waiting for row in world.ledger.orders.values())


def main() -> None:
    """Measure each outage and print a table."""
    print(
        "| outage | parked or postponed | released | breakers opened, closed |"
        " alerts of single orders | partitions go on after (median, last) |"
        " all settled after |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, outage_s in OUTAGES_S.items():
        left = measure(outage_s)
        kept = left.open_orders["parked"] + left.open_orders["held"]
        first = left.first_s
        middle = first[len(first) // 2] if first else float("nan")
        print(
            f"| {name} | {kept} | {left.open_orders['released']} "
            f"| {left.opened}, {left.closed} | {left.of_orders} "
            f"| {middle:,.0f} s, {first[-1]:,.0f} s ({len(first)} of {PARTITIONS}) "
            f"| {left.settled_s:,.0f} s |"
        )


if __name__ == "__main__":
    main()
