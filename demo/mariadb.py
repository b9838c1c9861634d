"""MariaDB for the demo and the tests: a private one over TLS, or one that is given.

Owns its start, its users and how clients connect. It listens on 127.0.0.1 only and
demands TLS and a password. Must never print a password, or be used for real orders.
"""

import os
import pwd
import re
import secrets
import shutil
import ssl
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pymysql
import sqlalchemy
from pymysql.connections import Connection

from certs.make_certs import Certificates
from demo.server_process import (
    LOOPBACK,
    Server,
    ServiceMissing,
    free_port,
    given_file,
    output,
    run,
    write_private,
)

INSTALL_MARIADB = (
    "install mariadb-server-core and mariadb-client-core (`python -m demo.services "
    "install` does it on Debian), or name a running server in LEDGER_DATABASE_URL "
    "and LEDGER_TLS_CA_FILE"
)

# Names go into statements as they are, since no database takes them as parameters.
_SQL_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)


class MariaDb:
    """A MariaDB or MySQL server as its clients see it, ours or a found one."""

    def __init__(self, *, host: str, port: int, ca: Path) -> None:
        self.host = host
        self.port = port
        #: Certificate of the CA that signed the server's.
        self.ca = ca

    def ssl_context(self) -> ssl.SSLContext:
        """Verifies the server's certificate and its host name."""
        return ssl.create_default_context(cafile=self.ca)

    def url(self, database: str, user: str, password: str) -> str:
        """The SQLAlchemy URL of a user; contains the password, and nothing of TLS.

        TLS needs `connect_args={"ssl": server.ssl_context()}`: what a URL can say
        about it does not verify.
        """
        return sqlalchemy.URL.create(
            "mysql+pymysql",
            username=user,
            password=password,
            host=self.host,
            port=self.port,
            database=database,
            query={"charset": "utf8mb4"},
        ).render_as_string(hide_password=False)

    def create_database(self, name: str) -> str:
        """Make an empty database; return the URL of a new user who owns it.

        The user has the database's name, at most 32 of A-Z a-z 0-9 _ -, and every
        right on the database, none elsewhere.
        """
        password = secrets.token_urlsafe(24)
        with self.root_connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE `{_checked(name)}` CHARACTER SET utf8mb4")
        self.create_user(name, password, [f"ALL ON `{name}`.*"])
        return self.url(name, name, password)

    def create_user(self, name: str, password: str, grants: Iterable[str] = ()) -> None:
        """Make a user who must use TLS.

        Each of `grants` is what stands between GRANT and TO: a constant of the caller
        like "SELECT, INSERT ON `ledger`.`attempts`", never anybody's input.
        """
        user = f"`{_checked(name)}`"  # Without a host it is one from anywhere.
        with self.root_connect() as connection, connection.cursor() as cursor:
            cursor.execute(
                f"CREATE USER {user} IDENTIFIED BY %s REQUIRE SSL", (password,)
            )
            for grant in grants:
                cursor.execute(f"GRANT {grant} TO {user}")

    def root_connect(self, database: str | None = None) -> Connection:
        """A connection that may do everything, in autocommit; the caller closes it."""
        raise NotImplementedError


class FoundMariaDb(MariaDb):
    """A server that somebody else runs: it can't be stopped, killed or started here."""

    def __init__(self, url: sqlalchemy.URL, password: str, ca: Path) -> None:
        super().__init__(host=url.host or LOOPBACK, port=url.port or 3306, ca=ca)
        self._user = url.username
        self._password = password

    def root_connect(self, database: str | None = None) -> Connection:
        """A connection as the user of the given URL, in autocommit.

        The user needs the right to make databases and users.
        """
        return pymysql.connect(
            host=self.host,
            port=self.port,
            user=self._user,
            password=self._password,
            database=database,
            ssl=self.ssl_context(),
            autocommit=True,
        )


class MariaDbServer(Server, MariaDb):
    """A private MariaDB: TLS only over TCP, its administrator over its socket only.

    Durable as production must be (every commit and its binary log are on disk when it
    is acknowledged); with `fast` it has no binary log and writes to disk once a second,
    for suites that never cut the power: a killed process loses nothing either way.
    `options` are further options of mariadbd; what is changed counts from the next
    start on.
    """

    name = "mariadb"

    def __init__(
        self,
        directory: Path,
        certificates: Certificates,
        *,
        fast: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        Server.__init__(self, directory)
        MariaDb.__init__(self, host=LOOPBACK, port=free_port(), ca=certificates.ca)
        self._certificates = certificates
        self._durability = _FAST if fast else _DURABLE
        self.options = tuple(options)
        self._data = self.directory / "data"
        self._socket = self.directory / "mariadb.sock"
        self._init_file = self.directory / "health.sql"
        self._health_password = secrets.token_urlsafe(24)

    def root_connect(self, database: str | None = None) -> Connection:
        """A connection as administrator over the socket, in autocommit.

        The server knows us by the operating system's word; there is no password.
        """
        return pymysql.connect(
            unix_socket=str(self._socket),
            user=_os_user(),
            database=database,
            autocommit=True,
        )

    def _prepare(self) -> None:
        if len(os.fsencode(self._socket)) > UNIX_SOCKET_BYTES_MAX:
            raise ValueError(f"{self._socket} is too long for a socket's path")
        _, installer = find_mariadb()
        run(
            [
                installer,
                "--no-defaults",
                f"--datadir={self._data}",
                # In a shared one, a server that starts removes another's tables.
                f"--tmpdir={self.directory}",
                f"--user={_os_user()}",
                # One administrator, root@localhost, known by the socket alone; neither
                # anonymous users nor a test database nor anybody over TCP.
                "--auth-root-authentication-method=socket",
                f"--auth-root-socket-user={_os_user()}",
                "--skip-test-db",
                "--skip-name-resolve",
                *_SIZES,
            ],
            log=self.log,
            cwd=self.directory,
        )
        # A user without rights, whose log-in over TCP and TLS proves that the server
        # answers; every start makes it anew, before the first connection is accepted.
        write_private(
            self._init_file,
            "SET sql_log_bin = 0;\nCREATE OR REPLACE USER `health` "
            f"IDENTIFIED BY '{self._health_password}' REQUIRE SSL;\n",
        )

    def _command(self) -> list[str | Path]:
        mariadbd, _ = find_mariadb()
        return [
            mariadbd,
            "--no-defaults",
            # mariadbd refuses to run as root unless it is told to.
            f"--user={_os_user()}",
            f"--datadir={self._data}",
            f"--tmpdir={self.directory}",
            f"--socket={self._socket}",
            f"--pid-file={self.directory / 'mariadb.pid'}",
            f"--init-file={self._init_file}",
            f"--bind-address={self.host}",
            f"--port={self.port}",
            "--skip-name-resolve",
            f"--ssl-ca={self._certificates.ca.absolute()}",
            f"--ssl-cert={self._certificates.server_cert.absolute()}",
            f"--ssl-key={self._certificates.server_key.absolute()}",
            "--tls-version=TLSv1.2,TLSv1.3",
            "--require-secure-transport=ON",
            "--local-infile=OFF",
            "--character-set-server=utf8mb4",
            "--default-time-zone=+00:00",
            *_SIZES,
            *self._durability,
            *self.options,
        ]

    def _answers(self) -> bool:
        try:
            connection = pymysql.connect(
                host=self.host,
                port=self.port,
                user="health",
                password=self._health_password,
                ssl=self.ssl_context(),
                connect_timeout=5,
                read_timeout=5,
            )
        except pymysql.OperationalError:
            return False
        connection.close()
        return True


_SIZES = (
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=32M",
    "--key-buffer-size=1M",
    "--aria-pagecache-buffer-size=8M",
    "--max-connections=200",
    "--performance-schema=OFF",
)
_DURABLE = (
    "--innodb-flush-log-at-trx-commit=1",
    "--sync-binlog=1",
    "--log-bin=binlog",
    "--binlog-format=ROW",
    "--server-id=1",
)
_FAST = ("--innodb-flush-log-at-trx-commit=2", "--skip-log-bin")

#: What Linux allows is 107 and a zero byte, macOS four less.
UNIX_SOCKET_BYTES_MAX = 103


def find_mariadb() -> tuple[Path, Path]:
    """The programs mariadbd and mariadb-install-db; ServiceMissing without them."""
    # Debian keeps servers where a user's PATH does not look.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    installer = shutil.which("mariadb-install-db", path=path)
    # A script that needs this program, which is another package's.
    if shutil.which("my_print_defaults", path=path) is None:
        installer = None
    for name in ("mariadbd", "mysqld"):
        found = shutil.which(name, path=path)
        # MySQL's mysqld is another program: its folder is made in another way.
        if found and installer and b"MariaDB" in output([found, "--version"]):
            return Path(found), Path(installer)
    raise ServiceMissing(f"MariaDB is missing: {INSTALL_MARIADB}")


def _os_user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _checked(name: str) -> str:
    if not _SQL_NAME.fullmatch(name):
        raise ValueError(f"{name!r}: at most 32 of A-Z a-z 0-9 _ -")
    return name


def mariadb_from_environment(env: Mapping[str, str]) -> MariaDb | None:
    """The server that LEDGER_DATABASE_URL names; None when it is not set.

    LEDGER_TLS_CA_FILE must be set, too. The password is the URL's, or the content of
    LEDGER_PASSWORD_FILE. The user needs the right to make databases and users.

    Raises ServiceMissing when what is set can't be used.
    """
    text = env.get("LEDGER_DATABASE_URL")
    if not text:
        return None
    ca = given_file(env, "LEDGER_TLS_CA_FILE", "LEDGER_DATABASE_URL")
    try:
        url = sqlalchemy.make_url(text)
    except sqlalchemy.exc.ArgumentError:
        # Without the cause, which quotes the URL and so the password.
        raise ServiceMissing("LEDGER_DATABASE_URL is not a SQLAlchemy URL") from None
    if url.get_backend_name() not in {"mysql", "mariadb"}:
        raise ServiceMissing("LEDGER_DATABASE_URL names neither MySQL nor MariaDB")
    password = url.password or ""
    if "LEDGER_PASSWORD_FILE" in env:
        password = given_file(env, "LEDGER_PASSWORD_FILE", "").read_text().strip()
    return FoundMariaDb(url, password, ca)
