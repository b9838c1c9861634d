"""What may be answered at the front door, and what must then be true.

Owns the rules, purely: what was answered, logged and grew is held against what the
ledger and the recharge API's book show. Must never send anything, read a socket, or
believe the function's own word that something was executed.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol
from urllib.parse import quote

from proof.bent_requests import (
    EVENT_BYTES_MAX,
    MARK,
    NUMBER_PREFIX,
    PAUSED_CHANNEL,
    PLANTED_ERROR,
    Request,
)
from proof.pod_limits import memory_limit_kib
from proof.raw_client import Answer

#: README's table: each outcome has its one status.
STATUS_OF: Final = {
    "rejected": 422,
    "abandoned": 422,
    "malformed": 400,
    "invalid": 400,
    "too_large": 413,
    "key_reused": 422,
    "unknown_type": 503,
    "quarantined": 422,
    "in_flight": 409,
    "waiting": 409,
    "parked": 424,
    "held": 424,
    "paused": 503,
}
#: What the source is asked for again although the parts beside the function are well.
_ASKS_AGAIN: Final = frozenset({"unknown_type", "in_flight", "waiting", "paused"})
#: Whose answer says why, in words of the function's own.
_SAYS_WHY: Final = frozenset({"malformed", "invalid", "too_large"})
_QUARANTINED: Final = frozenset(
    {"malformed", "invalid", "too_large", "key_reused", "quarantined"}
)
#: Of an event that is too large so much is kept.
_KEPT_BYTES: Final = 16 * 1024
_OK: Final = 200
_NOT_FOUND: Final = 404
_UNAVAILABLE: Final = 503
#: Knative's dispatcher delivers these again, and everything from 500.
_RETRYABLE: Final = frozenset({404, 408, 409, 429})
_SERVER_ERRORS: Final = 500
_REDIRECTS: Final = 300

_NUMBER: Final = re.compile(
    rb"(?:%2B|\+)" + NUMBER_PREFIX[1:].encode() + rb"\d{6}", re.IGNORECASE
)
_LEAKS: Final = (
    (MARK.encode(), "what the request held"),
    (b"Traceback", "a traceback"),
    (b"<html", "a page"),
    (b"<!doctype", "a page"),
)
#: Fields of a log line with the function's own words, or the key, which is told on
#: purpose. All other text is somebody else's, and stands there in one of two forms.
_OWN_FIELDS: Final = frozenset(
    {"at", "level", "action", "key", "attempt", "outcome", "subscriber", "detail"}
    | {"error", "place", "path"}
)
_HASH: Final = re.compile(r"sha256:[0-9a-f]{16}")
_HARMLESS: Final = re.compile(r"[A-Za-z0-9._:/#-]{0,64}")
_DIGITS_MAX: Final = 6
_BAD_LINES: Final = ("[ERROR]", "[CRITICAL]", "Error handling request", "Traceback")

#: So much more memory than after the first requests is no leak: pools and caches fill.
RSS_RATIO_MAX: Final = 1.5
#: So many more files: connections that are about to be closed.
FILES_MORE_MAX: Final = 16


class Found(AssertionError):
    """A rule is broken; says which, by what, and never on suspicion."""


class View(Protocol):
    """What the ledger and the book show."""

    def is_quarantined(self, raw: bytes, outcome: str, /) -> bool:
        """Whether quarantine holds these bytes under this outcome."""

    def status_of(self, key: str, /) -> str | None:
        """The status of an order in the ledger."""

    def executions(self, key: str, /) -> int:
        """How often the book says that an order was executed."""


def is_retryable(status: int) -> bool:
    """Whether the source delivers a record again that was answered so."""
    return status in _RETRYABLE or status >= _SERVER_ERRORS


def judge_answer(request: Request, answer: Answer, view: View) -> None:
    """Hold one answer against the contract.

    Raises:
        Found: it is broken.

    """
    require_no_leak(answer.raw, "an answer")
    if any(name.startswith("kne-") for name in answer.headers):
        raise Found("a header of Knative's own is sent")
    if request.order is not None and answer.status != _OK:
        raise Found(f"a good order is answered {answer.status}")
    if answer.status == _OK and request.method == b"POST":
        _judge_success(request, answer, view)
    elif request.method != b"POST":
        _judge_other_method(request, answer)
    elif _is_empty_refusal(answer):
        if not (request.is_odd or request.is_planted):
            raise Found("a readable request is answered with an empty 503")
    else:
        _judge_refusal(request, answer, view)


def judge_silence(request: Request) -> None:
    """Hold a closed connection, without an answer, against the contract.

    It is allowed for what can't be read as far as the server knows.

    Raises:
        Found: the request could be read.

    """
    if not request.is_odd and not request.is_last:
        raise Found("a readable request is not answered: the connection is closed")


def judge_order(request: Request, view: View) -> None:
    """Hold the book against an order that was answered 200.

    Raises:
        Found: it was not executed exactly once.

    """
    executions = view.executions(request.key)
    if executions != 1:
        raise Found(f"an order was executed {executions} times")
    if view.status_of(request.key) != "succeeded":
        raise Found("an order that was executed is not settled")


def judge_log(line: str, *, planted: int) -> int:
    """Hold one line of the log against the contract; returns how often it is planted.

    Args:
        line: of the function's log.
        planted: how many planted errors have not been told yet.

    Raises:
        Found: it tells of an error that nobody foresaw, or what may not be told.

    """
    require_no_leak(line.encode(), "the log")
    _require_harmless(line)
    if any(bad in line for bad in _BAD_LINES):
        raise Found(f"the server tells of an error: {line}")
    if '"unforeseen"' not in line:
        return 0
    if not planted or json.loads(line).get("error") != PLANTED_ERROR:
        raise Found(f"an unforeseen error: {line}")
    return 1


def require_no_leak(data: bytes, where: str) -> None:
    """See that nothing of a request, nor of the code, is in what others can read.

    Raises:
        Found: it is.

    """
    lowered = data.lower()
    for leak, name in _LEAKS:
        if leak.lower() in lowered:
            raise Found(f"{name} is in {where}")
    if _NUMBER.search(data):
        raise Found(f"a whole number is in {where}")


def _require_harmless(line: str) -> None:
    """See that foreign text in a log line can be no number and no sentence."""
    try:
        document = json.loads(line)
    except ValueError:
        # The server's own, not the function's.
        return
    for name, value in document.items():
        if name in _OWN_FIELDS or not isinstance(value, str) or _HASH.fullmatch(value):
            continue
        digits = sum(each.isdigit() for each in value)
        if digits > _DIGITS_MAX or not _HARMLESS.fullmatch(value):
            raise Found(f"foreign text is in the log, as `{name}`")


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    rss_kib: int
    files: int
    threads: int
    #: The most memory that it ever had.
    peak_kib: int = 0

    def to_json(self) -> dict[str, int]:
        """For the report."""
        return asdict(self)


def judge_growth(before: Footprint, after: Footprint) -> None:
    """Hold what the process holds at the end against what it held at the beginning.

    Raises:
        Found: it grows with what is sent.

    """
    ratio = after.rss_kib / before.rss_kib
    if ratio > RSS_RATIO_MAX:
        raise Found(f"the memory grew to {ratio:.2f} times of what it was")
    if after.files > before.files + FILES_MORE_MAX:
        raise Found(f"open files grew from {before.files} to {after.files}")
    if after.threads > before.threads:
        raise Found(f"threads grew from {before.threads} to {after.threads}")


def judge_peak(ever: Footprint) -> None:
    """Hold the most memory that a process ever had against what a pod has.

    Raises:
        Found: the kubelet would have killed it, and the answers that it held.

    """
    limit_kib = memory_limit_kib()
    if ever.peak_kib > limit_kib:
        raise Found(f"it had {ever.peak_kib} KiB, and a pod has {limit_kib}")


def _judge_success(request: Request, answer: Answer, view: View) -> None:
    """A 2xx carries the completion event of an order that the book shows."""
    data = _json(answer)
    key = ":".join(quote(str(data.get(n)), safe="") for n in ("channel", "rechargeId"))
    if not answer.headers.get("ce-type", "").endswith(".succeeded.v1"):
        raise Found("a 200 without a completion event")
    if request.body is None:
        raise Found("an order is executed whose end nobody knows")
    if request.order is not None and key != request.key:
        raise Found("the answer is another order's")
    if view.executions(key) != 1:
        raise Found(f"a 200, and the book has {view.executions(key)} executions")


def _judge_other_method(request: Request, answer: Answer) -> None:
    """Nothing but 404, or the probes' own, which touch nothing."""
    if answer.body:
        raise Found("a request that is no delivery is answered with a body")
    is_probe = b"healthz" in request.pieces[0] or b"readyz" in request.pieces[0]
    if answer.status == _OK and is_probe:
        return
    if answer.status not in {_NOT_FOUND, _UNAVAILABLE}:
        raise Found(f"another method is answered {answer.status}")


def _is_empty_refusal(answer: Answer) -> bool:
    return answer.status == _UNAVAILABLE and not answer.body


def _judge_refusal(request: Request, answer: Answer, view: View) -> None:
    """An outcome with its status; a final one only for what is recorded."""
    outcome = _outcome(request, answer)
    if STATUS_OF.get(outcome) != answer.status:
        raise Found(f"{answer.status} for `{outcome}` is not documented")
    if is_retryable(answer.status):
        if outcome not in _ASKS_AGAIN:
            raise Found(f"`{outcome}`, although every part is well")
        return
    if request.body is None:
        raise Found(f"{answer.status} for a body whose end nobody knows")
    if outcome in _QUARANTINED:
        is_cut = outcome == "too_large"
        raw = request.body[:_KEPT_BYTES] if is_cut else request.body
        if is_cut and len(request.body) <= EVENT_BYTES_MAX:
            raise Found("an event within bounds is answered 413")
        if not view.is_quarantined(raw, outcome):
            raise Found(f"{answer.status}, and quarantine doesn't have its bytes")
    elif view.status_of(_key_in(request.body)) != outcome:
        raise Found(f"{answer.status}, and the ledger doesn't say `{outcome}`")


def _outcome(request: Request, answer: Answer) -> str:
    """The one word that an answer says, and never why in anybody else's words."""
    document = _json(answer)
    outcome = str(document.get("outcome"))
    if set(document) - {"outcome"} - ({"reason"} if outcome in _SAYS_WHY else set()):
        raise Found(f"`{outcome}` is answered with more than its name")
    # What a paused channel alone concerns is kept in the ledger, and its record taken.
    is_of_paused = PAUSED_CHANNEL.encode() in (request.body or b"")
    if outcome == "paused" or (is_of_paused and outcome != "held"):
        raise Found(f"`{outcome}`, although every part is well")
    return outcome


def _key_in(body: bytes) -> str:
    document = json.loads(body)
    order = document.get("data", document)
    return ":".join(quote(order[name], safe="") for name in ("channel", "rechargeId"))


def _json(answer: Answer) -> dict[str, Any]:
    try:
        document = json.loads(answer.body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Found(f"{answer.status} with a body that is not documented")
    return document
