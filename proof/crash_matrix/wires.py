"""The sockets of whoever is to die, with us in the middle: what passes, and who dies.

Owns the taps (a port that passes everything on to another), the reading of what passes,
and the trigger that kills at one moment. It must never change a byte, nor pass one on
after the kill but the call that was on its way already: what a dead process may have
done in the instant before the signal reached it must not be seen by anybody.

    source ── FrontWire ──> the victim ── DatabaseWire ──> MariaDB, without TLS here
                                 └─────── ApiWire ───────> the sandbox recharge API
"""

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum, auto
from threading import Thread
from typing import Any, Final, Protocol, Self, TypeVar

from demo.server_process import LOOPBACK
from proof.crash_matrix.cells import Moment

T = TypeVar("T")

#: The names of the two orders of the subscriber, as they stand in every statement.
FIRST: Final = "first"
SECOND: Final = "second"

_PIECE_BYTES: Final = 64 * 1024
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
#: MySQL's protocol: three bytes of length, one of sequence, the command's byte.
_PACKET_HEADER_BYTES: Final = 4
_QUERY: Final = 3
#: For what the loop's thread does for another.
_LOOP_TIMEOUT_S: Final = 30.0


class Act(Enum):
    """What to do with a piece that came by."""

    PASS = auto()
    #: The victim dies, and nobody gets the piece.
    KILL = auto()
    #: The receiver has it when the victim dies.
    PASS_THEN_KILL = auto()
    #: The receiver gets it from a dead sender.
    KILL_THEN_PASS = auto()


class Trigger:
    """Springs once, at one moment; lives in the loop's thread.

    Args:
        moment: when.

    """

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._kill: Callable[[], None] | None = None
        self._is_due = False
        #: From then on nothing more of the victim passes any wire.
        self.is_sprung = False
        #: Calls to recharge that were begun; only the first one's moments count.
        self.calls = 0

    def springs_at(self, moment: Moment | None) -> bool:
        """Whether this is the moment."""
        if moment is not self._moment or self.is_sprung:
            return False
        self.is_sprung = True
        return True

    def aim(self, kill: Callable[[], None]) -> None:
        """Be told how to send SIGKILL to the victim's group, from any thread."""
        self._kill = kill
        if self._is_due:
            # It came to the moment before its start had returned.
            kill()

    def kill(self) -> None:
        """End the victim."""
        self._is_due = True
        if self._kill is not None:
            self._kill()


class Wire(Protocol):
    """One connection, as it is watched; pieces come in order, an empty one ends."""

    def opened(self) -> Act:
        """Say what the connection means before the other side is connected to."""

    def asked(self, piece: bytes) -> Act:
        """Judge what comes from whoever opened it."""

    def answered(self, piece: bytes) -> Act:
        """Judge what comes back."""


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A statement of interest, and the moments before, at and after its execution."""

    before: Moment | None = None
    executed: Moment | None = None
    told: Moment | None = None


_CLAIM: Final = _Step(Moment.CLAIM_UNSENT, Moment.CLAIM_SENT, Moment.CLAIM_COMMITTED)
_NEXT_CLAIM: Final = _Step(Moment.BETWEEN_HELD)
_SETTLEMENT: Final = _Step(
    Moment.SETTLEMENT_UNSENT, Moment.SETTLEMENT_SENT, Moment.SETTLEMENT_COMMITTED
)
#: In a transaction: what counts is the COMMIT.
_OPEN_SETTLEMENT: Final = _Step(Moment.SETTLEMENT_UNSENT)
_SETTLEMENT_COMMIT: Final = _Step(
    Moment.SETTLEMENT_UNCOMMITTED, Moment.SETTLEMENT_SENT, Moment.SETTLEMENT_COMMITTED
)
_VERDICT: Final = _Step()
_VERDICT_COMMIT: Final = _Step(executed=Moment.VERDICT_SENT)
_COMMIT_OF: Final = {_OPEN_SETTLEMENT: _SETTLEMENT_COMMIT, _VERDICT: _VERDICT_COMMIT}
_NOTHING: Final = _Step()


class DatabaseWire:
    """The database's socket: each statement, and whether it was executed and told."""

    def __init__(self, trigger: Trigger) -> None:
        self._trigger = trigger
        self._packet = b""
        self._awaited: _Step | None = None
        #: What the open transaction will have done when it is committed.
        self._open: _Step | None = None
        self._is_in_transaction = False

    def opened(self) -> Act:
        """Mean nothing: a pool connects when it likes."""
        return Act.PASS

    def asked(self, piece: bytes) -> Act:
        """Read the statement; kill before the server has the whole of it."""
        self._packet += piece
        statement = _statement(self._packet)
        if statement is None:
            return Act.PASS
        self._packet = b""
        self._awaited = step = self._step_of(statement)
        return Act.KILL if self._trigger.springs_at(step.before) else Act.PASS

    def answered(self, piece: bytes) -> Act:
        """Kill once the server has executed it, with or without the answer."""
        step, self._awaited = self._awaited, None
        if step is None or not piece:
            return Act.PASS
        if self._trigger.springs_at(step.executed):
            return Act.KILL
        if self._trigger.springs_at(step.told):
            return Act.PASS_THEN_KILL
        return Act.PASS

    def _step_of(self, statement: str) -> _Step:
        if statement.startswith("BEGIN"):
            self._is_in_transaction, self._open = True, None
            return _NOTHING
        if statement.startswith("COMMIT"):
            self._is_in_transaction = False
            return _COMMIT_OF.get(self._open or _NOTHING, _NOTHING)
        step = _step_of(statement, is_open=self._is_in_transaction)
        if step is not _NOTHING:
            self._open = step
        return step


def _step_of(statement: str, *, is_open: bool) -> _Step:
    """Which step of the claim protocol a statement is."""
    is_write = statement.startswith(("INSERT INTO topup ", "UPDATE topup SET status"))
    what, _, where = statement.partition("WHERE")
    if is_write and "lease_until" in what:
        return _NEXT_CLAIM if f":{SECOND}'" in statement else _CLAIM
    if not statement.startswith("UPDATE topup") or f":{FIRST}'" not in where:
        return _NOTHING
    if ".status = 'in_flight'" in where and "lease_until <" not in where:
        return _OPEN_SETTLEMENT if is_open else _SETTLEMENT
    is_final = "status='succeeded'" in what or "status='rejected'" in what
    return _VERDICT if is_final and is_open else _NOTHING


def _statement(packet: bytes) -> str | None:
    """The text of a whole query packet, "" for any other one, None: more must come."""
    if len(packet) < _PACKET_HEADER_BYTES:
        return None
    length = int.from_bytes(packet[:3], "little")
    if len(packet) < _PACKET_HEADER_BYTES + length:
        return None
    command = packet[_PACKET_HEADER_BYTES:]
    # A sequence that does not begin at 0 belongs to the log-in.
    if packet[3] or not command or command[0] != _QUERY:
        return ""
    return command[1:].decode("utf-8", "replace")


class ApiWire:
    """The recharge API's socket: the first call, and every look-up.

    Args:
        trigger: of the cell.
        has_executed: whether the API's book has an execution by now.

    """

    def __init__(self, trigger: Trigger, has_executed: Callable[[], bool]) -> None:
        self._trigger = trigger
        self._has_executed = has_executed
        self._request = b""
        self._answer = b""
        #: What is asked for now, once it is known.
        self._is_call = False
        self._is_look_up = False

    def opened(self) -> Act:
        """Kill before a byte of the call."""
        is_now = self._trigger.springs_at(Moment.CALL_UNSENT)
        return Act.KILL if is_now else Act.PASS

    def asked(self, piece: bytes) -> Act:
        """Kill with the whole request in hand."""
        self._request += piece
        if not piece or not _is_whole(self._request):
            return Act.PASS
        is_post = self._request.startswith(b"POST")
        self._request = self._answer = b""
        self._trigger.calls += is_post
        self._is_call = is_post and self._trigger.calls == 1
        self._is_look_up = not is_post
        if self._is_call and self._trigger.springs_at(Moment.CALL_SENT):
            return Act.KILL_THEN_PASS
        if self._is_look_up and self._trigger.springs_at(Moment.LOOK_UP_UNSENT):
            return Act.KILL
        return Act.PASS

    def answered(self, piece: bytes) -> Act:
        """Kill before anything of the answer, or after all of it."""
        if not self._answer and self._is_at_its_end():
            return Act.KILL
        self._answer += piece
        if not _is_whole(self._answer):
            return Act.PASS
        told = Moment.LOOK_UP_ANSWERED if self._is_look_up else Moment.ANSWER_ARRIVED
        is_asked = self._is_call or self._is_look_up
        if is_asked and self._trigger.springs_at(told):
            return Act.PASS_THEN_KILL
        return Act.PASS

    def _is_at_its_end(self) -> bool:
        """Whether the API has done what it was asked for, at the armed moment."""
        if self._is_look_up:
            return self._trigger.springs_at(Moment.LOOK_UP_SENT)
        is_done = self._is_call and self._has_executed()
        return is_done and self._trigger.springs_at(Moment.API_EXECUTED)


class FrontWire:
    """The pod's own socket: the request and the response."""

    def __init__(self, trigger: Trigger) -> None:
        self._trigger = trigger
        self._request = b""
        self._response = b""

    def opened(self) -> Act:
        """Mean nothing."""
        return Act.PASS

    def asked(self, piece: bytes) -> Act:
        """Kill when the pod has the whole request."""
        self._request += piece
        if not _is_whole(self._request):
            return Act.PASS
        is_now = self._trigger.springs_at(Moment.REQUEST_READ)
        return Act.PASS_THEN_KILL if is_now else Act.PASS

    def answered(self, piece: bytes) -> Act:
        """Kill before the source has anything of the response, or when it has all."""
        if piece and self._trigger.springs_at(Moment.RESPONSE_LOST):
            return Act.KILL
        self._response += piece
        is_now = _is_whole(self._response) and self._trigger.springs_at(
            Moment.RESPONSE_WRITTEN
        )
        return Act.PASS_THEN_KILL if is_now else Act.PASS


def _is_whole(message: bytes) -> bool:
    """Whether an HTTP message with Content-Length, or without a body, is all there."""
    head, end, body = message.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


class Tap:
    """A port of 127.0.0.1 that passes everything on to another one.

    Args:
        trigger: of the cell.
        port: where it is passed on to.
        wire: makes the watcher of one connection.

    """

    def __init__(self, trigger: Trigger, port: int, wire: Callable[[], Wire]) -> None:
        self._trigger = trigger
        self._upstream_port = port
        self._wire = wire
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._server is None:
            raise RuntimeError("the tap is closed")
        return int(self._server.sockets[0].getsockname()[1])

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, LOOPBACK)

    async def close(self) -> None:
        """Listen no more, and cut every connection."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(
        self, near: asyncio.StreamReader, near_writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
        wire = self._wire()
        try:
            if self._trigger.is_sprung:
                return
            if wire.opened() is Act.KILL:
                self._trigger.kill()
                # Whoever is on the other side has gone when this ends.
                await near.read()
                return
            far, far_writer = await asyncio.open_connection(
                LOOPBACK, self._upstream_port
            )
            try:
                await asyncio.gather(
                    self._pump(near, far_writer, wire.asked),
                    self._pump(far, near_writer, wire.answered),
                )
            finally:
                far_writer.close()
        except (OSError, asyncio.CancelledError):
            # The one or the other has gone, or the tap is closed: so do we.
            return
        finally:
            near_writer.close()
            if task is not None:
                self._connections.discard(task)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        judge: Callable[[bytes], Act],
    ) -> None:
        piece = b"-"
        while piece:
            try:
                piece = await reader.read(_PIECE_BYTES)
            except ConnectionError:
                piece = b""
            if self._trigger.is_sprung:
                continue
            act = judge(piece)
            if act in {Act.KILL, Act.KILL_THEN_PASS}:
                self._trigger.kill()
            if act is not Act.KILL and piece:
                with contextlib.suppress(ConnectionError):
                    writer.write(piece)
                    await writer.drain()
            if act is Act.PASS_THEN_KILL:
                self._trigger.kill()
        writer.close()


class Loop:
    """The thread in which every tap of every cell lives; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="taps", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LOOP_TIMEOUT_S)
        self._loop.close()

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do it there, and wait for it."""
        done = asyncio.run_coroutine_threadsafe(what, self._loop)
        return done.result(_LOOP_TIMEOUT_S)
