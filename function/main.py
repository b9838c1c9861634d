"""Composition root: wires the parts, and gives each outcome its HTTP status.

Owns the functions-framework target `handle_topup`; must never decide anything about
an order. Loaded by path, as module `main`: nothing else may import it.
"""

import contextlib
import functools
import threading
from dataclasses import replace
from typing import Final

import flask
import functions_framework

from function import telemetry
from function.api_auth import make_authenticator
from function.api_profile import load_profile
from function.config import Settings
from function.database import make_engine
from function.door import ANNOUNCED_BYTES, DROPPED_OF_HEAD, Door, draining
from function.errors import (
    InvalidEvent,
    LedgerUnavailable,
    MalformedEvent,
    SettingsError,
    UnknownEventType,
)
from function.event_tokens import EventTokens, NotAdmitted
from function.events import (
    attributes_of,
    position_of,
    read_topup,
    reply_to,
    subscriber_of_record,
)
from function.ledger import Ledger
from function.migrate import require_migrated
from function.model import Outcome, Receipt, Refused, TopUp
from function.patience import Patience
from function.placement import PlacementWatch
from function.processing import Processing
from function.recharge_api import RechargeApi

#: The contract (README, What is guaranteed). Knative's dispatcher delivers 404, 408,
#: 409, 429 and everything from 500 again; any other 3xx or 4xx it dead-letters at once.
STATUS: Final[dict[Outcome, int]] = {
    Outcome.SUCCEEDED: 200,
    Outcome.ACCEPTED: 200,
    Outcome.REJECTED: 422,
    Outcome.ABANDONED: 422,
    Outcome.MALFORMED: 400,
    Outcome.INVALID: 400,
    Outcome.TOO_LARGE: 413,
    Outcome.KEY_REUSED: 422,
    Outcome.UNKNOWN_TYPE: 503,
    Outcome.QUARANTINED: 422,
    Outcome.NOT_ADMITTED: 503,
    Outcome.IN_FLIGHT: 409,
    Outcome.WAITING: 409,
    Outcome.RELEASED: 503,
    Outcome.PARKED: 424,
    Outcome.POSTPONED: 424,
    Outcome.HELD: 424,
    Outcome.REFUSED_US: 503,
    Outcome.PAUSED: 503,
    Outcome.CIRCUIT_OPEN: 503,
    Outcome.DRAINING: 503,
    Outcome.LEDGER_UNAVAILABLE: 503,
    Outcome.UNFORESEEN: 503,
}

#: Their reason is a sentence of our own (errors.py).
_REFUSED: Final = frozenset({Outcome.MALFORMED, Outcome.INVALID, Outcome.TOO_LARGE})

#: Of an event that is too large so much is kept.
_KEPT_OF_TOO_LARGE: Final = 16 * 1024


class Services:
    """The parts of one process, made on first use: the server forks before that."""

    def __init__(self, settings: Settings) -> None:
        self.profile = profile = load_profile(settings)
        self.engine = make_engine(settings)
        self.ledger = Ledger(self.engine, profile, lease_s=settings.ledger_lease_s)
        self.api = RechargeApi(settings, profile, make_authenticator(settings))
        self.processing = Processing(
            self.ledger,
            self.api,
            profile,
            deadline_s=settings.recharge_api_deadline_s,
            lease_s=settings.ledger_lease_s,
            is_draining=draining.is_set,
            alert=telemetry.alert,
        )
        self.patience = Patience(
            self.ledger,
            self.processing.breaker,
            unknown_type_s=settings.event_unknown_type_wait_s,
            alert=telemetry.alert,
        )


def _settings() -> Settings:
    """Read the settings, or refuse to start with one line that names what is wrong."""
    try:
        settings = Settings.from_env()
        load_profile(settings)
        make_engine(settings).dispose()
        EventTokens(settings)
    except SettingsError as error:
        raise SystemExit(f"topup: {error}") from None
    return settings


settings: Final = _settings()
event_tokens: Final = EventTokens(settings)
placement_watch: Final = PlacementWatch(telemetry.alert)
telemetry.configure(settings.log_level)
flask.current_app.wsgi_app = Door(  # type: ignore[method-assign]
    flask.current_app.wsgi_app,
    bytes_max=settings.event_bytes_max,
    timeout_s=settings.event_read_timeout_s,
)


_once: Final = threading.Lock()


def services() -> Services:
    """The parts of this process: one set, so that one memory knows what is owed."""
    with _once:
        return _services()


@functools.cache
def _services() -> Services:
    made = Services(settings)
    # Whoever can't reach the ledger hears of that by each delivery.
    with contextlib.suppress(LedgerUnavailable):
        if orders := made.ledger.count_of_other_apis():
            telemetry.alert("orders_of_another_api", "", "", orders=orders)
    return made


@functools.cache
def _require_ready() -> None:
    """Raise until the ledger's schema was seen once, as this version needs it."""
    require_migrated(services().engine)


@functions_framework.http
def handle_topup(request: flask.Request) -> flask.Response:
    """Answer one delivery; also `GET /healthz` and `GET /readyz`."""
    try:
        if request.method != "POST":
            return _probe(request.path)
        # Before anything is parsed or written; the door has bounded what was read.
        event_tokens.admit(request.headers.get("Authorization"))
        return _deliver(request)
    except NotAdmitted:
        # Counted and told where it was refused; an outsider learns nothing.
        return flask.Response(status=STATUS[Outcome.NOT_ADMITTED])
    except LedgerUnavailable as error:
        telemetry.alert("ledger_unavailable", "", "", detail=str(error))
        return _respond(Receipt(Outcome.LEDGER_UNAVAILABLE))
    # Whatever we didn't foresee: the record must not be lost, nothing may leak.
    except Exception as error:  # noqa: BLE001
        telemetry.error("unforeseen", error, path=request.path)
        return flask.Response(status=STATUS[_unforeseen(request)])


def _probe(path: str) -> flask.Response:
    """Liveness never touches the database; readiness asks it once."""
    if path == "/healthz":
        return flask.Response(status=200)
    if path == "/readyz":
        _require_ready()
        return flask.Response(status=503 if draining.is_set() else 200)
    # Not 405: a 404 is delivered again, so a record can't be lost by a wrong method.
    return flask.Response(status=404)


def _unforeseen(request: flask.Request) -> Outcome:
    """Count a record that raised an error; what can't even be counted comes again."""
    if request.method != "POST":
        return Outcome.UNFORESEEN
    try:
        headers, body = dict(request.headers.items()), request.get_data()
        detail = "an error nobody foresaw"
        refused = _refused(Outcome.UNFORESEEN, detail, headers, body)
        # It may be too large to be read whole.
        announced = int(request.environ[ANNOUNCED_BYTES])
        refused = replace(refused, announced_bytes=announced)
        subscriber = subscriber_of_record(headers)
        return services().patience.with_unforeseen(refused, subscriber).outcome
    except LedgerUnavailable as error:
        telemetry.alert("ledger_unavailable", "", "", detail=str(error))
    except Exception as error:  # noqa: BLE001
        telemetry.error("unforeseen", error, path=request.path)
    return Outcome.UNFORESEEN


def _deliver(request: flask.Request) -> flask.Response:
    body = request.get_data()
    headers = dict(request.headers.items())
    if draining.is_set():
        return _respond(Receipt(Outcome.DRAINING))
    if len(body) > settings.event_bytes_max:
        announced = int(request.environ[ANNOUNCED_BYTES])
        body = body[:_KEPT_OF_TOO_LARGE]
        return _refuse(
            Outcome.TOO_LARGE, "larger than allowed", headers, body, announced
        )
    if dropped := request.environ[DROPPED_OF_HEAD]:
        return _refuse(Outcome.MALFORMED, dropped, headers, body, len(body))
    try:
        order = read_topup(headers, body, settings.event_type)
        services().profile.require_sendable(order)
    except UnknownEventType as error:
        refused = _refused(Outcome.UNKNOWN_TYPE, str(error), headers, body)
        subscriber = subscriber_of_record(headers)
        receipt = services().patience.with_unknown_type(
            error.event_type, refused, subscriber
        )
        _log_refused(refused, receipt.outcome, headers)
        return _respond(receipt)
    except (MalformedEvent, InvalidEvent) as error:
        outcome = (
            Outcome.INVALID if isinstance(error, InvalidEvent) else Outcome.MALFORMED
        )
        return _refuse(outcome, str(error), headers, body, len(body))
    placement_watch.see(order)
    receipt = services().processing.process(order)
    _log(order, receipt)
    return _respond(receipt, order)


def _refuse(
    outcome: Outcome, detail: str, headers: dict[str, str], raw: bytes, announced: int
) -> flask.Response:
    """Record what can never be executed, and only then say so."""
    refused = replace(
        _refused(outcome, detail, headers, raw), announced_bytes=announced
    )
    is_new = services().ledger.put_in_quarantine(refused)
    _log_refused(refused, outcome, headers, repetition=not is_new)
    return _respond(Receipt(outcome, reason=detail))


def _refused(
    outcome: Outcome, detail: str, headers: dict[str, str], raw: bytes
) -> Refused:
    """A record as quarantine keeps it."""
    position = position_of(headers)
    return Refused(outcome, detail, raw, len(raw), attributes_of(headers), position)


def _log_refused(
    refused: Refused, outcome: Outcome, headers: dict[str, str], **fields: object
) -> None:
    position = refused.position
    telemetry.log(
        "delivery",
        outcome=outcome.value,
        detail=refused.detail,
        event_id=headers.get("Ce-Id"),
        partition=position.partition if position else None,
        offset=position.offset if position else None,
        **fields,
    )


def _respond(receipt: Receipt, order: TopUp | None = None) -> flask.Response:
    """A 2xx carries a CloudEvent; everything else its outcome, and perhaps a reason."""
    status = STATUS[receipt.outcome]
    if order is not None and status == STATUS[Outcome.SUCCEEDED]:
        headers, body = reply_to(order, receipt, settings.event_type)
        return flask.Response(body, status, headers)
    answer = {"outcome": receipt.outcome.value}
    if reason := _answered_reason(receipt):
        answer["reason"] = reason
    response = flask.jsonify(answer)
    response.status_code = status
    return response


def _answered_reason(receipt: Receipt) -> str:
    """What whoever posts may read, and finds in the dead letter: never others' words.

    Of a refused event the rule that it breaks, of a rejected order the API's code.
    Everything else is for the log and the ledger; a pause has its author's words.
    """
    if receipt.outcome in _REFUSED:
        return receipt.reason
    is_code = receipt.outcome is Outcome.REJECTED and telemetry.is_harmless(
        receipt.reason
    )
    return receipt.reason if is_code else ""


def _log(order: TopUp, receipt: Receipt) -> None:
    position = order.position
    telemetry.log(
        "delivery",
        key=order.idempotency_key,
        event_id=order.event_id,
        attempt=receipt.attempt,
        outcome=receipt.outcome.value,
        # A pause's are its author's words: `topup ledger stats` shows them.
        reason=None if receipt.outcome is Outcome.PAUSED else receipt.reason or None,
        reference=receipt.reference,
        repetition=receipt.is_repetition,
        subscriber=telemetry.mask(order.msisdn),
        partition=position.partition if position else None,
        offset=position.offset if position else None,
    )
