"""The client of the recharge API over real sockets: sent or not, and when it ends.

The sandbox plays what a real API does; what no server of Python would do is played by
small servers made by hand here.
"""

import gzip
import json
import os
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import trustme

from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi
from function.api_auth import make_authenticator
from function.api_profile import load_profile
from function.config import Settings
from function.http_exchange import ANSWER_BYTES_MAX, Call, Transport
from function.model import Answer, AnswerClass, Finding, TopUp
from function.recharge_api import REASON_OF_ERROR, RechargeApi

ORDER: Final = TopUp(
    idempotency_key="app:r-1",
    fingerprint="f",
    channel="app",
    recharge_id="r-1",
    msisdn="+41791234567",
    amount_minor=500,
    currency="CHF",
    requested_at="2026-01-02T03:04:05Z",
    donor_msisdn=None,
    payload=b"",
    position=None,
    event_id="e-1",
    event_source="/shop",
)


def done(reference: str) -> bytes:
    """The body of an answer to ORDER that it is executed."""
    key = ORDER.idempotency_key
    answer = {"status": "succeeded", "reference": reference, "idempotencyKey": key}
    return json.dumps(answer).encode()


DONE: Final = done("ref-1")
DEADLINE_S: Final = 1.0
#: How much later than its deadline a call may end on a busy machine.
LATENESS_S: Final = 1.0
#: For whatever must happen sooner or later.
PATIENCE_S: Final = 20.0


class Client:
    """A RechargeApi with its settings, and the time that its last call took."""

    def __init__(self, url: str, **settings: object) -> None:
        env = {
            "ledger_database_url": "sqlite://",
            "recharge_api_url": url,
            "recharge_api_timeout_s": 3,
            "recharge_api_deadline_s": 4,
            **settings,
        }
        self.settings = Settings.from_env({k.upper(): str(v) for k, v in env.items()})
        self.api = RechargeApi(
            self.settings,
            load_profile(self.settings),
            make_authenticator(self.settings),
        )
        self.took_s = 0.0

    def recharge(self, deadline_s: float = 3.5, key: str = "app:r-1") -> Answer:
        started = time.monotonic()
        answer = self.api.recharge(ORDER, key, started + deadline_s)
        self.took_s = time.monotonic() - started
        return answer


MakeClient = Callable[..., Client]


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    with ExitStack() as stack:

        def make(url: str, **settings: object) -> Client:
            client = Client(url, **settings)
            stack.callback(client.api.close)
            return client

        yield make


@pytest.fixture(autouse=True)
def _no_proxy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxRechargeApi]:
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        yield api


# ---- servers made by hand -----------------------------------------------------------


@dataclass
class HandMade:
    """A listening socket whose every connection is served by one function."""

    port: int
    stopping: threading.Event = field(default_factory=threading.Event)
    connections: int = 0
    #: What was read, request by request, head and body.
    requests: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def read_request(self, connection: socket.socket) -> bytes:
        """One request; empty when the client has gone."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line.split(b":")[1]):
                    more = connection.recv(65536)
                    if not more:
                        return b""
                    body += more
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise ConnectionAbortedError

    def hold(self, connection: socket.socket) -> None:
        """Say nothing more until the client goes or the test ends."""
        connection.settimeout(0.05)
        while not self.stopping.is_set():
            with suppress(TimeoutError):
                if not connection.recv(65536):
                    return


Serve = Callable[[HandMade, socket.socket], None]


@contextmanager
def server(serve: Serve, tls: ssl.SSLContext | None = None) -> Iterator[HandMade]:
    """Serve each connection in a thread of its own; none is left afterwards."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.settimeout(0.05)
        made = HandMade(listener.getsockname()[1])

        opened: list[socket.socket] = []

        def one(connection: socket.socket) -> None:
            with ExitStack() as stack, suppress(OSError):
                stack.enter_context(connection)
                connection.settimeout(PATIENCE_S)
                # What is sent leaves at once, not with the next request's head.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                    stack.enter_context(connection)
                opened.append(connection)
                serve(made, connection)

        def accept(pool: ThreadPoolExecutor) -> None:
            while not made.stopping.is_set():
                with suppress(TimeoutError):
                    connection, _ = listener.accept()
                    made.connections += 1
                    pool.submit(one, connection)

        with ThreadPoolExecutor(32) as pool:
            accepting = threading.Thread(target=accept, args=[pool])
            accepting.start()
            try:
                yield made
            finally:
                made.stopping.set()
                accepting.join()
                for each in opened:
                    with suppress(OSError):
                        # Past TLS, which would wait for the other side's farewell.
                        socket.socket.shutdown(each, socket.SHUT_RDWR)


def answer_of(
    body: bytes = DONE, status: str = "200 OK", *headers: str, length: bool = True
) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def always(answer: bytes) -> Serve:
    """Answer every request so, on connections that are kept."""

    def serve(made: HandMade, connection: socket.socket) -> None:
        while made.read_request(connection):
            connection.sendall(answer)

    return serve


def once_then_close(answer: bytes) -> Serve:
    def serve(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        connection.sendall(answer)

    return serve


def once_then_hold(answer: bytes) -> Serve:
    def serve(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        connection.sendall(answer)
        made.hold(connection)

    return serve


def drip(prefix: bytes, again: bytes) -> Serve:
    """Send something for ever, faster than any timeout between two reads."""

    def serve(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        connection.sendall(prefix)
        while True:
            connection.sendall(again)
            made.pause(0.05)

    return serve


@dataclass(frozen=True)
class Authority:
    """A CA with a server certificate, as files."""

    ca: Path
    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


def make_authority(directory: Path, host: str = "127.0.0.1") -> Authority:
    directory.mkdir(exist_ok=True)
    made = Authority(*(directory / name for name in ("ca.pem", "cert.pem", "key.pem")))
    ca = trustme.CA()
    ca.cert_pem.write_to_path(made.ca)
    issued = ca.issue_cert(host)
    issued.private_key_pem.write_to_path(made.key)
    issued.cert_chain_pems[0].write_to_path(made.cert)
    return made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tls") / "stranger")


def assert_not_sent(answer: Answer) -> None:
    assert answer.classified is AnswerClass.RETRY
    assert not answer.is_sent
    assert answer.http_status is None


def assert_unknown(answer: Answer) -> None:
    assert answer.classified is AnswerClass.UNKNOWN
    assert answer.is_sent


# ---- the answers --------------------------------------------------------------------


def test_order_is_sent_as_the_api_documents_it(
    make_client: MakeClient, sandbox: SandboxRechargeApi
) -> None:
    answer = make_client(sandbox.url).recharge()

    assert answer.classified is AnswerClass.DONE
    assert answer.is_sent
    (executed,) = sandbox.book.executions()
    assert answer.reference == executed.reference
    assert (executed.key, executed.msisdn) == ("app:r-1", ORDER.msisdn)
    assert (executed.amount_minor, executed.currency) == (500, "CHF")


def test_request_holds_nothing_but_the_profiles_words(make_client: MakeClient) -> None:
    with server(always(answer_of())) as made:
        make_client(f"{made.url}/v1/").recharge(key="rendered")

    head, _, body = made.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/recharges HTTP/1.1\r\n")
    assert b"\r\nIdempotency-Key: rendered\r\n" in head + b"\r\n"
    assert b"authorization" not in head.lower()
    assert b"cookie" not in head.lower()
    # A field without value is left out, an integer stays one.
    assert json.loads(body) == {
        "msisdn": "+41791234567",
        "amountMinor": 500,
        "currency": "CHF",
        "channel": "app",
        "rechargeId": "r-1",
        "requestedAt": "2026-01-02T03:04:05Z",
    }


FAULTS: Final = [
    (Script(Fault.DROP_BEFORE), "unknown", "connection_error"),
    (Script(Fault.HANG, delay_s=60), "unknown", "read_timeout"),
    (Script(Fault.ERROR_BEFORE, status=500), "unknown", "internal"),
    (Script(Fault.ERROR_BEFORE, status=503), "unknown", "unavailable"),
    (Script(Fault.RATE_LIMITED), "retry", "rate_limited"),
    (Script(Fault.SAME_CONTENT), "same_content", "similar_recently"),
    (Script(Fault.UNAUTHORIZED), "ours", "unauthorized"),
    (Script(Fault.REDIRECT), "ours", "http_307"),
    (Script(Fault.REJECT, code="blocked"), "no", "blocked"),
    (Script(Fault.REJECT, status=402, code="no_credit"), "ours", "no_credit"),
    (Script(Fault.ACCEPT), "accepted", "http_202"),
    (Script(Fault.LATE_EXECUTE, delay_s=60), "unknown", "read_timeout"),
    (Script(Fault.LATE_EXECUTE, delay_s=0.1), "done", "http_201"),
    (Script(Fault.EXECUTE_THEN_DROP), "unknown", "connection_error"),
    (Script(Fault.EXECUTE_THEN_LATE, delay_s=60), "unknown", "read_timeout"),
    (Script(Fault.EXECUTE_THEN_LATE, delay_s=0.1), "done", "http_201"),
    (Script(Fault.ERROR_AFTER), "unknown", "internal"),
    (Script(Fault.HALF_BODY), "unknown", "connection_error"),
    (Script(Fault.DRIP, delay_s=0.1), "unknown", "deadline"),
    (Script(Fault.GARBAGE), "unknown", "http_200"),
    (Script(Fault.REVERSE_LATER, delay_s=60), "done", "http_201"),
]


@pytest.mark.parametrize(
    ("script", "classified", "reason"),
    FAULTS,
    ids=[f"{script.fault}-{reason}" for script, _, reason in FAULTS],
)
def test_fault_of_the_api_is_classified(
    make_client: MakeClient,
    sandbox: SandboxRechargeApi,
    script: Script,
    classified: str,
    reason: str,
) -> None:
    sandbox.add_faults(script)
    client = make_client(sandbox.url, recharge_api_timeout_s=1)

    answer = client.recharge(deadline_s=1.5)

    assert answer.classified is AnswerClass(classified)
    assert answer.reason == reason
    # The API saw it, exactly once: no library repeats a call.
    assert answer.is_sent
    assert len(sandbox.book.calls()) == 1
    sandbox.clear_faults()


def test_every_fault_of_the_sandbox_is_tried() -> None:
    """`execute_then_kill` is the crash tests'; `accept_then_fail` answers as accept."""
    tried = {script.fault for script, _, _ in FAULTS}

    assert set(Fault) - tried == {
        Fault.NONE,
        Fault.EXECUTE_THEN_KILL,
        Fault.ACCEPT_THEN_FAIL,
    }


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + DONE,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        answer_of(b"{"),
        answer_of(b"\xff\xfe"),
        answer_of(b"[" * 60_000),
        answer_of(DONE, "200 OK", "Content-Encoding: gzip"),
        answer_of(gzip.compress(DONE)[:-30], "200 OK", "Content-Encoding: gzip"),
        # The document is whole, but the end of the body is missing.
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + f"{len(DONE):x}\r\n".encode()
        + DONE
        + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=range(16),
)
def test_broken_answer_is_unknown(make_client: MakeClient, answer: bytes) -> None:
    with server(once_then_close(answer)) as made:
        assert_unknown(make_client(made.url).recharge())

    assert len(made.requests) == 1


def test_answer_that_ends_with_the_connection_is_understood(
    make_client: MakeClient,
) -> None:
    with server(once_then_close(answer_of(length=False))) as made:
        assert make_client(made.url).recharge().reference == "ref-1"


def test_redirect_is_not_followed(make_client: MakeClient) -> None:
    with server(always(answer_of())) as elsewhere:
        location = f"Location: {elsewhere.url}/recharges"
        for status in ("301 M", "302 F", "303 S", "307 T", "308 P"):
            with server(always(answer_of(b"", status, location))) as made:
                answer = make_client(made.url).recharge()
            # A 303 follows a POST that was carried out; a 302 is used so, too.
            is_unknown = status[:3] in {"302", "303"}
            expected = AnswerClass.UNKNOWN if is_unknown else AnswerClass.OURS
            assert answer.classified is expected
            assert len(made.requests) == 1

    assert elsewhere.connections == 0


def test_cookie_of_an_answer_is_not_sent_with_the_next_order(
    make_client: MakeClient,
) -> None:
    answer = answer_of(DONE, "200 OK", "Set-Cookie: session=1; Path=/")
    with server(always(answer)) as made:
        client = make_client(made.url)
        client.recharge()
        client.recharge()

    assert b"cookie" not in made.requests[1].lower()


# ---- sent, or provably not ----------------------------------------------------------


def test_refused_connection_is_not_sent(make_client: MakeClient) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        answer = make_client(f"http://127.0.0.1:{bound.getsockname()[1]}").recharge()

    assert_not_sent(answer)
    assert answer.reason == "connection_error"


def test_name_that_nobody_has_is_not_sent(make_client: MakeClient) -> None:
    assert_not_sent(make_client("http://nobody.invalid").recharge())


def test_connect_timeout_is_not_sent(make_client: MakeClient) -> None:
    with ExitStack() as stack:
        # A queue of one that is full: the kernel drops every further attempt.
        listener = stack.enter_context(
            socket.create_server(("127.0.0.1", 0), backlog=0)
        )
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = make_client(url, recharge_api_timeout_s=0.5)
        answer = client.recharge()

    assert_not_sent(answer)
    assert answer.reason == "connect_timeout"
    assert client.took_s < 0.5 + LATENESS_S


def test_connection_closed_before_it_was_read_counts_as_sent(
    make_client: MakeClient,
) -> None:
    """The bytes left us: that nobody read them is not known."""

    def close(_made: HandMade, connection: socket.socket) -> None:
        # Closed earlier, it would not be sent at all: the client looks before.
        connection.recv(1, socket.MSG_PEEK)

    with server(close) as made:
        assert_unknown(make_client(made.url).recharge())


def test_connection_reset_after_the_request_counts_as_sent(
    make_client: MakeClient,
) -> None:
    def reset(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        linger = b"\1\0\0\0\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with server(reset) as made:
        answer = make_client(made.url).recharge()

    assert_unknown(answer)
    assert answer.reason == "connection_error"


def test_key_that_can_not_become_a_header_is_not_sent(make_client: MakeClient) -> None:
    with server(always(answer_of())) as made:
        client = make_client(made.url)
        for key in ("中", "a\nb", " a"):
            assert_not_sent(client.recharge(key=key))

    assert made.requests == []


def test_nothing_is_sent_after_the_deadline(
    make_client: MakeClient, sandbox: SandboxRechargeApi
) -> None:
    client = make_client(sandbox.url)
    client.recharge(key="app:first")  # So that a connection is there to be used.

    for late_s in (0.0, -1.0):
        answer = client.recharge(deadline_s=late_s)
        assert_not_sent(answer)
        assert answer.reason == "deadline"

    assert [call.key for call in sandbox.book.calls()] == ["app:first"]


def test_pod_that_slept_before_its_send_sends_nothing(
    sandbox: SandboxRechargeApi,
) -> None:
    """It wakes after its lease: another may have taken the claim over."""
    settings = Client(sandbox.url).settings
    now = 0.0

    class Sleeper:
        def __call__(
            self,
            headers: dict[str, str],
            transport: Transport,  # noqa: ARG002
            call: Call,  # noqa: ARG002
        ) -> None:
            nonlocal now
            assert not headers.get("Authorization")
            now = 60.0

        def forget(self) -> None:
            return

    api = RechargeApi(settings, load_profile(settings), Sleeper(), lambda: now)
    answer = api.recharge(ORDER, "app:r-1", deadline=15.0)
    api.close()

    assert_not_sent(answer)
    assert sandbox.book.calls() == []


# ---- the hard deadline --------------------------------------------------------------


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), id="headers"),
        pytest.param(drip(b"HTTP/1.1 200 OK\r\nX: ", b"y"), id="one header"),
        pytest.param(drip(b"", b"H"), id="status line"),
        pytest.param(drip(answer_of(b" " * 9999)[:-9999], b" "), id="body"),
        pytest.param(
            drip(answer_of(b"", length=False), b" "), id="body without length"
        ),
        pytest.param(
            drip(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"
            ),
            id="chunks",
        ),
        pytest.param(drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="100-continue"),
        pytest.param(once_then_hold(b""), id="nothing"),
        pytest.param(once_then_hold(answer_of(length=False)), id="whole but open"),
    ],
)
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_call_is_cut_at_its_deadline(
    make_client: MakeClient, authority: Authority, serve: Serve, *, is_tls: bool
) -> None:
    """The last case is a success to the eye: only the clock says that it was cut."""
    with server(serve, authority.context() if is_tls else None) as made:
        client = make_client(
            made.tls_url if is_tls else made.url, recharge_api_tls_ca_file=authority.ca
        )
        answer = client.recharge(deadline_s=DEADLINE_S)

    assert_unknown(answer)
    assert answer.reason == "deadline"
    assert DEADLINE_S <= client.took_s < DEADLINE_S + LATENESS_S


def test_stalled_handshake_is_cut_and_not_sent(
    make_client: MakeClient, authority: Authority
) -> None:
    def stall(made: HandMade, connection: socket.socket) -> None:
        made.hold(connection)

    with server(stall) as made:
        client = make_client(made.tls_url, recharge_api_tls_ca_file=authority.ca)
        answer = client.recharge(deadline_s=DEADLINE_S)

    assert_not_sent(answer)
    assert answer.reason == "deadline"
    assert client.took_s < DEADLINE_S + LATENESS_S


def test_many_calls_are_each_cut_at_their_own_deadline(make_client: MakeClient) -> None:
    deadlines = [0.3 + number / 10 for number in range(8)]
    with server(drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as made:
        api = make_client(made.url).api

        def call(deadline_s: float) -> float:
            started = time.monotonic()
            assert_unknown(api.recharge(ORDER, "app:r-1", started + deadline_s))
            return time.monotonic() - started

        with ThreadPoolExecutor(len(deadlines)) as pool:
            took = list(pool.map(call, deadlines))

    for deadline_s, took_s in zip(deadlines, took, strict=True):
        assert deadline_s <= took_s < deadline_s + LATENESS_S


def test_call_after_one_that_was_cut_is_not_cut(make_client: MakeClient) -> None:
    def serve(made: HandMade, connection: socket.socket) -> None:
        first = made.connections == 1
        (once_then_hold(b"") if first else always(answer_of()))(made, connection)

    with server(serve) as made:
        client = make_client(made.url)
        assert_unknown(client.recharge(deadline_s=0.3))
        assert client.recharge().classified is AnswerClass.DONE


# ---- connections --------------------------------------------------------------------


def keeps_connections_for(seconds: float) -> Serve:
    """Drops what comes later, unread: the race between its close and our request."""

    def serve(made: HandMade, connection: socket.socket) -> None:
        while True:
            started = time.monotonic()
            if not made.read_request(connection):
                return
            is_first = len(made.requests) == 1
            if not is_first and time.monotonic() - started > seconds:
                return
            connection.sendall(answer_of())

    return serve


def test_connection_idle_for_long_is_not_used_again(make_client: MakeClient) -> None:
    """Each would be a false doubt: read by nobody, and yet perhaps sent."""
    with server(keeps_connections_for(0.25)) as made:
        client = make_client(made.url, recharge_api_idle_s=0.1)
        answers = [client.recharge()]
        for _ in range(5):
            time.sleep(0.3)  # The idle time itself, not a wait for something.
            answers.append(client.recharge())

    assert [answer.classified for answer in answers] == [AnswerClass.DONE] * 6
    assert made.connections == 6


def test_connection_at_the_edge_of_the_servers_timeout_is_never_lost(
    make_client: MakeClient,
) -> None:
    keep_s = 0.1

    def serve(made: HandMade, connection: socket.socket) -> None:
        """As most servers do: close what was idle for `keep_s`."""
        connection.settimeout(keep_s)
        while made.read_request(connection):
            connection.sendall(answer_of())

    with server(serve) as made:
        api = make_client(made.url, recharge_api_idle_s=keep_s / 2).api

        def calls(_number: int) -> list[Answer]:
            answers = []
            for turn in range(25):
                deadline = time.monotonic() + 3
                answers.append(api.recharge(ORDER, "app:r-1", deadline))
                time.sleep(keep_s - 0.01 + turn / 1000)
            return answers

        with ThreadPoolExecutor(8) as pool:
            answers = [each for group in pool.map(calls, range(8)) for each in group]

    assert len(answers) == 200
    assert {answer.reason for answer in answers} == {"http_200"}


def test_fresh_connection_is_used_again(make_client: MakeClient) -> None:
    with server(always(answer_of())) as made:
        client = make_client(made.url)
        for _ in range(5):
            assert client.recharge().classified is AnswerClass.DONE

    assert made.connections == 1


def test_proxies_and_passwords_of_the_environment_are_ignored(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with server(always(answer_of())) as proxy, server(always(answer_of())) as made:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login a password b\n")
        monkeypatch.setenv("NETRC", str(netrc))

        answer = make_client(made.url).recharge()

    assert answer.classified is AnswerClass.DONE
    assert proxy.connections == 0
    assert b"authorization" not in made.requests[0].lower()


# ---- TLS ----------------------------------------------------------------------------


def test_server_with_the_right_certificate_is_called(
    make_client: MakeClient, authority: Authority, tmp_path: Path
) -> None:
    book = tmp_path / "book.jsonl"
    with SandboxRechargeApi(
        kind="none", book=book, tls_cert=authority.cert, tls_key=authority.key
    ) as api:
        client = make_client(api.url, recharge_api_tls_ca_file=authority.ca)
        assert client.recharge().classified is AnswerClass.DONE


def test_server_of_another_ca_is_not_called(
    make_client: MakeClient, authority: Authority, stranger: Authority
) -> None:
    with server(always(answer_of()), authority.context()) as made:
        client = make_client(made.tls_url, recharge_api_tls_ca_file=stranger.ca)
        answer = client.recharge()

    assert_not_sent(answer)
    assert answer.reason == "tls_error"
    assert made.requests == []


def test_server_with_another_name_is_not_called(
    make_client: MakeClient, tmp_path: Path
) -> None:
    other = make_authority(tmp_path / "other", host="other.example")
    with server(always(answer_of()), other.context()) as made:
        client = make_client(made.tls_url, recharge_api_tls_ca_file=other.ca)
        answer = client.recharge()

    assert_not_sent(answer)
    assert answer.reason == "tls_error"
    assert made.requests == []


def test_private_ca_is_trusted_only_by_the_setting(
    make_client: MakeClient, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(authority.ca))
    with server(always(answer_of()), authority.context()) as made:
        assert_not_sent(make_client(made.tls_url).recharge())


@pytest.mark.parametrize("banner", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_server_that_speaks_no_tls_is_not_called(
    make_client: MakeClient, authority: Authority, banner: bytes
) -> None:
    def plain(_made: HandMade, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(banner)

    with server(plain) as made:
        client = make_client(made.tls_url, recharge_api_tls_ca_file=authority.ca)
        assert_not_sent(client.recharge())


# ---- bounds -------------------------------------------------------------------------


def padded(length: int) -> bytes:
    return DONE[:-1] + b" " * (length - len(DONE)) + b"}"


def test_answer_of_64_kib_is_read_and_a_longer_one_is_unknown(
    make_client: MakeClient,
) -> None:
    with server(always(answer_of(padded(ANSWER_BYTES_MAX)))) as made:
        assert make_client(made.url).recharge().classified is AnswerClass.DONE
    with server(always(answer_of(padded(ANSWER_BYTES_MAX + 1)))) as made:
        assert_unknown(make_client(made.url).recharge())


def test_endless_answer_is_not_read_on(make_client: MakeClient) -> None:
    sent = 0

    def pour(made: HandMade, connection: socket.socket) -> None:
        nonlocal sent
        made.read_request(connection)
        connection.sendall(answer_of(b"", length=False))
        while True:
            connection.sendall(b" " * 65536)
            sent += 65536

    with server(pour) as made:
        client = make_client(made.url)
        assert_unknown(client.recharge())

    assert client.took_s < 2
    # Both kernels' buffers hold a few megabytes; nothing of it is in our memory.
    assert sent < 32 * 1024 * 1024


def test_answer_that_unpacks_to_100_mb_is_not_unpacked(make_client: MakeClient) -> None:
    bomb = gzip.compress(b" " * 100_000_000)
    with server(always(answer_of(bomb, "200 OK", "Content-Encoding: gzip"))) as made:
        client = make_client(made.url)
        tracemalloc.start()
        answer = client.recharge()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert_unknown(answer)
    assert peak < 10_000_000


# ---- look-ups -----------------------------------------------------------------------


def test_look_up_finds_what_the_api_executed(
    make_client: MakeClient, sandbox: SandboxRechargeApi
) -> None:
    client = make_client(sandbox.url)
    assert client.api.look_up("app:r-1").finding is Finding.ABSENT
    reference = client.recharge().reference

    found = client.api.look_up("app:r-1")

    assert (found.finding, found.reference) == (Finding.EXECUTED, reference)
    client.recharge()
    assert client.api.look_up("app:r-1").finding is Finding.SEVERAL


def test_key_in_a_look_up_is_encoded(
    make_client: MakeClient, sandbox: SandboxRechargeApi
) -> None:
    client = make_client(sandbox.url)
    key = "a%3Ab:c&d=e+f#g"
    client.recharge(key=key)

    assert client.api.look_up(key).finding is Finding.EXECUTED


@pytest.mark.parametrize(
    "script",
    [
        Script(Fault.DROP_BEFORE, on="lookup"),
        Script(Fault.ERROR_BEFORE, on="lookup"),
        Script(Fault.RATE_LIMITED, on="lookup"),
        Script(Fault.UNAUTHORIZED, on="lookup"),
        Script(Fault.REDIRECT, on="lookup"),
        Script(Fault.GARBAGE, on="lookup"),
        Script(Fault.HALF_BODY, on="lookup"),
        Script(Fault.HANG, on="lookup", delay_s=60),
        Script(Fault.DRIP, on="lookup", delay_s=0.2),
    ],
    ids=lambda script: script.fault.value,
)
def test_failed_look_up_teaches_nothing(
    make_client: MakeClient, sandbox: SandboxRechargeApi, script: Script
) -> None:
    sandbox.add_faults(script)
    client = make_client(sandbox.url, recharge_api_timeout_s=1)
    started = time.monotonic()

    assert client.api.look_up("app:r-1").finding is Finding.UNKNOWN

    assert time.monotonic() - started < 1 + LATENESS_S
    sandbox.clear_faults()


def test_look_up_at_an_api_that_refuses_connections_teaches_nothing(
    make_client: MakeClient, sandbox: SandboxRechargeApi
) -> None:
    sandbox.outage(60)

    assert make_client(sandbox.url).api.look_up("k").finding is Finding.UNKNOWN


# ---- bearer token -------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[SandboxRechargeApi]:
    expected = tmp_path / "expected"
    expected.write_text("first\n")
    with SandboxRechargeApi(
        kind="none", book=tmp_path / "book.jsonl", bearer_token_file=expected
    ) as api:
        yield api


def rotate(api: SandboxRechargeApi, token: str) -> None:
    assert api.bearer_token_file
    api.bearer_token_file.write_text(token)


def test_token_file_that_changes_is_read_again(
    make_client: MakeClient, guarded: SandboxRechargeApi, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    client = make_client(guarded.url, recharge_api_token_file=token)
    assert client.recharge().classified is AnswerClass.DONE

    rotate(guarded, "second")
    assert client.recharge().classified is AnswerClass.OURS
    token.write_text("second\n")
    assert client.recharge().classified is AnswerClass.DONE


def test_token_file_that_is_replaced_by_a_link_is_read_again(
    make_client: MakeClient, guarded: SandboxRechargeApi, tmp_path: Path
) -> None:
    """As the kubelet mounts a Secret: token -> ..data/token, ..data -> a folder."""
    moment = 1_700_000_000_000_000_000
    for name in ("first", "second"):
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "token").write_text(name)
        os.utime(tmp_path / f"..{name}" / "token", ns=(moment, moment))
    (tmp_path / "..data").symlink_to("..first")
    (tmp_path / "token").symlink_to("..data/token")
    client = make_client(guarded.url, recharge_api_token_file=tmp_path / "token")
    assert client.recharge().classified is AnswerClass.DONE

    rotate(guarded, "second")
    (tmp_path / "..new").symlink_to("..second")
    (tmp_path / "..new").replace(tmp_path / "..data")

    assert client.recharge().classified is AnswerClass.DONE


def test_token_file_is_read_again_after_a_401(
    make_client: MakeClient, guarded: SandboxRechargeApi, tmp_path: Path
) -> None:
    """Also where neither time nor file tell that it changed."""
    token = tmp_path / "token"
    token.write_text("second")
    before = token.stat()
    client = make_client(guarded.url, recharge_api_token_file=token)
    assert client.recharge().classified is AnswerClass.OURS
    token.write_text("first\n")
    os.utime(token, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert client.recharge().classified is AnswerClass.DONE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "token_file_unreadable"),
        (b"", "token_file_empty"),
        (b" \n", "token_file_empty"),
        (b"\xff", "token_file_unreadable"),
    ],
)
def test_no_token_means_nothing_is_sent(
    make_client: MakeClient,
    guarded: SandboxRechargeApi,
    tmp_path: Path,
    content: bytes | None,
    reason: str,
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    client = make_client(guarded.url, recharge_api_token_file=token)
    token.unlink()
    if content is not None:
        token.write_bytes(content)

    answer = client.recharge()

    assert (answer.classified, answer.is_sent) == (AnswerClass.OURS, False)
    assert answer.reason == reason
    assert client.api.look_up("k").finding is Finding.UNKNOWN
    assert guarded.book.calls() == []


def test_token_that_can_not_become_a_header_is_not_sent(
    make_client: MakeClient, guarded: SandboxRechargeApi, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("a\nb")

    answer = make_client(guarded.url, recharge_api_token_file=token).recharge()

    assert not answer.is_sent
    assert guarded.book.calls() == []


# ---- OAuth 2 ------------------------------------------------------------------------


class TokenServer:
    """Exchanges client credentials for `token-1`, `token-2` …, and counts."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.exchanges = 0
        self.expires_in: int | None = 3600
        self.more: dict[str, Any] = {}
        self.raw: bytes | None = None
        self.url = ""

    def serve(self, made: HandMade, connection: socket.socket) -> None:
        while request := made.read_request(connection):
            self.exchanges += 1
            assert request.startswith(b"POST /token ")
            document: dict[str, Any] = {
                "access_token": f"token-{self.exchanges}",
                "token_type": "Bearer",
                **self.more,
            }
            if self.expires_in is not None:
                document["expires_in"] = self.expires_in
            connection.sendall(self.raw or answer_of(json.dumps(document).encode()))


@pytest.fixture
def tokens(authority: Authority) -> Iterator[TokenServer]:
    made_tokens = TokenServer(authority)
    with server(made_tokens.serve, authority.context()) as made:
        made_tokens.url = f"{made.tls_url}/token"
        yield made_tokens


@pytest.fixture
def oauth_client(
    make_client: MakeClient, tokens: TokenServer, tmp_path: Path
) -> Callable[..., Client]:
    secret = tmp_path / "client-secret"
    secret.write_text("s3cret\n")

    def make(url: str, **settings: object) -> Client:
        defaults = {
            "recharge_api_tls_ca_file": tokens.authority.ca,
            "recharge_api_oauth_token_url": tokens.url,
            "recharge_api_oauth_client_id": "topup",
            "recharge_api_oauth_client_secret_file": secret,
        }
        return make_client(url, **(defaults | settings))

    return make


def shown_tokens(made: HandMade) -> list[str]:
    lines = [line for request in made.requests for line in request.split(b"\r\n")]
    return [line.decode() for line in lines if line.startswith(b"Authorization")]


def test_oauth_token_is_fetched_once_and_used_by_all(
    oauth_client: Callable[..., Client], tokens: TokenServer, authority: Authority
) -> None:
    with server(always(answer_of()), authority.context()) as made:
        api = oauth_client(made.tls_url).api

        def call(_number: int) -> AnswerClass:
            deadline = time.monotonic() + 10
            return api.recharge(ORDER, "app:r-1", deadline).classified

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(call, range(16))) == {AnswerClass.DONE}

    assert tokens.exchanges == 1
    assert shown_tokens(made) == ["Authorization: Bearer token-1"] * 16


def test_oauth_token_is_fetched_again_after_a_401(
    oauth_client: Callable[..., Client], tokens: TokenServer
) -> None:
    def serve(made: HandMade, connection: socket.socket) -> None:
        while request := made.read_request(connection):
            is_old = b"Bearer token-1\r\n" in request
            refusal = answer_of(b"", "401 Unauthorized")
            connection.sendall(refusal if is_old else answer_of())

    with server(serve) as made:
        client = oauth_client(made.url)
        assert client.recharge().classified is AnswerClass.OURS
        assert client.recharge().classified is AnswerClass.DONE
        assert client.recharge().classified is AnswerClass.DONE

    assert tokens.exchanges == 2


@pytest.mark.parametrize("expires_in", [None, 0, 20])
def test_oauth_token_near_its_end_is_fetched_anew(
    oauth_client: Callable[..., Client], tokens: TokenServer, expires_in: int | None
) -> None:
    """Without a lifetime it is used once: the API alone knows."""
    tokens.expires_in = expires_in
    with server(always(answer_of())) as made:
        client = oauth_client(made.url)
        for _ in range(2):
            assert client.recharge().classified is AnswerClass.DONE
        tokens.expires_in = 3600
        for _ in range(3):
            assert client.recharge().classified is AnswerClass.DONE

    assert tokens.exchanges == 3


def test_oauth_server_that_grants_another_scope_is_believed(
    oauth_client: Callable[..., Client], tokens: TokenServer
) -> None:
    """It may (RFC 6749 section 3.3); whether it is enough, the API says."""
    tokens.more = {"scope": "topup:small"}
    with server(always(answer_of())) as made:
        client = oauth_client(made.url, recharge_api_oauth_scope="topup profile")
        assert client.recharge().classified is AnswerClass.DONE

    assert shown_tokens(made) == ["Authorization: Bearer token-1"]


@pytest.mark.parametrize(
    "raw",
    [
        answer_of(b'{"error": "invalid_client"}', "401 Unauthorized"),
        answer_of(b"<html>", "502 Bad Gateway"),
        answer_of(b"{}"),
        answer_of(b"[]"),
        answer_of(b"null"),
        answer_of(b'{"access_token": "a\\nb", "token_type": "Bearer"}'),
        answer_of(b'{"access_token": "", "token_type": "Bearer"}'),
        answer_of(b'{"access_token": "a", "token_type": "Bearer", "expires_in": "x"}'),
        b"garbage\r\n\r\n",
    ],
    ids=range(9),
)
def test_oauth_server_that_gives_no_token_means_nothing_is_sent(
    oauth_client: Callable[..., Client], tokens: TokenServer, raw: bytes
) -> None:
    tokens.raw = raw
    with server(always(answer_of())) as made:
        answer = oauth_client(made.url).recharge()

    assert not answer.is_sent
    assert answer.classified in {AnswerClass.OURS, AnswerClass.RETRY}
    assert made.requests == []


def test_oauth_server_that_is_down_means_nothing_is_sent(
    oauth_client: Callable[..., Client],
) -> None:
    with socket.socket() as bound, server(always(answer_of())) as made:
        bound.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{bound.getsockname()[1]}/token"
        answer = oauth_client(made.url, recharge_api_oauth_token_url=url).recharge()

    assert (answer.classified, answer.is_sent) == (AnswerClass.OURS, False)
    assert answer.reason == "oauth_exchange_failed"
    assert made.requests == []


def test_oauth_secret_is_given_only_to_a_verified_server(
    oauth_client: Callable[..., Client], stranger: Authority, tokens: TokenServer
) -> None:
    with server(always(answer_of()), stranger.context()) as false_server:
        url = f"{false_server.tls_url}/token"
        answer = oauth_client(
            "http://127.0.0.1:1", recharge_api_oauth_token_url=url
        ).recharge()

    assert answer.reason == "oauth_exchange_failed"
    assert false_server.requests == []
    plain = tokens.url.replace("https:", "http:")
    client = oauth_client("http://127.0.0.1:1", recharge_api_oauth_token_url=plain)
    assert client.recharge().reason == "oauth_exchange_failed"


def test_oauth_server_that_hangs_holds_nobody_for_long(
    oauth_client: Callable[..., Client], authority: Authority
) -> None:
    """One exchange at a time, but the others don't queue behind it for ever."""
    with server(once_then_hold(b""), authority.context()) as stalled:
        api = oauth_client(
            "http://127.0.0.1:1",
            recharge_api_oauth_token_url=f"{stalled.tls_url}/token",
            recharge_api_timeout_s=0.5,
        ).api

        def call(number: int) -> Answer:
            return api.recharge(ORDER, f"app:{number}", time.monotonic() + 3)

        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(call, range(8)))

    assert time.monotonic() - started < 0.5 + 0.5 + LATENESS_S
    for answer in answers:
        assert_not_sent(answer)
        assert answer.reason == "oauth_exchange_slow"


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_oauth_redirect_is_not_followed(
    oauth_client: Callable[..., Client], tokens: TokenServer, status: str
) -> None:
    with server(always(answer_of())) as elsewhere:
        tokens.raw = answer_of(b"", status, f"Location: {elsewhere.url}/token")
        answer = oauth_client("http://127.0.0.1:1").recharge()

    assert answer.reason == "oauth_exchange_failed"
    assert elsewhere.connections == 0


def test_oauth_exchange_that_outlasts_the_deadline_sends_nothing(
    oauth_client: Callable[..., Client], authority: Authority
) -> None:
    def late(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        made.pause(1.0)
        token = {"access_token": "t", "token_type": "Bearer", "expires_in": 3600}
        connection.sendall(answer_of(json.dumps(token).encode()))

    with server(late, authority.context()) as slow, server(always(answer_of())) as made:
        client = oauth_client(
            made.url, recharge_api_oauth_token_url=f"{slow.tls_url}/token"
        )
        answer = client.recharge(deadline_s=0.5)

    assert_not_sent(answer)
    assert made.requests == []


# ---- the table of errors ------------------------------------------------------------


def test_every_error_of_requests_has_a_name_of_its_own() -> None:
    """A new release may bring a new class: decide what it means, then name it."""
    base = requests.exceptions.RequestException
    known = [
        each
        for each in vars(requests.exceptions).values()
        if isinstance(each, type) and issubclass(each, base) and each is not base
    ]
    assert len(known) > 20

    for kind in known:
        first = next(named for named, _ in REASON_OF_ERROR if issubclass(kind, named))
        assert first is not base, (
            f"{kind.__name__} is only caught as a RequestException"
        )


def test_name_in_the_table_is_not_hidden_by_an_earlier_one() -> None:
    kinds = [kind for kind, _ in REASON_OF_ERROR]

    for index, kind in enumerate(kinds):
        hiding = [each for each in kinds[:index] if issubclass(kind, each)]
        assert not hiding, f"{kind.__name__} is hidden by {hiding}"


def test_donor_is_sent_when_there_is_one(make_client: MakeClient) -> None:
    order = replace(ORDER, donor_msisdn="+41791234568")
    with server(always(answer_of())) as made:
        make_client(made.url).api.recharge(
            order, ORDER.idempotency_key, time.monotonic() + 3
        )

    assert json.loads(made.requests[0].partition(b"\r\n\r\n")[2])["donorMsisdn"] == (
        "+41791234568"
    )


# ---- whose answer it is -------------------------------------------------------------


def reference_of(number: int) -> bytes:
    return answer_of(done(f"ref-{number}"))


def interim(*statuses: int) -> bytes:
    return b"".join(
        f"HTTP/1.1 {status} Wait\r\nLink: </style>; rel=preload\r\n\r\n".encode()
        for status in statuses
    )


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(interim(100), id="100"),
        pytest.param(interim(102), id="102"),
        pytest.param(interim(103), id="103"),
        pytest.param(interim(199), id="199"),
        pytest.param(interim(103, 100, 102, 103, 103), id="several"),
    ],
)
@pytest.mark.parametrize("is_joined", [True, False], ids=["joined", "apart"])
def test_interim_answer_is_read_over(
    make_client: MakeClient, before: bytes, *, is_joined: bool
) -> None:
    """Or the next order would read the answer of this one."""

    def serve(made: HandMade, connection: socket.socket) -> None:
        while made.read_request(connection):
            answer = reference_of(len(made.requests))
            if is_joined:
                connection.sendall(before + answer)
                continue
            connection.sendall(before)
            made.pause(0.05)
            connection.sendall(answer)

    with server(serve) as made:
        client = make_client(made.url)
        references = [client.recharge().reference for _ in range(3)]

    assert references == ["ref-1", "ref-2", "ref-3"]
    assert made.connections == 1


@pytest.mark.parametrize("status", [100, 103])
def test_endless_interim_answers_end_at_a_bound(
    make_client: MakeClient, status: int
) -> None:
    """Long before the deadline, or they would cost the whole time a processor."""

    def pour(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        while True:
            connection.sendall(interim(status) * 100)

    with server(pour) as made:
        client = make_client(made.url)
        assert_unknown(client.recharge())

    assert client.took_s < 2


def test_change_of_protocol_is_unknown_and_its_connection_never_used_again(
    make_client: MakeClient,
) -> None:
    def serve(made: HandMade, connection: socket.socket) -> None:
        is_first = made.connections == 1
        while made.read_request(connection):
            switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"
            connection.sendall(switch if is_first else answer_of())

    with server(serve) as made:
        client = make_client(made.url)
        assert_unknown(client.recharge())
        assert client.recharge().classified is AnswerClass.DONE

    assert made.connections == 2


SECOND: Final = answer_of(done("other"))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(answer_of() + SECOND, id="two answers"),
        pytest.param(answer_of() + b"\r\n", id="a line more"),
        pytest.param(answer_of() + b" " * 20_000 + SECOND, id="more than a buffer"),
        pytest.param(
            answer_of(DONE, "200 OK", "Connection: close") + SECOND, id="close"
        ),
        pytest.param(
            answer_of(DONE, "200 OK", f"Content-Length: {len(DONE) + 1}") + b" ",
            id="two lengths",
        ),
        pytest.param(
            answer_of(
                f"{len(DONE):x}\r\n".encode() + DONE + b"\r\n0\r\n\r\n",
                "200 OK",
                "Transfer-Encoding: chunked",
            ),
            id="length and chunks",
        ),
        pytest.param(
            answer_of(
                f"{len(DONE):x}\r\n".encode() + DONE + b"\r\n0\r\n\r\n" + SECOND,
                "200 OK",
                "Transfer-Encoding: chunked",
                length=False,
            ),
            id="chunks and more",
        ),
        pytest.param(
            answer_of(DONE, "200 OK", f"Content-Length: +{len(DONE)}", length=False),
            id="length with a sign",
        ),
        pytest.param(
            answer_of(
                f"0x{len(DONE):x}\r\n".encode() + DONE + b"\r\n0\r\n\r\n",
                "200 OK",
                "Transfer-Encoding: chunked",
                length=False,
            ),
            id="chunk with a prefix",
        ),
        pytest.param(
            answer_of(DONE, "200 OK", "no colon"),
            id="line that is no header",
        ),
    ],
)
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_answer_whose_end_is_not_certain_is_unknown(
    make_client: MakeClient, authority: Authority, answer: bytes, *, is_tls: bool
) -> None:
    """What stands behind it may be the answer, and it somebody else's."""

    def serve(made: HandMade, connection: socket.socket) -> None:
        is_first = made.connections == 1
        while made.read_request(connection):
            connection.sendall(answer if is_first else answer_of())

    with server(serve, authority.context() if is_tls else None) as made:
        client = make_client(
            made.tls_url if is_tls else made.url, recharge_api_tls_ca_file=authority.ca
        )
        assert_unknown(client.recharge())
        assert client.recharge().reference == "ref-1"

    assert made.connections == 2


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_bytes_that_come_late_end_their_connection(
    make_client: MakeClient, authority: Authority, *, is_tls: bool
) -> None:
    is_late_sent = threading.Event()
    may_send_late = threading.Event()

    def serve(made: HandMade, connection: socket.socket) -> None:
        is_first = made.connections == 1
        while made.read_request(connection):
            connection.sendall(answer_of())
            if is_first:
                assert may_send_late.wait(PATIENCE_S)
                connection.sendall(SECOND)
                is_late_sent.set()

    with server(serve, authority.context() if is_tls else None) as made:
        client = make_client(
            made.tls_url if is_tls else made.url, recharge_api_tls_ca_file=authority.ca
        )
        assert client.recharge().reference == "ref-1"
        may_send_late.set()
        assert is_late_sent.wait(PATIENCE_S)
        assert client.recharge().reference == "ref-1"

    assert made.connections == 2


def test_answer_before_the_request_has_ended_is_unknown(
    make_client: MakeClient,
) -> None:
    """It can't be known what it answers; urllib3 would read it all the same."""
    order = replace(ORDER, channel="c" * 30_000_000)

    def serve(_made: HandMade, connection: socket.socket) -> None:
        for _ in range(20):
            connection.recv(65536)
        connection.sendall(answer_of())
        # With its end before the reset, the send ends in a broken pipe: after that
        # urllib3 reads the answer.
        connection.shutdown(socket.SHUT_WR)

    with server(serve) as made:
        answer = make_client(made.url).api.recharge(
            order, ORDER.idempotency_key, time.monotonic() + 3
        )

    assert_unknown(answer)


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_answer_that_comes_byte_by_byte_is_understood(
    make_client: MakeClient, authority: Authority, *, is_tls: bool
) -> None:
    def serve(made: HandMade, connection: socket.socket) -> None:
        while made.read_request(connection):
            answer = interim(103) + reference_of(len(made.requests))
            for place in range(len(answer)):
                connection.sendall(answer[place : place + 1])

    with server(serve, authority.context() if is_tls else None) as made:
        client = make_client(
            made.tls_url if is_tls else made.url, recharge_api_tls_ca_file=authority.ca
        )
        references = [client.recharge().reference for _ in range(2)]

    assert references == ["ref-1", "ref-2"]


# ---- what an answer's head may do ---------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "Location: http://[x",
        "Location: \x00",
        "Location: //",
        "Set-Cookie: =;;expires=\x01; path=[",
        "Set-Cookie: a=b; version=x; max-age=y; port=z; expires=1 1 1",
        "Content-Type: text/html; charset=\x00",
        "Content-Type: multipart/mixed; boundary=",
        "Content-Length: 5, 6",
        "Content-Length: " + "9" * 5000,
        "Content-Encoding: " + ", ".join(["gzip"] * 12),
        "Transfer-Encoding: gzip, chunked",
        "Retry-After: Thu, 99 Foo 99999 99:99:99 GMT",
        "Keep-Alive: timeout=x",
        "Proxy-Authenticate: [",
        "\xff: \xff",
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "302 Found", "307 T", "401 U", "503 S"])
def test_no_head_of_an_answer_makes_the_call_raise(
    make_client: MakeClient, line: str, status: str
) -> None:
    head = f"HTTP/1.1 {status}\r\n{line}\r\n\r\n".encode("latin-1")
    with server(once_then_close(head)) as made:
        client = make_client(made.url, recharge_api_kind="lookup")
        answer = client.recharge()
        found = client.api.look_up("k")

    assert answer.is_sent
    assert answer.classified is not AnswerClass.DONE
    assert found.finding is Finding.UNKNOWN


# ---- is_sent ------------------------------------------------------------------------


def test_send_that_breaks_in_its_middle_counts_as_sent(make_client: MakeClient) -> None:
    """Bytes have left, and a whole request among them can't be ruled out."""

    def serve(_: HandMade, connection: socket.socket) -> None:
        connection.recv(1000)

    with server(serve) as made:
        answer = make_client(made.url).recharge(key="k" * 30_000_000)

    assert_unknown(answer)


# ---- memory -------------------------------------------------------------------------


@contextmanager
def memory_bounded_to(bytes_max: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < bytes_max


@pytest.mark.parametrize("location", ["", "Location: /elsewhere"], ids=["", "location"])
@pytest.mark.parametrize(
    "status", ["200", "204", "301", "302", "303", "304", "307", "308", "401", "500"]
)
def test_long_answer_of_any_status_is_not_read_on(
    make_client: MakeClient, status: str, location: str
) -> None:
    def pour(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        lines = f"HTTP/1.1 {status} X\r\n{location or 'X: y'}\r\n\r\n"
        connection.sendall(lines.encode())
        for _ in range(500):
            connection.sendall(b" " * 65536)

    with server(pour) as made, memory_bounded_to(4_000_000):
        client = make_client(made.url)
        client.recharge()

    assert client.took_s < 2


def test_head_of_an_answer_is_bounded(make_client: MakeClient) -> None:
    """Six megabytes are allowed by http.client: a hundred lines of 64 KiB."""
    lines = [f"X-{number}: {'y' * 60_000}" for number in range(90)]
    with (
        server(always(answer_of(DONE, "200 OK", *lines))) as made,
        memory_bounded_to(4_000_000),
    ):
        assert_unknown(make_client(made.url).recharge())


def test_chunk_of_negative_length_is_not_read_to_its_end(
    make_client: MakeClient,
) -> None:
    def pour(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
        )
        for _ in range(500):
            connection.sendall(b" " * 65536)

    with server(pour) as made, memory_bounded_to(4_000_000):
        assert_unknown(make_client(made.url).recharge())


# ---- Retry-After --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least_s", "most_s"),
    [
        ("120", 120, 120),
        ("0", 0, 0),
        ("999999999999", 86400, 86400),
        ("-5", 0, 0),
        ("1.5", 0, 0),
        ("soon", 0, 0),
        ("5, 6", 0, 0),
        ("9" * 5000, 86400, 86400),
        ("Thu, 99 Foo 99999 99:99:99 GMT", 0, 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400),
        pytest.param(
            format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True),
            3000,
            3600,
            # By the moment, two workers would collect two different tests.
            id="in an hour",
        ),
    ],
)
def test_wait_that_the_api_names_is_handed_on(
    make_client: MakeClient, value: str, least_s: float, most_s: float
) -> None:
    answer = answer_of(b"", "429 Too Many Requests", f"Retry-After: {value}")
    with server(always(answer)) as made:
        waits = make_client(made.url).recharge()

    assert waits.classified is AnswerClass.RETRY
    assert least_s <= waits.retry_after_s <= most_s


def test_answer_that_names_no_wait_has_none(make_client: MakeClient) -> None:
    with server(always(answer_of())) as made:
        assert make_client(made.url).recharge().retry_after_s == 0.0


# ---- the token endpoint, under the same bounds --------------------------------------


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), id="head drips"),
        pytest.param(drip(answer_of(b" " * 9999)[:-9999], b" "), id="body drips"),
        pytest.param(drip(b"", interim(103)), id="103"),
        pytest.param(once_then_hold(b""), id="says nothing"),
    ],
)
def test_slow_token_endpoint_holds_nobody_past_the_deadline(
    oauth_client: Callable[..., Client], authority: Authority, serve: Serve
) -> None:
    """Neither who asks nor who waits for the lock; and no order is sent."""
    with (
        server(serve, authority.context()) as slow,
        server(always(answer_of())) as made,
    ):
        api = oauth_client(
            made.url, recharge_api_oauth_token_url=f"{slow.tls_url}/token"
        ).api

        def call(number: int) -> Answer:
            return api.recharge(ORDER, f"app:{number}", time.monotonic() + DEADLINE_S)

        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(call, range(4)))
        took_s = time.monotonic() - started

    assert took_s < DEADLINE_S + LATENESS_S
    for answer in answers:
        assert_not_sent(answer)
    assert made.requests == []


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "500 Error"])
def test_long_answer_of_the_token_endpoint_is_not_read_on(
    oauth_client: Callable[..., Client], authority: Authority, status: str
) -> None:
    def pour(made: HandMade, connection: socket.socket) -> None:
        made.read_request(connection)
        connection.sendall(f"HTTP/1.1 {status}\r\nLocation: /x\r\n\r\n".encode())
        for _ in range(500):
            connection.sendall(b" " * 65536)

    with server(pour, authority.context()) as made:
        client = oauth_client(
            "http://127.0.0.1:1", recharge_api_oauth_token_url=f"{made.tls_url}/token"
        )
        with memory_bounded_to(4_000_000):
            answer = client.recharge()

    assert not answer.is_sent
    assert answer.reason == "oauth_exchange_failed"


def test_token_file_is_read_within_a_bound(
    make_client: MakeClient, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_bytes(b"t" * 50_000_000)
    client = make_client("http://127.0.0.1:1", recharge_api_token_file=token)
    with memory_bounded_to(4_000_000):
        answer = client.recharge()

    assert not answer.is_sent
    assert answer.reason == "token_file_unreadable"


def test_scope_that_is_set_is_asked_for(
    oauth_client: Callable[..., Client], authority: Authority
) -> None:
    token = answer_of(b'{"access_token": "t", "token_type": "Bearer"}')
    with (
        server(always(token), authority.context()) as asked,
        server(always(answer_of())) as made,
    ):
        oauth_client(
            made.url,
            recharge_api_oauth_token_url=f"{asked.tls_url}/token",
            recharge_api_oauth_scope="topup profile",
        ).recharge()

    head, _, body = asked.requests[0].partition(b"\r\n\r\n")
    assert b"Authorization: Basic dG9wdXA6czNjcmV0\r\n" in head + b"\r\n"
    assert body == b"grant_type=client_credentials&scope=topup+profile"


# ---- between the head and the body of a request -------------------------------------


def test_answer_that_is_there_before_the_body_is_unknown() -> None:
    """It may be what a proxy still had of the request before."""
    is_answered = threading.Event()

    def serve(made: HandMade, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1)
        connection.sendall(answer_of())
        is_answered.set()
        made.hold(connection)

    def clock() -> float:
        # Asked between the two sends.
        if call.is_sent:
            assert is_answered.wait(PATIENCE_S)
        return time.monotonic()

    call = Call(time.monotonic() + PATIENCE_S, clock)
    transport = Transport(connections_max=1, idle_s=1, timeout_s=5, verify=True)
    with server(serve) as made:
        request = requests.Request("POST", made.url, json={"some": "body"})
        with pytest.raises(requests.ConnectionError):
            transport.exchange(call, request)
    transport.close()

    assert call.is_sent
