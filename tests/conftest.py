"""Fixtures that more than one folder of tests uses."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from demo.kafka_broker import KafkaCluster
from demo.mariadb import MariaDb
from function.api_profile import ApiProfile
from function.config import Settings
from function.database import make_engine
from function.ledger import Ledger
from function.migrate import migrate
from function.operations import Operations, Verdict
from function.rules import Rules
from tests.servers import running_kafka, running_mariadb

#: What a test inherits from the machine; everything else is its own.
_KEPT = ("PATH", "HOME", "CI", "JAVA_HOME", "TMPDIR", "LANG")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's reaches a test."""
    for name in list(os.environ):
        if name not in _KEPT and not name.startswith(("PYTEST", "VIRTUAL_ENV")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDb]:
    """A real MariaDB over TCP and TLS, one for the run."""
    with running_mariadb(tmp_path_factory.mktemp("mariadb")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """A real Kafka with TLS, SCRAM and the authorizer, one for the run."""
    with running_kafka(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster


_TABLES = (
    "sighting",
    "topup",
    "attempt",
    "quarantine",
    "pause",
    "pause_log",
    "decision",
    "decision_rule",
)


@dataclass(frozen=True)
class Database:
    """An empty, migrated ledger and how to reach it."""

    engine: Engine
    #: The variables that a process needs to reach it.
    env: dict[str, str]

    @property
    def is_mariadb(self) -> bool:
        return self.engine.dialect.name != "sqlite"

    def rows(self, table: str) -> list[dict[str, object]]:
        """Every row of a table, in the order of its key."""
        order = "1" if table != "topup" else "place, idempotency_key"
        with self.engine.connect() as connection:
            query = text(f"SELECT * FROM {table} ORDER BY {order}")  # noqa: S608
            return [dict(row) for row in connection.execute(query).mappings()]

    def row(self, key: str) -> dict[str, object]:
        """The ledger's row of one key."""
        return next(row for row in self.rows("topup") if row["idempotency_key"] == key)

    def execute(self, statement: str, **values: object) -> int:
        """Change the ledger behind its back, as only a test may."""
        with self.engine.connect() as connection:
            return connection.execute(text(statement), values).rowcount

    def change(self, key: str | None = None, **columns: object) -> None:
        """Overwrite columns of one order, or of all."""
        changes = ", ".join(f"{name} = :{name}" for name in columns)
        condition = "" if key is None else " WHERE idempotency_key = :key"
        self.execute(f"UPDATE topup SET {changes}{condition}", key=key, **columns)  # noqa: S608

    def pause(self, scope: str, by: str = "ann", why: str = "test") -> None:
        """Pause a channel, or `*`."""
        self.execute(
            "INSERT INTO pause VALUES (:scope, :by, :why, '2000-01-01 00:00:00')",
            scope=scope,
            by=by,
            why=why,
        )

    def resume(self) -> None:
        """End every pause."""
        self.execute("DELETE FROM pause")

    def empty(self) -> None:
        """Forget everything."""
        for table in _TABLES:
            self.execute(f"DELETE FROM {table}")  # noqa: S608

    def make_ledger(self, profile: ApiProfile, *, lease_s: float) -> Ledger:
        """The ledger on this database."""
        return Ledger(self.engine, profile, lease_s=lease_s)

    def decide(self, key: str, verdict: Verdict, **how: Any) -> object:
        """What a person decides here, where nothing is too young or too much."""
        migrate(self.engine, Rules(0, 10_000))
        return Operations(self.engine).decide(key, verdict, **how)


def settings_of(env: dict[str, str]) -> Settings:
    """Settings for an engine; the recharge API's address is not used."""
    return Settings.from_env({"RECHARGE_API_URL": "http://127.0.0.1:9", **env})


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "ledger.db"
    engine = make_engine(settings_of({"LEDGER_DATABASE_URL": f"sqlite:///{path}"}))
    migrate(engine)
    engine.dispose()
    return path


@pytest.fixture(scope="session")
def _mariadb_env(mariadb: MariaDb) -> dict[str, str]:
    env = {
        "LEDGER_DATABASE_URL": mariadb.create_database("ledger"),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
    }
    engine = make_engine(settings_of(env))
    migrate(engine)
    engine.dispose()
    return env


@pytest.fixture
def sqlite_database(tmp_path: Path, _sqlite_template: Path) -> Iterator[Database]:
    """An empty ledger in a file."""
    path = tmp_path / "ledger.db"
    shutil.copy(_sqlite_template, path)
    yield from _database({"LEDGER_DATABASE_URL": f"sqlite:///{path}"})


@pytest.fixture
def mariadb_database(_mariadb_env: dict[str, str]) -> Iterator[Database]:
    """An empty ledger on the real server."""
    yield from _database(_mariadb_env, is_emptied=True)


@pytest.fixture(params=["sqlite", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    """Both databases, one after the other: the same promises hold on each."""
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found


def _database(env: dict[str, str], *, is_emptied: bool = False) -> Iterator[Database]:
    engine = make_engine(settings_of(env))
    if is_emptied:
        Database(engine, env).empty()
    yield Database(engine, env)
    engine.dispose()


@pytest.fixture
def sequence() -> Callable[[], int]:
    """Numbers that never repeat within a test."""
    numbers = iter(range(1, 1_000_000))
    return lambda: next(numbers)
