"""REST client of the recharge API: one call, one hard deadline, one Answer.

Owns the connections and the translation of every `requests` error; must never
repeat a call, follow a redirect, or decide what an answer means (the profile does).

"Not sent" is proven by our own connection's flag, never by an exception's name:
`requests.ConnectionError` is both "refused" and "read, then closed".
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from http import client as http_client
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from function.api_auth import Authenticator, NotAuthenticated
from function.api_profile import ApiProfile, RequestTemplate, render, template_values
from function.config import Settings
from function.model import Answer, AnswerClass, Finding, LookUp, TopUp

#: A longer answer is not read on, and so not understood.
ANSWER_BYTES_MAX: Final = 64 * 1024

#: Every error of requests and what it is called in the ledger and the logs. Whether
#: anything was sent, and so what the answer means, the connection's flag says.
#: The first class that fits counts; a test fails when a class is missing.
REASON_OF_ERROR: Final[tuple[tuple[type[Exception], str], ...]] = (
    (requests.exceptions.ConnectTimeout, "connect_timeout"),
    (requests.exceptions.ReadTimeout, "read_timeout"),
    (requests.exceptions.Timeout, "timeout"),
    (requests.exceptions.SSLError, "tls_error"),
    (requests.exceptions.ProxyError, "proxy_error"),
    (requests.exceptions.ChunkedEncodingError, "answer_cut"),
    (requests.exceptions.ContentDecodingError, "answer_undecodable"),
    (requests.exceptions.StreamConsumedError, "answer_cut"),
    (requests.exceptions.ConnectionError, "connection_error"),
    (requests.exceptions.TooManyRedirects, "redirect"),
    (requests.exceptions.RetryError, "retries"),
    (requests.exceptions.JSONDecodeError, "answer_not_json"),
    (requests.exceptions.InvalidHeader, "invalid_header"),
    (requests.exceptions.InvalidProxyURL, "invalid_url"),
    (requests.exceptions.InvalidURL, "invalid_url"),
    (requests.exceptions.InvalidSchema, "invalid_url"),
    (requests.exceptions.MissingSchema, "invalid_url"),
    (requests.exceptions.InvalidJSONError, "invalid_body"),
    (requests.exceptions.UnrewindableBodyError, "invalid_body"),
    (requests.exceptions.URLRequired, "invalid_url"),
    (requests.exceptions.HTTPError, "http_error"),
    (requests.exceptions.RequestException, "request_error"),
    (HTTPError, "connection_error"),
    (http_client.HTTPException, "connection_error"),
    (OSError, "connection_error"),
    # Keys and tokens are ASCII; anything else can't become a header.
    (UnicodeError, "invalid_header"),
)


class RechargeApi:
    """The recharge API behind one base address; safe to share between threads.

    Args:
        settings: address, time limits and certificates.
        profile: builds requests and classifies answers.
        authenticate: adds the credentials to a request's headers.
        monotonic: the pod's clock, in seconds; leases are never measured by it.

    """

    def __init__(
        self,
        settings: Settings,
        profile: ApiProfile,
        authenticate: Authenticator,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = settings.recharge_api_url.rstrip("/")
        self._profile = profile
        self._authenticate = authenticate
        self._monotonic = monotonic
        self._timeout_s = settings.recharge_api_timeout_s
        self._reaper = _Reaper()
        self._session = requests.Session()
        # No proxy, no .netrc: nothing but the settings decides where money goes.
        self._session.trust_env = False
        # Nor does one order's answer decide how the next is sent.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        ca_file = settings.recharge_api_tls_ca_file
        self._session.verify = str(ca_file) if ca_file else True
        adapter = _Adapter(settings.server_threads, settings.recharge_api_idle_s)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer:
        """Send the order once and say how it ended; raises nothing foreseen.

        Args:
            order: what to recharge.
            rendered_key: the key as it was stored before this send.
            deadline: moment on the monotonic clock at which the call is cut, and
                after which nothing is sent.

        Returns unknown for whatever the profile doesn't name, and a retry class
        with `is_sent=False` only when no byte of the request left.

        """
        call = _Call(deadline, self._monotonic)
        values = template_values(order, rendered_key)
        try:
            status, document = self._exchange(self._profile.request, values, call)
        except NotAuthenticated as error:
            return Answer(AnswerClass.OURS, is_sent=False, reason=error.reason)
        except _FORESEEN as error:
            return _answer_of_error(error, call)
        if status == http_client.UNAUTHORIZED:
            self._authenticate.forget()
        return self._profile.classify(status, document)

    def look_up(self, rendered_key: str) -> LookUp:
        """Ask what became of our key; whatever fails is an unknown finding."""
        rules = self._profile.look_up
        if rules is None:
            return LookUp(Finding.UNKNOWN, reason="no_look_up")
        call = _Call(self._monotonic() + self._timeout_s, self._monotonic)
        values = template_values(None, rendered_key)
        try:
            status, document = self._exchange(rules.request, values, call)
        except NotAuthenticated as error:
            return LookUp(Finding.UNKNOWN, reason=error.reason)
        except _FORESEEN as error:
            return LookUp(Finding.UNKNOWN, reason=_answer_of_error(error, call).reason)
        if status == http_client.UNAUTHORIZED:
            self._authenticate.forget()
        return self._profile.read_look_up(status, document, rendered_key)

    def close(self) -> None:
        """Close every connection, and end the thread that watches them."""
        self._session.close()
        self._reaper.stop()

    def _exchange(
        self, template: RequestTemplate, values: dict[str, Any], call: "_Call"
    ) -> tuple[int, object]:
        body = {name: render(text, values) for name, text in template.body.items()}
        body = {name: value for name, value in body.items() if value is not None}
        headers = {
            name: render(text, values) for name, text in template.headers.items()
        }
        self._authenticate(headers)
        _current.call = call
        self._reaper.watch(call)
        try:
            with self._session.request(
                template.method,
                self._base + render(template.path, values),
                params={n: render(text, values) for n, text in template.query.items()},
                json=body or None,
                headers=headers,
                timeout=self._timeout_s,
                allow_redirects=False,
                stream=True,
            ) as response:
                answer = response.raw.read(ANSWER_BYTES_MAX + 1, decode_content=True)
            # A body without Content-Length looks complete when the reaper cuts it.
            if call.is_over():
                raise TimeoutError
            return response.status_code, _json(answer)
        finally:
            _current.call = None
            self._reaper.forget(call)
            # Only now, when the reaper can't reach for it any more.
            call.close()


def _json(body: bytes) -> object:
    """The body as JSON, or None if it is none or too long."""
    if len(body) > ANSWER_BYTES_MAX:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _answer_of_error(error: Exception, call: "_Call") -> Answer:
    """Translate a failure: the connection's flag says whether anything was sent."""
    reason = next(name for kind, name in REASON_OF_ERROR if isinstance(error, kind))
    if call.is_over():
        reason = "deadline"
    classified = AnswerClass.UNKNOWN if call.is_sent else AnswerClass.RETRY
    return Answer(classified, is_sent=call.is_sent, reason=reason)


_FORESEEN: Final = tuple(kind for kind, _ in REASON_OF_ERROR)


class _Call:
    """One call's deadline, and whether a byte of it was sent."""

    def __init__(self, deadline: float, monotonic: Callable[[], float]) -> None:
        self.deadline = deadline
        self.is_sent = False
        self._monotonic = monotonic
        #: Duplicates of the connection's descriptor. They are the call's own: TLS
        #: takes the original over, and http.client closes it as soon as an answer's
        #: headers say that it will not be kept, with the body still to come.
        self._handles: list[socket.socket] = []

    def is_over(self) -> bool:
        return self._monotonic() >= self.deadline

    def left_s(self) -> float:
        return self.deadline - self._monotonic()

    def watch(self, connection: socket.socket) -> None:
        """From now on the connection ends at the deadline."""
        self._handles.append(socket.socket(fileno=os.dup(connection.fileno())))

    def is_watched(self) -> bool:
        return bool(self._handles)

    def cut(self) -> None:
        for handle in list(self._handles):
            # The other side may have gone already.
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for handle in self._handles:
            handle.close()


class _Current(threading.local):
    """The call of this thread: urllib3 gives its connections no other way to know."""

    call: _Call | None = None


_current: Final = _Current()


class _Reaper:
    """One thread that cuts calls at their deadline.

    Timeouts of requests count from read to read: a server that drips a byte a second
    outlives them all.
    """

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        #: The moment for which the thread has set its alarm.
        self._wakes_at = math.inf

    def watch(self, call: _Call) -> None:
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

    def forget(self, call: _Call) -> None:
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

    #: Set by the adapter: seconds after which an idle connection is not used again.
    idle_s: float = 0.0
    _used_at: float = 0.0

    @property
    def is_connected(self) -> bool:
        """Also false when the server may be about to close it: that would be doubt."""
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
            call.is_sent = True
        super().send(data)
        self._used_at = time.monotonic()

    def getresponse(self) -> Any:
        response = super().getresponse()
        self._used_at = time.monotonic()
        return response


class _WatchedTls(_Watched, HTTPSConnection):
    """The same over TLS; the handshake is under the deadline, too."""


class _Adapter(HTTPAdapter):
    """requests' own adapter on watched connections, one for each thread."""

    def __init__(self, connections_max: int, idle_s: float) -> None:
        self._idle_s = idle_s
        super().__init__(pool_connections=1, pool_maxsize=connections_max)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        idle_s = self._idle_s
        plain = type("Plain", (_Watched,), {"idle_s": idle_s})
        tls = type("Tls", (_WatchedTls,), {"idle_s": idle_s})
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
        }
