"""The API profile: what the recharge API can do, read from a small TOML file.

Owns the rendering of requests and keys and the classification of answers, all pure;
must never do I/O beyond reading its own file.
"""

import re
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum, unique
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from function.closed_table import ClosedTable
from function.config import LEASE, Settings, is_identity
from function.errors import InvalidEvent, SettingsError
from function.model import (
    NOTHING_EXECUTED,
    Answer,
    AnswerClass,
    Finding,
    LookUp,
    TopUp,
)

#: Of several rows of one key, the one that decides.
_MOST_TELLING_FIRST: Final = (
    Finding.EXECUTED,
    Finding.UNKNOWN,
    Finding.PENDING,
    Finding.REVERSED,
)
_PROFILES: Final = Path(__file__).parent / "profiles"
_FIELD: Final = re.compile(r"\{(\w+)\}")
_METHOD: Final = re.compile(r"[A-Z]{1,20}")
_PATH: Final = re.compile(r"/[^?#\s]*")
#: What can stand in a header without being changed on its way (RFC 9110, 5.5).
_HEADER_VALUE: Final = re.compile(r"[!-~]([ -~]*[!-~])?")
#: A key that is cut shorter can be the same for two orders.
KEY_LENGTH_LEAST: Final = 16
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
_TAKEN: Final = frozenset({AnswerClass.DONE, AnswerClass.ACCEPTED})
_NOT_TAKEN: Final = NOTHING_EXECUTED | {AnswerClass.NO}
#: The reason of a look-up that shows others' rows alone: it proves no absence.
ROWS_OF_OTHER_KEYS: Final = "rows_of_other_keys"
#: The reason of an answer that repeats another key than was sent, or none.
ANSWER_OF_ANOTHER_KEY: Final = "answer_of_another_key"
#: The reason of an answer whose status and body can't both be true.
CONTRADICTS_ITSELF: Final = "answer_contradicts_itself"


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
    #: A text or a whole number must stand there.
    has: tuple[str, ...]
    #: A text must: a gateway's own page may well have a number there.
    has_text: tuple[str, ...]

    def matches(self, status: int, document: object) -> bool:
        """Whether status and body together meet every condition."""
        return status in self.status and self.fits(document)

    def fits(self, document: object) -> bool:
        """Whether the body alone meets every condition."""
        return (
            all(_text(_at(document, path), 1) for path in self.has)
            and all(_is_text(_at(document, path)) for path in self.has_text)
            and all(
                isinstance(value := _at(document, path), str) and value in wanted
                for path, wanted in self.where.items()
            )
        )

    @property
    def is_about_the_body(self) -> bool:
        """Whether the body says something by it, whatever the status."""
        return bool(self.where)


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """How one request is built."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    body: Mapping[str, str]
    #: The order's own fields that headers name; the key is always fit for one.
    header_fields: tuple[str, ...]


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
    #: Where an answer that takes the order repeats our key; empty: it does not.
    answered_key: str
    rules: tuple[Rule, ...]
    look_up: LookUpRules | None
    #: Which API this is, in the ledger: what was sent to another is not ours to settle.
    identity: str = ""

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

    def require_sendable(self, topup: TopUp) -> None:
        """Raise unless each value of the order can stand where the profile puts it.

        In a body and a query every text can; in a header and a path not.

        Raises:
            InvalidEvent: it can never be sent as it is; put it in quarantine.

        """
        request = self.request
        if "{" not in request.path and not request.header_fields:
            return
        values = template_values(topup, self.render_key(topup.idempotency_key))
        for field in request.header_fields:
            value = values[field]
            if value is not None and not _HEADER_VALUE.fullmatch(str(value)):
                raise InvalidEvent(f"{field}: can't stand in a header of the request")
        try:
            render_path(request.path, values)
        except ValueError:
            raise InvalidEvent("path: a value can't stand in the request's") from None

    def classify(self, status: int, document: object, key: str) -> Answer:
        """Say what an answer means: the first rule that matches, else unknown.

        Args:
            status: HTTP status.
            document: the body parsed as JSON, or None when it is not JSON.
            key: the rendered key that was sent.

        """
        classified = next(
            (rule.classified for rule in self.rules if rule.matches(status, document)),
            AnswerClass.UNKNOWN,
        )
        reason = _constant(_at(document, self.reason)) or f"http_{status}"
        if classified in _NOT_TAKEN and any(
            rule.classified in _TAKEN and rule.is_about_the_body and rule.fits(document)
            for rule in self.rules
        ):
            # The status says that nothing was executed, the body that it was.
            classified, reason = AnswerClass.UNKNOWN, CONTRADICTS_ITSELF
        is_named = bool(self.answered_key) and classified in _TAKEN
        if is_named and _at(document, self.answered_key) != key:
            # What some other order was answered, or nobody knows which.
            return Answer(
                AnswerClass.UNKNOWN, http_status=status, reason=ANSWER_OF_ANOTHER_KEY
            )
        return Answer(
            classified,
            http_status=status,
            reference=_text(_at(document, self.reference), _REFERENCE_CHARACTERS_MAX),
            reason=reason,
            words=_text(_at(document, self.words), _WORDS_CHARACTERS_MAX) or "",
        )

    def read_look_up(self, status: int, document: object, key: str) -> LookUp:
        """Say what a look-up found; only a list that is empty means absent.

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
        if rows and not ours:
            # A list that is not filtered, or paged, or another query's, or a key that
            # is echoed in another form: ours may be elsewhere.
            return LookUp(Finding.UNKNOWN, reason=ROWS_OF_OTHER_KEYS)
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
            identity=_identity(settings, profile.name),
        )
    except OSError:
        known = ", ".join(sorted(each.stem for each in _PROFILES.glob("*.toml")))
        raise SettingsError(
            f"RECHARGE_API_PROFILE: no file {path}; known by name: {known}"
        ) from None
    except ValueError as error:
        raise SettingsError(
            f"RECHARGE_API_PROFILE or RECHARGE_API_KIND: {path.name}: {error}"
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
    is_asked_later = (
        profile.kind is Kind.REPLAY
        and profile.kind_after_window is not Kind.NONE
        and profile.look_up is not None
    )
    if (is_asked or is_asked_later) and not (
        profile.settle_s > settings.ledger_lease_s
    ):
        raise SettingsError(
            f"RECHARGE_API_SETTLE_S ({profile.settle_s:g}) must be greater than "
            f"{LEASE} ({settings.ledger_lease_s:g}): a look-up may not count as proof "
            "while the attempt can still send"
        )
    return profile


def _identity(settings: Settings, profile: str) -> str:
    """The API's name in the ledger: what is set, or its profile and address.

    Raises:
        SettingsError: the address is too long for one.

    """
    if settings.recharge_api_identity:
        return settings.recharge_api_identity
    if not settings.recharge_api_url:
        return profile
    parts = urlsplit(settings.recharge_api_url)
    # Not what may stand before the host, which is a secret; nor the scheme.
    port = f":{parts.port}" if parts.port else ""
    identity = f"{profile}@{parts.hostname}{port}{parts.path.rstrip('/')}"
    if not is_identity(identity):
        raise SettingsError(
            "RECHARGE_API_IDENTITY is missing: RECHARGE_API_URL makes none of at most "
            "200 visible ASCII characters"
        )
    return identity


def render_path(template: str, values: Mapping[str, Any]) -> str:
    """Fill a path's template; each value is encoded for its segment (RFC 3986, 3.3).

    Raises:
        ValueError: a segment would be one that means another path, or a value is none.
            `require_sendable` refuses such an order when it is read.

    """
    fields = {name: values[name] for name in _FIELD.findall(template)}
    if None in fields.values():
        raise ValueError("a field of the path has no value")
    path = _FIELD.sub(lambda match: quote(str(fields[match[1]]), safe=""), template)
    if fields and {".", "..", ""} & set(path.split("/")[1:]):
        # Encoded they mean the same (RFC 3986, 6.2.2.2), and clients take them out.
        raise ValueError("a segment of the path means another path")
    return path


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
    file = ClosedTable("", document)
    key, answer = file.table("key"), file.table("answer")
    kinds = tuple(kind.value for kind in Kind)
    profile = ApiProfile(
        name=file.text("name"),
        kind=Kind(file.one_of("kind", kinds)),
        window_s=file.number("window_s", 0),
        kind_after_window=Kind(file.one_of("kind_after_window", kinds)),
        settle_s=file.number("settle_s", 0),
        key_render=key.one_of("render", ("as_is", "uuid4")),
        key_length_max=key.whole_number("length_max", KEY_LENGTH_LEAST, 200),
        request=_request(request := file.table("request"), _FIELDS),
        reference=answer.text("reference"),
        reason=answer.text("reason"),
        words=answer.text("words"),
        answered_key=answer.text("key", "", may_be_empty=True),
        rules=tuple(_rule(rule) for rule in answer.tables("rules")),
        look_up=_look_up(file.table("look_up")) if file.has("look_up") else None,
    )
    for table in (key, answer, request, file):
        table.close()
    return profile


def _request(part: ClosedTable, fields: frozenset[str]) -> RequestTemplate:
    """Read a request's template; the caller closes the table, which may have more."""
    method, path = part.text("method"), part.text("path")
    if not _METHOD.fullmatch(method):
        raise ValueError(f"[{part.name}]: 'method' must be a method of HTTP")
    if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ValueError(
            f"[{part.name}]: 'path' must begin with / and hold neither ? nor #, "
            "nor a segment of dots"
        )
    headers, query, body = (
        _templates(part.table(name, {})) for name in ("headers", "query", "body")
    )
    templates = [path, *headers.values(), *query.values(), *body.values()]
    # Found now, not between a claim and its send.
    unknown = {name for text in templates for name in _FIELD.findall(text)} - fields
    if unknown:
        raise ValueError(
            f"[{part.name}] names the unknown fields {', '.join(sorted(unknown))}; "
            f"known: {', '.join(sorted(fields))}"
        )
    named = {name for text in headers.values() for name in _FIELD.findall(text)}
    header_fields = tuple(sorted(named - {"key"}))
    return RequestTemplate(method, path, headers, query, body, header_fields)


def _templates(part: ClosedTable) -> dict[str, str]:
    return {name: part.text(name, may_be_empty=True) for name in part.names()}


def _rule(part: ClosedTable) -> Rule:
    classes = tuple(each.value for each in AnswerClass)
    where = part.table("where", {})
    rule = Rule(
        AnswerClass(part.one_of("class", classes)),
        frozenset(part.whole_numbers("status", 200, 599)),
        {path: frozenset(where.texts(path)) for path in where.names()},
        part.texts("has", ()),
        part.texts("has_text", ()),
    )
    part.close()
    return rule


def _look_up(part: ClosedTable) -> LookUpRules:
    findings: dict[str, Finding] = {}
    for finding in (Finding.EXECUTED, Finding.FAILED, Finding.PENDING):
        findings |= dict.fromkeys(part.texts(finding.value), finding)
    rules = LookUpRules(
        _request(part, _FIELDS_OF_LOOK_UP),
        part.text("rows"),
        part.text("match"),
        part.text("status"),
        findings,
        part.text("reference"),
        part.text("reversed", "", may_be_empty=True),
    )
    part.close()
    return rules


def _at(document: object, path: str) -> Any:
    """The value at a dotted path, or None."""
    for name in path.split("."):
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _constant(value: object) -> str | None:
    return value if isinstance(value, str) and _CONSTANT.fullmatch(value) else None


def _text(value: object, characters_max: int) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    # Half a character, which JSON can spell, is one that no database takes.
    whole = str(value).encode("utf-8", "replace").decode("utf-8")
    return whole[:characters_max] or None
