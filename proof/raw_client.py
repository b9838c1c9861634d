"""A client that writes what no library would, and reads what comes back.

Owns the socket and the reading of answers; must never judge what they say, nor wait
without a limit.
"""

import contextlib
import re
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Final, Self

from demo.server_process import LOOPBACK

#: A server that has neither answered nor closed by then holds on to its client. Above
#: what the function allows a head that stalls, on a busy machine.
PATIENCE_S: Final = 20.0
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: [^\r\n]*)?")
_CONTINUE: Final = 100
_PIECE_BYTES: Final = 65536
#: More than any answer has.
_HEAD_BYTES_MAX: Final = 65536


class UnreadableAnswer(Exception):
    """What came is no HTTP answer, or not one alone."""


class Silent(Exception):
    """The server has neither answered nor closed within `PATIENCE_S`."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    #: By lower-case name.
    headers: dict[str, str]
    body: bytes
    #: As it came, head and body.
    raw: bytes = field(repr=False)

    @property
    def closes(self) -> bool:
        """Whether it says that nothing else will be answered on this connection."""
        return self.headers.get("connection", "").lower() == "close"


class Connection:
    """One connection to a server on this machine; a context manager."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), PATIENCE_S)
        # Pieces are to arrive as pieces.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, pieces: tuple[bytes, ...], pause_s: float = 0.0) -> None:
        """Write the pieces with a pause between; no effect where nobody reads."""
        # It may be answered, and closed, before it was read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for index, piece in enumerate(pieces):
                if index:
                    time.sleep(pause_s)
                self._socket.sendall(piece)

    def end(self) -> None:
        """Say that nothing else will be sent; answers can still be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def vanish(self) -> None:
        """Reset the connection, as the kernel does for a client that was killed."""
        linger = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._socket.close()

    def answer(self, *, has_body: bool = True) -> Answer | None:
        """Read the next answer; None if the connection was closed instead.

        Args:
            has_body: False for the answer to HEAD, which announces one only.

        Raises:
            UnreadableAnswer: what came is none.
            Silent: nothing came in time.

        """
        end_s = time.monotonic() + PATIENCE_S
        while True:
            head = self._head(end_s)
            if head is None:
                return None
            found = self._parsed(head, end_s, has_body=has_body)
            if found.status != _CONTINUE:
                return found

    def is_closed(self) -> bool:
        """Whether the server closes the connection, and says nothing else before.

        Raises:
            Silent: it does not.

        """
        return not self._read and not self._more(time.monotonic() + PATIENCE_S)

    def _head(self, end_s: float) -> bytes | None:
        while b"\r\n\r\n" not in self._read:
            if len(self._read) > _HEAD_BYTES_MAX:
                raise UnreadableAnswer("the head of the answer has no end")
            if not self._more(end_s):
                if self._read:
                    raise UnreadableAnswer("the head of the answer is cut")
                return None
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        return head

    def _parsed(self, head: bytes, end_s: float, *, has_body: bool) -> Answer:
        first, *lines = head.split(b"\r\n")
        status = _STATUS_LINE.fullmatch(first)
        if status is None or any(b":" not in line for line in lines):
            raise UnreadableAnswer("the head of the answer is not HTTP")
        pairs = [line.decode("latin-1").split(":", 1) for line in lines]
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        announced = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not announced.isdigit():
            raise UnreadableAnswer("the answer does not say how long it is")
        length = int(announced) if has_body else 0
        while len(self._read) < length:
            if not self._more(end_s):
                raise UnreadableAnswer("the body of the answer is cut")
        body, self._read = self._read[:length], self._read[length:]
        return Answer(int(status[1]), headers, body, head + b"\r\n\r\n" + body)

    def _more(self, end_s: float) -> bool:
        self._socket.settimeout(max(0.001, end_s - time.monotonic()))
        try:
            data = self._socket.recv(_PIECE_BYTES)
        except TimeoutError:
            raise Silent("neither answered nor closed") from None
        except ConnectionResetError:
            return False
        finally:
            self._socket.settimeout(PATIENCE_S)
        self._read += data
        return bool(data)
