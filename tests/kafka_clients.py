"""Kafka clients that tell how a real broker answers: let in, refused, and why.

Owns waiting for that answer, with a deadline; must never take one refusal for another.
"""

import time
from typing import Any, Self

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from demo import kafka_broker
from demo.kafka_broker import Config

#: For a machine with much else to do; what works takes a moment.
DEADLINE_S = 60.0


def refusals(config: Config) -> dict[int, str]:
    """Code -> words of the errors that a client meets that is never let in."""
    met: dict[int, str] = {}

    def note(error: KafkaError) -> None:
        met.setdefault(error.code(), error.str())

    # The type of a configuration does not know its callbacks.
    noted: dict[str, Any] = {"log_level": 0, "error_cb": note}
    client = AdminClient({**config, **noted})
    deadline = time.monotonic() + DEADLINE_S
    while KafkaError._ALL_BROKERS_DOWN not in met:
        assert time.monotonic() < deadline, f"no refusal, only {met}"
        try:
            client.list_topics(timeout=0.2)
        except KafkaException:
            client.poll(0)
        else:
            pytest.fail("the client was let in")
    return met


def is_let_in(config: Config) -> bool:
    return bool(AdminClient(config).list_topics(timeout=DEADLINE_S).brokers)


def produce(config: Config, topic: str, *values: str) -> int | None:
    """Write one record for each value; the code of the error that refused, or None."""
    codes: list[int | None] = []

    def note(error: KafkaError | None, _: Message) -> None:
        codes.append(error.code() if error else None)

    defaults: Config = {"enable.idempotence": True, "partitioner": "murmur2_random"}
    producer = Producer(defaults | config, logger=kafka_broker._logger)
    for value in values:
        producer.produce(topic, value, key=value, on_delivery=note)
    try:
        assert producer.flush(DEADLINE_S) == 0
    except SystemError as error:
        # The client calls back while it raises a fatal error: here it is.
        fatal = error.__cause__
        assert isinstance(fatal, KafkaException)
        return int(fatal.args[0].code())
    assert len(codes) == len(values)
    assert len(set(codes)) == 1
    return codes[0]


class Reader:
    """A consumer of a group, or of all partitions without one; never commits itself."""

    def __init__(self, config: Config, group: str) -> None:
        self.consumer = Consumer(
            config
            | {
                "group.id": group,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            },
            logger=kafka_broker._logger,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.close()

    def read(self, count: int) -> set[str]:
        """So many values; KafkaException where the broker refuses."""
        values: set[str] = set()
        deadline = time.monotonic() + DEADLINE_S
        while len(values) < count:
            assert time.monotonic() < deadline, f"only {len(values)} of {count}"
            message = self.consumer.poll(0.2)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            values.add((message.value() or b"").decode())
        return values

    def refusal(self) -> int:
        with pytest.raises(KafkaException) as refused:
            self.read(1)
        return int(refused.value.args[0].code())
