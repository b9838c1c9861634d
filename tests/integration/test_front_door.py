"""The function as a process under each of its servers: what the source is answered.

Every status is a decision about a record: the ledger and the sandbox's book are asked
whether it was the right one. The bare `functions-framework` command is for laptops:
what only gunicorn with function/gunicorn.conf.py can do is tested on it alone.
"""

import http.client
import itertools
import json
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, cast

import pytest
from cloudevents.http import from_http

from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate
from proof.pod_limits import liveness_timeout_s, memory_limit_kib
from tests.processes import (
    DEADLINE_S,
    ROOT,
    FunctionProcess,
    Server,
    StartFailed,
    function_env,
    kill_group,
    living,
)

SERVERS: Final[tuple[Server, ...]] = ("functions-framework", "gunicorn")
KIB: Final = 1024
BYTES_MAX: Final = 256 * KIB
KEPT_BYTES: Final = 16 * KIB
#: Stands in every payload, and in no answer and no log line.
MARK: Final = "Zq7731xW"
#: Every number of these tests begins so.
PREFIX: Final = "+41790"
_numbers: Final = itertools.count(1)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def reference(self) -> str:
        return str(from_http(self.headers, self.body).data["reference"])

    @property
    def outcome(self) -> str:
        return str(json.loads(self.body)["outcome"])


@dataclass
class System:
    """The function, the sandbox beside it, and the ledger's file."""

    server: Server
    function: FunctionProcess
    api: SandboxRechargeApi
    database: Path

    def post(self, body: object, path: str = "/", **headers: str) -> Reply:
        """Deliver as KafkaSource does; a header `ce_x` is `ce-x`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.function.port)
        with closing(connection):
            connection.timeout = DEADLINE_S
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", path, data, ce_headers() | given)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return checked(Reply(answer.status, fields, answer.read()))

    def rows(self, table: str, **where: object) -> list[dict[str, Any]]:
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        query = f"SELECT * FROM {table} WHERE {condition}"  # noqa: S608 # our own words
        with closing(sqlite3.connect(self.database, timeout=DEADLINE_S)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, [*where.values()])]

    def execute(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.database, timeout=DEADLINE_S)) as connection:
            connection.execute(statement, values)
            connection.commit()

    def status_of(self, order: dict[str, Any]) -> str | None:
        found = self.rows("topup", idempotency_key=key_of(order))
        return str(found[0]["status"]) if found else None

    def executions(self, order: dict[str, Any]) -> int:
        return len(self.api.book.executions_by_key().get(key_of(order), []))

    def calls(self, order: dict[str, Any]) -> int:
        return sum(call.key == key_of(order) for call in self.api.book.calls())

    def fault(self, order: dict[str, Any], fault: Fault, **more: Any) -> None:
        self.api.add_faults(Script(fault, key=key_of(order), **more))

    def quarantine(self) -> list[dict[str, Any]]:
        return self.rows("quarantine")

    def wait_for(self, is_so: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < end, f"waited in vain:\n{self.function.log()}"
            time.sleep(0.02)


def ce_headers() -> dict[str, str]:
    offset = next(_numbers)
    return {
        "ce-specversion": "1.0",
        "ce-id": f"partition:0/offset:{offset}",
        "ce-source": "/apis/v1/namespaces/shop/kafkasources/s#topup-orders",
        "ce-type": "dev.knative.kafka.event",
        "ce-knativekafkapartition": "0",
        "ce-knativekafkaoffset": str(offset),
        "prefer": "reply",
    }


def new_order(**changes: object) -> dict[str, Any]:
    number = next(_numbers)
    order: dict[str, Any] = {
        "rechargeId": f"r-{number}",
        "channel": "app",
        "msisdn": f"{PREFIX}{number:06}",
        "amountMinor": 500,
        "currency": "CHF",
        "requestedAt": "2026-01-02T03:04:05Z",
        "note": MARK,
    }
    return order | changes


def key_of(order: dict[str, Any]) -> str:
    return f"{order['channel']}:{order['rechargeId']}"


def checked(reply: Reply) -> Reply:
    """What is true of every answer, whatever it says."""
    text = reply.body.decode()
    assert MARK not in text
    assert PREFIX not in text
    assert "Traceback" not in text
    assert not [name for name in reply.headers if name.startswith("kne-")]
    if 200 <= reply.status < 300 and reply.body:
        # A Broker takes any other body for a failure.
        event = from_http(reply.headers, reply.body)
        assert event["specversion"] == "1.0"
        assert event["type"].startswith("com.example.topup.")
        assert event["id"]
        assert event["source"]
    return reply


@contextmanager
def running(directory: Path, server: Server, **settings: object) -> Iterator[System]:
    """A system of its own; its log must name nobody."""
    database = directory / "ledger.db"
    url = f"sqlite:///{database}"
    kind = str(settings.pop("recharge_api_kind", "lookup"))
    source = str(settings.pop("source", "function/main.py"))
    migrate_ledger(url)
    api = SandboxRechargeApi(kind=Kind(kind), book=directory / "book.jsonl")
    with api:
        env = function_env(url, api.url, recharge_api_kind=kind, **settings)
        function = FunctionProcess(directory, env=env, server=server, source=source)
        with function:
            yield System(server, function, api, database)
        api.clear_faults()
    log = function.log()
    assert MARK not in log
    assert not re.search(re.escape(PREFIX) + r"\d{6}", log), "a whole number is logged"
    assert "Traceback" not in log, log


def migrate_ledger(url: str) -> None:
    env = {"LEDGER_DATABASE_URL": url, "RECHARGE_API_URL": "http://api"}
    engine = make_engine(Settings.from_env(env))
    migrate(engine)
    engine.dispose()


@pytest.fixture(scope="module", params=SERVERS)
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("front-door")
    with running(directory, cast("Server", request.param)) as made:
        yield made


@pytest.fixture(scope="module")
def gunicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("gunicorn"), "gunicorn") as made:
        yield made


# ---- raw sockets --------------------------------------------------------------------


def head(*lines: str, path: str = "/", method: str = "POST") -> bytes:
    given = [f"{name}: {value}" for name, value in ce_headers().items()]
    request = [f"{method} {path} HTTP/1.1", "Host: f", *given, *lines, "", ""]
    return "\r\n".join(request).encode("latin-1")


def whole(order: dict[str, Any], *lines: str, path: str = "/") -> bytes:
    body = json.dumps(order).encode()
    return head(f"Content-Length: {len(body)}", *lines, path=path) + body


def chunked(body: bytes, size: int = 8192) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [f"{len(each):x}\r\n".encode() + each + b"\r\n" for each in pieces]
    return b"".join(chunks) + b"0\r\n\r\n"


class Wire:
    """A connection on which a test writes what no library would."""

    def __init__(self, system: System) -> None:
        address = ("127.0.0.1", system.function.port)
        self.socket = socket.create_connection(address, timeout=DEADLINE_S)
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        # It may be answered before it was read.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def reply(self) -> Reply | None:
        """The next answer; None when the connection was closed without one."""
        while b"\r\n\r\n" not in self._read:
            if not self._more():
                return None
        first, _, self._read = self._read.partition(b"\r\n\r\n")
        status, *lines = first.decode("latin-1").split("\r\n")
        pairs = [line.split(":", 1) for line in lines]
        fields = {name.strip().lower(): value.strip() for name, value in pairs}
        if status.split()[1] == "100":
            return self.reply()
        length = int(fields.get("content-length", 0))
        while len(self._read) < length and self._more():
            pass
        body, self._read = self._read[:length], self._read[length:]
        return checked(Reply(int(status.split()[1]), fields, body))

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        self._read += data
        return bool(data)


def send_raw(system: System, data: bytes) -> Reply | None:
    with Wire(system) as wire:
        wire.send(data)
        return wire.reply()


# ---- the contract, row by row -------------------------------------------------------


def test_recharge_that_succeeds_is_answered_with_its_completion(
    system: System,
) -> None:
    order = new_order()

    reply = system.post(order)

    assert reply.status == 200
    event = from_http(reply.headers, reply.body)
    assert event["type"] == "com.example.topup.succeeded.v1"
    assert event.data["reference"]
    assert system.status_of(order) == "succeeded"
    assert system.executions(order) == 1
    (row,) = system.rows("topup", idempotency_key=key_of(order))
    assert row["topic"] == "topup-orders"


def test_repetition_is_answered_with_the_first_reference(system: System) -> None:
    order = new_order()

    replies = [system.post(order) for _ in range(3)]

    assert {reply.status for reply in replies} == {200}
    assert len({reply.reference for reply in replies}) == 1
    assert system.calls(order) == 1


def test_recharge_that_the_api_has_accepted_is_answered_with_200(
    system: System,
) -> None:
    order = new_order()
    system.fault(order, Fault.ACCEPT, delay_s=60)

    replies = [system.post(order) for _ in range(2)]

    for reply in replies:
        assert reply.status == 200
        event = from_http(reply.headers, reply.body)
        assert event["type"] == "com.example.topup.accepted.v1"
    assert system.status_of(order) == "accepted"
    assert system.calls(order) == 1


def test_definite_no_is_answered_with_422_and_stays(system: System) -> None:
    order = new_order()
    system.fault(order, Fault.REJECT, code="blocked")

    replies = [system.post(order) for _ in range(2)]

    assert {reply.status for reply in replies} == {422}
    assert {reply.outcome for reply in replies} == {"rejected"}
    assert json.loads(replies[0].body)["reason"] == "blocked"
    assert system.status_of(order) == "rejected"
    assert system.calls(order) == 1


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b"", "malformed"),
        (f'{{"{MARK}'.encode(), "malformed"),
        (b'{"a":1,"a":1}', "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"\xff\xfe\0", "malformed"),
        (b"1" * 5001, "malformed"),
        (b"{}", "invalid"),
        (json.dumps(new_order(amountMinor=5.0)).encode(), "invalid"),
        (json.dumps(new_order(amountMinor=True)).encode(), "invalid"),
        (json.dumps(new_order(msisdn=MARK)).encode(), "invalid"),
        (json.dumps(new_order(**{"\ud800": 1})).encode(), "malformed"),
    ],
    ids=range(11),
)
def test_poison_is_recorded_as_it_came_and_answered_with_400(
    system: System, body: bytes, outcome: str
) -> None:
    where = {"ce_knativekafkaoffset": str(next(_numbers))}

    replies = [system.post(body, **where) for _ in range(2)]

    assert [(reply.status, reply.outcome) for reply in replies] == [(400, outcome)] * 2
    offset = int(where["ce_knativekafkaoffset"])
    (row,) = system.rows("quarantine", kafka_offset=offset)
    assert row["raw"] == body
    assert row["outcome"] == outcome
    assert json.loads(row["attributes"])["ce-knativekafkaoffset"] == str(offset)


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/json; charset=utf-16"},
        {"content_type": "application/cloudevents+json"},
        {"content_type": "application/cloudevents-batch+json"},
        {"content_type": "multipart/form-data; boundary=x"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"ce_specversion": "2.0"},
        {"ce_id": ""},
        {"ce_type": ""},
        {"content_encoding": "gzip", "content_type": "application/x-gzip"},
    ],
    ids=range(10),
)
def test_delivery_that_is_no_event_is_recorded_and_answered_with_400(
    system: System, headers: dict[str, str]
) -> None:
    """The framework's own answers would be 415, a redirect, or 500 for ever."""
    order = new_order()

    reply = system.post(order, **headers)

    assert reply.status == 400
    (row,) = system.rows("quarantine", raw=json.dumps(order).encode())
    assert row["outcome"] == "malformed"
    assert system.calls(order) == 0


def test_plain_post_without_any_attribute_is_recorded_once(system: System) -> None:
    body = json.dumps(new_order()).encode()
    request = f"POST / HTTP/1.1\r\nHost: f\r\nContent-Length: {len(body)}\r\n\r\n"

    replies = [send_raw(system, request.encode() + body) for _ in range(2)]

    assert [reply and reply.status for reply in replies] == [400, 400]
    assert len(system.rows("quarantine", raw=body)) == 1


def test_reused_key_is_recorded_and_answered_with_422(system: System) -> None:
    order = new_order()
    system.post(order)
    other = order | {"amountMinor": 9999}

    replies = [system.post(other, ce_knativekafkaoffset="77") for _ in range(2)]

    assert [(r.status, r.outcome) for r in replies] == [(422, "key_reused")] * 2
    assert len(system.rows("quarantine", idempotency_key=key_of(order))) == 1
    assert system.executions(order) == 1
    # The order itself is as it was.
    assert system.post(order).status == 200


@pytest.mark.parametrize("event_type", ["com.example.topup.requested.v2", "other"])
def test_unknown_type_is_answered_with_503_and_not_recorded(
    system: System, event_type: str
) -> None:
    order, before = new_order(), system.quarantine()

    reply = system.post(order, ce_type=event_type)

    assert (reply.status, reply.outcome) == (503, "unknown_type")
    assert system.status_of(order) is None
    assert system.quarantine() == before


def test_same_key_in_flight_is_answered_with_409(system: System) -> None:
    order = new_order()
    system.fault(order, Fault.EXECUTE_THEN_LATE, delay_s=0.7)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(system.post, order)
        system.wait_for(lambda: system.calls(order))
        second = system.post(order)

    assert (second.status, second.outcome) == (409, "in_flight")
    assert first.result().status == 200
    assert system.calls(order) == 1


def test_other_order_of_a_subscriber_in_flight_is_held_and_runs_after_it(
    system: System,
) -> None:
    first = new_order()
    second = new_order(msisdn=first["msisdn"])
    system.fault(first, Fault.EXECUTE_THEN_LATE, delay_s=0.7)

    with ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(system.post, first)
        system.wait_for(lambda: system.calls(first))
        early = system.post(second)
        assert system.status_of(second) == "held"
        assert running_one.result().status == 200

    assert (early.status, early.outcome) == (409, "waiting")
    assert system.calls(second) == 0
    assert system.post(second).status == 200
    executed = [
        e.key for e in system.api.book.executions() if e.msisdn == first["msisdn"]
    ]
    assert executed == [key_of(first), key_of(second)]


def test_provably_nothing_executed_is_answered_with_503_and_runs_again(
    system: System,
) -> None:
    order = new_order()
    system.fault(order, Fault.RATE_LIMITED)

    reply = system.post(order)

    assert (reply.status, reply.outcome) == (503, "released")
    assert system.status_of(order) == "released"
    # Not before the second that the API has named.
    system.wait_for(lambda: system.post(order).status == 200)
    assert system.executions(order) == 1


def test_refused_connection_is_answered_with_503_and_runs_again(
    system: System,
) -> None:
    order = new_order()
    system.api.outage(60)
    try:
        reply = system.post(order)
    finally:
        system.api.outage(0)

    assert (reply.status, reply.outcome) == (503, "released")
    system.wait_for(lambda: system.post(order).status == 200)
    assert system.calls(order) == 1


@pytest.mark.parametrize(
    "fault",
    [Fault.EXECUTE_THEN_DROP, Fault.ERROR_AFTER, Fault.GARBAGE, Fault.HALF_BODY],
)
def test_unknown_outcome_is_found_out_at_once(system: System, fault: Fault) -> None:
    order = new_order()
    system.fault(order, fault)

    reply = system.post(order)

    assert reply.status == 200
    assert system.status_of(order) == "succeeded"
    assert system.calls(order) == system.executions(order) == 1


def test_unknown_outcome_that_cannot_be_found_out_now_is_parked_with_424(
    system: System,
) -> None:
    order = new_order()
    system.fault(order, Fault.EXECUTE_THEN_DROP)
    key = key_of(order)
    system.api.add_faults(Script(Fault.ERROR_BEFORE, key=key, on="lookup", status=500))

    reply = system.post(order)

    assert (reply.status, reply.outcome) == (424, "parked")
    assert system.status_of(order) == "parked"
    assert system.post(order).status == 424
    assert system.calls(order) == 1


@pytest.mark.parametrize("fault", [Fault.UNAUTHORIZED, Fault.REDIRECT])
def test_api_that_refuses_us_is_answered_with_503_and_an_alert(
    system: System, fault: Fault
) -> None:
    order = new_order()
    system.fault(order, fault)

    reply = system.post(order)

    assert (reply.status, reply.outcome) == (503, "refused_us")
    assert system.status_of(order) == "released"
    alerts = [line for line in system.function.log().splitlines() if '"alert"' in line]
    assert any(key_of(order) in line for line in alerts)
    assert system.post(order).status == 200


def test_record_with_another_key_than_its_subscriber_is_executed_and_told(
    system: System,
) -> None:
    order = new_order()

    for _ in range(2):
        assert system.post(order, ce_key="+10000000").status == 200

    told = [
        json.loads(line)
        for line in system.function.log().splitlines()
        if '"record_misplaced"' in line and key_of(order) in line
    ]
    assert [each["reason"] for each in told] == ["key_is_not_the_subscriber"]
    assert system.calls(order) == 1


def test_paused_function_records_and_answers_with_503(system: System) -> None:
    order = new_order(channel="kiosk")
    system.execute(
        "INSERT INTO pause (scope, paused_by, reason, paused_at) "
        "VALUES ('*', 'op', 'test', '2026-01-01')"
    )
    try:
        reply = system.post(order)
        assert (reply.status, reply.outcome) == (503, "paused")
        # Who paused, and in what words, is not for everybody who posts.
        assert json.loads(reply.body) == {"outcome": "paused"}
        assert "op: test" not in system.function.log()
        assert system.status_of(order) == "held"
    finally:
        system.execute("DELETE FROM pause")

    assert system.post(order).status == 200
    assert system.executions(order) == 1


def test_paused_channel_is_recorded_and_answered_with_424(system: System) -> None:
    """Its record is taken, so that no other channel's waits behind it."""
    order = new_order(channel="kiosk")
    system.execute(
        "INSERT INTO pause (scope, paused_by, reason, paused_at) "
        "VALUES ('kiosk', 'op', 'test', '2026-01-01')"
    )
    try:
        reply = system.post(order)
        assert (reply.status, json.loads(reply.body)) == (424, {"outcome": "held"})
        assert system.status_of(order) == "held"
        assert system.post(new_order()).status == 200
    finally:
        system.execute("DELETE FROM pause")

    assert system.executions(order) == 0


def test_ledger_that_is_locked_is_answered_with_503_and_nothing_is_called(
    system: System,
) -> None:
    order = new_order()
    with closing(sqlite3.connect(system.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        reply = system.post(order)
        poison = system.post(b"{")
        other.execute("ROLLBACK")

    assert (reply.status, reply.outcome) == (503, "ledger_unavailable")
    # Not 400: it is not recorded.
    assert poison.status == 503
    assert system.calls(order) == 0
    assert system.post(order).status == 200


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Beside an API that can't be asked what became of a call."""
    directory = tmp_path_factory.mktemp("blind")
    with running(directory, "gunicorn", recharge_api_kind="none") as made:
        yield made


def test_doubt_that_can_not_be_settled_is_parked_and_answered_with_424(
    blind: System,
) -> None:
    order = new_order()
    blind.fault(order, Fault.EXECUTE_THEN_DROP)

    replies = [blind.post(order) for _ in range(3)]

    assert [(r.status, r.outcome) for r in replies] == [(424, "parked")] * 3
    assert blind.status_of(order) == "parked"
    assert blind.calls(order) == 1


def test_what_follows_a_parked_one_is_held_for_that_subscriber_alone(
    blind: System,
) -> None:
    parked = new_order()
    blind.fault(parked, Fault.DROP_BEFORE)
    blind.post(parked)
    later, of_another = new_order(msisdn=parked["msisdn"]), new_order()

    replies = [blind.post(later) for _ in range(2)]

    assert [(r.status, r.outcome) for r in replies] == [(424, "held")] * 2
    assert blind.status_of(later) == "held"
    assert blind.calls(later) == 0
    assert blind.post(of_another).status == 200


@pytest.mark.parametrize("server", SERVERS)
def test_what_nobody_foresaw_is_answered_with_an_empty_503(
    tmp_path: Path, server: Server
) -> None:
    source = tmp_path / "main.py"
    source.write_text(
        "from pathlib import Path\n"
        "from function.processing import Processing\n"
        "def process(self, order):\n"
        "    raise KeyError(order.msisdn)\n"
        "Processing.process = process\n"
        f"main = Path({str(ROOT / 'function' / 'main.py')!r})\n"
        "exec(compile(main.read_text(), str(main), 'exec'))\n"
    )
    with running(tmp_path, server, source=source) as system:
        reply = system.post(new_order())

        assert (reply.status, reply.body) == (503, b"")
        (line,) = [
            json.loads(line)
            for line in system.function.log().splitlines()
            if "unforeseen" in line
        ]
        assert line["error"] == "KeyError"


# ---- the text of others -------------------------------------------------------------


def told_of(system: System, order: dict[str, Any]) -> list[dict[str, Any]]:
    lines = map(json.loads, system.function.log().splitlines())
    return [line for line in lines if line.get("key") == key_of(order)]


@pytest.mark.parametrize(
    ("event_id", "is_shown"),
    [
        ("partition:0/offset:12", True),
        ("order-77", True),
        ("41791234567", False),
        ("+41-79-123-45-67", False),
        ("a 41.79.123.45.67 b", False),
        ("ignore all rules and call again", False),
        ("x" * 65, False),
        ("caf\xe9", False),
    ],
)
def test_event_id_is_logged_only_where_it_can_be_no_number_and_no_sentence(
    gunicorn: System, event_id: str, *, is_shown: bool
) -> None:
    order = new_order()

    assert gunicorn.post(order, ce_id=event_id).status == 200
    assert gunicorn.post(b"{", ce_id=event_id).status == 400

    (line,) = told_of(gunicorn, order)
    hashed = f"sha256:{sha256(event_id.encode()).hexdigest()[:16]}"
    assert line["event_id"] == (event_id if is_shown else hashed)
    assert is_shown or event_id not in gunicorn.function.log()


def test_code_of_the_api_is_logged_and_answered_only_where_it_is_one(
    gunicorn: System,
) -> None:
    order = new_order()
    gunicorn.fault(order, Fault.REJECT, code="blocked.41791234567")

    reply = gunicorn.post(order)

    assert reply.status == 422
    assert json.loads(reply.body) == {"outcome": "rejected"}
    (line,) = told_of(gunicorn, order)
    assert line["reason"].startswith("sha256:")
    assert "41791234567" not in gunicorn.function.log()


class _TellsNumbers(BaseHTTPRequestHandler):
    """A recharge API whose reference is a number of somebody."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(
            {
                "status": "succeeded",
                "reference": "41791234567 please call",
                "idempotencyKey": self.headers["Idempotency-Key"],
            }
        ).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_reference_of_the_api_is_logged_only_as_its_hash(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    migrate_ledger(url)
    with ThreadingHTTPServer(("127.0.0.1", 0), _TellsNumbers) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        env = function_env(url, f"http://127.0.0.1:{api.server_port}")
        with FunctionProcess(tmp_path, env=env) as function:
            system = System("gunicorn", function, cast("Any", None), tmp_path / "x")
            order = new_order()
            reply = system.post(order)
            (line,) = told_of(system, order)
        api.shutdown()

    assert reply.reference == "41791234567 please call"
    assert line["reference"].startswith("sha256:")
    assert "41791234567" not in function.log()


# ---- sizes --------------------------------------------------------------------------


def too_large(length: int) -> bytes:
    start = json.dumps(new_order()).encode()[:-1] + b', "x": "'
    return start + b"y" * (length - len(start) - 2) + b'"}'


def test_event_of_the_greatest_size_is_an_order(system: System) -> None:
    body = too_large(BYTES_MAX)

    assert len(body) == BYTES_MAX
    assert system.post(body).status == 200


@pytest.mark.parametrize("length", [BYTES_MAX + 1, 10_000_000])
def test_larger_event_is_recorded_in_part_and_answered_with_413(
    system: System, length: int
) -> None:
    body, offset = too_large(length), next(_numbers)

    for _ in range(2):
        reply = system.post(body, ce_knativekafkaoffset=str(offset))
        assert (reply.status, reply.outcome) == (413, "too_large")

    (row,) = system.rows("quarantine", kafka_offset=offset)
    assert row["raw"] == body[:KEPT_BYTES]
    assert row["announced_bytes"] == length
    assert row["outcome"] == "too_large"


def test_larger_event_that_announces_any_length_is_recorded(system: System) -> None:
    """The ledger's column ends at 2**63 - 1, and a record that it refuses is lost."""
    request = head("Content-Length: " + "9" * 30) + too_large(BYTES_MAX + 1)

    with Wire(system) as wire:
        wire.send(request)
        wire.socket.shutdown(socket.SHUT_WR)
        reply = wire.reply()

    assert reply
    assert reply.status == 413
    (row,) = system.rows("quarantine", announced_bytes=2**63 - 1)
    assert request.endswith(row["raw"] + request[-BYTES_MAX - 1 + KEPT_BYTES :])


@pytest.mark.parametrize("length", [BYTES_MAX + 1, 2_000_000])
def test_larger_event_in_chunks_is_recorded_and_answered_with_413(
    system: System, length: int
) -> None:
    """Flask alone would cut it in silence and answer 200."""
    body = too_large(length)
    offset = next(_numbers)
    lines = ["Transfer-Encoding: chunked", f"ce-knativekafkaoffset: {offset}"]
    given = [
        line for line in head().decode().split("\r\n")[2:] if "offset:" not in line
    ]
    request = ["POST / HTTP/1.1", "Host: f", *given[:-2], *lines, "", ""]

    reply = send_raw(system, "\r\n".join(request).encode() + chunked(body))

    assert reply
    assert reply.status == 413
    (row,) = system.rows("quarantine", kafka_offset=offset)
    assert row["raw"] == body[:KEPT_BYTES]


def test_event_in_chunks_is_an_order(system: System) -> None:
    order = new_order()
    body = chunked(json.dumps(order).encode(), size=7)

    reply = send_raw(system, head("Transfer-Encoding: chunked") + body)

    assert reply
    assert reply.status == 200
    assert system.executions(order) == 1


def peak_kib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


@pytest.mark.parametrize("server", SERVERS)
def test_memory_does_not_grow_with_what_is_sent(tmp_path: Path, server: Server) -> None:
    with running(tmp_path, server) as system:
        system.post(new_order())
        system.post(too_large(BYTES_MAX + 1))
        (worker,) = system.function.workers()
        before = peak_kib(worker)
        body = too_large(40_000_000)
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(system.post, [body] * 4))
        in_chunks = send_raw(
            system, head("Transfer-Encoding: chunked") + chunked(body, 1_000_000)
        )

        assert {reply.status for reply in replies} == {413}
        assert in_chunks is None or in_chunks.status == 413
        assert peak_kib(worker) - before < 32 * KIB


REQUIRED: Final = ("specversion", "id", "source", "type")


def most_values(bytes_max: int) -> list[bytes]:
    """Orders as large as they may be, of as many values as that allows."""
    order = json.dumps(new_order() | {"metadata": {"a": "@"}}).encode()
    room = bytes_max - len(order)
    return [
        order.replace(b'"@"', b"[" + b",".join([value] * count) + b"]")
        for value in (b"[[]]", b'[{"":[]}]')
        for count in [room // (len(value) + 1) - 8]
    ]


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_every_thread_may_read_the_worst_json_within_the_pods_memory(
    tmp_path: Path, mode: str
) -> None:
    """256 KiB of empty objects take a hundred times as much once they are read."""
    with running(tmp_path, "gunicorn", server_threads=16) as system:
        bodies = most_values(BYTES_MAX - 1_000)
        given = {}
        if mode == "structured":
            given = {"content_type": "application/cloudevents+json"}
            attributes = {name: ce_headers()[f"ce-{name}"] for name in REQUIRED}
            start = json.dumps(attributes)[:-1].encode() + b', "data": '
            bodies = [start + body + b"}" for body in bodies]
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda body: system.post(body, **given), bodies * 24)
            )
        (worker,) = system.function.workers()

        assert peak_kib(worker) < memory_limit_kib()
        assert {reply.status for reply in replies} == {400}
        details = {row["detail"] for row in system.quarantine()}
        assert details == {"body: has too many values"}
        assert system.post(new_order()).status == 200


# ---- bodies that don't come whole ---------------------------------------------------


def assert_untouched(system: System, order: dict[str, Any], before: object) -> None:
    assert system.quarantine() == before
    assert system.status_of(order) is None
    assert system.calls(order) == 0


def test_stalled_body_is_answered_with_503_and_not_recorded(system: System) -> None:
    order, before = new_order(), system.quarantine()
    started = time.monotonic()

    with Wire(system) as wire:
        wire.send(whole(order)[:-1])
        reply = wire.reply()

    assert reply
    assert reply.status == 503
    assert reply.body == b""
    assert 1 <= time.monotonic() - started < 4
    assert_untouched(system, order, before)


def test_stalled_chunk_is_answered_with_503_and_not_recorded(system: System) -> None:
    order, before = new_order(), system.quarantine()
    body = chunked(json.dumps(order).encode())[:-5]

    with Wire(system) as wire:
        wire.send(head("Transfer-Encoding: chunked") + body)
        reply = wire.reply()

    assert reply
    assert reply.status == 503
    assert_untouched(system, order, before)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_body_shorter_than_announced_is_not_recorded(
    system: System, *, is_chunked: bool
) -> None:
    order, before = new_order(), system.quarantine()
    body = chunked(json.dumps(order).encode())[:-5]
    request = whole(order)[:-1]
    if is_chunked:
        request = head("Transfer-Encoding: chunked") + body

    with Wire(system) as wire:
        wire.send(request)
        wire.socket.shutdown(socket.SHUT_WR)
        reply = wire.reply()

    assert reply is None or reply.status == 503
    assert_untouched(system, order, before)


@pytest.mark.parametrize("broken", [b"zz\r\n{}\r\n", b"5\r\nabcdeXX", b"-1\r\n\r\n"])
def test_broken_chunk_is_answered_with_503_and_not_recorded(
    system: System, broken: bytes
) -> None:
    before = system.quarantine()

    reply = send_raw(system, head("Transfer-Encoding: chunked") + broken)

    assert reply is None or reply.status == 503
    assert system.quarantine() == before


def test_next_request_after_a_stalled_one_is_served(system: System) -> None:
    """The time limit of one body may not stay on the connection."""
    order = new_order()
    with Wire(system) as wire:
        wire.send(whole(new_order()))
        assert wire.reply()
        time.sleep(1.2)  # Longer than EVENT_READ_TIMEOUT_S.
        wire.send(whole(order))
        reply = wire.reply()

    assert reply is None or reply.status == 200
    if reply is None:
        assert_untouched(system, order, system.quarantine())


# ---- paths, methods, headers --------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["//", "///x", "/x/y", "/healthz", "/robots.txt", "/%2e%2e/", "/?a=b"]
)
def test_event_is_an_event_on_every_path(system: System, path: str) -> None:
    """A redirect is no delivery: the record would be dropped."""
    order = new_order()

    reply = send_raw(system, whole(order, path=path))

    assert reply
    assert reply.status == 200
    assert system.executions(order) == 1


@pytest.mark.parametrize("host", ["..", "a..b", "x" * 300, "", "\xe4"])
def test_event_is_an_event_for_every_host(system: System, host: str) -> None:
    """The framework would answer 400 for a name that can't be, unrecorded."""
    order = new_order()
    request = whole(order).replace(b"Host: f", f"Host: {host}".encode("latin-1"))

    reply = send_raw(system, request)

    assert reply
    assert reply.status == 200
    assert system.executions(order) == 1


@pytest.mark.parametrize(
    "path", ["/", "//", "/x", "/favicon.ico", "/robots.txt", "/healthz/x"]
)
def test_get_of_anything_else_is_answered_with_404(system: System, path: str) -> None:
    reply = send_raw(system, head(path=path, method="GET"))

    assert reply
    # Without the framework's page.
    assert (reply.status, reply.body) == (404, b"")


@pytest.mark.parametrize("path", ["/", "//", "/healthz", "/robots.txt"])
@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "GET"]
)
def test_other_method_never_ends_a_record(
    system: System, method: str, path: str
) -> None:
    order, before = new_order(), system.quarantine()
    body = json.dumps(order).encode()

    request = head(f"Content-Length: {len(body)}", path=path, method=method) + body
    reply = send_raw(system, request)

    assert reply
    assert reply.status == 404 or path == "/healthz"
    assert_untouched(system, order, before)


def test_probes_answer_with_200(system: System) -> None:
    for path in ("/healthz", "/readyz"):
        reply = send_raw(system, head(path=path, method="GET"))
        assert reply
        assert (reply.status, reply.body) == (200, b"")


#: Threads that wait, wait longer than any probe.
PATIENT: Final = {
    "server_threads": 2,
    "recharge_api_timeout_s": 30,
    "recharge_api_deadline_s": 40,
    "ledger_lease_margin_s": 20,
    "recharge_api_settle_s": 70,
    "event_delivery_timeout_s": 80,
    "server_request_timeout_s": 90,
    "server_graceful_timeout_s": 50,
    "server_termination_grace_s": 60,
}


def assert_alive(system: System, *lines: str) -> None:
    """The probe is answered before the kubelet gives it up."""
    with Wire(system) as wire:
        wire.socket.settimeout(liveness_timeout_s())
        wire.send(head(*lines, path="/healthz", method="GET"))
        try:
            reply = wire.reply()
        except TimeoutError:
            pytest.fail("the liveness probe is not answered: the pod would be killed")
    assert reply
    assert (reply.status, reply.body) == (200, b"")


def test_busy_pod_is_alive_while_every_thread_waits_for_the_api(tmp_path: Path) -> None:
    with running(tmp_path, "gunicorn", **PATIENT) as system, ExitStack() as stack:
        orders = [new_order() for _ in range(4)]
        for order in orders:
            system.fault(order, Fault.HANG, delay_s=60)
        wires = [stack.enter_context(Wire(system)) for _ in orders]
        for wire, order in zip(wires, orders, strict=True):
            wire.send(whole(order))
        system.wait_for(lambda: len(system.api.book.calls()) == 2)

        for _ in range(3):
            assert_alive(system)
        assert_alive(system, "Connection: close", "User-Agent: kube-probe/1.33")

        assert len(system.api.book.calls()) == 2, "more threads than two"
        system.api.clear_faults()
        replies = [wire.reply() for wire in wires]
        assert all(reply and reply.status in {200, 503, 424} for reply in replies)


def test_busy_pod_is_alive_while_every_thread_settles_at_a_ledger_that_is_away(
    tmp_path: Path,
) -> None:
    """Killed then, it would lose the answers that it holds in its memory."""
    with running(tmp_path, "gunicorn", **PATIENT) as system, ExitStack() as stack:
        orders = [new_order() for _ in range(2)]
        for order in orders:
            system.fault(order, Fault.EXECUTE_THEN_LATE, delay_s=1.5)
        wires = [stack.enter_context(Wire(system)) for _ in orders]
        for wire, order in zip(wires, orders, strict=True):
            wire.send(whole(order))
        system.wait_for(lambda: all(system.executions(each) for each in orders))
        with closing(sqlite3.connect(system.database, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for _ in range(3):
                assert_alive(system)
            for wire in wires:
                wire.socket.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    wire.reply()
                wire.socket.settimeout(DEADLINE_S)
            other.execute("ROLLBACK")

        assert [reply and reply.status for reply in map(Wire.reply, wires)] == [200] * 2


def test_busy_pod_is_alive_while_clients_do_not_close_what_was_answered(
    tmp_path: Path,
) -> None:
    """The server waits two seconds for each to close; not in the loop that lives."""
    with running(tmp_path, "gunicorn", **PATIENT) as system, ExitStack() as stack:
        wires = [stack.enter_context(Wire(system)) for _ in range(8)]
        for wire in wires:
            wire.send(head("Content-Length: x"))
        for wire in wires[:2]:
            assert wire.reply()

        assert_alive(system)


def test_pipelined_requests_are_answered_in_order(system: System) -> None:
    orders = [new_order() for _ in range(3)]

    with Wire(system) as wire:
        wire.send(b"".join(map(whole, orders)))
        replies = [wire.reply() for _ in orders]

    answered = [reply for reply in replies if reply is not None]
    assert {reply.status for reply in answered} == {200}
    names = [from_http(r.headers, r.body).data["rechargeId"] for r in answered]
    assert names == [order["rechargeId"] for order in orders][: len(names)]
    # What wasn't answered was not done, so that its redelivery can be.
    for order in orders[len(names) :]:
        assert system.calls(order) == 0


def test_request_that_asks_first_is_answered(system: System) -> None:
    order = new_order()

    reply = send_raw(system, whole(order, "Expect: 100-continue"))

    assert reply
    assert reply.status == 200


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["no colon"], id="no header"),
        pytest.param(["bad name: x"], id="blank in a name"),
        pytest.param(["x: a\0b"], id="nul"),
        pytest.param(["Transfer-Encoding: gzip, chunked"], id="unknown coding"),
        pytest.param(["Transfer-Encoding: chunked", "Content-Length: 5"], id="both"),
        pytest.param(["Content-Length: x"], id="length that is none"),
        pytest.param(["Content-Length: -5"], id="negative length"),
        pytest.param(["Content-Length: 1", "Content-Length: 2"], id="two lengths"),
        pytest.param(["Expect: the-impossible"], id="unknown expectation"),
    ],
)
def test_request_that_gunicorn_can_not_read_is_answered_with_503(
    gunicorn: System, lines: list[str]
) -> None:
    """Its own answer would be 400, 417, 431 or 501: the first three drop the record."""
    before = gunicorn.quarantine()

    reply = send_raw(gunicorn, head(*lines))

    assert reply
    assert reply.status >= 500
    assert gunicorn.quarantine() == before


def test_heads_that_stall_are_given_up_and_others_are_served(tmp_path: Path) -> None:
    """gunicorn reads a head without a time limit: one for each thread ends it all."""
    with (
        running(tmp_path, "gunicorn", server_threads=2) as system,
        ExitStack() as open_,
    ):
        stalled = [open_.enter_context(Wire(system)) for _ in range(4)]
        for wire in stalled:
            wire.send(b"POST / HTTP/1.1\r\nHo")

        assert system.post(new_order()).status == 200
        assert [wire.reply() for wire in stalled] == [None] * 4


def test_bodies_that_drip_are_given_up_and_others_are_served(tmp_path: Path) -> None:
    """Each byte comes in time; all of them would take for ever."""
    stop = threading.Event()

    def drip(wires: list[Wire]) -> None:
        while not stop.wait(0.2):
            for wire in wires:
                with suppress(OSError):
                    wire.send(b"x")

    with (
        running(tmp_path, "gunicorn", server_threads=2) as system,
        ExitStack() as open_,
    ):
        wires = [open_.enter_context(Wire(system)) for _ in range(4)]
        for wire in wires:
            wire.send(head("Content-Length: 200000"))
        thread = threading.Thread(target=drip, args=(wires,))
        thread.start()
        try:
            assert system.post(new_order()).status == 200
        finally:
            stop.set()
            thread.join()
        assert system.quarantine() == []


@pytest.mark.parametrize(
    "line", [b"POST / HTTP/9.9", b"POST /", b"\0\0\0", b"POST /" + b"x" * 9000]
)
def test_request_line_that_gunicorn_can_not_read_is_answered_with_503(
    gunicorn: System, line: bytes
) -> None:
    reply = send_raw(gunicorn, line + b"\r\nHost: f\r\n\r\n")

    assert reply
    # Not gunicorn's page either: what nobody foresaw is answered without a word.
    assert (reply.status, reply.body) == (503, b"")


def test_many_and_long_headers_within_bounds_are_read(gunicorn: System) -> None:
    """KafkaSource makes one of every record header."""
    order = new_order()
    lines = [f"ce-kafkaheader{i}: x" for i in range(450)]
    lines.append(f"ce-kafkaheaderlong: {'x' * 30_000}")

    reply = send_raw(gunicorn, whole(order, *lines))

    assert reply
    assert reply.status == 200


def given_head(where: dict[str, str], *lines: str) -> bytes:
    """A head whose ways to the body and to the record come last, as Vert.x may."""
    fields = [f"{name}: {value}" for name, value in (ce_headers() | where).items()]
    request = ["POST / HTTP/1.1", "Host: f", *lines, *fields, "", ""]
    return "\r\n".join(request).encode("latin-1")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([f"ce-kafkaheader{i}: x" for i in range(501)], "more than 500 fields"),
        ([f"ce-kafkaheader{i}: x" for i in range(150_000)], "more than 500 fields"),
        ([f"ce-kafkaheaderx: {'x' * 40_000}"], "a field of more than"),
        ([f"ce-kafkaheaderx: {'x' * 5_000_000}"], "a field of more than"),
        ([f"ce-{'x' * 40_000}: x"], "a field of more than"),
        ([f"ce-kafkaheader{i}: {'x' * 30_000}" for i in range(20)], "larger than"),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_record_with_more_headers_than_are_read_is_recorded_and_can_be_replayed(
    gunicorn: System, lines: list[str], told: str, *, is_chunked: bool
) -> None:
    """The server's own answer would be 431, and 503 for ever would block the rest."""
    order, offset = new_order(), str(next(_numbers))
    body = json.dumps(order).encode()
    framing = {"content-length": str(len(body))}
    if is_chunked:
        framing = {"transfer-encoding": "chunked"}
    where = {"ce-knativekafkaoffset": offset, **framing}
    request = given_head(where, *lines) + (chunked(body) if is_chunked else body)

    with Wire(gunicorn) as wire:
        wire.send(request)
        reply = wire.reply()
        # The connection is where it should be: the next record is read.
        wire.send(whole(after := new_order()))
        assert (then := wire.reply()) is None or then.status == 200

    assert reply
    assert reply.status == 400, f"{reply.status}: it comes again for ever"
    assert reply.outcome == "malformed"
    (row,) = gunicorn.rows("quarantine", kafka_offset=int(offset))
    assert row["raw"] == body
    assert told in row["detail"]
    kept = json.loads(row["attributes"])
    assert kept["ce-type"] == "dev.knative.kafka.event"
    assert len(row["attributes"]) < 200_000
    assert gunicorn.calls(order) == 0
    assert gunicorn.post(after).status == 200

    headers = {name.replace("-", "_"): value for name, value in kept.items()}
    headers = {n: v for n, v in headers.items() if n != "ce_kafkaheaderx"}
    assert gunicorn.post(body, **headers).status == 200
    assert gunicorn.executions(order) == 1


def test_header_of_any_bytes_is_no_unforeseen_error(system: System) -> None:
    order = new_order()

    reply = send_raw(system, whole(order, "ce-kafkaheaderx: caf\xe9 \xff"))

    assert reply
    assert reply.status in {200, 503}
    assert '"unforeseen"' not in system.function.log()


# ---- the end ------------------------------------------------------------------------


def test_running_call_is_settled_after_sigterm_and_no_other_begins(
    tmp_path: Path,
) -> None:
    """One thread, so that the second delivery is queued behind the first."""
    with running(tmp_path, "gunicorn", server_threads=1) as system:
        first, queued, late = new_order(), new_order(), new_order()
        system.fault(first, Fault.EXECUTE_THEN_LATE, delay_s=1.2)
        with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
            answer = pool.submit(system.post, first)
            system.wait_for(lambda: system.calls(first))
            wires = [stack.enter_context(Wire(system))]
            wires[0].send(whole(queued))
            system.function.terminate()
            # Between the signal and the end, while the first one still runs.
            wires.append(stack.enter_context(Wire(system)))
            wires[1].send(whole(late))
            reply = answer.result()
            others = [wire.reply() for wire in wires]
            status = system.function.wait()

        assert reply.status == 200
        assert status == 0
        assert system.status_of(first) == "succeeded"
        assert system.executions(first) == 1
        assert all(other is None or other.status == 503 for other in others)
        for order in (queued, late):
            assert system.calls(order) == 0
            assert system.status_of(order) is None
        system.function.start()
        for order in (first, queued, late):
            assert system.post(order).status == 200
            assert system.executions(order) == 1


def is_refusing(system: System) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", system.function.port)) != 0


def test_draining_worker_refuses_on_a_connection_that_is_kept(tmp_path: Path) -> None:
    with running(tmp_path, "gunicorn") as system, ExitStack() as stack:
        wires = [stack.enter_context(Wire(system)) for _ in range(50)]
        for wire in wires:
            wire.send(head(path="/readyz", method="GET"))
            assert wire.reply()
        first, late = new_order(), new_order()
        system.fault(first, Fault.EXECUTE_THEN_LATE, delay_s=1.5)

        def is_draining() -> bool:
            # Closed at once: gunicorn waits for that, for two seconds at most, and
            # serves nobody meanwhile.
            with wires.pop() as wire:
                wire.send(head(path="/readyz", method="GET"))
                reply = wire.reply()
            assert reply
            return reply.status == 503

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(system.post, first)
            system.wait_for(lambda: system.calls(first))
            system.function.terminate()
            system.wait_for(is_draining)
            before = system.quarantine()
            with wires.pop() as wire:
                wire.send(head("Content-Length: 1") + b"{")
                poison = wire.reply()
            with wires.pop() as wire:
                wire.send(whole(late))
                reply = wire.reply()
            assert answer.result().status == 200

        assert reply
        assert poison
        assert (reply.status, reply.outcome) == (503, "draining")
        assert (poison.status, poison.outcome) == (503, "draining")
        assert system.quarantine() == before
        assert system.status_of(late) is None
        assert system.calls(late) == 0
        system.function.wait()


@pytest.mark.parametrize("server", SERVERS)
def test_running_call_is_settled_after_sigterm(tmp_path: Path, server: Server) -> None:
    with running(tmp_path, server) as system:
        order = new_order()
        system.fault(order, Fault.EXECUTE_THEN_LATE, delay_s=0.8)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(system.post, order)
            system.wait_for(lambda: system.calls(order))
            system.function.terminate()
            assert answer.result().status == 200
        system.function.wait()

        assert system.status_of(order) == "succeeded"


def test_killed_group_leaves_nobody_and_the_restart_finds_out(tmp_path: Path) -> None:
    with running(tmp_path, "gunicorn") as system:
        order = new_order()
        system.fault(order, Fault.EXECUTE_THEN_LATE, delay_s=30)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(system.post, order)
            system.wait_for(lambda: system.calls(order))
            system.function.kill()
            with pytest.raises((OSError, http.client.HTTPException)):
                answer.result()
        system.function.start()

        assert system.post(order).status == 409  # The lease still runs.
        system.wait_for(lambda: system.post(order).status == 200)
        assert system.calls(order) == system.executions(order) == 1


# ---- the start ----------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("ledger_database_url", "", "LEDGER_DATABASE_URL"),
        ("ledger_database_url", "oracle://u:hunter2@db/x", "LEDGER_DATABASE_URL"),
        ("ledger_database_url", "hunter2", "LEDGER_DATABASE_URL"),
        ("ledger_lease_margin_s", "9", "LEDGER_LEASE_MARGIN_S"),
        ("ledger_lease_s", "9", "LEDGER_LEASE_S is no setting any more"),
        ("recharge_api_kind", "maybe", "RECHARGE_API_KIND"),
        ("recharge_api_settle_s", "4", "RECHARGE_API_SETTLE_S"),
        ("recharge_api_profile", "nobody", "RECHARGE_API_PROFILE"),
        ("recharge_api_token_file", "/nobody", "RECHARGE_API_TOKEN_FILE"),
        ("server_threads", "many", "SERVER_THREADS"),
    ],
    ids=range(10),
)
def test_bad_setting_refuses_to_start_and_is_named_in_one_line(
    tmp_path: Path, server: Server, setting: str, value: str, named: str
) -> None:
    env = function_env("sqlite://", "http://api", recharge_api_kind="lookup")
    env[setting.upper()] = value

    with pytest.raises(StartFailed) as failed:
        FunctionProcess(tmp_path, env=env, server=server).start()

    assert failed.value.status != 0
    (line,) = [text for text in failed.value.log.splitlines() if "topup:" in text]
    assert line.startswith("topup: ")
    assert named in line
    assert "Traceback" not in failed.value.log
    assert "hunter2" not in failed.value.log


@pytest.mark.parametrize("server", SERVERS)
def test_probes_tell_a_process_that_lives_from_one_that_can_work(
    tmp_path: Path, server: Server
) -> None:
    database = tmp_path / "later" / "ledger.db"
    url = f"sqlite:///{database}"
    with SandboxRechargeApi(kind="none", book=tmp_path / "book.jsonl") as api:
        function = FunctionProcess(
            tmp_path, env=function_env(url, api.url), server=server
        )
        with function:
            system = System(server, function, api, database)
            order = new_order()

            def status(path: str) -> int:
                reply = send_raw(system, head(path=path, method="GET"))
                assert reply
                return reply.status

            # No database at all.
            assert (status("/healthz"), status("/readyz")) == (200, 503)
            assert system.post(order).status == 503
            # A database without tables.
            database.parent.mkdir()
            sqlite3.connect(database).close()
            assert (status("/healthz"), status("/readyz")) == (200, 503)
            assert system.post(order).status == 503
            assert api.book.calls() == []
            migrate_ledger(url)
            assert (status("/healthz"), status("/readyz")) == (200, 200)
            assert system.post(order).status == 200
            # Seen once: readiness doesn't follow every hiccup of the database.
            system.execute("ALTER TABLE alembic_version RENAME TO hiccup")
            assert (status("/healthz"), status("/readyz")) == (200, 200)


def test_log_is_one_json_object_a_line_with_masked_numbers(gunicorn: System) -> None:
    order = new_order()
    gunicorn.post(order)

    lines = [json.loads(line) for line in gunicorn.function.log().splitlines()[-1:]]

    (line,) = [each for each in lines if each.get("key") == key_of(order)]
    assert line["action"] == "delivery"
    assert line["outcome"] == "succeeded"
    assert line["subscriber"] == f"+41******{order['msisdn'][-3:]}"
    assert line["reference"]
    assert line["partition"] == 0


def test_killed_group_is_gone_and_its_restart_has_the_same_address(
    tmp_path: Path,
) -> None:
    """The helper itself: the crash tests rely on it."""
    with running(tmp_path, "gunicorn") as system:
        group, url = system.function.process_group_id, system.function.url
        assert system.function.workers()

        kill_group(group)
        system.wait_for(lambda: not living(group))
        assert is_refusing(system)
        system.function.restart()

        assert system.function.url == url
        assert system.function.process_group_id != group
        assert system.post(new_order()).status == 200
