"""The failover keeps its word: what was acknowledged is there, whoever dies."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pymysql
import pytest

from certs.make_certs import make_certs
from proof.semi_sync import SemiSyncPair
from tests.servers import require

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SemiSyncPair]:
    directory = tmp_path_factory.mktemp("pair")
    servers = SemiSyncPair(directory, make_certs(directory / "certs"))
    require(servers.__enter__)
    with servers.root_connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE words")
        cursor.execute("CREATE TABLE words.kept (id BIGINT PRIMARY KEY)")
    yield servers
    servers.__exit__()


class Writers:
    """Threads that write until the primary dies, and what was acknowledged to them."""

    def __init__(self) -> None:
        self.acknowledged: set[int] = set()
        self._next = iter(range(10**9))
        self.enough = threading.Event()

    @contextmanager
    def writing(self, pair: SemiSyncPair) -> Iterator[None]:
        """Return from the block once all of them are cut off."""
        connections = [pair.root_connect("words") for _ in range(4)]
        threads = [
            threading.Thread(target=self._write, args=(each,)) for each in connections
        ]
        self.enough.clear()
        for thread in threads:
            thread.start()
        assert self.enough.wait(30)
        yield
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    def _write(self, connection: pymysql.connections.Connection) -> None:
        written = 0
        try:
            with connection.cursor() as cursor:
                while True:
                    number = next(self._next)
                    cursor.execute("INSERT INTO kept VALUES (%s)", (number,))
                    self.acknowledged.add(number)
                    written += 1
                    if written == 50:
                        self.enough.set()
        except pymysql.MySQLError:
            connection.close()


def rows(pair: SemiSyncPair) -> set[int]:
    with pair.root_connect("words") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM kept")
        return {row[0] for row in cursor.fetchall()}


@pytest.mark.parametrize(
    ("times", "is_frozen"), [(2, False), (1, True)], ids=["killed", "frozen"]
)
def test_every_acknowledged_commit_survives_a_failover(
    pair: SemiSyncPair, *, times: int, is_frozen: bool
) -> None:
    writers, ports = Writers(), [pair.port]

    for _ in range(times):
        with writers.writing(pair):
            pair.fail_over(ports.append, is_frozen=is_frozen)

        assert ports[-1] == pair.port != ports[-2]
        assert writers.acknowledged - rows(pair) == set()
        # The former primary has become an equal: what nobody was promised is cut.
        assert pair.are_equal(["words.kept"])
    empty(pair)


def test_crashed_primary_comes_back_with_every_acknowledged_commit(
    pair: SemiSyncPair,
) -> None:
    writers, port = Writers(), pair.port

    with writers.writing(pair):
        pair.crash_primary()

    assert pair.port == port
    assert writers.acknowledged - rows(pair) == set()
    assert pair.are_equal(["words.kept"])
    empty(pair)


def test_commit_is_not_acknowledged_without_the_replica(pair: SemiSyncPair) -> None:
    pair.replica.pause()
    with pair.root_connect("words") as connection, connection.cursor() as cursor:
        answered = threading.Event()

        def write() -> None:
            cursor.execute("INSERT INTO kept VALUES (-1)")
            answered.set()

        thread = threading.Thread(target=write)
        thread.start()
        assert not answered.wait(2)

        pair.replica.resume()
        assert answered.wait(30)
        thread.join()
    assert -1 in rows(pair)
    empty(pair)


def empty(pair: SemiSyncPair) -> None:
    with pair.root_connect("words") as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM kept")
