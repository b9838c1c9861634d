"""Where an answer begins and ends: HTTP/1.1 as strictly as money wants it.

http.client forgives much: it takes an interim answer (1xx other than 100) for the final
one, reads numbers with signs, believes one of two lengths, and throws away in silence
what stands behind an answer. Each of these can give one order the answer of another.
Here an answer whose beginning or end is not certain is an error.
"""

import contextlib
import re
import ssl
from http import client as http_client
from typing import Any, Final

from urllib3.util.response import assert_header_parsing

#: All heads before a body, the interim ones too. A longer one is an error.
HEAD_BYTES_MAX: Final = 64 * 1024
#: http.client would also take signs, `0x` and `_`.
_LENGTH: Final = re.compile(r"[0-9]{1,15}")
_CHUNK_LENGTH: Final = re.compile(rb"([0-9a-fA-F]{1,15})\s*(;.*)?\r?\n")


class UncertainAnswer(http_client.HTTPException):
    """It is not certain where the answer begins or ends, or whose it is."""


class FinalAnswer(http_client.HTTPResponse):
    """http.client's answer, that begins at the final head and ends at its end.

    RFC 9110 section 15.2: a client must be able to read interim answers before the
    final one, even if it does not expect them.
    """

    _is_given_up = False

    def begin(self) -> None:
        """Read the head of the final answer.

        Raises:
            UncertainAnswer: there is none within the bounds, or its length can be read
                in two ways.

        """
        stream = self.fp
        self.fp = _Head(stream)  # type: ignore[assignment]
        try:
            super().begin()
            while 100 <= self.status < 200:  # noqa: PLR2004
                if self.status == http_client.SWITCHING_PROTOCOLS:
                    # Nobody asked for it; what follows is no HTTP.
                    raise UncertainAnswer
                # Forgotten, so that the next head is read.
                self.headers = self.msg = None  # type: ignore[assignment]
                super().begin()
        finally:
            # http.client has closed and forgotten it if the status line is none.
            if self.fp is not None:
                self.fp = stream
        assert_header_parsing(self.headers)
        self._require_one_length()

    def _require_one_length(self) -> None:
        """RFC 9112 section 6.3: two lengths may be a smuggled answer."""
        coding = self.headers.get_all("transfer-encoding", [])
        lengths = self.headers.get_all("content-length", [])
        if coding and ([each.strip().lower() for each in coding] != ["chunked"]):
            raise UncertainAnswer
        if len(lengths) + len(coding) > 1:
            raise UncertainAnswer
        if not all(_LENGTH.fullmatch(each) for each in lengths):
            raise UncertainAnswer

    def _read_next_chunk_size(self) -> int:
        """A chunk's length; a negative one would be read to the end, unbounded."""
        found = _CHUNK_LENGTH.fullmatch(self.fp.readline(HEAD_BYTES_MAX))
        if found is None:
            raise UncertainAnswer
        return int(found[1], 16)

    def close(self) -> None:
        """Give up what is unread; the connection can't be used again."""
        self._is_given_up = True
        super().close()

    def _close_conn(self) -> None:
        """Look at what stands behind the answer, before the buffer is thrown away."""
        is_framed = self.chunked is True or isinstance(self.length, int)
        is_surplus = is_framed and not self._is_given_up and _has_more(self.fp)
        super()._close_conn()  # type: ignore[misc]
        if is_surplus:
            raise UncertainAnswer


class _Head:
    """A stream whose lines are read up to `HEAD_BYTES_MAX` in all."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = HEAD_BYTES_MAX

    def readline(self, limit: int) -> bytes:
        line: bytes = self._stream.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise UncertainAnswer
        return line

    def close(self) -> None:
        self._stream.close()

    def flush(self) -> None:
        """Closing an answer flushes it; there is nothing to flush."""


def _has_more(stream: Any) -> bool:
    """Whether a buffered socket holds anything unread; never waits."""
    connection = stream.raw._sock  # noqa: SLF001 # socket.makefile's own.
    timeout = connection.gettimeout()
    try:
        connection.settimeout(0)
        return bool(stream.peek(1))
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    # Broken behind the answer: nothing more can come, and nobody uses it again.
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            connection.settimeout(timeout)


def has_unexpected(connection: Any) -> bool:
    """Whether anything, or the end, can be read although nothing was asked for.

    Args:
        connection: the socket, plain or TLS.

    What is read by this is lost: a connection on which it is true must be closed.

    """
    timeout = connection.gettimeout()
    try:
        connection.settimeout(0)
        connection.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(timeout)
    return True
