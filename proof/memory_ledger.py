"""The ledger in plain memory: what ledger.py promises, without a database.

Owns rows and compare-and-set on them, fast enough for a million simulated runs; must
never be kinder than SQL. tests/contract holds it, SQLite and MariaDB to the same cases.

Each method is one transaction: it happens whole, or (when the caller raises before it)
not at all. Moments are integer microseconds of the clock that it is handed.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

from function.api_profile import ApiProfile
from function.errors import IllegalTransition, OperationRefused
from function.ledger import STATUS_OF_ANSWER, Ledger
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
from function.operations import Verdict, _path
from function.rules import Rules

MICROS: Final = 1_000_000
# Tuples: an Enum's hash is slow, and these are asked all the time.
_UNSETTLED: Final = tuple(UNSETTLED)
_ANSWERED: Final = (Status.SUCCEEDED, Status.ACCEPTED, Status.REJECTED)
_UNHELD: Final = (Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED)
_STUCK: Final = (Status.PARKED, Status.HELD)
#: Each useless attempt doubles the pause before a parked order is looked at again.
_DOUBLINGS_MAX: Final = 8


@dataclass(slots=True)
class Row:
    """One order: the columns of `schema.topup`."""

    idempotency_key: str
    fingerprint: str
    status: Status
    msisdn: str
    channel: str
    amount_minor: int
    currency: str
    payload: bytes
    topic: str | None
    kafka_partition: int | None
    kafka_offset: int | None
    rendered_key: str
    place: int
    created_at: int
    updated_at: int
    token: str | None = None
    lease_until: int | None = None
    first_sent_at: int | None = None
    sent_at: int | None = None
    attempts: int = 0
    doubts: int = 0
    not_executed: int = 0
    not_before: int | None = None
    api_kind: str | None = None
    api_identity: str | None = None
    last_class: str | None = None
    reference: str | None = None
    reason: str = ""
    looked_at: int | None = None

    @property
    def place_in_line(self) -> tuple[int, int, str]:
        """What sorts the rows of one subscriber (`schema.is_before`)."""
        offset = -1 if self.kafka_offset is None else self.kafka_offset
        return self.place, offset, self.idempotency_key

    def as_columns(self) -> dict[str, object]:
        """The row as a SELECT would show it, generated columns included."""
        columns: dict[str, object] = {
            each.name: getattr(self, each.name) for each in fields(self)
        }
        columns["unsettled"] = 1 if self.status in _UNSETTLED else None
        columns["active"] = 1 if self.status is Status.IN_FLIGHT else None
        return columns


class MemoryLedger(Ledger):
    """Everything that `Ledger` promises, but in memory; for one thread.

    Args:
        profile: renders the recharge API's key.
        lease_s: how long a claim excludes others, in seconds.
        now: the database's clock, in integer microseconds.
        rules: what a person's decision must keep.

    """

    def __init__(  # It shares the promises of Ledger, and nothing of its making.
        self,
        profile: ApiProfile,
        *,
        lease_s: float,
        now: Callable[[], int],
        rules: Rules,
    ) -> None:
        self._profile = profile
        self._lease_us = round(lease_s * MICROS)
        self._now = now
        self._rules = rules
        self._tokens = 0
        #: What the next claim is fenced with, if that is known before it is made.
        self.next_token: str | None = None
        self.orders: dict[str, Row] = {}
        self.attempts: list[dict[str, object]] = []
        self.quarantined: dict[tuple[object, ...], Refused] = {}
        #: Channels, or `*`, and who has paused them and why.
        self.paused: dict[str, str] = {}
        self.decisions: list[dict[str, object]] = []
        #: How often something was seen, and when first.
        self.sighted: dict[str, tuple[int, int]] = {}

    # -- What the function does ----------------------------------------------------

    def claim(self, order: TopUp) -> Claim | None:
        """As `Ledger.claim`."""
        key = order.idempotency_key
        if (
            key in self.orders
            or self._is_paused(_channel(order))
            or self._line_of(order.msisdn)
        ):
            return None
        now = self._now()
        row = self._new_row(order, Status.IN_FLIGHT, now, now)
        row.token = self.new_token()
        row.lease_until = now + self._lease_us
        row.first_sent_at = row.sent_at = now
        row.attempts = 1
        row.api_kind = self._profile.kind
        row.api_identity = self._profile.identity
        self._insert(row)
        return Claim(row.token, row.rendered_key, is_doubted=False)

    def reclaim(self, entry: Entry) -> Claim | None:
        """As `Ledger.reclaim`."""
        _check(entry.status, Status.IN_FLIGHT)
        row = self._as_seen(entry)
        if row is None or self._is_paused(row.channel):
            return None
        line = self._line_of(row.msisdn)
        if any(each.place_in_line < row.place_in_line for each in line):
            return None
        if any(each.status is Status.IN_FLIGHT for each in line):
            return None
        now = self._now()
        self._move(row, Status.IN_FLIGHT)
        row.token = self.new_token()
        row.lease_until = now + self._lease_us
        if row.first_sent_at is None:
            row.first_sent_at = now
        row.sent_at = row.updated_at = now
        row.attempts += 1
        row.api_kind = self._profile.kind
        row.api_identity = self._profile.identity
        row.not_before = None
        row.reason = ""
        is_doubted = entry.doubts > 0
        return Claim(row.token, entry.rendered_key, is_doubted, entry.not_executed)

    def look(self, order: TopUp) -> tuple[Entry | None, Line]:
        """As `Ledger.look`."""
        row = self.orders.get(order.idempotency_key)
        before = [
            each
            for each in self._line_of(order.msisdn)
            if each is not row
            and (
                each.place_in_line < row.place_in_line
                if row is not None
                else not _is_later_here(each, order.position)
            )
        ]
        first = min(before, key=lambda each: each.place_in_line, default=None)
        is_all_paused = "*" in self.paused
        line = Line(
            is_all_paused,
            self._is_paused(_channel(order)) and not is_all_paused,
            first.status if first else None,
            any(each.status in _STUCK for each in before),
            any(_keeps_place_of(each, order.position) for each in before),
            self.paused.get("*") or self.paused.get(_channel(order)) or "",
        )
        return (self._entry(row) if row else None), line

    def settle(self, key: str, token: str, answer: Answer) -> bool:
        """As `Ledger.settle`."""
        status = STATUS_OF_ANSWER[answer.classified]
        _check(Status.IN_FLIGHT, status)
        row = self._claimed(key, token)
        if row is None:
            return False
        self._answer(row, status, answer)
        row.reason = answer.reason if status is Status.REJECTED else ""
        if answer.classified is not AnswerClass.DONE:
            row.last_class = answer.classified
            self._record(key, token, answer)
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
        """As `Ledger.give_back`."""
        row = self._claimed(key, token)
        if row is None:
            return False
        status = Status.HELD if is_held else Status.RELEASED
        self._change(row, Status.PARKED if row.doubts else status)
        row.reason = answer.reason if row.doubts else ""
        row.last_class = answer.classified
        row.not_executed += int(answer.is_sent)
        if wait_s > 0:
            row.not_before = self._now() + round(wait_s * MICROS)
        self._record(key, token, answer)
        return True

    def doubt(self, key: str, token: str, answer: Answer, *, is_parked: bool) -> bool:
        """As `Ledger.doubt`."""
        row = self._claimed(key, token)
        if row is None:
            return False
        self._change(row, Status.PARKED if is_parked else Status.IN_DOUBT)
        row.last_class = answer.classified
        row.doubts += 1
        row.reason = answer.reason if is_parked else ""
        self._record(key, token, answer)
        return True

    def expire(self, entry: Entry) -> bool:
        """As `Ledger.expire`."""
        token = entry.token or ""
        row = self._claimed(entry.idempotency_key, token)
        if row is None or not self._is_lease_over(row):
            return False
        self._change(row, Status.IN_DOUBT)
        row.last_class = AnswerClass.UNKNOWN
        row.doubts += 1
        lost = Answer(AnswerClass.UNKNOWN, reason="lease_over")
        self._record(entry.idempotency_key, token, lost)
        return True

    def end_doubt(self, entry: Entry, answer: Answer) -> bool:
        """As `Ledger.end_doubt`."""
        status = STATUS_OF_ANSWER[answer.classified]
        _check(entry.status, status)
        row = self._as_seen(entry)
        if row is None:
            return False
        self._change(row, status)
        row.reason = answer.reason if status is Status.REJECTED else ""
        row.reference = answer.reference or row.reference
        self._record(entry.idempotency_key, entry.token or "", answer)
        return True

    def park(self, entry: Entry, reason: str) -> bool:
        """As `Ledger.park`."""
        _check(entry.status, Status.PARKED)
        row = self._as_seen(entry)
        if row is not None:
            self._change(row, Status.PARKED)
            row.reason = reason
        return row is not None

    def note(self, entry: Entry, reason: str) -> bool:
        """As `Ledger.note`."""
        row = self._as_seen(entry)
        if row is not None:
            row.reason = reason
        return row is not None

    def keep_evidence(self, key: str, token: str, answer: Answer) -> bool:
        """As `Ledger.keep_evidence`."""
        self._record(key, token, answer)
        status = STATUS_OF_ANSWER.get(answer.classified)
        row = self.orders.get(key)
        if row is None or row.status not in _UNHELD:
            return False
        if status not in _ANSWERED[:2]:
            return False
        self._answer(row, status, answer)
        row.reason = ""
        return True

    def hold(self, order: TopUp) -> bool:
        """As `Ledger.hold`."""
        line = self._line_of(order.msisdn)
        is_waiting = bool(line) or self._is_paused(_channel(order))
        if not is_waiting or order.idempotency_key in self.orders:
            return False
        place = min(
            (each.place for each in line if _is_later_here(each, order.position)),
            default=None,
        )
        self._record_new(order, Status.HELD, place)
        return True

    def put_off(self, order: TopUp) -> bool:
        """As `Ledger.put_off`."""
        if order.idempotency_key in self.orders:
            return False
        self._record_new(order, Status.RELEASED, None)
        return True

    def _record_new(self, order: TopUp, status: Status, place: int | None) -> None:
        """A row that was not sent; at the end of its line if no place is given."""
        now = self._now()
        if place is None:
            places = [each.place for each in self._line_of(order.msisdn)]
            place = max([now, *(each + 1 for each in places)])
        self._insert(self._new_row(order, status, place, now))

    def overtake(self, order: TopUp) -> list[str]:
        """As `Ledger.overtake`."""
        if order.position is None:
            return []
        changed = []
        for row in [*self.orders.values()]:
            if row.msisdn != order.msisdn or not _is_earlier_here(row, order.position):
                continue
            is_lost = row.status is Status.IN_FLIGHT and self._is_lease_over(row)
            if row.status is Status.IN_DOUBT or is_lost:
                self._change(row, Status.PARKED)
                row.doubts = row.doubts or 1
                row.reason = "source_gave_up"
                changed.append(row)
            elif row.status is Status.RELEASED:
                self._change(row, Status.HELD)
                changed.append(row)
        changed.sort(key=lambda each: (each.place, each.idempotency_key))
        return [each.idempotency_key for each in changed]

    def put_in_quarantine(self, refused: Refused) -> bool:
        """As `Ledger.put_in_quarantine`."""
        at = refused.position
        identity = (at, refused.raw, refused.announced_bytes)
        if identity in self.quarantined:
            return False
        self.quarantined[identity] = refused
        return True

    def count_of_other_apis(self) -> int:
        """As `Ledger.count_of_other_apis`."""
        return sum(
            row.status in ENDED_BY_THE_API
            and row.sent_at is not None
            and row.api_identity != self._profile.identity
            for row in self.orders.values()
        )

    def see(self, name: str) -> Sighting:
        """As `Ledger.see`."""
        now = self._now()
        times, first_at = self.sighted.get(name, (0, now))
        self.sighted[name] = times + 1, first_at
        return Sighting(times + 1, (now - first_at) / MICROS)

    def keep_place(self, place: TopUp, reason: str) -> bool:
        """As `Ledger.keep_place`."""
        at = place.position
        line = self._line_of(place.msisdn)
        is_known = any(
            row.msisdn == place.msisdn and _is_here(row, at)
            for row in self.orders.values()
        )
        if is_known or place.idempotency_key in self.orders:
            return False
        later = [each.place for each in line if _is_later_here(each, at)]
        self._record_new(place, Status.PARKED, min(later, default=None))
        self.orders[place.idempotency_key].reason = reason
        return True

    def end_place(self, order: TopUp) -> bool:
        """As `Ledger.end_place`."""
        _check(Status.PARKED, Status.ABANDONED)
        kept = [
            row
            for row in self._line_of(order.msisdn)
            if _keeps_place_of(row, order.position)
        ]
        for row in kept:
            self._change(row, Status.ABANDONED)
            row.reason = "replayed"
        return bool(kept)

    def looked(self, key: str) -> None:
        """As `Ledger.looked`."""
        row = self.orders.get(key)
        if row is not None:
            row.looked_at = self._now()

    # -- What the resolver does ----------------------------------------------------

    def due(
        self,
        *,
        given_up_s: float,
        again_s: float,
        is_parked_due: bool,
        limit: int,
        msisdn: str | None = None,
    ) -> list[Stored]:
        """As `Ledger.due`."""
        given_up_at = self._now() - round(given_up_s * MICROS)
        found = []
        for row in self.orders.values():
            is_given_up = row.updated_at < given_up_at and (
                row.looked_at is None or row.looked_at < given_up_at
            )
            match row.status:
                case Status.HELD:
                    is_due = row.not_before is None or row.not_before <= self._now()
                case Status.PARKED:
                    is_due = (
                        is_parked_due
                        and row.sent_at is not None
                        and self._is_parked_unlooked(row, again_s)
                    )
                case Status.IN_FLIGHT:
                    is_due = self._is_lease_over(row)
                case Status.IN_DOUBT | Status.RELEASED:
                    is_due = is_given_up
                case _:
                    is_due = False
            if (
                is_due
                and msisdn in {None, row.msisdn}
                and not self._is_paused(row.channel)
                and (row.status is Status.IN_FLIGHT or self._is_first(row))
            ):
                found.append((row, is_given_up))
        found.sort(key=lambda each: (each[0].status is not Status.HELD, _last(each[0])))
        return [_stored(row, is_given_up) for row, is_given_up in found[:limit]]

    def accepted(self, *, again_s: float, watch_s: float, limit: int) -> list[Stored]:
        """As `Ledger.accepted`."""
        again_at = self._now() - round(again_s * MICROS)
        watched_from = self._now() - round(watch_s * MICROS)
        unlooked = [
            row
            for row in self.orders.values()
            if row.looked_at is None or row.looked_at < again_at
        ]
        followed = [row for row in unlooked if row.status is Status.ACCEPTED]
        watched = [
            row
            for row in unlooked
            if watch_s > 0
            and row.status is Status.SUCCEEDED
            and row.last_class == AnswerClass.ACCEPTED
            and row.updated_at > watched_from
        ]
        return [
            _stored(row, is_given_up=False)
            for rows in (followed, watched)
            for row in sorted(rows, key=_last)[:limit]
        ]

    def wait_again(self, entry: Entry) -> bool:
        """As `Ledger.wait_again`."""
        _check(entry.status, Status.HELD)
        row = self._as_seen(entry)
        if row is not None:
            self._change(row, Status.HELD)
        return row is not None

    def record_reversal(self, key: str, token: str, reference: str | None) -> None:
        """As `Ledger.record_reversal`."""
        self._record(key, token, Answer(AnswerClass.REVERSED, reference=reference))
        row = self.orders[key]
        row.last_class = AnswerClass.REVERSED
        row.looked_at = self._now()

    # -- What a person does --------------------------------------------------------

    def decide(
        self,
        key: str,
        verdict: Verdict,
        *,
        reason: str,
        reference: str | None = None,
        attempt_token: str | None = None,
    ) -> None:
        """As `Operations.decide`, whose own rules it asks; for one person.

        Raises:
            OperationRefused: nothing was written; says what the order is now.

        """
        row = self.orders.get(key)
        if row is None or row.amount_minor > self._rules.second_person_above_minor:
            raise OperationRefused(f"{key}: not for one person, or not in the ledger")
        columns: Any = row.as_columns()
        columns["has_lease"] = not self._is_lease_over(row) and row.lease_until
        columns["sent_age_s"] = self._age_s(row.sent_at)
        path = _path(columns, verdict, self._rules.settle_s, attempt_token)
        decision: dict[str, object] = {"idempotency_key": key, "verdict": verdict}
        self.decisions.append(decision | {"token": row.token or "", "reason": reason})
        for status in path:
            self._change(row, status)
        if verdict is Verdict.EXECUTED:
            row.reference, row.reason = reference, ""
        elif verdict is Verdict.ABANDON:
            row.reason = "abandoned_by_decision"
        else:
            row.doubts, row.reason = 0, ""

    # -- Parts ---------------------------------------------------------------------

    def new_token(self) -> str:
        """A fence that was never given before; not random, so that runs repeat."""
        if self.next_token is not None:
            token, self.next_token = self.next_token, None
            return token
        self._tokens += 1
        return f"{self._tokens:032x}"

    def _insert(self, row: Row) -> None:
        self.orders[row.idempotency_key] = row

    def _move(self, row: Row, status: Status) -> None:
        """The only place at which a row's status changes."""
        row.status = status

    def _change(self, row: Row, status: Status) -> None:
        self._move(row, status)
        row.updated_at = self._now()

    def _answer(self, row: Row, status: Status, answer: Answer) -> None:
        self._change(row, status)
        row.reference = answer.reference

    def _record(self, key: str, token: str, answer: Answer) -> None:
        self.attempts.append(
            {
                "idempotency_key": key,
                "token": token,
                "classified": answer.classified,
                "is_sent": int(answer.is_sent),
                "http_status": answer.http_status,
                "reference": answer.reference,
                "reason": answer.reason,
                "words": answer.words,
            }
        )

    def _new_row(self, order: TopUp, status: Status, place: int, now: int) -> Row:
        at = order.position
        return Row(
            idempotency_key=order.idempotency_key,
            fingerprint=order.fingerprint,
            status=status,
            msisdn=order.msisdn,
            channel=_channel(order),
            amount_minor=order.amount_minor,
            currency=order.currency,
            payload=order.payload,
            topic=at.topic if at else None,
            kafka_partition=at.partition if at else None,
            kafka_offset=at.offset if at else None,
            rendered_key=self._profile.render_key(order.idempotency_key),
            place=place,
            created_at=now,
            updated_at=now,
        )

    def _entry(self, row: Row) -> Entry:
        return Entry(
            idempotency_key=row.idempotency_key,
            fingerprint=row.fingerprint,
            status=row.status,
            token=row.token,
            is_lease_over=self._is_lease_over(row),
            rendered_key=row.rendered_key,
            sent_age_s=self._age_s(row.sent_at),
            first_sent_age_s=self._age_s(row.first_sent_at),
            doubts=row.doubts,
            not_executed=row.not_executed,
            wait_s=-(self._age_s(row.not_before) or 0.0),
            api_kind=row.api_kind,
            api_identity=row.api_identity,
            last_class=AnswerClass(row.last_class) if row.last_class else None,
            reference=row.reference,
            reason=row.reason,
        )

    def _line_of(self, msisdn: str) -> list[Row]:
        """The unsettled orders of a subscriber."""
        return [
            row
            for row in self.orders.values()
            if row.msisdn == msisdn and row.status in _UNSETTLED
        ]

    def _is_first(self, row: Row) -> bool:
        place = row.place_in_line
        return not any(each.place_in_line < place for each in self._line_of(row.msisdn))

    def _as_seen(self, entry: Entry) -> Row | None:
        """The row, if it is still the very attempt that was read."""
        row = self.orders.get(entry.idempotency_key)
        is_same = row and row.status is entry.status and row.token == entry.token
        return row if is_same else None

    def _claimed(self, key: str, token: str) -> Row | None:
        """The row, if this attempt holds its claim."""
        row = self.orders.get(key)
        is_held = row and row.status is Status.IN_FLIGHT and row.token == token
        return row if is_held else None

    def _is_paused(self, channel: str) -> bool:
        return bool(self.paused) and ("*" in self.paused or channel in self.paused)

    def _is_lease_over(self, row: Row) -> bool:
        return row.lease_until is not None and row.lease_until < self._now()

    def _is_parked_unlooked(self, row: Row, again_s: float) -> bool:
        if row.looked_at is None:
            return True
        doublings = max(0, row.doubts - 1)
        pause_s = again_s * 2 ** min(_DOUBLINGS_MAX, doublings)
        return bool(self._now() - row.looked_at >= pause_s * MICROS)

    def _age_s(self, moment: int | None) -> float | None:
        return None if moment is None else (self._now() - moment) / MICROS


def _check(from_: Status, to: Status) -> None:
    if to not in TRANSITIONS[from_]:
        raise IllegalTransition(f"{from_} -> {to}")


def _channel(order: TopUp) -> str:
    return order.idempotency_key.partition(":")[0]


def _partition(row: Row) -> tuple[str | None, int | None]:
    return row.topic, row.kafka_partition


def _is_later_here(row: Row, at: Position | None) -> bool:
    return (
        at is not None
        and _partition(row) == (at.topic, at.partition)
        and row.kafka_offset is not None
        and row.kafka_offset > at.offset
    )


def _is_here(row: Row, at: Position | None) -> bool:
    return (
        at is not None
        and _partition(row) == (at.topic, at.partition)
        and row.kafka_offset == at.offset
    )


def _keeps_place_of(row: Row, at: Position | None) -> bool:
    """Whether a row is no order, but keeps the place of the record at this position."""
    return row.status is Status.PARKED and row.sent_at is None and _is_here(row, at)


def _is_earlier_here(row: Row, at: Position | None) -> bool:
    return (
        at is not None
        and _partition(row) == (at.topic, at.partition)
        and row.kafka_offset is not None
        and row.kafka_offset < at.offset
    )


def _last(row: Row) -> int:
    return row.place if row.looked_at is None else row.looked_at


def _stored(row: Row, is_given_up: bool) -> Stored:  # noqa: FBT001
    at = None
    if (
        row.topic is not None
        and row.kafka_partition is not None
        and row.kafka_offset is not None
    ):
        at = Position(row.topic, row.kafka_partition, row.kafka_offset)
    return Stored(
        row.idempotency_key, row.msisdn, row.payload, at, row.status, is_given_up
    )
