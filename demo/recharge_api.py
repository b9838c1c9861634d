"""Owns the sandbox recharge API: a real HTTP server, its rules, and its control.

It must never import `function` or look at the ledger: its book is the judge of both.
The book is book.py's; which fault a request gets, faults.py says.

    POST /recharges ──> called ──> check and execute, under one lock ──> the answer
                          │                      │                     minus what the
                         book                  book                    fault keeps back

The server speaks docs/recharge-api.openapi.yaml. Faults are scripted through a second
port, the control, which stays reachable while the API itself refuses connections, or
drawn at random: the same seed, key and attempt always draw the same fault.
"""

import argparse
import contextlib
import hashlib
import heapq
import hmac
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

from demo.book import Book, BookEntry, BookWriter, Entry
from demo.faults import RANDOM_FAULTS, UNTOUCHED, Fault, Script, Scripts, draw

KEY_CHARACTERS_MAX = 200
#: An order is a few hundred bytes; a bigger body is a mistake of the caller.
BODY_BYTES_MAX = 64 * 1024
AMOUNT_MINOR_MAX = 2**63 - 1

#: Longer than any scheduler hiccup; a thread that outlives it is a bug of this file.
_STOP_DEADLINE_S = 5.0
#: How late an accepted recharge may be carried out; short against `finish_after_s`.
_FINISHER_TICK_S = 0.02

_KEY = re.compile(rf"[ -~]{{1,{KEY_CHARACTERS_MAX}}}", re.ASCII)
_MSISDN = re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII)
_CURRENCY = re.compile(r"[A-Z]{3}", re.ASCII)


class Kind(StrEnum):
    """What the API does with a key that it has seen before."""

    #: The first final answer again, within a window; no look-up.
    REPLAY = "replay"
    #: 409 `reference_used`; can be asked by the key.
    REFUSE = "refuse"
    #: Executed again (a real double); can be asked by the key.
    LOOKUP = "lookup"
    #: Executed again, no look-up.
    NONE = "none"


class _InvalidRequestError(Exception):
    """The request breaks the API's document: `code`, message."""


@dataclass(frozen=True, slots=True)
class _Order:
    """A recharge request that keeps the API's document."""

    key: str
    msisdn: str
    amount_minor: int
    currency: str
    content: str

    @classmethod
    def parse(cls, keys: Sequence[str], body: bytes) -> Self:
        """Read a request: its Idempotency-Key headers and its body.

        Raises:
            _InvalidRequestError: it breaks the API's document.

        """
        key = _valid_key(keys)
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise _InvalidRequestError("invalid_request", "no JSON") from None
        if not isinstance(document, dict):
            raise _InvalidRequestError("invalid_request", "no object")
        for name, is_valid, code in _BODY_RULES:
            if not is_valid(document.get(name)):
                raise _InvalidRequestError(code, f"{name} is missing or invalid")
        canonical = json.dumps(document, sort_keys=True).encode()
        return cls(
            key=key,
            msisdn=document["msisdn"],
            amount_minor=document["amountMinor"],
            currency=document["currency"],
            content=hashlib.sha256(canonical).hexdigest()[:16],
        )


def _valid_key(keys: Sequence[str]) -> str:
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        message = f"one idempotency key of 1 to {KEY_CHARACTERS_MAX} ASCII characters"
        raise _InvalidRequestError("invalid_request", message)
    return keys[0]


def _is_msisdn(value: object) -> bool:
    return isinstance(value, str) and bool(_MSISDN.fullmatch(value))


def _is_amount(value: object) -> bool:
    # A JSON true is an int for Python.
    return type(value) is int and 1 <= value <= AMOUNT_MINOR_MAX


def _is_currency(value: object) -> bool:
    return isinstance(value, str) and bool(_CURRENCY.fullmatch(value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value).tzinfo)
    except ValueError:
        return False


_BODY_RULES: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("msisdn", _is_msisdn, "invalid_number"),
    ("amountMinor", _is_amount, "invalid_request"),
    ("currency", _is_currency, "invalid_request"),
    ("channel", _is_text, "invalid_request"),
    ("rechargeId", _is_text, "invalid_request"),
    ("requestedAt", _is_time, "invalid_request"),
    ("donorMsisdn", lambda value: value is None or _is_msisdn(value), "invalid_number"),
)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An HTTP answer before the fault has touched it."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def _json_answer(status: int, document: object, **headers: str) -> _Answer:
    body = json.dumps(document).encode()
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return _Answer(status, body, headers=named)


def _error(status: int, code: str, message: str = "", **headers: str) -> _Answer:
    document = {"error": {"code": code, "message": message or code.replace("_", " ")}}
    return _json_answer(status, document, **headers)


def _broken(script: Script) -> _Answer:
    status = script.status or 500
    usual = "unavailable" if status == HTTPStatus.SERVICE_UNAVAILABLE else "internal"
    return _error(status, script.code or usual)


def _answer_before(script: Script) -> _Answer | None:
    """The answer of the faults that answer without doing anything, else None."""
    retry_after = str(max(1, round(script.delay_s or 0)))
    match script.fault:
        case Fault.ERROR_BEFORE:
            return _broken(script)
        case Fault.RATE_LIMITED:
            return _error(429, "rate_limited", Retry_After=retry_after)
        case Fault.SAME_CONTENT:
            return _error(409, "similar_recently", Retry_After=retry_after)
        case Fault.UNAUTHORIZED:
            return _unauthorized()
        case Fault.REDIRECT:
            # Nobody is there: a client that follows it finds out.
            return _Answer(307, b"", headers=(("Location", "/moved/recharges"),))
    return None


def _unauthorized() -> _Answer:
    return _error(401, "unauthorized", WWW_Authenticate="Bearer")


@dataclass(frozen=True, slots=True)
class _Settings:
    """How this sandbox behaves; see `SandboxRechargeApi`."""

    kind: Kind
    seed: int
    fault_rate: float
    faults: tuple[Fault, ...]
    accept: bool
    finish_after_s: float
    lookup_lag_s: float
    replay_window_s: float
    bearer_token_file: Path | None


@dataclass(frozen=True, slots=True)
class _Call:
    """One POST that was read, and what is going to happen to it."""

    number: int
    order: _Order
    script: Script
    #: Set when a hang is over before its time.
    wake: threading.Event


@dataclass(slots=True)
class _Recharge:
    """What the API knows of one recharge: its entries of the book, `called` apart."""

    order: _Order
    call: int
    opened_at: datetime
    history: list[BookEntry] = field(default_factory=list)

    @property
    def reference(self) -> str:
        return f"rch-{self.call:08d}"

    def answer(self) -> _Answer:
        """The final answer if there is one, else how far it got."""
        for entry in self.history:
            if entry.entry == "executed":
                return self._done(201, "succeeded")
            if entry.entry == "rejected":
                return _error(entry.status, entry.code)
        return self._done(202, "accepted") if self.history else _in_progress()

    def found(self, moment: datetime) -> dict[str, str | int] | None:
        """What the look-up shows of it as it was at that moment; None: nothing."""
        seen = [entry.entry for entry in self.history if entry.at <= moment]
        if not seen:
            return None
        status = {"accepted": "pending", "executed": "succeeded"}.get(seen[-1])
        document: dict[str, str | int] = {
            "idempotencyKey": self.order.key,
            "status": status or "failed",
            "reference": self.reference,
            "msisdn": self.order.msisdn,
            "amountMinor": self.order.amount_minor,
            "currency": self.order.currency,
        }
        return document | ({"reversed": True} if seen[-1] == "reversed" else {})

    def _done(self, status: int, word: str) -> _Answer:
        document = {"status": word, "reference": self.reference}
        return _json_answer(status, document | {"idempotencyKey": self.order.key})


def _in_progress() -> _Answer:
    return _error(409, "in_progress", "the first request under this key still runs")


class _Recharges:
    """Takes calls, executes them once or again as its kind says, and remembers.

    All it knows it has from the book: an entry is written first and then applied, and
    at the start the book's entries are applied again.
    """

    def __init__(self, settings: _Settings, book: Path, scripts: Scripts) -> None:
        self._settings = settings
        self._scripts = scripts
        #: The share of recharges that chance spoils, 0 to 1.
        self.fault_rate = settings.fault_rate
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._executions: Counter[str] = Counter()
        self._last_call = 0
        self._by_key: dict[str, list[_Recharge]] = {}
        self._by_call: dict[int, _Recharge] = {}
        #: What ends later: (when, call).
        self._due: list[tuple[datetime, int]] = []
        self._writer = BookWriter(book)
        for entry in Book(book).entries():
            self._apply(entry)

    def close(self) -> None:
        """Stop writing."""
        with self._lock:
            self._writer.close()

    def state(self) -> dict[str, object]:
        """How many calls and executions, in all and by key."""
        with self._lock:
            by_key = {
                key: {"calls": calls, "executions": self._executions[key]}
                for key, calls in self._calls.items()
            }
            calls, executions = self._calls.total(), self._executions.total()
        return {"calls": calls, "executions": executions, "byKey": by_key}

    def refuse(self, key: str, code: str = "") -> None:
        """Write down a call that never became an order; with a code: a definite no."""
        with self._lock:
            number = self._last_call + 1
            self._write(BookEntry(_now(), "called", call=number, key=key))
            if code:
                no = BookEntry(_now(), "rejected", call=number, key=key)
                self._write(_rejected(no, 400, code))

    def take(self, order: _Order) -> _Call:
        """Write down that the order was read, and decide what goes wrong with it."""
        with self._lock:
            script, wake = self._scripts.take("recharge", order.key, order.msisdn)
            script = script or self._random(order.key)
            call = _Call(self._last_call + 1, order, script, wake)
            self._write(_entry("called", call.number, order, script))
        return call

    def carry_out(self, call: _Call, pause: Callable[[float], None]) -> _Answer:
        """Execute the order, unless the kind answers its key from memory."""
        with self._lock:
            if (answer := self._repetition(call.order)) is not None:
                return answer
            recharge = self._open(call.order, call.number, _now())
            if call.script.fault is not Fault.LATE_EXECUTE:
                return self._finish(recharge, call.script)
        pause(call.script.wait_s)
        with self._lock:
            return self._finish(recharge, call.script)

    def look_up(self, key: str) -> _Answer:
        """All recharges of the key, as they were `lookup_lag_s` ago."""
        moment = _now() - timedelta(seconds=self._settings.lookup_lag_s)
        with self._lock:
            recharges = self._by_key.get(key, [])
            found = [f for r in recharges if (f := r.found(moment)) is not None]
        return _json_answer(200, {"recharges": found})

    def note_look_up(self, key: str) -> None:
        """Write down that a look-up was read."""
        with self._lock:
            self._write(BookEntry(_now(), "looked_up", key=key))

    def finish_due(self) -> None:
        """End what was accepted, and take back what is to be, once its time is up."""
        with self._lock:
            while self._due and self._due[0][0] <= _now():
                last = self._by_call[heapq.heappop(self._due)[1]].history[-1]
                if last.due_at is not None:  # Else a run before this one ended it.
                    self._end(last)

    def _repetition(self, order: _Order) -> _Answer | None:
        """What a key that was seen before gets; None: it is executed."""
        seen = self._by_key.get(order.key)
        if not seen or self._settings.kind in {Kind.LOOKUP, Kind.NONE}:
            return None
        if self._settings.kind is Kind.REFUSE:
            return _error(409, "reference_used", "this key was used before")
        first = seen[-1]  # Of this window; those before it are forgotten.
        age_s = (_now() - first.opened_at).total_seconds()
        if age_s > self._settings.replay_window_s:
            return None
        if first.order.content != order.content:
            return _error(409, "key_reused", "this key names another order")
        return first.answer()

    def _finish(self, recharge: _Recharge, script: Script) -> _Answer:
        """Do now what the script says, and say what became of it."""
        entry = _entry("executed", recharge.call, recharge.order, script)
        delay_s = script.delay_s
        if delay_s is None:
            delay_s = self._settings.finish_after_s
        due_at = entry.at + timedelta(seconds=delay_s)
        is_accept = script.fault in {Fault.ACCEPT, Fault.ACCEPT_THEN_FAIL}
        if script.fault is Fault.REJECT:
            entry = _rejected(entry, script.status, script.code)
        elif is_accept or self._settings.accept:
            # With the no that it may end in: a restart forgets the script.
            no = _rejected(entry, script.status, script.code)
            entry = replace(no, entry="accepted", due_at=due_at)
        elif script.fault is Fault.REVERSE_LATER:
            entry = replace(entry, due_at=due_at)
        self._write(replace(entry, reference=recharge.reference))
        return recharge.answer()

    def _end(self, last: BookEntry) -> None:
        end = replace(last, at=_now(), due_at=None, status=0, code="")
        if last.entry == "executed":
            end = replace(end, entry="reversed")
        elif last.fault == Fault.ACCEPT_THEN_FAIL:
            end = _rejected(end, last.status, last.code)
        else:
            delay = timedelta(seconds=self._settings.finish_after_s)
            is_reversed = last.fault == Fault.REVERSE_LATER
            due_at = end.at + delay if is_reversed else None
            end = replace(end, entry="executed", due_at=due_at)
        self._write(end)

    def _random(self, key: str) -> Script:
        return draw(
            key,
            self._calls[key] + 1,
            seed=self._settings.seed,
            fault_rate=self.fault_rate,
            faults=self._settings.faults,
        )

    def _write(self, entry: BookEntry) -> None:
        self._writer.append(entry)
        self._apply(entry)

    def _apply(self, entry: BookEntry) -> None:
        self._last_call = max(self._last_call, entry.call)
        if entry.entry == "called":
            self._calls[entry.key] += 1
            return
        # Without content it was no order: nothing is remembered under its key.
        if not entry.content:
            return
        self._executions[entry.key] += entry.entry == "executed"
        recharge = self._by_call.get(entry.call)
        if recharge is None:
            recharge = self._open(_order(entry), entry.call, entry.at)
        recharge.history.append(entry)
        if entry.due_at is not None:
            heapq.heappush(self._due, (entry.due_at, entry.call))

    def _open(self, order: _Order, call: int, at: datetime) -> _Recharge:
        recharge = _Recharge(order, call, at)
        self._by_key.setdefault(order.key, []).append(recharge)
        self._by_call[call] = recharge
        return recharge


def _now() -> datetime:
    return datetime.now(UTC)


def _entry(entry: Entry, call: int, order: _Order, script: Script) -> BookEntry:
    fault = "" if script.fault is Fault.NONE else script.fault.value
    return BookEntry(_now(), entry, call=call, fault=fault, **asdict(order))


def _rejected(entry: BookEntry, status: int, code: str) -> BookEntry:
    code = code or "not_allowed"
    return replace(entry, entry="rejected", status=status or 422, code=code)


def _order(entry: BookEntry) -> _Order:
    return _Order(**{f.name: getattr(entry, f.name) for f in fields(_Order)})


class _Server(ThreadingHTTPServer):
    """A listening socket and its connections; each can be cut at any time."""

    daemon_threads = True
    # Sixteen pods that come back at once must not be refused by a short queue.
    request_queue_size = 1024

    def __init__(
        self,
        address: tuple[str, int],
        handler: type["_Handler"],
        api: "SandboxRechargeApi",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.api = api
        self._tls = tls
        self._connections: set[_Handler] = set()
        self._connections_lock = threading.Lock()
        self._is_refusing = False
        super().__init__(address, handler)
        self._loop = threading.Thread(
            target=self.serve_forever, args=(_FINISHER_TICK_S,), daemon=True
        )

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        self._loop.start()

    def refuse_connections(self) -> None:
        """Close the listening socket; who is served is served to its end."""
        self._is_refusing = True
        self.shutdown()
        self.server_close()
        self._loop.join()
        for connection in self._open_connections():
            connection.close_soon()

    def stop(self) -> None:
        """Close everything, and wait until no thread is left."""
        self.refuse_connections()
        for connection in self._open_connections():
            connection.cut()
        for connection in self._open_connections():
            connection.thread.join(_STOP_DEADLINE_S)

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept; the TLS handshake is left to the connection's own thread."""
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent when the caller has gone: that is what callers do here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind without the look-up of our own host name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.port

    def enter(self, connection: "_Handler") -> None:
        with self._connections_lock:
            self._connections.add(connection)
        if self._is_refusing:  # It was accepted a moment too late to be closed there.
            connection.cut()

    def leave(self, connection: "_Handler") -> None:
        with self._connections_lock:
            self._connections.discard(connection)

    def _open_connections(self) -> list["_Handler"]:
        with self._connections_lock:
            return list(self._connections)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, writes whole answers, and can be cut."""

    protocol_version = "HTTP/1.1"
    server_version = "sandbox-recharge-api"
    sys_version = ""
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.thread = threading.current_thread()
        self._is_busy = False
        self.server.enter(self)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.leave(self)

    def log_message(self, *_: object) -> None:
        """The book is the log."""

    def close_soon(self) -> None:
        """Close after the answer that is under way, now if there is none."""
        self.close_connection = True
        if not self._is_busy:
            self.cut()

    def cut(self) -> None:
        """Close from outside, whatever the thread is doing."""
        with contextlib.suppress(OSError):
            # Not through TLS: its goodbye would wait for the other side.
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def parse_request(self) -> bool:
        self._is_busy = True
        return super().parse_request()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        finally:
            self._is_busy = False

    def read_body(self) -> bytes:
        """The whole body.

        Raises:
            ConnectionError: the caller went away in the middle of it.
            _InvalidRequestError: no honest length; the rest can't be told apart.

        """
        length = self.headers.get("Content-Length", "0")
        is_length = length.isascii() and length.isdigit()
        is_chunked = "Transfer-Encoding" in self.headers
        if is_chunked or not is_length or int(length) > BODY_BYTES_MAX:
            self.close_connection = True
            raise _InvalidRequestError("invalid_request", "Content-Length, bounded")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the caller went away")
        return body

    def send(self, answer: _Answer) -> None:
        self.wfile.write(self.render(answer))

    def render(self, answer: _Answer) -> bytes:
        """The answer's bytes, whole: faults want to cut and to drip them."""
        phrase = self.responses.get(answer.status, ("", ""))[0]
        headers = [
            ("Date", self.date_time_string()),
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *answer.headers,
        ]
        if self.close_connection:
            headers.append(("Connection", "close"))
        lines = [f"HTTP/1.1 {answer.status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in headers]
        return "\r\n".join([*lines, "", ""]).encode() + answer.body


class _RechargeHandler(_Handler):
    """The API itself, and what the faults do to its answers."""

    def do_POST(self) -> None:
        recharges = self.server.api.recharges
        keys = self.headers.get_all("Idempotency-Key", [])
        # As it came: what breaks the rules is written down, too.
        named = keys[0] if keys else ""
        try:
            body = self.read_body()
            if urlsplit(self.path).path != "/recharges":
                return self.send(_no_such_page())
            if not self._is_authorized():
                recharges.refuse(named)
                return self.send(_unauthorized())
            order = _Order.parse(keys, body)
        except _InvalidRequestError as error:
            recharges.refuse(named, error.args[0])
            return self.send(_error(400, *error.args))
        call = recharges.take(order)
        return self._play(
            call.script, call.wake, lambda: recharges.carry_out(call, self._pause)
        )

    def do_GET(self) -> None:
        recharges, url = self.server.api.recharges, urlsplit(self.path)
        if url.path != "/recharges":
            return self.send(_no_such_page())
        if not self._is_authorized():
            return self.send(_unauthorized())
        if self.server.api.kind in {Kind.REPLAY, Kind.NONE}:
            return self.send(_error(404, "not_found", "this API has no look-up"))
        query = parse_qs(url.query, keep_blank_values=True)
        try:
            key = _valid_key(query.get("idempotencyKey", []))
        except _InvalidRequestError as error:
            return self.send(_error(400, *error.args))
        script, wake = self.server.api.scripts.take("lookup", key)
        recharges.note_look_up(key)
        return self._play(script or UNTOUCHED, wake, lambda: recharges.look_up(key))

    def _is_authorized(self) -> bool:
        token_file = self.server.api.bearer_token_file
        if token_file is None:
            return True
        # Read each time: a rotated token counts at once.
        expected = f"Bearer {token_file.read_text().strip()}".encode()
        given = self.headers.get("Authorization", "").encode()
        return hmac.compare_digest(expected, given)

    def _play(
        self, script: Script, wake: threading.Event, work: Callable[[], _Answer]
    ) -> None:
        """Do the API's work, unless the fault comes before it."""
        if script.fault is Fault.DROP_BEFORE:
            self._drop()
        elif script.fault is Fault.HANG:
            # Whoever begins to hang after the stop has nobody left to wake it.
            self._pause(0)
            wake.wait(script.wait_s)
            self._pause(0)
            self.send(_error(503, "unavailable"))
        elif (answer := _answer_before(script)) is not None:
            self.send(answer)
        else:
            self._let_out(script, work())

    def _let_out(self, script: Script, answer: _Answer) -> None:
        """The work is done; send what the fault leaves of its answer."""
        match script.fault:
            case Fault.EXECUTE_THEN_DROP:
                self._drop()
            case Fault.EXECUTE_THEN_KILL:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(script.pgid, signal.SIGKILL)
                self._drop()
            case Fault.EXECUTE_THEN_LATE:
                self._pause(script.wait_s)
                self.send(answer)
            case Fault.ERROR_AFTER:
                self.send(_broken(script))
            case Fault.GARBAGE:
                self.send(_Answer(200, b"<html>It works!</html>", "text/html"))
            case Fault.HALF_BODY:
                half = (len(answer.body) + 1) // 2
                self.wfile.write(self.render(answer)[:-half])
                self._drop()
            case Fault.DRIP:
                self._drip(self.render(answer), script.wait_s)
            case _:
                self.send(answer)

    def _drip(self, answer: bytes, every_s: float) -> None:
        for byte in answer:
            self.wfile.write(bytes([byte]))
            self._pause(every_s)

    def _drop(self) -> None:
        self.close_connection = True

    def _pause(self, seconds: float) -> None:
        if self.server.api.stopping.wait(seconds):
            raise ConnectionAbortedError("the sandbox stops")


def _no_such_page() -> _Answer:
    # Without an error document: it says nothing about an order.
    return _Answer(404, b"no such page\n", "text/plain")


class _ControlHandler(_Handler):
    """The remote control of the sandbox; no part of the recharge API."""

    def do_GET(self) -> None:
        api = self.server.api
        match self.path:
            case "/faults":
                self.send(_json_answer(200, [asdict(s) for s in api.faults()]))
            case "/book":
                entries = [entry.to_json() for entry in api.book.entries()]
                self.send(_json_answer(200, entries))
            case "/state":
                self.send(_json_answer(200, api.state()))
            case _:
                self.send(_no_such_page())

    def do_POST(self) -> None:
        try:
            document = json.loads(self.read_body())
            match self.path:
                case "/faults":
                    self.server.api.add_faults(*map(Script.from_json, document))
                case "/outage":
                    self.server.api.outage(float(document["seconds"]))
                case "/chance":
                    self.server.api.spoil_by_chance(float(document["rate"]))
                case _:
                    return self.send(_no_such_page())
        except (_InvalidRequestError, ValueError, TypeError, KeyError) as error:
            return self.send(_error(400, "invalid_request", repr(error)))
        return self.send(_Answer(204, b""))

    def do_DELETE(self) -> None:
        if self.path != "/faults":
            return self.send(_no_such_page())
        self.server.api.clear_faults()
        return self.send(_Answer(204, b""))


class SandboxRechargeApi:
    """The sandbox recharge API in this process; a context manager.

    Started again, on the same object or on another with the same port and book, it
    remembers what it executed and ends what it accepted. Scripts live as long as the
    object. All methods may be called from any thread.

    Args:
        kind: what it does with a repeated key.
        book: the JSONL file of its book; made if it isn't there.
        host: the address of both ports.
        port: of the API; 0: a free one, the same at every start of this object.
        control_port: of the control; 0 likewise.
        seed: of the random faults; the same seed, key and attempt: the same fault.
        fault_rate: the share of recharges that chance spoils, 0 to 1.
        faults: what chance picks from.
        accept: whether every recharge is answered 202 and executed later.
        finish_after_s: seconds until an accepted recharge ends.
        lookup_lag_s: seconds that the look-up is behind.
        replay_window_s: seconds that kind replay remembers a key.
        bearer_token_file: the token that callers must show; None: none.
        tls_cert: PEM chain of the API's port; None: no TLS. The control has none.
        tls_key: PEM key of `tls_cert`.

    Raises:
        ValueError: an unknown kind or fault, or a fault that chance can't play.

    """

    def __init__(
        self,
        *,
        kind: Kind | str,
        book: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        control_port: int = 0,
        seed: int = 0,
        fault_rate: float = 0.0,
        faults: Sequence[Fault | str] = RANDOM_FAULTS,
        accept: bool = False,
        finish_after_s: float = 1.0,
        lookup_lag_s: float = 0.0,
        replay_window_s: float = 86400.0,
        bearer_token_file: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._settings = _Settings(
            kind=Kind(kind),
            seed=seed,
            fault_rate=fault_rate,
            # Through Script, which refuses what needs more than a name.
            faults=tuple(Script(Fault(fault)).fault for fault in faults),
            accept=accept,
            finish_after_s=finish_after_s,
            lookup_lag_s=lookup_lag_s,
            replay_window_s=replay_window_s,
            bearer_token_file=bearer_token_file,
        )
        #: What was called and executed; may be read at any time.
        self.book = Book(book)
        self.host, self.port, self.control_port = host, port, control_port
        self._tls = _tls_context(tls_cert, tls_key)
        self.scripts = Scripts()
        self.stopping = threading.Event()
        self._listening_lock = threading.Lock()
        self._front: _Server | None = None
        #: To be stopped: the control, the front, and the fronts of before an outage,
        #: whose last answers may still be under way.
        self._servers: list[_Server] = []
        #: Keeps the port ours while it refuses connections.
        self._placeholder: socket.socket | None = None
        self._outage_end: threading.Timer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address of the API, without a path."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{self.host}:{self.port}"

    @property
    def control_url(self) -> str:
        """The address of the control."""
        return f"http://{self.host}:{self.control_port}"

    @property
    def kind(self) -> Kind:
        """What it does with a repeated key."""
        return self._settings.kind

    @property
    def bearer_token_file(self) -> Path | None:
        """The token that callers must show."""
        return self._settings.bearer_token_file

    def start(self) -> None:
        """Read the book and listen; on return both ports answer.

        Raises:
            OSError: a port is taken, or the book can't be written.
            ValueError: the book is unreadable.

        """
        self.stopping.clear()
        self.recharges = _Recharges(self._settings, self.book.path, self.scripts)
        self._finisher = threading.Thread(target=self._finish_due, daemon=True)
        self._finisher.start()
        try:
            control = _Server((self.host, self.control_port), _ControlHandler, self)
            self.control_port = self._begin(control)
            self._listen()
        except OSError:
            self.stop()
            raise

    def stop(self) -> None:
        """Cut every connection and refuse new ones; on return no thread is left.

        What was late is not executed; what was accepted is, after the next start.
        """
        self.stopping.set()
        with self._listening_lock:
            self._refuse()
            self._drop_placeholder()
            if self._outage_end is not None:
                self._outage_end.cancel()
        if self._outage_end is not None:
            self._outage_end.join()
        # Hangs wait for this; what they answer, nobody reads any more.
        self.scripts.wake()
        while self._servers:
            self._servers.pop().stop()
        self._finisher.join()
        self.recharges.close()

    def add_faults(self, *scripts: Script) -> None:
        """Append scripts; of all that match a request the first one is used."""
        self.scripts.add(scripts)

    def clear_faults(self) -> None:
        """Forget all scripts, and wake every request that hangs."""
        self.scripts.clear()

    def spoil_by_chance(self, rate: float) -> None:
        """Spoil this share of recharges from now on, until the next start; 0 to 1."""
        self.recharges.fault_rate = rate

    def faults(self) -> list[Script]:
        """The scripts that are left."""
        return self.scripts.left()

    def state(self) -> dict[str, object]:
        """Counts: `calls`, `executions`, and both in `byKey`."""
        return self.recharges.state()

    def outage(self, seconds: float) -> None:
        """Refuse connections from now on, for so many seconds (0: end it now).

        Idle connections are closed; an answer under way is still given.
        """
        with self._listening_lock:
            if self._outage_end is not None:
                self._outage_end.cancel()
            self._refuse()
            self._outage_end = threading.Timer(seconds, self._listen)
            self._outage_end.daemon = True
            self._outage_end.start()

    def _listen(self) -> None:
        with self._listening_lock:
            if self._front is not None or self.stopping.is_set():
                return
            address = (self.host, self.port)
            self._front = _Server(address, _RechargeHandler, self, self._tls)
            self.port = self._begin(self._front)
            self._drop_placeholder()

    def _begin(self, server: _Server) -> int:
        self._servers.append(server)
        server.start()
        return server.port

    def _refuse(self) -> None:
        if self._front is None:
            return
        self._front.refuse_connections()
        self._front = None
        # Bound and not listening: the kernel refuses, and nobody else gets the port.
        self._placeholder = socket.socket()
        self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._placeholder.bind((self.host, self.port))

    def _drop_placeholder(self) -> None:
        if self._placeholder is not None:
            self._placeholder.close()
            self._placeholder = None

    def _finish_due(self) -> None:
        while not self.stopping.wait(_FINISHER_TICK_S):
            self.recharges.finish_due()


def _tls_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.recharge_api", description="The sandbox recharge API."
    )
    add = parser.add_argument
    add("--kind", choices=[kind.value for kind in Kind], required=True)
    add("--book", type=Path, required=True, help="JSONL file, appended to")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0)
    add("--control-port", type=int, default=0)
    add("--port-file", type=Path, help="gets the port and, below it, the control's URL")
    add("--seed", type=int, default=0)
    add("--fault-rate", type=float, default=0.0, help="0 to 1")
    add("--faults", default=",".join(RANDOM_FAULTS), help="what chance picks from")
    add("--accept", action="store_true", help="answer 202, execute later")
    add("--finish-after-s", type=float, default=1.0)
    add("--lookup-lag-s", type=float, default=0.0)
    add("--replay-window-s", type=float, default=86400.0)
    add("--bearer-token-file", type=Path)
    add("--tls-cert", type=Path)
    add("--tls-key", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    options = vars(_arguments().parse_args(arguments))
    port_file: Path | None = options.pop("port_file")
    options["faults"] = options["faults"].split(",")
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    with SandboxRechargeApi(**options) as api:
        if port_file is not None:
            unfinished = port_file.with_name(port_file.name + ".new")
            unfinished.write_text(f"{api.port}\n{api.control_url}\n")
            unfinished.replace(port_file)
        print(f"recharge-api listening on {api.url}", flush=True)
        print(f"recharge-api control on {api.control_url}", flush=True)
        is_over.wait()


if __name__ == "__main__":
    main()
