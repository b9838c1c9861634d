"""What the cells stand on: one MariaDB for all, and for each a ledger and an API.

Owns their making, their settings and the reading of both books. It must never write to
a ledger after its making, beyond an operator's pause and resume.
"""

import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pymysql

from certs.make_certs import make_certs
from demo.faults import Fault, Script
from demo.mariadb import MariaDbServer
from demo.recharge_api import Kind, SandboxRechargeApi
from demo.server_process import LOOPBACK, PROJECT, run
from proof.crash_matrix.cells import Behaviour, Cell
from proof.crash_matrix.lives import Life, Nursery
from proof.crash_matrix.wires import FIRST, Loop

#: As short as two busy cores allow, in the order that the function checks at start: the
#: lease is what each kill costs.
SETTINGS: Final = {
    # It is reached at several addresses.
    "RECHARGE_API_IDENTITY": "sandbox",
    "LEDGER_TIMEOUT_S": "2",
    "LEDGER_LEASE_MARGIN_S": "0.5",
    "RECHARGE_API_TIMEOUT_S": "2",
    "RECHARGE_API_DEADLINE_S": "2.5",
    "RECHARGE_API_SETTLE_S": "3.3",
    "EVENT_READ_TIMEOUT_S": "2",
    "EVENT_DELIVERY_TIMEOUT_S": "6",
    "EVENT_REDELIVERY_MAX_S": "4",
    "RESOLVER_INTERVAL_S": "0.2",
    "SERVER_THREADS": "4",
    "SERVER_REQUEST_TIMEOUT_S": "10",
    "SERVER_GRACEFUL_TIMEOUT_S": "5",
    "SERVER_TERMINATION_GRACE_S": "8",
}
#: Longer than anybody waits, shorter than a cell.
_HANG_S: Final = 8.0
#: Ended by whoever has seen that a call was refused.
_OUTAGE_S: Final = 600.0
_TEMPLATE: Final = "template"
_USER: Final = "matrix"
_FAULTS: Final = {
    Behaviour.REJECTS: Fault.REJECT,
    Behaviour.ERROR_BEFORE: Fault.ERROR_BEFORE,
    Behaviour.ERROR_AFTER: Fault.ERROR_AFTER,
    Behaviour.ANSWER_LOST: Fault.EXECUTE_THEN_DROP,
    Behaviour.HANGS: Fault.HANG,
    Behaviour.HALF_BODY: Fault.HALF_BODY,
    Behaviour.TOO_MANY: Fault.RATE_LIMITED,
}


class Server:
    """The one MariaDB, with a migrated template of which each cell gets a copy.

    Without TLS, so that what passes the wires can be read; TLS has tests of its own.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        certificates = make_certs(directory / "certs", force=True)
        self._server = MariaDbServer(
            directory / "mariadb",
            certificates,
            fast=True,
            options=("--require-secure-transport=OFF", "--max-connections=1000"),
        )
        self._password = secrets.token_urlsafe(24)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.port

    @contextmanager
    def started(self) -> Iterator[str]:
        """Run it for a while; gives its version.

        Raises:
            ServiceMissing: MariaDB is not installed; says how to get it.
            ServerError: it does not start, or the ledger can't be migrated.

        """
        with self._server:
            self.execute(
                f"CREATE USER {_USER} IDENTIFIED BY '{self._password}'",
                f"GRANT ALL ON *.* TO {_USER}",
                f"CREATE DATABASE {_TEMPLATE} CHARACTER SET utf8mb4",
            )
            variable = f"LEDGER_DATABASE_URL={self.url(_TEMPLATE, self.port)}"
            migrate = [sys.executable, "-m", "function.cli", "migrate"]
            log = self._directory / "migrate.log"
            run(["env", variable, *migrate], log=log, cwd=PROJECT)
            yield str(self.rows("SELECT VERSION() AS version")[0]["version"])

    def url(self, database: str, port: int) -> str:
        """The URL by which a process reaches a database through a port."""
        user = f"{_USER}:{self._password}"
        # The driver would turn TLS on by itself.
        return f"mysql+pymysql://{user}@{LOOPBACK}:{port}/{database}?ssl_disabled=1"

    @contextmanager
    def copied(self, database: str) -> Iterator[None]:
        """An empty ledger of this name, for a while."""
        tables = self.rows(f"SHOW TABLES FROM {_TEMPLATE}")
        names = [str(name) for row in tables for name in row.values()]
        self.execute(
            f"CREATE DATABASE {database} CHARACTER SET utf8mb4",
            *(f"CREATE TABLE {database}.{n} LIKE {_TEMPLATE}.{n}" for n in names),
        )
        try:
            yield
        finally:
            self.execute(f"DROP DATABASE {database}")

    def execute(self, *statements: str, database: str | None = None) -> None:
        """Run statements as the administrator, each committed by itself."""
        with (
            self._server.root_connect(database) as connection,
            connection.cursor() as cursor,
        ):
            for statement in statements:
                cursor.execute(statement)

    def rows(
        self, query: str, *values: object, database: str | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """What a query finds, with its values for each %s."""
        with (
            self._server.root_connect(database) as connection,
            connection.cursor(pymysql.cursors.DictCursor) as cursor,
        ):
            cursor.execute(query, values)
            return cursor.fetchall()


class Rig:
    """What all cells share."""

    def __init__(self, server: Server, loop: Loop, directory: Path) -> None:
        self.server = server
        self.loop = loop
        self.directory = directory
        self.nursery = Nursery()
        #: Set when no cell need come to its end any more.
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._number = 0

    @contextmanager
    def ground(self, cell: Cell) -> Iterator["Ground"]:
        """What one cell has for itself; at the end nothing of it runs."""
        with self._lock:
            self._number += 1
            database = f"cell_{self._number}"
        directory = self.directory / str(cell)
        directory.mkdir(parents=True)
        book = directory / "book.jsonl"
        with (
            self.server.copied(database),
            SandboxRechargeApi(kind=cell.kind, book=book) as api,
        ):
            ground = Ground(self, cell, database, api, directory)
            try:
                yield ground
            finally:
                ground.end_lives()


class Ground:
    """One cell's own ledger, recharge API and processes."""

    def __init__(
        self,
        rig: Rig,
        cell: Cell,
        database: str,
        api: SandboxRechargeApi,
        directory: Path,
    ) -> None:
        self.rig = rig
        self.cell = cell
        self.api = api
        self._database = database
        self._directory = directory
        self._lives: list[Life] = []
        #: Nobody listens at the API.
        self.is_refusing = False

    def misbehave(self) -> None:
        """Let the API do to the first order's next call what the cell says."""
        behaviour = self.cell.behaviour
        if behaviour is Behaviour.REFUSED:
            self.is_refusing = True
            self.api.outage(_OUTAGE_S)
        elif behaviour is not Behaviour.ANSWERS:
            is_hang = behaviour is Behaviour.HANGS
            self.api.add_faults(
                Script(
                    _FAULTS[behaviour],
                    key=key_of(FIRST),
                    delay_s=_HANG_S if is_hang else None,
                )
            )

    def recover_if_refused(self) -> None:
        """End a refusal that the first order has met, or will not meet any more."""
        if not self.is_refusing:
            return
        key = key_of(FIRST)
        met = self._rows(
            "SELECT 1 FROM attempt WHERE idempotency_key = %s AND is_sent = 0"
            " UNION ALL "
            "SELECT 1 FROM topup WHERE idempotency_key = %s AND status = 'parked'",
            key,
            key,
        )
        if met:
            self.recover()

    def recover(self) -> None:
        """End a refusal."""
        if self.is_refusing:
            self.is_refusing = False
            self.api.outage(0)

    def function(
        self, *, database_port: int | None = None, api_port: int | None = None
    ) -> Life:
        """Start a function; behind the given ports are wires.

        Raises:
            LifeFailed: it does not answer.

        """
        env, log = self._env(database_port, api_port), self._log("function")
        return self._kept(self.rig.nursery.function(env, log))

    def resolver(
        self, *, database_port: int | None = None, api_port: int | None = None
    ) -> Life:
        """Start a resolver likewise."""
        env, log = self._env(database_port, api_port), self._log("resolver")
        return self._kept(self.rig.nursery.resolver(env, log))

    def end_lives(self) -> None:
        """End every process of the cell.

        Raises:
            LifeFailed: one lives on.

        """
        while self._lives:
            self._lives.pop().end()

    def pause(self) -> None:
        """Be the operator who stops everything."""
        statement = "INSERT INTO pause (scope, reason) VALUES ('*', 'a test')"
        self.rig.server.execute(statement, database=self._database)

    def resume(self) -> None:
        """Be the operator who lets everything go on."""
        self.rig.server.execute("DELETE FROM pause", database=self._database)

    def statuses(self) -> dict[str, str]:
        """The ledger's word on every order, by name."""
        rows = self._rows("SELECT idempotency_key, status FROM topup")
        return {
            str(row["idempotency_key"]).partition(":")[2]: str(row["status"])
            for row in rows
        }

    def _rows(self, query: str, *values: object) -> Sequence[Mapping[str, Any]]:
        return self.rig.server.rows(query, *values, database=self._database)

    def _kept(self, life: Life) -> Life:
        self._lives.append(life)
        return life

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}-{len(self._lives)}.log"

    def _env(self, database_port: int | None, api_port: int | None) -> dict[str, str]:
        port = database_port or self.rig.server.port
        return {
            **SETTINGS,
            "LEDGER_DATABASE_URL": self.rig.server.url(self._database, port),
            "RECHARGE_API_URL": f"http://{LOOPBACK}:{api_port or self.api.port}",
            "RECHARGE_API_KIND": Kind(self.cell.kind).value,
        }


def key_of(name: str) -> str:
    """The idempotency key of the order of this name."""
    return f"app:{name}"
