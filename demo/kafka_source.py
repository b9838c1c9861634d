"""A stand-in for Knative's Kafka dispatcher, for laptops and tests.

Owns what a KafkaSource does at Kafka: polls, partitions that come and go, offsets
committed behind, duplicates after a crash; what happens to a record in between is
delivery.py's. It must never run in a cluster, where Knative's own dispatcher does this,
and never be kinder than that one: what is dropped is committed, too.

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
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, cast

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
    convert_poll,
)
from demo.delivery import (
    MAX_POLL_RECORDS,
    Attempt,
    Counters,
    Delivery,
    Dispatcher,
    Job,
    Journal,
    Lane,
    duration_s,
)

_LOG = logging.getLogger("demo.kafka_source")
_KAFKA_TIMEOUT_S = 10.0


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
        self._journal = Journal(journal)
        self._dispatcher = Dispatcher(
            sink_url, self._delivery, self._journal, on_attempt
        )
        #: The topic's partitions, as they were at the start.
        self._numbers: list[int] = []
        self._lanes: dict[int, Lane] = {}
        #: Also those whose partition was revoked while a record was in flight.
        self._all_lanes: list[Lane] = []
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
                job = Job(record, discarded=result)
            else:
                headers, body = result
                job = Job(record, headers=headers, body=body)
            self._lane(record).offer(job)

    def _lane(self, record: Record) -> Lane:
        lane = self._lanes.get(record.partition)
        if lane is None:
            name = f"{record.topic}[{record.partition}]"
            lane = Lane(self._dispatcher, name, record.offset)
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

    def _commit(self, consumer: Consumer, lanes: Mapping[int, Lane]) -> None:
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
