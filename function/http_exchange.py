"""HTTP under a hard deadline: one request, one answer, within bounds.

For the recharge API and for its token endpoint. It never repeats a request, follows a
redirect, or takes bytes for an answer that the request may not have asked for.

"Not sent" is proven by a flag of our own connection, never by an exception's name:
`requests.ConnectionError` is both "refused" and "read, then closed".
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from function.http_answer import FinalAnswer, UncertainAnswer, has_unexpected

#: A longer answer is not read on, and so not understood.
ANSWER_BYTES_MAX: Final = 64 * 1024
#: requests refuses a wait of nothing.
_CONNECT_MIN_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Reply:
    """A final answer as it was read."""

    status: int
    headers: requests.structures.CaseInsensitiveDict[str]
    #: The body, decoded; None if it is longer than `ANSWER_BYTES_MAX`.
    body: bytes | None


class Call:
    """One request's deadline, and whether a byte of it was sent.

    Args:
        deadline: moment on the monotonic clock at which the call is cut, and after
            which nothing is sent.
        monotonic: the clock, in seconds.

    """

    def __init__(self, deadline: float, monotonic: Callable[[], float]) -> None:
        self.deadline = deadline
        self.monotonic = monotonic
        #: False only if it is proven that no byte of the request left us.
        self.is_sent = False
        #: Duplicates of the connection's descriptor. They are the call's own: TLS
        #: takes the original over, and http.client closes it as soon as an answer's
        #: headers say that it will not be kept, with the body still to come.
        self._handles: list[socket.socket] = []

    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.monotonic() >= self.deadline

    def left_s(self) -> float:
        """Seconds before the deadline; negative after it."""
        return self.deadline - self.monotonic()

    def watch(self, connection: socket.socket) -> None:
        """From now on the connection ends at the deadline."""
        self._handles.append(socket.socket(fileno=os.dup(connection.fileno())))

    def is_watched(self) -> bool:
        """Whether a connection will be cut at the deadline."""
        return bool(self._handles)

    def cut(self) -> None:
        """End every connection of the call, both ways."""
        for handle in list(self._handles):
            # The other side may have gone already.
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connections, which stay as they are."""
        for handle in self._handles:
            handle.close()


class Transport:
    """Connections to the recharge API and its token endpoint; safe between threads.

    Args:
        connections_max: connections that are kept for each host.
        idle_s: seconds after which an idle connection is not used again.
        timeout_s: longest wait for a connection and between two reads, in seconds.
        verify: CA file, or True for the public ones.

    """

    def __init__(
        self,
        *,
        connections_max: int,
        idle_s: float,
        timeout_s: float,
        verify: str | bool,
    ) -> None:
        self._timeout_s = timeout_s
        self._reaper = _Reaper()
        self._session = _Session()
        # No proxy, no .netrc: nothing but the settings decides where money goes.
        self._session.trust_env = False
        # Nor does one order's answer decide how the next is sent.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.verify = verify
        adapter = _Adapter(connections_max, idle_s)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def exchange(self, call: Call, request: requests.Request) -> Reply:
        """Send one request and read its final answer.

        Raises:
            Exception: whatever the libraries make of the network and of an answer's
                head; `call.is_sent` says whether anything was sent.
            TimeoutError: the deadline passed; likewise.

        """
        prepared = self._session.prepare_request(request)
        if call.is_over():
            raise TimeoutError
        # A connection that is being made can't be cut.
        connect_s = min(self._timeout_s, max(call.left_s(), _CONNECT_MIN_S))
        _current.call = call
        self._reaper.watch(call)
        try:
            with self._session.send(
                prepared,
                timeout=(connect_s, self._timeout_s),
                allow_redirects=False,
                stream=True,
            ) as response:
                body = response.raw.read(ANSWER_BYTES_MAX + 1, decode_content=True)
            # A body without Content-Length looks complete when the reaper cuts it.
            if call.is_over():
                raise TimeoutError
            is_whole = len(body) <= ANSWER_BYTES_MAX
            return Reply(
                response.status_code, response.headers, body if is_whole else None
            )
        finally:
            _current.call = None
            self._reaper.forget(call)
            # Only now, when the reaper can't reach for it any more.
            call.close()

    def close(self) -> None:
        """Close every connection, and end the thread that watches them."""
        self._session.close()
        self._reaper.stop()


class _Session(requests.Session):
    """requests' own session, that sees no redirect.

    Even where redirects are not followed, it would read a redirect's body without a
    bound and parse its Location, to prepare a request that nobody makes.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No answer is one."""


class _Current(threading.local):
    """The call of this thread: urllib3 gives its connections no other way to know."""

    call: Call | None = None


_current: Final = _Current()


class _Reaper:
    """One thread that cuts calls at their deadline.

    Timeouts of requests count from read to read: a server that drips a byte a second
    outlives them all.
    """

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        #: The moment for which the thread has set its alarm.
        self._wakes_at = math.inf

    def watch(self, call: Call) -> None:
        with self._changed:
            self._calls.add(call)
            # Started on first use: a thread would not survive the server's fork.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="reaper", daemon=True
                )
                self._thread.start()
            # Later deadlines wait for the alarm that is set: a thread that is woken at
            # each call would cost more than it guards.
            if call.deadline < self._wakes_at:
                self._changed.notify()

    def forget(self, call: Call) -> None:
        with self._changed:
            self._calls.discard(call)

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._calls or not self._is_stopped:
                for call in [each for each in self._calls if each.is_over()]:
                    call.cut()
                    self._calls.discard(call)
                first = min(self._calls, key=lambda each: each.deadline, default=None)
                self._wakes_at = first.deadline if first else math.inf
                self._changed.wait(first.left_s() if first else None)


class _Watched(HTTPConnection):
    """A connection that knows its call: its deadline, and whether it was sent."""

    response_class = FinalAnswer
    #: Set by the adapter: seconds after which an idle connection is not used again.
    idle_s: float = 0.0
    _used_at: float = 0.0

    @property
    def is_connected(self) -> bool:
        """Also false when the server may be about to close it: that would be doubt.

        urllib3 sees to it that nothing can be read; `send` looks again.
        """
        is_fresh = time.monotonic() - self._used_at < self.idle_s
        return is_fresh and super().is_connected

    def _new_conn(self) -> socket.socket:
        call = _current.call
        connection = super()._new_conn()
        if call is not None:
            # Before the TLS handshake.
            call.watch(connection)
            # DNS and connect may have outlasted the deadline uncut.
            if call.is_over():
                connection.close()
                raise TimeoutError
        return connection

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        call = _current.call
        if call is not None and self.sock is not None:
            if not call.is_watched():
                call.watch(self.sock)
            # The fence of a pod that slept: nothing leaves after the deadline.
            if call.is_over():
                raise TimeoutError
            # What is there before the request has ended is no answer to it.
            if has_unexpected(self.sock):
                raise UncertainAnswer
            # Before, not after: a send that breaks in its middle has sent something.
            call.is_sent = True
        try:
            super().send(data)
        except ConnectionError:
            # urllib3 would go on to read an answer, to a request that did not end.
            raise UncertainAnswer from None
        self._used_at = time.monotonic()

    def getresponse(self) -> Any:
        response = super().getresponse()
        self._used_at = time.monotonic()
        return response


class _WatchedTls(_Watched, HTTPSConnection):
    """The same over TLS; the handshake is under the deadline, too."""


class _Adapter(HTTPAdapter):
    """requests' own adapter on watched connections."""

    def __init__(self, connections_max: int, idle_s: float) -> None:
        self._idle_s = idle_s
        # Two hosts: the API and its token endpoint.
        super().__init__(pool_connections=2, pool_maxsize=connections_max)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        idle_s = self._idle_s
        plain = type("Plain", (_Watched,), {"idle_s": idle_s})
        tls = type("Tls", (_WatchedTls,), {"idle_s": idle_s})
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
        }
