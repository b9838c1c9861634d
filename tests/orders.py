"""Orders for tests, with a default for everything a test doesn't care about."""

import json
from hashlib import sha256

from function.model import Position, TopUp


def order(
    name: str = "r1",
    *,
    channel: str = "app",
    msisdn: str = "+393331234567",
    amount_minor: int = 1000,
    offset: int | None = None,
    partition: int = 0,
    topic: str = "recharge.orders",
) -> TopUp:
    """A TopUp as events.py would make it, without its reading."""
    what = [msisdn, amount_minor, "EUR", None]
    return TopUp(
        idempotency_key=f"{channel}:{name}",
        fingerprint=sha256(json.dumps(what).encode()).hexdigest(),
        channel=channel,
        recharge_id=name,
        msisdn=msisdn,
        amount_minor=amount_minor,
        currency="EUR",
        requested_at="2026-11-23T10:00:00Z",
        donor_msisdn=None,
        payload=json.dumps(data(name, channel, msisdn, amount_minor)).encode(),
        position=None if offset is None else Position(topic, partition, offset),
        event_id=f"event-{name}",
        event_source="/tests",
    )


def data(
    name: str = "r1",
    channel: str = "app",
    msisdn: str = "+393331234567",
    amount_minor: int = 1000,
) -> dict[str, object]:
    """The data of an order's event."""
    return {
        "rechargeId": name,
        "channel": channel,
        "msisdn": msisdn,
        "amountMinor": amount_minor,
        "currency": "EUR",
        "requestedAt": "2026-11-23T10:00:00Z",
    }


def headers(
    *, offset: int | None = None, partition: int = 0, topic: str = "recharge.orders"
) -> dict[str, str]:
    """The headers of a plain record as KafkaSource posts it."""
    known = {
        "ce-specversion": "1.0",
        "ce-id": f"partition:{partition}/offset:{offset}",
        "ce-source": f"/apis/v1/namespaces/shop/kafkasources/recharge-source#{topic}",
        "ce-type": "dev.knative.kafka.event",
    }
    if offset is not None:
        known["ce-knativekafkapartition"] = str(partition)
        known["ce-knativekafkaoffset"] = str(offset)
    return known
