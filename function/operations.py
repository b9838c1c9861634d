"""What people do to the ledger: look, decide, release, pause.

Owns those statements; must never call the recharge API, put a row in flight, or write
who a person is: the database's own account signs a decision.

Every change of status is a compare-and-set on the status and the attempt that were
seen, along `model.TRANSITIONS`. Clocks are the database's.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum, unique
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Select,
    case,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from function.attempt_end import API_IDENTITY_UNKNOWN, API_OF_ANOTHER_IDENTITY
from function.database import connected, transaction
from function.errors import IllegalTransition, OperationRefused
from function.model import ENDED_BY_THE_API, TRANSITIONS, Status, is_kept_place
from function.rules import read_rules
from function.schema import (
    UNPROVEN,
    AgeS,
    Now,
    ago,
    attempt,
    decision,
    hinted,
    is_before,
    is_behind,
    moment_text,
    pause,
    pause_log,
    quarantine,
    topup,
)

#: The scope of a pause of everything; channels are percent-encoded, so none is `*`.
EVERYTHING: Final = "*"
#: So much of a line is enough to show what stands in it.
_LINE_MAX: Final = 500
_HELD_SUBSCRIBERS: Final = 10
_REASON_CHARACTERS_MAX: Final = 500
_NAME_CHARACTERS_MAX: Final = 200


@unique
class Verdict(StrEnum):
    """What a person says became of an order."""

    #: The recharge API executed it, under a reference.
    EXECUTED = "executed"
    #: It did not, and never will: call it again, at its place in the line.
    NOT_EXECUTED = "not_executed"
    #: Nobody shall call it again; what it was is settled elsewhere.
    ABANDON = "abandon"


#: What the resolver notes of an accepted order that nobody but a person will end.
ACCEPTED_CASES: Final = frozenset(
    {
        API_IDENTITY_UNKNOWN,
        API_OF_ANOTHER_IDENTITY,
        "accepted_overdue",
        "accepted_but_absent",
        "executed_several_times",
    }
)
_OPEN: Final = (Status.PARKED, Status.IN_DOUBT, Status.HELD, Status.RELEASED)

#: Verdict -> the path of statuses behind the one it starts from.
_PATH: Final[Mapping[Verdict, Mapping[Status, tuple[Status, ...]]]] = {
    Verdict.EXECUTED: dict.fromkeys(
        (*_OPEN, Status.ACCEPTED),
        (Status.SUCCEEDED,),
    ),
    Verdict.NOT_EXECUTED: {
        Status.PARKED: (Status.HELD,),
        # The model knows no other way: it is given up first, in one transaction.
        Status.IN_DOUBT: (Status.PARKED, Status.HELD),
    },
    Verdict.ABANDON: dict.fromkeys(
        (*_OPEN, Status.ACCEPTED),
        (Status.ABANDONED,),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which orders `list_orders` shows; what is not set does not narrow."""

    statuses: tuple[Status, ...] = ()
    subscriber: str | None = None
    #: As in the key: percent-encoded.
    channel: str | None = None
    #: Seconds since the last change of status.
    older_than_s: float | None = None
    limit: int = 50
    #: `Page.after` of the page before.
    after: str | None = None


@dataclass(frozen=True, slots=True)
class OrderRow:
    """An order as a person sees it."""

    idempotency_key: str
    status: Status
    #: Personal; whoever prints it masks it.
    msisdn: str
    amount_minor: int
    currency: str
    #: Of the last change of status.
    updated_at: datetime
    age_s: float
    created_at: datetime
    place: datetime
    attempts: int
    doubts: int
    last_class: str | None
    reference: str | None
    reason: str
    #: The last attempt, about which a decision is.
    token: str | None
    topic: str | None
    kafka_partition: int | None
    kafka_offset: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some orders, and where the next ones begin."""

    orders: list[OrderRow]
    #: None: there are no more.
    after: str | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """The evidence of one attempt that was no plain success."""

    token: str
    recorded_at: datetime
    classified: str
    is_sent: int
    http_status: int | None
    reference: str | None
    reason: str
    words: str


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """What a person decided; carried out, or proposed above the limit."""

    token: str
    from_status: str
    verdict: str
    reference: str | None
    reason: str
    note: str
    decided_by: str
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """What could not be executed as it is; its bytes stay in the ledger."""

    id: int
    outcome: str
    detail: str
    topic: str | None
    kafka_partition: int | None
    kafka_offset: int | None
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that the ledger knows of one key."""

    #: None: only quarantine knows the key.
    order: OrderRow | None
    attempts: list[AttemptRow]
    decisions: list[DecisionRow]
    quarantined: list[QuarantineRow]
    #: The subscriber's unsettled orders that stand before it, first one first.
    before: list[OrderRow]


@dataclass(frozen=True, slots=True)
class Count:
    """How many, and the age of the oldest in seconds."""

    name: str
    count: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class PauseRow:
    """Who stopped what, and why."""

    scope: str
    paused_by: str
    reason: str
    paused_at: datetime


@dataclass(frozen=True, slots=True)
class Stats:
    """The ledger at a glance."""

    statuses: list[Count]
    #: The subscribers with the most held orders: masked by whoever prints them.
    held: list[Count]
    #: The recharge APIs that open and accepted orders were sent to; empty: not known.
    apis: list[Count]
    quarantine: list[Count]
    pauses: list[PauseRow]


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of a decision."""

    idempotency_key: str
    decided_by: str
    from_status: Status
    to_status: Status
    #: False: recorded as a proposal, which waits for a second person.
    is_carried_out: bool


@dataclass(frozen=True, slots=True)
class Released:
    """What stood in a subscriber's line before the drain, and how many it ran."""

    line: list[OrderRow]
    drained: int


class Operations:
    """The ledger as people use it.

    Args:
        engine: from `database.make_engine`, with the account of whoever acts.

    Every method may raise LedgerUnavailable; nothing is half-done then.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"

    # -- Look ----------------------------------------------------------------------

    def list_orders(self, filters: Filters) -> Page:
        """Orders by age, oldest change first; a subscriber's by place in the line.

        Fast in a ledger of any size: each status is its own walk along `by_status`,
        cut at the limit.

        Raises:
            OperationRefused: `after` is not what a page said.

        """
        after = self._after(filters.after)
        if filters.subscriber is not None:
            query = self._narrowed(_ORDERS, filters).where(
                topup.c.msisdn == filters.subscriber
            )
            if filters.statuses:
                query = query.where(topup.c.status.in_(filters.statuses))
            queries, column = [query], topup.c.place
        else:
            statuses = filters.statuses or tuple(Status)
            walked = hinted(_ORDERS, "by_status")
            queries = [
                self._narrowed(walked, filters).where(topup.c.status == status)
                for status in statuses
            ]
            column = topup.c.updated_at
        pages = []
        with connected(self._engine) as connection:
            for query in queries:
                if after:
                    query = query.where(is_behind(column, *after))  # noqa: PLW2901
                ordered = query.order_by(column, topup.c.idempotency_key)
                rows = connection.execute(ordered.limit(filters.limit + 1)).mappings()
                pages.append([_order(row) for row in rows])
        name = column.name
        orders = list(
            heapq.merge(
                *pages, key=lambda row: (getattr(row, name), row.idempotency_key)
            )
        )
        if len(orders) <= filters.limit:
            return Page(orders, None)
        last = orders[filters.limit - 1]
        moment = moment_text(getattr(last, name), is_sqlite=self._is_sqlite)
        return Page(orders[: filters.limit], f"{moment}/{last.idempotency_key}")

    def show(self, key: str) -> Story:
        """Everything about one key.

        Raises:
            OperationRefused: neither the ledger nor its quarantine knows the key.

        """
        earlier = topup.alias("earlier")
        if not key.isascii():
            raise OperationRefused(_not_found(key))
        with connected(self._engine) as connection:
            row = _one(connection, key)
            attempts = _rows(connection, attempt, AttemptRow, key)
            decisions = _rows(connection, decision, DecisionRow, key)
            quarantined = _rows(connection, quarantine, QuarantineRow, key)
            before = connection.execute(
                select(
                    *(earlier.c[name] for name in _ORDER_COLUMNS),
                    AgeS(earlier.c.updated_at).label("age_s"),
                )
                .select_from(earlier.join(topup, topup.c.idempotency_key == key))
                .where(
                    earlier.c.msisdn == topup.c.msisdn,
                    earlier.c.unsettled == 1,
                    is_before(earlier.c, topup.c),
                )
                .order_by(earlier.c.place, earlier.c.idempotency_key)
            ).mappings()
            line = [_order(each) for each in before]
        if row is None and not quarantined:
            raise OperationRefused(_not_found(key))
        order = None if row is None else _order(row)
        return Story(order, attempts, decisions, quarantined, line)

    def stats(self) -> Stats:
        """Counts and oldest ages: one walk over an index, none over the table."""
        by_status = hinted(
            select(
                topup.c.status.label("name"),
                func.count().label("n"),
                AgeS(func.min(topup.c.updated_at)).label("oldest_age_s"),
            ).select_from(topup),
            "by_status",
        ).group_by(topup.c.status)
        held = (
            hinted(
                select(
                    topup.c.msisdn.label("name"),
                    func.count().label("n"),
                    AgeS(func.min(topup.c.updated_at)).label("oldest_age_s"),
                ),
                "by_status",
            )
            .where(topup.c.status == Status.HELD)
            .group_by(topup.c.msisdn)
            .order_by(func.count().desc(), topup.c.msisdn)
            .limit(_HELD_SUBSCRIBERS)
        )
        by_api = (
            select(
                func.coalesce(topup.c.api_identity, "").label("name"),
                func.count().label("n"),
                AgeS(func.min(topup.c.updated_at)).label("oldest_age_s"),
            )
            .where(
                topup.c.status.in_([each.value for each in sorted(ENDED_BY_THE_API)]),
                topup.c.sent_at.is_not(None),
            )
            .group_by(func.coalesce(topup.c.api_identity, ""))
            .order_by(func.count().desc())
        )
        by_outcome = (
            select(
                quarantine.c.outcome.label("name"),
                func.count().label("n"),
                AgeS(func.min(quarantine.c.recorded_at)).label("oldest_age_s"),
            )
            .group_by(quarantine.c.outcome)
            .order_by(quarantine.c.outcome)
        )
        with connected(self._engine) as connection:
            statuses, subscribers, apis, outcomes = (
                [
                    Count(row.name, row.n, float(row.oldest_age_s))
                    for row in connection.execute(query)
                ]
                for query in (by_status, held, by_api, by_outcome)
            )
        order = list(Status)
        statuses.sort(key=lambda each: order.index(Status(each.name)))
        return Stats(statuses, subscribers, apis, outcomes, self.pauses())

    def pauses(self) -> list[PauseRow]:
        """What is paused now, by whom and why."""
        with connected(self._engine) as connection:
            rows = connection.execute(select(pause).order_by(pause.c.paused_at))
            return [PauseRow(**row) for row in rows.mappings()]

    # -- Decide --------------------------------------------------------------------

    def decide(
        self,
        key: str,
        verdict: Verdict,
        *,
        reason: str,
        reference: str | None = None,
        note: str = "",
        attempt_token: str | None = None,
    ) -> Decided:
        """Write what a person knows of an order, and carry it out.

        The decision is about the last attempt and is accepted only when nothing of
        the order can land any more: its lease is over, and its claim is older than
        the settling time. Above the limit two persons, whom the database tells
        apart, must have said the same about the same attempt. Settling time and
        limit are the ledger's own rules (`rules.Rules`).

        Args:
            key: the idempotency key.
            verdict: what became of it.
            reason: why the person knows.
            reference: the API's own, for `executed` only.
            note: a name or a ticket; it proves nothing.
            attempt_token: the attempt that the person has looked at, or how it
                begins; the last one if None.

        Raises:
            OperationRefused: nothing was written; says what the order is now.

        """
        _require_words(verdict, reason, reference, note)
        with connected(self._engine) as connection:
            row = _one(connection, key)
            rules = read_rules(connection)
        if row is None:
            raise OperationRefused(_not_found(key))
        path = _path(row, verdict, rules.settle_s, attempt_token)
        limit = rules.second_person_above_minor
        needs_two = row["amount_minor"] > limit
        if needs_two and self._is_sqlite:
            raise OperationRefused(
                f"{key}: above RESOLVE_SECOND_PERSON_ABOVE_MINOR "
                f"({limit}), and SQLite knows no accounts: a second "
                "person can't be proven"
            )
        values = {
            "idempotency_key": key,
            "token": row["token"] or "",
            "from_status": row["status"],
            "verdict": verdict.value,
            "reference": reference,
            "reason": reason,
            "note": note,
        }
        seen = Status(row["status"])
        with transaction(self._engine) as connection:
            # Takes the row's lock, so that two persons come one after the other.
            _move(connection, row, seen, {})
            person = _sign(connection, values)
            if needs_two and not _has_second(connection, values, person):
                return Decided(key, person, seen, seen, is_carried_out=False)
            # Crash here: rolled back; the person decides again (a decision that is
            # neither carried out nor a proposal is never on disk).
            for status in path:
                _move(connection, row, seen, _result(verdict, status, reference))
                seen = status
        return Decided(key, person, Status(row["status"]), seen, is_carried_out=True)

    def release(self, subscriber: str, drain: Callable[[str], int]) -> Released:
        """Run what is held of a subscriber now, in order, instead of a round later.

        Args:
            subscriber: whose line it is.
            drain: `Resolver.drain`: calls what is first in line until nothing is or
                one gets stuck; returns how many it settled.

        Raises:
            OperationRefused: the channel of the first in line is paused, or that one
                is not held or released and must be settled before.

        """
        unsettled = (
            _ORDERS.where(topup.c.msisdn == subscriber, topup.c.unsettled == 1)
            .order_by(topup.c.place, topup.c.idempotency_key)
            .limit(_LINE_MAX)
        )
        with connected(self._engine) as connection:
            line = [_order(row) for row in connection.execute(unsettled).mappings()]
        if not line:
            return Released([], 0)
        first = line[0]
        if first.status not in {Status.HELD, Status.RELEASED}:
            raise OperationRefused(
                f"{first.idempotency_key} is {first.status} and first in the line: "
                "settle it before the others (`topup ledger show` says how it stands)"
            )
        for each in self.pauses():
            if each.scope in {EVERYTHING, first.idempotency_key.partition(":")[0]}:
                raise OperationRefused(
                    f"{each.scope} is paused by {each.paused_by}: {each.reason}; "
                    "`topup resume` lets calls begin again"
                )
        return Released(line, drain(subscriber))

    # -- Pause ---------------------------------------------------------------------

    def pause(self, scope: str, reason: str) -> PauseRow:
        """Stop new calls on all pods with the next claim, durably.

        Args:
            scope: EVERYTHING, or a channel as it stands in the keys.
            reason: why; everybody sees it.

        Raises:
            OperationRefused: it is paused already; says by whom.

        """
        _require_text("--reason", reason, _REASON_CHARACTERS_MAX)
        _require_text("--channel", scope, _NAME_CHARACTERS_MAX)
        try:
            with transaction(self._engine) as connection:
                connection.execute(insert(pause).values(scope=scope, reason=reason))
                _log_switch(connection, scope, "pause", reason)
        except IntegrityError:
            pass
        else:
            return next(each for each in self.pauses() if each.scope == scope)
        for each in self.pauses():
            if each.scope == scope:
                raise OperationRefused(
                    f"{scope} is paused already, by {each.paused_by}: {each.reason}"
                )
        raise OperationRefused(f"{scope} was paused and resumed meanwhile: try again")

    def resume(self, scope: str, reason: str) -> None:
        """Let calls of a paused scope begin again.

        Raises:
            OperationRefused: it is not paused.

        """
        _require_text("--reason", reason, _REASON_CHARACTERS_MAX)
        with transaction(self._engine) as connection:
            gone = connection.execute(delete(pause).where(pause.c.scope == scope))
            if gone.rowcount != 1:
                raise OperationRefused(f"{scope} is not paused")
            _log_switch(connection, scope, "resume", reason)

    # -- Parts ---------------------------------------------------------------------

    def _narrowed(self, query: Select[Any], filters: Filters) -> Select[Any]:
        if filters.older_than_s is not None:
            query = query.where(topup.c.updated_at < ago(filters.older_than_s))
        if filters.channel is not None:
            # The key begins with the channel, and every index ends with the key: the
            # server skips other channels without reading their rows.
            query = query.where(
                topup.c.channel == filters.channel,
                topup.c.idempotency_key >= f"{filters.channel}:",
                topup.c.idempotency_key < f"{filters.channel};",
            )
        return query

    def _after(self, after: str | None) -> tuple[str, str] | None:
        if after is None:
            return None
        moment, _, key = after.partition("/")
        try:
            key.encode("ascii")
            at = datetime.fromisoformat(moment)
            return moment_text(at, is_sqlite=self._is_sqlite), key
        except ValueError:
            raise OperationRefused("--after: give what the page before said") from None


_ORDER_COLUMNS: Final = tuple(
    name for name in OrderRow.__dataclass_fields__ if name != "age_s"
)
_ORDERS: Final = select(
    *(topup.c[name] for name in _ORDER_COLUMNS),
    AgeS(topup.c.updated_at).label("age_s"),
)


def _order(row: RowMapping) -> OrderRow:
    values = {name: row[name] for name in _ORDER_COLUMNS}
    values["status"] = Status(values["status"])
    return OrderRow(**values, age_s=float(row["age_s"]))


def _not_found(key: str) -> str:
    return f"{key}: no such order in the ledger"


def _one(connection: Connection, key: str) -> RowMapping | None:
    # Keys are percent-encoded; MariaDB would not even compare another with them.
    if not key.isascii():
        return None
    query = select(
        *(topup.c[name] for name in _ORDER_COLUMNS),
        AgeS(topup.c.updated_at).label("age_s"),
        AgeS(topup.c.sent_at).label("sent_age_s"),
        # NULL, before the first attempt, is no lease that runs.
        case((topup.c.lease_until >= Now(), 1), else_=0).label("has_lease"),
    ).where(topup.c.idempotency_key == key)
    return connection.execute(query).mappings().first()


def _rows(connection: Connection, table: Any, kind: Any, key: str) -> list[Any]:
    query = (
        select(*(table.c[name] for name in kind.__dataclass_fields__))
        .where(table.c.idempotency_key == key)
        .order_by(table.c.id)
    )
    return [kind(**row) for row in connection.execute(query).mappings()]


def _require_text(name: str, text: str, characters_max: int) -> None:
    if not text.strip():
        raise OperationRefused(f"{name} is missing")
    if len(text) > characters_max:
        raise OperationRefused(f"{name} is longer than {characters_max} characters")


def _require_words(
    verdict: Verdict, reason: str, reference: str | None, note: str
) -> None:
    _require_text("--reason", reason, _REASON_CHARACTERS_MAX)
    if len(note) > _NAME_CHARACTERS_MAX:
        raise OperationRefused("--name is longer than 200 characters")
    if verdict is Verdict.EXECUTED:
        _require_text("--reference", reference or "", _NAME_CHARACTERS_MAX)
    elif reference is not None:
        raise OperationRefused("--reference goes with --executed only")


def _path(
    row: RowMapping, verdict: Verdict, settle_s: float, attempt_token: str | None
) -> tuple[Status, ...]:
    """The statuses that carry a verdict out; refuses what could still land."""
    key, status = row["idempotency_key"], Status(row["status"])
    path = _PATH[verdict].get(status)
    if path is None:
        raise OperationRefused(
            f"{key} is {status}: {verdict} is no decision about that"
            + _HINT.get(status, "")
        )
    if is_kept_place(key) and verdict is Verdict.NOT_EXECUTED:
        raise OperationRefused(
            f"{key} keeps the place of a record that nobody could read: bring the "
            f"record itself by `topup replay --quarantine --key '{key}'`, or --abandon"
        )
    if status is Status.ACCEPTED and row["reason"] not in ACCEPTED_CASES:
        raise OperationRefused(f"{key} is {status}{_HINT[status]}")
    token = row["token"] or ""
    if attempt_token is not None and not token.startswith(attempt_token):
        raise OperationRefused(
            f"{key}: another attempt was made since: look at it again"
        )
    if row["has_lease"]:
        raise OperationRefused(
            f"{key}: the lease of its last attempt still runs: it may be sent yet"
        )
    age_s = row["sent_age_s"]
    if age_s is not None and float(age_s) <= settle_s:
        left_s = settle_s - float(age_s)
        raise OperationRefused(
            f"{key}: its last attempt is {float(age_s):.0f} s old and can land until "
            f"the settling time of {settle_s:g} s is over: decide in {left_s:.0f} s"
        )
    return path


_HINT: Final = {
    Status.IN_FLIGHT: "; the resolver takes it up when its lease is over",
    Status.ACCEPTED: "; the API took it over and may still finish it: the resolver "
    "follows it, and makes it a person's case after RECHARGE_API_ACCEPTED_MAX_S",
    Status.SUCCEEDED: "; a settled order never changes",
    Status.REJECTED: "; a settled order never changes",
    Status.ABANDONED: "; a settled order never changes",
    Status.HELD: "; it is called when it is first in its line",
    Status.RELEASED: "; it is called again when it comes, or by the resolver",
}


def _result(verdict: Verdict, status: Status, reference: str | None) -> dict[str, Any]:
    """What a step of a decision writes, beside when."""
    values: dict[str, Any] = {"status": status.value, "updated_at": Now()}
    if verdict is Verdict.EXECUTED:
        return values | {"reference": reference, "reason": ""}
    if verdict is Verdict.ABANDON:
        return values | {"reason": "abandoned_by_decision"}
    # The person has ended the doubt: the next attempt is judged by itself.
    return values | ({"doubts": 0, "reason": ""} if status is Status.HELD else {})


def _move(
    connection: Connection, row: RowMapping, seen: Status, values: dict[str, Any]
) -> None:
    """Compare-and-set on the row as it was read; without values it only locks."""
    to = Status(values.get("status", seen))
    if to is not seen and to not in TRANSITIONS[seen]:
        raise IllegalTransition(f"{seen} -> {to}")
    statement = (
        update(topup)
        .where(
            topup.c.idempotency_key == row["idempotency_key"],
            topup.c.status == seen,
            topup.c.token.is_not_distinct_from(row["token"]),
        )
        .values(values or {"status": topup.c.status})
    )
    if connection.execute(statement).rowcount != 1:
        raise OperationRefused(
            f"{row['idempotency_key']} has changed meanwhile: look at it again"
        )


def _sign(connection: Connection, values: dict[str, Any]) -> str:
    """Write a decision; returns whom the database has signed it with."""
    made = connection.execute(insert(decision).values(values))
    (number,) = made.inserted_primary_key or (None,)
    signed = select(decision.c.decided_by).where(decision.c.id == number)
    return str(connection.scalar(signed) or UNPROVEN)


def _has_second(connection: Connection, values: dict[str, Any], person: str) -> bool:
    """Whether somebody else has decided the same about the same attempt."""
    others = connection.scalars(
        select(decision.c.decided_by).where(
            decision.c.idempotency_key == values["idempotency_key"],
            decision.c.token == values["token"],
            decision.c.verdict == values["verdict"],
            decision.c.reference.is_not_distinct_from(values["reference"]),
        )
    )
    # `ann@10.%` and `ann@%` are two accounts and one person.
    return any(_name(other) != _name(person) for other in others)


def _name(account: str) -> str:
    return account.rpartition("@")[0] or account


def _log_switch(connection: Connection, scope: str, action: str, reason: str) -> None:
    connection.execute(
        insert(pause_log).values(scope=scope, action=action, reason=reason)
    )
