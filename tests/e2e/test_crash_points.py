"""SIGKILL at each boundary of the claim protocol, and what the redelivery makes of it.

The judge is the recharge API's own book: one execution, whatever the ledger says.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi
from tests.conftest import Database
from tests.e2e.test_resolver import env_of, resolver, wait_until
from tests.orders import data, headers
from tests.processes import DEADLINE_S, FunctionProcess, function_env

#: In the order in which one delivery passes them (demo/crash_points.py).
POINTS = (
    "request_read",
    "claim_unsent",
    "claim_committed",
    "call_unsent",
    "answer_arrived",
    "settlement_committed",
    "response_unwritten",
    "response_written",
)
#: What the ledger holds right after the kill.
STATUS_AFTER = {
    "request_read": None,
    "claim_unsent": None,
    "claim_committed": "in_flight",
    "call_unsent": "in_flight",
    "answer_arrived": "in_flight",
    "settlement_committed": "succeeded",
    "response_unwritten": "succeeded",
    "response_written": "succeeded",
}
SENT_AT_ALL = ("answer_arrived", "settlement_committed", "response_unwritten")

#: Short, so that a lease that is lost is over soon.
DEADLINES = {
    "ledger_lease_margin_s": 0.5,
    "ledger_timeout_s": 1,
    "recharge_api_timeout_s": 1,
    "recharge_api_deadline_s": 1.5,
    "recharge_api_settle_s": 2.5,
}


@dataclass
class Rig:
    """The function, armed from outside, before a sandbox API and a ledger."""

    function: FunctionProcess
    api: SandboxRechargeApi
    database: Database
    crash_file: Path

    def post(self, name: str, *, msisdn: str = "+393331234567") -> requests.Response:
        return requests.post(
            self.function.url,
            json=data(name, msisdn=msisdn),
            headers=headers(offset=1),
            timeout=30,
        )

    def redeliver(self, name: str) -> requests.Response:
        """Deliver again until the source would stop, as the dispatcher does."""
        end = time.monotonic() + DEADLINE_S
        while True:
            answer = self.post(name)
            if answer.status_code not in {409, 503}:
                return answer
            assert time.monotonic() < end, answer.text
            time.sleep(0.05)

    def die(self, name: str, point: str) -> None:
        """Deliver once and die at the boundary; on return the request is dead."""
        self.crash_file.write_text(point)
        with pytest.raises(requests.ConnectionError):
            self.post(name)
        assert not self.crash_file.exists(), "the boundary was not reached"

    def status(self, name: str) -> object:
        rows = [
            row["status"]
            for row in self.database.rows("topup")
            if row["idempotency_key"] == f"app:{name}"
        ]
        return rows[0] if rows else None


@pytest.fixture(params=list(Kind))
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def rig_of(kind: Kind, database: Database, directory: Path) -> Iterator[Rig]:
    crash_file = directory / "crash"
    with SandboxRechargeApi(kind=kind, book=directory / "book.jsonl") as api:
        url = database.env["LEDGER_DATABASE_URL"]
        env = function_env(url, api.url, recharge_api_kind=kind.value, **DEADLINES)
        env |= database.env | {"CRASH_FILE": str(crash_file)}
        with FunctionProcess(
            directory,
            env=env,
            server="functions-framework",
            source="demo/crash_points.py",
        ) as function:
            yield Rig(function, api, database, crash_file)


@pytest.fixture
def replay(database: Database, tmp_path: Path) -> Iterator[Rig]:
    yield from rig_of(Kind.REPLAY, database, tmp_path)


@pytest.fixture
def any_kind(kind: Kind, mariadb_database: Database, tmp_path: Path) -> Iterator[Rig]:
    yield from rig_of(kind, mariadb_database, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_kill_at_each_boundary_leaves_one_execution(replay: Rig) -> None:
    """With an API that replays, each order is executed once and ends succeeded."""
    for point in POINTS:
        before = len(replay.api.book.executions())
        if point == "response_written":
            # The answer is out; only the process is gone, and the reset of its
            # connection may come before the answer is read.
            replay.crash_file.write_text(point)
            with suppress(requests.ConnectionError):
                assert replay.post(point).status_code == 200
        else:
            replay.die(point, point)
        assert replay.status(point) == STATUS_AFTER[point], point
        was_executed = len(replay.api.book.executions()) > before
        assert was_executed is (point in {*SENT_AT_ALL, "response_written"}), point

        replay.function.restart()
        answer = replay.redeliver(point)

        assert answer.status_code == 200, (point, answer.text)
        assert replay.status(point) == "succeeded"
    executions = replay.api.book.executions_by_key()
    assert {key: len(each) for key, each in executions.items()} == {
        f"app:{point}": 1 for point in POINTS
    }


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kill_after_execution_ends_by_what_the_api_can_do(any_kind: Rig) -> None:
    """The API executed, the pod died, and the ledger knows nothing of it."""
    group = any_kind.function.process_group_id
    any_kind.api.add_faults(Script(Fault.EXECUTE_THEN_KILL, pgid=group))
    with pytest.raises(requests.ConnectionError):
        any_kind.post("r1")
    assert any_kind.status("r1") == "in_flight"

    any_kind.function.restart()
    answer = any_kind.redeliver("r1")

    book = any_kind.api.book
    assert len(book.executions()) == 1
    match any_kind.api.kind:
        case Kind.REPLAY:
            assert answer.status_code == 200
            assert len(book.calls()) == 2
        case Kind.REFUSE | Kind.LOOKUP:
            assert answer.status_code == 200
            assert len(book.calls()) == 1
        case Kind.NONE:
            assert answer.status_code == 424
            assert len(book.calls()) == 1
            assert any_kind.status("r1") == "parked"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kill_before_the_call_is_not_mistaken_for_an_execution(
    any_kind: Rig, tmp_path: Path
) -> None:
    """Nothing was sent, and nobody can know: each kind ends as safe as it can.

    Until the settling time is over nothing is proven, so it is parked, and the
    resolver goes on; other subscribers of the partition don't wait for that.
    """
    any_kind.die("r1", "call_unsent")
    any_kind.function.restart()

    answer = any_kind.redeliver("r1")

    kind = any_kind.api.kind
    assert answer.status_code == (200 if kind is Kind.REPLAY else 424)
    if kind is Kind.NONE:
        assert any_kind.api.book.executions() == []
        assert any_kind.status("r1") == "parked"
        return
    with resolver(tmp_path, env_of(any_kind.database, any_kind.api)):
        wait_until(lambda: any_kind.status("r1") == "succeeded")
    assert len(any_kind.api.book.executions()) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_pods_with_the_same_record_execute_it_once(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """As after a rebalance: the old chain and the new owner post at one moment."""
    rounds = 500
    with SandboxRechargeApi(kind=Kind.NONE, book=tmp_path / "book.jsonl") as api:
        url = mariadb_database.env["LEDGER_DATABASE_URL"]
        env = function_env(url, api.url) | mariadb_database.env
        with (
            FunctionProcess(tmp_path, env=env) as one,
            FunctionProcess(tmp_path, env=env) as other,
            requests.Session() as session_one,
            requests.Session() as session_other,
            ThreadPoolExecutor(2) as pool,
        ):
            gate = threading.Barrier(2)

            def post(session: requests.Session, url: str, number: int) -> int:
                gate.wait(timeout=30)
                return session.post(
                    url,
                    json=data(f"r{number}", msisdn=f"+3933300{number % 50:05}"),
                    headers=headers(offset=number),
                    timeout=30,
                ).status_code

            statuses: set[int] = set()
            for number in range(rounds):
                first = pool.submit(post, session_one, one.url, number)
                second = pool.submit(post, session_other, other.url, number)
                both = {first.result(), second.result()}
                assert 200 in both
                statuses |= both

    executions = api.book.executions_by_key()
    assert len(executions) == rounds
    assert {len(each) for each in executions.values()} == {1}
    # Both ways of losing were met: while the other called, and after it.
    assert statuses == {200, 409}


@pytest.mark.slow
def test_keys_that_differ_at_all_are_executed_each(
    mariadb_database: Database, tmp_path: Path
) -> None:
    """Case, accent, trailing blank, width: other orders, in ledger and book."""
    names = ["abc", "ABC", "e", "é", "e\u0301", "x", "x ", " x", "ß", "ss", "中", "a:b"]
    with SandboxRechargeApi(kind=Kind.REPLAY, book=tmp_path / "book.jsonl") as api:
        url = mariadb_database.env["LEDGER_DATABASE_URL"]
        env = function_env(url, api.url, recharge_api_kind="replay")
        with FunctionProcess(tmp_path, env=env | mariadb_database.env) as function:
            for name in names * 2:
                answer = requests.post(
                    function.url, json=data(name), headers=headers(), timeout=30
                )
                assert answer.status_code == 200, (name, answer.text)

    assert len(mariadb_database.rows("topup")) == len(names)
    executions = api.book.executions_by_key()
    assert len(executions) == len(names)
    assert {len(each) for each in executions.values()} == {1}
