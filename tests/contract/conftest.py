"""The ledgers that must keep the same promises: memory, SQLite, MariaDB."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from function.api_profile import ApiProfile
from function.ledger import Ledger
from function.model import Status
from function.operations import Verdict
from function.rules import Rules
from proof.memory_ledger import MICROS, MemoryLedger
from tests.conftest import Database


class MemoryDatabase(Database):
    """The simulation's ledger, seen and changed as a test does a database's."""

    def __init__(self) -> None:
        """Without an engine: nothing here is SQL."""

    def make_ledger(self, profile: ApiProfile, *, lease_s: float) -> Ledger:
        # Nothing is too young or too much to be decided.
        rules = Rules(0, 10_000)
        ledger = MemoryLedger(profile, lease_s=lease_s, now=_now, rules=rules)
        object.__setattr__(self, "ledger", ledger)
        return ledger

    def rows(self, table: str) -> list[dict[str, object]]:
        ledger: MemoryLedger = vars(self)["ledger"]
        if table == "attempt":
            return [*ledger.attempts]
        if table == "quarantine":
            return [{"raw": each.raw} for each in ledger.quarantined.values()]
        assert table == "topup"
        rows = sorted(ledger.orders.values(), key=lambda row: row.place_in_line)
        return [row.as_columns() for row in rows]

    def change(self, key: str | None = None, **columns: object) -> None:
        ledger: MemoryLedger = vars(self)["ledger"]
        for row in ledger.orders.values():
            if key in {None, row.idempotency_key}:
                for name, value in columns.items():
                    setattr(row, name, _column(name, value))

    def pause(self, scope: str, by: str = "ann", why: str = "test") -> None:
        vars(self)["ledger"].paused[scope] = f"{by}: {why}"

    def resume(self) -> None:
        vars(self)["ledger"].paused.clear()

    def empty(self) -> None:
        vars(self).pop("ledger", None)

    def decide(self, key: str, verdict: Verdict, **how: Any) -> object:
        return vars(self)["ledger"].decide(key, verdict, **how)


def _now() -> int:
    return time.time_ns() // 1000


def _column(name: str, value: object) -> object:
    if name == "status":
        return Status(str(value))
    if name == "api_identity":
        return value
    moment = datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    return round(moment.timestamp() * MICROS)


@pytest.fixture
def memory_database() -> Database:
    """An empty ledger in memory."""
    return MemoryDatabase()


@pytest.fixture(params=["memory", "sqlite", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each kind of ledger, one after the other: the same promises hold on each."""
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found
