"""The container's server: drains on SIGTERM, bounds headers, never drops a record.

Owns what gunicorn decides before and after our code; must never answer with a status
that makes the source drop a record. Run from the project's root as
`gunicorn --config function/gunicorn.conf.py`: it serves the very app that
functions-framework would. The bare `functions-framework` command can't drain.
"""

import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from gunicorn import util
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import DEFAULT_WORKER_DATA_TIMEOUT, TConn, ThreadWorker

from function.api_profile import load_profile
from function.config import Settings
from function.database import make_engine
from function.door import draining, reading, shortened_heads
from function.errors import SettingsError
from function.event_tokens import EventTokens
from function.heads import (
    FIELD_BYTES_MAX,
    FIELDS_KEPT_MAX,
    REQUEST_LINE_BYTES_MAX,
    is_liveness_probe,
    read_head,
)

_UNREADABLE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Connection: close\r\nContent-Length: 0\r\n\r\n"
)


_ALIVE: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
#: A kubelet's probe has about 120.
_PROBE_BYTES_MAX: Final = 4096


class _BoundedRequest(Request):  # type: ignore[misc]
    """A request whose head was bounded before it is parsed."""

    #: What was dropped of its head.
    dropped = ""

    def parse(self, unreader: Any) -> Any:
        """Read the head within our bounds, and leave it to gunicorn."""
        head, self.dropped = read_head(unreader.read)
        unreader.unread(head)
        return super().parse(unreader)


class _BoundedParser(RequestParser):  # type: ignore[misc]
    mesg_class = _BoundedRequest


class Worker(ThreadWorker):  # type: ignore[misc]
    """A thread worker that asks for what it couldn't read once more.

    And that waits for nobody for ever: gunicorn itself reads a request's head without
    a time limit, so that as many stalled ones as it has threads would end its work.

    Its main loop, which never waits, answers `GET /healthz` by itself: a pod all of
    whose threads wait for the ledger or the recharge API is busy, not dead, and holds
    answers in its memory.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: Connections whose head is being read, and until when it must be there.
        self._heads: dict[Any, float] = {}

    def accept(self, listener: Any) -> None:
        """Take a connection, and no thread for it before something has come."""
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        conn = TConn(self.cfg, client, address, listener.getsockname())
        conn.parser = _BoundedParser(self.cfg, client, address)
        conn.set_timeout()
        self.nr_conns += 1
        self.pending_conns.append(conn)
        readable = partial(self.on_pending_socket_readable, conn)
        self.poller.register(client, selectors.EVENT_READ, readable)

    def enqueue_req(self, conn: Any) -> None:
        """Give a connection to a thread, unless it asks whether we live."""
        # What was read with the request before comes first.
        has_read_on = conn.parser.unreader.buf.getvalue()
        if not has_read_on and _answers_probe(conn.sock):
            self.nr_conns -= 1
            conn.close()
        else:
            super().enqueue_req(conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Keep the connection, or forget it: `handle` has closed it already."""
        if fs.cancelled() or fs.exception() or not fs.result():
            self.nr_conns -= 1
            util.close(conn.sock)
        else:
            super().finish_request(conn, fs)

    def handle(self, conn: Any) -> Any:
        """Read a request and answer it, in a thread of the pool."""
        # What has come may be the first byte alone.
        patience_s = DEFAULT_WORKER_DATA_TIMEOUT + _settings.event_read_timeout_s
        self._heads[conn] = time.monotonic() + patience_s
        try:
            keeps = super().handle(conn)
        finally:
            self._heads.pop(conn, None)
        if not keeps:
            # It waits for the client for up to two seconds, which the main loop can't.
            util.close_graceful(conn.sock)
        return keeps

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read; the body's time is the door's."""
        self._heads.pop(conn, None)
        if req.dropped:
            shortened_heads[conn.sock] = req.dropped
        try:
            return super().handle_request(req, conn)
        finally:
            shortened_heads.pop(conn.sock, None)

    def _cap_keepalive(self, deadline: float) -> None:
        """At the end, wait no longer for connections on which nothing has come."""
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def notify(self) -> None:
        """Show that the worker lives, about once a second, and end late heads."""
        super().notify()
        now = time.monotonic()
        heads = [(conn.sock, end) for conn, end in list(self._heads.items())]
        for connection, end in [*heads, *list(reading.items())]:
            if now > end:
                # The reader sees the end of the stream: a head is closed without an
                # answer, a body is shorter than announced.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer 503 where gunicorn would say 400, 414 or 431.

        Nothing was recorded, so the record must come again: the source drops it
        after any other 4xx.
        """
        self.log.warning("request unreadable: %s", type(exc).__name__)
        try:
            util.write_nonblock(client, _UNREADABLE)
        except OSError:
            self.log.debug("the client has gone")


def _answers_probe(client: socket.socket) -> bool:
    """Answer a liveness probe that has come whole, and nothing else; never wait."""
    client.settimeout(0)
    try:
        seen = client.recv(_PROBE_BYTES_MAX, socket.MSG_PEEK)
        if not is_liveness_probe(seen):
            return False
        # Read, or the kernel would reset the connection instead of ending it.
        client.recv(len(seen))
        client.send(_ALIVE)
        client.shutdown(socket.SHUT_WR)
    except OSError:
        # Reset, or nothing there: a thread finds out what it is.
        return False
    return True


def post_worker_init(worker: Any) -> None:
    """Refuse queued requests from SIGTERM on; running ones finish and settle."""

    def drain(signal_number: int, frame: FrameType | None) -> None:
        draining.set()
        worker.handle_exit(signal_number, frame)

    signal.signal(signal.SIGTERM, drain)


try:
    _settings = Settings.from_env()
    # What main.py would refuse, too: a worker that ends at its start is started again
    # for ever.
    load_profile(_settings)
    make_engine(_settings).dispose()
    EventTokens(_settings)
except SettingsError as error:
    raise SystemExit(f"topup: {error}") from None

wsgi_app = "functions_framework:create_app('handle_topup', 'function/main.py')"
worker_class = Worker
bind = f":{os.environ.get('PORT', '8080')}"
# One process: what one thread owes the ledger, the next can settle from memory.
workers = 1
threads = _settings.server_threads
# The lease outlasts a call, and a call this server's patience with a worker.
timeout = round(_settings.server_request_timeout_s)
graceful_timeout = round(_settings.server_graceful_timeout_s)
# Longer than the dispatcher keeps a connection without use.
keepalive = 75
limit_request_line = REQUEST_LINE_BYTES_MAX
# What is beyond was dropped before, and its record goes to quarantine.
limit_request_fields = FIELDS_KEPT_MAX
limit_request_field_size = FIELD_BYTES_MAX + 2
# The heartbeat file, where the root file system is read-only.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
control_socket_disable = True
# One line a delivery is ours; gunicorn's would repeat it with the path.
accesslog = None
loglevel = "warning"
