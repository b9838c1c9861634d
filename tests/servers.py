"""The real servers that tests run against: a given one, or a private one.

Owns the one rule about a missing server: in CI (the variable CI is set) it is a
failure, elsewhere the test is skipped and says why. Must never fall back to a fake.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from certs.make_certs import make_certs
from demo.kafka_broker import KafkaCluster, KafkaServer, kafka_from_environment
from demo.mariadb import MariaDb, MariaDbServer, mariadb_from_environment
from demo.server_process import ServiceMissing

T = TypeVar("T")

#: As the run was given it: tests themselves see none of it.
_ENVIRONMENT = dict(os.environ)


def require(start: Callable[[], T]) -> T:
    """What `start` returns; where a service is missing the test fails or is skipped.

    It fails if the variable CI is set, so that a pipeline can't go green without the
    servers; else it is skipped with the reason.
    """
    try:
        return start()
    except ServiceMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have it: {missing}", pytrace=False)
        pytest.skip(str(missing))


@contextmanager
def private_mariadb(directory: Path, *, fast: bool = True) -> Iterator[MariaDbServer]:
    """A MariaDB of our own in `directory`, which a test may stop, kill and restart."""
    server = MariaDbServer(
        directory / "mariadb", make_certs(directory / "certs", force=True), fast=fast
    )
    require(server.start)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def running_mariadb(directory: Path, *, fast: bool = True) -> Iterator[MariaDb]:
    """The server that LEDGER_DATABASE_URL names, else a private one."""
    found = require(lambda: mariadb_from_environment(_ENVIRONMENT))
    if found is not None:
        yield found
        return
    with private_mariadb(directory, fast=fast) as server:
        yield server


@contextmanager
def private_kafka(
    directory: Path,
    *,
    client_names: Iterable[str] = (),
    expired_client_names: Iterable[str] = (),
) -> Iterator[KafkaServer]:
    """A Kafka of our own in `directory`, which a test may stop, kill and restart.

    Its certificate is for localhost only: 127.0.0.1 is the wrong host name. There is
    one for each client name, too.
    """
    certificates = make_certs(
        directory / "certs",
        hosts=["localhost"],
        client_names=client_names,
        expired_client_names=expired_client_names,
        force=True,
    )
    server = KafkaServer(directory / "kafka", certificates)
    require(server.start)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def running_kafka(directory: Path) -> Iterator[KafkaCluster]:
    """The cluster that KAFKA_BOOTSTRAP_SERVERS names, else a private one."""
    found = require(lambda: kafka_from_environment(_ENVIRONMENT))
    if found is not None:
        yield found
        return
    with private_kafka(directory) as server:
        yield server
