"""Who may post events: deliveries with a valid token of the cluster's issuer.

Owns the check and the count of what was refused; must never log or answer anything of
a token, nor admit what it can't check. PyJWT does the cryptography.
"""

import math
import re
import threading
import time
from collections import Counter
from typing import Final

import jwt

from function import telemetry
from function.config import Settings
from function.errors import TopupError
from function.issuer_keys import ALGORITHMS, IssuerKeys, KeysUnavailable

#: How far the issuer's clock and ours may differ, in seconds.
LEEWAY_S: Final = 60.0
#: A reason is told of at most so often, in seconds: outsiders must not fill the log.
_TELL_EVERY_S: Final = 10.0

#: One scheme, one token: two headers arrive joined by a comma, and are none.
_BEARER: Final = re.compile(r"bearer +([a-z0-9._~+/=-]+)", re.IGNORECASE | re.ASCII)

#: What PyJWT says, and what it is called in the log and the count: the first class
#: that fits.
REASON_OF_ERROR: Final[tuple[tuple[type[Exception], str], ...]] = (
    (jwt.ExpiredSignatureError, "expired"),
    (jwt.ImmatureSignatureError, "not_yet_valid"),
    (jwt.InvalidIssuerError, "issuer"),
    (jwt.InvalidAudienceError, "audience"),
    (jwt.exceptions.InvalidSubjectError, "subject"),
    (jwt.MissingRequiredClaimError, "claim_missing"),
    (jwt.InvalidAlgorithmError, "algorithm"),
    (jwt.InvalidSignatureError, "signature"),
    # The issuer's key is too short.
    (jwt.InvalidKeyError, "key"),
    (jwt.PyJWTError, "malformed"),
)


class NotAdmitted(TopupError):
    """No token, a bad one, or one that can't be checked; the message is a constant."""


class EventTokens:
    """The check of one process; safe to share between threads.

    Args:
        settings: audience, issuer and subjects; without an audience all are admitted.

    Raises:
        SettingsError: EVENTS_OIDC_CA_FILE has no certificates.

    """

    def __init__(self, settings: Settings) -> None:
        self._audience = settings.events_oidc_audience
        self._issuer = settings.events_oidc_issuer
        self._subjects = frozenset(settings.events_oidc_subjects or ())
        self._keys = IssuerKeys(settings)
        self._lock = threading.Lock()
        #: Reason -> deliveries refused for it by this process.
        self.refused: Counter[str] = Counter()
        self._told_at: dict[str, float] = {}

    def admit(self, authorization: str | None) -> None:
        """Return if the sender may post events.

        Args:
            authorization: the request's header, if it has one.

        Raises:
            NotAdmitted: it may not; counted by reason, and told.

        """
        if self._audience is None:
            return
        try:
            self._check(authorization)
        except NotAdmitted as error:
            self._count(str(error))
            raise

    def _check(self, authorization: str | None) -> None:
        if not authorization:
            raise NotAdmitted("no_token")
        bearer = _BEARER.fullmatch(authorization)
        if bearer is None:
            raise NotAdmitted("malformed")
        token = bearer[1]
        try:
            claims = jwt.decode(
                token,
                self._key_of(token),
                algorithms=ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={
                    "require": ["iss", "aud", "exp", "sub"],
                    "enforce_minimum_key_length": True,
                },
            )
        except jwt.PyJWTError as error:
            reason = next(r for kind, r in REASON_OF_ERROR if isinstance(error, kind))
            raise NotAdmitted(reason) from None
        if claims["sub"] not in self._subjects:
            raise NotAdmitted("subject")

    def _key_of(self, token: str) -> jwt.PyJWK:
        """The issuer's key that the token says it is signed with."""
        header = jwt.get_unverified_header(token)
        # Before the issuer is asked for a key: what can't be verified is no reason to.
        if header.get("alg") not in ALGORITHMS:
            raise NotAdmitted("algorithm")
        if not header.get("kid"):
            raise NotAdmitted("unknown_key")
        try:
            key = self._keys.find(header["kid"])
        except KeysUnavailable:
            raise NotAdmitted("keys_unavailable") from None
        if key is None:
            raise NotAdmitted("unknown_key")
        return key

    def _count(self, reason: str) -> None:
        now = time.monotonic()
        with self._lock:
            self.refused[reason] += 1
            count = self.refused[reason]
            is_due = now - self._told_at.get(reason, -math.inf) >= _TELL_EVERY_S
            if is_due:
                self._told_at[reason] = now
        if is_due:
            telemetry.alert("not_admitted", "", reason, count=count)
