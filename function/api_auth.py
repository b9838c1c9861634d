"""How we prove to the recharge API who we are: a token file, or OAuth 2.

Owns the credentials; must never log one, nor let a failure look like a sent call.
"""

import threading
import time
from pathlib import Path
from typing import Any, Final, Protocol

from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session

from function.config import Settings
from function.errors import TopupError

#: A token is replaced so long before it expires, in seconds.
_MARGIN_S: Final = 30.0


class NotAuthenticated(TopupError):
    """No credentials can be had, so nothing was sent; `reason` is a constant."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Authenticator(Protocol):
    """Adds credentials to the headers of a request."""

    def __call__(self, headers: dict[str, str]) -> None:
        """Add the credentials.

        Raises:
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

    def __call__(self, headers: dict[str, str]) -> None:
        """Add the token; does nothing when no file is set."""
        if self._path is None:
            return
        try:
            # A mounted secret is replaced by a link to another file.
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                self._token = self._path.read_text("ascii").strip()
                self._seen = seen
        except (OSError, ValueError):
            raise NotAuthenticated("token_file_unreadable") from None
        if not self._token:
            raise NotAuthenticated("token_file_empty")
        headers["Authorization"] = f"Bearer {self._token}"

    def forget(self) -> None:
        """Read the file again at the next call."""
        self._seen = None


class OAuthClientCredentials:
    """OAuth 2 client credentials (RFC 6749 section 4.4), exchanged by oauthlib."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.recharge_api_oauth_token_url or ""
        self._client_id = settings.recharge_api_oauth_client_id or ""
        self._secret_file = settings.recharge_api_oauth_client_secret_file
        self._scope = (settings.recharge_api_oauth_scope or "").split() or None
        self._verify = (
            str(settings.recharge_api_tls_ca_file)
            if settings.recharge_api_tls_ca_file
            else True
        )
        self._timeout_s = settings.recharge_api_timeout_s
        self._lock = threading.Lock()
        self._token = ""
        self._expires_at = 0.0

    def __call__(self, headers: dict[str, str]) -> None:
        """Add a token that is still valid, exchanging a new one where needed."""
        # One exchange at a time; the others wait for its result, though not for ever.
        if not self._lock.acquire(timeout=self._timeout_s):
            raise NotAuthenticated("oauth_exchange_slow")
        try:
            if time.time() >= self._expires_at - _MARGIN_S:
                self._exchange()
            headers["Authorization"] = f"Bearer {self._token}"
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Exchange a new token at the next call."""
        with self._lock:
            self._expires_at = 0.0

    def _exchange(self) -> None:
        client = BackendApplicationClient(client_id=self._client_id)
        try:
            secret = self._secret_file.read_text("utf-8") if self._secret_file else ""
            with OAuth2Session(client=client, scope=self._scope) as session:
                session.trust_env = False
                # The secret goes to the address that was set, and nowhere else.
                session.max_redirects = 0
                session.verify = self._verify
                token = self._fetch(session, secret.strip())
            self._token = str(token["access_token"] or "")
            # Without a lifetime it is used once: the API alone knows.
            self._expires_at = float(token.get("expires_at") or 0.0)
        # Whatever two libraries make of an odd answer: nothing was sent, and a claim
        # must not be left in doubt over it.
        except Exception:  # noqa: BLE001
            raise NotAuthenticated("oauth_exchange_failed") from None
        if not self._token:
            raise NotAuthenticated("oauth_token_empty")

    def _fetch(self, session: OAuth2Session, secret: str) -> dict[str, Any]:
        try:
            token: dict[str, Any] = session.fetch_token(
                self._url,
                client_id=self._client_id,
                client_secret=secret,
                timeout=self._timeout_s,
                verify=None,  # As the session says.
            )
        except Warning as changed:
            # Another scope was granted than asked (RFC 6749 section 3.3): oauthlib
            # raises that. Whether it is enough, the API says.
            token = changed.token  # type: ignore[attr-defined]
        return token
