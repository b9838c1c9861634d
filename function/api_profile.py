"""The API profile: what the recharge API can do, read from a small TOML file.

Owns the rendering of requests and keys and the classification of answers, all pure;
must never do I/O beyond reading its own file.
"""

import re
import tomllib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum, unique
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from function.config import Settings
from function.errors import SettingsError
from function.model import Answer, AnswerClass, Finding, LookUp, TopUp

#: Of several rows of one key, the one that decides.
_MOST_TELLING_FIRST: Final = (
    Finding.EXECUTED,
    Finding.UNKNOWN,
    Finding.PENDING,
    Finding.REVERSED,
)
_PROFILES: Final = Path(__file__).parent / "profiles"
_FIELD: Final = re.compile(r"\{(\w+)\}")
#: A reason is logged and answered: only what can't be anybody's text or number.
_CONSTANT: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_REFERENCE_CHARACTERS_MAX: Final = 200
_WORDS_CHARACTERS_MAX: Final = 500
#: What `template_values` gives to a recharge; a look-up knows only the key.
_FIELDS: Final = frozenset(
    {
        "key",
        "msisdn",
        "donor_msisdn",
        "amount_minor",
        "currency",
        "channel",
        "recharge_id",
        "requested_at",
    }
)
_FIELDS_OF_LOOK_UP: Final = frozenset({"key"})


@unique
class Kind(StrEnum):
    """What the API does about a repeated key (docs/ARCHITECTURE.md)."""

    REPLAY = "replay"
    REFUSE = "refuse"
    LOOKUP = "lookup"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the classification: all of its conditions must hold."""

    classified: AnswerClass
    status: frozenset[int]
    where: Mapping[str, frozenset[str]]
    has: tuple[str, ...]

    def matches(self, status: int, document: object) -> bool:
        """Whether status and body together meet every condition."""
        return (
            status in self.status
            and all(_text(_at(document, path), 1) for path in self.has)
            and all(
                isinstance(value := _at(document, path), str) and value in wanted
                for path, wanted in self.where.items()
            )
        )


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """How one request is built."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    body: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LookUpRules:
    """How the API is asked by our key, and how its answer reads."""

    request: RequestTemplate
    rows: str
    match: str
    status: str
    findings: Mapping[str, Finding]
    reference: str
    #: Where the API says that it took an executed one back; empty if it never says.
    reversed: str

    def finding_of(self, row: object) -> Finding:
        """What one row of the API's list says."""
        if self.reversed and _at(row, self.reversed) is True:
            return Finding.REVERSED
        return self.findings.get(str(_at(row, self.status)), Finding.UNKNOWN)


@dataclass(frozen=True, slots=True)
class ApiProfile:
    """One recharge API, described and not guessed."""

    name: str
    kind: Kind
    #: Seconds from the first send for which a repeated key is a protection.
    window_s: float
    kind_after_window: Kind
    #: Seconds after which a look-up that finds nothing is proof.
    settle_s: float
    key_render: str
    key_length_max: int
    request: RequestTemplate
    reference: str
    reason: str
    words: str
    rules: tuple[Rule, ...]
    look_up: LookUpRules | None

    def render_key(self, idempotency_key: str) -> str:
        """What the API is given as the key: the same for the same order, always.

        A key too long for the API is replaced by its SHA-256 in hex, cut to fit.
        """
        digest = sha256(idempotency_key.encode("ascii"))
        if self.key_render == "uuid4":
            return str(uuid.UUID(bytes=digest.digest()[:16], version=4))
        if len(idempotency_key) > self.key_length_max:
            return digest.hexdigest()[: self.key_length_max]
        return idempotency_key

    def classify(self, status: int, document: object) -> Answer:
        """Say what an answer means: the first rule that matches, else unknown.

        Args:
            status: HTTP status.
            document: the body parsed as JSON, or None when it is not JSON.

        """
        classified = next(
            (rule.classified for rule in self.rules if rule.matches(status, document)),
            AnswerClass.UNKNOWN,
        )
        return Answer(
            classified,
            http_status=status,
            reference=_text(_at(document, self.reference), _REFERENCE_CHARACTERS_MAX),
            reason=_constant(_at(document, self.reason)) or f"http_{status}",
            words=_text(_at(document, self.words), _WORDS_CHARACTERS_MAX) or "",
        )

    def read_look_up(self, status: int, document: object, key: str) -> LookUp:
        """Say what a look-up found; only a list of ours that is empty means absent.

        Args:
            status: HTTP status.
            document: the body parsed as JSON, or None when it is not JSON.
            key: the rendered key that was asked for; rows of other keys don't count.

        """
        rules = self.look_up
        rows = _at(document, rules.rows) if rules else None
        if rules is None or status != 200 or not isinstance(rows, list):  # noqa: PLR2004
            return LookUp(Finding.UNKNOWN, reason=f"http_{status}")
        if any(not _text(_at(row, rules.match), 1) for row in rows):
            # It may be ours: absent would be a guess.
            return LookUp(Finding.UNKNOWN, reason="row_without_key")
        ours = [row for row in rows if _at(row, rules.match) == key]
        found = [(rules.finding_of(row), row) for row in ours]
        executed = [row for finding, row in found if finding is Finding.EXECUTED]
        if len(executed) > 1:
            return LookUp(Finding.SEVERAL, reason="executed_several_times")
        for finding in _MOST_TELLING_FIRST:
            for each, row in found:
                if each is finding:
                    reference = _at(row, rules.reference)
                    return LookUp(finding, _text(reference, _REFERENCE_CHARACTERS_MAX))
        return LookUp(Finding.FAILED if found else Finding.ABSENT)


def load_profile(settings: Settings) -> ApiProfile:
    """Read the profile that the settings name, with the settings' own words on top.

    Raises:
        SettingsError: the file is missing or wrong, or its times contradict the
            settings; names the setting. The caller refuses to start.

    """
    name = settings.recharge_api_profile
    path = Path(name) if name.endswith(".toml") else _PROFILES / f"{name}.toml"
    try:
        profile = _parse(tomllib.loads(path.read_text("utf-8")))
        profile = replace(
            profile,
            kind=Kind(settings.recharge_api_kind or profile.kind),
            window_s=settings.recharge_api_replay_window_s or profile.window_s,
            settle_s=settings.recharge_api_settle_s or profile.settle_s,
        )
    except OSError:
        known = ", ".join(sorted(each.stem for each in _PROFILES.glob("*.toml")))
        raise SettingsError(
            f"RECHARGE_API_PROFILE: no file {path}; known by name: {known}"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"RECHARGE_API_PROFILE or RECHARGE_API_KIND: {path.name}: {error!r}"
        ) from None
    is_asked = profile.kind in {Kind.REFUSE, Kind.LOOKUP}
    if profile.kind is Kind.REPLAY and not profile.window_s > profile.settle_s:
        raise SettingsError(
            f"RECHARGE_API_REPLAY_WINDOW_S ({profile.window_s:g}) must be greater "
            f"than RECHARGE_API_SETTLE_S ({profile.settle_s:g}): what is sent last "
            "must land within the window"
        )
    if is_asked and profile.look_up is None:
        raise SettingsError(
            f"RECHARGE_API_KIND is {profile.kind}, but {path.name} has no [look_up]"
        )
    if is_asked and not profile.settle_s > settings.ledger_lease_s:
        raise SettingsError(
            f"RECHARGE_API_SETTLE_S ({profile.settle_s:g}) must be greater than "
            f"LEDGER_LEASE_S ({settings.ledger_lease_s:g}): a look-up may not count as "
            "proof while the attempt can still send"
        )
    return profile


def render(template: str, values: Mapping[str, Any]) -> Any:
    """Fill a template; one that is a single `{field}` keeps the field's type."""
    whole = _FIELD.fullmatch(template)
    if whole:
        return values[whole[1]]
    return _FIELD.sub(lambda match: str(values[match[1]]), template)


def template_values(topup: TopUp | None, key: str) -> dict[str, Any]:
    """The fields that a template may name: those of `_FIELDS`."""
    if topup is None:
        return {"key": key}
    return {
        "key": key,
        "msisdn": topup.msisdn,
        "donor_msisdn": topup.donor_msisdn,
        "amount_minor": topup.amount_minor,
        "currency": topup.currency,
        "channel": topup.channel,
        "recharge_id": topup.recharge_id,
        "requested_at": topup.requested_at,
    }


def _parse(document: dict[str, Any]) -> ApiProfile:
    answer, key = document["answer"], document["key"]
    if key["render"] not in {"as_is", "uuid4"}:
        raise ValueError("key.render must be as_is or uuid4")
    return ApiProfile(
        name=document["name"],
        kind=Kind(document["kind"]),
        window_s=float(document["window_s"]),
        kind_after_window=Kind(document["kind_after_window"]),
        settle_s=float(document["settle_s"]),
        key_render=key["render"],
        key_length_max=int(key["length_max"]),
        request=_request(document["request"], _FIELDS),
        reference=answer["reference"],
        reason=answer["reason"],
        words=answer["words"],
        rules=tuple(_rule(rule) for rule in answer["rules"]),
        look_up=_look_up(document["look_up"]) if "look_up" in document else None,
    )


def _request(part: dict[str, Any], fields: frozenset[str]) -> RequestTemplate:
    templates = [part["path"]]
    for name in ("headers", "query", "body"):
        templates += part.get(name, {}).values()
    # Found now, not between a claim and its send.
    unknown = {name for text in templates for name in _FIELD.findall(text)} - fields
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    return RequestTemplate(
        part["method"],
        part["path"],
        part.get("headers", {}),
        part.get("query", {}),
        part.get("body", {}),
    )


def _rule(part: dict[str, Any]) -> Rule:
    where = {path: frozenset(values) for path, values in part.get("where", {}).items()}
    return Rule(
        AnswerClass(part["class"]),
        frozenset(part["status"]),
        where,
        tuple(part.get("has", ())),
    )


def _look_up(part: dict[str, Any]) -> LookUpRules:
    findings: dict[str, Finding] = {}
    for finding in (Finding.EXECUTED, Finding.FAILED, Finding.PENDING):
        names: Iterable[str] = part[finding.value]
        findings |= dict.fromkeys(names, finding)
    return LookUpRules(
        _request(part, _FIELDS_OF_LOOK_UP),
        part["rows"],
        part["match"],
        part["status"],
        findings,
        part["reference"],
        part.get("reversed", ""),
    )


def _at(document: object, path: str) -> Any:
    """The value at a dotted path, or None."""
    for name in path.split("."):
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


def _constant(value: object) -> str | None:
    return value if isinstance(value, str) and _CONSTANT.fullmatch(value) else None


def _text(value: object, characters_max: int) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    # Half a character, which JSON can spell, is one that no database takes.
    whole = str(value).encode("utf-8", "replace").decode("utf-8")
    return whole[:characters_max] or None
