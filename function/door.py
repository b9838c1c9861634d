"""The front door: a WSGI wrapper that reads bodies within bounds, before any framework.

Owns how much and how long is read, and the flag that says that the pod is draining;
must never answer with a status that makes the source drop a record.

Installed around the app by main.py, so it stands before functions-framework and Flask:
they would read a body of any size, cut a chunked one in silence, and redirect `//`.
"""

import threading
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any, Final

#: Set on SIGTERM by gunicorn.conf.py: no new call begins, running ones finish.
draining: Final = threading.Event()

#: So much of what is too large is read on and dropped: a client that is answered while
#: it still sends may see a reset instead of the answer, and would send for ever.
_DROPPED_BYTES_MAX: Final = 64 * 1024 * 1024
_PIECE_BYTES: Final = 64 * 1024

#: A client may announce any length; a larger one than the ledger's column holds would
#: be refused there, and the record could never be recorded.
_ANNOUNCED_BYTES_MAX: Final = 2**63 - 1

#: Where the door leaves what it saw, for main.py.
ANNOUNCED_BYTES: Final = "topup.announced_bytes"

#: What was dropped of a head that was beyond our bounds (heads.py), in words.
DROPPED_OF_HEAD: Final = "topup.dropped_of_head"

#: The paths that mean something, to other methods than POST.
_PROBES: Final = frozenset({"/healthz", "/readyz"})

#: Connections whose body is being read, and until when it must be there: a body that
#: drips would keep each read's own time limit for ever. The server ends late ones.
reading: Final[dict[Any, float]] = {}

#: Connections whose request had more of a head than is read, and what was dropped.
shortened_heads: Final[dict[Any, str]] = {}

_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Door:
    """Reads each POST whole, or as much as shows that it is too large.

    Args:
        application: what comes after.
        bytes_max: largest body that is taken for an event; one byte more is read.
        timeout_s: longest wait between two reads of the socket, and for all of them
            where the server ends what `reading` calls late.

    """

    def __init__(
        self, application: _Application, *, bytes_max: int, timeout_s: float
    ) -> None:
        self._application = application
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Pass the request on with its body in memory; 503 if it can't be read."""
        dropped = shortened_heads.get(environ.get("gunicorn.socket"), "")
        environ[DROPPED_OF_HEAD] = dropped
        # A host name that can't be is answered 400 by the framework, unrecorded.
        environ["HTTP_HOST"] = "function"
        if environ["REQUEST_METHOD"] == "POST":
            try:
                body = self._read(environ)
            # Cut, stalled, or in chunks that the server can't read, for which its own
            # answer would be 400: nothing to record, so it must come again.
            except Exception:  # noqa: BLE001
                close = [("Content-Length", "0"), ("Connection", "close")]
                start_response("503 Service Unavailable", close)
                return []
            environ["wsgi.input"] = BytesIO(body)
            environ["CONTENT_LENGTH"] = str(len(body))
            environ.pop("HTTP_TRANSFER_ENCODING", None)
        # An event is an event on every path; the framework has answers of its own for
        # some, and redirects `//`: a redirected record is dropped.
        if environ["REQUEST_METHOD"] == "POST" or environ["PATH_INFO"] not in _PROBES:
            environ["PATH_INFO"] = "/"
        return self._application(environ, start_response)

    def _read(self, environ: dict[str, Any]) -> bytes:
        announced = environ.get("CONTENT_LENGTH") or ""
        limit = self._bytes_max + 1
        # A server that leaves the end of the body to us would be read for ever.
        if not announced and not environ.get("wsgi.input_terminated"):
            limit = 0
        elif announced:
            limit = min(limit, int(announced))
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            connection.settimeout(self._timeout_s)
            reading[connection] = time.monotonic() + self._timeout_s
        try:
            body: bytes = environ["wsgi.input"].read(limit)
            dropped = _drop(environ["wsgi.input"]) if len(body) > self._bytes_max else 0
        finally:
            if connection is not None:
                reading.pop(connection, None)
                connection.settimeout(None)
        if announced and len(body) < limit:
            raise ValueError("the body is shorter than announced")
        length = int(announced or len(body) + dropped)
        environ[ANNOUNCED_BYTES] = min(length, _ANNOUNCED_BYTES_MAX)
        return body


def _drop(stream: Any) -> int:
    """Read on without keeping; returns how much there was."""
    dropped = 0
    while dropped < _DROPPED_BYTES_MAX:
        piece = stream.read(_PIECE_BYTES)
        if not piece:
            break
        dropped += len(piece)
    return dropped
