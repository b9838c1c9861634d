"""Real servers for the demo and the tests: a private, secured Apache Kafka and MariaDB.

Owns starting them, ending them by every means that a test needs, and their users. A
server listens on 127.0.0.1 only, demands TLS and a password, keeps everything in the
folder it is given, and never outlives the process that started it. Must never start or
configure a service of the machine, print a password, or be used for real orders.

Reading order: groups of processes, `Server`, MariaDB, Kafka, found servers, the command
line (`python -m demo.services install|check`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import logging
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import click
import pymysql
import sqlalchemy
from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from pymysql.connections import Connection

from certs.make_certs import Certificates

LOOPBACK = "127.0.0.1"
#: Ports are taken below the range from which the kernel gives ports to outgoing
#: connections: such a port can't be taken between a server's death and its restart.
PORTS = range(20_000, 32_000)
LOG_TAIL_LINES = 25
POLL_S = 0.05


class ServiceMissing(Exception):
    """A program or a given server is not there; says which, and how to get it."""


class ServerError(Exception):
    """A server did not start, died, or does not end."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    for port in random.sample(PORTS, k=200):
        with socket.socket() as probe:
            # As servers do: else the remains of closed connections look like a server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port
    raise ServerError(f"no free port on {LOOPBACK} from {PORTS[0]} to {PORTS[-1]}")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first instant on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


class ProcessGroup:
    """A process with all that it starts, which ends when this process ends.

    Even when this process is killed with SIGKILL: the group's leader is a shell that
    waits for the end of a pipe whose other end is only here, and then kills its group.
    The kernel's own PR_SET_PDEATHSIG is not used, because it follows the *thread* that
    started the process (a server started from a pool's thread would die with it), and
    setting it needs code between fork and exec, which can hang where threads run. A
    group of its own also keeps a terminal's Ctrl-C away: we end servers in order. Who
    forks this process without exec holds the pipe open, too, for as long as it lives.
    """

    _GUARD = ("/bin/sh", "-c", "read -r parent_is_gone; kill -KILL 0")

    def __init__(self, command: Sequence[str | Path], *, log: Path, cwd: Path) -> None:
        # The guard is there first: there is no instant at which nobody watches.
        self._guard = subprocess.Popen(
            self._GUARD,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self.id = self._guard.pid
        try:
            with log.open("ab") as out:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    process_group=self.id,
                )
        except BaseException:
            self._end_guard()
            raise

    def terminate(self, timeout_s: float) -> None:
        """End the process by SIGTERM; the whole group by SIGKILL after `timeout_s`."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the whole group by SIGKILL; it is gone when this returns."""
        self._end_guard()
        self.process.wait()

    def _end_guard(self) -> None:
        # As long as the guard is not waited for, its id can't be another group's.
        if self._guard.returncode is None:
            # Where others ended the group, nothing or only a zombie is left to signal.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.id, signal.SIGKILL)
            self._guard.communicate()


def run(command: Sequence[str | Path], *, log: Path, cwd: Path) -> None:
    """Run a command to its end, with its output appended to `log`.

    Raises ServerError with the end of the log when it fails.
    """
    group = ProcessGroup(command, log=log, cwd=cwd)
    try:
        status = group.process.wait()
    finally:
        group.kill()
    if status:
        name = Path(command[0]).name
        raise ServerError(f"{name} ended with status {status}; its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


class Server:
    """A server process with its folder: made ready, started, ended, started again.

    A context manager, which starts it and stops it. Whatever way it ended, `start`
    brings it back on the same port with the same data and the same passwords. A
    subclass says how its folder is made, how it is started, and what proves that it
    answers.
    """

    name: ClassVar[str] = "server"
    start_timeout_s: ClassVar[float] = 60.0
    stop_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.log = self.directory / f"{self.name}.log"
        self._group: ProcessGroup | None = None
        self._is_prepared = False

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises ServiceMissing when a program is not installed, ServerError with the end
        of the log when it dies or does not answer within `start_timeout_s`.
        """
        if self._group is not None:
            raise RuntimeError(f"{self.name} is started already")
        if not self._is_prepared:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            self._prepare()
            self._is_prepared = True
        self._group = ProcessGroup(self._command(), log=self.log, cwd=self.directory)
        try:
            self._wait_until_it_answers(self._group)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL when that takes too long; again: no effect."""
        if self._group is not None:
            self._group.terminate(self.stop_timeout_s)
            self._group = None

    def kill(self) -> None:
        """End it by SIGKILL of its process group, as a crash would."""
        if self._group is not None:
            self._group.kill()
            self._group = None

    def restart(self) -> None:
        """Stop it if it runs, and start it again."""
        self.stop()
        self.start()

    @property
    def process_group_id(self) -> int:
        """The id of the running process group."""
        if self._group is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._group.id

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_it_answers(self, group: ProcessGroup) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while True:
            status = group.process.poll()
            if status is not None:
                raise ServerError(
                    f"{self.name} ended with status {status}; its log:\n"
                    + _tail(self.log)
                )
            if self._answers():
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} does not answer after {self.start_timeout_s:.0f} s; "
                    f"its log:\n{_tail(self.log)}"
                )
            time.sleep(POLL_S)

    def _prepare(self) -> None:
        """Make the folder ready, once, before the first start."""
        raise NotImplementedError

    def _command(self) -> list[str | Path]:
        """What starts the server in the foreground."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether a client gets an answer the way clients do."""
        raise NotImplementedError


# --- MariaDB ---------------------------------------------------------------------

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
    `options` are further options of mariadbd.
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
        self._options = tuple(options)
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
            *self._options,
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
        if found and installer and b"MariaDB" in _output([found, "--version"]):
            return Path(found), Path(installer)
    raise ServiceMissing(f"MariaDB is missing: {INSTALL_MARIADB}")


def _output(command: Sequence[str]) -> bytes:
    asked = subprocess.run(command, capture_output=True, check=False)
    return asked.stdout + asked.stderr


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
    ca = _given_file(env, "LEDGER_TLS_CA_FILE", "LEDGER_DATABASE_URL")
    try:
        url = sqlalchemy.make_url(text)
    except sqlalchemy.exc.ArgumentError:
        # Without the cause, which quotes the URL and so the password.
        raise ServiceMissing("LEDGER_DATABASE_URL is not a SQLAlchemy URL") from None
    if url.get_backend_name() not in {"mysql", "mariadb"}:
        raise ServiceMissing("LEDGER_DATABASE_URL names neither MySQL nor MariaDB")
    password = url.password or ""
    if "LEDGER_PASSWORD_FILE" in env:
        password = _given_file(env, "LEDGER_PASSWORD_FILE", "").read_text().strip()
    return FoundMariaDb(url, password, ca)


# --- Apache Kafka ----------------------------------------------------------------

PROJECT = Path(__file__).resolve().parent.parent
POM = Path(__file__).resolve().parent / "kafka" / "pom.xml"
LOG4J = POM.with_name("log4j2.properties")
JAVA_VERSION_MIN = 17
OR_NAME_A_BROKER = "or name a running broker in KAFKA_BOOTSTRAP_SERVERS"
#: An answer of a broker on this machine that takes longer is a fault.
ADMIN_TIMEOUT_S = 30.0
#: What a user's password costs to check; Kafka's least and its default.
SCRAM_ITERATIONS = 4096
ADMIN = "admin"

#: How a client of confluent_kafka connects.
Config = dict[str, str | int | float | bool]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Acl:
    """One right: an operation on a resource of exactly this name."""

    resource: ResourceType
    name: str
    operation: AclOperation


def producer_acls(topic: str) -> tuple[Acl, ...]:
    """The least rights to write to a topic, idempotently: nothing can be read."""
    return (
        Acl(ResourceType.TOPIC, topic, AclOperation.WRITE),
        Acl(ResourceType.TOPIC, topic, AclOperation.DESCRIBE),
    )


def source_acls(topic: str, group: str) -> tuple[Acl, ...]:
    """The least rights to consume a topic as a group and commit: none to delete it."""
    return (
        Acl(ResourceType.TOPIC, topic, AclOperation.READ),
        Acl(ResourceType.TOPIC, topic, AclOperation.DESCRIBE),
        Acl(ResourceType.GROUP, group, AclOperation.READ),
    )


def dead_letter_acls(topic: str) -> tuple[Acl, ...]:
    """The least rights of who writes dead letters: a producer's, on their topic."""
    return producer_acls(topic)


class KafkaCluster:
    """A Kafka cluster as its clients see it, ours or a found one.

    Configurations are dictionaries for confluent_kafka and contain passwords.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        ca: Path,
        admin: str,
        admin_password: str,
        protocol: str = "SASL_SSL",
        mechanism: str = "SCRAM-SHA-512",
        partitions_default: int = 4,
    ) -> None:
        self.bootstrap_servers = bootstrap_servers
        #: Certificate of the CA that signed the broker's.
        self.ca = ca
        self.partitions_default = partitions_default
        self._admin = admin
        self._protocol = protocol
        self._mechanism = mechanism
        self._passwords = {admin: admin_password}

    def admin_config(self) -> Config:
        """How the administrator connects."""
        return self.client_config(self._admin)

    def client_config(self, user: str) -> Config:
        """How a user connects who was made by `create_user`; KeyError for others."""
        return {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self._protocol,
            "sasl.mechanism": self._mechanism,
            "sasl.username": user,
            "sasl.password": self._passwords[user],
            "ssl.ca.location": str(self.ca),
        }

    def create_topic(self, name: str, partitions: int | None = None) -> None:
        """Make a topic; every partition has its leader when this returns.

        Raises KafkaException where the topic exists, ServerError when it takes longer
        than ADMIN_TIMEOUT_S.
        """
        count = partitions or self.partitions_default
        admin = self._admin_client()
        admin.create_topics([NewTopic(name, num_partitions=count)])[name].result(
            ADMIN_TIMEOUT_S
        )

        def is_led() -> bool:
            topic = admin.list_topics(name, ADMIN_TIMEOUT_S).topics[name]
            leaders = [partition.leader for partition in topic.partitions.values()]
            return len(leaders) == count and min(leaders) >= 0

        _wait_until(is_led, f"topic {name} has no leaders")

    def create_user(self, name: str, acls: Iterable[Acl] = ()) -> None:
        """Make a user with a random password and these rights, and no others.

        The broker knows both when this returns. An existing user gets a new password.
        """
        admin = self._admin_client()
        password = secrets.token_urlsafe(24)
        credential = UserScramCredentialUpsertion(
            name,
            ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS),
            password.encode(),
        )
        admin.alter_user_scram_credentials([credential])[name].result(ADMIN_TIMEOUT_S)
        self._passwords[name] = password
        bindings = {_binding(name, acl) for acl in acls}
        if bindings:
            for future in admin.create_acls(list(bindings)).values():
                future.result(ADMIN_TIMEOUT_S)

        def is_known() -> bool:
            described = admin.describe_acls(_every_acl_of(name))
            return bindings <= set(described.result(ADMIN_TIMEOUT_S))

        _wait_until(is_known, f"the rights of {name} do not arrive")
        _wait_until(lambda: self._lets_in(name), f"{name} is not let in")

    def _lets_in(self, user: str) -> bool:
        return _lists_brokers(self.client_config(user), timeout_s=2)

    def _admin_client(self) -> AdminClient:
        return AdminClient(self.admin_config(), logger=_logger)


def _binding(user: str, acl: Acl) -> AclBinding:
    return AclBinding(
        acl.resource,
        acl.name,
        ResourcePatternType.LITERAL,
        f"User:{user}",
        "*",
        acl.operation,
        AclPermissionType.ALLOW,
    )


def _every_acl_of(user: str) -> AclBindingFilter:
    return AclBindingFilter(
        ResourceType.ANY,
        None,  # type: ignore[arg-type] # None is any name, any host.
        ResourcePatternType.ANY,
        f"User:{user}",
        None,  # type: ignore[arg-type]
        AclOperation.ANY,
        AclPermissionType.ANY,
    )


def _lists_brokers(config: Config, timeout_s: float) -> bool:
    """Whether a client with this configuration gets the cluster's metadata."""
    client = AdminClient(config, logger=_logger)
    try:
        return bool(client.list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False


def _wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + ADMIN_TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise ServerError(f"{otherwise} after {ADMIN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


@dataclasses.dataclass(frozen=True)
class Listener:
    """A port of the broker: who may come in, and how they prove it.

    Another way in (mTLS, say) is another one of these in `KafkaServer._listeners`.
    """

    name: str
    port: int
    protocol: str
    #: Written with `listener.name.<name>.` before each.
    settings: Mapping[str, str]
    #: The controller's is for the broker alone, and so is not told to clients.
    is_advertised: bool = True


class KafkaServer(Server, KafkaCluster):
    """A private Kafka: one node that is broker and controller, with TLS and SCRAM.

    Nobody may do anything that no ACL allows, except the administrator. Topics aren't
    made by themselves. The certificates must be valid for localhost, the name that is
    advertised.
    """

    name = "kafka"

    def __init__(
        self,
        directory: Path,
        certificates: Certificates,
        *,
        partitions_default: int = 4,
    ) -> None:
        Server.__init__(self, directory)
        self._port, self._controller_port = free_port(), free_port()
        self._admin_password = secrets.token_urlsafe(24)
        KafkaCluster.__init__(
            self,
            f"localhost:{self._port}",
            ca=certificates.ca,
            admin=ADMIN,
            admin_password=self._admin_password,
            partitions_default=partitions_default,
        )
        self._certificates = certificates

    def client_config(self, user: str) -> Config:
        """How a user connects who was made by `create_user`; KeyError for others."""
        # We listen on 127.0.0.1 only, and localhost may mean ::1 first. And a test that
        # restarts the broker need not wait for the usual ten seconds.
        return super().client_config(user) | {
            "broker.address.family": "v4",
            "reconnect.backoff.max.ms": "500",
        }

    def _listeners(self) -> tuple[Listener, ...]:
        return (
            Listener(
                "CLIENT",
                self._port,
                "SASL_SSL",
                {
                    "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                    # What the broker itself logs in with, where it is its own client.
                    "scram-sha-512.sasl.jaas.config": _jaas(
                        "scram.ScramLoginModule", self._admin_password
                    ),
                },
            ),
            # The controller can't use SCRAM, whose credentials it would have to know
            # before it has read them. PLAIN over TLS knows its one user, the
            # administrator, from this very file; so nothing of ours is plaintext, and
            # no unknown local user is taken for the broker.
            Listener(
                "CONTROLLER",
                self._controller_port,
                "SASL_SSL",
                {
                    "sasl.enabled.mechanisms": "PLAIN",
                    "plain.sasl.jaas.config": _jaas(
                        "plain.PlainLoginModule",
                        self._admin_password,
                        f'user_{ADMIN}="{self._admin_password}"',
                    ),
                },
                is_advertised=False,
            ),
        )

    def _properties(self) -> dict[str, str]:
        listeners = self._listeners()
        properties = {
            "listeners": ",".join(f"{x.name}://{LOOPBACK}:{x.port}" for x in listeners),
            "advertised.listeners": ",".join(
                f"{x.name}://localhost:{x.port}" for x in listeners if x.is_advertised
            ),
            "listener.security.protocol.map": ",".join(
                f"{x.name}:{x.protocol}" for x in listeners
            ),
            "controller.quorum.voters": f"1@localhost:{self._controller_port}",
            "num.partitions": str(self.partitions_default),
        }
        for listener in listeners:
            prefix = f"listener.name.{listener.name.lower()}."
            properties |= {prefix + k: v for k, v in listener.settings.items()}
        return properties | _PROPERTIES

    def _prepare(self) -> None:
        # Paths in the file are relative: Java would read a non-ASCII folder wrong.
        write_private(
            self.directory / "server.properties",
            "".join(f"{k}={v}\n" for k, v in self._properties().items()),
        )
        write_private(
            self.directory / "keystore.pem",
            self._certificates.server_key.read_text()
            + self._certificates.server_cert.read_text(),
        )
        shutil.copyfile(self.ca, self.directory / "truststore.pem")
        # In a file, because every user of the machine can read a command line.
        arguments = self.directory / "format.args"
        credential = f"SCRAM-SHA-512=[name={ADMIN},password={self._admin_password}]"
        options = {
            "--config": "server.properties",
            # Never one that begins with a dash.
            "--cluster-id": secrets.token_hex(11),
            "--add-scram": credential,
        }
        lines = ["format", *itertools.chain.from_iterable(options.items())]
        write_private(arguments, "\n".join(lines))
        try:
            tool = ["kafka.tools.StorageTool", f"@{arguments.name}"]
            run([*_java(), *tool], log=self.log, cwd=self.directory)
        finally:
            arguments.unlink()

    def _command(self) -> list[str | Path]:
        return [*_java(), "kafka.Kafka", "server.properties"]

    def _answers(self) -> bool:
        # Cheaper than a client, and a client would log each refusal.
        try:
            socket.create_connection((LOOPBACK, self._port), timeout=1).close()
        except OSError:
            return False
        return _lists_brokers(self.admin_config(), timeout_s=2)


_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "log.dirs": "data",
    "inter.broker.listener.name": "CLIENT",
    "controller.listener.names": "CONTROLLER",
    "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
    "sasl.mechanism.controller.protocol": "PLAIN",
    "ssl.keystore.type": "PEM",
    "ssl.keystore.location": "keystore.pem",
    "ssl.truststore.type": "PEM",
    "ssl.truststore.location": "truststore.pem",
    "ssl.enabled.protocols": "TLSv1.3,TLSv1.2",
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "false",
    "super.users": f"User:{ADMIN}",
    "auto.create.topics.enable": "false",
    # There is one node: nothing can be replicated.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # Each partition of these costs files and time at every start, for a few groups.
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # A group starts at once, and a killed consumer is given up within seconds.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # A killed broker comes back only when its former life's session has ended.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # The default for its buffer is a quarter of our heap.
    "log.cleaner.dedupe.buffer.size": "4194304",
    "log.cleaner.io.buffer.size": "65536",
    "num.network.threads": "2",
    "num.io.threads": "4",
}


def _jaas(module: str, password: str, *more: str) -> str:
    options = [f'username="{ADMIN}"', f'password="{password}"', *more]
    prefix = "org.apache.kafka.common.security"
    return f"{prefix}.{module} required {' '.join(options)};"


def _java() -> list[str | Path]:
    """The beginning of a command that runs one of Kafka's classes."""
    return [
        find_java(),
        "-Xmx512m",
        # One small heap on few cores: the least threads, the fastest start.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={LOG4J.as_uri()}",
        "-classpath",
        f"{fetch_kafka()}/*",
    ]


def find_java() -> Path:
    """Java of JAVA_HOME or of PATH; ServiceMissing where it is absent or too old."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    version = 0
    if found is not None:
        match = re.search(rb'version "(\d+)', _output([found, "-version"]))
        version = int(match[1]) if match else 0
    if found is None or version < JAVA_VERSION_MIN:
        raise ServiceMissing(
            f"Java {JAVA_VERSION_MIN} or newer is missing: install "
            f"openjdk-17-jre-headless, {OR_NAME_A_BROKER}"
        )
    return Path(found)


def kafka_version() -> str:
    """The version that demo/kafka/pom.xml pins."""
    match = re.search(r"<kafka\.version>(.+?)</kafka\.version>", POM.read_text())
    if match is None:
        raise ServerError(f"{POM} has no kafka.version")
    return match[1]


def kafka_libs() -> Path | None:
    """The folder with the broker's jars; None until `fetch_kafka` has filled it."""
    libs = PROJECT / "build" / f"kafka-libs-{kafka_version()}"
    marker = libs / "COMPLETE"
    if marker.is_file() and marker.read_text() == _pom_digest():
        return libs
    return None


def fetch_kafka() -> Path:
    """The folder with the broker's jars, which Maven fills at the first call.

    Two processes that call at once fetch once. A fetch that was cut off, or one of
    another pom.xml, is fetched anew. Raises ServiceMissing where Maven is absent or
    reaches no repository.
    """
    build = PROJECT / "build"
    build.mkdir(exist_ok=True)
    with (build / "kafka-libs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        libs = kafka_libs()
        if libs is None:
            libs = build / f"kafka-libs-{kafka_version()}"
            shutil.rmtree(libs, ignore_errors=True)
            libs.mkdir()
            _run_maven(libs)
            (libs / "COMPLETE").write_text(_pom_digest())
    return libs


def _run_maven(libs: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServiceMissing(
            "the Kafka jars are not there, nor is Maven, which fetches them: install "
            f"maven, {OR_NAME_A_BROKER}"
        )
    command: list[str | Path] = [
        maven,
        "-q",
        "-B",
        "-f",
        POM,
        "dependency:copy-dependencies",
    ]
    options = ["-DincludeScope=runtime", f"-DoutputDirectory={libs}"]
    try:
        run([*command, *options], log=libs / "maven.log", cwd=libs)
    except ServerError as error:
        raise ServiceMissing(
            f"the Kafka jars could not be fetched ({libs / 'maven.log'}): try `mvn` by "
            f"hand, {OR_NAME_A_BROKER}"
        ) from error


def _pom_digest() -> str:
    return hashlib.sha256(POM.read_bytes()).hexdigest()


def kafka_from_environment(env: Mapping[str, str]) -> KafkaCluster | None:
    """The cluster that KAFKA_BOOTSTRAP_SERVERS names; None when it is not set.

    KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD_FILE and KAFKA_SSL_CA_FILE must be set,
    too; the user must be allowed to make topics, users and ACLs. Where they aren't set,
    KAFKA_SECURITY_PROTOCOL is SASL_SSL and KAFKA_SASL_MECHANISM is SCRAM-SHA-512.

    Raises ServiceMissing when what is set can't be used.
    """
    servers = env.get("KAFKA_BOOTSTRAP_SERVERS")
    if not servers:
        return None
    user = env.get("KAFKA_SASL_USERNAME")
    if not user:
        raise ServiceMissing(
            "KAFKA_BOOTSTRAP_SERVERS is set, so KAFKA_SASL_USERNAME must be set, too"
        )
    password_file = _given_file(
        env, "KAFKA_SASL_PASSWORD_FILE", "KAFKA_BOOTSTRAP_SERVERS"
    )
    return KafkaCluster(
        servers,
        ca=_given_file(env, "KAFKA_SSL_CA_FILE", "KAFKA_BOOTSTRAP_SERVERS"),
        admin=user,
        admin_password=password_file.read_text().strip(),
        protocol=env.get("KAFKA_SECURITY_PROTOCOL") or "SASL_SSL",
        mechanism=env.get("KAFKA_SASL_MECHANISM") or "SCRAM-SHA-512",
    )


def _given_file(env: Mapping[str, str], name: str, beside: str) -> Path:
    """The file that a variable names; `beside` is the variable that demands it."""
    value = env.get(name)
    if not value:
        raise ServiceMissing(f"{beside} is set, so {name} must be set, too")
    path = Path(value)
    if not path.is_file():
        raise ServiceMissing(f"{name} names a file that is not there: {value}")
    return path


# --- The command line ------------------------------------------------------------


def mariadb_status(env: Mapping[str, str]) -> str:
    """Which MariaDB would be used; ServiceMissing where there is none."""
    if mariadb_from_environment(env) is not None:
        return "the server that LEDGER_DATABASE_URL names"
    return str(find_mariadb()[0])


def kafka_status(env: Mapping[str, str]) -> str:
    """Which Kafka would be used; ServiceMissing where there is none."""
    if kafka_from_environment(env) is not None:
        return "the broker that KAFKA_BOOTSTRAP_SERVERS names"
    java, libs = find_java(), kafka_libs()
    if libs is None:
        raise ServiceMissing(
            "the Kafka jars are not fetched: `python -m demo.services install` does "
            f"it with Maven, {OR_NAME_A_BROKER}"
        )
    return f"{kafka_version()} in {libs}, with {java}"


@click.group()
def main() -> None:
    """Tell or install what the demo and the tests need beside Python."""


@main.command()
def check() -> None:
    """Tell which servers are there; exit with 1 if CI is set and one is missing."""
    _report(os.environ)


@main.command()
def install() -> None:
    """Install what is missing: programs (Debian, as root) and the jars of Kafka.

    Programs only: no service of the machine is made or started. What can't be
    installed is told, and is a failure only where CI is set.
    """
    packages = _missing_packages(os.environ)
    if packages and shutil.which("apt-get") and os.geteuid() == 0:
        _apt_install(packages)
    elif packages:
        click.echo(f"skipped, for it takes Debian and root: {', '.join(packages)}")
    if not os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        try:
            fetch_kafka()
        except ServiceMissing as missing:
            click.echo(f"skipped: {missing}")
    _report(os.environ)


def _report(env: Mapping[str, str]) -> None:
    """One line a server; ends the program with 1 if CI is set and one is missing."""
    is_missing = False
    for name, status in (("MariaDB", mariadb_status), ("Kafka", kafka_status)):
        try:
            click.echo(f"{name}: {status(env)}")
        except ServiceMissing as missing:
            click.echo(f"{name}: {missing}")
            is_missing = True
    if is_missing and env.get("CI"):
        raise SystemExit(1)


def _missing_packages(env: Mapping[str, str]) -> list[str]:
    """Debian's packages that would bring what is missing and not given."""
    packages = []
    if not env.get("LEDGER_DATABASE_URL") and _is_missing(find_mariadb):
        packages += ["mariadb-server-core", "mariadb-client-core"]
    if not env.get("KAFKA_BOOTSTRAP_SERVERS"):
        if _is_missing(find_java):
            packages.append("default-jre-headless")
        if kafka_libs() is None and shutil.which("mvn") is None:
            packages.append("maven")
    return packages


def _is_missing(find: Callable[[], object]) -> bool:
    try:
        find()
    except ServiceMissing:
        return True
    return False


def _apt_install(packages: Sequence[str]) -> None:
    """Install Debian packages; what fails shows in the report that follows."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    # The list of packages is fetched only when the one that is there is too old.
    if subprocess.run(command, env=env, check=False).returncode:
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=False)
        subprocess.run(command, env=env, check=False)


if __name__ == "__main__":
    main()
