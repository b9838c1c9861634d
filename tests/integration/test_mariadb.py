"""What only a real server shows: round trips, races, lost connections, TLS."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pymysql
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from demo.mariadb import MariaDb
from function.api_profile import load_profile
from function.database import connected, make_engine, transaction
from function.errors import ClaimUncertain, LedgerUnavailable, SettingsError
from function.events import read_topup
from function.ledger import Ledger
from function.migrate import SCHEMA_REVISION, migrate, require_migrated
from function.model import Answer, AnswerClass, Outcome, TopUp
from function.processing import Processing
from tests.conftest import Database, settings_of
from tests.integration.test_processing import ScriptedApi
from tests.orders import data, headers, order

DONE = Answer(AnswerClass.DONE, http_status=201, reference="R-1")
UNKNOWN = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
ROUNDS = 300


@pytest.fixture
def ledger(mariadb_database: Database) -> Ledger:
    return make_ledger(mariadb_database)


def test_blank_at_the_end_makes_no_two_orders_one(
    mariadb_database: Database, ledger: Ledger
) -> None:
    """The server pads keys with blanks when it compares; a key can't end in one."""
    with mariadb_database.engine.connect() as connection:
        for charset in ("ascii", "utf8mb4"):
            assert (
                connection.exec_driver_sql(
                    f"SELECT CONVERT('x' USING {charset}) COLLATE {charset}_bin = 'x '"
                ).scalar_one()
                == 1
            )

    keys = set()
    for channel, name in (("app", "r"), ("app", "r "), ("app ", "r"), ("app ", "r ")):
        body = json.dumps(data(name, channel)).encode()
        topup = read_topup(headers(), body, "com.example.topup.requested.v1")
        assert topup.idempotency_key.strip() == topup.idempotency_key
        keys.add(topup.idempotency_key)
        claim = ledger.claim(topup)
        assert claim
        assert ledger.settle(topup.idempotency_key, claim.token, DONE)

    assert {row["idempotency_key"] for row in mariadb_database.rows("topup")} == keys
    assert len(keys) == 4


def make_ledger(database: Database) -> Ledger:
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    return Ledger(database.engine, profile, lease_s=30)


@pytest.fixture
def count(mariadb: MariaDb) -> Iterator[Callable[[], int]]:
    """How many statements the server has been asked, from a connection of its own.

    The server counts what SQLAlchemy's events don't see: ROLLBACK, SET, pings.
    """
    with mariadb.root_connect() as connection, connection.cursor() as cursor:

        def questions() -> int:
            cursor.execute("SHOW GLOBAL STATUS LIKE 'Questions'")
            row = cursor.fetchone()
            assert row is not None
            return int(row[1])

        yield questions


def round_trips(count: Callable[[], int], act: Callable[[], object]) -> int:
    before = count()
    act()
    return count() - before - 1


def processing(ledger: Ledger, *answers: Answer) -> Processing:
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    api = ScriptedApi(list(answers))
    return Processing(ledger, api, profile, deadline_s=15, lease_s=30)


def test_happy_path_makes_two_round_trips(
    ledger: Ledger, count: Callable[[], int]
) -> None:
    warm = processing(ledger, DONE, DONE)
    warm.process(order("warm"))

    assert round_trips(count, lambda: warm.process(order("r1"))) == 2


def test_repetition_makes_at_most_two_round_trips(
    ledger: Ledger, count: Callable[[], int]
) -> None:
    warm = processing(ledger, DONE)
    warm.process(order("r1"))

    assert round_trips(count, lambda: warm.process(order("r1"))) == 2


def test_nothing_is_held_while_the_api_is_called(
    ledger: Ledger, mariadb: MariaDb, mariadb_database: Database
) -> None:
    seen: list[tuple[int, int, int]] = []

    class WatchingApi(ScriptedApi):
        def recharge(self, *args: object) -> Answer:
            pool = mariadb_database.engine.pool
            with mariadb.root_connect() as connection, connection.cursor() as cursor:
                cursor.execute("SELECT COUNT(*) FROM information_schema.innodb_trx")
                (transactions,) = cursor.fetchone() or (None,)
                assert isinstance(transactions, int)
                cursor.execute(
                    "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
                )
                waits = int((cursor.fetchone() or ("", "0"))[1])
            seen.append((transactions, waits, pool.checkedout()))  # type: ignore[attr-defined]
            return super().recharge(*args)  # type: ignore[arg-type]

    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    Processing(ledger, WatchingApi([DONE]), profile, deadline_s=15, lease_s=30).process(
        order()
    )

    assert seen == [(0, 0, 0)]


T = TypeVar("T")


def race(*contenders: Callable[[], T]) -> list[T]:
    """Let all begin at the same moment, each in a thread of its own."""
    gate = threading.Barrier(len(contenders))

    def run(contender: Callable[[], T]) -> T:
        gate.wait()
        return contender()

    with ThreadPoolExecutor(len(contenders)) as pool:
        return list(pool.map(run, contenders))


def test_one_key_has_exactly_one_winner(mariadb_database: Database) -> None:
    ledgers = [make_ledger(mariadb_database) for _ in range(2)]
    for number in range(ROUNDS):
        topup = order(f"r{number}", msisdn=f"+3933300{number:05}")

        claims = race(*(partial(each.claim, topup) for each in ledgers))

        assert len([claim for claim in claims if claim]) == 1


def test_two_orders_of_one_subscriber_are_never_both_in_flight(
    mariadb_database: Database,
) -> None:
    ledger = make_ledger(mariadb_database)
    for number in range(ROUNDS):
        msisdn = f"+3933300{number:05}"
        both = [order(f"{name}{number}", msisdn=msisdn) for name in "ab"]

        claims = race(*(partial(ledger.claim, each) for each in both))

        assert len([claim for claim in claims if claim]) == 1


def test_many_writers_on_few_subscribers_settle_every_order_once(
    mariadb_database: Database,
) -> None:
    """Two at one subscriber can deadlock: one loses the race, nothing fails."""
    ledger = make_ledger(mariadb_database)

    def settled(topup: TopUp) -> bool:
        claim = ledger.claim(topup)
        return bool(claim and ledger.settle(topup.idempotency_key, claim.token, DONE))

    def write(writer: int) -> None:
        for number in range(100):
            msisdn = f"+39333000{(writer * 7 + number) % 40:04}"
            topup = order(f"w{writer}n{number}", msisdn=msisdn)
            end = time.monotonic() + 60
            while not settled(topup):
                assert time.monotonic() < end

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))

    rows = mariadb_database.rows("topup")
    assert len(rows) == 1600
    assert {(row["status"], row["attempts"]) for row in rows} == {("succeeded", 1)}


def test_database_itself_refuses_a_second_in_flight(
    mariadb_database: Database,
) -> None:
    ledger = make_ledger(mariadb_database)
    assert ledger.claim(order("r1"))
    with pytest.raises(IntegrityError, match="one_in_flight_a_subscriber"):
        mariadb_database.execute(
            "INSERT INTO topup (idempotency_key, fingerprint, status, msisdn, channel,"
            " amount_minor, currency, payload, place, created_at, updated_at,"
            " rendered_key, attempts, doubts, reason) SELECT 'x', fingerprint, status,"
            " msisdn, channel, amount_minor, currency, payload, place, created_at,"
            " updated_at, rendered_key, attempts, doubts, reason FROM topup"
        )


def one_connection(database: Database) -> Engine:
    """An engine whose only connection a test can name and kill."""
    settings = replace(settings_of(database.env), server_threads=1)
    return make_engine(settings)


def connection_id(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT CONNECTION_ID()")) or 0)


def test_lost_connection_changes_nothing_and_the_next_works(
    mariadb_database: Database, mariadb: MariaDb
) -> None:
    engine = one_connection(mariadb_database)
    ledger = Ledger(
        engine,
        load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"})),
        lease_s=30,
    )
    number = connection_id(engine)
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"KILL {number}")

    with pytest.raises(ClaimUncertain) as caught:
        ledger.claim(order())
    assert len(caught.value.token) == 32
    assert mariadb_database.rows("topup") == []

    assert ledger.claim(order())
    engine.dispose()


def test_claim_is_uncertain_when_its_answer_is_lost(
    mariadb_database: Database,
) -> None:
    """The server executes the claim, and the connection dies before the answer."""
    engine = one_connection(mariadb_database)
    ledger = Ledger(
        engine,
        load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"})),
        lease_s=30,
    )
    connection_id(engine)
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
    assert isinstance(raw, pymysql.Connection)

    class Deaf:
        """Sends the statement, and loses what comes back."""

        def __init__(self, real: object) -> None:
            self._real = real

        def read(self, _size: int) -> bytes:
            getattr(self._real, "read")(1)  # noqa: B009
            raise ConnectionResetError

        def close(self) -> None:
            getattr(self._real, "close")()  # noqa: B009

    raw._rfile = Deaf(raw._rfile)  # type: ignore[attr-defined]

    with pytest.raises(ClaimUncertain) as caught:
        ledger.claim(order())

    assert mariadb_database.row("app:r1")["token"] == caught.value.token
    released = Answer(AnswerClass.RETRY, is_sent=False, reason="claim_uncertain")
    assert ledger.give_back("app:r1", caught.value.token, released)
    engine.dispose()


def test_lock_timeout_is_unavailable_and_changes_nothing(
    mariadb_database: Database, ledger: Ledger
) -> None:
    claim = ledger.claim(order())
    assert claim
    with mariadb_database.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT * FROM topup FOR UPDATE")

        with pytest.raises(LedgerUnavailable, match="1205"):
            ledger.settle("app:r1", claim.token, DONE)

        connection.exec_driver_sql("ROLLBACK")
    assert ledger.settle("app:r1", claim.token, DONE)


def test_deadlock_is_unavailable_and_half_of_nothing_is_done(
    mariadb_database: Database,
) -> None:
    ledger = make_ledger(mariadb_database)
    for name, msisdn in (("a", "+393330000001"), ("b", "+393330000002")):
        assert ledger.claim(order(name, msisdn=msisdn))
    gate = threading.Barrier(2)

    def lock(first: str, second: str) -> str:
        try:
            with transaction(mariadb_database.engine) as connection:
                change = text(
                    "UPDATE topup SET attempts = attempts + 1"
                    " WHERE idempotency_key = :k"
                )
                connection.execute(change, {"k": first})
                gate.wait(timeout=30)
                connection.execute(change, {"k": second})
        except LedgerUnavailable as error:
            return str(error)
        return "done"

    ends = race(lambda: lock("app:a", "app:b"), lambda: lock("app:b", "app:a"))

    assert sorted(map(str, ends)) == ["OperationalError 1213", "done"]
    assert [row["attempts"] for row in mariadb_database.rows("topup")] == [2, 2]


def test_read_only_server_is_unavailable_and_its_connection_is_dropped(
    mariadb_database: Database, mariadb: MariaDb
) -> None:
    """After a failover the pool may still hold connections to the old primary."""
    engine = one_connection(mariadb_database)
    ledger = Ledger(
        engine,
        load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"})),
        lease_s=30,
    )
    before = connection_id(engine)
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL read_only = 1")
        try:
            with pytest.raises(LedgerUnavailable, match="1290"):
                ledger.claim(order())
        finally:
            cursor.execute("SET GLOBAL read_only = 0")

    assert connection_id(engine) != before
    assert ledger.claim(order())
    engine.dispose()


def test_errors_never_quote_a_key_or_a_row(ledger: Ledger) -> None:
    claim = ledger.claim(order())
    assert claim
    with pytest.raises(LedgerUnavailable) as caught:
        ledger.settle("app:r1", claim.token, replace(DONE, reference="x" * 300))

    assert "app:r1" not in repr(caught.value)
    assert "xxx" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_server_elsewhere_is_refused_without_a_ca_to_verify_it(
    mariadb_database: Database,
) -> None:
    """The driver would take any certificate, or none."""
    url = mariadb_database.env["LEDGER_DATABASE_URL"]
    elsewhere = url.replace("@127.0.0.1:", "@ledger.example:")

    with pytest.raises(SettingsError, match="LEDGER_TLS_CA_FILE"):
        make_engine(settings_of({"LEDGER_DATABASE_URL": elsewhere}))


def test_ca_file_without_a_certificate_refuses_to_start(
    mariadb_database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate\n")

    with pytest.raises(SettingsError, match="LEDGER_TLS_CA_FILE: no certificate"):
        make_engine(
            settings_of(mariadb_database.env | {"LEDGER_TLS_CA_FILE": str(path)})
        )


def test_password_file_that_is_no_text_is_an_unavailable_ledger(
    mariadb_database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"\xff\xfe")
    env = mariadb_database.env | {"LEDGER_PASSWORD_FILE": str(path)}

    with pytest.raises(LedgerUnavailable), connected(make_engine(settings_of(env))):
        pass


def test_session_is_strict_and_read_committed(mariadb_database: Database) -> None:
    with connected(mariadb_database.engine) as connection:
        level = connection.scalar(text("SELECT @@tx_isolation"))
        mode = str(connection.scalar(text("SELECT @@sql_mode")))
        zone = connection.scalar(text("SELECT @@time_zone"))
    assert level == "READ-COMMITTED"
    assert "STRICT_TRANS_TABLES" in mode
    assert zone == "+00:00"


def test_password_file_is_read_at_each_connection(
    mariadb: MariaDb, mariadb_database: Database, tmp_path: Path
) -> None:
    mariadb.create_user("rotating", "first", ["SELECT ON `ledger`.*"])
    password = tmp_path / "password"
    password.write_text("first\n")
    env = dict(mariadb_database.env)
    env["LEDGER_DATABASE_URL"] = mariadb.url("ledger", "rotating", "unused")
    env["LEDGER_PASSWORD_FILE"] = str(password)
    engine = make_engine(settings_of(env))
    require_migrated(engine)
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("ALTER USER rotating IDENTIFIED BY 'second'")
    engine.dispose()
    with pytest.raises(LedgerUnavailable, match="1045"):
        require_migrated(engine)

    password.write_text("second\n")

    require_migrated(engine)
    engine.dispose()


def test_migrations_run_twice_and_at_the_same_time(
    mariadb: MariaDb, tmp_path: Path
) -> None:
    name = f"m{tmp_path.name}"[:30].replace("-", "_")
    env = {
        "LEDGER_DATABASE_URL": mariadb.create_database(name),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
    }
    engines = [make_engine(settings_of(env)) for _ in range(4)]
    try:
        revisions = race(*(partial(migrate, each) for each in engines))
        assert set(revisions) == {SCHEMA_REVISION}
        assert migrate(engines[0]) == SCHEMA_REVISION
    finally:
        for engine in engines:
            engine.dispose()


def test_pool_never_makes_a_request_wait_for_long(mariadb_database: Database) -> None:
    settings = replace(
        settings_of(mariadb_database.env), server_threads=1, ledger_timeout_s=0.2
    )
    engine = make_engine(settings)
    with (
        engine.connect(),
        engine.connect(),
        pytest.raises(LedgerUnavailable, match="TimeoutError"),
        connected(engine),
    ):
        pass
    engine.dispose()


def test_outcomes_of_two_pods_on_one_key_are_one_success(
    mariadb_database: Database,
) -> None:
    for number in range(100):
        topup = order(f"r{number}", msisdn=f"+3933300{number:05}")
        pods = [processing(make_ledger(mariadb_database), DONE) for _ in range(2)]

        outcomes = [
            receipt.outcome
            for receipt in race(*(partial(pod.process, topup) for pod in pods))
        ]

        assert Outcome.SUCCEEDED in outcomes
        assert set(outcomes) <= {Outcome.SUCCEEDED, Outcome.IN_FLIGHT}
        assert mariadb_database.row(topup.idempotency_key)["attempts"] == 1
