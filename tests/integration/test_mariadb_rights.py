"""The database accounts of grants.py have exactly the rights that their work needs.

On a real server, over TLS: with the rights of its role each account does its work, and
without any single one of them it can't. What a role must not do is refused as such. And
the function trusts no server whose certificate does not verify.
"""

import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from certs.make_certs import make_certs
from demo.mariadb import MariaDb, MariaDbServer
from function.database import make_engine
from function.errors import LedgerUnavailable, MigrationError
from function.grants import ROLES, grants_of
from function.ledger import Ledger
from function.migrate import SCHEMA_REVISION, migrate, require_migrated
from function.model import Answer, AnswerClass, Entry, Outcome, Refused, Status, TopUp
from function.operations import EVERYTHING, Filters, Operations, Verdict
from function.replay import Report, Selection, from_quarantine
from function.retention import Horizon, Retention
from function.rules import Rules
from tests.conftest import Database, settings_of
from tests.integration.test_operations import (
    DAY_S,
    SUBSCRIBER,
    ledger_of,
    put,
    put_attempt,
    put_in_quarantine,
    refusal,
)
from tests.orders import order
from tests.servers import private_mariadb, require

DONE = Answer(AnswerClass.DONE, reference="R-1")
NO = Answer(AnswerClass.NO, reason="blocked")
UNKNOWN = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
NOT_SENT = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")
ACCEPTED = Answer(AnswerClass.ACCEPTED, reference="R-2")

Account = Callable[[str, list[str]], Engine]


@pytest.fixture
def account(mariadb: MariaDb, mariadb_database: Database) -> Iterator[Account]:
    """Makes an account with these grants, and connects as it to a database."""
    engines: list[Engine] = []
    names: list[str] = []

    def make(database: str, grants: list[str]) -> Engine:
        names.append(f"right_{secrets.token_hex(4)}")
        password = secrets.token_urlsafe(16)
        mariadb.create_user(names[-1], password, grants)
        env = mariadb_database.env | {
            "LEDGER_DATABASE_URL": mariadb.url(database, names[-1], password)
        }
        engines.append(make_engine(settings_of(env)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        for name in names:
            cursor.execute(f"DROP USER `{name}`")


def singles(role: str, database: str = "ledger") -> list[str]:
    """The role's grants, one right on one column or table each."""
    return [
        f"{right}{f' ({column})' if column else ''} ON {where}"
        for grant in grants_of(role, database)
        for rights, _, where in [grant.partition(" ON ")]
        for right, columns in re.findall(r"(\w+)(?: \(([^)]*)\))?", rights)
        for column in columns.split(", ")
    ]


# -- The work of each role -----------------------------------------------------------
# All that its part of the program asks of the database, on a ledger of this owner's.


def work_of_function(engine: Engine, _owner: Database) -> None:
    require_migrated(engine)
    ledger = ledger_of(engine)
    process(ledger)
    assert [ledger.see("a" * 64).times for _ in range(2)] == [1, 2]


def process(ledger: Ledger) -> None:
    """What processing asks of the ledger, in the function and in the resolver."""

    def entry(topup: TopUp) -> Entry:
        found, _ = ledger.look(topup)
        assert found
        return found

    first = order("r1", offset=1)
    claim = ledger.claim(first)
    assert claim
    assert ledger.hold(order("r2", offset=2))
    assert ledger.give_back("app:r1", claim.token, NOT_SENT)
    claim = ledger.reclaim(entry(first))
    assert claim
    assert ledger.doubt("app:r1", claim.token, UNKNOWN, is_parked=False)
    ledger.looked("app:r1")
    assert ledger.park(entry(first), "looked_up_in_vain")
    assert not ledger.overtake(order("r3", offset=3))
    assert not ledger.expire(entry(first))
    assert ledger.keep_evidence("app:r1", claim.token, DONE)
    refused = order("r4", msisdn="+393330000004")
    claim = ledger.claim(refused)
    assert claim
    assert ledger.settle("app:r4", claim.token, NO)
    doubtful = order("r5", msisdn="+393330000005")
    claim = ledger.claim(doubtful)
    assert claim
    assert ledger.doubt("app:r5", claim.token, UNKNOWN, is_parked=False)
    assert ledger.end_doubt(entry(doubtful), DONE)
    quarantined = Refused(Outcome.INVALID, "why", b"{}", 2, {}, None)
    assert ledger.put_in_quarantine(quarantined)


def work_of_resolver(engine: Engine, _owner: Database) -> None:
    ledger = ledger_of(engine)
    process(ledger)
    assert ledger.due(given_up_s=0, again_s=0, is_parked_due=True, limit=9)
    accepted = order("r6", msisdn="+393330000006")
    claim = ledger.claim(accepted)
    assert claim
    assert ledger.settle("app:r6", claim.token, ACCEPTED)
    ledger.accepted(again_s=0, watch_s=60, limit=9)
    ledger.record_reversal("app:r6", claim.token, "R-2")
    released = order("r7", msisdn="+393330000007")
    claim = ledger.claim(released)
    assert claim
    assert ledger.give_back("app:r7", claim.token, NOT_SENT)
    entry, _ = ledger.look(released)
    assert entry
    assert ledger.wait_again(entry)
    # `topup release`, which drains with the resolver's own rights.
    assert Operations(engine).release(released.msisdn, lambda _: 1).drained == 1


def work_of_operator(engine: Engine, owner: Database) -> None:
    # One of them waits for a second person, who is looked for.
    migrate(owner.engine, Rules(settle_s=120, second_person_above_minor=5000))
    put(owner, "app:r1", Status.PARKED)
    put(owner, "app:r2", Status.IN_DOUBT, msisdn="+1000002")
    put(owner, "app:r3", Status.PARKED, msisdn="+1000003", amount_minor=9000)
    put_attempt(owner, "app:r1")
    put_in_quarantine(owner, key="app:r1")
    people = Operations(engine)
    assert len(people.list_orders(Filters()).orders) == 3
    assert people.show("app:r1").attempts
    people.pause(EVERYTHING, "the API doubles")
    assert people.stats().pauses
    people.resume(EVERYTHING, "mended")
    for key, verdict, reference in (
        ("app:r1", Verdict.EXECUTED, "R-1"),
        ("app:r2", Verdict.NOT_EXECUTED, None),
        ("app:r3", Verdict.ABANDON, None),
    ):
        people.decide(
            key,
            verdict,
            reason="asked",
            reference=reference,
        )
    letters = from_quarantine(engine, Selection(), "com.example.x", Report())
    assert len(list(letters)) == 1


def work_of_purge(engine: Engine, owner: Database, key_file: Path) -> None:
    put(owner, "app:old", Status.SUCCEEDED, age_s=50 * DAY_S)
    put(owner, "app:young", Status.SUCCEEDED)
    for key in ("app:old", "app:young"):
        put_attempt(owner, key, words="of the API")
    put_in_quarantine(owner, age_s=50 * DAY_S)
    put_in_quarantine(owner, key="app:young")
    purge = Retention(engine)
    assert purge.blank_payloads(3600) >= 1
    assert purge.purge(44 * DAY_S, Horizon(DAY_S, DAY_S, DAY_S)).quarantined == 1
    assert purge.forget(SUBSCRIBER, key_file).quarantined == 1


def work(role: str, engine: Engine, owner: Database, folder: Path) -> None:
    if role == "purge":
        key_file = folder / "key"
        key_file.write_text("k" * 32)
        work_of_purge(engine, owner, key_file)
        return
    {
        "function": work_of_function,
        "resolver": work_of_resolver,
        "operator": work_of_operator,
    }[role](engine, owner)


WORKERS = [role for role in ROLES if role != "migrate"]


@pytest.mark.parametrize("role", WORKERS)
def test_a_role_does_its_work(
    account: Account, mariadb_database: Database, tmp_path: Path, role: str
) -> None:
    work(role, account("ledger", singles(role)), mariadb_database, tmp_path)


@pytest.mark.parametrize(
    ("role", "right"), [(role, right) for role in WORKERS for right in singles(role)]
)
def test_without_any_single_right_the_work_fails(
    account: Account,
    mariadb_database: Database,
    tmp_path: Path,
    role: str,
    right: str,
) -> None:
    others = [each for each in singles(role) if each != right]
    engine = account("ledger", others)

    with pytest.raises(LedgerUnavailable, match=r"114[23]"):
        work(role, engine, mariadb_database, tmp_path)


@pytest.fixture
def empty_database(mariadb: MariaDb) -> Iterator[str]:
    name = f"mig_{secrets.token_hex(4)}"
    mariadb.create_database(name)
    yield name
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE `{name}`")
        cursor.execute(f"DROP USER `{name}`")


def work_of_migrate(engine: Engine, mariadb: MariaDb, database: str) -> None:
    """Make a ledger; finish one whose migration was cut; set its rules anew."""
    migrate(engine, Rules(settle_s=60, second_person_above_minor=5000))
    with mariadb.root_connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE alembic_version SET version_num = '0001'")
        cursor.execute("DROP TABLE pause_log")
        cursor.execute("ALTER TABLE quarantine DROP INDEX quarantined_at")
        cursor.execute("ALTER TABLE topup DROP COLUMN looked_at")
    rules = Rules(settle_s=120, second_person_above_minor=5000)
    assert migrate(engine, rules) == SCHEMA_REVISION


def test_migrate_does_its_work(
    account: Account, mariadb: MariaDb, empty_database: str
) -> None:
    engine = account(empty_database, singles("migrate", empty_database))
    work_of_migrate(engine, mariadb, empty_database)


@pytest.mark.parametrize("number", range(len(singles("migrate"))))
def test_without_any_single_right_nothing_is_migrated(
    account: Account, mariadb: MariaDb, empty_database: str, number: int
) -> None:
    rights = singles("migrate", empty_database)
    del rights[number]
    engine = account(empty_database, rights)

    with pytest.raises(MigrationError, match=r"1142|1044"):
        work_of_migrate(engine, mariadb, empty_database)


# -- What no role may do ---------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "GRANT SELECT ON ledger.topup TO health",
        "CREATE USER intruder",
        "SET PASSWORD FOR health = 'x'",
        "CREATE TABLE ledger.mine (id INT)",
        "ALTER TABLE topup DROP COLUMN fingerprint",
        "CREATE INDEX mine ON topup (msisdn)",
        "DROP TABLE attempt",
        "TRUNCATE TABLE attempt",
        "DROP DATABASE ledger",
        "CREATE TRIGGER mine BEFORE INSERT ON decision FOR EACH ROW SET @x = 1",
        "UPDATE alembic_version SET version_num = '0'",
        "SELECT * FROM mysql.global_priv",
        "SELECT * FROM topup INTO OUTFILE 'topup.csv'",
        "SET GLOBAL read_only = 0",
    ],
)
@pytest.mark.parametrize("role", WORKERS)
def test_server_refuses_every_role_what_an_administrator_does(
    account: Account, role: str, statement: str
) -> None:
    engine = account("ledger", grants_of(role, "ledger"))
    # Of a table, a database, a user, a column, or in general.
    assert refusal(engine, statement) in {"1142", "1044", "1227", "1143", "1045"}


@pytest.mark.parametrize("role", ["function", "resolver"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM decision",
        "UPDATE decision SET verdict = 'executed'",
        "DELETE FROM decision",
        "UPDATE pause SET reason = 'x'",
        "SELECT * FROM pause_log",
        "INSERT INTO pause_log (scope) VALUES ('x')",
        "SELECT words FROM attempt",
        "SELECT raw FROM quarantine",
        "UPDATE topup SET idempotency_key = 'x'",
        "UPDATE topup SET fingerprint = 'x'",
    ],
)
def test_server_keeps_the_function_from_peoples_tables_and_from_evidence(
    account: Account, role: str, statement: str
) -> None:
    engine = account("ledger", grants_of(role, "ledger"))
    assert refusal(engine, statement) in {"1142", "1143"}


def test_migrate_alters_tables_and_neither_drops_nor_grants(
    account: Account, empty_database: str
) -> None:
    engine = account(empty_database, grants_of("migrate", empty_database))
    migrate(engine)

    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE topup ADD COLUMN later INT")
    for statement in (
        "DROP TABLE topup",
        "TRUNCATE TABLE attempt",
        f"GRANT SELECT ON {empty_database}.topup TO health",
        "SELECT * FROM ledger.topup",
    ):
        assert refusal(engine, statement) == "1142"


# -- Whom the function trusts ---------------------------------------------------------


@pytest.fixture(scope="module")
def tls_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[MariaDbServer, str]]:
    """A server whose certificate a test may change, and its ledger's URL."""
    with private_mariadb(tmp_path_factory.mktemp("mariadb")) as server:
        url = server.create_database("ledger")
        env = {"LEDGER_DATABASE_URL": url, "LEDGER_TLS_CA_FILE": str(server.ca)}
        engine = make_engine(settings_of(env))
        migrate(engine)
        engine.dispose()
        yield server, url


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("ours", None),
        ("of another CA", "self-signed certificate|unable to get local issuer"),
        ("for another host", "IP address mismatch"),
        ("expired", "certificate has expired"),
    ],
)
def test_function_refuses_a_server_whose_certificate_does_not_verify(
    tls_server: tuple[MariaDbServer, str],
    tmp_path: Path,
    shown: str,
    reason: str | None,
) -> None:
    server, url = tls_server
    trusted = shows = make_certs(
        tmp_path / "ours",
        hosts=["db.example"] if shown == "for another host" else ["127.0.0.1"],
        is_server_expired=shown == "expired",
    )
    if shown == "of another CA":
        shows = make_certs(tmp_path / "other", hosts=["127.0.0.1"])
    shutil.copyfile(shows.server_cert, server._certificates.server_cert)
    shutil.copyfile(shows.server_key, server._certificates.server_key)
    with server.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("FLUSH SSL")

    env = {"LEDGER_DATABASE_URL": url, "LEDGER_TLS_CA_FILE": str(trusted.ca)}
    assert_trusted(env, reason)


def assert_trusted(env: dict[str, str], reason: str | None) -> None:
    """The function works with this ledger, or refuses it for this reason."""
    engine = make_engine(settings_of(env))
    try:
        if reason is None:
            require_migrated(engine)
            return
        with pytest.raises(OperationalError, match=reason):
            engine.connect()
        # Its text is foreign: the number is all that is told of it.
        with pytest.raises(LedgerUnavailable, match=r"OperationalError \d+$"):
            require_migrated(engine)
    finally:
        engine.dispose()


class BareMariaDb(MariaDbServer):
    """A server that knows no TLS, or somebody who strips it from the wire."""

    def _answers(self) -> bool:
        return "ready for connections" in self.log.read_text()


def test_function_refuses_a_server_without_tls(tmp_path: Path) -> None:
    server = BareMariaDb(
        tmp_path / "bare",
        make_certs(tmp_path / "certs"),
        fast=True,
        options=["--skip-ssl", "--require-secure-transport=OFF"],
    )
    require(server.start)
    try:
        url = server.create_database("ledger")
        with server.root_connect() as connection, connection.cursor() as cursor:
            cursor.execute("ALTER USER ledger REQUIRE NONE")
        env = {"LEDGER_DATABASE_URL": url}
        engine = make_engine(settings_of(env))
        migrate(engine)
        engine.dispose()
        # Who asks for no TLS gets in: it is the missing TLS that is refused.
        assert_trusted(env, None)

        env["LEDGER_TLS_CA_FILE"] = str(server.ca)
        assert_trusted(env, "SSL is required")
    finally:
        server.stop()
