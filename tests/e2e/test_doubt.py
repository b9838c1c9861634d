"""Every kind of API with every way to answer, as processes on MariaDB."""

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from demo.book import Book
from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi
from function.migrate import migrate
from function.operations import Operations, Verdict
from function.rules import Rules
from tests.conftest import Database
from tests.e2e.test_resolver import (
    env_of,
    executed,
    post,
    resolver,
    statuses,
    wait_until,
)
from tests.processes import FunctionProcess

#: What one order meets at its first call -> what it must end as, by kind, and how often
#: it is executed. Kinds that aren't named end as the first.
DONE: Final = ("succeeded", 1)
#: Nobody can know, and nothing was executed, or something was: a person's.
PARKED: Final = ("parked", 0)
PARKED_EXECUTED: Final = ("parked", 1)
ENDS: Final[dict[Fault, dict[Kind | None, tuple[str, int]]]] = {
    Fault.NONE: {None: DONE},
    Fault.ACCEPT: {
        None: DONE,
        # Without a look-up nobody learns the end.
        Kind.REPLAY: ("accepted", 1),
        Kind.NONE: ("accepted", 1),
    },
    Fault.ACCEPT_THEN_FAIL: {
        None: ("rejected", 0),
        Kind.REPLAY: ("accepted", 0),
        Kind.NONE: ("accepted", 0),
    },
    Fault.REVERSE_LATER: {None: DONE},
    Fault.REJECT: {None: ("rejected", 0)},
    Fault.RATE_LIMITED: {None: DONE},
    Fault.SAME_CONTENT: {None: DONE},
    Fault.UNAUTHORIZED: {None: DONE},
    Fault.REDIRECT: {None: DONE},
    Fault.EXECUTE_THEN_DROP: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.EXECUTE_THEN_LATE: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.ERROR_AFTER: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.HALF_BODY: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.GARBAGE: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.DRIP: {None: DONE, Kind.NONE: PARKED_EXECUTED},
    Fault.DROP_BEFORE: {None: DONE, Kind.NONE: PARKED},
    Fault.ERROR_BEFORE: {None: DONE, Kind.NONE: PARKED},
    Fault.HANG: {None: DONE, Kind.NONE: PARKED},
}


def deliver(url: str, name: str, msisdn: str, offset: int) -> int:
    """Deliver until the source would stop; returns the last status."""
    end = time.monotonic() + 60
    while (status := post(url, name, msisdn, offset)) in {409, 503}:
        assert time.monotonic() < end, name
        time.sleep(0.1)
    return status


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_ends_each_answer_as_the_table_says(
    mariadb_database: Database, tmp_path: Path, kind: Kind
) -> None:
    """One subscriber an answer, each followed by a good order of the same one."""
    faults = list(ENDS)
    numbers = {fault: f"+39333{position:07}" for position, fault in enumerate(faults)}
    with (
        SandboxRechargeApi(
            kind=kind, book=tmp_path / "book.jsonl", finish_after_s=0.3
        ) as api,
        ThreadPoolExecutor(4) as pool,
    ):
        env = env_of(mariadb_database, api)
        with FunctionProcess(tmp_path, env=env) as function, resolver(tmp_path, env):
            for fault in faults:
                key = f"app:{fault.value}"
                status = 500 if fault.value.startswith("error") else 0
                api.add_faults(Script(fault, key=key, status=status, delay_s=2))

            def play(fault: Fault) -> None:
                offset = faults.index(fault) * 10
                # Others go on: else so many doubts in a row look like an outage.
                well = f"+39334{offset:07}"
                deliver(function.url, f"well-{fault.value}", well, offset + 5)
                deliver(function.url, fault.value, numbers[fault], offset)
                deliver(function.url, f"{fault.value}-next", numbers[fault], offset + 1)

            list(pool.map(play, faults))
            expected = {
                fault.value: ENDS[fault].get(kind, ENDS[fault][None])
                for fault in faults
            }

            wanted = {f"app:{name}": end for name, (end, _) in expected.items()} | {
                # What is held stays so until a person has settled the first.
                f"app:{name}-next": "held" if end == "parked" else "succeeded"
                for name, (end, _) in expected.items()
            }
            wait_for(mariadb_database, wanted)
            # What was accepted is finished by the API in its own time.
            wait_until(
                lambda: sorted(executed(api.book)) == sorted(every_one(expected))
            )

    for fault in set(faults) - {Fault.ACCEPT, Fault.REVERSE_LATER}:
        # What the API only accepted it may finish after the next one.
        line = [e.key for e in api.book.executions() if e.msisdn == numbers[fault]]
        assert line == sorted(line)


def every_one(expected: dict[str, tuple[str, int]]) -> list[str]:
    """Every key that is to be executed: the orders, what follows each, and the well."""
    names = [name for name, (_, times) in expected.items() if times]
    names += [f"{name}-next" for name, (end, _) in expected.items() if end != "parked"]
    names += [f"well-{name}" for name in expected]
    return [f"app:{name}" for name in names]


def wait_for(database: Database, wanted: dict[str, str]) -> None:
    """Wait until the ledger says so; else fail with what it says instead."""
    end = time.monotonic() + 60
    while True:
        found = statuses(database)
        wrong = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
        if not wrong:
            return
        assert time.monotonic() < end, wrong
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_lost_answers_of_an_api_that_cannot_be_asked_end_each_once_in_order(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """Kind `none`, 5 % lost after execution, 2,000 orders, settled by the book."""
    subscribers, orders, lanes = 250, 8, 8
    book = tmp_path / "book.jsonl"
    with SandboxRechargeApi(
        kind=Kind.NONE,
        book=book,
        seed=7,
        fault_rate=0.05,
        faults=(Fault.EXECUTE_THEN_DROP,),
    ) as api:
        env = env_of(mariadb_database, api) | {"RECHARGE_API_SETTLE_S": "2.1"}
        with FunctionProcess(tmp_path, env=env) as function, resolver(tmp_path, env):
            # A lane is a partition: one record after the other.
            def play(lane: int) -> None:
                for step in range(orders):
                    for number in range(lane, subscribers, lanes):
                        msisdn = f"+3933300{number:05}"
                        offset = step * subscribers + number
                        name = f"s{number}n{step}"
                        status = deliver(function.url, name, msisdn, offset)
                        assert status in {200, 424}

            with ThreadPoolExecutor(lanes) as pool:
                list(pool.map(play, range(lanes)))
            assert_visible(mariadb_database, Book(book), subscribers * orders)
            settle_by_book(mariadb_database, Book(book))

    lines: dict[str, list[str]] = defaultdict(list)
    for entry in Book(book).executions():
        lines[entry.msisdn].append(entry.key)
    assert lines == {
        f"+3933300{number:05}": [f"app:s{number}n{step}" for step in range(orders)]
        for number in range(subscribers)
    }


def assert_visible(database: Database, book: Book, orders: int) -> None:
    """No double, none missing: executed, or visibly in doubt or held."""
    executions = book.executions_by_key()
    assert max(map(len, executions.values())) == 1
    found = statuses(database)
    assert len(found) == orders
    assert set(found.values()) <= {"succeeded", "parked", "held"}
    not_executed = set(found) - set(executions)
    assert {found[key] for key in not_executed} <= {"held"}
    parked = [key for key, status in found.items() if status == "parked"]
    # With this seed about 5 % of those that were called.
    assert len(parked) > 20


def settle_by_book(database: Database, book: Book) -> None:
    """A person asks the API's operator about each doubt; the resolver runs the rest."""
    migrate(database.engine, Rules(settle_s=2.1, second_person_above_minor=10_000))
    operations = Operations(database.engine)
    end = time.monotonic() + 240
    while set(statuses(database).values()) != {"succeeded"}:
        assert time.monotonic() < end
        references = {entry.key: entry.reference for entry in book.executions()}
        parked = database.rows("topup")
        for key in [
            str(row["idempotency_key"]) for row in parked if row["status"] == "parked"
        ]:
            # Refused for as long as something of it could still land.
            if age_of(database, key) > 2.1:
                operations.decide(
                    key,
                    Verdict.EXECUTED,
                    reason="asked the API's operator",
                    reference=references[key],
                )
        time.sleep(0.2)


def age_of(database: Database, key: str) -> float:
    with database.engine.connect() as connection:
        return float(
            connection.exec_driver_sql(
                "SELECT TIMESTAMPDIFF(MICROSECOND, sent_at, UTC_TIMESTAMP(6)) / 1e6"
                " FROM topup WHERE idempotency_key = %s",
                (key,),
            ).scalar_one()
        )
