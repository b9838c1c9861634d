"""The stand-in against librdkafka's mock cluster and a real HTTP sink."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition

from demo.dead_letter_sink import DeadLetterSink
from demo.delivery import Attempt, Counters, Delivery
from demo.kafka_source import KafkaSource
from demo.mock_cluster import MockCluster, MockClusterFullError

DEADLINE_S = 20.0
NEVER_S = 3600.0
FAST = Delivery(retry=3, backoff_policy="linear", backoff_delay_s=0.01, timeout_s=5)
CE_HEADERS: list[tuple[str, bytes | None]] = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"42"),
    ("ce_source", b"/shop"),
    ("ce_type", b"t"),
]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def partition(self) -> int:
        return int(self.headers["ce-knativekafkapartition"])

    @property
    def offset(self) -> int:
        return int(self.headers["ce-knativekafkaoffset"])


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


Script = Callable[[Request], Answer]


class Sink(ThreadingHTTPServer):
    """A real HTTP server that answers what the test's script says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: Script = lambda _: Answer()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.in_flight: Counter[int] = Counter()
        self.in_flight_max: Counter[int] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent about clients that have gone: that is what is tested."""

    def offsets(self, partition: int) -> list[int]:
        with self.lock:
            return [r.offset for r in self.requests if r.partition == partition]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Sink

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        sink = self.server
        with sink.lock:
            sink.requests.append(request)
            sink.in_flight[request.partition] += 1
            now = sink.in_flight[request.partition]
            sink.in_flight_max[request.partition] = max(
                now, sink.in_flight_max[request.partition]
            )
        answer = sink.script(request)
        with sink.lock:
            sink.in_flight[request.partition] -= 1
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_POST = _handle  # noqa: N815
    do_GET = _handle  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        yield cluster


@pytest.fixture
def topic(cluster: MockCluster, request: pytest.FixtureRequest) -> str:
    name = f"{request.node.name[:60]}-{time.monotonic_ns()}".replace("[", "-")
    name = name.replace("]", "")
    cluster.create_topic(name)
    return name


@pytest.fixture
def sink() -> Iterator[Sink]:
    server = Sink()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_letter_sink(tmp_path: Path) -> Iterator[DeadLetterSink]:
    with DeadLetterSink(tmp_path / "dead-letters.jsonl") as sink:
        yield sink


MakeSource = Callable[..., KafkaSource]


@pytest.fixture
def make_source(cluster: MockCluster, topic: str, sink: Sink) -> Iterator[MakeSource]:
    """Make sources; what a test sets is what matters. All are ended afterwards."""
    made: list[KafkaSource] = []

    def make(
        *,
        delivery: Delivery = FAST,
        commit_interval_s: float = NEVER_S,
        on_attempt: Callable[[Attempt], None] | None = None,
        journal: Path | None = None,
        kind: type[KafkaSource] = KafkaSource,
    ) -> KafkaSource:
        source = kind(
            kafka_config={"bootstrap.servers": cluster.bootstrap_servers},
            topic=topic,
            group="recharge",
            sink_url=sink.url,
            delivery=delivery,
            attach="assign",
            commit_interval_s=commit_interval_s,
            poll_interval_s=0.02,
            on_attempt=on_attempt,
            journal=journal,
        )
        made.append(source)
        return source.start()

    yield make
    for source in made:
        source.kill()
        assert source.join(DEADLINE_S)


def wait_for(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition never came true"
        time.sleep(0.01)


def first_time(status: int) -> Script:
    """Answer each record's first request with a status, and the others with 200."""
    seen: set[tuple[int, int]] = set()

    def script(request: Request) -> Answer:
        where = (request.partition, request.offset)
        is_first = where not in seen
        seen.add(where)
        return Answer(status if is_first else 200)

    return script


def test_records_arrive_in_order_one_in_flight_a_partition(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    for number in range(80):
        cluster.produce(topic, str(number).encode(), partition=number % 2)

    def script(_: Request) -> Answer:
        time.sleep(0.002)
        return Answer()

    sink.script = script
    source = make_source()
    assert source.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == sink.offsets(1) == list(range(40))
    assert dict(sink.in_flight_max) == {0: 1, 1: 1}
    assert source.counters == Counters(records=80, attempts=80)
    assert sink.requests[0].headers["prefer"] == "reply"
    assert sink.requests[0].headers["kn-namespace"] == "shop"
    assert "content-type" not in sink.requests[0].headers


def test_retryable_failure_is_repeated_and_the_next_record_waits(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    for _ in range(3):
        cluster.produce(topic, b"{}", partition=0)
    sink.script = first_time(503)
    source = make_source()
    assert source.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [0, 0, 1, 1, 2, 2]
    assert [(a.offset, a.attempt, a.status) for a in source.deliveries] == [
        (0, 1, 503),
        (0, 2, 200),
        (1, 1, 503),
        (1, 2, 200),
        (2, 1, 503),
        (2, 2, 200),
    ]
    assert source.counters == Counters(records=3, attempts=6, redeliveries=3)


def test_backoff_grows_between_repetitions(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda _: Answer(500)
    source = make_source(delivery=Delivery(2, "exponential", 0.1, 5))
    assert source.wait_until_idle(DEADLINE_S)
    at = [attempt.at.timestamp() for attempt in source.deliveries]
    assert at[1] - at[0] >= 0.2
    assert at[2] - at[1] >= 0.4
    assert source.counters.lost == 1


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 413, 422, 424])
def test_non_retryable_answer_is_dead_lettered_at_once(
    status: int,
    *,
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    dead_letter_sink: DeadLetterSink,
) -> None:
    cluster.produce(topic, b"\xff\x00", key=b"k", partition=1, headers=CE_HEADERS)
    headers = {"Location": sink.url, "Kne-Reason": "because"}
    sink.script = lambda _: Answer(status, headers, b"the body")
    url = dead_letter_sink.url
    source = make_source(delivery=Delivery(3, "linear", 0.01, 5, url))
    assert source.wait_until_idle(DEADLINE_S)
    assert dead_letter_sink.letters() == [
        {
            "attributes": {
                "specversion": "1.0",
                "id": "42",
                "source": "/shop",
                "type": "t",
                "knativekafkapartition": "1",
                "knativekafkaoffset": "0",
                "knativeerrordest": sink.url,
                "knativeerrorcode": str(status),
                "knativeerrordata": base64.b64encode(b"the body").decode(),
                "reason": "because",
            },
            "data_base64": base64.b64encode(b"\xff\x00").decode(),
        }
    ]
    assert len(sink.requests) == 1
    assert source.counters == Counters(records=1, attempts=1, dead_lettered=1)


def test_exhausted_retries_are_dead_lettered_and_the_dead_letter_is_repeated_too(
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    tmp_path: Path,
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda _: Answer(409)
    with DeadLetterSink(tmp_path / "letters", statuses=[503, 429]) as letters:
        source = make_source(delivery=Delivery(2, "linear", 0.01, 5, letters.url))
        assert source.wait_until_idle(DEADLINE_S)
        assert len(letters.letters()) == 1
        assert source.stop()
    assert [(a.target, a.attempt, a.status) for a in source.deliveries] == [
        ("sink", 1, 409),
        ("sink", 2, 409),
        ("sink", 3, 409),
        ("dead_letter_sink", 1, 503),
        ("dead_letter_sink", 2, 429),
        ("dead_letter_sink", 3, 202),
    ]


@pytest.mark.parametrize("dead_letter_statuses", [None, [400]])
def test_without_a_working_dead_letter_sink_the_record_is_lost_and_committed(
    dead_letter_statuses: list[int] | None,
    *,
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda _: Answer(400)
    with DeadLetterSink(
        tmp_path / "letters", statuses=dead_letter_statuses or []
    ) as letters:
        url = letters.url if dead_letter_statuses else None
        source = make_source(delivery=Delivery(3, "linear", 0.01, 5, url))
        assert source.wait_until_idle(DEADLINE_S)
        assert source.stop()
    assert source.counters.lost == 1
    assert f"LOST {topic}[0]@0 (400)" in caplog.text
    again = make_source()
    assert again.wait_until_idle(DEADLINE_S)
    assert again.counters.records == 0


def test_crash_repeats_what_was_acknowledged_since_the_last_commit(
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    tmp_path: Path,
) -> None:
    journal = tmp_path / "journal.jsonl"
    for _ in range(3):
        cluster.produce(topic, b"{}", partition=0)
    first = make_source(journal=journal)
    assert first.wait_until_idle(DEADLINE_S)
    first.kill()
    assert first.join(DEADLINE_S)
    second = make_source(journal=journal)
    assert second.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [0, 1, 2, 0, 1, 2]
    assert second.counters == Counters(records=3, attempts=3, redeliveries=3)


def test_crash_after_a_commit_repeats_only_what_came_later(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    first = make_source()
    assert first.wait_until_idle(DEADLINE_S)
    assert first.stop()

    # The article's crash: after the answer, before the acknowledgement.
    def crash(attempt: Attempt) -> None:
        if attempt.offset == 2:
            second.kill()

    second = make_source(on_attempt=crash, commit_interval_s=0.0)
    cluster.produce(topic, b"{}", partition=0)
    assert second.wait_until_idle(DEADLINE_S)
    wait_for(lambda: committed(second) == 2)
    cluster.produce(topic, b"{}", partition=0)
    assert second.join(DEADLINE_S)
    third = make_source()
    assert third.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [0, 1, 2, 2]


def committed(source: KafkaSource) -> int:
    with source._observer_lock:
        observer = source._observer
        assert observer is not None
        partition = source._partitions()[0]
        return int(observer.committed([partition], timeout=DEADLINE_S)[0].offset)


def test_orderly_stop_finishes_what_is_in_flight_and_repeats_nothing(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    for _ in range(5):
        cluster.produce(topic, b"{}", partition=0)
    is_open = threading.Event()

    def script(_: Request) -> Answer:
        assert is_open.wait(DEADLINE_S)
        return Answer()

    sink.script = script
    first = make_source()
    wait_for(lambda: sink.requests)
    stopping = threading.Thread(target=first.stop)
    stopping.start()
    wait_for(first._ending.is_set)
    is_open.set()
    stopping.join(DEADLINE_S)
    assert sink.offsets(0) == [0]
    second = make_source()
    assert second.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [0, 1, 2, 3, 4]


def test_stop_without_enough_grace_kills(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda _: Answer(503)
    source = make_source(delivery=Delivery(9, "linear", NEVER_S, 5))
    wait_for(lambda: source.deliveries)
    assert not source.stop(grace_s=0.1)
    assert source.join(DEADLINE_S)
    assert source.counters.lost == 0


def test_timeout_repeats_while_the_first_request_still_runs(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    second_came = threading.Event()

    def script(_: Request) -> Answer:
        if len(sink.requests) == 1:
            assert second_came.wait(DEADLINE_S)
        second_came.set()
        return Answer()

    sink.script = script
    source = make_source(delivery=Delivery(3, "linear", 0.01, timeout_s=0.3))
    assert source.wait_until_idle(DEADLINE_S)
    assert [a.error for a in source.deliveries] == ["ReadTimeout", None]
    assert sink.in_flight_max[0] == 2


def test_refused_connection_is_retried(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.shutdown()
    sink.server_close()
    source = make_source()
    assert source.wait_until_idle(DEADLINE_S)
    assert [a.error for a in source.deliveries] == ["ConnectionError"] * 4
    assert source.counters.lost == 1


def test_stuck_partition_does_not_stop_others_that_were_seen(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    for partition in (0, 1):
        cluster.produce(topic, b"{}", partition=partition)
    source = make_source(delivery=Delivery(1000, "linear", 0.01, 5))
    assert source.wait_until_idle(DEADLINE_S)
    sink.script = lambda request: Answer(503 if request.partition == 0 else 200)
    for partition in (0, 0, 1, 1, 1):
        cluster.produce(topic, b"{}", partition=partition)
    wait_for(lambda: sink.offsets(1) == [0, 1, 2, 3])
    assert set(sink.offsets(0)) == {0, 1}
    assert source.lag() == 2


def test_stuck_only_seen_partition_keeps_unseen_ones_waiting(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    sink.script = lambda _: Answer(503)
    for _ in range(2):
        cluster.produce(topic, b"{}", partition=0)
    source = make_source(delivery=Delivery(1000, "linear", 0.01, 5))
    # The second record is queued behind the first: the only executor is busy.
    wait_for(lambda: source._lanes and not source._lanes[0].is_waiting)
    cluster.produce(topic, b"{}", partition=1)
    so_far = len(source.deliveries)
    wait_for(lambda: len(source.deliveries) > so_far + 20)
    assert sink.offsets(1) == []
    sink.script = lambda _: Answer()
    assert source.wait_until_idle(DEADLINE_S)
    assert sink.offsets(1) == [0]


def test_null_header_discards_the_record_and_commits_it(
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.produce(topic, b"{}", partition=0, headers=[("x", None)])
    source = make_source()
    assert source.wait_until_idle(DEADLINE_S)
    assert source.counters == Counters(records=1, discarded=1)
    assert f"DISCARDED {topic}[0]@0" in caplog.text
    cluster.produce(topic, b"{}", partition=0)
    assert source.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [1]


def test_control_character_in_a_header_blocks_for_the_budget_and_is_lost(
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    dead_letter_sink: DeadLetterSink,
) -> None:
    cluster.produce(topic, b"{}", key=b"a\nb", partition=0)
    url = dead_letter_sink.url
    source = make_source(delivery=Delivery(2, "linear", 0.01, 5, url))
    assert source.wait_until_idle(DEADLINE_S)
    assert source.counters == Counters(records=1, attempts=3, redeliveries=2, lost=1)
    assert not sink.requests
    assert not dead_letter_sink.letters()


def test_kne_header_with_a_hyphen_sticks_the_partition_until_a_restart(
    cluster: MockCluster,
    topic: str,
    sink: Sink,
    make_source: MakeSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda _: Answer(400, {"Kne-Error-Code": "1"})
    source = make_source()
    wait_for(lambda: "STUCK" in caplog.text)
    assert source.lag() == 1
    assert not source.stop(grace_s=0.1)


def test_see_other_is_followed_with_get_and_its_status_decides(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    sink.script = lambda r: (
        Answer(303, {"Location": "/there"}) if r.method == "POST" else Answer(204)
    )
    source = make_source()
    assert source.wait_until_idle(DEADLINE_S)
    assert [(r.method, r.path) for r in sink.requests] == [
        ("POST", "/"),
        ("GET", "/there"),
    ]
    assert [a.status for a in source.deliveries] == [204]


def test_traceparent_has_a_new_span_each_attempt(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    parent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    cluster.produce(topic, b"{}", partition=0, headers=[("traceparent", parent)])
    sink.script = first_time(500)
    assert make_source().wait_until_idle(DEADLINE_S)
    parts = [r.headers["traceparent"].split("-") for r in sink.requests]
    assert {p[1] for p in parts} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert len({p[2] for p in parts} | {"00f067aa0ba902b7"}) == 3


class RevokedSource(KafkaSource):
    """Revokes partition 0 when told: the mock cluster's groups aren't reliable."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.is_revoked = threading.Event()

    def _poll(self, consumer: Consumer) -> list[Message]:
        if self.is_revoked.is_set():
            self.is_revoked.clear()
            self._on_revoke(consumer, self._partitions()[:1])
        return super()._poll(consumer)


def test_revoked_partition_runs_on_and_its_late_acknowledgement_is_ignored(
    cluster: MockCluster, topic: str, sink: Sink, make_source: MakeSource
) -> None:
    for _ in range(3):
        cluster.produce(topic, b"{}", partition=0)
    # Its idle executor keeps the poll going, without which nothing is revoked.
    cluster.produce(topic, b"{}", partition=1)
    is_open = threading.Event()

    def script(request: Request) -> Answer:
        if request.offset == 1 and request.partition == 0:
            assert is_open.wait(DEADLINE_S)
        return Answer()

    sink.script = script
    source = make_source(kind=RevokedSource)
    assert isinstance(source, RevokedSource)
    wait_for(lambda: sink.offsets(0) == [0, 1] and 1 in source._lanes)
    lane = source._lanes[0]
    # The third record is queued; else it would come after the revocation.
    wait_for(lambda: not lane.is_waiting)
    source.is_revoked.set()
    wait_for(lambda: 0 not in source._lanes)
    assert committed(source) == 1
    is_open.set()
    lane.thread.join(DEADLINE_S)
    assert sink.offsets(0) == [0, 1]
    assert source.stop()
    again = make_source()
    assert again.wait_until_idle(DEADLINE_S)
    assert sink.offsets(0) == [0, 1, 1, 2]


def test_record_overtaken_by_a_revocation_within_one_poll_is_dropped(
    cluster: MockCluster, topic: str, sink: Sink
) -> None:
    cluster.produce(topic, b"{}", partition=0)
    source = KafkaSource(kafka_config={}, topic=topic, group="g", sink_url=sink.url)

    class Rebalancing(Consumer):  # type: ignore[misc, unused-ignore]
        """Revokes between the poll's two calls."""

        def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
            source._on_revoke(self, [TopicPartition(topic, 0)])
            return super().consume(num_messages, timeout=timeout)

    consumer = Rebalancing(
        {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "g"}
    )
    try:
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        assert [source._poll(consumer) for _ in range(10)] == [[]] * 10
        assert consumer.position([TopicPartition(topic, 0)])[0].offset == 1
    finally:
        consumer.close()


def test_group_member_gets_partitions_and_commits(
    cluster: MockCluster, topic: str, sink: Sink
) -> None:
    """The consumer group's path, as far as the mock cluster goes: one member."""
    for partition in range(4):
        cluster.produce(topic, b"{}", partition=partition)
    with KafkaSource(
        kafka_config={"bootstrap.servers": cluster.bootstrap_servers},
        topic=topic,
        group=f"group-{topic}",
        sink_url=sink.url,
        delivery=FAST,
    ) as source:
        assert source.wait_until_idle(DEADLINE_S)
    assert sorted(r.partition for r in sink.requests) == [0, 1, 2, 3]
    assert source.failure is None


def start_process(
    cluster: MockCluster, topic: str, sink: Sink, journal: Path
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "demo.kafka_source", "--assign", "--group", "process"),
            *("--bootstrap-servers", cluster.bootstrap_servers),
            *("--topic", topic, "--sink", sink.url, "--journal", str(journal)),
            *("--retry", "1000", "--backoff-policy", "linear"),
            *("--backoff-delay", "PT0.05S", "--timeout", "PT10S"),
            *("--extension", "topic=recharge-orders"),
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def line_count(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_process_killed_repeats_and_terminated_does_not(
    cluster: MockCluster, topic: str, sink: Sink, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    cluster.produce(topic, b"{}", partition=0)
    outputs = []
    # Killed before its first commit, which is due after 5 s; then ended in order.
    for lines, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        with start_process(cluster, topic, sink, journal) as process:
            wait_for(lambda lines=lines: line_count(journal) == lines)  # type: ignore[misc]
            os.kill(process.pid, number)
            output, _ = process.communicate(timeout=DEADLINE_S)
            outputs.append(output)
    assert sink.offsets(0) == [0, 0]
    assert json.loads(outputs[1])["redeliveries"] == 1
    assert sink.requests[0].headers["ce-topic"] == "recharge-orders"
    cluster.produce(topic, b"{}", partition=0)
    with start_process(cluster, topic, sink, journal) as process:
        wait_for(lambda: len(sink.requests) == 3)
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
    assert sink.offsets(0) == [0, 0, 1]


def test_dead_letter_sink_runs_as_a_process(tmp_path: Path) -> None:
    file, port_file = tmp_path / "letters", tmp_path / "port"
    with subprocess.Popen(
        [
            sys.executable,
            *("-m", "demo.dead_letter_sink", "--port", "0"),
            *("--file", str(file), "--port-file", str(port_file)),
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for(port_file.exists)
        url = f"http://127.0.0.1:{port_file.read_text()}/"
        with requests.Session() as session:
            answer = session.post(url, data=b"x", headers={"ce-id": "1"}, timeout=5)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    assert (answer.status_code, answer.content) == (202, b"")
    assert json.loads(file.read_text()) == {
        "attributes": {"id": "1"},
        "data_base64": "eA==",
    }


def test_mock_cluster_refuses_what_it_would_lose(
    cluster: MockCluster, topic: str
) -> None:
    with pytest.raises(MockClusterFullError):
        cluster.produce(topic, b"x" * 1_000_001)
