"""The idempotency ledger: one row an order, and the only code that changes it.

Owns every statement on the ledger's tables; must never call the recharge API, and
must never hold a transaction, a lock or a connection over such a call.

Every change of status is a compare-and-set on the status and the token that were
seen. Clocks are the database's. `claim` and `settle` are one round trip each.
"""

import contextlib
import json
import secrets
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Engine,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError

from function.api_profile import ApiProfile
from function.database import (
    UNAVAILABLE,
    connected,
    describe,
    is_connection_lost,
    is_deadlock,
    is_duplicate,
    transaction,
)
from function.errors import ClaimUncertain, IllegalTransition, LedgerUnavailable
from function.model import (
    ENDED_BY_THE_API,
    TRANSITIONS,
    UNSETTLED,
    Answer,
    AnswerClass,
    Claim,
    Entry,
    Line,
    Position,
    Refused,
    Sighting,
    Status,
    Stored,
    TopUp,
)
from function.schema import (
    After,
    AgeS,
    JustAfter,
    Now,
    attempt,
    is_before,
    pause,
    quarantine,
    sighting,
    topup,
)

#: What an answer of the recharge API makes of a row that is claimed or in doubt.
STATUS_OF_ANSWER: Final = {
    AnswerClass.DONE: Status.SUCCEEDED,
    AnswerClass.ACCEPTED: Status.ACCEPTED,
    AnswerClass.NO: Status.REJECTED,
}
#: Nobody holds a row in these, so evidence of a success settles it.
_UNHELD: Final = (Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED)
_ANSWERED: Final = (Status.SUCCEEDED, Status.ACCEPTED, Status.REJECTED)
_MICROS: Final = 1_000_000
_REASON_MAX: Final = 64


class Ledger:
    """The ledger on one database; safe to share between threads.

    Args:
        engine: from `database.make_engine`.
        profile: renders the recharge API's key, which is stored before it is sent.
        lease_s: how long a claim excludes others, in seconds.

    Every method may raise LedgerUnavailable: answer 503, the record comes again.

    """

    def __init__(self, engine: Engine, profile: ApiProfile, *, lease_s: float) -> None:
        self._engine = engine
        self._profile = profile
        self._lease_us = round(lease_s * _MICROS)

    def claim(self, order: TopUp) -> Claim | None:
        """Record a new order as in flight, durably; one statement.

        Returns None if it is not new, if an earlier one of its subscriber is
        unsettled, or if its channel is paused: `look` tells which.

        Raises:
            ClaimUncertain: perhaps committed. Never send; disown the token that the
                error carries.

        """
        token = _new_token()
        values = self._row(order) | {
            "token": token,
            "lease_us": self._lease_us,
            "api_kind": self._profile.kind,
            "api_identity": self._profile.identity,
        }
        if not self._try_to_claim(_CLAIM, values, token):
            return None
        return Claim(token, values["rendered_key"], is_doubted=False)

    def reclaim(self, entry: Entry) -> Claim | None:
        """Take a row that is in doubt, held or released back in flight.

        Only by compare-and-set on the very attempt that was read, only when it is
        first in its subscriber's line, and not while paused. The token is new.

        Returns None if any of this no longer holds.

        Raises:
            ClaimUncertain: as `claim`.

        """
        _check(entry.status, Status.IN_FLIGHT)
        token = _new_token()
        values = _as_seen(entry) | {
            "new_token": token,
            "lease_us": self._lease_us,
            "api_kind": self._profile.kind,
            "api_identity": self._profile.identity,
        }
        if not self._try_to_claim(_RECLAIM, values, token):
            return None
        return Claim(token, entry.rendered_key, entry.doubts > 0, entry.not_executed)

    def look(self, order: TopUp) -> tuple[Entry | None, Line]:
        """Read the order's row and what stands before it; one statement."""
        values = {"key": order.idempotency_key, **_position(order)}
        values["subscriber"] = order.msisdn
        values["channel"] = _channel(order)
        with connected(self._engine) as connection:
            row = connection.execute(_LOOK, values).one()
        blocker = Status(row.blocker) if row.blocker else None
        is_paused = bool(row.is_all_paused)
        is_channel_paused = row.paused is not None and not is_paused
        line = Line(
            is_paused,
            is_channel_paused,
            blocker,
            bool(row.is_stuck),
            bool(row.is_place_kept),
            row.paused or "",
        )
        return (_entry(row) if row.idempotency_key else None), line

    def due(
        self,
        *,
        given_up_s: float,
        again_s: float,
        is_parked_due: bool,
        limit: int,
        msisdn: str | None = None,
    ) -> list[Stored]:
        """The orders that nobody else will bring on, each first in its line.

        They are: held ones that may be tried by now; in-flight ones whose lease is
        over; parked ones, if the API can tell what became of them; those in doubt or
        released on which the source has given up.

        Args:
            given_up_s: age in seconds of the last change after which it has.
            again_s: seconds before a parked one is looked at again.
            is_parked_due: whether parked ones can be settled without a person.
            limit: the most rows, those looked at longest ago first.
            msisdn: only this subscriber's.

        """
        values: dict[str, Any] = {
            "given_up_us": -round(given_up_s * _MICROS),
            "again_s": again_s,
            "is_parked_due": int(is_parked_due),
            "limit": limit,
        }
        statement = _DUE
        if msisdn is not None:
            # A statement of its own, so that it is found by the subscriber's line.
            statement, values["subscriber"] = _DUE_OF, msisdn
        with connected(self._engine) as connection:
            return [_stored(row) for row in connection.execute(statement, values)]

    def accepted(self, *, again_s: float, watch_s: float, limit: int) -> list[Stored]:
        """Orders that the API took over, and those to watch for a late reversal.

        Args:
            again_s: seconds before one is looked at again.
            watch_s: for so long after their end they are watched; 0: not at all.
            limit: the most rows, those looked at longest ago first.

        """
        values = {"again_us": -round(again_s * _MICROS), "limit": limit}
        with connected(self._engine) as connection:
            rows = [*connection.execute(_ACCEPTED, values)]
            if watch_s > 0:
                values["watch_us"] = -round(watch_s * _MICROS)
                rows += connection.execute(_WATCHED, values)
        return [_stored(row) for row in rows]

    def looked(self, key: str) -> None:
        """Note that the resolver has looked at this order."""
        with connected(self._engine) as connection:
            connection.execute(_LOOKED, {"key": key})

    def wait_again(self, entry: Entry) -> bool:
        """Put a released order, whose record will not come again, back in line."""
        _check(entry.status, Status.HELD)
        with connected(self._engine) as connection:
            return connection.execute(_WAIT_AGAIN, _as_seen(entry)).rowcount == 1

    def record_reversal(self, key: str, token: str, reference: str | None) -> None:
        """Keep a late reversal as an event of its own; the terminal status stands."""
        reversal = Answer(AnswerClass.REVERSED, reference=reference)
        with transaction(self._engine) as connection:
            _record(connection, key, token, reversal)
            connection.execute(_REVERSED, {"key": key})

    def settle(self, key: str, token: str, answer: Answer) -> bool:
        """Write the final answer of the attempt that holds the claim.

        Args:
            key: the idempotency key.
            token: the attempt's fence.
            answer: done, accepted, or a no that is final.

        Returns False if the attempt holds the claim no more: nothing is changed.

        """
        status = STATUS_OF_ANSWER[answer.classified]
        _check(Status.IN_FLIGHT, status)
        values = {
            "key": key,
            "claim_token": token,
            "to_status": status,
            "to_reference": answer.reference,
            "to_reason": answer.reason if status is Status.REJECTED else "",
        }
        if answer.classified is AnswerClass.DONE:
            with connected(self._engine) as connection:
                return connection.execute(_SETTLE, values).rowcount == 1
        values["to_class"] = answer.classified
        with transaction(self._engine) as connection:
            if connection.execute(_SETTLE_WITH_CLASS, values).rowcount != 1:
                return False
            _record(connection, key, token, answer)
            return True

    def give_back(
        self,
        key: str,
        token: str,
        answer: Answer,
        *,
        is_held: bool = False,
        wait_s: float = 0.0,
    ) -> bool:
        """Release a claim under which nothing was executed.

        Doubt is sticky: a row that was once in doubt is parked, with the answer's
        reason. An answer that the API gave counts in the row (`not_executed`).

        Args:
            key: the idempotency key.
            token: the attempt's fence.
            answer: the proof that nothing was executed.
            is_held: no record will come for it, so it waits in its line for the
                resolver, not for a delivery.
            wait_s: for so many seconds it must not be tried again; 0: at once.

        Returns False if the attempt holds the claim no more: nothing is changed.

        """
        values = {
            "key": key,
            "claim_token": token,
            "to_class": answer.classified,
            "to_status": Status.HELD if is_held else Status.RELEASED,
            "to_reason": answer.reason[:_REASON_MAX],
            "counted": int(answer.is_sent),
            "wait_us": round(wait_s * _MICROS),
        }
        statement = _GIVE_BACK_FOR_LATER if wait_s > 0 else _GIVE_BACK
        with transaction(self._engine) as connection:
            if connection.execute(statement, values).rowcount != 1:
                return False
            _record(connection, key, token, answer)
            return True

    def doubt(self, key: str, token: str, answer: Answer, *, is_parked: bool) -> bool:
        """Write that the attempt's outcome is unknown, and keep its evidence.

        Args:
            key: the idempotency key.
            token: the attempt's fence.
            answer: whatever came back.
            is_parked: nothing automatic can find out; the row then says why.

        Returns False if the attempt holds the claim no more: nothing is changed.

        """
        status = Status.PARKED if is_parked else Status.IN_DOUBT
        _check(Status.IN_FLIGHT, status)
        values = {
            "key": key,
            "claim_token": token,
            "to_status": status,
            "to_class": answer.classified,
            "to_reason": answer.reason[:_REASON_MAX] if is_parked else "",
        }
        with transaction(self._engine) as connection:
            if connection.execute(_DOUBT, values).rowcount != 1:
                return False
            _record(connection, key, token, answer)
            return True

    def expire(self, entry: Entry) -> bool:
        """Turn an in-flight row whose lease is over into one in doubt.

        Returns False if it has changed since it was read, or the lease still runs.

        """
        token = entry.token or ""
        lost = Answer(AnswerClass.UNKNOWN, reason="lease_over")
        values = {"key": entry.idempotency_key, "claim_token": token}
        with transaction(self._engine) as connection:
            if connection.execute(_EXPIRE, values).rowcount != 1:
                return False
            _record(connection, entry.idempotency_key, token, lost)
            return True

    def end_doubt(self, entry: Entry, answer: Answer) -> bool:
        """Settle a row in doubt by what a look-up found about its last attempt.

        Returns False if another attempt was made since: look up again.

        """
        status = STATUS_OF_ANSWER[answer.classified]
        _check(entry.status, status)
        values = _as_seen(entry) | {
            "to_status": status,
            "to_reference": answer.reference,
            "to_reason": answer.reason if status is Status.REJECTED else "",
        }
        with transaction(self._engine) as connection:
            if connection.execute(_END_DOUBT, values).rowcount != 1:
                return False
            _record(connection, entry.idempotency_key, entry.token or "", answer)
            return True

    def park(self, entry: Entry, reason: str) -> bool:
        """Give up settling a row in doubt automatically; the row says why.

        Returns False if it has changed since it was read.

        """
        _check(entry.status, Status.PARKED)
        values = _as_seen(entry) | {"to_reason": reason}
        with connected(self._engine) as connection:
            return connection.execute(_PARK, values).rowcount == 1

    def note(self, entry: Entry, reason: str) -> bool:
        """Write why a row needs a person; its status stays.

        Returns False if it has changed since it was read.

        """
        values = _as_seen(entry) | {"to_reason": reason}
        with connected(self._engine) as connection:
            return connection.execute(_NOTE, values).rowcount == 1

    def keep_evidence(self, key: str, token: str, answer: Answer) -> bool:
        """Keep what a fenced attempt learnt; a success settles a row nobody holds.

        Returns whether the row was settled by it.

        """
        status = STATUS_OF_ANSWER.get(answer.classified)
        is_success = status in {Status.SUCCEEDED, Status.ACCEPTED}
        values = {"key": key, "to_status": status, "to_reference": answer.reference}
        with transaction(self._engine) as connection:
            _record(connection, key, token, answer)
            if not is_success:
                return False
            return connection.execute(_SETTLE_UNHELD, values).rowcount == 1

    def hold(self, order: TopUp) -> bool:
        """Record a new order at its place in its subscriber's line.

        One conditional statement: nothing is held behind nothing.

        Returns False if nothing unsettled stands before it and nothing is paused, or
        if it is in the ledger already.

        """
        try:
            with connected(self._engine) as connection:
                return connection.execute(_HOLD, self._row(order)).rowcount == 1
        except IntegrityError:
            return False

    def put_off(self, order: TopUp) -> bool:
        """Record a new order that is first in its line and shall not be called yet.

        Nothing was executed, so it is released: its next delivery, or the resolver,
        claims it at its place.

        Returns False if it is in the ledger already.

        """
        try:
            with connected(self._engine) as connection:
                return connection.execute(_PUT_OFF, self._row(order)).rowcount == 1
        except IntegrityError:
            return False

    def count_of_other_apis(self) -> int:
        """How many orders that are not ended were sent to another API than this.

        Those count, too, of which nobody knows to which. None of them is settled by
        this API: a person settles them, or their own API's function and resolver.

        """
        values = {"api_identity": self._profile.identity}
        with connected(self._engine) as connection:
            return connection.scalar(COUNT_OF_OTHER_APIS, values) or 0

    def overtake(self, order: TopUp) -> list[str]:
        """Park what the source has given up on: an earlier offset of the partition.

        A later record of the same partition proves that an earlier one will not
        come again: doubt about it is for the resolver, and a released one, of which
        nothing was executed, waits in line.

        Returns the keys of the rows that changed; none without a position.

        """
        if order.position is None:
            return []
        values = _position(order) | {"subscriber": order.msisdn}
        with transaction(self._engine) as connection:
            keys = connection.scalars(_OVERTAKEN, values).all()
            if keys:
                connection.execute(_OVERTAKE_DOUBT, values)
                connection.execute(_OVERTAKE_RELEASED, values)
            return list(keys)

    def put_in_quarantine(self, refused: Refused) -> bool:
        """Record what can never be executed as it is; a redelivery adds nothing.

        Returns False if it was there already. Either way it is durably recorded.

        """
        position = refused.position
        values = {
            "identity": identity_of(refused),
            "outcome": refused.outcome.value,
            "detail": refused.detail[:500],
            "idempotency_key": refused.idempotency_key,
            "topic": position.topic if position else None,
            "kafka_partition": position.partition if position else None,
            "kafka_offset": position.offset if position else None,
            "raw": refused.raw,
            "announced_bytes": refused.announced_bytes,
            "attributes": json.dumps(refused.attributes).encode(),
        }
        try:
            with connected(self._engine) as connection:
                connection.execute(_QUARANTINE, values)
        except IntegrityError:
            return False
        return True

    def see(self, name: str) -> Sighting:
        """Count a sighting of something that can't be recorded yet.

        Args:
            name: SHA-256 in hex of what it is.

        """
        with connected(self._engine) as connection:
            if connection.execute(_SEE_AGAIN, {"sighted": name}).rowcount == 0:
                # Somebody else may see it first at this very moment.
                with contextlib.suppress(IntegrityError):
                    connection.execute(_SEE, {"sighted": name})
            row = connection.execute(_SIGHTING, {"sighted": name}).one()
        return Sighting(row.times, float(row.age_s))

    def keep_place(self, place: TopUp, reason: str) -> bool:
        """Keep a record's place in its subscriber's line: from `kept_place`.

        Returns False if the ledger has a row of this record already.

        """
        values = self._row(place) | {"reason": reason}
        try:
            with connected(self._engine) as connection:
                return connection.execute(_KEEP_PLACE, values).rowcount == 1
        except IntegrityError:
            return False

    def end_place(self, order: TopUp) -> bool:
        """End the row that kept this order's place: the order itself stands there.

        Returns False if there is none.

        """
        _check(Status.PARKED, Status.ABANDONED)
        values = _position(order) | {"subscriber": order.msisdn}
        with connected(self._engine) as connection:
            return connection.execute(_END_PLACE, values).rowcount > 0

    def _try_to_claim(self, statement: Any, values: dict[str, Any], token: str) -> bool:
        try:
            with self._engine.connect() as connection:
                return connection.execute(statement, values).rowcount == 1
        except IntegrityError as error:
            if is_duplicate(error):
                return False
            raise LedgerUnavailable(describe(error)) from None
        except UNAVAILABLE as error:
            # Two claims for one subscriber at one moment can deadlock in the unique
            # index. The loser is rolled back whole: it lost a race, no more.
            if is_deadlock(error):
                return False
            if is_connection_lost(error):
                raise ClaimUncertain(token, describe(error)) from None
            raise LedgerUnavailable(describe(error)) from None

    def _row(self, order: TopUp) -> dict[str, Any]:
        return {
            "key": order.idempotency_key,
            "fingerprint": order.fingerprint,
            "subscriber": order.msisdn,
            "channel": _channel(order),
            "amount_minor": order.amount_minor,
            "currency": order.currency,
            "payload": order.payload,
            "rendered_key": self._profile.render_key(order.idempotency_key),
            **_position(order),
        }


def identity_of(refused: Refused) -> str:
    """What makes a record in quarantine the same: all of its parts, each apart.

    Where they ran together, two large records could be one: offset 1 with 23456 bytes
    announced, and offset 12 with 3456.
    """
    at = refused.position
    where = [at.topic, at.partition, at.offset] if at else []
    parts = [*where, refused.announced_bytes, sha256(refused.raw).hexdigest()]
    return sha256(json.dumps(parts).encode("ascii")).hexdigest()


def _new_token() -> str:
    return secrets.token_hex(16)


def _channel(order: TopUp) -> str:
    """The channel as it stands in the key: percent-encoded, hence ASCII."""
    return order.idempotency_key.partition(":")[0]


def _position(order: TopUp) -> dict[str, Any]:
    position = order.position
    return {
        "at_topic": position.topic if position else None,
        "at_partition": position.partition if position else None,
        "at_offset": position.offset if position else None,
    }


def _as_seen(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.idempotency_key,
        "seen_status": entry.status,
        "seen_token": entry.token,
    }


def _check(from_: Status, to: Status) -> None:
    if to not in TRANSITIONS[from_]:
        raise IllegalTransition(f"{from_} -> {to}")


def _record(connection: Connection, key: str, token: str, answer: Answer) -> None:
    """Append an attempt's evidence, in the caller's transaction."""
    connection.execute(
        _RECORD,
        {
            "idempotency_key": key,
            "token": token,
            "classified": answer.classified,
            "is_sent": int(answer.is_sent),
            "http_status": answer.http_status,
            "reference": answer.reference,
            "reason": answer.reason[:_REASON_MAX],
            "words": answer.words,
        },
    )


def _stored(row: Any) -> Stored:
    is_placed = None not in {row.topic, row.kafka_partition, row.kafka_offset}
    return Stored(
        row.idempotency_key,
        row.msisdn,
        row.payload,
        Position(row.topic, row.kafka_partition, row.kafka_offset)
        if is_placed
        else None,
        Status(row.status),
        bool(row.is_given_up),
    )


def _entry(row: Any) -> Entry:
    return Entry(
        idempotency_key=row.idempotency_key,
        fingerprint=row.fingerprint,
        status=Status(row.status),
        token=row.token,
        is_lease_over=bool(row.is_lease_over),
        rendered_key=row.rendered_key,
        sent_age_s=None if row.sent_age_s is None else float(row.sent_age_s),
        first_sent_age_s=None
        if row.first_sent_age_s is None
        else float(row.first_sent_age_s),
        doubts=row.doubts,
        not_executed=row.not_executed,
        wait_s=0.0 if row.may_try_age_s is None else -float(row.may_try_age_s),
        api_kind=row.api_kind,
        api_identity=row.api_identity,
        last_class=AnswerClass(row.last_class) if row.last_class else None,
        reference=row.reference,
        reason=row.reason,
    )


# -- The statements, built once: only their values differ from call to call. --------


def _is_kept_place(table: Any) -> Any:
    """Whether a row is no order, but keeps the place of a record (`kept_place`)."""
    return and_(table.c.status == Status.PARKED.value, table.c.sent_at.is_(None))


_KEY: Final = topup.c.idempotency_key == bindparam("key")


def _pauses(channel: Any) -> Any:
    return or_(pause.c.scope == "*", pause.c.scope == channel)


def _is_paused(channel: Any) -> Any:
    return exists().where(_pauses(channel))


def _new_row(status: Status, place: Any, **more: Any) -> tuple[list[str], Select[Any]]:
    """The columns and the one-row SELECT of an order that is not in the ledger."""
    values: dict[str, Any] = {
        "idempotency_key": bindparam("key"),
        "fingerprint": bindparam("fingerprint"),
        "status": literal(status.value),
        "msisdn": bindparam("subscriber"),
        "channel": bindparam("channel"),
        "amount_minor": bindparam("amount_minor"),
        "currency": bindparam("currency"),
        "payload": bindparam("payload"),
        "rendered_key": bindparam("rendered_key"),
        "topic": bindparam("at_topic"),
        "kafka_partition": bindparam("at_partition"),
        "kafka_offset": bindparam("at_offset"),
        "place": place,
        "created_at": Now(),
        "updated_at": Now(),
        "attempts": literal_column("0"),
        "doubts": literal_column("0"),
        "reason": literal_column("''"),
        **more,
    }
    # A FROM that every MySQL accepts beside a WHERE.
    one = select(literal_column("1").label("one")).subquery("one")
    return list(values), select(*values.values()).select_from(one)


_earlier = topup.alias("earlier")
_unsettled_earlier = and_(
    _earlier.c.msisdn == bindparam("subscriber"), _earlier.c.unsettled == 1
)

_columns, _source = _new_row(
    Status.IN_FLIGHT,
    Now(),
    token=bindparam("token"),
    lease_until=After(bindparam("lease_us")),
    first_sent_at=Now(),
    sent_at=Now(),
    attempts=literal_column("1"),
    api_kind=bindparam("api_kind"),
    api_identity=bindparam("api_identity"),
)
_CLAIM: Final = insert(topup).from_select(
    _columns,
    _source.where(
        not_(_is_paused(bindparam("channel"))),
        not_(exists().where(_unsettled_earlier)),
    ),
)

_is_later_here = and_(
    _earlier.c.topic == bindparam("at_topic"),
    _earlier.c.kafka_partition == bindparam("at_partition"),
    _earlier.c.kafka_offset > bindparam("at_offset"),
)
_place_of_later = (
    select(func.min(_earlier.c.place))
    .where(_unsettled_earlier, _is_later_here)
    .scalar_subquery()
)
# Never before one that is there already, though the clock of a database that took
# over may be behind.
_last_place = (
    select(func.max(_earlier.c.place)).where(_unsettled_earlier).scalar_subquery()
)
_place_at_the_end = case(
    (_last_place >= Now(), JustAfter(_last_place)),
    else_=Now(),
)
_hold_columns, _hold_source = _new_row(
    Status.HELD, func.coalesce(_place_of_later, _place_at_the_end)
)
_HOLD: Final = insert(topup).from_select(
    _hold_columns,
    _hold_source.where(
        or_(_is_paused(bindparam("channel")), exists().where(_unsettled_earlier))
    ),
)

_put_off_columns, _put_off_source = _new_row(Status.RELEASED, _place_at_the_end)
_PUT_OFF: Final = insert(topup).from_select(_put_off_columns, _put_off_source)

_its_record = topup.alias("its_record")
_place_columns, _place_source = _new_row(
    Status.PARKED,
    func.coalesce(_place_of_later, _place_at_the_end),
    reason=bindparam("reason"),
)
_KEEP_PLACE: Final = insert(topup).from_select(
    _place_columns,
    _place_source.where(
        not_(
            exists().where(
                _its_record.c.msisdn == bindparam("subscriber"),
                _its_record.c.topic == bindparam("at_topic"),
                _its_record.c.kafka_partition == bindparam("at_partition"),
                _its_record.c.kafka_offset == bindparam("at_offset"),
            )
        )
    ),
)
_END_PLACE: Final = (
    update(topup)
    .where(
        topup.c.msisdn == bindparam("subscriber"),
        topup.c.unsettled == 1,
        _is_kept_place(topup),
        topup.c.topic == bindparam("at_topic"),
        topup.c.kafka_partition == bindparam("at_partition"),
        topup.c.kafka_offset == bindparam("at_offset"),
    )
    .values(status=Status.ABANDONED.value, reason="replayed", updated_at=Now())
)
_SIGHTED: Final = sighting.c.name == bindparam("sighted")
_SEE: Final = insert(sighting).values(
    name=bindparam("sighted"), first_seen_at=Now(), times=literal_column("1")
)
_SEE_AGAIN: Final = update(sighting).where(_SIGHTED).values(times=sighting.c.times + 1)
_SIGHTING: Final = select(
    sighting.c.times, AgeS(sighting.c.first_seen_at).label("age_s")
).where(_SIGHTED)

# MySQL reads the table that it updates only through a derived table that it must
# build first; the LIMIT keeps it from merging it.
_me = topup.alias("me")
_first_before_me = (
    select(literal_column("1").label("one"))
    .select_from(_earlier.join(_me, _me.c.idempotency_key == bindparam("key")))
    .where(
        _earlier.c.msisdn == _me.c.msisdn,
        _earlier.c.unsettled == 1,
        is_before(_earlier.c, _me.c),
    )
    .limit(literal_column("1"))
    .subquery("first_before_me")
)
_RECLAIM: Final = (
    update(topup)
    .where(
        _KEY,
        topup.c.status == bindparam("seen_status"),
        topup.c.token.is_not_distinct_from(bindparam("seen_token")),
        not_(_is_paused(topup.c.channel)),
        not_(exists(select(_first_before_me.c.one))),
    )
    .values(
        status=Status.IN_FLIGHT.value,
        token=bindparam("new_token"),
        lease_until=After(bindparam("lease_us")),
        first_sent_at=func.coalesce(topup.c.first_sent_at, Now()),
        sent_at=Now(),
        updated_at=Now(),
        attempts=topup.c.attempts + 1,
        api_kind=bindparam("api_kind"),
        api_identity=bindparam("api_identity"),
        not_before=None,
        reason="",
    )
)

_stands_before = and_(
    _earlier.c.msisdn == bindparam("subscriber"),
    _earlier.c.unsettled == 1,
    _earlier.c.idempotency_key != bindparam("key"),
    case(
        (topup.c.place.is_not(None), is_before(_earlier.c, topup.c)),
        # Not recorded yet: behind all but the later offsets of its own partition.
        else_=not_(func.coalesce(_is_later_here, literal_column("0"))),
    ),
)
_ENTRY_COLUMNS: Final = (
    "idempotency_key",
    "fingerprint",
    "status",
    "token",
    "rendered_key",
    "doubts",
    "not_executed",
    "api_kind",
    "api_identity",
    "last_class",
    "reference",
    "reason",
)
_LOOK: Final = select(
    *(topup.c[name] for name in _ENTRY_COLUMNS),
    AgeS(topup.c.sent_at).label("sent_age_s"),
    AgeS(topup.c.first_sent_at).label("first_sent_age_s"),
    case((topup.c.lease_until < Now(), 1), else_=0).label("is_lease_over"),
    AgeS(topup.c.not_before).label("may_try_age_s"),
    exists().where(pause.c.scope == "*").label("is_all_paused"),
    # Who did it and why: NULL where nothing is paused.
    select(pause.c.paused_by + literal(": ") + pause.c.reason)
    .where(_pauses(bindparam("channel")))
    .order_by(pause.c.scope)
    .limit(literal_column("1"))
    .scalar_subquery()
    .label("paused"),
    select(_earlier.c.status)
    .where(_stands_before)
    .order_by(
        _earlier.c.place,
        func.coalesce(_earlier.c.kafka_offset, -1),
        _earlier.c.idempotency_key,
    )
    .limit(literal_column("1"))
    .scalar_subquery()
    .correlate(topup)
    .label("blocker"),
    exists()
    .where(_stands_before, _earlier.c.status.in_((Status.PARKED, Status.HELD)))
    .correlate(topup)
    .label("is_stuck"),
    exists()
    .where(
        _stands_before,
        _is_kept_place(_earlier),
        _earlier.c.topic == bindparam("at_topic"),
        _earlier.c.kafka_partition == bindparam("at_partition"),
        _earlier.c.kafka_offset == bindparam("at_offset"),
    )
    .correlate(topup)
    .label("is_place_kept"),
).select_from(
    select(literal_column("1").label("one"))
    .subquery("one")
    .outerjoin(topup, and_(true(), _KEY))
)


# A doubt that the source still brings is looked at at each delivery.
_is_given_up = and_(
    topup.c.updated_at < After(bindparam("given_up_us")),
    func.coalesce(topup.c.looked_at, topup.c.updated_at)
    < After(bindparam("given_up_us")),
)
_is_unlooked = or_(
    topup.c.looked_at.is_(None), topup.c.looked_at < After(bindparam("again_us"))
)
# Each useless attempt doubles the pause, up to 256 times.
_is_parked_unlooked = or_(
    topup.c.looked_at.is_(None),
    AgeS(topup.c.looked_at)
    >= bindparam("again_s")
    * case(
        *((topup.c.doubts <= doubts, 2 ** (doubts - 1)) for doubts in range(1, 9)),
        else_=256,
    ),
)
_STORED_COLUMNS: Final = (
    topup.c.idempotency_key,
    topup.c.msisdn,
    topup.c.payload,
    topup.c.topic,
    topup.c.kafka_partition,
    topup.c.kafka_offset,
    topup.c.status,
)
_DUE: Final = (
    select(*_STORED_COLUMNS, case((_is_given_up, 1), else_=0).label("is_given_up"))
    .where(
        or_(
            and_(
                topup.c.status == Status.HELD.value,
                or_(topup.c.not_before.is_(None), topup.c.not_before <= Now()),
            ),
            and_(
                topup.c.status == Status.PARKED.value,
                # A place that is kept was never sent: nobody can look it up.
                topup.c.sent_at.is_not(None),
                bindparam("is_parked_due") == 1,
                _is_parked_unlooked,
            ),
            and_(topup.c.status == Status.IN_FLIGHT.value, topup.c.lease_until < Now()),
            and_(topup.c.status.in_((Status.IN_DOUBT, Status.RELEASED)), _is_given_up),
        ),
        topup.c.status.in_([status.value for status in sorted(UNSETTLED)]),
        not_(_is_paused(topup.c.channel)),
        or_(
            # A lost claim keeps its whole line from moving, wherever it stands in it.
            topup.c.status == Status.IN_FLIGHT.value,
            not_(
                exists().where(
                    _earlier.c.msisdn == topup.c.msisdn,
                    _earlier.c.unsettled == 1,
                    is_before(_earlier.c, topup.c),
                )
            ),
        ),
    )
    # Whoever was tried goes behind the others, so that none starves another.
    .order_by(func.coalesce(topup.c.looked_at, topup.c.place))
    .limit(bindparam("limit"))
)
_DUE_OF: Final = _DUE.where(
    topup.c.msisdn == bindparam("subscriber"), topup.c.unsettled == 1
)
_followed = (
    select(*_STORED_COLUMNS, literal_column("0").label("is_given_up"))
    .where(_is_unlooked)
    .order_by(func.coalesce(topup.c.looked_at, topup.c.place))
    .limit(bindparam("limit"))
)
_ACCEPTED: Final = _followed.where(topup.c.status == Status.ACCEPTED.value)
# Visits every success of the time that is watched: only where that is asked for.
_WATCHED: Final = _followed.where(
    topup.c.status == Status.SUCCEEDED.value,
    topup.c.last_class == AnswerClass.ACCEPTED.value,
    topup.c.updated_at > After(bindparam("watch_us")),
)
_LOOKED: Final = update(topup).where(_KEY).values(looked_at=Now())
_REVERSED: Final = (
    update(topup)
    .where(_KEY)
    .values(last_class=AnswerClass.REVERSED.value, looked_at=Now())
)

_HOLDS_CLAIM: Final = and_(
    _KEY,
    topup.c.status == Status.IN_FLIGHT.value,
    topup.c.token == bindparam("claim_token"),
)
_ANSWER_VALUES: Final = {
    "status": bindparam("to_status"),
    "reference": bindparam("to_reference"),
    "updated_at": Now(),
}
_SETTLE: Final = (
    update(topup)
    .where(_HOLDS_CLAIM)
    .values(reason=bindparam("to_reason"), **_ANSWER_VALUES)
)
_SETTLE_WITH_CLASS: Final = _SETTLE.values(last_class=bindparam("to_class"))
_GIVE_BACK: Final = (
    update(topup)
    .where(_HOLDS_CLAIM)
    .values(
        status=case(
            (topup.c.doubts > 0, Status.PARKED.value), else_=bindparam("to_status")
        ),
        reason=case((topup.c.doubts > 0, bindparam("to_reason")), else_=literal("")),
        last_class=bindparam("to_class"),
        not_executed=topup.c.not_executed + bindparam("counted"),
        updated_at=Now(),
    )
)
_GIVE_BACK_FOR_LATER: Final = _GIVE_BACK.values(not_before=After(bindparam("wait_us")))
_DOUBT: Final = (
    update(topup)
    .where(_HOLDS_CLAIM)
    .values(
        status=bindparam("to_status"),
        last_class=bindparam("to_class"),
        doubts=topup.c.doubts + 1,
        reason=bindparam("to_reason"),
        updated_at=Now(),
    )
)
_EXPIRE: Final = (
    update(topup)
    .where(_HOLDS_CLAIM, topup.c.lease_until < Now())
    .values(
        status=Status.IN_DOUBT.value,
        last_class=AnswerClass.UNKNOWN.value,
        doubts=topup.c.doubts + 1,
        updated_at=Now(),
    )
)
_AS_SEEN: Final = and_(
    _KEY,
    topup.c.status == bindparam("seen_status"),
    topup.c.token.is_not_distinct_from(bindparam("seen_token")),
)
_END_DOUBT: Final = (
    update(topup)
    .where(_AS_SEEN)
    .values(
        status=bindparam("to_status"),
        reason=bindparam("to_reason"),
        # What an accepted one was given stays when its end brings none.
        reference=func.coalesce(bindparam("to_reference"), topup.c.reference),
        updated_at=Now(),
    )
)
_PARK: Final = (
    update(topup)
    .where(_AS_SEEN)
    .values(status=Status.PARKED.value, reason=bindparam("to_reason"), updated_at=Now())
)
_NOTE: Final = update(topup).where(_AS_SEEN).values(reason=bindparam("to_reason"))
_WAIT_AGAIN: Final = (
    update(topup).where(_AS_SEEN).values(status=Status.HELD.value, updated_at=Now())
)
_SETTLE_UNHELD: Final = (
    update(topup)
    .where(_KEY, topup.c.status.in_([status.value for status in _UNHELD]))
    .values(reason="", **_ANSWER_VALUES)
)
_EARLIER_HERE: Final = and_(
    topup.c.msisdn == bindparam("subscriber"),
    topup.c.topic == bindparam("at_topic"),
    topup.c.kafka_partition == bindparam("at_partition"),
    topup.c.kafka_offset < bindparam("at_offset"),
)
_IS_DOUBTFUL: Final = or_(
    topup.c.status == Status.IN_DOUBT.value,
    and_(topup.c.status == Status.IN_FLIGHT.value, topup.c.lease_until < Now()),
)
_OVERTAKEN: Final = (
    select(topup.c.idempotency_key)
    .where(_EARLIER_HERE, or_(_IS_DOUBTFUL, topup.c.status == Status.RELEASED.value))
    .order_by(topup.c.place, topup.c.idempotency_key)
    .with_for_update()
)
_OVERTAKE_DOUBT: Final = (
    update(topup)
    .where(_EARLIER_HERE, _IS_DOUBTFUL)
    .values(
        status=Status.PARKED.value,
        reason="source_gave_up",
        doubts=case((topup.c.doubts == 0, 1), else_=topup.c.doubts),
        updated_at=Now(),
    )
)
_OVERTAKE_RELEASED: Final = (
    update(topup)
    .where(_EARLIER_HERE, topup.c.status == Status.RELEASED.value)
    .values(status=Status.HELD.value, updated_at=Now())
)
#: Orders that are not ended and that another API than `api_identity` was sent.
COUNT_OF_OTHER_APIS: Final = select(func.count()).where(
    topup.c.status.in_([status.value for status in sorted(ENDED_BY_THE_API)]),
    topup.c.sent_at.is_not(None),
    topup.c.api_identity.is_distinct_from(bindparam("api_identity")),
)
_RECORD: Final = insert(attempt).values(recorded_at=Now())
_QUARANTINE: Final = insert(quarantine).values(recorded_at=Now())
