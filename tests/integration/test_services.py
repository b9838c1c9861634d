"""The real servers keep what they promise: TLS, log-in, rights, crash, and no orphans.

Every refusal has its twin, the same client with the one right thing instead of the
wrong one: a server that refuses everybody would pass otherwise.
"""

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pymysql
import pytest
import sqlalchemy
from click.testing import CliRunner
from confluent_kafka import KafkaError, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclOperation,
    ResourceType,
)
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certs.make_certs import main as make_certs_command
from certs.make_certs import make_certs
from demo import kafka_broker, services
from demo.kafka_broker import Acl, Config, KafkaServer
from demo.mariadb import MariaDbServer, find_mariadb, mariadb_from_environment
from demo.server_process import PROJECT, ProcessGroup, ServerError, ServiceMissing
from tests.kafka_clients import DEADLINE_S, Reader, is_let_in, produce, refusals
from tests.servers import private_kafka, private_mariadb, require

TOPIC = "topups"
GROUP = "topup-source"


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not after {DEADLINE_S:.0f} s"
        time.sleep(0.02)


def living(group: int) -> list[int]:
    """The processes of a group; a zombie is dead and waits for its parent only."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may contain blanks; then: state, ppid, pgrp.
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(entry.parent.name))
    return found


def is_stopped(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"
)


# --- certificates ----------------------------------------------------------------


def test_private_keys_are_pkcs8_and_only_their_owners(tmp_path: Path) -> None:
    made = make_certs(tmp_path / "certs", client_names=["a", "b"])

    assert stat.S_IMODE((tmp_path / "certs").stat().st_mode) == 0o700
    for key in (made.server_key, made.clients["a"][1], made.clients["b"][1]):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.read_text().startswith("-----BEGIN PRIVATE " + "KEY-----")
        load_pem_private_key(key.read_bytes(), password=None)


def test_certificates_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first = make_certs(tmp_path).ca.read_bytes()

    with pytest.raises(FileExistsError, match=r"ca\.pem"):
        make_certs(tmp_path)

    assert (tmp_path / "ca.pem").read_bytes() == first
    assert make_certs(tmp_path, force=True).ca.read_bytes() != first


def test_certificates_from_the_command_line(tmp_path: Path) -> None:
    arguments = [
        str(tmp_path / "new"),
        "--client",
        "topup-source",
        "--host",
        "db.local",
    ]

    first = CliRunner().invoke(make_certs_command, arguments)
    second = CliRunner().invoke(make_certs_command, arguments)

    assert first.exit_code == 0
    assert (tmp_path / "new" / "client-topup-source.pem").is_file()
    assert second.exit_code == 1
    assert "--force" in second.output


@pytest.mark.parametrize("name", ["", "../ca", "a/b", ".hidden", "ü"])
def test_a_clients_name_that_is_no_file_name_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="client name"):
        make_certs(tmp_path / "certs", client_names=[name])
    assert not (tmp_path / "certs").exists()


# --- processes -------------------------------------------------------------------


@needs_proc
def test_a_process_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path,
) -> None:
    script = "trap '' TERM; sleep 1000 & sleep 1000; echo never"
    group = ProcessGroup(["/bin/sh", "-c", script], log=tmp_path / "log", cwd=tmp_path)
    # The guard, the shell and its two children.
    wait_until(lambda: len(living(group.id)) == 4, "the children run")

    group.terminate(timeout_s=0.1)

    wait_until(lambda: not living(group.id), "the group is gone")


@needs_proc
def test_a_process_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    groups: list[ProcessGroup] = []

    def start() -> None:
        command = ["/bin/sleep", "1000"]
        groups.append(ProcessGroup(command, log=tmp_path / "log", cwd=tmp_path))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            groups[0].process.wait(0.3)
    finally:
        groups[0].kill()


@needs_proc
def test_a_paused_process_goes_on_when_it_is_resumed(tmp_path: Path) -> None:
    # One that starts nobody: a parent that waits for a stopped vfork is not "stopped".
    script = "import time\nwhile True: print('tick', flush=True); time.sleep(0.01)"
    log = tmp_path / "log"
    group = ProcessGroup([sys.executable, "-c", script], log=log, cwd=tmp_path)
    try:
        wait_until(lambda: log.stat().st_size > 0, "it ticks")
        group.pause()
        # What was under way has ended.
        wait_until(lambda: is_stopped(group.process.pid), "it stands still")
        ticks = log.stat().st_size
        time.sleep(0.2)
        assert log.stat().st_size == ticks

        group.resume()

        wait_until(lambda: log.stat().st_size > ticks, "it ticks again")
    finally:
        group.kill()


_PARENT_OF_PAUSED = """
import sys, time
from pathlib import Path
from demo.server_process import ProcessGroup

folder = Path(sys.argv[1])
# As servers do, which take it for an order to read their files again.
script = "trap '' HUP; echo deaf; sleep 1000"
group = ProcessGroup(["/bin/sh", "-c", script], log=folder / "log", cwd=folder)
while "deaf" not in (folder / "log").read_text():
    time.sleep(0.01)
group.pause()
print(group.id, flush=True)
time.sleep(1000)
"""


@needs_proc
def test_a_paused_process_dies_with_its_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT_OF_PAUSED, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=PROJECT
    ) as parent:
        try:
            assert parent.stdout is not None
            group = int(parent.stdout.readline())
            assert len(living(group)) > 1
        finally:
            parent.kill()

    wait_until(lambda: not living(group), "the paused process is gone")


_PARENT = """
import sys, time
from pathlib import Path
from demo.mariadb import MariaDbServer
from certs.make_certs import make_certs

folder = Path(sys.argv[1])
server = MariaDbServer(folder / "db", make_certs(folder / "certs"), fast=True)
server.start()
print(server.process_group_id, server.port, flush=True)
time.sleep(1000)
"""


@needs_proc
def test_a_server_dies_with_its_killed_parent(tmp_path: Path) -> None:
    require(find_mariadb)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    with parent:
        try:
            assert parent.stdout is not None
            group, port = map(int, parent.stdout.readline().split())
            assert len(living(group)) == 2
            assert listens(port)
        finally:
            parent.kill()

    wait_until(lambda: not living(group), "the server is gone")
    # A zombie's threads may still be at their end, and hold the port until then.
    wait_until(lambda: not listens(port), "the port is free")


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    require(find_mariadb)
    server = MariaDbServer(
        tmp_path / "db", make_certs(tmp_path / "certs"), options=["--no-such-option"]
    )

    with pytest.raises(ServerError, match="no-such-option"):
        server.start()


# --- missing and given servers ---------------------------------------------------


def _missing() -> None:
    raise ServiceMissing("it is missing: install it")


def test_a_missing_server_skips_a_test_on_a_laptop_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="it is missing: install it"):
        require(_missing)


def test_a_missing_server_fails_a_test_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="it is missing: install it"):
        require(_missing)


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_the_check_is_a_failure_only_in_ci(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ci: str, status: int
) -> None:
    for name in ("LEDGER_DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    told = CliRunner().invoke(services.main, ["check"])

    assert told.exit_code == status
    assert "Kafka: Java 17 or newer is missing" in told.output


def test_programs_that_build_and_run_the_image_are_told_when_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    told = CliRunner().invoke(services.main, ["check"])

    assert "Image: podman, runc, mmdebstrap missing" in told.output


def test_jars_without_the_marker_of_a_whole_fetch_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    libs = tmp_path / "build" / f"kafka-libs-{kafka_broker.kafka_version()}"
    libs.mkdir(parents=True)
    (libs / "kafka_2.13.jar").write_text("half a download")
    monkeypatch.setattr(kafka_broker, "PROJECT", tmp_path)
    monkeypatch.setenv("PATH", "")

    assert kafka_broker.kafka_libs() is None
    with pytest.raises(ServiceMissing, match="install maven"):
        kafka_broker.fetch_kafka()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, "LEDGER_TLS_CA_FILE must be set"),
        ({"LEDGER_TLS_CA_FILE": "/nowhere/ca.pem"}, "LEDGER_TLS_CA_FILE names a file"),
    ],
)
def test_a_given_database_without_its_ca_is_refused(
    env: dict[str, str], named: str
) -> None:
    given = {"LEDGER_DATABASE_URL": "mysql+pymysql://u:secret@db/ledger"} | env
    with pytest.raises(ServiceMissing, match=named) as refused:
        mariadb_from_environment(given)
    assert "secret" not in str(refused.value)


def test_nothing_given_is_nothing_found() -> None:
    assert mariadb_from_environment({}) is None
    assert kafka_broker.kafka_from_environment({}) is None


# --- MariaDB ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDbServer]:
    with private_mariadb(tmp_path_factory.mktemp("mariadb"), fast=False) as server:
        yield server


@pytest.fixture(scope="session")
def wrong_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certs(tmp_path_factory.mktemp("wrong-ca")).ca


@pytest.fixture(scope="session")
def shop(mariadb: MariaDbServer) -> sqlalchemy.URL:
    """The URL of a database with one empty table."""
    url = sqlalchemy.make_url(mariadb.create_database("shop"))
    with mariadb.root_connect("shop") as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE orders (id INT PRIMARY KEY) ENGINE=InnoDB")
    return url


def log_in(url: sqlalchemy.URL, ca: Path, host: str = "127.0.0.1") -> str:
    """The version of TLS with which an engine of this URL is let in."""
    context = ssl.create_default_context(cafile=ca)
    engine = sqlalchemy.create_engine(
        url.set(host=host), connect_args={"ssl": context}, poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as connection:
        row = connection.execute(sqlalchemy.text("SHOW STATUS LIKE 'Ssl_version'"))
        return str(row.one()[1])


def test_a_client_with_the_right_ca_is_let_in(
    mariadb: MariaDbServer, shop: sqlalchemy.URL
) -> None:
    assert log_in(shop, mariadb.ca) == "TLSv1.3"


def test_a_client_with_the_wrong_ca_goes_away(
    wrong_ca: Path, shop: sqlalchemy.URL
) -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError, match="CERTIFICATE_VERIFY"):
        log_in(shop, wrong_ca)


def test_a_client_that_expects_another_host_goes_away(tmp_path: Path) -> None:
    server = MariaDbServer(
        tmp_path / "db", make_certs(tmp_path / "certs", hosts=["127.0.0.1"]), fast=True
    )
    with server:
        url = sqlalchemy.make_url(server.create_database("shop"))

        assert log_in(url, server.ca, host="127.0.0.1") == "TLSv1.3"
        with pytest.raises(sqlalchemy.exc.OperationalError, match="Hostname mismatch"):
            log_in(url, server.ca, host="localhost")


def test_a_client_without_tls_is_refused(mariadb: MariaDbServer) -> None:
    """Whoever it is: this user, unlike ours, need not use TLS of itself."""

    def set_up(statement: str) -> None:
        with mariadb.root_connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def connect_without_tls() -> None:
        pymysql.connect(
            host=mariadb.host,
            port=mariadb.port,
            user="careless",
            password="in-the-clear",
            ssl_disabled=True,
        ).close()

    set_up("CREATE USER careless IDENTIFIED BY 'in-the-clear'")

    with pytest.raises(pymysql.OperationalError, match="Access denied"):
        connect_without_tls()

    # The server's message is the same for a wrong password: the twin shows the reason.
    set_up("SET GLOBAL require_secure_transport = OFF")
    try:
        connect_without_tls()
    finally:
        set_up("SET GLOBAL require_secure_transport = ON")


@pytest.mark.parametrize("user", ["root", "", "nobody"])
def test_nobody_comes_in_over_tcp_without_a_password(
    mariadb: MariaDbServer, user: str
) -> None:
    with pytest.raises(pymysql.OperationalError, match="Access denied"):
        pymysql.connect(
            host=mariadb.host, port=mariadb.port, user=user, ssl=mariadb.ssl_context()
        )


def test_a_user_may_do_what_was_granted_and_no_more(
    mariadb: MariaDbServer, shop: sqlalchemy.URL
) -> None:
    mariadb.create_user("clerk", "of-the-shop", ["SELECT ON `shop`.`orders`"])
    with (
        pymysql.connect(
            host=mariadb.host,
            port=mariadb.port,
            user="clerk",
            password="of-the-shop",
            database=shop.database,
            ssl=mariadb.ssl_context(),
        ) as connection,
        connection.cursor() as cursor,
    ):
        assert cursor.execute("SELECT * FROM orders WHERE id < 0") == 0
        with pytest.raises(pymysql.OperationalError, match="INSERT command denied"):
            cursor.execute("INSERT INTO orders VALUES (1)")


def test_names_that_would_be_sql_are_refused(mariadb: MariaDbServer) -> None:
    with pytest.raises(ValueError, match="at most 32"):
        mariadb.create_database("x` CHARACTER SET latin1; --")


def test_the_default_is_durable(mariadb: MariaDbServer) -> None:
    wanted = {
        "innodb_flush_log_at_trx_commit": "1",
        "log_bin": "ON",
        "require_secure_transport": "ON",
        "sync_binlog": "1",
    }
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("SHOW GLOBAL VARIABLES")
        values = dict(cursor.fetchall())
    assert {name: values[name] for name in wanted} == wanted


def test_a_killed_database_keeps_what_was_committed_and_nothing_else(
    mariadb: MariaDbServer, shop: sqlalchemy.URL
) -> None:
    with mariadb.root_connect("shop") as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM orders")
        cursor.executemany("INSERT INTO orders VALUES (%s)", [(1,), (2,)])
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO orders VALUES (3)")

        mariadb.kill()
        with pytest.raises(pymysql.OperationalError):
            cursor.execute("COMMIT")
    mariadb.start()

    assert log_in(shop, mariadb.ca) == "TLSv1.3"
    with mariadb.root_connect("shop") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM orders ORDER BY id")
        assert cursor.fetchall() == ((1,), (2,))


@needs_proc
def test_a_stopped_database_leaves_no_process(mariadb: MariaDbServer) -> None:
    group = mariadb.process_group_id
    assert len(living(group)) == 2

    mariadb.stop()

    assert not living(group)
    mariadb.start()


def test_a_given_database_serves_like_a_private_one(
    mariadb: MariaDbServer, tmp_path: Path
) -> None:
    mariadb.create_user("dba", "of-the-house", ["ALL ON *.*"])
    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("GRANT GRANT OPTION ON *.* TO dba")
    (tmp_path / "password").write_text("of-the-house\n")

    found = mariadb_from_environment(
        {
            "LEDGER_DATABASE_URL": f"mysql+pymysql://dba@127.0.0.1:{mariadb.port}/x",
            "LEDGER_PASSWORD_FILE": str(tmp_path / "password"),
            "LEDGER_TLS_CA_FILE": str(mariadb.ca),
        }
    )

    assert found is not None
    url = sqlalchemy.make_url(found.create_database("found"))
    assert log_in(url, found.ca) == "TLSv1.3"


def test_a_server_that_somebody_else_killed_can_be_restarted(
    mariadb: MariaDbServer,
) -> None:
    os.killpg(mariadb.process_group_id, signal.SIGKILL)

    mariadb.restart()

    with mariadb.root_connect() as connection, connection.cursor() as cursor:
        assert cursor.execute("SELECT 1") == 1


# --- Kafka -----------------------------------------------------------------------


def may_write(topic: str) -> Acl:
    return Acl(ResourceType.TOPIC, topic, AclOperation.WRITE)


def may_read(topic: str, group: str) -> list[Acl]:
    return [
        Acl(ResourceType.TOPIC, topic, AclOperation.READ),
        Acl(ResourceType.GROUP, group, AclOperation.READ),
    ]


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with private_kafka(tmp_path_factory.mktemp("kafka")) as server:
        server.create_topic(TOPIC)
        server.create_user("producer", [may_write(TOPIC)])
        server.create_user("source", may_read(TOPIC, GROUP))
        yield server


def test_a_user_with_the_password_and_the_ca_is_let_in(kafka: KafkaServer) -> None:
    assert is_let_in(kafka.client_config("producer"))


def test_a_user_with_a_wrong_password_is_refused(kafka: KafkaServer) -> None:
    wrong: Config = {"sasl.password": "guessed"}
    codes = refusals(kafka.client_config("producer") | wrong)
    assert KafkaError._AUTHENTICATION in codes


def test_another_mechanism_than_scram_sha_512_is_refused(kafka: KafkaServer) -> None:
    wrong: Config = {"sasl.mechanism": "PLAIN"}
    codes = refusals(kafka.admin_config() | wrong)
    assert KafkaError._AUTHENTICATION in codes


def test_a_client_with_a_wrong_ca_goes_from_the_broker(
    kafka: KafkaServer, wrong_ca: Path
) -> None:
    wrong: Config = {"ssl.ca.location": str(wrong_ca)}
    assert KafkaError._SSL in refusals(kafka.client_config("producer") | wrong)


def test_a_client_that_expects_another_host_goes_from_the_broker(
    kafka: KafkaServer,
) -> None:
    port = kafka.bootstrap_servers.partition(":")[2]
    wrong: Config = {"bootstrap.servers": f"127.0.0.1:{port}"}
    assert KafkaError._SSL in refusals(kafka.client_config("producer") | wrong)


def test_the_controller_lets_no_unknown_user_in(kafka: KafkaServer) -> None:
    controller: Config = {"bootstrap.servers": f"localhost:{kafka._controller_port}"}
    plain: Config = {"sasl.mechanism": "PLAIN", "sasl.password": "guessed"}
    codes = refusals(kafka.client_config("producer") | controller | plain)
    assert KafkaError._AUTHENTICATION in codes


def test_a_record_goes_from_the_producer_to_the_source_which_commits(
    kafka: KafkaServer,
) -> None:
    sent = {f"order-{number}" for number in range(20)}
    assert produce(kafka.client_config("producer"), TOPIC, *sent) is None

    with Reader(kafka.client_config("source"), GROUP) as reader:
        reader.consumer.subscribe([TOPIC])
        assert sent <= reader.read(20)
        reader.consumer.commit(asynchronous=False)
        partitions = [TopicPartition(TOPIC, number) for number in range(4)]
        committed = reader.consumer.committed(partitions, timeout=DEADLINE_S)

    assert sum(max(partition.offset, 0) for partition in committed) == 20


def test_a_topic_does_not_make_itself(kafka: KafkaServer) -> None:
    willing: Config = {"allow.auto.create.topics": True}
    with Reader(kafka.admin_config() | willing, GROUP) as reader:
        reader.consumer.subscribe(["never-made"])
        assert reader.refusal() == KafkaError.UNKNOWN_TOPIC_OR_PART


@needs_proc
def test_secrets_are_in_private_files_only(kafka: KafkaServer) -> None:
    password = str(kafka.admin_config()["sasl.password"])

    holders = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in kafka.directory.iterdir()
        if path.is_file() and password in path.read_text(errors="replace")
    }
    command_lines = [
        Path(f"/proc/{process}/cmdline").read_text()
        for process in living(kafka.process_group_id)
    ]

    assert holders == {"server.properties": 0o600}
    assert stat.S_IMODE(kafka.directory.stat().st_mode) == 0o700
    assert not [line for line in command_lines if password in line]


@pytest.mark.slow
def test_a_killed_broker_keeps_its_records_users_and_rights(kafka: KafkaServer) -> None:
    kafka.create_topic("kept")
    kafka.create_user("keeper", [may_write("kept")])
    kafka.create_user("reader", may_read("kept", "readers"))
    sent = {f"kept-{number}" for number in range(100)}
    assert produce(kafka.client_config("keeper"), "kept", *sent) is None

    kafka.kill()
    assert not listens(kafka._port)
    kafka.start()

    with Reader(kafka.client_config("reader"), "readers") as reader:
        reader.consumer.subscribe(["kept"])
        assert reader.read(100) == sent
    assert produce(kafka.client_config("keeper"), "kept", "after") is None


@pytest.mark.slow
@needs_proc
def test_a_stopped_broker_leaves_no_process(kafka: KafkaServer) -> None:
    group = kafka.process_group_id
    assert len(living(group)) == 2

    kafka.stop()

    assert not living(group)
    kafka.start()


def test_a_given_broker_serves_like_a_private_one(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(f"{kafka.admin_config()['sasl.password']}\n")

    found = kafka_broker.kafka_from_environment(
        {
            "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "KAFKA_SASL_USERNAME": "admin",
            "KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "password"),
            "KAFKA_SSL_CA_FILE": str(kafka.ca),
        }
    )

    assert found is not None
    found.create_topic("found", partitions=2)
    found.create_user("finder", [may_write("found")])
    assert produce(found.client_config("finder"), "found", "x") is None
