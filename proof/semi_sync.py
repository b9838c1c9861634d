"""A MariaDB with a semi-synchronous replica, and the failover from one to the other.

Owns both servers, their roles and the promotion; must never acknowledge a commit that
only one of them has: AFTER_SYNC, and a time-out of a month instead of a fallback.

    primary --binlog--> replica      a commit is answered once the replica has it
       X  killed        promoted     all that was received is applied, then it may write
    restarted as the replica         its unacknowledged tail is cut by crash recovery
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import pymysql
from pymysql.connections import Connection
from pymysql.cursors import DictCursor

from certs.make_certs import Certificates
from demo.mariadb import MariaDb, MariaDbServer
from demo.server_process import LOOPBACK, POLL_S, ServerError

#: Two idle servers on one machine agree within a second; loaded ones may take longer.
TIMEOUT_S: Final = 60.0
_REPLICATOR: Final = "replicator"
#: In milliseconds: longer than any run, so that no commit falls back to one server.
_NEVER_MS: Final = 30 * 24 * 3600 * 1000
_BOTH: Final = (
    "--log-slave-updates=ON",
    "--gtid-strict-mode=ON",
    "--relay-log=relay",
    "--sync-relay-log=1",
    "--relay-log-recovery=ON",
    # Who replicates is said by us, after each start.
    "--skip-slave-start",
    # The replica's own lag would be part of each failover.
    "--slave-parallel-threads=4",
    "--slave-parallel-mode=optimistic",
    "--rpl-semi-sync-master-wait-point=AFTER_SYNC",
    f"--rpl-semi-sync-master-timeout={_NEVER_MS}",
)


class SemiSyncPair(MariaDb):
    """Two private servers, of which one is the primary; a context manager.

    As a `MariaDb` it is the primary of the moment: `port` changes with a failover, and
    whoever must not notice connects through a proxy.

    Args:
        directory: gets a folder for each server.
        certificates: both serve with them, and the replica verifies the primary.

    """

    def __init__(self, directory: Path, certificates: Certificates) -> None:
        super().__init__(host=LOOPBACK, port=0, ca=certificates.ca)
        self.primary, self.replica = (
            MariaDbServer(directory / name, certificates) for name in ("one", "two")
        )
        self._ids = {self.primary.port: 1, self.replica.port: 2}
        self._password = secrets.token_urlsafe(24)
        self.port = self.primary.port

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # What they hold is read before; nobody waits for their orderly end.
        self.primary.kill()
        self.replica.kill()

    def root_connect(self, database: str | None = None) -> Connection:
        """A connection to the primary that may do everything, in autocommit."""
        return self.primary.root_connect(database)

    def crash_primary(self) -> None:
        """Kill the primary, and start it again on its own data.

        Raises:
            ServerError: it does not come back.

        """
        self.primary.kill()
        self.primary.start()
        self._wait_until_in_sync()

    def fail_over(self, lead_to: Callable[[int], None], *, is_frozen: bool) -> None:
        """Promote the replica; the former primary becomes its replica.

        Args:
            lead_to: called with the new primary's port once it may be written to.
            is_frozen: the primary is first stopped with its connections open, and
                killed only after the promotion; else it is killed at once.

        Raises:
            ServerError: a server does not do its part; names its log.

        """
        former = self.primary
        if is_frozen:
            former.pause()
        else:
            former.kill()
        self._promote()
        lead_to(self.port)
        # Fenced: whatever it was still told, nobody will ever be answered.
        former.kill()
        former.start()
        # What it recovered is what it had acknowledged, and no more.
        _execute(former, "SET GLOBAL gtid_slave_pos = @@gtid_binlog_pos")
        self._follow()

    def are_equal(self, tables: list[str]) -> bool:
        """Whether both servers hold the same rows of these tables, now at rest."""
        self._wait_until_applied()
        both = [
            [_ask(server, f"CHECKSUM TABLE {table}")["Checksum"] for table in tables]
            for server in (self.primary, self.replica)
        ]
        return both[0] == both[1]

    # -- Steps -----------------------------------------------------------------------

    def _start(self) -> None:
        # Before there is a replica nobody could acknowledge.
        self.primary.options = self._options(self.primary, is_primary=False)
        self.primary.start()
        self.replica.options = self._options(self.replica, is_primary=False)
        self.replica.start()
        self._let_write()
        grants = ["REPLICATION SLAVE ON *.*"]
        self.create_user(_REPLICATOR, self._password, grants)
        self._follow()

    def _options(self, server: MariaDbServer, *, is_primary: bool) -> tuple[str, ...]:
        primary, replica = ("ON", "OFF") if is_primary else ("OFF", "ON")
        return (
            *_BOTH,
            f"--server-id={self._ids[server.port]}",
            f"--rpl-semi-sync-master-enabled={primary}",
            f"--rpl-semi-sync-slave-enabled={replica}",
            f"--read-only={replica}",
            # With this one crash recovery cuts what no replica has acknowledged.
            f"--init-rpl-role={'MASTER' if is_primary else 'SLAVE'}",
        )

    def _let_write(self) -> None:
        """Let the primary be written to, as what it is now."""
        _execute(self.primary, "SET GLOBAL rpl_semi_sync_slave_enabled = OFF")
        _execute(self.primary, "SET GLOBAL read_only = OFF")
        self.primary.options = self._options(self.primary, is_primary=True)
        self.replica.options = self._options(self.replica, is_primary=False)

    def _follow(self) -> None:
        """Make the replica follow the primary, and the primary wait for it."""
        _execute(
            self.replica,
            "CHANGE MASTER TO MASTER_HOST = %s, MASTER_PORT = %s, MASTER_USER = %s, "
            "MASTER_PASSWORD = %s, MASTER_SSL = 1, MASTER_SSL_CA = %s, "
            "MASTER_SSL_VERIFY_SERVER_CERT = 1, MASTER_USE_GTID = slave_pos, "
            "MASTER_CONNECT_RETRY = 1, MASTER_HEARTBEAT_PERIOD = 1",
            LOOPBACK,
            self.primary.port,
            _REPLICATOR,
            self._password,
            str(self.ca.absolute()),
        )
        _execute(self.replica, "START SLAVE")
        _execute(self.primary, "SET GLOBAL rpl_semi_sync_master_enabled = ON")
        self._wait_until_in_sync()

    def _promote(self) -> None:
        """Apply all that was received, and make the replica the primary."""
        self._wait_until_applied()
        _execute(self.replica, "STOP SLAVE")
        _execute(self.replica, "RESET SLAVE ALL")
        self.primary, self.replica = self.replica, self.primary
        self.port = self.primary.port
        self._let_write()

    def _wait_until_in_sync(self) -> None:
        """Wait until a commit is answered by both."""

        def is_in_sync() -> bool:
            self._require_replication()
            status = "SHOW STATUS LIKE 'Rpl_semi_sync_master_clients'"
            return bool(_ask(self.primary, status)["Value"] == "1")

        self._wait_until(is_in_sync, "does not acknowledge")

    def _wait_until_applied(self) -> None:
        def is_applied() -> bool:
            status = self._require_replication()
            return str(status["Slave_SQL_Running_State"]).startswith("Slave has read")

        self._wait_until(is_applied, "does not apply what it received")

    def _require_replication(self) -> dict[str, Any]:
        status = _ask(self.replica, "SHOW SLAVE STATUS")
        if status["Last_SQL_Error"] or status["Last_IO_Errno"] in _FOR_GOOD:
            raise ServerError(
                "the replica has stopped: "
                f"{status['Last_SQL_Error'] or status['Last_IO_Error']}; "
                f"read {self.replica.log}"
            )
        return status

    def _wait_until(self, is_so: Callable[[], bool], otherwise: str) -> None:
        end_s = time.monotonic() + TIMEOUT_S
        while not is_so():
            if time.monotonic() > end_s:
                raise ServerError(
                    f"the replica {otherwise} after {TIMEOUT_S:g} s; "
                    f"read {self.replica.log}"
                )
            time.sleep(POLL_S)


#: Errors of the replica's connection that no patience mends: diverged histories.
_FOR_GOOD: Final = frozenset({1236, 1593})


def _execute(server: MariaDbServer, statement: str, *values: object) -> None:
    try:
        with server.root_connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
    except pymysql.MySQLError as error:
        raise ServerError(f"{error}; read {server.log}") from error


def _ask(server: MariaDbServer, question: str) -> dict[str, Any]:
    """The first row of an answer."""
    try:
        with (
            server.root_connect() as connection,
            connection.cursor(DictCursor) as cursor,
        ):
            cursor.execute(question)
            return dict(cursor.fetchone() or {})
    except pymysql.MySQLError as error:
        raise ServerError(f"{error}; read {server.log}") from error
