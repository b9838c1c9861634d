"""What stands at the head of a partition holds the others up for its bound, no longer.

Apache Kafka, the source's stand-in as it is when it was just started (it has seen one
partition, and asks for no other's records while that one is busy), the deployed
function, a resolver, and nothing else under way: whatever is executed, it is executed
although the head never heals.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
from confluent_kafka import Producer

from demo.dead_letter_sink import DeadLetterSink
from demo.delivery import Delivery
from demo.faults import Fault, Script
from demo.kafka_broker import KafkaCluster
from demo.kafka_source import KafkaSource
from demo.recharge_api import Kind, SandboxRechargeApi
from function.operations import Operations
from tests.conftest import Database
from tests.e2e.test_resolver import env_of, executed, resolver, statuses, wait_until
from tests.orders import data
from tests.processes import FunctionProcess

PARTITIONS = 8
#: Behind the head in its own partition, and in each of the others.
BEHIND = 10
ELSEWHERE = 3
#: The source never gives up; what is not done comes again after so many seconds.
PATIENT = Delivery(
    retry=1_000_000, backoff_policy="linear", backoff_delay_s=0.05, timeout_s=8
)
#: Far above each bound of these tests, far below what is without one.
TIMEOUT_S = 60.0
Header = tuple[str, str | bytes | None]


@dataclass
class Rig:
    """The topic, the function before a sandbox API, and what is written."""

    kafka: KafkaCluster
    topic: str
    api: SandboxRechargeApi
    function: FunctionProcess
    database: Database
    directory: Path
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def produce(
        self,
        partition: int,
        prefix: str,
        channel: str = "app",
        headers: list[Header] | None = None,
    ) -> str:
        """Write an order of a subscriber who has no other; returns its key."""
        number = next(self._numbers)
        name, msisdn = f"{prefix}{number}", f"+39333{number:07}"
        producer = Producer(self.kafka.admin_config())
        producer.produce(
            self.topic,
            json.dumps(data(name, channel, msisdn)).encode(),
            msisdn.encode(),
            partition,
            headers=dict(headers or ()),
        )
        assert producer.flush(20) == 0
        return f"{channel}:{name}"

    def source(self, dead_letter_sink: str) -> KafkaSource:
        """A source of a group that has read nothing yet."""
        kafka = cast("dict[str, str]", self.kafka.admin_config())
        return KafkaSource(
            kafka_config=kafka,
            topic=self.topic,
            group=self.topic,
            sink_url=self.function.url,
            delivery=replace(PATIENT, dead_letter_url=dead_letter_sink),
            ce_overrides={"topic": self.topic},
        )

    def poison(self, key: str, fault: Fault, **more: object) -> None:
        """Have each call for an order fail, for ever."""
        self.api.add_faults(Script(fault, key=key, times=None, **more))  # type: ignore[arg-type]


@pytest.fixture
def rig(
    kafka: KafkaCluster, sqlite_database: Database, tmp_path: Path
) -> Iterator[Rig]:
    topic = f"heads-{secrets.token_hex(4)}"
    kafka.create_topic(topic, PARTITIONS)
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = env_of(sqlite_database, api) | {"EVENT_UNKNOWN_TYPE_WAIT_S": "2"}
        with (
            FunctionProcess(tmp_path, env=env) as function,
            resolver(tmp_path, env),
        ):
            yield Rig(kafka, topic, api, function, sqlite_database, tmp_path)


def play(
    rig: Rig, heads: list[str], interrupt: Callable[[], None] = lambda: None
) -> None:
    """Start a cold source on one partition, then fill the others."""
    good = [rig.produce(0, "behind") for _ in range(BEHIND)]
    with (
        DeadLetterSink(rig.directory / "dead-letters.jsonl") as dead_letters,
        rig.source(dead_letters.url) as source,
    ):
        wait_until(lambda: bool(rig.api.book.calls()) or bool(source.deliveries), 30)
        interrupt()
        for partition in range(1, PARTITIONS):
            good += [rig.produce(partition, "other") for _ in range(ELSEWHERE)]
        wait_until(lambda: set(good) <= set(executed(rig.api.book)), TIMEOUT_S)
    assert not set(heads) & set(executed(rig.api.book))
    assert len(executed(rig.api.book)) == len(good)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "fault", "more"),
    [
        (2, Fault.ERROR_BEFORE, {}),
        # From the third on each waits for a pause of the breaker.
        (5, Fault.ERROR_BEFORE, {}),
        (2, Fault.RATE_LIMITED, {}),
        (2, Fault.REJECT, {"status": 409, "code": "similar_recently"}),
    ],
    ids=["500 twice", "500 five times", "429", "similar"],
)
def test_poisoned_orders_stop_neither_their_partition_nor_the_others(
    rig: Rig, number: int, fault: Fault, more: dict[str, object]
) -> None:
    heads = [rig.produce(0, "poisoned") for _ in range(number)]
    for key in heads:
        rig.poison(key, fault, **more)

    play(rig, heads)

    assert {statuses(rig.database)[key] for key in heads} <= {"parked", "held"}
    # What heals is executed, by the resolver alone.
    rig.api.clear_faults()
    wait_until(lambda: set(heads) <= set(executed(rig.api.book)), TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_events_of_an_unknown_type_stop_nobody_for_longer_than_their_time(
    rig: Rig,
) -> None:
    newer: list[Header] = [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"1"),
        ("ce_source", b"/app"),
        ("ce_type", b"com.example.topup.requested.v2"),
        ("content-type", b"application/json"),
    ]
    heads = [rig.produce(0, "newer", headers=newer) for _ in range(3)]

    play(rig, heads)

    outcomes = [row["outcome"] for row in rig.database.rows("quarantine")]
    assert outcomes == ["unknown_type"] * 3


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_paused_channel_stops_nobody_else(rig: Rig) -> None:
    operations = Operations(rig.database.engine)
    operations.pause("web", "their maintenance")
    heads = [rig.produce(0, "paused", channel="web") for _ in range(10)]

    play(rig, heads)

    assert {statuses(rig.database)[key] for key in heads} == {"held"}
    operations.resume("web", "done")
    wait_until(lambda: set(heads) <= set(executed(rig.api.book)), TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_function_that_is_killed_stops_its_partition_for_the_rest_of_a_lease(
    rig: Rig,
) -> None:
    """The call of the head hangs, and its process dies by SIGKILL."""
    head = rig.produce(0, "hangs")
    rig.api.add_faults(Script(Fault.HANG, key=head, times=1, delay_s=30.0))
    rig.poison(head, Fault.ERROR_BEFORE)

    def kill() -> None:
        wait_until(lambda: bool(rig.api.book.calls()), 30)
        rig.function.kill()
        rig.function.start()

    play(rig, [head], kill)
