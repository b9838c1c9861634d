"""A recharge API that is hostile at the level of bytes, and its own book.

Owns the sockets and what the API knows: which orders it executed, and what it meant by
each answer. The bytes are drawn in hostile_answers.py; must never look at the ledger.
"""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

from demo.server_process import LOOPBACK
from proof.hostile_answers import (
    Answer,
    Meaning,
    Said,
    Then,
    draw_meaning,
    dress,
    plain,
    say,
)

_HEAD_END: Final = b"\r\n\r\n"
_KEY: Final = re.compile(
    rb"^idempotency-key: *([!-~]+)\r$", re.IGNORECASE | re.MULTILINE
)
_LENGTH: Final = re.compile(
    rb"^content-length: *([0-9]+)\r$", re.IGNORECASE | re.MULTILINE
)
#: Every so many calls one is answered as it should be.
_CALM_EACH: Final = 3
#: A connection on which nothing comes for so long is left, in seconds.
_IDLE_S: Final = 30.0
#: A request that comes sooner after late bytes was under way already, in seconds.
_RACE_S: Final = 0.05
#: A reset instead of an end: linger for no time.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Call:
    """What one request for a recharge was, and what was answered."""

    meaning: Meaning
    is_executed: bool
    #: The reference of the execution; no other order has it.
    reference: str
    dressing: str


@dataclass(slots=True)
class Book:
    """What the API knows, by idempotency key."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    #: Keys whose request crossed late bytes of the answer before: whose answer it then
    #: reads nobody can know.
    raced: set[str] = field(default_factory=set)
    dressings: Counter[str] = field(default_factory=Counter)
    look_ups: int = 0
    #: Requests that are no request: never seen from an honest client.
    unreadable: int = 0


class HostileApi:
    """Listens until it is closed; a context manager.

    Args:
        seed: of what it draws; connections draw in the order in which they come.

    """

    def __init__(self, seed: int) -> None:
        self.book = Book()
        self._seed = seed
        self._connections = 0
        self._references = 0
        self._calls = 0
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((LOOPBACK, 0), backlog=128)
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="hostile", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections += 1
                random = Random(f"{self._seed}:{self._connections}")  # noqa: S311
                self._open.add(connection)
            threading.Thread(
                target=self._serve, args=(connection, random), daemon=True
            ).start()

    def _serve(self, connection: socket.socket, random: Random) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_IDLE_S)
        try:
            _Conversation(self, connection, random).hold()
        except OSError:
            # The other side has gone, which is its right.
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def reference(self) -> str:
        """One that no other execution has."""
        with self._lock:
            self._references += 1
            return f"ref-{self._references:06}"

    def is_calm(self) -> bool:
        """Whether this answer must be plain: every third.

        The client's circuit breaker would else be open, and little be asked.
        """
        with self._lock:
            self._calls += 1
            return self._calls % _CALM_EACH == 0

    def note(self, key: str, call: Call, *, is_raced: bool) -> None:
        """Write a call into the book, before it is answered."""
        with self._lock:
            self.book.calls[key].append(call)
            self.book.dressings[call.dressing] += 1
            if is_raced:
                self.book.raced.add(key)

    def note_look_up(self, key: str, answer: Answer, *, is_raced: bool) -> None:
        """Count a look-up."""
        with self._lock:
            self.book.look_ups += 1
            self.book.dressings[answer.name] += 1
            if is_raced:
                self.book.raced.add(key)

    def note_unreadable(self) -> None:
        """Count what is no request."""
        with self._lock:
            self.book.unreadable += 1

    def executed(self, key: str) -> list[Call]:
        """Every execution of an order."""
        with self._lock:
            return [call for call in self.book.calls[key] if call.is_executed]


class _Conversation:
    """One connection, request by request."""

    def __init__(
        self, api: HostileApi, connection: socket.socket, random: Random
    ) -> None:
        self._api = api
        self._connection = connection
        self._random = random
        self._read = b""
        #: When bytes were sent that nobody had asked for, by the monotonic clock.
        self._late_at = -_RACE_S

    def hold(self) -> None:
        """Answer until one side ends it."""
        while True:
            head = self._until(_HEAD_END)
            if head is None:
                return
            is_raced = time.monotonic() - self._late_at < _RACE_S
            key = _KEY.search(head)
            if head.startswith(b"GET "):
                answer = self._look_up(head, is_raced=is_raced)
            elif key:
                answer = self._recharge(key[1].decode("ascii"), is_raced=is_raced)
            else:
                self._api.note_unreadable()
                return
            length = _LENGTH.search(head)
            if not answer.is_early and not self._skip(length):
                return
            self._send(answer)
            if answer.is_early and not self._skip(length):
                return
            if answer.then is Then.RESET:
                linger = socket.SO_LINGER
                self._connection.setsockopt(socket.SOL_SOCKET, linger, _NO_LINGER)
            if answer.then is not Then.KEEP:
                return

    def _recharge(self, key: str, *, is_raced: bool) -> Answer:
        """Do, or not, and note it; the answer may be lost, what was done is not."""
        meaning, is_executed = draw_meaning(self._random)
        is_calm = self._api.is_calm()
        if is_calm:
            meaning, is_executed = Meaning.EXECUTED, True
        reference = self._api.reference()
        said = say(meaning, reference, self._foreign(), self._random)
        answer = plain(said) if is_calm else dress(said, self._random)
        call = Call(meaning, is_executed, reference, answer.name)
        self._api.note(key, call, is_raced=is_raced)
        return answer

    def _look_up(self, head: bytes, *, is_raced: bool) -> Answer:
        target = head.split(b" ", 2)[1].decode("ascii")
        (key,) = parse_qs(urlsplit(target).query)["idempotencyKey"]
        rows = [
            {
                "idempotencyKey": key,
                "status": "succeeded",
                "reference": call.reference,
            }
            for call in self._api.executed(key)
        ]
        body = json.dumps({"recharges": rows}).encode()
        answer = dress(Said(200, body, self._foreign()), self._random)
        self._api.note_look_up(key, answer, is_raced=is_raced)
        return answer

    def _foreign(self) -> bytes:
        """A whole answer that belongs to another request: of either kind."""
        bodies = (
            b'{"status": "succeeded", "reference": "foreign"}',
            b'{"error": {"code": "foreign", "message": "no"}}',
            b'{"recharges": []}',
        )
        number = self._random.randrange(len(bodies))
        return Said((201, 422, 200)[number], bodies[number], b"").whole()

    def _send(self, answer: Answer) -> None:
        sent_any = False
        for pause_s, data in answer.pieces:
            if pause_s and self._api._is_closing.wait(pause_s):  # noqa: SLF001
                return
            is_late = sent_any and answer.name == "late answer"
            if is_late and self._is_asked():
                # It would come as the answer to that request: nobody could tell.
                return
            self._connection.sendall(data)
            if is_late:
                self._late_at = time.monotonic()
            sent_any = True

    def _is_asked(self) -> bool:
        """Whether the next request is there already."""
        try:
            self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def _until(self, end: bytes) -> bytes | None:
        while end not in self._read:
            more = self._connection.recv(65536)
            if not more:
                return None
            self._read += more
        head, _, self._read = self._read.partition(end)
        return head + b"\r\n"

    def _skip(self, length: re.Match[bytes] | None) -> bool:
        """Read a request's body; whether it came whole."""
        left = int(length[1]) if length else 0
        while len(self._read) < left:
            more = self._connection.recv(65536)
            if not more:
                return False
            self._read += more
        self._read = self._read[left:]
        return True
