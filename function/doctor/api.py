"""Whether the recharge API can be reached with our credentials.

Owns the one question that can be asked without any chance of a recharge; must never
build the request that moves credit.
"""

import secrets
import socket
import ssl
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from function.api_auth import NotAuthenticated, make_authenticator
from function.api_profile import ApiProfile, Kind, load_profile
from function.config import Settings
from function.doctor.diagnosis import Diagnosis, error, ok, unknown, warning
from function.errors import SettingsError
from function.model import Finding
from function.recharge_api import RechargeApi

_SUBJECT: Final = "recharge API"
#: What the API says when it refuses us, not the question.
_REFUSALS: Final = frozenset({"http_401", "http_403"})


def check_api(settings: Settings) -> Iterator[Diagnosis]:
    """Ask the API about a key that nobody has, or only knock at its door."""
    try:
        profile = load_profile(settings)
    except SettingsError as problem:
        yield error(_SUBJECT, str(problem), "correct the profile or the setting")
        return
    if settings.recharge_api_url.startswith("http://"):
        yield warning(
            _SUBJECT,
            "is called in plain text",
            "set RECHARGE_API_URL to an https address",
        )
    if not (settings.recharge_api_token_file or settings.recharge_api_oauth_token_url):
        yield warning(
            _SUBJECT,
            "is given no credentials",
            "set RECHARGE_API_TOKEN_FILE or RECHARGE_API_OAUTH_TOKEN_URL",
        )
    if _can_be_asked(profile):
        yield from _look_up(settings, profile)
    else:
        yield from _knock(settings, profile)


def _can_be_asked(profile: ApiProfile) -> bool:
    """Whether there is a look-up, and nobody could take it for an order.

    One that is posted to where orders are posted differs by its body alone: a slip in
    the profile would be a recharge.
    """
    rules = profile.look_up
    if rules is None or profile.kind is Kind.NONE:
        return False
    is_reading = rules.request.method in {"GET", "HEAD"}
    return is_reading or rules.request.path != profile.request.path


def _look_up(settings: Settings, profile: ApiProfile) -> Iterator[Diagnosis]:
    api = RechargeApi(settings, profile, make_authenticator(settings))
    try:
        # Random, so that nobody's order can be meant; no request to recharge is built.
        found = api.look_up(profile.render_key(f"doctor:{secrets.token_hex(16)}"))
    finally:
        api.close()
    if found.finding is Finding.ABSENT:
        yield ok(
            _SUBJECT,
            "answers a look-up of an unknown key with our credentials; that it lets "
            "us recharge is not proven",
        )
    elif found.finding is not Finding.UNKNOWN:
        yield error(
            _SUBJECT,
            f"says {found.finding.value} about a key that nobody has: what it answers "
            "to a look-up can't be relied on",
            "correct look_up in the profile",
        )
    elif found.reason in _REFUSALS:
        yield error(
            _SUBJECT,
            f"refuses our credentials ({found.reason})",
            "renew the token or the OAuth client",
        )
    else:
        yield unknown(
            _SUBJECT,
            f"can't be asked ({found.reason})",
            "check RECHARGE_API_URL, RECHARGE_API_TLS_CA_FILE, the credentials' file, "
            "look_up in the profile, and that this machine may reach it",
        )


def _knock(settings: Settings, profile: ApiProfile) -> Iterator[Diagnosis]:
    """Connect, verify the certificate, fetch a token; send nothing to the API."""
    address = urlsplit(settings.recharge_api_url)
    host = address.hostname or ""
    is_tls = address.scheme == "https"
    port = address.port or (443 if is_tls else 80)
    ca = settings.recharge_api_tls_ca_file
    try:
        with socket.create_connection(
            (host, port), settings.recharge_api_timeout_s
        ) as connection:
            if is_tls:
                context = ssl.create_default_context(cafile=str(ca) if ca else None)
                context.wrap_socket(connection, server_hostname=host).close()
    except OSError as problem:
        yield unknown(
            _SUBJECT,
            f"can't be reached ({type(problem).__name__})",
            "check RECHARGE_API_URL and RECHARGE_API_TLS_CA_FILE, and that this "
            "machine may reach it",
        )
        return
    api = RechargeApi(settings, profile, make_authenticator(settings))
    try:
        api.check_credentials()
    except NotAuthenticated as problem:
        yield error(
            _SUBJECT,
            f"no credentials can be had ({problem.reason})",
            "check the token's file, or the OAuth client",
        )
        return
    finally:
        api.close()
    proven = "a connection and its certificate" if is_tls else "a connection"
    yield ok(
        _SUBJECT,
        f"has no look-up that is safe to try: only {proven} was proven, not what our "
        "credentials are worth",
    )
