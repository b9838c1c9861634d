"""The container's server: drains on SIGTERM, bounds headers, never drops a record.

Owns what gunicorn decides before and after our code; must never answer with a status
that makes the source drop a record. Run from the project's root as
`gunicorn --config function/gunicorn.conf.py`: it serves the very app that
functions-framework would. The bare `functions-framework` command can't drain.
"""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

from gunicorn import util
from gunicorn.workers.gthread import DEFAULT_WORKER_DATA_TIMEOUT, ThreadWorker

from function.api_profile import load_profile
from function.config import Settings
from function.database import make_engine
from function.door import draining, reading
from function.errors import SettingsError
from function.event_tokens import EventTokens

_UNREADABLE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Connection: close\r\nContent-Length: 0\r\n\r\n"
)


class Worker(ThreadWorker):  # type: ignore[misc]
    """A thread worker that asks for what it couldn't read once more.

    And that waits for nobody for ever: gunicorn itself reads a request's head without
    a time limit, so that as many stalled ones as it has threads would end its work.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: Connections whose head is being read, and until when it must be there.
        self._heads: dict[Any, float] = {}

    def handle(self, conn: Any) -> Any:
        """Read a request and answer it, in a thread of the pool."""
        # The first byte of a new connection may take gunicorn's own time limit.
        patience_s = DEFAULT_WORKER_DATA_TIMEOUT + _settings.event_read_timeout_s
        self._heads[conn] = time.monotonic() + patience_s
        try:
            return super().handle(conn)
        finally:
            self._heads.pop(conn, None)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read; the body's time is the door's."""
        self._heads.pop(conn, None)
        return super().handle_request(req, conn)

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
# KafkaSource makes a header of each record header; more is answered 503 above.
limit_request_line = 8190
limit_request_fields = 500
limit_request_field_size = 32_768
# The heartbeat file, where the root file system is read-only.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
control_socket_disable = True
# One line a delivery is ours; gunicorn's would repeat it with the path.
accesslog = None
loglevel = "warning"
