"""One record's way, as by Knative's dispatcher: the sink, again, the dead letter sink.

Owns the rules of delivery (which answers count, how often, how fast, how long), the
requests, one ordered queue a partition, and the journal of the attempts. It must never
talk to Kafka, and never be kinder than the dispatcher: with no dead letter sink, or a
failing one, it drops the record.

    Lane: a queue a partition -> Dispatcher: POST until done -> the next record
                                      |   |
                                Journal   +-> not done -> dead letter -> the next record
"""

import json
import logging
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urljoin

import requests

from demo.cloud_event_mapping import (
    Record,
    RecordDiscardedError,
    StuckPartitionError,
    child_traceparent,
    dead_letter_headers,
    unsendable_header,
)

BackoffPolicy = Literal["linear", "exponential"]
Target = Literal["sink", "dead_letter_sink"]

MAX_POLL_RECORDS = 50
# librdkafka's own limit; Knative's formula goes up to 24 days.
MAX_POLL_INTERVAL_MS_MAX = 86_400_000
REDIRECTS_MAX = 16

_LOG = logging.getLogger(__name__)
_RETRIED = frozenset({404, 408, 409, 429})


def is_success(status: int) -> bool:
    """Say whether the dispatcher takes this HTTP status as done."""
    return status < 300  # noqa: PLR2004 -- the dispatcher's own limit.


def is_retried(status: int) -> bool:
    """Say whether the dispatcher repeats a request that got this HTTP status."""
    return status in _RETRIED or status >= 500  # noqa: PLR2004 -- likewise.


def backoff_s(policy: BackoffPolicy, delay_s: float, attempt: int) -> float:
    """Seconds to wait before repetition number `attempt`, counted from 1."""
    return delay_s * attempt if policy == "linear" else delay_s * 2**attempt


def duration_s(text: str) -> float:
    """Read an ISO 8601 duration of hours, minutes and seconds, such as PT0.2S.

    Raises:
        ValueError: It is none of these.

    """
    found = re.fullmatch(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?", text)
    if not found or text == "PT":
        raise ValueError(f"not a duration of hours, minutes and seconds: {text!r}")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds


@dataclass(frozen=True, slots=True)
class Delivery:
    """How often, how fast and how long; the defaults are no `spec.delivery` at all."""

    #: Repetitions after the first request.
    retry: int = 10
    backoff_policy: BackoffPolicy = "exponential"
    #: Seconds; under a millisecond there is no repetition, as in Vert.x.
    backoff_delay_s: float = 0.3
    #: Seconds without a byte of the answer, after which a request has failed.
    timeout_s: float = 600.0
    #: None: what can't be delivered is lost.
    dead_letter_url: str | None = None

    @classmethod
    def from_spec(cls, spec: Mapping[str, object] | None) -> Self:
        """Merge a KafkaSource's spec.delivery with the defaults, as Knative does.

        Any stanza replaces all defaults: without `retry` nothing is repeated.

        Raises:
            ValueError: A duration, a number or the backoffPolicy is wrong.
            KeyError: The deadLetterSink has no uri: a ref needs a cluster.

        """
        if spec is None:
            return cls()
        if not spec.keys() & {"deadLetterSink", "retry", "timeout"}:
            return cls(retry=0)
        policy = spec.get("backoffPolicy", "exponential")
        if policy not in {"linear", "exponential"}:
            raise ValueError(f"backoffPolicy {policy!r}")
        sink = spec.get("deadLetterSink")
        return cls(
            retry=int(str(spec.get("retry", 0))),
            backoff_policy="linear" if policy == "linear" else "exponential",
            backoff_delay_s=duration_s(str(spec.get("backoffDelay", "PT0.2S"))),
            timeout_s=duration_s(str(spec.get("timeout", "PT600S"))),
            dead_letter_url=str(sink["uri"]) if isinstance(sink, Mapping) else None,
        )

    @property
    def retry_effective(self) -> int:
        """The repetitions that really happen."""
        return self.retry if self.backoff_delay_s >= 0.001 else 0  # noqa: PLR2004

    @property
    def max_poll_interval_ms(self) -> int:
        """What the dispatcher sets, so that a slow sink doesn't cost the membership."""
        total_s = self.timeout_s * (self.retry + 1) + self.retry
        for attempt in range(1, self.retry + 1):
            total_s += backoff_s(self.backoff_policy, self.backoff_delay_s, attempt)
            if total_s * 1000 > MAX_POLL_INTERVAL_MS_MAX:
                break
        interval_ms = int(2 * MAX_POLL_RECORDS * total_s * 1000)
        # Not under session.timeout.ms, which librdkafka would refuse.
        return max(10_000, min(interval_ms, MAX_POLL_INTERVAL_MS_MAX))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request that has ended: with a status, or with an error."""

    topic: str
    partition: int
    offset: int
    #: From 1, within one chain; a redelivered record starts again.
    attempt: int
    target: Target
    status: int | None
    #: The class of the exception, where there is no status.
    error: str | None
    #: When the request began, UTC.
    at: datetime
    #: How long it took.
    seconds: float

    def as_json(self) -> str:
        """One line of the journal."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**fields, "at": self.at.isoformat()})


@dataclass(frozen=True, slots=True)
class Counters:
    """What has happened since the start; redeliveries also over an older journal."""

    #: Taken up for delivery, once more each time they come again.
    records: int = 0
    #: Requests to the sink that have ended.
    attempts: int = 0
    #: Those of them that weren't the first for their record.
    redeliveries: int = 0
    dead_lettered: int = 0
    #: Neither delivered nor dead-lettered, and committed all the same.
    lost: int = 0
    #: Never sent anywhere, and committed.
    discarded: int = 0


class Journal:
    """The attempts and counters, in memory and, if given, in a file of JSON lines."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []
        self._requests: Counter[tuple[str, int, int]] = Counter()
        self._counts: Counter[str] = Counter()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry["target"] == "sink":
                where = (entry["topic"], entry["partition"], entry["offset"])
                self._requests[where] += 1

    def add(self, attempt: Attempt) -> None:
        """Write down an attempt that has ended."""
        with self._lock:
            self._attempts.append(attempt)
            if attempt.target == "sink":
                where = (attempt.topic, attempt.partition, attempt.offset)
                self._counts["attempts"] += 1
                self._counts["redeliveries"] += where in self._requests
                self._requests[where] += 1
            if self._path is not None:
                self._append(self._path, attempt.as_json() + "\n")

    @staticmethod
    def _append(path: Path, line: str) -> None:
        # Opened each time: a killed source leaves nothing open, and whole lines.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def count(self, name: str) -> None:
        """Count what is no attempt, by its name in `Counters`."""
        with self._lock:
            self._counts[name] += 1

    def attempts(self) -> tuple[Attempt, ...]:
        """All attempts, in the order of their ends."""
        with self._lock:
            return tuple(self._attempts)

    def counters(self) -> Counters:
        """What has happened so far."""
        with self._lock:
            return Counters(**self._counts)


@dataclass(frozen=True, slots=True)
class Job:
    """A record as it is sent."""

    record: Record
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: Set: nothing is sent.
    discarded: RecordDiscardedError | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int | None = None
    error: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_success(self) -> bool:
        return self.status is not None and is_success(self.status)

    @property
    def is_retried(self) -> bool:
        return self.status is None or is_retried(self.status)


class Dispatcher:
    """One record's way: the sink, again and again, then the dead letter sink."""

    def __init__(
        self,
        sink_url: str,
        delivery: Delivery,
        journal: Journal,
        on_attempt: Callable[[Attempt], None] | None,
    ) -> None:
        self._sink_url = sink_url
        self._delivery = delivery
        self._journal = journal
        self._on_attempt = on_attempt
        #: Set: as if the process were gone. No request is begun, no answer counts.
        self.killed = threading.Event()

    def dispatch(self, session: requests.Session, job: Job) -> bool:
        """Bring one record to its end, whichever; False if killed before it."""
        self._journal.count("records")
        if job.discarded is not None:
            self._journal.count("discarded")
            _LOG.error("DISCARDED %s (%s)", _where(job.record), job.discarded)
            return True
        answer = self._chain(session, job, "sink", self._sink_url)
        if answer is None or answer.is_success:
            return answer is not None
        return self._dead_letter(session, job, answer)

    def _dead_letter(
        self, session: requests.Session, job: Job, answer: _Answer
    ) -> bool:
        try:
            headers = dead_letter_headers(
                job.headers,
                destination=self._sink_url,
                status=answer.status,
                response_headers=answer.headers,
                response_body=answer.body,
            )
        except StuckPartitionError as error:
            _LOG.error("STUCK until a restart: %s (%s)", _where(job.record), error)
            self.killed.wait()
            return False
        url = self._delivery.dead_letter_url
        if url is not None:
            letter = replace(job, headers=headers)
            kept = self._chain(session, letter, "dead_letter_sink", url)
            if kept is None:
                return False
            if kept.is_success:
                self._journal.count("dead_lettered")
                return True
        self._journal.count("lost")
        why = answer.error or answer.status
        _LOG.error("LOST %s (%s), committed all the same", _where(job.record), why)
        return True

    def _chain(
        self, session: requests.Session, job: Job, target: Target, url: str
    ) -> _Answer | None:
        """Send until it is done, refused or given up; None if killed on the way."""
        attempt = 1
        while not self.killed.is_set():
            answer = self._send(session, job, target, url, attempt)
            if answer is None or answer.is_success or not answer.is_retried:
                return answer
            if attempt > self._delivery.retry_effective:
                return answer
            policy, delay_s = (
                self._delivery.backoff_policy,
                self._delivery.backoff_delay_s,
            )
            self.killed.wait(backoff_s(policy, delay_s, attempt))
            attempt += 1
        return None

    def _send(
        self,
        session: requests.Session,
        job: Job,
        target: Target,
        url: str,
        number: int,
    ) -> _Answer | None:
        at, began_s = datetime.now(UTC), time.monotonic()
        answer = _post(session, url, job, self._delivery.timeout_s)
        if self.killed.is_set():
            return None
        attempt = Attempt(
            topic=job.record.topic,
            partition=job.record.partition,
            offset=job.record.offset,
            attempt=number,
            target=target,
            status=answer.status,
            error=answer.error,
            at=at,
            seconds=time.monotonic() - began_s,
        )
        self._journal.add(attempt)
        if self._on_attempt is not None:
            self._on_attempt(attempt)
        # Killed by the callback: the answer came, and nobody lived to count it.
        return None if self.killed.is_set() else answer


def _where(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"


def _post(session: requests.Session, url: str, job: Job, timeout_s: float) -> _Answer:
    headers = dict(job.headers)
    if "traceparent" in headers:
        # Each request is a span of its own.
        span_id = os.urandom(8).hex()
        headers["traceparent"] = child_traceparent(headers["traceparent"], span_id)
    if name := unsendable_header(headers):
        return _Answer(error=f"HeaderEncodingError: {name}")
    timeout = (timeout_s, timeout_s)
    try:
        response = session.post(
            url, data=job.body, headers=headers, timeout=timeout, allow_redirects=False
        )
        location = response.headers.get("Location")
        if response.status_code == 303 and location:  # noqa: PLR2004 -- See Other.
            del headers["Content-Length"]
            url = urljoin(url, location)
            response = session.get(url, headers=headers, timeout=timeout)
    except (requests.RequestException, ValueError) as error:
        return _Answer(error=type(error).__name__)
    return _Answer(
        status=response.status_code, headers=response.headers, body=response.content
    )


def _session() -> requests.Session:
    session = requests.Session()
    # Neither proxies nor netrc of this machine: the dispatcher knows none.
    session.trust_env = False
    session.headers.clear()
    session.headers["User-Agent"] = "kafka-source-stand-in"
    session.max_redirects = REDIRECTS_MAX
    return session


class Lane:
    """One partition's queue and its one thread: the ordered executor.

    Records are done strictly in order, so the first offset that isn't done says all.
    """

    def __init__(self, dispatcher: Dispatcher, name: str, first_offset: int) -> None:
        self._dispatcher = dispatcher
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        #: The first offset that isn't done.
        self.next_offset = first_offset
        #: What the group's offset is known to be, at least.
        self.committed_offset = first_offset
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def is_waiting(self) -> bool:
        """Nothing is queued, though a record may be in flight."""
        with self._changed:
            return not self._jobs

    def offer(self, job: Job) -> None:
        """Queue a record, unless the lane is closed."""
        with self._changed:
            if not self._is_closed:
                self._jobs.append(job)
                self._changed.notify()

    def close(self) -> None:
        """Forget the queue; the record in flight runs on to its end."""
        with self._changed:
            self._is_closed = True
            self._jobs.clear()
            self._changed.notify()

    def _take(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            return self._jobs.popleft() if self._jobs else None

    def _run(self) -> None:
        with _session() as session:
            while (job := self._take()) is not None:
                if self._dispatcher.dispatch(session, job):
                    self.next_offset = job.record.offset + 1
