"""Settings: every name, default, unit and meaning, read once from the environment.

Owns all reading of `os.environ`; must never connect to anything.
"""

import contextlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints
from urllib.parse import SplitResult, urlsplit

from function.errors import SettingsError


def _setting(help_: str, *, default: Any = MISSING, is_secret: bool = False) -> Any:
    """A setting with its one line of help; without a default it is required."""
    metadata = {"help": help_}
    if default is MISSING:
        return field(metadata=metadata, repr=not is_secret)
    return field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the function can be told; a field `x_y` is the variable `X_Y`."""

    ledger_database_url: str = _setting(
        "Where the ledger is: `mysql+pymysql://user@host/db` or `sqlite:///file`.",
        is_secret=True,
    )
    ledger_password_file: Path | None = _setting(
        "File with the database password, read at each new connection.", default=None
    )
    ledger_tls_ca_file: Path | None = _setting(
        "CA that signed the database's certificate; turns verified TLS on.",
        default=None,
    )
    ledger_timeout_s: float = _setting(
        "Longest wait for one statement, connect and locks included.", default=5.0
    )
    ledger_lease_margin_s: float = _setting(
        "How much longer than `RECHARGE_API_DEADLINE_S` a claim excludes others, by "
        "the database's clock: for the settlement, and for clocks that differ.",
        default=5.0,
    )
    recharge_api_url: str = _setting("Base address of the recharge API.")
    recharge_api_profile: str = _setting(
        "A profile of function/profiles by name, or a path to a TOML file.",
        default="generic",
    )
    recharge_api_identity: str | None = _setting(
        "Names the recharge API in the ledger, for ever: what was sent to an API of "
        "another name is never settled by this one; profile and address when empty.",
        default=None,
    )
    recharge_api_kind: str | None = _setting(
        "`replay`, `refuse`, `lookup` or `none`: what the API can do about a repeated "
        "key; the profile's own when empty.",
        default=None,
    )
    recharge_api_replay_window_s: float | None = _setting(
        "How long a `replay` API knows a key, counted from the first send; the "
        "profile's own when empty.",
        default=None,
    )
    recharge_api_settle_s: float | None = _setting(
        "Age of an attempt after which a look-up that finds nothing proves that "
        "nothing was executed; the profile's own when empty.",
        default=None,
    )
    recharge_api_timeout_s: float = _setting(
        "Longest wait for the connection and between two reads; a look-up's whole "
        "time.",
        default=10.0,
    )
    recharge_api_deadline_s: float = _setting(
        "Hard end of a call, counted from before the claim.", default=15.0
    )
    recharge_api_idle_s: float = _setting(
        "Connections idle for longer are not used again; below what the API keeps.",
        default=4.0,
    )
    recharge_api_accepted_max_s: float = _setting(
        "Age at which a recharge that the API took over and has not finished is a "
        "person's case.",
        default=3600.0,
    )
    recharge_api_reversal_watch_s: float = _setting(
        "For so long after its success an accepted recharge is watched for a late "
        "reversal, which reads every success of that time each round; 0: not at all.",
        default=0.0,
    )
    recharge_api_tls_ca_file: Path | None = _setting(
        "CA that signed the API's certificate; the public ones when empty.",
        default=None,
    )
    recharge_api_token_file: Path | None = _setting(
        "File with a bearer token, read again when it changes.", default=None
    )
    recharge_api_oauth_token_url: str | None = _setting(
        "Where OAuth 2 client credentials are exchanged for a token.", default=None
    )
    recharge_api_oauth_client_id: str | None = _setting(
        "OAuth 2 client id.", default=None
    )
    recharge_api_oauth_client_secret_file: Path | None = _setting(
        "File with the OAuth 2 client secret, read at each exchange.", default=None
    )
    recharge_api_oauth_scope: str | None = _setting(
        "OAuth 2 scope to ask for, blank-separated.", default=None
    )
    event_type: str = _setting(
        "CloudEvents type of an order; ends in `.requested.v` and a number.",
        default="com.example.topup.requested.v1",
    )
    event_unknown_type_wait_s: float = _setting(
        "How long events of a type that this version does not know are delivered "
        "again, from the first sight of the type; then they are kept in quarantine.",
        default=600.0,
    )
    event_bytes_max: int = _setting(
        "Larger events are recorded in quarantine.", default=256 * 1024
    )
    event_read_timeout_s: float = _setting(
        "Longest wait for a request's body, and between two reads of it.", default=10.0
    )
    event_delivery_timeout_s: float = _setting(
        "`delivery.timeout` of the KafkaSource.", default=60.0
    )
    events_oidc_audience: str | None = _setting(
        "Events are admitted only with a token of this audience: `sink.audience` of "
        "the KafkaSource; empty: whoever reaches the function may post.",
        default=None,
    )
    events_oidc_issuer: str | None = _setting(
        "Who signs the tokens, exactly as in their `iss`; its keys are found from "
        "here by OpenID discovery.",
        default=None,
    )
    events_oidc_subjects: tuple[str, ...] | None = _setting(
        "Who may post, comma-separated and exact: "
        "`system:serviceaccount:NAMESPACE:NAME`.",
        default=None,
    )
    events_oidc_keys_url: str | None = _setting(
        "Where the issuer's keys are (JWKS), instead of discovery.", default=None
    )
    events_oidc_ca_file: Path | None = _setting(
        "CA that signed the certificate of the keys' server; the public ones when "
        "empty.",
        default=None,
    )
    events_oidc_keys_token_file: Path | None = _setting(
        "File with a bearer token for the keys' server, read at each fetch.",
        default=None,
    )
    server_threads: int = _setting(
        "Requests that run at once in a pod; both connection pools have this size.",
        default=8,
    )
    server_request_timeout_s: float = _setting(
        "`timeoutSeconds` of the Knative Revision.", default=90.0
    )
    server_graceful_timeout_s: float = _setting(
        "How long running calls may go on after SIGTERM.", default=50.0
    )
    server_termination_grace_s: float = _setting(
        "`terminationGracePeriodSeconds` of the pod.", default=60.0
    )
    event_redelivery_max_s: float = _setting(
        "Longest backoff of the source plus one delivery: a top-up that is older and "
        "unsettled will not come again by itself.",
        default=900.0,
    )
    resolver_interval_s: float = _setting(
        "Pause of the resolver between two rounds.", default=10.0
    )
    resolve_second_person_above_minor: int = _setting(
        "A decision about more than this, in minor units of whatever currency, needs "
        "two persons; 0: every decision.",
        default=10_000,
    )
    topic_retention_s: float = _setting(
        "How long the topic keeps a record (`retention.ms`).", default=604_800.0
    )
    dead_letter_retention_s: float = _setting(
        "How long a dead letter is kept, and can be replayed.", default=2_592_000.0
    )
    replay_horizon_s: float = _setting(
        "How long after that a copy of a record may still be posted by somebody.",
        default=604_800.0,
    )
    log_level: str = _setting("DEBUG, INFO, WARNING or ERROR.", default="INFO")

    @property
    def ledger_lease_s(self) -> float:
        """How long a claim excludes others, in seconds by the database's clock.

        Nothing is sent after the deadline, so no process can still send when it ends.
        """
        return self.recharge_api_deadline_s + self.ledger_lease_margin_s

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Read every setting and check how they stand to each other.

        Raises:
            SettingsError: names every setting that is missing or wrong, in one
                message. The caller refuses to start.

        """
        return cls._read(os.environ if env is None else env, optional=frozenset())

    @classmethod
    def ledger_only(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Read the settings of a command that never calls the recharge API.

        The API's address may be missing; whatever is there is checked all the same.

        Raises:
            SettingsError: as `from_env`.

        """
        env = os.environ if env is None else env
        return cls._read(env, optional=frozenset({"recharge_api_url"}))

    @classmethod
    def _read(cls, env: Mapping[str, str], optional: frozenset[str]) -> "Settings":
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        problems = [
            f"{name} is no setting any more: {now}"
            for name, now in _GONE.items()
            if name in env
        ]
        for item in fields(cls):
            raw = env.get(item.name.upper(), "").strip()
            if raw:
                try:
                    values[item.name] = _parse(hints[item.name], raw)
                except ValueError as error:
                    problems.append(f"{item.name.upper()}: {error}")
            elif item.name in optional:
                values[item.name] = ""
            elif item.default is MISSING:
                problems.append(f"{item.name.upper()} is missing: {_help(item)}")
        if problems:
            raise SettingsError("; ".join(problems))
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Check bounds and the order of the deadlines (README, Settings).

        Raises:
            SettingsError: names each pair that stands in the wrong order.

        """
        problems = [
            f"{name.upper()} must be greater than 0"
            for name in _POSITIVE
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        problems += [
            f"{name.upper()} must not be less than 0"
            for name in (
                "event_unknown_type_wait_s",
                "resolve_second_person_above_minor",
                "replay_horizon_s",
            )
            if getattr(self, name) < 0
        ]
        problems += [
            f"{_NAME.get(low, low.upper())} ({getattr(self, low):g}) must be less than "
            f"{high.upper()} ({getattr(self, high):g}): {why}"
            for low, high, why in _ORDER
            if not getattr(self, low) < getattr(self, high)
        ]
        is_oauth = [
            self.recharge_api_oauth_token_url,
            self.recharge_api_oauth_client_id,
            self.recharge_api_oauth_client_secret_file,
        ]
        if any(is_oauth) and not all(is_oauth):
            problems.append(
                "RECHARGE_API_OAUTH_TOKEN_URL, RECHARGE_API_OAUTH_CLIENT_ID and "
                "RECHARGE_API_OAUTH_CLIENT_SECRET_FILE go together: set all or none"
            )
        if any(is_oauth) and self.recharge_api_token_file:
            problems.append(
                "RECHARGE_API_TOKEN_FILE and RECHARGE_API_OAUTH_TOKEN_URL are two ways "
                "to authenticate: set one"
            )
        if self.recharge_api_url and _split(self.recharge_api_url) is None:
            problems.append("RECHARGE_API_URL must be an http:// or https:// address")
        if not _EVENT_TYPE.fullmatch(self.event_type):
            # The completion event's type is made from it, and must be another one.
            problems.append("EVENT_TYPE must end in .requested.v and a number")
        if self.recharge_api_reversal_watch_s < 0:
            problems.append("RECHARGE_API_REVERSAL_WATCH_S must not be negative")
        if not is_identity(self.recharge_api_identity or "api"):
            problems.append(
                "RECHARGE_API_IDENTITY must be 1 to 200 visible ASCII characters"
            )
        if self.recharge_api_kind not in _KINDS:
            problems.append("RECHARGE_API_KIND must be replay, refuse, lookup or none")
        problems += self._problems_of_events_oidc()
        if self.log_level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            problems.append("LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR")
        if problems:
            raise SettingsError("; ".join(problems))

    def _problems_of_events_oidc(self) -> list[str]:
        """What is wrong about who may post; half of it must never admit everybody."""
        together = [
            self.events_oidc_audience,
            self.events_oidc_issuer,
            self.events_oidc_subjects,
        ]
        keys_url = self.events_oidc_keys_url
        more = [keys_url, self.events_oidc_ca_file, self.events_oidc_keys_token_file]
        if not any(together) and not any(more):
            return []
        if not all(together):
            return [_OIDC_TOGETHER]
        problems = []
        if any("*" in subject for subject in self.events_oidc_subjects or ()):
            problems.append("EVENTS_OIDC_SUBJECTS are whole names: `*` means nothing")
        name = "EVENTS_OIDC_KEYS_URL" if keys_url else "EVENTS_OIDC_ISSUER"
        address = _split(keys_url or self.events_oidc_issuer or "")
        if address is None:
            hint = "" if keys_url else "; else set EVENTS_OIDC_KEYS_URL"
            problems.append(f"{name} must be an http:// or https:// address{hint}")
        elif self.events_oidc_keys_token_file and address.scheme != "https":
            problems.append(
                f"{name} must begin with https:// where EVENTS_OIDC_KEYS_TOKEN_FILE "
                "is set: the token would be sent in the clear"
            )
        return problems


def is_identity(text: str) -> bool:
    """Whether a text can name a recharge API in the ledger."""
    return bool(_IDENTITY.fullmatch(text))


def _split(address: str) -> SplitResult | None:
    """The parts of an http or https address, or None if it is none."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        # Reading the port is what checks it.
        if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
            return parts
    return None


#: Left must be less than right, or the safety argument named breaks.
_ORDER: Final = (
    (
        "recharge_api_timeout_s",
        "recharge_api_deadline_s",
        "one read may not outlast the call",
    ),
    (
        "ledger_lease_s",
        "event_delivery_timeout_s",
        "the source may not give up on a delivery that can still be settled",
    ),
    (
        "event_delivery_timeout_s",
        "server_request_timeout_s",
        "the Revision may not cut a delivery that the source still waits for",
    ),
    (
        "recharge_api_deadline_s",
        "server_graceful_timeout_s",
        "a running call must be able to finish after SIGTERM",
    ),
    (
        "server_graceful_timeout_s",
        "server_termination_grace_s",
        "the pod may not be killed while it drains",
    ),
)

_OIDC_TOGETHER: Final = (
    "EVENTS_OIDC_AUDIENCE, EVENTS_OIDC_ISSUER and EVENTS_OIDC_SUBJECTS go together, "
    "and no other EVENTS_OIDC setting without them: set all three or none"
)

#: What a sum of settings is called.
LEASE: Final = "RECHARGE_API_DEADLINE_S + LEDGER_LEASE_MARGIN_S"
_NAME: Final = {"ledger_lease_s": LEASE}
#: Settings that are gone -> what there is now.
_GONE: Final = {
    "LEDGER_LEASE_S": f"the lease is {LEASE}; set the margin, if not 5 s",
}

#: None: the profile says.
_KINDS: Final = frozenset({None, "replay", "refuse", "lookup", "none"})
_IDENTITY: Final = re.compile(r"[!-~]{1,200}")
_EVENT_TYPE: Final = re.compile(r".+\.requested\.v[0-9]+")

_POSITIVE: Final = (
    "ledger_timeout_s",
    "ledger_lease_margin_s",
    "recharge_api_timeout_s",
    "recharge_api_idle_s",
    "recharge_api_replay_window_s",
    "recharge_api_settle_s",
    "recharge_api_accepted_max_s",
    "event_bytes_max",
    "event_read_timeout_s",
    "event_redelivery_max_s",
    "server_threads",
    "resolver_interval_s",
    "topic_retention_s",
    "dead_letter_retention_s",
)


def _help(item: "Field[Any]") -> str:
    return str(item.metadata["help"])


def _parse(hint: Any, raw: str) -> Any:
    """Turn a variable's text into the field's type; ValueError says what is wrong."""
    if hint is int:
        return _number(int, raw, "a whole number")
    if hint in {float, float | None}:
        return _number(float, raw, "a number")
    if hint == Path | None:
        if not Path(raw).is_file():
            raise ValueError(f"no such file: {raw}")
        return Path(raw)
    if hint == tuple[str, ...] | None:
        return tuple(item.strip() for item in raw.split(",") if item.strip()) or None
    return raw


def _number(kind: type[int] | type[float], raw: str, what: str) -> int | float:
    with contextlib.suppress(ValueError, OverflowError):
        number = kind(raw)
        # NaN stands in no order to a deadline, and infinity is no deadline.
        if math.isfinite(number):
            return number
    raise ValueError(f"must be {what}")


def environment() -> dict[str, str]:
    """The variables that this process was given."""
    return dict(os.environ)


def settings_table() -> list[tuple[str, str, str]]:
    """Name, default and help of every setting, as the README shows them."""
    return [
        (
            item.name.upper(),
            "required"
            if item.default is MISSING
            else ("" if item.default is None else str(item.default)),
            _help(item),
        )
        for item in fields(Settings)
    ]
