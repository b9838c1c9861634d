"""A ledger of 1,000,000 orders on MariaDB: which index each statement walks.

The statements are taken from the code as it runs, not written again here: what the
engine is given is explained by the server.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, event

from demo.mariadb import MariaDb
from function.api_profile import load_profile
from function.database import make_engine
from function.ledger import Ledger
from function.migrate import migrate
from function.model import Answer, AnswerClass, Status, Stored
from function.operations import Filters, Operations, Verdict
from function.retention import Horizon, Retention
from function.rules import Rules
from tests.conftest import settings_of
from tests.orders import order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS: Final = 1_000_000
DAY_S: Final = 86_400.0
HORIZON: Final = Horizon(7 * DAY_S, 30 * DAY_S, 7 * DAY_S)
#: What a person at a terminal waits for; the statements take far less.
PATIENCE_S: Final = 10.0

# One subscriber in 20 orders; 99.9 % are settled, over the last 100 days.
_FILL: Final = f"""
INSERT INTO topup (idempotency_key, fingerprint, status, msisdn, channel, amount_minor,
    currency, payload, place, created_at, updated_at, token, lease_until, rendered_key,
    first_sent_at, sent_at, attempts, doubts, reason)
SELECT CONCAT(ELT(1 + seq % 4, 'app', 'shop', 'web', 'ussd'), ':r',
        LPAD(seq, 7, '0')),
    REPEAT('f', 64),
    CASE WHEN seq % 1000 = 1 THEN 'held' WHEN seq % 10000 = 2 THEN 'parked'
        WHEN seq % 10000 = 3 THEN 'in_doubt' WHEN seq % 50 = 4 THEN 'rejected'
        WHEN seq % 1000 = 5 THEN 'abandoned' ELSE 'succeeded' END,
    CONCAT('+3933', LPAD(seq DIV 20, 8, '0')),
    ELT(1 + seq % 4, 'app', 'shop', 'web', 'ussd'), 1000, 'EUR',
    REPEAT('x', 120),
    t, t, t, MD5(seq), t, CONCAT('k', seq), t, t, 1, 0, ''
FROM (SELECT seq, UTC_TIMESTAMP(6) - INTERVAL ({ROWS} - seq) * 100 / {ROWS} * 86400
        SECOND AS t FROM seq_1_to_{ROWS}) AS numbers
"""  # noqa: S608


@pytest.fixture(scope="module")
def engine(mariadb: MariaDb) -> Iterator[Engine]:
    """A migrated database of its own, full."""
    name = f"million_{secrets.token_hex(4)}"
    env = {
        "LEDGER_DATABASE_URL": mariadb.create_database(name),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
        "LEDGER_TIMEOUT_S": "60",
    }
    engine = make_engine(settings_of(env))
    migrate(engine, Rules(settle_s=120, second_person_above_minor=10**9))
    with mariadb.root_connect(name) as connection, connection.cursor() as cursor:
        cursor.execute(_FILL)
        cursor.execute(
            "INSERT INTO attempt (idempotency_key, token, recorded_at, classified,"
            " is_sent, reason, words) SELECT idempotency_key, token, updated_at,"
            " 'unknown', 1, 'read_timeout', '' FROM topup WHERE status <> 'succeeded'"
        )
        cursor.execute("ANALYZE TABLE topup, attempt")
        cursor.fetchall()
    yield engine
    engine.dispose()
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE `{name}`")


@pytest.fixture
def operations(engine: Engine) -> Operations:
    return Operations(engine)


@pytest.fixture
def retention(engine: Engine) -> Retention:
    return Retention(engine)


@contextmanager
def watched(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Every statement that the engine is given meanwhile."""
    seen: list[tuple[str, Any]] = []

    def note(
        _connection: object, _cursor: object, statement: str, values: Any, *_: object
    ) -> None:
        seen.append((statement, values))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def plans(engine: Engine, act: Callable[[], object]) -> list[dict[str, Any]]:
    """How the server walks `topup` in each statement of an act, which is quick."""
    started = time.monotonic()
    with watched(engine) as statements:
        act()
    assert time.monotonic() - started < PATIENCE_S
    found = []
    with engine.connect() as connection:
        for statement, values in statements:
            if not statement.startswith(("SELECT", "INSERT", "UPDATE", "DELETE")):
                continue
            rows = connection.exec_driver_sql(f"EXPLAIN {statement}", values)
            found += [
                dict(row) | {"statement": statement}
                for row in rows.mappings()
                if row["table"] in {"topup", "earlier", "me", "other", "success"}
            ]
    assert found
    return found


def indexes(engine: Engine, act: Callable[[], object]) -> set[str]:
    """The indexes by which `topup` is read; a scan of the table fails here."""
    used = set()
    for plan in plans(engine, act):
        assert plan["type"] not in {"ALL", "index"}, plan
        used.add(plan["key"])
    return used


def test_fill_is_what_it_says(engine: Engine) -> None:
    with engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT COUNT(*) FROM topup").scalar()

    assert count == ROWS


def test_stats_walk_one_index_and_never_the_table(
    engine: Engine, operations: Operations
) -> None:
    for plan in plans(engine, operations.stats):
        assert plan["key"] == "by_status", plan
        # Counting all is a walk over all: over the index alone.
        if plan["type"] == "index":
            assert "Using index" in plan["Extra"], plan
        else:
            assert plan["type"] in {"ref", "range"}, plan

    found = {row.name: row.count for row in operations.stats().statuses}
    assert sum(found.values()) == ROWS


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(statuses=(Status.SUCCEEDED,)),
        Filters(statuses=(Status.HELD, Status.PARKED), older_than_s=3600),
        Filters(older_than_s=50 * DAY_S),
        Filters(channel="shop"),
        Filters(channel="nobody"),
        Filters(channel="nobody", statuses=(Status.SUCCEEDED,)),
    ],
    ids=str,
)
def test_list_walks_by_status_for_any_filter(
    engine: Engine, operations: Operations, filters: Filters
) -> None:
    assert indexes(engine, lambda: operations.list_orders(filters)) == {"by_status"}


def test_page_far_behind_is_as_fast_as_the_first(
    engine: Engine, operations: Operations
) -> None:
    middle = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=50)
    filters = Filters(after=f"{middle}/app:r0500000")

    assert indexes(engine, lambda: operations.list_orders(filters)) == {"by_status"}

    (first, *_) = operations.list_orders(filters).orders
    assert abs(first.updated_at - middle) < timedelta(minutes=1)


def test_list_of_a_subscriber_walks_its_line(
    engine: Engine, operations: Operations
) -> None:
    filters = Filters(subscriber="+393300012345")

    used = indexes(engine, lambda: operations.list_orders(filters))

    assert used <= {"line", "one_in_flight_a_subscriber"}
    assert len(operations.list_orders(filters).orders) == 20


def test_one_order_is_shown_by_its_key_and_its_line(
    engine: Engine, operations: Operations
) -> None:
    used = indexes(engine, lambda: operations.show("shop:r0500001"))

    assert "PRIMARY" in used
    assert used <= {"PRIMARY", "line", "one_in_flight_a_subscriber"}


def test_decision_touches_one_row(engine: Engine, operations: Operations) -> None:
    (parked,) = operations.list_orders(
        Filters(statuses=(Status.PARKED,), limit=1)
    ).orders

    used = indexes(
        engine,
        lambda: operations.decide(
            parked.idempotency_key,
            Verdict.ABANDON,
            reason="test",
        ),
    )

    assert used == {"PRIMARY"}


def test_claim_and_what_follows_read_a_handful_of_rows(engine: Engine) -> None:
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    ledger = Ledger(engine, profile, lease_s=30)

    def process() -> None:
        topup = order("new", msisdn="+393300012346")
        claim = ledger.claim(topup)
        assert claim
        ledger.look(topup)
        assert ledger.settle(
            topup.idempotency_key, claim.token, Answer(AnswerClass.DONE, reference="R")
        )

    for plan in plans(engine, process):
        statement = plan["statement"]
        if plan["table"] == "topup" and statement.startswith("INSERT"):
            continue  # Where it goes, not what is read.
        assert plan["type"] not in {"ALL", "index"}, plan
        # `have others succeeded` stops at the first that it meets.
        if plan["table"] != "other":
            assert int(plan["rows"]) <= 50, plan
        assert plan["key"] in {
            "PRIMARY",
            "line",
            "one_in_flight_a_subscriber",
            "by_status",
        }


def test_resolver_finds_what_is_due_without_the_settled(engine: Engine) -> None:
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    ledger = Ledger(engine, profile, lease_s=30)
    due: list[Stored] = []

    def round_() -> None:
        due.extend(
            ledger.due(given_up_s=900, again_s=10, is_parked_due=True, limit=200)
        )
        assert ledger.accepted(again_s=10, watch_s=0, limit=200) == []

    for plan in plans(engine, round_):
        assert plan["type"] not in {"ALL", "index"}, plan
        assert plan["key"] in {"by_status", "line", "one_in_flight_a_subscriber"}, plan
        # What is open, not what is settled.
        assert int(plan["rows"]) <= ROWS // 100, plan
    assert len(due) == 200


def test_purge_walks_by_status_and_deletes_by_key(
    engine: Engine, retention: Retention
) -> None:
    dry = retention.purge(99 * DAY_S, HORIZON, is_dry_run=True)
    assert 5_000 < sum(dry.orders.values()) < 15_000

    used = indexes(engine, lambda: retention.purge(99 * DAY_S, HORIZON, batch=1000))

    assert {"by_status", "PRIMARY"} <= used
    assert used <= {"by_status", "PRIMARY", "quarantined_by_key", "quarantined_at"}
    left = retention.purge(99 * DAY_S, HORIZON, is_dry_run=True)
    assert sum(left.orders.values()) < sum(dry.orders.values()) / 100


def test_emptying_payloads_walks_by_status_and_writes_by_key(
    engine: Engine, retention: Retention
) -> None:
    used = indexes(engine, lambda: retention.blank_payloads(98 * DAY_S, batch=1000))

    assert used == {"by_status", "PRIMARY"}
