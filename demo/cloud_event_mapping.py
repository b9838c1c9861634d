"""How the Knative Kafka source turns a Kafka record into one HTTP request.

Owns the mapping, header by header, as Knative's Kafka dispatcher does it, odd
corners included; every function here is pure but for the random span id. It must
never do I/O, and never be kinder to a record than the real dispatcher is.

A record becomes a request on one of three ways:

    content-type: application/cloudevents+json  -> structured: decoded, sent binary
    ce_specversion, ce_id, ce_source, ce_type   -> binary: ce_x becomes ce-x
    anything else, and whatever fails above     -> raw: an event is made around it

Not imitated: Java's exponents in float keys, CloudEvents 0.3 in structured mode,
and baggage.
"""

import base64
import binascii
import json
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

KeyType = Literal["string", "int", "float", "byte-array"]

STRUCTURED_CONTENT_TYPE = "application/cloudevents+json"
RAW_EVENT_TYPE = "dev.knative.kafka.event"
ERROR_DATA_BYTES_MAX = 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REQUIRED = ("id", "source", "type")
_OPTIONAL = ("datacontenttype", "dataschema", "subject", "time")
_EXTENSION_NAME = re.compile(r"[a-z0-9]+")
_TIME = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)", re.ASCII
)
# What java.net.URI lets through, near enough to refuse what it refuses.
_URI = re.compile(r"([^\x00-\x20\x7f\"<>\\^`{|}%]|%[0-9A-Fa-f]{2})*")
_TRACEPARENT = re.compile(r"(00)-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# Vert.x refuses to write these; they would end the header or the request.
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class RecordDiscardedError(ValueError):
    """A record that the dispatcher gives up silently: committed, never delivered."""

    def __init__(self, reason: str, *, is_whole_poll: bool) -> None:
        super().__init__(reason)
        #: True: every raw record of the same poll is discarded with this one.
        self.is_whole_poll = is_whole_poll


class StuckPartitionError(ValueError):
    """An answer's Kne-* header that stops the partition until a restart."""


class _NotACloudEventError(ValueError):
    """The record is to be treated as raw."""


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    #: None is a tombstone.
    value: bytes | None = None
    #: In the record's order; a name may repeat; a value may be null.
    headers: tuple[tuple[str, bytes | None], ...] = ()
    #: Milliseconds since 1970, UTC.
    timestamp_ms: int = 0


@dataclass(frozen=True, slots=True)
class _Event:
    #: CloudEvents attributes and extensions by name, datacontenttype among them.
    attributes: dict[str, str]
    data: bytes


def _new_span_id() -> str:
    return secrets.token_hex(8)


def to_cloud_event(
    record: Record,
    *,
    namespace: str,
    source_name: str,
    ce_overrides: Mapping[str, str],
    key_type: KeyType = "string",
    new_span_id: Callable[[], str] = _new_span_id,
) -> tuple[dict[str, str], bytes]:
    """Map a record to the headers and body of the POST that the sink gets.

    Args:
        record: The record as consumed.
        namespace: The KafkaSource's namespace.
        source_name: The KafkaSource's name.
        ce_overrides: spec.ceOverrides.extensions, applied last.
        key_type: The label kafkasources.sources.knative.dev/key-type.
        new_span_id: 16 hexadecimal digits for the traceparent, where there is one.

    Raises:
        RecordDiscardedError: A header is null: the real one trips over it.

    """
    try:
        event = _cloud_event(record)
    except _NotACloudEventError:
        event = _raw_event(record, namespace, source_name, key_type)
    else:
        if _has_null_header(record):
            raise RecordDiscardedError(
                "Exception occurred, discarding the record", is_whole_poll=False
            )
    attributes = {
        **event.attributes,
        "knativekafkapartition": str(record.partition),
        "knativekafkaoffset": str(record.offset),
        **ce_overrides,
    }
    headers = {"Prefer": "reply", "Kn-Namespace": namespace}
    for name, value in attributes.items():
        header = "Content-Type" if name == "datacontenttype" else f"ce-{name}"
        headers[header] = _as_header_value(value)
    headers["Content-Length"] = str(len(event.data))
    if parent := _traceparent(record):
        headers["traceparent"] = child_traceparent(parent, new_span_id())
    return headers, event.data


def convert_poll(
    records: Iterable[Record],
    *,
    namespace: str,
    source_name: str,
    ce_overrides: Mapping[str, str],
    key_type: KeyType = "string",
) -> list[tuple[Record, tuple[dict[str, str], bytes] | RecordDiscardedError]]:
    """Map all records of one poll: a raw one with a null header spoils all raw ones.

    The real dispatcher converts raw records in a Kafka interceptor, a poll at a time;
    Kafka swallows the interceptor's exception and passes the whole poll unconverted.
    """
    results: list[tuple[Record, tuple[dict[str, str], bytes] | RecordDiscardedError]]
    results = []
    spoiler: RecordDiscardedError | None = None
    for record in records:
        try:
            request = to_cloud_event(
                record,
                namespace=namespace,
                source_name=source_name,
                ce_overrides=ce_overrides,
                key_type=key_type,
            )
        except RecordDiscardedError as error:
            spoiler = error if error.is_whole_poll else spoiler
            results.append((record, error))
        else:
            results.append((record, request))
    if spoiler is None:
        return results
    return [(r, spoiler if is_raw(r) else result) for r, result in results]


def is_raw(record: Record) -> bool:
    """Say whether the record is no CloudEvent, so that one is made around it."""
    try:
        _cloud_event(record)
    except _NotACloudEventError:
        return True
    return False


def dead_letter_headers(
    headers: Mapping[str, str],
    *,
    destination: str,
    status: int | None,
    response_headers: Mapping[str, str],
    response_body: bytes,
) -> dict[str, str]:
    """Add what the dispatcher tells the dead letter sink about the failure.

    Args:
        headers: What the sink was sent.
        destination: The sink's URL.
        status: The last answer's status; None after an error or a timeout, and then
            only the destination is added.
        response_headers: The last answer's headers; kne-x becomes the extension x.
        response_body: The last answer's body, of which 1024 bytes are kept.

    Raises:
        StuckPartitionError: A Kne-* header's name can't be an extension's.

    """
    extensions = {"knativeerrordest": destination}
    if status is not None:
        extensions["knativeerrorcode"] = str(status)
        for name, value in response_headers.items():
            if name.lower().startswith("kne-"):
                extensions[name[len("kne-") :].lower()] = value
        if response_body:
            kept = response_body[:ERROR_DATA_BYTES_MAX]
            extensions["knativeerrordata"] = base64.b64encode(kept).decode()
    for name in extensions:
        if not _EXTENSION_NAME.fullmatch(name):
            raise StuckPartitionError(f"Kne-{name} is no CloudEvents extension")
    added = {f"ce-{n}": _as_header_value(v) for n, v in extensions.items()}
    return {**headers, **added}


def child_traceparent(parent: str, span_id: str) -> str:
    """Keep a traceparent's trace and flags, under a new span id (16 hex digits)."""
    version, trace_id, _, flags = parent.split("-")
    return f"{version}-{trace_id}-{span_id}-{flags}"


def unsendable_header(headers: Mapping[str, str]) -> str | None:
    """Name the first header that an HTTP client refuses to write, if any."""
    return next((n for n, v in headers.items() if _CONTROL_CHARACTER.search(v)), None)


def _raw_event(
    record: Record, namespace: str, source_name: str, key_type: KeyType
) -> _Event:
    where = f"/apis/v1/namespaces/{namespace}/kafkasources/{source_name}"
    attributes = {
        "specversion": "1.0",
        "id": f"partition:{record.partition}/offset:{record.offset}",
        "source": f"{where}#{record.topic}",
        "type": RAW_EVENT_TYPE,
        "subject": f"partition:{record.partition}#{record.offset}",
        "time": _java_time(record.timestamp_ms),
    }
    if record.key:
        attributes["key"] = attributes["partitionkey"] = _key_text(record.key, key_type)
    for name, value in record.headers:
        if value is None:
            raise RecordDiscardedError("Invalid record received", is_whole_poll=True)
        if name.lower() == "content-type":
            attributes["datacontenttype"] = _text(value).lower()
        else:
            kept = re.sub(r"[^a-z0-9]", "", name.lower())
            attributes[f"kafkaheader{kept}"] = _text(value)
    return _Event(attributes, record.value or b"")


def _cloud_event(record: Record) -> _Event:
    # The last of repeated headers counts; these names are case-sensitive.
    last = dict(record.headers)
    content_type = last.get("content-type")
    if content_type is not None:
        media_type = _text(content_type).split(";", 1)[0]
        if media_type == STRUCTURED_CONTENT_TYPE:
            return _structured_event(record.value)
    if last.get("ce_specversion") is None:
        raise _NotACloudEventError("neither structured nor binary")
    attributes = {}
    for name, value in record.headers:
        is_attribute = name.startswith("ce_") and len(name) > len("ce_")
        if not is_attribute and name != "content-type":
            continue
        if value is None:
            raise _NotACloudEventError("null attribute")
        short = name[len("ce_") :].lower() if is_attribute else "datacontenttype"
        attributes[short] = _text(value)
    return _Event(_checked(attributes), record.value or b"")


def _structured_event(value: bytes | None) -> _Event:
    document = _json_object(value or b"")
    has_text = (*_REQUIRED, *_OPTIONAL, "specversion")
    for name in has_text:
        if name in document and not isinstance(document[name], str):
            raise _NotACloudEventError(f"{name} is not a string")
    data = _structured_data(document)
    attributes = {
        name: value if isinstance(value, str) else _compact_json(value)
        for name, value in document.items()
        if name not in {"data", "data_base64"}
    }
    return _Event(_checked(attributes), data)


def _structured_data(document: Mapping[str, object]) -> bytes:
    if "data" in document and "data_base64" in document:
        raise _NotACloudEventError("both data and data_base64")
    if "data_base64" in document:
        try:
            return base64.b64decode(str(document["data_base64"]), validate=True)
        except binascii.Error as error:
            raise _NotACloudEventError("data_base64") from error
    if "data" not in document:
        return b""
    data = document["data"]
    content_type = str(document.get("datacontenttype", "application/json"))
    if content_type.startswith(("application/json", "text/json")):
        return _compact_json(data).encode("utf-8", "replace")
    if not isinstance(data, str):
        raise _NotACloudEventError("data that is no JSON must be a string")
    return data.encode("utf-8", "replace")


def _checked(attributes: dict[str, str]) -> dict[str, str]:
    """Refuse what the CloudEvents Java SDK refuses: the record is then raw."""
    if attributes.get("specversion") not in {"1.0", "0.3"}:
        raise _NotACloudEventError("specversion")
    for name in _REQUIRED:
        if name not in attributes:
            raise _NotACloudEventError(f"{name} is missing")
    for name in ("source", "dataschema"):
        if not _URI.fullmatch(attributes.get(name, "")):
            raise _NotACloudEventError(f"{name} is no URI")
    if "time" in attributes and not _is_time(attributes["time"]):
        raise _NotACloudEventError("time")
    for name in attributes:
        if not _EXTENSION_NAME.fullmatch(name):
            raise _NotACloudEventError("extension name")
    return attributes


def _json_object(value: bytes) -> dict[str, object]:
    def refuse(constant: str) -> object:
        raise ValueError(constant)

    decoder = json.JSONDecoder(parse_constant=refuse)
    try:
        # Jackson, too, doesn't look at what follows the object.
        document, _ = decoder.raw_decode(value.decode().lstrip())
    except (ValueError, RecursionError) as error:
        raise _NotACloudEventError("malformed JSON") from error
    if not isinstance(document, dict):
        raise _NotACloudEventError("not an object")
    return document


def _key_text(key: bytes, key_type: KeyType) -> str:
    if key_type == "int" and len(key) == struct.calcsize(">i"):
        return str(struct.unpack(">i", key)[0])
    if key_type == "float" and len(key) == struct.calcsize(">f"):
        return _shortest_float32(key)
    if key_type == "float" and len(key) == struct.calcsize(">d"):
        return repr(struct.unpack(">d", key)[0])
    if key_type == "byte-array":
        return base64.b64encode(key).decode()
    return _text(key)


def _shortest_float32(key: bytes) -> str:
    number: float = struct.unpack(">f", key)[0]
    texts = (f"{number:.{digits}g}" for digits in range(1, 10))
    exact = (repr(float(t)) for t in texts if struct.pack(">f", float(t)) == key)
    return next(exact, repr(number))


def _traceparent(record: Record) -> str | None:
    value = dict(record.headers).get("traceparent") or b""
    text = _text(value)
    found = _TRACEPARENT.fullmatch(text)
    # All zeros are no trace.
    return text if found and int(found[2], 16) and int(found[3], 16) else None


def _has_null_header(record: Record) -> bool:
    return any(value is None for _, value in record.headers)


def _java_time(timestamp_ms: int) -> str:
    """ISO_OFFSET_DATE_TIME: no trailing zeros, and no fraction at all for .000."""
    at = _EPOCH + timedelta(milliseconds=timestamp_ms)
    fraction = f".{at.microsecond:06d}".rstrip("0").rstrip(".")
    return at.strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return bool(_TIME.fullmatch(text))


def _compact_json(value: object) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except RecursionError as error:
        raise _NotACloudEventError("nested too deeply") from error


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _as_header_value(text: str) -> str:
    """Write text as Netty does: one byte a UTF-16 unit, `?` for those over U+00FF.

    Blanks around a value are dropped: no receiver could see them.
    """
    return "".join(_as_byte(character) for character in text).strip(" \t")


def _as_byte(character: str) -> str:
    if ord(character) <= 0xFF:  # noqa: PLR2004 -- the last character of one byte.
        return character
    return "?" if ord(character) <= 0xFFFF else "??"  # noqa: PLR2004 -- a surrogate pair.
