"""What people do to the ledger: on both databases, and by the server's own rights."""

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError

from demo.mariadb import MariaDb
from function.api_profile import load_profile
from function.database import describe, make_engine
from function.errors import LedgerUnavailable, OperationRefused, SettingsError
from function.grants import ROLES, grants_of, script
from function.ledger import Ledger
from function.migrate import SCHEMA_REVISION, migrate
from function.model import (
    TERMINAL,
    TRANSITIONS,
    Answer,
    AnswerClass,
    Outcome,
    Refused,
    Status,
)
from function.operations import EVERYTHING, Filters, Operations, Verdict
from function.replay import Report, Selection, from_quarantine
from function.retention import Horizon, Retention
from function.rules import Rules
from tests.conftest import Database, settings_of
from tests.orders import order

DAY_S: Final = 86_400.0
SUBSCRIBER: Final = "+393331234567"
LIMIT: Final = 10_000
HORIZON: Final = Horizon(7 * DAY_S, 30 * DAY_S, 7 * DAY_S)
ALL: Final = 10**9


def ago(seconds: float) -> str:
    """A moment as both databases write it."""
    moment = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=seconds)
    return moment.isoformat(" ", "milliseconds")


def put(
    database: Database,
    key: str,
    status: Status,
    *,
    msisdn: str = SUBSCRIBER,
    age_s: float = 3600,
    sent_age_s: float | None = None,
    lease_s: float | None = None,
    place_age_s: float | None = None,
    amount_minor: int = 1000,
    token: str | None = "t1",  # noqa: S107
    reference: str | None = None,
    rendered_key: str | None = None,
    doubts: int = 1,
) -> None:
    """A row as it may stand in the ledger, with a default for what doesn't matter."""
    sent = ago(age_s if sent_age_s is None else sent_age_s) if token else None
    lease = ago(-lease_s) if lease_s is not None else sent
    database.execute(
        "INSERT INTO topup (idempotency_key, fingerprint, status, msisdn, channel,"
        " amount_minor, currency, payload, place, created_at, updated_at, token,"
        " lease_until, rendered_key, first_sent_at, sent_at, attempts, doubts,"
        " reason, reference) VALUES (:key, 'f', :status, :msisdn, :channel, :amount,"
        " 'EUR', :payload, :place, :at, :at, :token, :lease, :rendered, :sent, :sent,"
        " 1, :doubts, '', :reference)",
        key=key,
        status=status.value,
        msisdn=msisdn,
        channel=key.partition(":")[0],
        amount=amount_minor,
        payload=b'{"msisdn": "x"}',
        place=ago(age_s if place_age_s is None else place_age_s),
        at=ago(age_s),
        token=token,
        lease=lease,
        rendered=rendered_key or key,
        sent=sent,
        doubts=doubts,
        reference=reference,
    )


def put_attempt(database: Database, key: str, words: str = "") -> None:
    database.execute(
        "INSERT INTO attempt (idempotency_key, token, recorded_at, classified,"
        " is_sent, reason, words) VALUES (:key, 't1', :at, 'unknown', 1,"
        " 'read_timeout', :words)",
        key=key,
        at=ago(10),
        words=words,
    )


def put_in_quarantine(
    database: Database,
    raw: bytes = b"{}",
    *,
    key: str | None = None,
    age_s: float = 10,
    outcome: str = "invalid",
    attributes: str = "{}",
    announced: int | None = None,
    position: tuple[str, int, int] | None = None,
) -> None:
    topic, partition, offset = position or (None, None, None)
    database.execute(
        "INSERT INTO quarantine (identity, outcome, detail, idempotency_key, topic,"
        " kafka_partition, kafka_offset, raw, announced_bytes, attributes,"
        " recorded_at) VALUES (:identity, :outcome, 'why', :key, :topic, :partition,"
        " :offset, :raw, :announced, :attributes, :at)",
        identity=secrets.token_hex(32),
        outcome=outcome,
        key=key,
        topic=topic,
        partition=partition,
        offset=offset,
        raw=raw,
        announced=len(raw) if announced is None else announced,
        attributes=attributes.encode(),
        at=ago(age_s),
    )


@pytest.fixture
def empty(database: Database) -> Database:
    """A ledger whose rules ask for one person, and for 120 s of settling."""
    bind(database)
    return database


def bind(database: Database, *, settle_s: float = 120, limit: int = ALL) -> None:
    migrate(database.engine, Rules(settle_s, limit))


@pytest.fixture
def operations(empty: Database) -> Operations:
    return Operations(empty.engine)


@pytest.fixture
def retention(empty: Database) -> Retention:
    return Retention(empty.engine)


def decide(
    operations: Operations,
    key: str = "app:r1",
    verdict: Verdict = Verdict.NOT_EXECUTED,
    **more: object,
) -> object:
    options: dict[str, object] = {"reason": "asked the API's operator"}
    if verdict is Verdict.EXECUTED:
        options["reference"] = "R-1"
    return operations.decide(key, verdict, **(options | more))  # type: ignore[arg-type]


# -- Look ---------------------------------------------------------------------------


def keys(operations: Operations, filters: Filters) -> list[str]:
    return [row.idempotency_key for row in operations.list_orders(filters).orders]


def test_orders_are_listed_by_age_over_all_statuses(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:young", Status.PARKED, msisdn="+1000001", age_s=10)
    put(empty, "app:old", Status.SUCCEEDED, msisdn="+1000002", age_s=300)
    put(empty, "shop:mid", Status.HELD, msisdn="+1000003", age_s=100)

    assert keys(operations, Filters()) == ["app:old", "shop:mid", "app:young"]
    assert keys(operations, Filters(statuses=(Status.HELD, Status.PARKED))) == [
        "shop:mid",
        "app:young",
    ]
    assert keys(operations, Filters(older_than_s=50)) == ["app:old", "shop:mid"]
    assert keys(operations, Filters(subscriber="+1000003")) == ["shop:mid"]


def test_channel_is_exact_whatever_it_holds(
    operations: Operations, empty: Database
) -> None:
    for number, channel in enumerate(("app", "app2", "a%25p", "APP", "ap")):
        put(empty, f"{channel}:r", Status.PARKED, msisdn=f"+10000{number}")

    for channel in ("app", "app2", "a%25p", "APP", "ap"):
        assert keys(operations, Filters(channel=channel)) == [f"{channel}:r"]


def test_subscribers_orders_stand_in_their_line(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:first", Status.PARKED, place_age_s=300, age_s=1)
    put(empty, "app:last", Status.HELD, place_age_s=100, age_s=200)
    put(empty, "app:next", Status.HELD, place_age_s=200, age_s=2)

    assert keys(operations, Filters(subscriber=SUBSCRIBER)) == [
        "app:first",
        "app:next",
        "app:last",
    ]
    assert keys(
        operations, Filters(subscriber=SUBSCRIBER, statuses=(Status.HELD,))
    ) == ["app:next", "app:last"]


@pytest.mark.parametrize("subscriber", [None, SUBSCRIBER])
def test_pages_show_every_order_once_also_of_one_moment(
    operations: Operations, empty: Database, subscriber: str | None
) -> None:
    for number in range(17):
        status = (Status.HELD, Status.SUCCEEDED, Status.REJECTED)[number % 3]
        put(empty, f"app:r{number:02}", status)
    at = ago(100)
    empty.execute("UPDATE topup SET updated_at = :at, place = :at", at=at)

    seen, after = [], None
    for _ in range(9):
        filters = Filters(limit=4, after=after, subscriber=subscriber)
        page = operations.list_orders(filters)
        seen += [row.idempotency_key for row in page.orders]
        after = page.after
        if after is None:
            break

    assert seen == [f"app:r{number:02}" for number in range(17)]


def test_page_that_was_not_said_is_refused(operations: Operations) -> None:
    with pytest.raises(OperationRefused, match="--after"):
        operations.list_orders(Filters(after="yesterday"))


def test_one_order_is_shown_with_its_evidence_and_what_stands_before_it(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:r0", Status.SUCCEEDED, place_age_s=400)
    put(empty, "app:r1", Status.PARKED, place_age_s=300)
    put(empty, "app:r2", Status.HELD, place_age_s=200, token=None)
    put(empty, "app:r3", Status.HELD, place_age_s=100, token=None)
    put(empty, "app:other", Status.PARKED, msisdn="+1000001", place_age_s=500)
    put_attempt(empty, "app:r1", "words")
    put_in_quarantine(empty, key="app:r1")

    story = operations.show("app:r3")
    assert [row.idempotency_key for row in story.before] == ["app:r1", "app:r2"]
    story = operations.show("app:r1")
    assert story.order is not None
    assert story.order.token == "t1"
    assert [row.words for row in story.attempts] == ["words"]
    assert [row.outcome for row in story.quarantined] == ["invalid"]
    assert (story.before, story.decisions) == ([], [])


@pytest.mark.parametrize("key", ["app:caf\xe9", "\u4e2d", "app:\udcff", "a" * 999, ""])
def test_key_that_can_be_none_is_simply_not_found(
    operations: Operations, empty: Database, key: str
) -> None:
    """MariaDB compares no such text with a key, and says that the query is wrong."""
    with pytest.raises(OperationRefused, match="no such order"):
        operations.show(key)
    with pytest.raises(OperationRefused, match="no such order"):
        operations.decide(key, Verdict.ABANDON, reason="why")
    with pytest.raises(OperationRefused, match="--after"):
        operations.list_orders(Filters(after=f"2026-01-01/{key}\xe9"))
    letters = from_quarantine(empty.engine, Selection(key=key), "type", Report())
    assert list(letters) == []


def test_unknown_key_is_refused(operations: Operations) -> None:
    with pytest.raises(OperationRefused, match="no such order"):
        operations.show("app:nobody")
    with pytest.raises(OperationRefused, match="no such order"):
        decide(operations, "app:nobody")


def test_stats_count_by_status_and_by_held_subscriber(
    operations: Operations, empty: Database
) -> None:
    for number in range(12):
        for order_number in range(number + 1):
            put(
                empty,
                f"app:{number}-{order_number}",
                Status.HELD,
                msisdn=f"+10000{number:02}",
                age_s=100 + number,
            )
    put(empty, "app:p", Status.PARKED, msisdn="+1999999", age_s=500)
    put_in_quarantine(empty, age_s=50)
    operations.pause("app", "fraud")

    found = operations.stats()

    assert [(row.name, row.count) for row in found.statuses] == [
        ("parked", 1),
        ("held", 78),
    ]
    assert 490 < found.statuses[0].oldest_age_s < 600
    assert len(found.held) == 10
    assert (found.held[0].name, found.held[0].count) == ("+1000011", 12)
    assert [(row.name, row.count) for row in found.quarantine] == [("invalid", 1)]
    assert [(row.scope, row.reason) for row in found.pauses] == [("app", "fraud")]


# -- Decide -------------------------------------------------------------------------

_TO: Final = {
    (Verdict.EXECUTED, Status.PARKED): Status.SUCCEEDED,
    (Verdict.EXECUTED, Status.IN_DOUBT): Status.SUCCEEDED,
    (Verdict.EXECUTED, Status.HELD): Status.SUCCEEDED,
    (Verdict.EXECUTED, Status.RELEASED): Status.SUCCEEDED,
    (Verdict.NOT_EXECUTED, Status.PARKED): Status.HELD,
    (Verdict.NOT_EXECUTED, Status.IN_DOUBT): Status.HELD,
    (Verdict.ABANDON, Status.PARKED): Status.ABANDONED,
    (Verdict.ABANDON, Status.IN_DOUBT): Status.ABANDONED,
    (Verdict.ABANDON, Status.HELD): Status.ABANDONED,
    (Verdict.ABANDON, Status.RELEASED): Status.ABANDONED,
    # Where the API never says how it ended.
    (Verdict.EXECUTED, Status.ACCEPTED): Status.SUCCEEDED,
    (Verdict.ABANDON, Status.ACCEPTED): Status.ABANDONED,
}


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("verdict", Verdict)
def test_decision_is_carried_out_or_refused_by_the_model(
    operations: Operations, empty: Database, verdict: Verdict, status: Status
) -> None:
    put(empty, "app:r1", status)
    if status is Status.ACCEPTED:
        empty.execute("UPDATE topup SET reason = 'accepted_overdue'")
    before = empty.row("app:r1")
    to = _TO.get((verdict, status))
    if to is None:
        with pytest.raises(OperationRefused, match=status.value):
            decide(operations, verdict=verdict)
        assert empty.row("app:r1") == before
        assert empty.rows("decision") == []
        return

    decide(operations, verdict=verdict)

    row = empty.row("app:r1")
    assert row["status"] == to
    assert row["token"] == before["token"]
    assert row["place"] == before["place"]
    assert row["reference"] == ("R-1" if verdict is Verdict.EXECUTED else None)
    (decision,) = empty.rows("decision")
    assert decision["token"] == "t1"
    assert decision["from_status"] == status
    assert decision["verdict"] == verdict
    steps = (
        {to}
        if (verdict, status) != (Verdict.NOT_EXECUTED, Status.IN_DOUBT)
        else {Status.PARKED}
    )
    assert steps <= TRANSITIONS[status]


def test_not_executed_ends_the_doubt_so_that_the_next_attempt_is_judged_by_itself(
    operations: Operations, empty: Database
) -> None:
    """Else a definite no to it would be parked again, for ever."""
    put(empty, "app:r1", Status.PARKED, doubts=3)

    decide(operations)

    assert empty.row("app:r1")["doubts"] == 0


def test_running_lease_is_refused(operations: Operations, empty: Database) -> None:
    put(empty, "app:r1", Status.PARKED, lease_s=30)

    with pytest.raises(OperationRefused, match="lease"):
        decide(operations, verdict=Verdict.EXECUTED)
    assert empty.rows("decision") == []


@pytest.mark.parametrize("verdict", Verdict)
def test_attempt_that_can_still_land_is_refused(
    operations: Operations, empty: Database, verdict: Verdict
) -> None:
    put(empty, "app:r1", Status.IN_DOUBT, sent_age_s=60)

    with pytest.raises(OperationRefused, match="settling time of 120 s"):
        decide(operations, verdict=verdict)
    bind(empty, settle_s=30)
    decide(operations, verdict=verdict)


@pytest.mark.parametrize("verdict", [Verdict.EXECUTED, Verdict.ABANDON])
def test_accepted_order_that_may_still_be_finished_is_nobodys_case(
    operations: Operations, empty: Database, verdict: Verdict
) -> None:
    put(empty, "app:r1", Status.ACCEPTED)

    with pytest.raises(OperationRefused, match="RECHARGE_API_ACCEPTED_MAX_S"):
        decide(operations, verdict=verdict)

    assert empty.row("app:r1")["status"] == "accepted"


def test_ledger_without_rules_takes_no_decision(database: Database) -> None:
    put(database, "app:r1", Status.PARKED)

    with pytest.raises(OperationRefused, match="topup migrate"):
        decide(Operations(database.engine))

    assert database.row("app:r1")["status"] == "parked"


def test_rule_that_is_set_again_keeps_who_set_it_and_when(database: Database) -> None:
    bind(database, settle_s=3.5, limit=7)
    before = database.rows("decision_rule")

    bind(database, settle_s=3.5, limit=7)
    assert database.rows("decision_rule") == before
    bind(database, settle_s=4, limit=7)

    rules = {row["name"]: row["value"] for row in database.rows("decision_rule")}
    assert rules == {"settle_s": 4, "second_person_above_minor": 7}


def test_order_that_was_never_sent_can_be_abandoned(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:r1", Status.HELD, token=None)

    decide(operations, verdict=Verdict.ABANDON)

    assert empty.row("app:r1")["status"] == "abandoned"
    assert empty.rows("decision")[0]["token"] == ""


def test_decision_about_an_earlier_attempt_is_refused(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:r1", Status.PARKED, token="abcdef")

    with pytest.raises(OperationRefused, match="another attempt"):
        decide(operations, attempt_token="0123")
    decide(operations, attempt_token="abc")


def test_row_that_changes_between_look_and_decision_is_left_alone(
    operations: Operations, empty: Database
) -> None:
    put(empty, "app:r1", Status.IN_DOUBT)

    changed: list[str] = []

    def change(
        _connection: object, _cursor: object, statement: str, *_: object
    ) -> None:
        if statement.startswith("BEGIN") and not changed:
            changed.append(statement)
            empty.execute("UPDATE topup SET token = 't2', status = 'in_flight'")

    event.listen(empty.engine, "before_cursor_execute", change)

    with pytest.raises(OperationRefused, match="changed meanwhile"):
        decide(operations)

    assert empty.row("app:r1")["status"] == "in_flight"
    assert empty.rows("decision") == []


@pytest.mark.parametrize(
    ("verdict", "more", "message"),
    [
        (Verdict.EXECUTED, {"reference": None}, "--reference is missing"),
        (Verdict.EXECUTED, {"reference": " "}, "--reference is missing"),
        (Verdict.ABANDON, {"reference": "R-1"}, "only"),
        (Verdict.ABANDON, {"reason": ""}, "--reason is missing"),
        (Verdict.ABANDON, {"reason": "x" * 501}, "longer"),
        (Verdict.ABANDON, {"note": "x" * 201}, "longer"),
    ],
)
def test_decision_without_its_words_is_refused(
    operations: Operations,
    empty: Database,
    verdict: Verdict,
    more: dict[str, object],
    message: str,
) -> None:
    put(empty, "app:r1", Status.PARKED)

    with pytest.raises(OperationRefused, match=message):
        decide(operations, verdict=verdict, **more)  # type: ignore[arg-type]
    assert empty.rows("decision") == []


def test_second_person_cannot_be_proven_on_sqlite(sqlite_database: Database) -> None:
    put(sqlite_database, "app:r1", Status.PARKED, amount_minor=LIMIT + 1)
    operations = Operations(sqlite_database.engine)

    bind(sqlite_database, limit=LIMIT)
    with pytest.raises(OperationRefused, match="SQLite knows no accounts"):
        decide(operations)

    bind(sqlite_database, limit=LIMIT + 1)
    decide(operations)
    assert sqlite_database.rows("decision")[0]["decided_by"] == "unproven"


# -- Release ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status.HELD, Status.RELEASED])
def test_release_drains_a_line_whose_first_may_run(
    operations: Operations, empty: Database, status: Status
) -> None:
    put(empty, "app:r1", status, place_age_s=20)
    put(empty, "app:r2", Status.HELD, place_age_s=10)
    asked: list[str] = []

    def drain(subscriber: str) -> int:
        asked.append(subscriber)
        return 2

    released = operations.release(SUBSCRIBER, drain)

    assert asked == [SUBSCRIBER]
    assert [row.idempotency_key for row in released.line] == ["app:r1", "app:r2"]
    assert released.drained == 2


@pytest.mark.parametrize("status", [Status.PARKED, Status.IN_DOUBT, Status.IN_FLIGHT])
def test_release_names_what_must_be_settled_before(
    operations: Operations, empty: Database, status: Status
) -> None:
    put(empty, "app:r1", status, place_age_s=20)
    put(empty, "app:r2", Status.HELD, place_age_s=10)

    with pytest.raises(OperationRefused, match=f"app:r1 is {status}"):
        operations.release(SUBSCRIBER, lambda _: pytest.fail("nothing may run"))


def test_release_of_a_line_of_nobody_does_nothing(operations: Operations) -> None:
    released = operations.release(SUBSCRIBER, lambda _: pytest.fail("nothing to run"))

    assert released.drained == 0


# -- Pause --------------------------------------------------------------------------


def ledger_of(engine: Engine) -> Ledger:
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    return Ledger(engine, profile, lease_s=30)


def test_pause_stops_claims_until_resumed_and_both_are_logged(
    operations: Operations, empty: Database
) -> None:
    ledger = ledger_of(empty.engine)
    paused = operations.pause(EVERYTHING, "the API doubles")
    assert paused.reason == "the API doubles"
    assert ledger.claim(order()) is None

    with pytest.raises(OperationRefused, match="paused already"):
        operations.pause(EVERYTHING, "again")
    operations.resume(EVERYTHING, "mended")
    with pytest.raises(OperationRefused, match="not paused"):
        operations.resume(EVERYTHING, "mended")

    assert ledger.claim(order()) is not None
    log = [
        (row["scope"], row["action"], row["reason"]) for row in empty.rows("pause_log")
    ]
    assert log == [("*", "pause", "the API doubles"), ("*", "resume", "mended")]


def test_pause_of_one_channel_leaves_the_others(
    operations: Operations, empty: Database
) -> None:
    operations.pause("shop", "fraud")

    ledger = ledger_of(empty.engine)
    assert ledger.claim(order("r1", channel="shop")) is None
    assert ledger.claim(order("r1", channel="app")) is not None


# -- Purge and forget ---------------------------------------------------------------


def test_purge_younger_than_the_horizon_is_refused_with_the_arithmetic(
    retention: Retention, empty: Database
) -> None:
    put(empty, "app:r1", Status.SUCCEEDED, age_s=100 * DAY_S)

    with pytest.raises(OperationRefused, match=r"7 \+ 30 \+ 7 = 44 days"):
        retention.purge(44 * DAY_S - 1, HORIZON)

    assert len(empty.rows("topup")) == 1


@pytest.mark.parametrize("status", Status)
def test_purge_takes_old_rows_that_are_settled_for_good_alone(
    retention: Retention, empty: Database, status: Status
) -> None:
    put(empty, "app:old", status, age_s=50 * DAY_S)
    put(empty, "app:young", status, msisdn="+1000001", age_s=43 * DAY_S)
    for key in ("app:old", "app:young"):
        put_attempt(empty, key)

    dry = retention.purge(44 * DAY_S, HORIZON, is_dry_run=True)
    assert len(empty.rows("topup")) == 2
    purged = retention.purge(44 * DAY_S, HORIZON)

    is_gone = status in TERMINAL
    left = {row["idempotency_key"] for row in empty.rows("topup")}
    assert left == ({"app:young"} if is_gone else {"app:old", "app:young"})
    assert {row["idempotency_key"] for row in empty.rows("attempt")} == left
    assert dry.orders == purged.orders
    assert sum(purged.orders.values()) == purged.attempts == int(is_gone)


def test_purge_in_batches_takes_everything_and_keeps_decisions(
    operations: Operations, retention: Retention, empty: Database
) -> None:
    for number in range(23):
        put(empty, f"app:r{number}", Status.SUCCEEDED, age_s=50 * DAY_S)
        put_in_quarantine(empty, age_s=50 * DAY_S)
    empty.execute("UPDATE topup SET updated_at = :at", at=ago(50 * DAY_S))
    put(empty, "app:p", Status.PARKED, msisdn="+1000001", age_s=50 * DAY_S)
    put_in_quarantine(empty)
    decide(operations, "app:p", Verdict.ABANDON)

    purged = retention.purge(44 * DAY_S, HORIZON, batch=5)

    assert purged.orders == {"abandoned": 0, "rejected": 0, "succeeded": 23}
    assert purged.quarantined == 23
    assert [row["idempotency_key"] for row in empty.rows("topup")] == ["app:p"]
    assert len(empty.rows("quarantine")) == 1
    assert len(empty.rows("decision")) == 1


def test_record_whose_place_is_kept_is_not_purged(
    retention: Retention, empty: Database
) -> None:
    """Nobody has decided about it: it may be a good order."""
    put(empty, "!recharge.orders:0:1", Status.PARKED, age_s=50 * DAY_S)
    put_in_quarantine(empty, key="!recharge.orders:0:1", age_s=50 * DAY_S)

    assert retention.purge(44 * DAY_S, HORIZON).quarantined == 0
    empty.execute("UPDATE topup SET status = 'abandoned'")
    assert retention.purge(44 * DAY_S, HORIZON).quarantined == 1


def test_old_sightings_are_purged(retention: Retention, empty: Database) -> None:
    ledger = ledger_of(empty.engine)
    for name in ("a" * 64, "b" * 64):
        ledger.see(name)
    empty.execute(
        "UPDATE sighting SET first_seen_at = :at WHERE name = :name",
        at=ago(50 * DAY_S),
        name="a" * 64,
    )

    retention.purge(44 * DAY_S, HORIZON, is_dry_run=True)
    assert len(empty.rows("sighting")) == 2
    retention.purge(44 * DAY_S, HORIZON)
    assert [row["name"] for row in empty.rows("sighting")] == ["b" * 64]


def test_order_whose_key_stands_in_quarantine_is_purged_with_that_record(
    retention: Retention, empty: Database
) -> None:
    """A replay of the record would else find the key unused, and execute it."""
    put(empty, "app:r1", Status.SUCCEEDED, age_s=50 * DAY_S)
    put_attempt(empty, "app:r1")
    put_in_quarantine(empty, key="app:r1", age_s=43 * DAY_S, outcome="key_reused")

    dry = retention.purge(44 * DAY_S, HORIZON, is_dry_run=True)
    purged = retention.purge(44 * DAY_S, HORIZON)

    assert dry.orders == purged.orders
    assert sum(purged.orders.values()) == purged.attempts == 0
    assert len(empty.rows("topup")) == len(empty.rows("attempt")) == 1

    empty.execute("UPDATE quarantine SET recorded_at = :at", at=ago(45 * DAY_S))
    purged = retention.purge(44 * DAY_S, HORIZON)
    assert (purged.quarantined, sum(purged.orders.values())) == (1, 1)
    assert empty.rows("topup") == empty.rows("attempt") == []


def test_payloads_of_settled_orders_are_emptied_and_the_rows_stay(
    retention: Retention, empty: Database
) -> None:
    for number, status in enumerate(Status):
        put(empty, f"app:{status}", status, msisdn=f"+100000{number}", age_s=DAY_S)
    put(empty, "app:young", Status.SUCCEEDED, age_s=10)
    before = {row["idempotency_key"]: row["updated_at"] for row in empty.rows("topup")}

    assert retention.blank_payloads(3600, batch=1, is_dry_run=True) == 3
    assert retention.blank_payloads(3600, batch=1) == 3
    assert retention.blank_payloads(3600) == 0

    rows = empty.rows("topup")
    emptied = {row["idempotency_key"] for row in rows if row["payload"] == b""}
    assert emptied == {f"app:{status}" for status in TERMINAL}
    assert {row["idempotency_key"]: row["updated_at"] for row in rows} == before


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(secrets.token_hex(32))
    return path


def test_forgotten_number_is_nowhere_and_a_redelivery_is_still_known(
    retention: Retention, empty: Database, key_file: Path
) -> None:
    ledger = ledger_of(empty.engine)
    topup = order(msisdn=SUBSCRIBER)
    claim = ledger.claim(topup)
    assert claim
    assert ledger.settle(
        topup.idempotency_key, claim.token, Answer(AnswerClass.DONE, reference="R-1")
    )
    put_attempt(empty, topup.idempotency_key, f"no such number {SUBSCRIBER}")
    raw = f'{{"msisdn": "{SUBSCRIBER}"}}'.encode()
    put_in_quarantine(empty, raw, key=topup.idempotency_key)
    put_in_quarantine(empty, raw)
    put_in_quarantine(empty, b'{"msisdn": "+1000001"}')

    forgotten = retention.forget(SUBSCRIBER, key_file)

    assert (forgotten.orders, forgotten.quarantined) == (1, 2)
    assert len(forgotten.pseudonym) == 16
    assert forgotten.pseudonym.startswith("~")
    everything = "".join(
        str(empty.rows(table)) for table in ("topup", "attempt", "quarantine")
    )
    assert SUBSCRIBER not in everything
    assert empty.row(topup.idempotency_key)["msisdn"] == forgotten.pseudonym
    entry, _ = ledger.look(topup)
    assert entry is not None
    assert entry.fingerprint == topup.fingerprint
    assert retention.forget(SUBSCRIBER, key_file).orders == 0
    # A later order of the number is a stranger.
    assert ledger.claim(order("later", msisdn=SUBSCRIBER)) is not None


@pytest.mark.parametrize("status", [s for s in Status if s not in TERMINAL])
def test_open_order_keeps_its_subscriber_from_being_forgotten(
    retention: Retention, empty: Database, key_file: Path, status: Status
) -> None:
    put(empty, "app:done", Status.SUCCEEDED)
    put(empty, "app:open", status)

    with pytest.raises(OperationRefused, match=f"app:open .* is {status}"):
        retention.forget(SUBSCRIBER, key_file)

    assert {row["msisdn"] for row in empty.rows("topup")} == {SUBSCRIBER}


def test_other_key_gives_another_pseudonym(
    retention: Retention, key_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))

    one = retention.forget(SUBSCRIBER, key_file).pseudonym
    assert one == retention.forget(SUBSCRIBER, key_file).pseudonym
    assert one != retention.forget(SUBSCRIBER, other).pseudonym


def test_short_key_and_odd_number_are_refused(
    retention: Retention, key_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.write_text("x" * 31)

    with pytest.raises(OperationRefused, match="31 bytes"):
        retention.forget(SUBSCRIBER, short)
    with pytest.raises(OperationRefused, match="--key-file"):
        retention.forget(SUBSCRIBER, tmp_path / "none")
    with pytest.raises(OperationRefused, match=r"E\.164"):
        retention.forget("0333 1234567", key_file)


# -- Roles, on a server that enforces them -------------------------------------------

Account = Callable[[str, str], Engine]


@pytest.fixture
def account(mariadb: MariaDb, mariadb_database: Database) -> Iterator[Account]:
    """Makes an account of a role and connects as it, over TLS."""
    for table in ("decision", "pause_log"):
        mariadb_database.execute(f"DELETE FROM {table}")  # noqa: S608
    engines: list[Engine] = []
    names: list[str] = []

    def make(role: str, name: str) -> Engine:
        name = f"{name}_{secrets.token_hex(4)}"
        password = secrets.token_urlsafe(16)
        mariadb.create_user(name, password, grants_of(role, "ledger"))
        names.append(name)
        env = mariadb_database.env | {
            "LEDGER_DATABASE_URL": mariadb.url("ledger", name, password)
        }
        engines.append(make_engine(settings_of(env)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        for name in names:
            cursor.execute(f"DROP USER `{name}`")


def whoami(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("SELECT CURRENT_USER()")))


def refusal(engine: Engine, statement: str) -> str:
    """The number with which the server refuses a statement."""
    with engine.connect() as connection, pytest.raises(DBAPIError) as refused:
        connection.exec_driver_sql(statement)
    return describe(refused.value).rpartition(" ")[2]


def test_decision_is_signed_by_the_account_and_by_nothing_typed(
    account: Account, mariadb_database: Database
) -> None:
    bind(mariadb_database)
    ann = account("operator", "ann")
    put(mariadb_database, "app:r1", Status.PARKED)

    decide(Operations(ann), note="bob, chief of everything")

    (decision,) = mariadb_database.rows("decision")
    assert decision["decided_by"] == whoami(ann)
    assert str(decision["decided_by"]).startswith("ann_")


def test_above_the_limit_two_persons_must_decide_the_same_about_the_same_attempt(
    account: Account, mariadb_database: Database
) -> None:
    bind(mariadb_database, limit=LIMIT)
    ann = Operations(account("operator", "ann"))
    bob = Operations(account("operator", "bob"))
    put(mariadb_database, "app:r1", Status.PARKED, amount_minor=LIMIT + 1)

    def status_after(who: Operations, **more: object) -> object:
        decide(who, **more)  # type: ignore[arg-type]
        return mariadb_database.row("app:r1")["status"]

    executed = Verdict.EXECUTED
    assert status_after(ann, verdict=executed, reference="R-1") == "parked"
    # The same person again, also under another note.
    assert status_after(ann, verdict=executed, reference="R-1", note="bob") == "parked"
    # Another verdict, another reference.
    assert status_after(bob, verdict=Verdict.ABANDON) == "parked"
    assert status_after(bob, verdict=executed, reference="R-2") == "parked"
    # About an earlier attempt.
    mariadb_database.execute("UPDATE topup SET token = 't2'")
    assert status_after(bob, verdict=executed, reference="R-1") == "parked"
    assert status_after(ann, verdict=executed, reference="R-1") == "succeeded"

    assert mariadb_database.row("app:r1")["reference"] == "R-1"
    assert len(mariadb_database.rows("decision")) == 6


def test_one_person_with_two_accounts_is_one_person(
    account: Account, mariadb_database: Database, mariadb: MariaDb
) -> None:
    bind(mariadb_database, limit=LIMIT)
    ann = account("operator", "ann")
    put(mariadb_database, "app:r1", Status.PARKED, amount_minor=LIMIT + 1)
    name = whoami(ann).partition("@")[0]
    with mariadb.root_connect("ledger") as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO decision (idempotency_key, token, from_status, verdict,"
            " reason, note, decided_by) VALUES ('app:r1', 't1', 'parked', 'abandon',"
            " 'x', '', %s)",
            (f"{name}@10.0.0.%",),
        )

    decide(Operations(ann), verdict=Verdict.ABANDON)

    assert mariadb_database.row("app:r1")["status"] == "parked"


def test_two_persons_at_the_same_moment_carry_it_out_once(
    account: Account, mariadb_database: Database
) -> None:
    bind(mariadb_database, limit=LIMIT)
    people = [Operations(account("operator", name)) for name in ("ann", "bob")]
    for number in range(30):
        put(
            mariadb_database,
            f"app:r{number}",
            Status.PARKED,
            msisdn=f"+10000{number:02}",
            amount_minor=LIMIT + 1,
        )

        def one(who: Operations, key: str = f"app:r{number}") -> object:
            return decide(who, key, Verdict.ABANDON)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, people))

        row = mariadb_database.row(f"app:r{number}")
        assert row["status"] == "abandoned"
    assert len(mariadb_database.rows("decision")) == 60


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE decision SET reason = 'x'",
        "DELETE FROM decision",
        "REPLACE INTO decision (id, idempotency_key) VALUES (1, 'x')",
        "INSERT INTO decision (idempotency_key, decided_by) VALUES ('k', 'bob')",
        "INSERT INTO decision (idempotency_key, decided_at) VALUES ('k', '2001-1-1')",
        "INSERT INTO decision (id, idempotency_key) VALUES (1, 'k')",
        "INSERT INTO decision VALUES (1, 'k', 't', 'p', 'a', '', 'r', '', 'b', NULL)",
        "TRUNCATE TABLE decision",
        "DROP TABLE decision",
        "UPDATE decision_rule SET value = 1000000000",
        "INSERT INTO decision_rule (name, value) VALUES ('settle_s', 0)",
        "REPLACE INTO decision_rule (name, value) VALUES ('settle_s', 0)",
        "DELETE FROM decision_rule",
        "UPDATE pause_log SET reason = 'x'",
        "DELETE FROM pause_log",
        "INSERT INTO pause (scope, reason, paused_by) VALUES ('*', 'r', 'bob')",
        "UPDATE pause SET reason = 'x'",
        "INSERT INTO pause_log (scope, switched_by) VALUES ('*', 'bob')",
        "DELETE FROM topup",
        "INSERT INTO topup (idempotency_key) VALUES ('x')",
        "UPDATE topup SET amount_minor = 1",
        "UPDATE topup SET msisdn = 'x'",
        "UPDATE topup SET token = 'x'",
        "UPDATE attempt SET words = ''",
        "DELETE FROM attempt",
        "INSERT INTO attempt (idempotency_key) VALUES ('x')",
        "DELETE FROM quarantine",
        "ALTER TABLE topup ADD COLUMN x INT",
        "UPDATE alembic_version SET version_num = '0'",
    ],
)
def test_server_refuses_an_operator_more_than_the_role(
    account: Account, statement: str
) -> None:
    assert refusal(account("operator", "ann"), statement) in {"1142", "1143"}


def test_operator_can_do_what_the_role_is_for(
    account: Account, mariadb_database: Database
) -> None:
    ann = Operations(account("operator", "ann"))
    bind(mariadb_database)
    put(mariadb_database, "app:r1", Status.IN_DOUBT)
    paused = ann.pause("app", "fraud")
    assert paused.paused_by.startswith("ann_")
    assert ann.stats().pauses == [paused]
    ann.resume("app", "mended")
    assert {row["switched_by"] for row in mariadb_database.rows("pause_log")} == {
        paused.paused_by
    }
    decide(ann)
    assert keys(ann, Filters()) == ["app:r1"]
    assert len(ann.show("app:r1").decisions) == 1


@pytest.mark.parametrize("role", ["function", "resolver"])
def test_function_records_and_settles_with_its_role(
    account: Account, mariadb_database: Database, role: str
) -> None:
    ledger = ledger_of(account(role, role))
    done = Answer(AnswerClass.DONE, reference="R-1")
    unknown = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
    not_sent = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")

    first = order("r1", offset=1)
    claim = ledger.claim(first)
    assert claim
    assert ledger.hold(order("r2", offset=2))
    assert ledger.give_back("app:r1", claim.token, not_sent)
    entry, _ = ledger.look(first)
    assert entry
    claim = ledger.reclaim(entry)
    assert claim
    assert ledger.doubt("app:r1", claim.token, unknown, is_parked=False)
    assert ledger.overtake(order("r3", offset=3))
    entry, _ = ledger.look(first)
    assert entry
    assert ledger.end_doubt(entry, done)
    refused = Refused(Outcome.INVALID, "why", b"{}", 2, {}, None)
    assert ledger.put_in_quarantine(refused)
    assert mariadb_database.row("app:r1")["status"] == "succeeded"


@pytest.mark.parametrize("role", ["function", "resolver"])
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM topup",
        "UPDATE topup SET msisdn = 'x'",
        "UPDATE topup SET amount_minor = 1",
        "UPDATE topup SET payload = ''",
        "UPDATE attempt SET words = ''",
        "DELETE FROM attempt",
        "UPDATE quarantine SET raw = ''",
        "DELETE FROM quarantine",
        "INSERT INTO decision (idempotency_key) VALUES ('x')",
        "INSERT INTO pause (scope) VALUES ('x')",
        "DELETE FROM pause",
        "ALTER TABLE topup ADD COLUMN x INT",
        "DROP TABLE topup",
    ],
)
def test_server_refuses_the_function_more_than_the_role(
    account: Account, role: str, statement: str
) -> None:
    assert refusal(account(role, role), statement) in {"1142", "1143"}


def test_purge_can_do_what_the_role_is_for(
    account: Account, mariadb_database: Database, key_file: Path
) -> None:
    purge = Retention(account("purge", "purge"))
    put(mariadb_database, "app:old", Status.SUCCEEDED, age_s=50 * DAY_S)
    put(mariadb_database, "app:young", Status.SUCCEEDED)
    put_attempt(mariadb_database, "app:old")
    put_in_quarantine(mariadb_database, age_s=50 * DAY_S)

    assert purge.blank_payloads(3600) >= 1
    purged = purge.purge(44 * DAY_S, HORIZON)
    assert (purged.orders["succeeded"], purged.attempts, purged.quarantined) == (
        1,
        1,
        1,
    )
    assert purge.forget(SUBSCRIBER, key_file).orders == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE topup SET status = 'succeeded'",
        "INSERT INTO topup (idempotency_key) VALUES ('x')",
        "SELECT * FROM decision",
        "DELETE FROM decision",
        "DELETE FROM pause",
        "INSERT INTO attempt (idempotency_key) VALUES ('x')",
        "ALTER TABLE topup ADD COLUMN x INT",
    ],
)
def test_server_refuses_purge_more_than_the_role(
    account: Account, statement: str
) -> None:
    assert refusal(account("purge", "purge"), statement) in {"1142", "1143"}


def test_migration_needs_no_more_than_its_role(mariadb: MariaDb) -> None:
    name = f"mig_{secrets.token_hex(4)}"
    mariadb.create_database(name)
    password = secrets.token_urlsafe(16)
    mariadb.create_user(f"{name}_m", password, grants_of("migrate", name))
    env = {
        "LEDGER_DATABASE_URL": mariadb.url(name, f"{name}_m", password),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
    }
    engine = make_engine(settings_of(env))
    try:
        assert migrate(engine) == SCHEMA_REVISION
        # `_` in the name is no wildcard for another database.
        assert refusal(engine, "SELECT * FROM ledger.topup") == "1142"
    finally:
        engine.dispose()


def test_migration_that_was_cut_is_finished_by_the_next_run(mariadb: MariaDb) -> None:
    name = f"cut_{secrets.token_hex(4)}"
    env = {
        "LEDGER_DATABASE_URL": mariadb.create_database(name),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
    }
    engine = make_engine(settings_of(env))
    try:
        migrate(engine)
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "UPDATE alembic_version SET version_num = '0001'"
            )
            connection.exec_driver_sql("DROP TABLE pause_log")
            connection.exec_driver_sql(
                "ALTER TABLE quarantine DROP INDEX quarantined_at"
            )

        assert migrate(engine) == SCHEMA_REVISION

        assert Operations(engine).pause("app", "why").paused_by == f"{name}@%"
    finally:
        engine.dispose()


def test_operator_of_no_rights_is_unavailable_and_nothing_is_done(
    account: Account, mariadb_database: Database
) -> None:
    put(mariadb_database, "app:r1", Status.PARKED)
    purge = Operations(account("purge", "purge"))

    with pytest.raises(LedgerUnavailable, match="114"):
        decide(purge)

    assert mariadb_database.row("app:r1")["status"] == "parked"


def test_grants_are_text_that_the_server_takes_as_it_is(
    mariadb: MariaDb, mariadb_database: Database
) -> None:
    name = f"op_{secrets.token_hex(4)}"
    accounts = {role: [f"{role}_{name}"] for role in ROLES} | {"operator": [name]}
    sql = script("ledger", accounts)
    lines = [line for line in sql.splitlines() if line and not line.startswith("--")]

    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        for _ in range(2):
            for line in lines:
                cursor.execute(line)
        cursor.execute(f"SHOW CREATE USER `{name}`")
        (made,) = cursor.fetchone() or ("",)
        for names in accounts.values():
            cursor.execute(f"DROP USER `{names[0]}`")

    assert "REQUIRE SSL" in made
    assert "ACCOUNT LOCK" in made
    assert mariadb_database.is_mariadb


@pytest.mark.parametrize("name", ["a`b", "a b", "", "a;b", "a.b"])
def test_grants_for_a_name_that_is_not_plain_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="--database"):
        script(name, {})
    with pytest.raises(SettingsError, match="--operator"):
        script("ledger", {"operator": [name.replace(".", " ") or " "]})


def test_earlier_revisions_code_runs_on_beside_the_new_schema(
    mariadb_database: Database,
) -> None:
    """What 0001's statements name is still there and takes what they give."""
    mariadb_database.execute(
        "INSERT INTO pause VALUES ('*', 'who', 'why', '2026-01-01 00:00:00')"
    )
    assert Operations(mariadb_database.engine).pauses()[0].paused_by == "who"
    put(mariadb_database, "app:r1", Status.HELD)
    assert mariadb_database.row("app:r1")["looked_at"] is None


def test_horizon_is_the_sum_of_the_settings() -> None:
    settings = replace(
        settings_of({"LEDGER_DATABASE_URL": "sqlite://"}),
        topic_retention_s=1.0,
        dead_letter_retention_s=2.0,
        replay_horizon_s=4.0,
    )

    assert Horizon.of(settings).total_s == 7
