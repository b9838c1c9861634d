"""CloudEvent -> TopUp, and the reply: the only file that knows CloudEvents.

Owns what is accepted as an order and how a refusal is worded; must never quote a
value of the payload, nor do I/O beyond reading its own schema.

Sources: CloudEvents 1.0.2 HTTP binding sections 3.1 and 3.2; Knative KafkaSource's
mapping of records that are CloudEvents and of records that are not.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import jsonschema_rs
import phonenumbers
from cloudevents.conversion import to_binary
from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent, from_http
from iso4217 import Currency

from function.errors import InvalidEvent, MalformedEvent, UnknownEventType
from function.json_bound import has_too_many_values
from function.model import Outcome, Position, Receipt, TopUp

#: What KafkaSource calls a record that is no CloudEvent.
RAW_EVENT_TYPE: Final = "dev.knative.kafka.event"
#: JSON nested deeper is refused: nobody's order needs it.
JSON_DEPTH_MAX: Final = 32
_KEY_CHARACTERS_MAX: Final = 200
_ATTRIBUTE_CHARACTERS_MAX: Final = 1024
_ATTRIBUTES_MAX: Final = 100
#: What a delivery needs to be the same delivery again.
_REPLAYED: Final = frozenset(
    {
        "ce-specversion",
        "ce-id",
        "ce-source",
        "ce-type",
        "ce-topic",
        "ce-key",
        "ce-partitionkey",
        "ce-knativekafkapartition",
        "ce-knativekafkaoffset",
        "content-type",
    }
)
_PARTITION_MAX: Final = 2**31 - 1
_OFFSET_MAX: Final = 2**63 - 1
#: ITU-T E.164: at most 15 digits.
_E164: Final = re.compile(r"\+[1-9][0-9]{1,14}")
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
#: An escape that may be half of a pair; most orders have none.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_STRUCTURED: Final = "application/cloudevents+json"

SCHEMA_FILE: Final = Path(__file__).parent / "schemas" / "topup-requested.v1.json"
_VALIDATOR: Final = jsonschema_rs.Draft202012Validator(
    json.loads(SCHEMA_FILE.read_text("utf-8")), validate_formats=True
)
_CURRENCIES: Final = frozenset(currency.code for currency in Currency)


def read_topup(headers: Mapping[str, str], body: bytes, event_type: str) -> TopUp:
    """Read one delivery, in binary or structured mode.

    Args:
        headers: the request's.
        body: the request's, whole.
        event_type: the CloudEvents type of an order; KafkaSource's type of plain
            records is an order, too.

    Raises:
        UnknownEventType: not an order that this version knows: `Patience` says how
            long it is delivered again.
        MalformedEvent: not a CloudEvent with JSON data: quarantine, 400.
        InvalidEvent: the data breaks a rule: quarantine, 400. As for the one
            before, the message is safe to log and to answer.

    """
    headers = {name.lower(): value for name, value in headers.items()}
    content_type, charset = _content_type(headers)
    if content_type.startswith("application/cloudevents"):
        document = _structured(body, content_type, charset)
        event = _structured_event(headers, document)
        _require_known(event, event_type)
        payload = _structured_data(document)
    else:
        event, payload = _event(headers, body), body
        _require_known(event, event_type)
        _require_json(content_type, charset)
    data = _strict_json(payload)
    _validate(data)
    return _topup(data, payload, event, position_of(headers, event))


def restore_topup(payload: bytes, position: Position | None) -> TopUp:
    """Read an order from the ledger, which holds only what `read_topup` took.

    Raises:
        EventError: the payload was blanked or changed behind the ledger's back.

    """
    data = _strict_json(payload)
    _validate(data)
    origin = CloudEvent({"id": "ledger", "source": "/ledger", "type": "ledger"})
    return _topup(data, payload, origin, position)


def position_of(
    headers: Mapping[str, str], event: CloudEvent | None = None
) -> Position | None:
    """Where in Kafka the record stands, as far as the delivery says so.

    KafkaSource adds partition and offset to every event; the topic comes from the
    source's `ceOverrides`, or, for plain records, from the CloudEvents source.
    """
    known = {name.lower(): value for name, value in headers.items()}

    def attribute(name: str) -> str:
        value = known.get(f"ce-{name}")
        if value is None and event is not None:
            value = event.get(name)
        return "" if value is None else str(value)

    topic = attribute("topic")
    if not topic and attribute("type") == RAW_EVENT_TYPE:
        topic = attribute("source").rpartition("#")[2]
    partition = _number(attribute("knativekafkapartition"), _PARTITION_MAX)
    offset = _number(attribute("knativekafkaoffset"), _OFFSET_MAX)
    if not _TOPIC.fullmatch(topic) or partition is None or offset is None:
        return None
    return Position(topic, partition, offset)


def subscriber_of_record(headers: Mapping[str, str]) -> str | None:
    """The subscriber as the record's key names it, or None if the key names nobody.

    All that is known of an event that can't be read; an order's own number decides.
    """
    known = {name.lower(): value for name, value in headers.items()}
    key = known.get("ce-key") or known.get("ce-partitionkey") or ""
    return key if _E164.fullmatch(key) else None


def attributes_of(headers: Mapping[str, str]) -> dict[str, str]:
    """The CloudEvents attributes and the content type, as quarantine keeps them.

    Of many, what a replay needs is kept, and then the first ones.
    """
    kept = [
        (name.lower()[:_ATTRIBUTE_CHARACTERS_MAX], value[:_ATTRIBUTE_CHARACTERS_MAX])
        for name, value in headers.items()
        if name.lower().startswith("ce-") or name.lower() == "content-type"
    ]
    kept.sort(key=lambda attribute: attribute[0] not in _REPLAYED)
    return dict(kept[:_ATTRIBUTES_MAX])


def reply_to(
    order: TopUp, receipt: Receipt, event_type: str
) -> tuple[dict[str, str], bytes]:
    """The completion event of a top-up as headers and body of a 200.

    A Broker hands it to its Triggers; a KafkaSource drops it.
    """
    accepted = receipt.outcome is Outcome.ACCEPTED
    word = "accepted" if accepted else "succeeded"
    attributes = {
        "id": f"{order.idempotency_key}:{word}",
        "source": "/topup-function",
        "type": event_type.replace(".requested.", f".{word}."),
        "datacontenttype": "application/json",
    }
    data = {
        "rechargeId": order.recharge_id,
        "channel": order.channel,
        "amountMinor": order.amount_minor,
        "currency": order.currency,
        "reference": receipt.reference,
    }
    headers, body = to_binary(CloudEvent(attributes, data))
    return headers, body


def _structured(body: bytes, content_type: str, charset: str) -> dict[str, Any]:
    if content_type != _STRUCTURED:
        raise MalformedEvent("Content-Type: only application/cloudevents+json is read")
    if charset not in {"", "utf-8"}:
        raise MalformedEvent("Content-Type: charset must be utf-8")
    document = _strict_json(body)
    if not isinstance(document, dict):
        raise MalformedEvent("body: must be one CloudEvent")
    return document


def _structured_event(headers: dict[str, str], document: dict[str, Any]) -> CloudEvent:
    """The attributes; also of a record that claims to be an event and is none.

    Knative couldn't read it and gave it `ce-*` headers of its own; the body decides.
    """
    # Without the data, of which the SDK would complain before we know the type.
    attributes = {n: v for n, v in document.items() if n not in {"data", "data_base64"}}
    return _event(headers, json.dumps(attributes).encode("ascii"))


def _structured_data(document: dict[str, Any]) -> bytes:
    content_type = str(document.get("datacontenttype") or "")
    _require_json(*_content_type({"content-type": content_type}))
    if "data" in document and "data_base64" in document:
        raise MalformedEvent("data, data_base64: only one of them may be there")
    if "data_base64" in document:
        try:
            return base64.b64decode(document["data_base64"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise MalformedEvent("data_base64: is not base64") from None
    if "data" not in document:
        raise MalformedEvent("data: is missing")
    return json.dumps(document["data"], ensure_ascii=False).encode()


def _event(headers: dict[str, str], body: bytes) -> CloudEvent:
    """The attributes, checked by the SDK; the data is parsed by us, strictly."""
    try:
        event = from_http(headers, body, data_unmarshaller=_as_it_is)
    # What the SDK was seen to raise for input that its own errors don't cover.
    except (
        GenericException,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):
        raise MalformedEvent(
            "attributes: specversion, id, source and type are required"
        ) from None
    for name in ("id", "source", "type"):
        value = event.get(name)
        if not isinstance(value, str) or not value:
            raise MalformedEvent(f"{name}: must be a text of at least one character")
    if event.get("specversion") != "1.0":
        raise MalformedEvent("specversion: must be 1.0")
    return event


def _as_it_is(data: Any) -> Any:
    return data


def _require_known(event: CloudEvent, event_type: str) -> None:
    if event["type"] not in {event_type, RAW_EVENT_TYPE}:
        raise UnknownEventType("type: is not known to this version", event["type"])


def _content_type(headers: Mapping[str, str]) -> tuple[str, str]:
    """Media type and charset, in lower case; both empty when there is no header."""
    media, *parameters = headers.get("content-type", "").lower().split(";")
    charset = ""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset":
            charset = value.strip().strip('"')
    return media.strip(), charset


def _require_json(content_type: str, charset: str) -> None:
    # KafkaSource sends no Content-Type when the record has none.
    is_json = content_type in {"", "application/json", "text/json"}
    if not is_json and not content_type.endswith("+json"):
        raise MalformedEvent("Content-Type: must be JSON")
    if charset not in {"", "utf-8"}:
        raise MalformedEvent("Content-Type: charset must be utf-8")


def _strict_json(body: bytes) -> Any:
    """Parse JSON in which nothing has two meanings.

    A name that comes twice, NaN, a number that is cut, half a character or nesting
    without end would be read otherwise by the next program.
    """
    if not body.strip():
        raise MalformedEvent("body: is empty")
    if has_too_many_values(body):
        raise MalformedEvent("body: has too many values")
    try:
        data = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_names,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError:
        raise MalformedEvent("body: is not UTF-8") from None
    except RecursionError:
        raise MalformedEvent("body: is nested too deeply") from None
    except ValueError:
        raise MalformedEvent("body: is not JSON") from None
    _require_shallow(data)
    if _SURROGATE.search(body):
        _require_text(data)
    return data


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise MalformedEvent("body: a name comes twice in one object")
    return data


def _no_constant(_name: str) -> Any:
    raise MalformedEvent("body: NaN and Infinity are not JSON")


def _require_shallow(data: Any) -> None:
    level = [data]
    for _ in range(JSON_DEPTH_MAX):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise MalformedEvent("body: is nested too deeply")


def _require_text(data: Any) -> None:
    """Half of a pair is no text: it can't be hashed, stored or sent."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedEvent("body: holds a lone surrogate") from None


def _validate(data: Any) -> None:
    """Hold the data against the published schema and the rules beyond it."""
    error = next(_VALIDATOR.iter_errors(data), None)
    if error is not None:
        raise InvalidEvent(_rule_broken(error))
    # JSON Schema takes 5.0 for an integer; money is written in one way only.
    if type(data["amountMinor"]) is not int:
        raise InvalidEvent("amountMinor: must be written as an integer")
    if data["currency"] not in _CURRENCIES:
        raise InvalidEvent("currency: is not an ISO 4217 code")
    _require_number("msisdn", data["msisdn"])
    if data.get("donorMsisdn") is not None:
        _require_number("donorMsisdn", data["donorMsisdn"])


def _rule_broken(error: jsonschema_rs.ValidationError) -> str:
    """The place and the rule; the library's own message would quote the value."""
    place = ".".join(str(part) for part in error.instance_path) or "data"
    rule = str(error.schema_path[-1]) if error.schema_path else "schema"
    if rule == "required":
        missing = getattr(error.kind, "property", None) or error.kind.as_dict().get(
            "property"
        )
        return f"{missing}: is required"
    return f"{place}: breaks the rule `{rule}`"


def _require_number(name: str, number: str) -> None:
    """Possible, not "valid": new ranges are unknown to an older library."""
    try:
        parsed = phonenumbers.parse(number, None)
    except phonenumbers.NumberParseException:
        raise InvalidEvent(f"{name}: is not an E.164 number") from None
    if not phonenumbers.is_possible_number(parsed):
        raise InvalidEvent(f"{name}: is not a possible number")
    canonical = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
    if canonical != number:
        raise InvalidEvent(f"{name}: is not in its canonical form")


def _topup(
    data: dict[str, Any], payload: bytes, event: CloudEvent, position: Position | None
) -> TopUp:
    donor = data.get("donorMsisdn")
    what = [data["msisdn"], data["amountMinor"], data["currency"], donor]
    return TopUp(
        idempotency_key=_idempotency_key(data["channel"], data["rechargeId"]),
        fingerprint=sha256(json.dumps(what).encode("ascii")).hexdigest(),
        channel=data["channel"],
        recharge_id=data["rechargeId"],
        msisdn=data["msisdn"],
        amount_minor=data["amountMinor"],
        currency=data["currency"],
        requested_at=data["requestedAt"],
        donor_msisdn=donor,
        payload=payload,
        position=position,
        event_id=event["id"],
        event_source=event["source"],
        record_key=_record_key(event),
    )


def _record_key(event: CloudEvent) -> str | None:
    """The record's key: KafkaSource shows that of plain records as `key`.

    Of a record that is a CloudEvent it shows none; there the producer may have set
    `partitionkey` (CloudEvents partitioning extension).
    """
    for name in ("key", "partitionkey"):
        value = event.get(name)
        if value is not None:
            return str(value)
    return None


def _idempotency_key(channel: str, recharge_id: str) -> str:
    """Both parts percent-encoded: ASCII in the ledger, in the header and the logs."""
    key = f"{quote(channel, safe='')}:{quote(recharge_id, safe='')}"
    if len(key) > _KEY_CHARACTERS_MAX:
        raise InvalidEvent(
            "channel, rechargeId: are longer than 200 characters when encoded"
        )
    return key


def _number(text: str, greatest: int) -> int | None:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(greatest)):
        return None
    return int(text) if int(text) <= greatest else None
