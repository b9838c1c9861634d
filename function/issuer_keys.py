"""The public keys of the issuer of event tokens: fetched within bounds, and kept.

Owns the connection to the issuer and the age of its keys; must never hold up a
delivery whose key is known, nor let unknown keys make us ask more often than
`REFETCH_PAUSE_S` allows.

PyJWT's own client does not fit: it reads without end, forgets its keys when they are
old and the issuer is away, asks an issuer that is down at every request, takes proxies
from the environment and knows no discovery. Keys are still parsed by PyJWT alone.
"""

import contextlib
import http.client
import json
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import jwt

from function import telemetry
from function.config import Settings
from function.errors import SettingsError, TopupError
from function.json_bound import has_too_many_values

#: What Kubernetes can sign with; never `none`, never one with a shared secret.
ALGORITHMS: Final = ("RS256", "ES256", "ES384", "ES512")
#: Known keys are fetched anew after so long: a key that was withdrawn goes, in seconds.
REFRESH_AFTER_S: Final = 300.0
#: A token with an unknown key may cause a fetch so often, in seconds.
REFETCH_PAUSE_S: Final = 10.0
#: In seconds; short against `delivery.timeout`.
FETCH_DEADLINE_S: Final = 5.0
#: Largest document that is read; a key is less than 1 KiB.
DOCUMENT_BYTES_MAX: Final = 64 * 1024

_DISCOVERY: Final = "/.well-known/openid-configuration"
_PORTS: Final = {"http": 80, "https": 443}


class KeysUnavailable(TopupError):
    """The keys can't be had now; the message is a constant."""


class IssuerKeys:
    """The keys of one issuer; safe to share between threads.

    A fetch runs in a thread of its own, at most one at a time, and is cut at its
    deadline. What was fetched once stays until another fetch succeeds.

    Args:
        settings: the issuer, where its keys are, and how to reach them.
        monotonic: the pod's clock, in seconds; a fetch's deadline has its own.
        deadline_s: hard end of a fetch, discovery included, and of the wait for one.

    Raises:
        SettingsError: EVENTS_OIDC_CA_FILE has no certificates.

    """

    def __init__(
        self,
        settings: Settings,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        deadline_s: float = FETCH_DEADLINE_S,
    ) -> None:
        self._issuer = settings.events_oidc_issuer or ""
        self._keys_url = settings.events_oidc_keys_url
        self._ca_file = settings.events_oidc_ca_file
        self._token_file = settings.events_oidc_keys_token_file
        #: The host and port that the settings name: nobody else is given the token.
        self._origin = _origin(urlsplit(self._keys_url or self._issuer))
        self._monotonic = monotonic
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._failure = ""
        self._begun_at = -math.inf
        #: Set while no fetch runs.
        self._is_idle = threading.Event()
        self._is_idle.set()
        try:
            if self._ca_file is not None:
                self._tls()
        except OSError:
            raise SettingsError(
                "EVENTS_OIDC_CA_FILE: no certificates in PEM can be read from it"
            ) from None

    def find(self, key_id: str) -> jwt.PyJWK | None:
        """The key of this name, or None if the issuer has none.

        A known key is returned at once, however old; an unknown one is waited for
        when the issuer may be asked, until the deadline at most.

        Raises:
            KeysUnavailable: the key is not known, and the issuer can't be asked or did
                not answer as it must.

        """
        with self._lock:
            key = self._keys.get(key_id)
            pause_s = REFETCH_PAUSE_S if key is None else REFRESH_AFTER_S
            if self._is_idle.is_set() and self._monotonic() - self._begun_at >= pause_s:
                self._begin()
        if key is not None:
            return key
        if not self._is_idle.wait(self._deadline_s):
            raise KeysUnavailable("no_answer_in_time")
        with self._lock:
            key = self._keys.get(key_id)
            if key is None and self._failure:
                raise KeysUnavailable(self._failure)
            return key

    def _begin(self) -> None:
        self._begun_at = self._monotonic()
        self._is_idle.clear()
        # On demand: a thread would not survive the server's fork.
        thread = threading.Thread(target=self._fetch, name="issuer-keys", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._failure = "no_thread"
            self._is_idle.set()

    def _fetch(self) -> None:
        """Replace the keys, or keep them and tell why."""
        keys: dict[str, jwt.PyJWK] | None = None
        failure = ""
        try:
            keys = self._download(_Deadline(self._deadline_s))
        except KeysUnavailable as error:
            failure = str(error)
        # Whatever a socket, TLS, JSON and two libraries make of an odd answer; the text
        # is foreign, so the class must do.
        except Exception as error:  # noqa: BLE001
            failure = type(error).__name__
        with self._lock:
            if keys is not None:
                self._keys = keys
            self._failure = failure
            self._is_idle.set()
        if failure:
            telemetry.alert("token_keys_unavailable", "", failure)

    def _download(self, deadline: "_Deadline") -> dict[str, jwt.PyJWK]:
        url = self._keys_url or self._discover(deadline)
        found = jwt.PyJWKSet.from_dict(self._get(url, deadline))
        return {
            key.key_id: key
            for key in found.keys
            if key.key_id
            and key.algorithm_name in ALGORITHMS
            and key.public_key_use in {None, "sig"}
        }

    def _discover(self, deadline: "_Deadline") -> str:
        """Where the issuer says that its keys are (OpenID Connect Discovery 1.0)."""
        document = self._get(self._issuer.rstrip("/") + _DISCOVERY, deadline)
        if document.get("issuer") != self._issuer:
            raise KeysUnavailable("discovered_another_issuer")
        url = document.get("jwks_uri")
        schemes = {"https"} | {urlsplit(self._issuer).scheme}
        if not isinstance(url, str) or urlsplit(url).scheme not in schemes:
            raise KeysUnavailable("discovered_no_usable_address")
        return url

    def _get(self, url: str, deadline: "_Deadline") -> dict[str, Any]:
        address = urlsplit(url)
        headers = {"Accept": "application/json"}
        if self._token_file is not None and _origin(address) == self._origin:
            token = self._token_file.read_text("ascii").strip()
            headers["Authorization"] = f"Bearer {token}"
        tls = self._tls() if address.scheme == "https" else None
        status, body = _exchange(address, headers, tls, deadline)
        if status != http.client.OK:
            raise KeysUnavailable(f"status_{status}")
        if len(body) > DOCUMENT_BYTES_MAX or has_too_many_values(body):
            raise KeysUnavailable("answer_too_large")
        document = json.loads(body)
        if not isinstance(document, dict):
            raise KeysUnavailable("answer_no_object")
        return document

    def _tls(self) -> ssl.SSLContext:
        """Made at each fetch, so that a CA that was replaced is read."""
        return ssl.create_default_context(
            cafile=str(self._ca_file) if self._ca_file else None
        )


def _origin(address: SplitResult) -> tuple[str, str | None, int | None]:
    return (
        address.scheme,
        address.hostname,
        address.port or _PORTS.get(address.scheme),
    )


class _Deadline:
    """A moment on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until then.

        Raises:
            TimeoutError: there are none.

        """
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _exchange(
    address: SplitResult,
    headers: dict[str, str],
    tls: ssl.SSLContext | None,
    deadline: _Deadline,
) -> tuple[int, bytes]:
    """One GET: status and body, of which one byte more than is allowed is read.

    Neither a redirect is followed, nor a proxy used. A timer shuts the socket down at
    the deadline: timeouts of sockets count from read to read, and a server that drips
    outlives them all.
    """
    host = address.hostname or ""
    port = address.port or _PORTS[address.scheme]
    with contextlib.ExitStack() as stack:
        plain = socket.create_connection((host, port), deadline.left_s())
        stack.enter_context(contextlib.closing(plain))
        # TLS takes the socket over, so the timer has a handle of its own.
        handle = stack.enter_context(socket.socket(fileno=os.dup(plain.fileno())))
        timer = threading.Timer(deadline.left_s(), _cut, [handle])
        timer.daemon = True
        timer.start()
        stack.callback(timer.join)
        stack.callback(timer.cancel)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = plain
        if tls is not None:
            connection.sock = tls.wrap_socket(plain, server_hostname=host)
            stack.enter_context(contextlib.closing(connection.sock))
        path = f"{address.path or '/'}?{address.query}".removesuffix("?")
        connection.request("GET", path, headers=headers)
        response = stack.enter_context(connection.getresponse())
        body = response.read(DOCUMENT_BYTES_MAX + 1)
    # A body without a length looks complete when the timer cuts it.
    deadline.left_s()
    return response.status, body


def _cut(connection: socket.socket) -> None:
    # The other side may have gone already.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
