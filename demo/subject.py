"""Who is on trial: the function, or the article's naive handler, and its ledger.

Owns how either is started and how its ledger is read; must never write to a ledger
beyond migrating an empty one. The scenes and the judge are the same for both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from sqlalchemy import create_engine, text

from demo.judge import LedgerView, Sent, place_in_topic, place_of_bytes
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate
from function.rules import rules_of

GROUP: Final = "topup-source"

#: Short, so that the story is short; in the order that the function checks at start
#: (README, Settings). A lease of 3 s is what a killed pod costs its subscriber.
DEADLINES: Final = {
    "LEDGER_TIMEOUT_S": "2",
    "RECHARGE_API_TIMEOUT_S": "1.5",
    "RECHARGE_API_DEADLINE_S": "2",
    "LEDGER_LEASE_MARGIN_S": "1",
    "RECHARGE_API_SETTLE_S": "3.5",
    "EVENT_DELIVERY_TIMEOUT_S": "5",
    "EVENT_READ_TIMEOUT_S": "2",
    "EVENT_REDELIVERY_MAX_S": "10",
    "RESOLVER_INTERVAL_S": "0.5",
    "SERVER_REQUEST_TIMEOUT_S": "8",
    "SERVER_GRACEFUL_TIMEOUT_S": "5",
    "SERVER_TERMINATION_GRACE_S": "8",
}


@dataclass(frozen=True, slots=True)
class Database:
    """Where the ledger is.

    Args:
        env: the settings by which the function reaches it, and others that are to
            differ from `DEADLINES`.
        url: the URL for a client that takes no password file.

    """

    env: Mapping[str, str]
    url: str


class Subject(Protocol):
    """What the stage needs of either."""

    is_naive: bool
    source_with_crash_points: str
    signature: str

    def env(self, api_url: str, kind: str) -> dict[str, str]:
        """Its settings, for a recharge API of this kind at this address."""

    def prepare(self) -> None:
        """Make its ledger ready, empty."""

    def view(self) -> LedgerView:
        """What a person who opens the ledger sees."""

    def says_of(self, sent: Sent) -> str:
        """What the ledger says of one order now, in a word or two."""

    def names(self, sent: Iterable[Sent]) -> dict[str, str]:
        """What the API is given as the key -> the order's own key."""


class Function:
    """The function of this project."""

    is_naive = False
    source_with_crash_points = "demo/crash_points.py"
    signature = "http"

    def __init__(self, database: Database) -> None:
        self._env = dict(database.env)
        settings = {**DEADLINES, **self._env, "RECHARGE_API_URL": "http://127.0.0.1:9"}
        self._settings = Settings.from_env(settings)
        self._engine = make_engine(self._settings)

    def env(self, api_url: str, kind: str) -> dict[str, str]:
        """Its settings, for a recharge API of this kind at this address."""
        return {
            **DEADLINES,
            **self._env,
            "RECHARGE_API_URL": api_url,
            # Each process may reach it at another address.
            "RECHARGE_API_IDENTITY": "sandbox",
            "RECHARGE_API_KIND": kind,
        }

    def prepare(self) -> None:
        """Migrate the empty ledger, as the Job of a deployment does."""
        migrate(self._engine, rules_of(self._settings))

    def view(self) -> LedgerView:
        """Every order's status, and the places of what is in quarantine."""
        with self._engine.connect() as connection:
            orders = connection.execute(
                text("SELECT idempotency_key, status FROM topup")
            ).all()
            refused = connection.execute(
                text(
                    "SELECT topic, kafka_partition, kafka_offset, raw, announced_bytes "
                    "FROM quarantine"
                )
            ).all()
        places = [
            place_of_bytes(bytes(raw), size)
            if topic is None
            else place_in_topic(topic, partition, offset)
            for topic, partition, offset, raw, size in refused
        ]
        return LedgerView(
            {row.idempotency_key: row.status for row in orders}, frozenset(places)
        )

    def says_of(self, sent: Sent) -> str:
        """The order's status; of a refused record, whether quarantine has it."""
        if sent.expected == "refused":
            is_kept = sent.place in self.view().quarantined
            return "in quarantine" if is_kept else "nothing"
        with self._engine.connect() as connection:
            status = connection.scalar(
                text("SELECT status FROM topup WHERE idempotency_key = :key"),
                {"key": sent.key},
            )
        return "nothing" if status is None else str(status).replace("_", " ")

    def names(self, sent: Iterable[Sent]) -> dict[str, str]:
        """The API is given the idempotency key itself."""
        return {each.key: each.key for each in sent if each.key is not None}


class Naive:
    """The article's own design; see demo/naive.py."""

    is_naive = True
    source_with_crash_points = "demo/naive_crash_point.py"
    signature = "cloudevent"

    def __init__(self, database: Database) -> None:
        self._database = database
        ca = database.env.get("LEDGER_TLS_CA_FILE")
        arguments = {"ssl": {"ca": ca}} if ca else {}
        self._engine = create_engine(database.url, connect_args=arguments)

    def env(self, api_url: str, kind: str) -> dict[str, str]:  # noqa: ARG002
        """Its settings; of the API's kind it knows nothing."""
        return {
            **self._database.env,
            "LEDGER_DATABASE_URL": self._database.url,
            "RECHARGE_API_URL": api_url,
            "GROUP": GROUP,
        }

    def prepare(self) -> None:
        """Do nothing: it makes its table itself, at its first start."""

    def view(self) -> LedgerView:
        """Nothing that a person could read an order from: keys are offsets."""
        return LedgerView({})

    def says_of(self, sent: Sent) -> str:
        """Whether the record's offset was committed as processed."""
        with self._engine.connect() as connection:
            found = connection.scalar(
                text("SELECT id FROM processed WHERE id = :id"),
                {"id": _offset_key(sent)},
            )
        return "nothing" if found is None else "processed"

    def names(self, sent: Iterable[Sent]) -> dict[str, str]:
        """The keys of the offsets, and whose they are."""
        return {_offset_key(each): each.key or each.place for each in sent}


def _offset_key(sent: Sent) -> str:
    return "#".join([GROUP, sent.topic, str(sent.partition), str(sent.offset)])
