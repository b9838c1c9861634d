"""Where the story is played: the broker and the database, embedded or real.

Owns their start, their users and how clients connect; must never let one user do what
another is there for. Embedded: librdkafka's mock cluster in this process and SQLite.
Real: Apache Kafka and MariaDB as processes with TLS and passwords, or servers that
the environment names.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import make_url

from certs.make_certs import make_certs
from demo.kafka_broker import (
    KafkaCluster,
    KafkaServer,
    find_java,
    kafka_from_environment,
)
from demo.mariadb import MariaDb, MariaDbServer, find_mariadb, mariadb_from_environment
from demo.mock_cluster import MockCluster
from demo.server_process import write_private
from demo.strimzi_users import (
    DEAD_LETTER_WRITER,
    PRODUCER,
    SOURCE,
    read_users,
    suffixed,
)
from demo.subject import Database

Config = dict[str, str | int | bool]

PARTITIONS: Final = 4
#: As in manifests/kafka, whose users may use no others.
TOPIC: Final = "topup-requests"
DEAD_LETTER_TOPIC: Final = "topup-dead-letters"
#: librdkafka writes to standard error; of retries it need not tell.
_QUIET: Final[Config] = {"log_level": 3}
#: A broker takes a killed source for dead after so long; the least that one allows
#: whose configuration is not ours, and that ours allows.
_SESSION_MS_FOUND: Final = 6000
_SESSION_MS: Final = 3000


@dataclass(frozen=True)
class Grounds:
    """A broker with its topic, and a database, both ready."""

    #: In words, for the account.
    broker: str
    database_name: str
    topic: str
    dead_letter_topic: str
    producer: Config
    source: Config
    #: Who may write dead letters, and nothing else; None: they stay in a file.
    dead_letter: Config | None
    #: Whether consumer groups work: on the mock cluster they don't reliably.
    attach: Literal["subscribe", "assign"]
    database: Database


def embedded(stack: ExitStack, directory: Path) -> Grounds:
    """All in this process and one file."""
    cluster = stack.enter_context(MockCluster())
    cluster.create_topic(TOPIC)
    config: Config = {"bootstrap.servers": cluster.bootstrap_servers, **_QUIET}
    url = f"sqlite:///{directory / 'ledger.db'}"
    return Grounds(
        broker="librdkafka's mock cluster",
        database_name="SQLite",
        topic=TOPIC,
        dead_letter_topic="",
        producer=config,
        source=config,
        dead_letter=None,
        attach="assign",
        database=Database({"LEDGER_DATABASE_URL": url}, url),
    )


def real(stack: ExitStack, directory: Path) -> Grounds:
    """Apache Kafka and MariaDB: ours, or those that the environment names.

    Raises:
        ServiceMissing: a program is not installed, or a given server can't be used.
        ServerError: a server does not start; names its log.

    """
    # Found ones are used as they are; what is missing is said before anything starts.
    kafka: KafkaCluster | None = kafka_from_environment(os.environ)
    mariadb: MariaDb | None = mariadb_from_environment(os.environ)
    if kafka is None:
        find_java()
    if mariadb is None:
        find_mariadb()
    certificates = make_certs(directory / "certs", force=True)
    is_ours = kafka is None
    # On a given cluster the names may be somebody's, or of an earlier story.
    suffix = "" if is_ours else f".{os.urandom(4).hex()}"
    topic, dead = TOPIC + suffix, DEAD_LETTER_TOPIC + suffix
    if mariadb is None:
        mariadb = stack.enter_context(
            MariaDbServer(directory / "mariadb", certificates)
        )
    if kafka is None:
        kafka = stack.enter_context(KafkaServer(directory / "kafka", certificates))
    for name in (topic, dead):
        kafka.create_topic(name, PARTITIONS)
    for user, acls in read_users().items():
        kafka.create_user(user + suffix, suffixed(acls, suffix))
    return Grounds(
        broker="Apache Kafka over TLS with SCRAM-SHA-512",
        database_name="MariaDB over TLS",
        topic=topic,
        dead_letter_topic=dead,
        producer=_config(kafka, PRODUCER + suffix),
        source={
            **_config(kafka, SOURCE + suffix),
            "session.timeout.ms": _SESSION_MS if is_ours else _SESSION_MS_FOUND,
            "heartbeat.interval.ms": 500,
        },
        dead_letter=_config(kafka, DEAD_LETTER_WRITER + suffix),
        attach="subscribe",
        database=_database(mariadb, directory, f"ledger_{os.urandom(4).hex()}"),
    )


def _config(kafka: KafkaCluster, user: str) -> Config:
    settings = kafka.client_config(user)
    kept = {name: v for name, v in settings.items() if not isinstance(v, float)}
    return {**kept, **_QUIET}


def _database(mariadb: MariaDb, directory: Path, name: str) -> Database:
    url = make_url(mariadb.create_database(name))
    password_file = directory / "ledger-password"
    write_private(password_file, str(url.password))
    bare = url.set(password=None).render_as_string()
    env = {
        "LEDGER_DATABASE_URL": bare,
        "LEDGER_PASSWORD_FILE": str(password_file),
        "LEDGER_TLS_CA_FILE": str(mariadb.ca),
    }
    return Database(env, url.render_as_string(hide_password=False))
