"""Dead letters and quarantine through the front door again, over real sockets."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import requests
from confluent_kafka import Producer

from demo.dead_letter_sink import DeadLetterSink
from demo.kafka_broker import KafkaCluster
from demo.recharge_api import Kind, SandboxRechargeApi
from function.replay import (
    Letter,
    ReplayFailed,
    Report,
    Selection,
    from_file,
    from_quarantine,
    post,
    read_properties,
    spool_topic,
)
from tests.conftest import Database
from tests.integration.test_operations import put_in_quarantine
from tests.orders import data, headers
from tests.processes import ROOT, FunctionProcess, free_port, function_env

EVENT_TYPE = "com.example.topup.requested.v1"


class ScriptedDoor(ThreadingHTTPServer):
    """Answers what a test wrote, and keeps what came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.seen: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def say(self, status: int, outcome: str = "") -> Self:
        body = json.dumps({"outcome": outcome}).encode() if outcome else b""
        self.answers.append((status, {}, body))
        return self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedDoor

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        known = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((known, body))
        status, more, answer = (
            self.server.answers.pop(0)
            if self.server.answers
            else (200, {"ce-type": "com.example.topup.succeeded.v1"}, b"{}")
        )
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def door() -> Iterator[ScriptedDoor]:
    with ScriptedDoor() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("value", "as_header"),
    [
        ("plain", "plain"),
        ("a b", "a b"),
        ("a%20b", "a%20b"),
        ("caf\xe9 \xff\x85", "caf\xe9 \xff\x85"),
        ("\xa0x\xa0", "\xa0x\xa0"),
        ("a\tb", "a\tb"),
        ("", ""),
        ("\u4e2d %", "%E4%B8%AD%20%25"),
        ("a\nb: c", "a%0Ab:%20c"),
        (" x ", "%20x%20"),
        ("\0", "%00"),
        ("\ud800", "%3F"),
    ],
)
def test_attribute_goes_as_it_came_or_encoded_where_it_can_be_no_header(
    door: ScriptedDoor, tmp_path: Path, value: str, as_header: str
) -> None:
    path = tmp_path / "letters.jsonl"
    attributes = {"id": value, "source": "/s", "type": EVENT_TYPE}
    attributes["datacontenttype"] = value
    written = {"attributes": attributes, "data_base64": ""}
    path.write_text(f"{json.dumps(written)}\n{letter(0)}\n")
    report = Report()

    post(from_file(path), door.url, report)

    assert (report.failed, report.stopped_at) == (0, "")
    told = door.seen[-1][0]
    assert (told["ce-id"], told["content-type"]) == (as_header, as_header)


@pytest.mark.slow
def test_reused_keys_of_events_with_any_id_are_replayed_to_the_last(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """By the real command: one of them stopped it there, another one killed it."""
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = function_env(mariadb_database.env["LEDGER_DATABASE_URL"], api.url) | {
            **mariadb_database.env
        }
        with FunctionProcess(tmp_path, env=env) as function:
            for amount, event_id in enumerate(
                ["1", "a\nb", "\u4e2d", " x ", "caf\xe9"]
            ):
                event = {
                    "specversion": "1.0",
                    "id": event_id,
                    "source": f"/s/{event_id}",
                    "type": EVENT_TYPE,
                    "data": data("r1", amount_minor=1000 + amount),
                }
                answer = requests.post(
                    function.url,
                    data=json.dumps(event),
                    headers={"Content-Type": "application/cloudevents+json"},
                    timeout=30,
                )
                assert answer.status_code == (422 if amount else 200)
            command = ["replay", "--quarantine", "--to", function.url, "--yes"]
            program = "from function.cli import main; main()"
            done = subprocess.run(
                # Of this very tree, wherever `topup` is installed from.
                [sys.executable, "-c", program, *command],
                env=os.environ | env,
                cwd=ROOT,
                timeout=60,
                capture_output=True,
                text=True,
                check=False,
            )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("422 key_reused") == 4
    # What comes again as it came adds nothing.
    assert len(mariadb_database.rows("quarantine")) == 4


def letter(
    partition: int | None, offset: int = 0, *, topic: str = "t", body: bytes = b"{}"
) -> str:
    attributes: dict[str, str] = {"id": "1", "source": "/s", "type": EVENT_TYPE}
    if partition is not None:
        attributes |= {
            "knativekafkapartition": str(partition),
            "knativekafkaoffset": str(offset),
            "topic": topic,
        }
    encoded = base64.b64encode(body).decode()
    return json.dumps({"attributes": attributes, "data_base64": encoded})


def places(letters: list[Letter]) -> list[tuple[str | None, ...]]:
    names = ("ce-topic", "ce-knativekafkapartition", "ce-knativekafkaoffset")
    return [tuple(each.headers.get(name) for name in names) for each in letters]


def test_letters_of_a_file_go_in_their_original_order(tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    lines = [
        letter(None, body=b"last"),
        letter(1, 5),
        letter(0, 10),
        letter(0, 9),
        letter(0, 1, topic="a"),
        "",
        letter(None, body=b"very last"),
    ]
    path.write_text("\n".join(lines))

    letters = list(from_file(path))

    assert places(letters) == [
        ("a", "0", "1"),
        ("t", "0", "9"),
        ("t", "0", "10"),
        ("t", "1", "5"),
        (None, None, None),
        (None, None, None),
    ]
    assert [each.body for each in letters[-2:]] == [b"last", b"very last"]
    assert letters[0].origin == "line 5"


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"attributes": {}, "data_base64": "?"}', '"x"']
)
def test_file_that_is_no_file_of_letters_is_refused_before_anything_is_posted(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text(f"{letter(0)}\n{line}\n")

    letters = from_file(path)
    with pytest.raises(ReplayFailed, match="line 2 is no dead letter"):
        next(letters)
    with pytest.raises(ReplayFailed, match="No such file"):
        next(from_file(tmp_path / "none"))


def test_letter_is_posted_as_it_came_without_the_words_about_its_failure(
    door: ScriptedDoor, tmp_path: Path
) -> None:
    """As the sink that the demo runs keeps it."""
    path = tmp_path / "letters.jsonl"
    sent = headers(offset=7, partition=3) | {
        "ce-topic": "recharge.orders",
        "ce-knativeerrorcode": "400",
        "ce-knativeerrordest": "http://function",
        "ce-knativeerrordata": "…".encode().decode("latin-1"),
        "Content-Type": "application/json; charset=utf-8",
    }
    with DeadLetterSink(path) as sink:
        requests.post(sink.url, data=b'{"a": 1}', headers=sent, timeout=5)
    report = Report()

    post(from_file(path), door.url, report)

    ((seen, body),) = door.seen
    assert body == b'{"a": 1}'
    assert {name: value for name, value in seen.items() if name.startswith("ce-")} == {
        name: value
        for name, value in sent.items()
        if name.startswith("ce-") and "knativeerror" not in name
    }
    assert seen["content-type"] == "application/json; charset=utf-8"
    assert report.outcomes == {"succeeded": 1}
    assert (report.failed, report.stopped_at) == (0, "")


def test_outcomes_are_counted_by_their_names(
    door: ScriptedDoor, tmp_path: Path
) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(letter(0, offset) for offset in range(5)))
    door.say(422, "rejected").say(424, "held").say(409, "waiting").say(302)
    report = Report()

    post(from_file(path), door.url, report)

    assert report.outcomes == {
        "rejected": 1,
        "held": 1,
        "waiting": 1,
        "status 302": 1,
        "succeeded": 1,
    }
    assert len(door.seen) == 5


def test_server_error_stops_what_follows_unless_told_to_go_on(
    door: ScriptedDoor, tmp_path: Path
) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(letter(0, offset) for offset in range(3)))
    door.say(200).say(503, "in_doubt")
    report = Report()

    post(from_file(path), door.url, report)
    assert report.stopped_at == "line 2: in_doubt"
    assert len(door.seen) == 2

    door.say(503).say(503).say(503)
    report = Report()
    post(from_file(path), door.url, report, goes_on=True)
    assert (report.failed, report.stopped_at) == (3, "")
    assert len(door.seen) == 5


def test_nobody_at_the_door_stops_and_is_told() -> None:
    report = Report()
    one = Letter({}, b"{}", "line 1")

    post([one, one], f"http://127.0.0.1:{free_port()}/", report)

    assert report.stopped_at == "line 1: unreachable (ConnectionError)"
    assert report.failed == 1


def test_token_is_shown_at_the_door(door: ScriptedDoor) -> None:
    post([Letter({}, b"{}", "line 1")], door.url, Report(), token="secret")

    assert door.seen[0][0]["authorization"] == "Bearer secret"


def test_quarantine_is_replayed_by_partition_and_offset(
    database: Database,
) -> None:
    attributes = json.dumps({"ce-type": EVENT_TYPE, "content-type": "text/json"})
    for position in (("t", 1, 1), ("t", 0, 10), None, ("t", 0, 9), ("a", 5, 5)):
        put_in_quarantine(database, attributes=attributes, position=position)

    letters = list(from_quarantine(database.engine, Selection(), EVENT_TYPE, Report()))

    assert places(letters) == [
        ("a", "5", "5"),
        ("t", "0", "9"),
        ("t", "0", "10"),
        ("t", "1", "1"),
        (None, None, None),
    ]
    assert letters[0].headers["Content-Type"] == "text/json"
    assert letters[0].headers["ce-type"] == EVENT_TYPE


def test_quarantine_is_narrowed_by_any_of_its_columns(database: Database) -> None:
    put_in_quarantine(database, b"1", position=("t", 0, 1), outcome="malformed")
    put_in_quarantine(database, b"2", position=("t", 1, 1))
    put_in_quarantine(database, b"3", position=("u", 0, 2), key="app:r1")

    def chosen(**which: Any) -> list[bytes]:
        selection = Selection(**which)
        letters = from_quarantine(database.engine, selection, EVENT_TYPE, Report())
        return [each.body for each in letters]

    assert chosen(outcome="malformed") == [b"1"]
    assert chosen(key="app:r1") == [b"3"]
    assert chosen(topic="t") == [b"1", b"2"]
    assert chosen(topic="t", partition=1) == [b"2"]
    assert chosen(offset=2) == [b"3"]


def test_row_that_was_cut_or_emptied_is_skipped_and_counted(
    database: Database,
) -> None:
    put_in_quarantine(database, b"x" * 10, announced=300_000, outcome="too_large")
    put_in_quarantine(database, b"")
    report = Report()

    letters = from_quarantine(database.engine, Selection(), EVENT_TYPE, report)

    assert list(letters) == []
    assert report.skipped == 2


def test_row_of_a_reused_key_gets_the_attributes_that_were_not_kept(
    database: Database,
) -> None:
    attributes = json.dumps({"id": "e1", "source": "/s"})
    put_in_quarantine(
        database,
        outcome="key_reused",
        attributes=attributes,
        position=("t", 0, 1),
    )

    (one,) = from_quarantine(database.engine, Selection(), EVENT_TYPE, Report())

    assert one.headers == {
        "ce-id": "e1",
        "ce-source": "/s",
        "ce-specversion": "1.0",
        "ce-type": EVENT_TYPE,
        "ce-topic": "t",
        "ce-knativekafkapartition": "0",
        "ce-knativekafkaoffset": "1",
        "Content-Type": "application/json",
    }


@pytest.mark.slow
def test_replay_through_the_real_door_recharges_only_what_was_never_executed(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """Three orders, of which one was executed; all three are dead letters."""
    path = tmp_path / "letters.jsonl"
    with (
        SandboxRechargeApi(kind=Kind.REPLAY, book=tmp_path / "book.jsonl") as api,
        DeadLetterSink(path) as sink,
    ):
        env = function_env(mariadb_database.env["LEDGER_DATABASE_URL"], api.url) | {
            "RECHARGE_API_KIND": "replay",
            **mariadb_database.env,
        }
        with FunctionProcess(tmp_path, env=env) as function:
            for number in (2, 1, 3):
                sent = headers(offset=number) | {"ce-knativeerrorcode": "400"}
                requests.post(
                    sink.url, json=data(f"r{number}"), headers=sent, timeout=5
                )
            first = requests.post(
                function.url, json=data("r1"), headers=headers(offset=1), timeout=30
            )
            assert first.status_code == 200

            for _ in range(2):
                report = Report()
                post(from_file(path), function.url, report)
                assert report.outcomes == {"succeeded": 3}

    rows = mariadb_database.rows("topup")
    assert [row["idempotency_key"] for row in rows] == ["app:r1", "app:r2", "app:r3"]
    assert {(row["status"], row["attempts"]) for row in rows} == {("succeeded", 1)}
    assert [row["kafka_offset"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_reused_key_that_is_replayed_after_a_purge_is_not_executed(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """By the real commands: the first order's row must outlive the record."""
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = function_env(mariadb_database.env["LEDGER_DATABASE_URL"], api.url) | {
            **mariadb_database.env
        }
        with FunctionProcess(tmp_path, env=env) as function:
            for amount, status in ((1000, 200), (500, 422)):
                order = data("r1", amount_minor=amount)
                answer = requests.post(
                    function.url, json=order, headers=headers(), timeout=30
                )
                assert answer.status_code == status
            mariadb_database.execute(
                "UPDATE topup SET updated_at = '2001-01-01 00:00:00'"
            )
            for command in (
                ["purge", "--older-than", "100d", "--yes"],
                ["replay", "--quarantine", "--to", function.url, "--yes"],
            ):
                subprocess.run(
                    [Path(sys.executable).with_name("topup"), *command],
                    env=os.environ | env,
                    check=True,
                    timeout=60,
                )
        executed = (tmp_path / "book.jsonl").read_text().count('"executed"')

    assert executed == 1


@pytest.mark.slow
def test_dead_letter_topic_is_copied_to_its_end_and_left_as_it_was(
    kafka: KafkaCluster, tmp_path: Path
) -> None:
    kafka.create_topic("dead.letters", partitions=2)
    producer = Producer(kafka.admin_config())
    for number in range(5):
        producer.produce(
            "dead.letters",
            f"body {number}".encode(),
            partition=number % 2,
            headers=[
                ("ce_id", "é 1%".encode()),
                ("ce_type", EVENT_TYPE.encode()),
                ("ce_source", b"/s"),
                ("ce_knativekafkapartition", b"0"),
                ("ce_knativekafkaoffset", str(9 - number).encode()),
                ("ce_knativeerrorcode", b"400"),
                ("content-type", b"application/json"),
            ],
        )
    producer.flush(30)
    config = tmp_path / "kafka.properties"
    lines = [f"{name}={value}" for name, value in kafka.admin_config().items()]
    config.write_text("# made by a test\n" + "\n".join(lines))
    path = tmp_path / "spool.jsonl"

    for _ in range(2):
        assert spool_topic(read_properties(config), "dead.letters", path) == 5

    letters = list(from_file(path))
    assert [each.body for each in letters] == [
        f"body {number}".encode() for number in (4, 3, 2, 1, 0)
    ]
    assert letters[0].headers == {
        "ce-id": "%C3%A9%201%25",
        "ce-type": EVENT_TYPE,
        "ce-source": "/s",
        "ce-knativekafkapartition": "0",
        "ce-knativekafkaoffset": "5",
        "Content-Type": "application/json",
    }


@pytest.mark.slow
def test_topic_that_is_not_there_is_said_in_words(
    kafka: KafkaCluster, tmp_path: Path
) -> None:
    config = {name: str(value) for name, value in kafka.admin_config().items()}

    with pytest.raises(ReplayFailed, match=r"no\.such\.topic: UNKNOWN_TOPIC"):
        spool_topic(config, "no.such.topic", tmp_path / "spool")


def test_property_that_librdkafka_does_not_know_is_said_in_words(
    tmp_path: Path,
) -> None:
    with pytest.raises(ReplayFailed, match="--kafka-config"):
        spool_topic({"no.such": "x"}, "t", tmp_path / "spool")
    config = tmp_path / "kafka.properties"
    config.write_text("security.protocol\n")
    with pytest.raises(ReplayFailed, match="line 1 is no name=value"):
        read_properties(config)
    with pytest.raises(ReplayFailed, match="FileNotFoundError"):
        read_properties(tmp_path / "none")
