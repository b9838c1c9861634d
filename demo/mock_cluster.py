"""librdkafka's mock cluster in this process: Kafka for tests, without a Kafka.

Owns one mock broker that lives as long as the context manager; other processes can
connect to it. It must never take more than it can keep: beyond 5 MB a partition the
mock loses records silently, so this refuses them before. Records that are produced
without `produce` are not counted. No TLS, no SASL, no transactions, always 4
partitions a topic, and a killed group member is not reliably evicted.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

PARTITIONS = 4
RECORD_BYTES_MAX = 1_000_000
# Under the 5 MB a partition even if one partition gets it all.
TOPIC_BYTES_MAX = 4_000_000

_TIMEOUT_S = 10.0


class MockClusterFullError(ValueError):
    """The record is too large, or the topic is full."""


class MockCluster:
    """A mock cluster; make it a context manager, and give out `bootstrap_servers`."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._producer = Producer(
            {
                "bootstrap.servers": "ignored:9092",
                "test.mock.num.brokers": 1,
                # The same partitions as Java's producers choose.
                "partitioner": "murmur2_random",
                "linger.ms": 0,
                "log_level": 3,
            }
        )
        brokers = self._producer.list_topics(timeout=_TIMEOUT_S).brokers.values()
        #: host:port, for clients of this and of other processes.
        self.bootstrap_servers = ",".join(f"{b.host}:{b.port}" for b in brokers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.flush(_TIMEOUT_S)

    def create_topic(self, topic: str) -> None:
        """Make the topic, with its 4 partitions, unless it is there."""
        self._producer.list_topics(topic, timeout=_TIMEOUT_S)

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int = -1,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> tuple[int, int]:
        """Append one record and wait for its acknowledgement.

        Args:
            topic: Made if it isn't there.
            value: None is a tombstone.
            key: Chooses the partition, by murmur2.
            partition: Chooses it outright; -1 leaves it to the key.
            headers: A value may be null.

        Returns:
            The partition and offset it got.

        Raises:
            MockClusterFullError: It would be lost silently.
            confluent_kafka.KafkaException: It was not acknowledged.

        """
        size = len(value or b"") + len(key or b"")
        size += sum(len(name) + len(content or b"") for name, content in headers)
        if size > RECORD_BYTES_MAX or self._bytes[topic] + size > TOPIC_BYTES_MAX:
            raise MockClusterFullError(f"{size} bytes more for {topic}")
        reports: list[Message] = []
        failures: list[KafkaError] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is None:
                reports.append(message)
            else:
                failures.append(error)

        self._producer.produce(
            topic,
            value=value,
            key=key,
            partition=partition,
            headers=list(headers),
            on_delivery=delivered,
        )
        self._producer.flush(_TIMEOUT_S)
        if not reports:
            raise KafkaException(*failures)
        self._bytes[topic] += size
        # An acknowledged message has both; librdkafka's types don't know.
        return reports[0].partition() or 0, reports[0].offset() or 0
