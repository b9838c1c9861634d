"""How we prove to the recharge API who we are: a token file, or OAuth 2.

Owns the credentials; must never log one, nor let a failure look like a sent call.
"""

import threading
import time
from pathlib import Path
from typing import Any, Final, Protocol

import requests
from oauthlib.oauth2 import BackendApplicationClient, InsecureTransportError

from function.config import Settings
from function.errors import TopupError
from function.http_exchange import Call, Reply, Transport

#: A token is replaced so long before it expires, in seconds.
_MARGIN_S: Final = 30.0
#: Longer than any credential.
_SECRET_BYTES_MAX: Final = 64 * 1024


class NotAuthenticated(TopupError):
    """No credentials can be had, so nothing was sent; `reason` is a constant."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AuthenticationSlow(NotAuthenticated):
    """They were not there in time: later they may be."""


class Authenticator(Protocol):
    """Adds credentials to the headers of a request."""

    def __call__(
        self, headers: dict[str, str], transport: Transport, call: Call
    ) -> None:
        """Add the credentials.

        Args:
            headers: of the request; changed.
            transport: carries what must be asked for them.
            call: the request's; its deadline holds for the credentials, too.

        Raises:
            AuthenticationSlow: there are none in time; nothing may be sent.
            NotAuthenticated: there are none; nothing may be sent.

        """

    def forget(self) -> None:
        """The API refused the credentials: the next call gets new ones."""


def make_authenticator(settings: Settings) -> Authenticator:
    """The way that the settings choose; none at all when they choose none."""
    if settings.recharge_api_oauth_token_url:
        return OAuthClientCredentials(settings)
    return TokenFile(settings.recharge_api_token_file)


class TokenFile:
    """A bearer token in a file, read again when the file changes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._token = ""

    def __call__(
        self,
        headers: dict[str, str],
        transport: Transport,  # noqa: ARG002
        call: Call,  # noqa: ARG002
    ) -> None:
        """Add the token; does nothing when no file is set."""
        if self._path is None:
            return
        try:
            # A mounted secret is replaced by a link to another file.
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                token = _read_secret(self._path)
                token.encode("ascii")
                self._token, self._seen = token, seen
        except (OSError, ValueError):
            raise NotAuthenticated("token_file_unreadable") from None
        if not self._token:
            raise NotAuthenticated("token_file_empty")
        headers["Authorization"] = f"Bearer {self._token}"

    def forget(self) -> None:
        """Read the file again at the next call."""
        self._seen = None


class OAuthClientCredentials:
    """OAuth 2 client credentials (RFC 6749 section 4.4).

    Requests are built and answers read by oauthlib; they travel as the API's own do.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = settings.recharge_api_oauth_token_url or ""
        self._client_id = settings.recharge_api_oauth_client_id or ""
        self._secret_file = settings.recharge_api_oauth_client_secret_file
        self._scope: Any = (settings.recharge_api_oauth_scope or "").split() or None
        self._timeout_s = settings.recharge_api_timeout_s
        self._lock = threading.Lock()
        self._token = ""
        self._expires_at = 0.0

    def __call__(
        self, headers: dict[str, str], transport: Transport, call: Call
    ) -> None:
        """Add a token that is still valid, exchanging a new one where needed."""
        # One exchange at a time; the others wait for its result, though not for ever.
        wait_s = max(min(self._timeout_s, call.left_s()), 0.0)
        if not self._lock.acquire(timeout=wait_s):
            raise AuthenticationSlow("oauth_exchange_slow")
        try:
            if time.time() >= self._expires_at - _MARGIN_S:
                self._exchange(transport, call)
            headers["Authorization"] = f"Bearer {self._token}"
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Exchange a new token at the next call; waits for nobody."""
        self._expires_at = 0.0

    def _exchange(self, transport: Transport, order: Call) -> None:
        # A call of its own: what it sends is nothing of the order.
        call = Call(order.deadline, order.monotonic)
        try:
            client = BackendApplicationClient(client_id=self._client_id)
            reply = transport.exchange(call, self._request(client))
            token = self._read(client, reply)
            self._token = str(token["access_token"] or "")
            # Without a lifetime it is used once: the API alone knows.
            self._expires_at = float(token.get("expires_at") or 0.0)
        except (TimeoutError, requests.Timeout):
            raise AuthenticationSlow("oauth_exchange_slow") from None
        # Whatever two libraries make of an odd answer: nothing was sent, and a claim
        # must not be left in doubt over it.
        except Exception:  # noqa: BLE001
            if call.is_over():
                raise AuthenticationSlow("oauth_exchange_slow") from None
            raise NotAuthenticated("oauth_exchange_failed") from None
        if not self._token:
            raise NotAuthenticated("oauth_token_empty")

    def _request(self, client: BackendApplicationClient) -> requests.Request:
        if not self._url.lower().startswith("https://"):
            raise InsecureTransportError
        secret = _read_secret(self._secret_file) if self._secret_file else ""
        return requests.Request(
            "POST",
            self._url,
            data=client.prepare_request_body(scope=self._scope),
            headers={
                "Accept": "application/json",
                "Content-Type": "application/x-www-form-urlencoded",
            },
            auth=(self._client_id, secret),
        )

    def _read(self, client: BackendApplicationClient, reply: Reply) -> dict[str, Any]:
        if not 200 <= reply.status < 300 or reply.body is None:  # noqa: PLR2004
            raise ValueError("no answer that may hold a token")
        text = reply.body.decode("utf-8")
        try:
            token: dict[str, Any] = client.parse_request_body_response(
                text, scope=self._scope
            )
        except Warning as changed:
            # Another scope was granted than asked (RFC 6749 section 3.3): oauthlib
            # raises that. Whether it is enough, the API says.
            token = changed.token  # type: ignore[attr-defined]
        return token


def _read_secret(path: Path) -> str:
    """The text of a credentials' file, without the blanks around it.

    Raises:
        OSError: it can't be read.
        ValueError: it is too long, or no text.

    """
    with path.open("rb") as file:
        content = file.read(_SECRET_BYTES_MAX + 1)
    if len(content) > _SECRET_BYTES_MAX:
        raise ValueError("too long for a credential")
    return content.decode("utf-8").strip()
