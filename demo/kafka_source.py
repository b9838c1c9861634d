"""A stand-in for Knative's Kafka dispatcher, for laptops and tests.

Owns ordered delivery as a KafkaSource does it: one request in flight a partition,
retries, dead letters, offsets committed behind, duplicates after a crash. It must
never run in a cluster, where Knative's own dispatcher does this, and never be kinder
than that one: with no dead letter sink, or a failing one, it drops the record.

    poll (50 at most) -> a queue a partition -> POST until done -> commit every 5 s
                                                  |
                                                  +-> not done -> dead letter -> done

Not imitated: OIDC, TLS to the sink beyond the machine's own trust, unordered mode,
replies (a KafkaSource ignores them), the scheduler and the controller (initialOffset
latest, deletion of groups), rate limits, metrics, the sticky assignor (any eager one
stands for it), and Knative's overflow of max.poll.interval.ms.
"""

import argparse
import json
import logging
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self, cast
from urllib.parse import urljoin

import requests
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaException,
    Message,
    TopicPartition,
)

from demo.cloud_event_mapping import (
    KeyType,
    Record,
    RecordDiscardedError,
    StuckPartitionError,
    child_traceparent,
    convert_poll,
    dead_letter_headers,
    to_cloud_event,
    unsendable_header,
)

__all__ = [
    "Attempt",
    "Counters",
    "Delivery",
    "KafkaSource",
    "Record",
    "backoff_s",
    "duration_s",
    "is_retried",
    "to_cloud_event",
]

BackoffPolicy = Literal["linear", "exponential"]
Target = Literal["sink", "dead_letter_sink"]

MAX_POLL_RECORDS = 50
# librdkafka's own limit; Knative's formula goes up to 24 days.
MAX_POLL_INTERVAL_MS_MAX = 86_400_000
REDIRECTS_MAX = 16

_LOG = logging.getLogger("demo.kafka_source")
_KAFKA_TIMEOUT_S = 10.0
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


class _Journal:
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
        with self._lock:
            self._counts[name] += 1

    def attempts(self) -> tuple[Attempt, ...]:
        with self._lock:
            return tuple(self._attempts)

    def counters(self) -> Counters:
        with self._lock:
            return Counters(**self._counts)


@dataclass(frozen=True, slots=True)
class _Job:
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


class _Dispatcher:
    """One record's way: the sink, again and again, then the dead letter sink."""

    def __init__(
        self,
        sink_url: str,
        delivery: Delivery,
        journal: _Journal,
        on_attempt: Callable[[Attempt], None] | None,
    ) -> None:
        self._sink_url = sink_url
        self._delivery = delivery
        self._journal = journal
        self._on_attempt = on_attempt
        #: Set: as if the process were gone. No request is begun, no answer counts.
        self.killed = threading.Event()

    def dispatch(self, session: requests.Session, job: _Job) -> bool:
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
        self, session: requests.Session, job: _Job, answer: _Answer
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
        self, session: requests.Session, job: _Job, target: Target, url: str
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
        job: _Job,
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


def _post(session: requests.Session, url: str, job: _Job, timeout_s: float) -> _Answer:
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


class _Lane:
    """One partition's queue and its one thread: the ordered executor.

    Records are done strictly in order, so the first offset that isn't done says all.
    """

    def __init__(self, dispatcher: _Dispatcher, name: str, first_offset: int) -> None:
        self._dispatcher = dispatcher
        self._jobs: deque[_Job] = deque()
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

    def offer(self, job: _Job) -> None:
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

    def _take(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            return self._jobs.popleft() if self._jobs else None

    def _run(self) -> None:
        with _session() as session:
            while (job := self._take()) is not None:
                if self._dispatcher.dispatch(session, job):
                    self.next_offset = job.record.offset + 1


class KafkaSource:
    """Deliver a topic's records to a sink as Knative's dispatcher does.

    As a context manager it starts on entry, and on exit stops, or after an error is
    killed. One instance is used once.
    """

    def __init__(
        self,
        *,
        kafka_config: Mapping[str, str | int | bool],
        topic: str,
        group: str,
        sink_url: str,
        delivery: Delivery | None = None,
        attach: Literal["subscribe", "assign"] = "subscribe",
        namespace: str = "shop",
        name: str = "recharge-source",
        ce_overrides: Mapping[str, str] | None = None,
        key_type: KeyType = "string",
        commit_interval_s: float = 5.0,
        poll_interval_s: float = 0.2,
        journal: Path | None = None,
        on_attempt: Callable[[Attempt], None] | None = None,
    ) -> None:
        """Take the settings; nothing is connected before `start`.

        Args:
            kafka_config: bootstrap.servers, security, and whatever else librdkafka
                is to be told; it may override everything but the commit rules.
            topic: The one topic.
            group: The consumer group; offsets are committed under it.
            sink_url: Where each record is POSTed.
            delivery: Retries, timeout and dead letter sink; Knative's defaults.
            attach: "subscribe" joins the group. "assign" takes all partitions by hand
                and starts at the committed offsets: for the mock cluster, whose
                groups aren't reliable, and for one source at a time.
            namespace: The KafkaSource's namespace.
            name: The KafkaSource's name.
            ce_overrides: spec.ceOverrides.extensions.
            key_type: The label kafkasources.sources.knative.dev/key-type.
            commit_interval_s: Seconds between commits; a crash repeats what was
                acknowledged since.
            poll_interval_s: Seconds between polls that bring records.
            journal: Each attempt is appended here as a JSON line.
            on_attempt: Called after each attempt, in the partition's thread, before
                the record counts as done; it may call `kill`.

        """
        self._config = dict(kafka_config)
        self._topic = topic
        self._group = group
        self._delivery = delivery or Delivery()
        self._attach_by = attach
        self._namespace, self._name = namespace, name
        self._ce_overrides = dict(ce_overrides or {})
        self._key_type: KeyType = key_type
        self._commit_interval_s = commit_interval_s
        self._poll_interval_s = poll_interval_s
        self._journal = _Journal(journal)
        self._dispatcher = _Dispatcher(
            sink_url, self._delivery, self._journal, on_attempt
        )
        #: The topic's partitions, as they were at the start.
        self._numbers: list[int] = []
        self._lanes: dict[int, _Lane] = {}
        #: Also those whose partition was revoked while a record was in flight.
        self._all_lanes: list[_Lane] = []
        self._paused: set[int] = set()
        #: Partitions revoked since the current poll's first record.
        self._revoked: set[int] = set()
        self._ending = threading.Event()
        # Held to commit, and to be killed: nothing is committed after.
        self._commit_lock = threading.Lock()
        self._consumer: Consumer | None = None
        # Asks for offsets, and never polls: with confluent-kafka 2.16 a call from
        # another thread beside a running poll was seen to hang for ever.
        self._observer: Consumer | None = None
        self._observer_lock = threading.Lock()
        self._commit_due_s = 0.0
        self._thread = threading.Thread(
            target=self._run, name=f"kafka-source-{group}", daemon=True
        )
        #: What ended the source, unless it was stopped or killed.
        self.failure: Exception | None = None

    # -- Control -----------------------------------------------------------------

    def start(self) -> Self:
        """Connect, and begin to deliver.

        Raises:
            confluent_kafka.KafkaException: The configuration is refused, or the cluster
                doesn't answer.

        """
        defaults: dict[str, str | int | bool] = {
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            # Eager: every rebalance revokes everything, as with Knative's sticky one.
            "partition.assignment.strategy": "range",
            "session.timeout.ms": 10_000,
            "max.poll.interval.ms": self._delivery.max_poll_interval_ms,
            # Requests for offsets wait behind a fetch on the same connection.
            "fetch.wait.max.ms": 100,
        }
        rules: dict[str, str | int | bool] = {
            "group.id": self._group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
        }
        config = {**defaults, **self._config, **rules}
        self._consumer, self._observer = Consumer(config), Consumer(config)
        try:
            self._attach(self._consumer, self._observer)
        except BaseException:
            self._close(self._consumer)
            raise
        self._commit_due_s = time.monotonic() + self._commit_interval_s
        self._thread.start()
        return self

    def stop(self, grace_s: float = 30.0) -> bool:
        """End in order, as on SIGTERM: finish what is in flight, commit, leave.

        Args:
            grace_s: After so many seconds it is killed, as a pod is.

        Returns:
            Whether the grace was enough.

        """
        self._ending.set()
        deadline_s = time.monotonic() + grace_s
        if self._thread.ident is not None:
            self._thread.join(grace_s)
        if self.join(max(0.0, deadline_s - time.monotonic())):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """End as by SIGKILL: nothing is committed, no answer in flight counts.

        Returns at once; the requests in flight run on, and `join` waits for them.
        Unlike a real crash it leaves the group in order.
        """
        with self._commit_lock:
            self._dispatcher.killed.set()
            self._ending.set()
        for lane in list(self._all_lanes):
            lane.close()

    def join(self, deadline_s: float) -> bool:
        """Wait after `kill` until no thread is left; False if some is at the end."""
        end_s = time.monotonic() + deadline_s
        threads = [self._thread, *(lane.thread for lane in list(self._all_lanes))]
        started = [thread for thread in threads if thread.ident is not None]
        for thread in started:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in started)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.stop()
        else:
            self.kill()
            self.join(_KAFKA_TIMEOUT_S)

    # -- Observation -------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether it still polls and delivers."""
        return self._thread.is_alive()

    @property
    def deliveries(self) -> tuple[Attempt, ...]:
        """All attempts that have ended, in the order of their ends."""
        return self._journal.attempts()

    @property
    def counters(self) -> Counters:
        """What has happened so far."""
        return self._journal.counters()

    def lag(self) -> int:
        """Count the topic's records that aren't done yet, by the high watermarks.

        Other members' partitions count by their committed offsets. Markers of
        transactions at the end of a partition count as records.

        Raises:
            RuntimeError: The source isn't running.
            confluent_kafka.KafkaException: The cluster doesn't answer.

        """
        with self._observer_lock:
            if self._observer is None:
                raise RuntimeError("the source isn't running")
            committed = self._observer.committed(
                self._partitions(), timeout=_KAFKA_TIMEOUT_S
            )
            return sum(self._lag(self._observer, each) for each in committed)

    def wait_until_idle(self, deadline_s: float) -> bool:
        """Wait until every record is done; False after so many seconds, or if ended."""
        end_s = time.monotonic() + deadline_s
        while time.monotonic() < end_s:
            try:
                if self.lag() == 0:
                    return True
            except RuntimeError:
                return False
            time.sleep(0.02)
        return False

    # -- The poll thread -----------------------------------------------------------

    def _attach(self, consumer: Consumer, observer: Consumer) -> None:
        metadata = observer.list_topics(self._topic, timeout=_KAFKA_TIMEOUT_S)
        self._numbers = sorted(metadata.topics[self._topic].partitions)
        if self._attach_by == "subscribe":
            consumer.subscribe(
                [self._topic], on_revoke=self._on_revoke, on_lost=self._on_revoke
            )
            return
        partitions = observer.committed(self._partitions(), timeout=_KAFKA_TIMEOUT_S)
        for partition in partitions:
            if partition.offset < 0:
                partition.offset = OFFSET_BEGINNING
        consumer.assign(partitions)

    def _partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in self._numbers]

    def _lag(self, observer: Consumer, committed: TopicPartition) -> int:
        partition = TopicPartition(self._topic, committed.partition)
        watermarks = observer.get_watermark_offsets(partition, timeout=_KAFKA_TIMEOUT_S)
        if watermarks is None:
            raise RuntimeError("the cluster doesn't tell the high watermark")
        low, high = watermarks
        lane = self._lanes.get(committed.partition)
        done = lane.next_offset if lane else max(committed.offset, low)
        return max(0, high - done)

    def _run(self) -> None:
        consumer = self._consumer
        if consumer is None:
            raise RuntimeError("start() makes the consumer")
        try:
            while not self._ending.is_set():
                self._commit_if_due(consumer)
                if self._are_all_busy(consumer):
                    self._ending.wait(self._poll_interval_s)
                elif messages := self._poll(consumer):
                    self._accept(messages)
                    self._ending.wait(self._poll_interval_s)
            self._drain(consumer)
        except Exception as error:  # noqa: BLE001 -- a thread's only way to say it.
            _LOG.exception("the source has failed")
            self.failure = error
            self.kill()
        finally:
            self._close(consumer)

    def _close(self, consumer: Consumer) -> None:
        consumer.close()
        with self._observer_lock:
            if self._observer is not None:
                self._observer.close()
            self._observer = None

    def _are_all_busy(self, consumer: Consumer) -> bool:
        """Pause what is queued, resume what isn't; never-seen partitions don't count.

        So one stuck partition, if it is the only one seen, keeps all others waiting.
        """
        waiting = {n for n, lane in self._lanes.items() if lane.is_waiting}
        busy = self._lanes.keys() - waiting
        if to_pause := busy - self._paused:
            consumer.pause([TopicPartition(self._topic, n) for n in to_pause])
        if to_resume := waiting & self._paused:
            consumer.resume([TopicPartition(self._topic, n) for n in to_resume])
        self._paused = set(busy)
        return bool(self._lanes) and not waiting

    def _poll(self, consumer: Consumer) -> list[Message]:
        # Rebalances call back from in here, and from nowhere else but close().
        first = consumer.poll(self._poll_interval_s)
        if first is None:
            return []
        self._revoked.clear()
        messages = consumer.consume(MAX_POLL_RECORDS - 1, timeout=0)
        # librdkafka drops what a rebalance overtook within one call, not between two.
        if first.partition() not in self._revoked:
            messages.insert(0, first)
        for message in messages:
            error = message.error()
            if error is not None and error.fatal():
                raise KafkaException(error)
            if error is not None:
                _LOG.warning("Kafka: %s", error)
        return [message for message in messages if message.error() is None]

    def _accept(self, messages: Iterable[Message]) -> None:
        results = convert_poll(
            map(_record, messages),
            namespace=self._namespace,
            source_name=self._name,
            ce_overrides=self._ce_overrides,
            key_type=self._key_type,
        )
        for record, result in results:
            if isinstance(result, RecordDiscardedError):
                job = _Job(record, discarded=result)
            else:
                headers, body = result
                job = _Job(record, headers=headers, body=body)
            self._lane(record).offer(job)

    def _lane(self, record: Record) -> _Lane:
        lane = self._lanes.get(record.partition)
        if lane is None:
            name = f"{record.topic}[{record.partition}]"
            lane = _Lane(self._dispatcher, name, record.offset)
            self._all_lanes = [old for old in self._all_lanes if old.thread.is_alive()]
            self._all_lanes.append(lane)
            self._lanes[record.partition] = lane
            if self._dispatcher.killed.is_set():
                # kill() may have looked before this lane was there.
                lane.close()
        return lane

    def _on_revoke(self, consumer: Consumer, revoked: Sequence[TopicPartition]) -> None:
        """Drop the queues, commit what is done, and let what is in flight run on.

        Its later acknowledgement is ignored: the next owner delivers it again.
        """
        numbers = {partition.partition for partition in revoked}
        self._revoked |= numbers
        lanes = {n: lane for n, lane in self._lanes.items() if n in numbers}
        for lane in lanes.values():
            lane.close()
        self._commit(consumer, lanes)
        # librdkafka remembers a pause over a rebalance: a partition that comes back
        # would never be fetched again.
        if paused := numbers & self._paused:
            consumer.resume([TopicPartition(self._topic, each) for each in paused])
        for number in numbers:
            self._lanes.pop(number, None)
            self._paused.discard(number)

    def _drain(self, consumer: Consumer) -> None:
        for lane in self._all_lanes:
            lane.close()
        while any(lane.thread.is_alive() for lane in self._all_lanes):
            if self._dispatcher.killed.wait(0.01):
                return
            self._commit_if_due(consumer)
        self._commit(consumer, self._lanes)

    def _commit_if_due(self, consumer: Consumer) -> None:
        if time.monotonic() >= self._commit_due_s:
            self._commit(consumer, self._lanes)
            self._commit_due_s = time.monotonic() + self._commit_interval_s

    def _commit(self, consumer: Consumer, lanes: Mapping[int, _Lane]) -> None:
        """Commit first offsets not done; what fails waits for the next tick."""
        with self._commit_lock:
            if self._dispatcher.killed.is_set():
                return
            offsets = [
                TopicPartition(self._topic, number, lane.next_offset)
                for number, lane in lanes.items()
                if lane.next_offset > lane.committed_offset
            ]
            if not offsets:
                return
            try:
                answers = consumer.commit(offsets=offsets, asynchronous=False) or []
            except KafkaException as error:
                _LOG.warning("commit failed: %s", error)
                return
            for answer in answers:
                if answer.error is None:
                    lanes[answer.partition].committed_offset = answer.offset
                else:
                    _LOG.warning("commit of %s failed", answer)


def _record(message: Message) -> Record:
    # A message without an error has all of these; librdkafka's types don't know, nor
    # that its headers are always a list of bytes.
    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=message.key(),
        value=message.value(),
        headers=tuple(headers),
        timestamp_ms=message.timestamp()[1],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.kafka_source",
        description="A stand-in for Knative's Kafka source, for laptops and tests. "
        "Any of --retry, --backoff-policy, --backoff-delay, --timeout and "
        "--dead-letter-sink replaces all of Knative's defaults, as spec.delivery does.",
    )
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--sink", required=True, help="URL")
    parser.add_argument("--dead-letter-sink", help="URL; without one, losses")
    parser.add_argument("--retry", type=int, help="repetitions after the first")
    parser.add_argument("--backoff-policy", choices=("linear", "exponential"))
    parser.add_argument("--backoff-delay", help="such as PT0.2S")
    parser.add_argument("--timeout", help="of one request, such as PT10S")
    parser.add_argument("--config", type=Path, help="JSON of librdkafka properties")
    parser.add_argument("--journal", type=Path, help="JSON lines, one an attempt")
    parser.add_argument("--extension", action="append", default=[], metavar="N=VALUE")
    parser.add_argument("--namespace", default="shop")
    parser.add_argument("--name", default="recharge-source")
    parser.add_argument("--commit-interval", default="PT5S")
    parser.add_argument("--grace", default="PT30S", help="for SIGTERM")
    parser.add_argument(
        "--assign", action="store_true", help="take all partitions by hand"
    )
    return parser


def _delivery(options: argparse.Namespace) -> Delivery:
    sink = options.dead_letter_sink
    given = {
        "retry": options.retry,
        "backoffPolicy": options.backoff_policy,
        "backoffDelay": options.backoff_delay,
        "timeout": options.timeout,
        "deadLetterSink": None if sink is None else {"uri": sink},
    }
    spec = {name: value for name, value in given.items() if value is not None}
    return Delivery.from_spec(spec or None)


def main(arguments: list[str] | None = None) -> int:
    """Deliver until SIGTERM or SIGINT, then print the counters as JSON."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    config = json.loads(options.config.read_text()) if options.config else {}
    source = KafkaSource(
        kafka_config={**config, "bootstrap.servers": options.bootstrap_servers},
        topic=options.topic,
        group=options.group,
        sink_url=options.sink,
        delivery=_delivery(options),
        attach="assign" if options.assign else "subscribe",
        namespace=options.namespace,
        name=options.name,
        ce_overrides=dict(text.split("=", 1) for text in options.extension),
        commit_interval_s=duration_s(options.commit_interval),
        journal=options.journal,
    )
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    source.start()
    while source.is_running and not is_over.wait(0.1):
        pass
    is_in_time = source.stop(duration_s(options.grace))
    counters = source.counters
    print(json.dumps({name: getattr(counters, name) for name in counters.__slots__}))
    return 0 if is_in_time and source.failure is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
