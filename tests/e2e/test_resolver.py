"""The resolver as a process, killed and raced, on MariaDB and a real recharge API."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import requests

from demo.book import Book
from demo.faults import Fault, Script
from demo.processes import Part
from demo.recharge_api import Kind, SandboxRechargeApi
from tests.conftest import Database
from tests.orders import data, headers
from tests.processes import DEADLINE_S, FunctionProcess, function_env

DEADLINES = {
    "ledger_lease_margin_s": 0.5,
    "ledger_timeout_s": 1,
    "recharge_api_timeout_s": 1,
    "recharge_api_deadline_s": 1.5,
    "recharge_api_settle_s": 2.5,
    "resolver_interval_s": 0.1,
    "event_redelivery_max_s": 3,
}
#: What the resolver passes while it brings one order on (demo/crash_points.py).
POINTS = ("claim_unsent", "claim_committed", "call_unsent", "answer_arrived")
LAST_POINT = "settlement_committed"
A = "+393331234567"
B = "+393331234568"


def env_of(database: Database, api: SandboxRechargeApi) -> dict[str, str]:
    url = database.env["LEDGER_DATABASE_URL"]
    env = function_env(url, api.url, recharge_api_kind=api.kind.value, **DEADLINES)
    return env | database.env


@contextmanager
def resolver(
    directory: Path, env: dict[str, str], name: str = "resolver"
) -> Iterator[Part]:
    with Part(name, directory / f"{name}.log") as part:
        start_resolver(part, env)
        yield part


def start_resolver(part: Part, env: dict[str, str]) -> None:
    module = "demo.crash_points" if "CRASH_FILE" in env else "function.cli"
    part.run([sys.executable, "-m", module, "resolver", "run"], env)


def wait_until(is_so: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def post(url: str, name: str, msisdn: str = A, offset: int | None = None) -> int:
    answer = requests.post(
        url,
        json=data(name, msisdn=msisdn),
        headers=headers(offset=offset),
        timeout=30,
    )
    return answer.status_code


def statuses(database: Database) -> dict[str, object]:
    return {
        str(row["idempotency_key"]): row["status"] for row in database.rows("topup")
    }


def executed(book: Book) -> list[str]:
    return [entry.key for entry in book.executions()]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", [Kind.REPLAY, Kind.REFUSE])
@pytest.mark.parametrize("point", [*POINTS, LAST_POINT])
def test_resolver_killed_at_a_boundary_leaves_order_and_one_execution(
    mariadb_database: Database, tmp_path: Path, kind: Kind, point: str
) -> None:
    """Parked, two held behind it; the resolver dies in the middle of the release."""
    crash_file = tmp_path / "crash"
    with SandboxRechargeApi(kind=kind, book=tmp_path / "book.jsonl") as api:
        env = env_of(mariadb_database, api)
        with FunctionProcess(tmp_path, env=env) as function:
            # For `replay` the second send would end it at once.
            api.add_faults(Script(Fault.EXECUTE_THEN_DROP, key="app:r1"))
            api.add_faults(Script(Fault.DROP_BEFORE, key="app:r1"))
            api.add_faults(Script(Fault.ERROR_BEFORE, on="lookup", times=1))
            assert post(function.url, "r1", offset=1) == 424
            assert post(function.url, "r2", offset=2) == 424
            assert post(function.url, "r3", offset=3) == 424
        # A look-up sends nothing, so only what is run from the line passes all points.
        crash_file.write_text(point)
        armed = env | {"CRASH_FILE": str(crash_file)}
        with resolver(tmp_path, armed) as part:
            part.wait_until_dead(DEADLINE_S)
            assert not crash_file.exists()
            start_resolver(part, armed)
            wait_until(
                lambda: set(statuses(mariadb_database).values()) == {"succeeded"}
            )

    assert executed(api.book) == ["app:r1", "app:r2", "app:r3"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_resolvers_and_two_pods_race_and_keep_every_line(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """300 subscribers, each with a lost answer and three more orders behind it.

    Two others are answered before each, or the pods would take it for an outage.
    """
    rounds, behind, others = 300, 3, 2
    with (
        SandboxRechargeApi(kind=Kind.REFUSE, book=tmp_path / "book.jsonl") as api,
        ThreadPoolExecutor(8) as pool,
    ):
        env = env_of(mariadb_database, api)
        with (
            FunctionProcess(tmp_path, env=env) as one,
            FunctionProcess(tmp_path, env=env) as other,
            resolver(tmp_path, env, "resolver-1"),
            resolver(tmp_path, env, "resolver-2"),
        ):
            for number in range(rounds):
                api.add_faults(
                    Script(Fault.EXECUTE_THEN_DROP, key=f"app:s{number}n0"),
                    Script(Fault.ERROR_BEFORE, key=f"app:s{number}n0", on="lookup"),
                )

            def deliver(number: int) -> None:
                """One partition's chain: the next record only after this one's end."""
                chain = [
                    (f"o{number}n{step}", f"+393331{step}{number:05}")
                    for step in range(others)
                ]
                chain += [
                    (f"s{number}n{step}", f"+3933300{number:05}")
                    for step in range(behind + 1)
                ]
                for step, (name, msisdn) in enumerate(chain):
                    url = (one, other)[step % 2].url
                    end = time.monotonic() + 60
                    while post(url, name, msisdn, number * 10 + step) in {409, 503}:
                        assert time.monotonic() < end
                        time.sleep(0.02)

            list(pool.map(deliver, range(rounds)))
            wait_until(
                lambda: set(statuses(mariadb_database).values()) == {"succeeded"}, 90
            )

    lines: dict[str, list[str]] = defaultdict(list)
    for entry in api.book.executions():
        lines[entry.msisdn].append(entry.key)
    for number, step in product(range(rounds), range(others)):
        assert lines.pop(f"+393331{step}{number:05}") == [f"app:o{number}n{step}"]
    assert lines == {
        f"+3933300{number:05}": [f"app:s{number}n{step}" for step in range(behind + 1)]
        for number in range(rounds)
    }


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_look_up_that_lags_never_leads_to_a_second_call(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """The execution shows up only later: absent must not be believed too soon."""
    with SandboxRechargeApi(
        kind=Kind.LOOKUP, book=tmp_path / "book.jsonl", lookup_lag_s=1.5
    ) as api:
        env = env_of(mariadb_database, api)
        api.add_faults(Script(Fault.EXECUTE_THEN_DROP))
        with FunctionProcess(tmp_path, env=env) as function, resolver(tmp_path, env):
            assert post(function.url, "r1", offset=1) == 424
            wait_until(lambda: statuses(mariadb_database) == {"app:r1": "succeeded"})

    assert executed(api.book) == ["app:r1"]
    assert len(api.book.calls()) == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_resolver_stops_in_order_when_it_is_told_to(
    mariadb_database: Database, tmp_path: Path
) -> None:
    with SandboxRechargeApi(kind=Kind.REFUSE, book=tmp_path / "book.jsonl") as api:
        env = env_of(mariadb_database, api)
        with resolver(tmp_path, env) as part:
            part.stop()
        once = Part("resolver", tmp_path / "once.log")
        with once:
            once.run(
                [sys.executable, "-m", "function.cli", "resolver", "run-once"], env
            )
            once.wait_until_dead(DEADLINE_S)
        assert "Traceback" not in (tmp_path / "once.log").read_text()


@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.LOOKUP, Kind.REPLAY])
def test_doubt_of_one_api_is_never_sent_to_the_next(
    database: Database, tmp_path: Path, kind: Kind
) -> None:
    """The address changes while an order is in doubt: the first API executed it."""
    with (
        SandboxRechargeApi(kind=kind, book=tmp_path / "old.jsonl") as old,
        SandboxRechargeApi(kind=kind, book=tmp_path / "new.jsonl") as new,
    ):
        old.add_faults(Script(Fault.EXECUTE_THEN_DROP, key="app:r1"))
        old.add_faults(Script(Fault.ERROR_BEFORE, key="app:r1"))
        old.add_faults(Script(Fault.ERROR_BEFORE, on="lookup"))
        with FunctionProcess(tmp_path, env=env_of(database, old)) as function:
            assert post(function.url, "r1", offset=1) == 424
        env = env_of(database, new)
        with (
            FunctionProcess(tmp_path, env=env) as function,
            resolver(tmp_path, env) as part,
        ):
            log = tmp_path / "resolver.log"
            wait_until(lambda: "api_of_another_identity" in log.read_text())
            assert post(function.url, "r1", offset=1) == 424
            assert post(function.url, "r2", B, offset=2) == 200
            part.stop()
        assert '"orders_of_another_api"' in log.read_text()

    assert executed(old.book) == ["app:r1"]
    assert executed(new.book) == ["app:r2"]
    assert [call.key for call in new.book.calls()] == ["app:r2"]
