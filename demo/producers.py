"""The apps, shops and servers that write orders into the topic.

Owns the orders of the story and the shapes of their records; each app has a real
producer of its own. Must never decide what becomes of a record: it only notes where the
broker put it, and what should become of it.
"""

import base64
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import quote

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from demo.judge import Expected, Sent

#: `binary`, `structured`: a CloudEvent in one of Kafka's two modes; `plain`: JSON.
Shape = Literal["binary", "structured", "plain"]
Config = Mapping[str, str | int | bool]

EVENT_TYPE: Final = "com.example.topup.requested.v1"
_FLUSH_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Order:
    """One top-up, as an app takes it from a subscriber."""

    recharge_id: str
    channel: str
    msisdn: str
    amount_minor: int = 1000
    currency: str = "EUR"

    @property
    def key(self) -> str:
        """The idempotency key, which names the order for ever."""
        return f"{quote(self.channel, safe='')}:{quote(self.recharge_id, safe='')}"

    def data(self) -> dict[str, object]:
        """The order's JSON document."""
        return {
            "rechargeId": self.recharge_id,
            "channel": self.channel,
            "msisdn": self.msisdn,
            "amountMinor": self.amount_minor,
            "currency": self.currency,
            "requestedAt": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }


def subscriber(number: int) -> str:
    """One of a thousand numbers that Ofcom keeps for films: nobody has them."""
    return f"+447700900{number:03d}"


def record_of(
    order: Order, shape: Shape, data: Mapping[str, object]
) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The value and the headers of a record."""
    attributes = {
        "specversion": "1.0",
        "id": order.key,
        "source": f"/{order.channel}",
        "type": EVENT_TYPE,
    }
    if shape == "structured":
        document = {**attributes, "datacontenttype": "application/json", "data": data}
        return _json(document), [("content-type", b"application/cloudevents+json")]
    if shape == "binary":
        headers = [(f"ce_{name}", value.encode()) for name, value in attributes.items()]
        return _json(data), [*headers, ("content-type", b"application/json")]
    return _json(data), []


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document).encode()


@dataclass
class Records:
    """Everything that was sent, in the order of the broker's acknowledgements."""

    _sent: list[Sent] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, sent: Sent) -> None:
        """Note one record or body."""
        with self._lock:
            self._sent.append(sent)

    def all(self) -> list[Sent]:
        """What was noted so far."""
        with self._lock:
            return list(self._sent)

    def __len__(self) -> int:
        return len(self._sent)


class App:
    """One producer with its own connection; `flush` before you rely on anything.

    Args:
        channel: the app's name, the first part of its orders' keys.
        shape: how it writes its records.
        config: how it connects.
        topic: where it writes.
        records: gets every acknowledged record.

    """

    def __init__(
        self, channel: str, shape: Shape, config: Config, topic: str, records: Records
    ) -> None:
        self.channel = channel
        self._shape = shape
        self._topic = topic
        self._records = records
        self._failures: list[KafkaError] = []
        self._producer = Producer(
            {
                **config,
                # Java's partitioner: librdkafka's own would put the same subscriber
                # into another partition, and there would be no order.
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 5,
            }
        )

    def send(self, order: Order) -> None:
        """Write an order, keyed by its subscriber."""
        self.send_data(order, order.data())

    def send_data(
        self, order: Order, data: Mapping[str, object], expected: Expected = "valid"
    ) -> None:
        """Write an order's record with other data than it should have."""
        value, headers = record_of(order, self._shape, data)
        self._produce(order.msisdn, order.key, value, headers, expected)

    def send_garbage(self, msisdn: str, value: bytes) -> None:
        """Write what no one can read."""
        self._produce(msisdn, None, value, [], "refused")

    def flush(self) -> None:
        """Wait until the broker has acknowledged everything.

        Raises:
            KafkaException: it has not.

        """
        left = self._producer.flush(_FLUSH_TIMEOUT_S)
        if self._failures:
            raise KafkaException(self._failures[0])
        if left:
            raise KafkaException(
                KafkaError(
                    KafkaError._MSG_TIMED_OUT,  # noqa: SLF001 # its public name.
                    f"{left} records are not acknowledged",
                )
            )

    def _produce(
        self,
        msisdn: str,
        key: str | None,
        value: bytes,
        headers: Sequence[tuple[str, bytes]],
        expected: Expected,
    ) -> None:
        def note(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failures.append(error)
                return
            partition, offset = message.partition(), message.offset()
            # An acknowledged message has both; librdkafka's types don't know.
            self._records.add(
                Sent(
                    self._topic,
                    partition or 0,
                    offset or 0,
                    key,
                    msisdn,
                    self._shape,
                    expected,
                )
            )

        self._producer.produce(
            self._topic,
            value=value,
            key=msisdn.encode(),
            headers=list(headers),
            on_delivery=note,
        )
        self._producer.poll(0)


def write_dead_letters(
    config: Config, topic: str, letters: Sequence[Mapping[str, object]]
) -> None:
    """Write dead letters as CloudEvents into their topic, as a KafkaSink would.

    Raises:
        KafkaException: the broker has not acknowledged them all.

    """
    failures: list[KafkaError] = []

    def note(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer({**config, "acks": "all", "enable.idempotence": True})
    for letter in letters:
        attributes = letter["attributes"]
        if not isinstance(attributes, dict):
            raise TypeError("a dead letter has attributes")
        headers: list[tuple[str, str | bytes | None]] = [
            (f"ce_{name}", str(text)) for name, text in attributes.items()
        ]
        value = base64.b64decode(str(letter["data_base64"]))
        producer.produce(topic, value=value, headers=headers, on_delivery=note)
    producer.flush(_FLUSH_TIMEOUT_S)
    if failures:
        raise KafkaException(failures[0])
