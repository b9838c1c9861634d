"""An issuer of tokens on a real socket: OpenID discovery, keys, and every misbehaviour.

Owns its keys, which it makes itself, and the book of what it was asked; must never
share code with what it tests: tokens are signed by PyJWT, keys made by cryptography.
"""

import base64
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self

import jwt
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from tests.processes import free_port

AUDIENCE: Final = "topup"
SUBJECT: Final = (
    "system:serviceaccount:shop:orders-oidc-sources.knative.dev-kafkasource"
)
DISCOVERY: Final = "/.well-known/openid-configuration"
KEYS: Final = "/openid/v1/jwks"

#: Writes an answer of its own on the connection.
Answer = Callable[["Issuer", BaseHTTPRequestHandler], None]


class Issuer:
    """The API server's part that signs; a context manager that listens.

    Args:
        directory: gets its CA as `ca.pem` when it speaks TLS.
        host: the name in its certificate; it listens on 127.0.0.1.
        is_tls: whether it speaks TLS.

    """

    def __init__(
        self, directory: Path, *, host: str = "localhost", is_tls: bool = True
    ) -> None:
        self.ca_file = directory / "ca.pem"
        self._tls: ssl.SSLContext | None = None
        if is_tls:
            ca = trustme.CA()
            ca.cert_pem.write_to_path(self.ca_file)
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            ca.issue_cert(host).configure_cert(self._tls)
        self._private: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {}
        self._published: dict[str, dict[str, Any]] = {}
        #: Path and Authorization of each request.
        self.requests: list[tuple[str, str | None]] = []
        #: What a path answers instead of the truth.
        self.answers: dict[str, Answer] = {}
        self.stopping = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        #: Nobody else is given it between a stop and a start.
        self.port = free_port()
        self.add_key("first")
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What is in its tokens as `iss`."""
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    def start(self) -> None:
        """Listen; again on the same port."""
        self.stopping.clear()
        self._server = _Server(self, self.port, self._tls)
        threading.Thread(target=self._server.serve_forever, args=[0.02]).start()

    def stop(self) -> None:
        """Refuse connections from now on, and end those that are open."""
        self.stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def add_key(
        self, key_id: str, *, curve: ec.EllipticCurve | None = None, bits: int = 2048
    ) -> None:
        """Make a key and publish it: RSA, or on a curve."""
        key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
        if curve is None:
            key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
            public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | {
                "alg": "RS256"
            }
        else:
            key = ec.generate_private_key(curve)
            public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        self._private[key_id] = key
        self._published[key_id] = public | {"kid": key_id, "use": "sig"}

    def publish(self, key: dict[str, Any]) -> None:
        """Publish a key as it is written."""
        self._published[str(key["kid"])] = key

    def withdraw(self, key_id: str) -> None:
        """Publish it no more; it still signs."""
        del self._published[key_id]

    def public_key_in_pem(self, key_id: str = "first") -> bytes:
        """The published key as an attacker would use it for HS256."""
        key = self._private[key_id]
        return key.public_key().public_bytes(
            serialization.Encoding.PEM,
            serialization.PublicFormat.SubjectPublicKeyInfo,
        )

    def token(
        self,
        *,
        key_id: str | None = "first",
        signed_by: str | None = None,
        algorithm: str = "RS256",
        without: str = "",
        **claims: object,
    ) -> str:
        """A token as Kubernetes makes them for a service account; `claims` replace."""
        now = int(time.time())
        given: dict[str, object] = {
            "iss": self.url,
            "aud": [AUDIENCE],
            "sub": SUBJECT,
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
        } | claims
        given.pop(without, None)
        private: Any = self._private[signed_by or key_id or "first"]
        headers = None if key_id is None else {"kid": key_id}
        return jwt.encode(given, private, algorithm, headers)

    def asked(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(each == path for each, _ in self.requests)

    def document(self, path: str) -> object:
        """The truth, or None where there is nothing."""
        if path == DISCOVERY:
            return {"issuer": self.url, "jwks_uri": self.url + KEYS}
        if path == KEYS:
            return {"keys": list(self._published.values())}
        return None


class _Server(ThreadingHTTPServer):
    def __init__(self, issuer: Issuer, port: int, tls: ssl.SSLContext | None) -> None:
        self.issuer = issuer
        super().__init__(("127.0.0.1", port), _Handler)
        if tls is not None:
            # The handshake belongs to the connection's own thread.
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        issuer = self.server.issuer
        issuer.requests.append((self.path, self.headers.get("Authorization")))
        if self.path in issuer.answers:
            issuer.answers[self.path](issuer, self)
        else:
            answer_json(issuer.document(self.path))(issuer, self)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def answer_with(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Answer:
    """An answer of any kind, whole."""

    def answer(_: Issuer, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def answer_json(document: object) -> Answer:
    """A document, or 404 for None."""
    found = document is not None
    return answer_with(json.dumps(document).encode(), 200 if found else 404)


def drip(prefix: bytes, piece: bytes, *, pause_s: float = 0.05) -> Answer:
    """Send something for ever, faster than any timeout between two reads."""

    def answer(issuer: Issuer, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(prefix)
        with suppress(OSError):
            while not issuer.stopping.wait(pause_s):
                handler.wfile.write(piece)

    return answer


def hold(issuer: Issuer, handler: BaseHTTPRequestHandler) -> None:
    """Say nothing until the client goes or the test ends."""
    handler.connection.settimeout(0.05)
    while not issuer.stopping.is_set():
        with suppress(TimeoutError):
            if not handler.connection.recv(1):
                return


def unsigned(token: str, **header: object) -> str:
    """The token's claims under another header, with no signature."""
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    return f"{head}.{token.split('.')[1]}."


def never_shakes_hands() -> socket.socket:
    """A listener that takes connections and says nothing."""
    return socket.create_server(("127.0.0.1", 0))
