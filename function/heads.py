"""Bounds the head of a request before the server parses it, and loses no record by it.

Owns how much of a head is kept, and which fields are always kept; must never do I/O of
its own, nor import a server.

KafkaSource makes a header of each Kafka record header, so a record decides how many
fields its request has and how long they are. A server refuses a head beyond its limits
by itself, which would leave the record unrecorded at the head of its partition. So what
is beyond ours is dropped while it is read, and the door is told: the record goes to
quarantine with its whole body, and `topup replay` can bring it again.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

#: More fields, a longer field or more bytes in all, and the event is not an order.
FIELDS_MAX: Final = 500
FIELD_BYTES_MAX: Final = 32 * 1024 - 2
HEAD_BYTES_MAX: Final = 256 * 1024
#: So much is read on and dropped. A record of Kafka's default size (1 MiB) becomes a
#: head of at most 4 MiB.
DROPPED_BYTES_MAX: Final = 64 * 1024 * 1024

_LINE_END: Final = b"\r\n"
_HEAD_END: Final = b"\r\n\r\n"
#: Twice, so that the server still sees that a field which may stand once came twice.
_KEPT_REPETITIONS: Final = 2
#: What says where the body ends, who posts, what the event is and where it stood.
_ALWAYS_KEPT: Final = frozenset(
    {
        b"host",
        b"connection",
        b"content-length",
        b"transfer-encoding",
        b"expect",
        b"authorization",
        b"content-type",
        b"ce-specversion",
        b"ce-id",
        b"ce-source",
        b"ce-type",
        b"ce-topic",
        b"ce-key",
        b"ce-partitionkey",
        b"ce-knativekafkapartition",
        b"ce-knativekafkaoffset",
    }
)
#: The server's limit of a request line.
REQUEST_LINE_BYTES_MAX: Final = 8190
#: What the server's own limits must allow.
FIELDS_KEPT_MAX: Final = FIELDS_MAX + _KEPT_REPETITIONS * len(_ALWAYS_KEPT)


def read_head(read: Callable[[], bytes]) -> tuple[bytes, str]:
    """Read a head to its end, keeping no more of it than is allowed.

    Args:
        read: returns what has come, at least one byte; nothing at the stream's end.

    Returns:
        The head as far as it is kept, with whatever was read behind it; and what was
        dropped of it, in words that are safe to log and to answer, or nothing. A head
        that has no end, or is not HTTP, is returned for the server to refuse.

    """
    data = read()
    end = data.find(_HEAD_END)
    # Nearly every head: whole in the first read, and of a few fields.
    if 0 <= end < FIELD_BYTES_MAX and data.count(_LINE_END, 0, end) <= FIELDS_MAX:
        return data, ""
    head = _Head()
    while data and not head.add(data):
        data = read()
    return head.kept(), head.dropped


def is_liveness_probe(data: bytes) -> bool:
    """Whether this is one whole `GET /healthz`, and nothing behind it."""
    return data.startswith(b"GET /healthz HTTP/1.") and (
        data.find(_HEAD_END) == len(data) - len(_HEAD_END)
    )


class _Head:
    """A head that is being read: what is kept of it, and what was dropped."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        #: What has come of the line that has no end yet.
        self._partial = b""
        self._behind = b""
        self._fields = 0
        self._bytes = 0
        self._bytes_dropped = 0
        self._needed: Counter[bytes] = Counter()
        self.dropped = ""

    def add(self, data: bytes) -> bool:
        """Take in what has come; True once nothing more is to be read."""
        *lines, self._partial = (self._partial + data).split(_LINE_END)
        for index, line in enumerate(lines):
            # One empty line may stand before the request line.
            if not line and any(self._lines):
                rest = [*lines[index + 1 :], self._partial]
                self._behind = _LINE_END + _LINE_END.join(rest)
                self._partial = b""
                return True
            self._keep(line)
        if self._is_no_head() or self._bytes_dropped > DROPPED_BYTES_MAX:
            return True
        if len(self._partial) > FIELD_BYTES_MAX:
            # Longer than allowed it stays; its last byte may be half of a line's end.
            self._bytes_dropped += len(self._partial) - FIELD_BYTES_MAX
            shortened = self._partial[:FIELD_BYTES_MAX]
            self._partial = shortened + b"." + self._partial[-1:]
        return False

    def kept(self) -> bytes:
        """What the server is to parse, and what came behind it."""
        lines = b"".join(line + _LINE_END for line in self._lines)
        return lines + self._partial + self._behind

    def _is_no_head(self) -> bool:
        """Whether the server will refuse it, however it goes on."""
        if not any(self._lines):
            is_endless = len(self._partial) > REQUEST_LINE_BYTES_MAX + len(_LINE_END)
            return is_endless or len(self._lines) > 1
        return b"\n" in self._partial

    def _keep(self, line: bytes) -> None:
        # The request line is the sink's address, the same for every record: its limit
        # is the server's.
        if not any(self._lines):
            self._lines.append(line)
            return
        self._fields += 1
        self._bytes += len(line)
        name = line[:FIELD_BYTES_MAX].partition(b":")[0].strip().lower()
        is_needed = name in _ALWAYS_KEPT and self._needed[name] < _KEPT_REPETITIONS
        if is_needed:
            self._needed[name] += 1
        if len(line) > FIELD_BYTES_MAX:
            self._drop(f"has a field of more than {FIELD_BYTES_MAX} bytes", line)
            line = line[:FIELD_BYTES_MAX]
        elif is_needed:
            pass
        elif self._fields > FIELDS_MAX:
            self._drop(f"has more than {FIELDS_MAX} fields", line)
        elif self._bytes > HEAD_BYTES_MAX:
            self._drop(f"is larger than {HEAD_BYTES_MAX} bytes", line)
        else:
            is_needed = True
        if is_needed:
            self._lines.append(line)

    def _drop(self, what: str, line: bytes) -> None:
        self.dropped = self.dropped or f"head: {what}"
        self._bytes_dropped += len(line)
