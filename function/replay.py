"""Replay: what was refused once goes through the front door again, as it came.

Owns the reading of quarantine and of dead letters and their order; must never write to
the ledger, nor call the recharge API: the door and the ledger decide again, so that a
replay of what is settled is a repetition and does no harm.

Letters are posted by topic, original partition and offset, one at a time: never two of
one partition in flight.
"""

import base64
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import requests
from sqlalchemy import Engine, exists, select
from urllib3 import Retry

from function.database import connected
from function.errors import TopupError
from function.model import PLACE, TERMINAL
from function.schema import quarantine, topup

#: Knative's own words about the failure: not part of the record.
_FAILURE: Final = "knativeerror"
#: What a header may hold as it is (CloudEvents HTTP binding 3.1.3.2).
_PLAIN: Final = re.compile(r"[!#$&-~]")
#: What can stand on the wire as a header's value, one byte a character, and is read
#: there as it was written: no control character, no blank at an end.
_HEADER_VALUE: Final = re.compile(
    r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
)
_SERVER_ERROR: Final = 500
_HEADER_NAME: Final = re.compile(r"[a-z0-9-]+")


#: Of a row that keeps a record's place in its line: the place has ended.
_IS_ENDED: Final = (
    exists()
    .where(
        topup.c.idempotency_key == quarantine.c.idempotency_key,
        topup.c.idempotency_key.startswith(PLACE),
        topup.c.status.in_([status.value for status in sorted(TERMINAL)]),
    )
    .correlate(quarantine)
    .label("is_ended")
)


class ReplayFailed(TopupError):
    """The letters can't be read, or the door is not there; says what to do."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One request as it is posted."""

    headers: dict[str, str]
    body: bytes
    #: Where it comes from, for the report: a line, or a row's id.
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows of quarantine; what is not set does not narrow."""

    key: str | None = None
    outcome: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None


@dataclass(slots=True)
class Report:
    """What the door answered."""

    #: Outcome, or status without one -> how often.
    outcomes: dict[str, int] = field(default_factory=dict)
    #: Rows that are not replayed: cut, blanked, or ended by a person or a replay.
    skipped: int = 0
    #: Letters that met a 5xx or nobody.
    failed: int = 0
    #: Where it stopped, and at what; empty if it went through.
    stopped_at: str = ""


def from_quarantine(
    engine: Engine, selection: Selection, event_type: str, report: Report
) -> Iterator[Letter]:
    """The recorded bytes and attributes, in their original order.

    A row whose bytes were cut (too large) or blanked is skipped and counted; so is one
    whose place in its subscriber's line has ended: a person has abandoned it, or it was
    replayed.

    Args:
        engine: the ledger's.
        selection: which rows.
        event_type: for rows of which only the payload was kept.
        report: gets the count of skipped rows.

    Raises:
        LedgerUnavailable: read as far as was yielded.

    """
    columns = quarantine.c
    if selection.key is not None and not selection.key.isascii():
        # No key is: MariaDB would not even compare it.
        return
    wanted = {
        columns.idempotency_key: selection.key,
        columns.outcome: selection.outcome,
        columns.topic: selection.topic,
        columns.kafka_partition: selection.partition,
        columns.kafka_offset: selection.offset,
    }
    chosen = select(columns.id).where(
        *(column == value for column, value in wanted.items() if value is not None)
    )
    chosen = chosen.order_by(
        # What has no position comes last, as it came.
        columns.kafka_offset.is_(None),
        columns.topic,
        columns.kafka_partition,
        columns.kafka_offset,
        columns.id,
    )
    with connected(engine) as connection:
        numbers = list(connection.scalars(chosen))
    for number in numbers:
        with connected(engine) as connection:
            row = connection.execute(
                select(quarantine, _IS_ENDED).where(columns.id == number)
            ).first()
        is_whole = row and row.raw and row.announced_bytes <= len(row.raw)
        if row is None or not is_whole or row.is_ended:
            report.skipped += 1
            continue
        yield Letter(_headers_of_row(row, event_type), row.raw, f"quarantine {row.id}")


def from_file(path: Path) -> Iterator[Letter]:
    """The letters of a dead letter sink, in their original order.

    One JSON object a line: `attributes` (CloudEvents names without `ce-`; the content
    type as `datacontenttype`) and `data_base64`.

    Raises:
        ReplayFailed: the file or a line of it can't be read; nothing was posted.

    """
    try:
        with path.open("rb") as file:
            places: list[tuple[tuple[Any, ...], int, int]] = []
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    order = _order(_read(line, number)[0])
                    places.append((order, start, number))
                start += len(line)
            for _, start, number in sorted(places):
                file.seek(start)
                attributes, body = _read(file.readline(), number)
                yield Letter(_headers(attributes), body, f"line {number}")
    except OSError as error:
        raise ReplayFailed(f"{path}: {error.strerror}") from None


def spool_topic(
    properties: dict[str, str], topic: str, path: Path, *, timeout_s: float = 60.0
) -> int:
    """Copy what a dead letter topic holds now to a file for `from_file`.

    Commits nothing: the topic and its consumers are as before.

    Args:
        properties: librdkafka's.
        topic: where the dead letters are.
        path: overwritten; it stays as evidence.
        timeout_s: longest wait for the next record.

    Returns how many letters it wrote.

    Raises:
        ReplayFailed: confluent-kafka is not installed, or the topic can't be read to
            its present end.

    """
    try:
        kafka = importlib.import_module("confluent_kafka")
    except ImportError:
        raise ReplayFailed(
            "confluent-kafka is not installed: pip install '.[demo]', or "
            "replay the dead letter sink's file"
        ) from None
    try:
        consumer = kafka.Consumer(
            {
                "group.id": "topup-replay",
                **properties,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
            }
        )
    except (kafka.KafkaException, TypeError, ValueError) as error:
        raise ReplayFailed(f"--kafka-config: {_kafka_words(error)}") from None
    try:
        with path.open("wb") as file:
            return _spool(kafka, consumer, topic, file, timeout_s)
    except kafka.KafkaException as error:
        raise ReplayFailed(f"{topic}: {_kafka_words(error)}") from None
    except OSError as error:
        raise ReplayFailed(f"{path}: {error.strerror}") from None
    finally:
        consumer.close()


def read_properties(path: Path) -> dict[str, str]:
    """Read librdkafka's `name=value` lines; `#` begins a comment.

    Raises:
        ReplayFailed: unreadable; names the line.

    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReplayFailed(f"{path}: {type(error).__name__}") from None
    properties: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise ReplayFailed(f"{path}: line {number} is no name=value")
        properties[name.strip()] = value.strip()
    return properties


def post(
    letters: Iterable[Letter],
    url: str,
    report: Report,
    *,
    goes_on: bool = False,
    token: str | None = None,
    ca: Path | None = None,
    timeout_s: float = 90.0,
    on_answer: Callable[[Letter, int, str], None] | None = None,
) -> None:
    """Post each letter, the next one when the one before is answered.

    Stops at the first 5xx, for what follows in its partition would only be held;
    nothing is posted twice by this: the source's place is yours to say.

    Args:
        letters: in the order in which they go.
        url: the function's.
        report: gets the outcomes.
        goes_on: don't stop at a 5xx or a broken connection.
        token: a bearer token, where the door demands one.
        ca: signed the door's certificate; the public ones if None.
        timeout_s: longest wait for an answer.
        on_answer: told of each letter, its status (0: none) and outcome.

    """
    with requests.Session() as session:
        # A door is asked itself; and what was perhaps read is not posted again.
        session.trust_env = False
        session.verify = str(ca) if ca else True
        adapter = requests.adapters.HTTPAdapter(
            max_retries=Retry(
                connect=2, read=0, status=0, redirect=0, backoff_factor=0.2
            )
        )
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        if token:
            session.headers["Authorization"] = f"Bearer {token}"
        for letter in letters:
            status, outcome = _post(session, url, letter, timeout_s)
            report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
            if on_answer:
                on_answer(letter, status, outcome)
            if status == 0 or status >= _SERVER_ERROR:
                report.failed += 1
                if not goes_on:
                    report.stopped_at = f"{letter.origin}: {outcome}"
                    return


def _post(
    session: requests.Session, url: str, letter: Letter, timeout_s: float
) -> tuple[int, str]:
    try:
        response = session.post(
            url,
            data=letter.body,
            # As bytes: of text, requests would take more for blanks than HTTP does.
            headers={n: v.encode("latin-1") for n, v in letter.headers.items()},
            timeout=timeout_s,
            allow_redirects=False,
        )
    except requests.RequestException as error:
        return 0, f"unreachable ({type(error).__name__})"
    if response.ok and response.headers.get("ce-type"):
        return response.status_code, response.headers["ce-type"].split(".")[-2]
    try:
        outcome = str(response.json()["outcome"])
    except (ValueError, KeyError, TypeError):
        outcome = f"status {response.status_code}"
    return response.status_code, outcome


def _headers_of_row(row: Any, event_type: str) -> dict[str, str]:
    """The attributes as they came; what was not kept is made good from the columns."""
    known: dict[str, str] = json.loads(row.attributes)
    attributes = {
        name.removeprefix("ce-"): str(value)
        for name, value in known.items()
        if name != "content-type"
    }
    if "type" not in attributes:
        attributes |= {"specversion": "1.0", "type": event_type}
        attributes["datacontenttype"] = "application/json"
    if "content-type" in known:
        attributes["datacontenttype"] = known["content-type"]
    if row.kafka_offset is not None:
        attributes.setdefault("topic", row.topic)
        attributes["knativekafkapartition"] = str(row.kafka_partition)
        attributes["knativekafkaoffset"] = str(row.kafka_offset)
    return _headers(attributes)


def _headers(attributes: dict[str, str]) -> dict[str, str]:
    """Attributes as headers of the binary mode, without Knative's about the failure.

    What came as a header goes as it came. What can't be one, of an event in structured
    mode, is percent-encoded, as the HTTP binding (3.1.3.2) says.
    """
    headers = {
        f"ce-{name}": _header_value(value)
        for name, value in attributes.items()
        if name != "datacontenttype"
        and not name.startswith(_FAILURE)
        and _HEADER_NAME.fullmatch(name)
    }
    if "datacontenttype" in attributes:
        headers["Content-Type"] = _header_value(attributes["datacontenttype"])
    return headers


def _header_value(text: str) -> str:
    return text if _HEADER_VALUE.fullmatch(text) else _encoded(text)


def _read(line: bytes, number: int) -> tuple[dict[str, str], bytes]:
    try:
        letter = json.loads(line)
        attributes = {str(k).lower(): str(v) for k, v in letter["attributes"].items()}
        body = base64.b64decode(letter["data_base64"], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReplayFailed(
            f"line {number} is no dead letter ({type(error).__name__})"
        ) from None
    return attributes, body


def _order(attributes: dict[str, str]) -> tuple[Any, ...]:
    """By topic, partition and offset; what has none comes last, as it came."""
    partition = attributes.get("knativekafkapartition", "")
    offset = attributes.get("knativekafkaoffset", "")
    if not (partition.isdigit() and offset.isdigit()):
        return (1,)
    topic = attributes.get("topic") or attributes.get("source", "")
    return (0, topic, int(partition), int(offset))


def _spool(kafka: Any, consumer: Any, topic: str, file: Any, timeout_s: float) -> int:
    """Read every partition from its beginning until it says that it has no more."""
    metadata = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
    if metadata.error is not None:
        raise kafka.KafkaException(metadata.error)
    unread = set(metadata.partitions)
    begin = kafka.OFFSET_BEGINNING
    consumer.assign([kafka.TopicPartition(topic, each, begin) for each in unread])
    letters = 0
    while unread:
        message = consumer.poll(timeout_s)
        if message is None:
            raise ReplayFailed(f"{topic}: nothing came for {timeout_s:g} s")
        error = message.error()
        if error is None:
            file.write(_line(message))
            letters += 1
        elif error.code() == kafka.KafkaError._PARTITION_EOF:  # noqa: SLF001
            unread.discard(message.partition())
        elif error.fatal() or not error.retriable():
            raise kafka.KafkaException(error)
    return letters


def _line(message: Any) -> bytes:
    """A record as the dead letter sink would have written it."""
    attributes: dict[str, str] = {}
    for name, value in message.headers() or []:
        text = "" if value is None else value.decode("utf-8", "replace")
        if name.lower() == "content-type":
            attributes["datacontenttype"] = text
        elif name.lower().startswith("ce_"):
            attributes[name.lower()[3:]] = _encoded(text)
    letter = {
        "attributes": attributes,
        "data_base64": base64.b64encode(message.value() or b"").decode("ascii"),
    }
    return json.dumps(letter).encode() + b"\n"


def _encoded(text: str) -> str:
    """A value as a header has it: percent-encoded where the binding says so."""
    return "".join(
        each
        if _PLAIN.fullmatch(each)
        else "".join(f"%{byte:02X}" for byte in each.encode("utf-8", "replace"))
        for each in text
    )


def _kafka_words(error: Exception) -> str:
    first = error.args[0] if error.args else error
    name = getattr(first, "name", None)
    return str(name()) if callable(name) else type(error).__name__
