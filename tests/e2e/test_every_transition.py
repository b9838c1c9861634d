"""Every legal transition, made by real processes on MariaDB and judged by the book.

A trigger of the test writes down each change of status; at the end every change that
the model allows was made, and none that it forbids. The function, the resolver and the
`topup` commands are processes; one pod's settlement is kept on its way by a proxy, so
that its evidence comes too late.
"""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
import requests

from demo.book import Book
from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi
from function.model import TRANSITIONS
from proof.tcp_proxy import Link, TcpProxy, Weather
from tests.conftest import Database
from tests.e2e.test_resolver import env_of, wait_until
from tests.orders import data, headers
from tests.processes import ROOT, FunctionProcess

LEASE_S = 2.0
#: After it the people of this test may decide, and a look-up is proof.
SETTLE_S = 2.5
LONG_S = 1000.0


class Rig:
    """One ledger and one API, a pod, a pod whose lines can stall, and the commands."""

    def __init__(
        self, database: Database, api: SandboxRechargeApi, env: dict[str, str]
    ) -> None:
        self.database = database
        self.api = api
        self.env = env
        self._numbers = count(1)
        self._offsets = count(1)

    def new(self) -> tuple[str, str, int]:
        """A name, its subscriber and an offset that nobody else has."""
        number = next(self._numbers)
        return f"r{number}", f"+39333{number:07}", next(self._offsets)

    def send(self, pod: FunctionProcess, order: tuple[str, str, int]) -> int:
        name, msisdn, offset = order
        answer = requests.post(
            pod.url,
            json=data(name, msisdn=msisdn),
            headers=headers(offset=offset),
            timeout=60,
        )
        return answer.status_code

    def answer(self, pod: FunctionProcess) -> None:
        """Have an order answered: the failures before it are in a row no more."""
        assert self.send(pod, self.new()) == 200

    def leave_in_doubt(self, order: tuple[str, str, int]) -> None:
        """As the revision before leaves a doubt: its record comes again."""
        with self.database.engine.connect() as connection:
            connection.exec_driver_sql("SET @is_of_the_revision_before = 1")
            connection.exec_driver_sql(
                "UPDATE topup SET status = 'in_doubt' WHERE idempotency_key = %s",
                (f"app:{order[0]}",),
            )
            connection.exec_driver_sql("SET @is_of_the_revision_before = NULL")

    def fault(self, order: tuple[str, str, int], *faults: Fault | Script) -> None:
        for fault in faults:
            script = fault if isinstance(fault, Script) else Script(fault)
            fields = {name: getattr(script, name) for name in ("times", "on")}
            self.api.add_faults(
                Script(
                    script.fault,
                    key=f"app:{order[0]}",
                    delay_s=script.delay_s,
                    **fields,
                )
            )

    def topup(self, *words: str) -> None:
        """Run one command as a process; it must end well."""
        done = subprocess.run(
            [sys.executable, "-m", "function.cli", *words],
            env={"PYTHONPATH": str(ROOT), **self.env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def decide(self, order: tuple[str, str, int], *verdict: str) -> None:
        self.let_settle(order)
        self.topup("resolve", f"app:{order[0]}", *verdict, "--reason", "x", "--yes")

    def round(self) -> None:
        """One round of the resolver, which looks at everything again."""
        self.database.execute("UPDATE topup SET looked_at = NULL")
        self.topup("resolver", "run-once")

    def status(self, order: tuple[str, str, int]) -> object:
        return self.database.row(f"app:{order[0]}")["status"]

    def age_s(self, order: tuple[str, str, int]) -> float:
        with self.database.engine.connect() as connection:
            age = connection.exec_driver_sql(
                "SELECT TIMESTAMPDIFF(MICROSECOND, sent_at, UTC_TIMESTAMP(6)) / 1e6"
                " FROM topup WHERE idempotency_key = %s",
                (f"app:{order[0]}",),
            ).scalar_one()
        return LONG_S if age is None else float(age)

    def let_settle(self, order: tuple[str, str, int]) -> None:
        wait_until(lambda: self.age_s(order) > SETTLE_S)

    def let_lease_end(self, order: tuple[str, str, int]) -> None:
        wait_until(lambda: self.age_s(order) > LEASE_S)

    def executions(self, order: tuple[str, str, int]) -> int:
        book = Book(self.api.book.path).executions_by_key()
        return len(book.get(f"app:{order[0]}", []))


@contextmanager
def late(
    rig: Rig, pod: FunctionProcess, to_ledger: Link, to_api: Link, order: object
) -> Iterator[Future[int]]:
    """A pod that has the API's answer, and whose settlement is under way for long."""
    assert isinstance(order, tuple)
    to_api.set_weather(Weather(are_answers_stalled=True))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(rig.send, pod, order)
        try:
            key = f"app:{order[0]}"
            wait_until(lambda: key in rig.api.state()["byKey"])  # type: ignore[operator]
            to_ledger.set_weather(Weather(are_requests_stalled=True))
            to_api.heal()
            rig.let_lease_end(order)
            yield answer
        finally:
            to_api.heal()
            to_ledger.heal()


@pytest.fixture
def transitions(mariadb_database: Database) -> Iterator[Database]:
    """A ledger that writes down each change of status."""
    database = mariadb_database
    database.execute("CREATE TABLE transition (one CHAR(16), two CHAR(16))")
    try:
        database.execute(
            "CREATE TRIGGER note AFTER UPDATE ON topup FOR EACH ROW"
            " INSERT INTO transition SELECT OLD.status, NEW.status"
            " WHERE OLD.status <> NEW.status AND @is_of_the_revision_before IS NULL"
        )
        yield database
    finally:
        database.execute("DROP TRIGGER IF EXISTS note")
        database.execute("DROP TABLE transition")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_legal_transition_is_made_by_processes_and_no_other(
    transitions: Database, tmp_path: Path
) -> None:
    with (
        SandboxRechargeApi(kind=Kind.REFUSE, book=tmp_path / "book.jsonl") as api,
        TcpProxy() as proxy,
    ):
        env = env_of(transitions, api) | {
            "RECHARGE_API_SETTLE_S": str(SETTLE_S),
            "RECHARGE_API_ACCEPTED_MAX_S": "1",
            # One API, at two addresses.
            "RECHARGE_API_IDENTITY": "sandbox",
        }
        ledger = urlsplit(env["LEDGER_DATABASE_URL"])
        to_ledger = proxy.link("ledger", (str(ledger.hostname), ledger.port or 0))
        to_api = proxy.link("api", ("127.0.0.1", urlsplit(api.url).port or 0))
        account = ledger.netloc.rpartition("@")[0]
        stalling = env | {
            "LEDGER_DATABASE_URL": urlunsplit(
                ledger._replace(netloc=f"{account}@127.0.0.1:{to_ledger.port}")
            ),
            "LEDGER_TIMEOUT_S": "40",
            "RECHARGE_API_URL": f"http://127.0.0.1:{to_api.port}",
        }
        rig = Rig(transitions, api, env)
        rig.topup("migrate")
        with (
            FunctionProcess(tmp_path, env=env) as pod,
            FunctionProcess(tmp_path, env=stalling) as slow,
        ):
            play_answers(rig, pod)
            play_doubt(rig, pod)
            play_people(rig, pod)
            play_late_evidence(rig, pod, slow, to_ledger, to_api)

    made = {(row["one"], row["two"]) for row in transitions.rows("transition")}
    legal = {(one.value, to.value) for one, many in TRANSITIONS.items() for to in many}
    # Only a resolver whose call was not executed makes it (test_parking.py).
    assert made | {("in_flight", "held")} == legal
    executions = Book(api.book.path).executions_by_key()
    assert {len(entries) for entries in executions.values()} == {1}


def play_answers(rig: Rig, pod: FunctionProcess) -> None:
    """What the API answers at once, and what it finishes later."""
    good, finished, failed, refused = (rig.new() for _ in range(4))
    assert rig.send(pod, good) == 200
    rig.fault(finished, Script(Fault.ACCEPT, delay_s=0))
    rig.fault(failed, Script(Fault.ACCEPT_THEN_FAIL, delay_s=0))
    rig.fault(refused, Fault.REJECT)
    assert [rig.send(pod, each) for each in (finished, failed)] == [200, 200]
    assert rig.status(failed) == "accepted"
    assert rig.send(pod, refused) == 422
    rig.round()
    assert (rig.status(finished), rig.status(failed)) == ("succeeded", "rejected")

    limited = rig.new()
    rig.fault(limited, Fault.RATE_LIMITED)
    assert rig.send(pod, limited) == 503
    assert rig.status(limited) == "released"
    # Not before the wait that the API has named.
    wait_until(lambda: rig.send(pod, limited) == 200)


def play_doubt(rig: Rig, pod: FunctionProcess) -> None:
    """Found out at once, by the resolver, or by a redelivery to another revision."""
    lost, unasked = rig.new(), rig.new()
    rig.fault(lost, Fault.EXECUTE_THEN_DROP)
    assert rig.send(pod, lost) == 200
    lookup_fails = Script(Fault.ERROR_BEFORE, on="lookup")
    rig.fault(unasked, Fault.EXECUTE_THEN_DROP, lookup_fails)
    assert rig.send(pod, unasked) == 424
    rig.round()
    assert rig.status(unasked) == "succeeded"

    # The resolver calls the first again, in vain, and later with success.
    rig.answer(pod)
    parked, waits = rig.new(), rig.new()
    rig.fault(parked, Fault.DROP_BEFORE, Fault.DROP_BEFORE)
    rig.fault(waits, Fault.DROP_BEFORE)
    assert (rig.send(pod, parked), rig.send(pod, waits)) == (424, 424)
    assert (rig.status(parked), rig.status(waits)) == ("parked", "parked")
    rig.answer(pod)
    rig.leave_in_doubt(waits)
    rig.let_settle(waits)
    assert rig.send(pod, waits) == 200
    rig.let_settle(parked)
    rig.round()
    assert rig.status(parked) == "parked"
    rig.let_settle(parked)
    rig.round()
    assert rig.status(parked) == "succeeded"


def play_people(rig: Rig, pod: FunctionProcess) -> None:
    """What a person decides, and what is held behind it."""
    parked, doubtful = rig.new(), rig.new()
    rig.fault(parked, Fault.DROP_BEFORE)
    rig.fault(doubtful, Fault.DROP_BEFORE)
    assert (rig.send(pod, parked), rig.send(pod, doubtful)) == (424, 424)
    rig.answer(pod)
    rig.leave_in_doubt(doubtful)
    rig.decide(doubtful, "--abandon")
    rig.decide(parked, "--not-executed")
    assert rig.status(parked) == "held"
    rig.round()
    assert rig.status(parked) == "succeeded"

    given_up = rig.new()
    rig.fault(given_up, Fault.DROP_BEFORE)
    assert rig.send(pod, given_up) == 424
    rig.decide(given_up, "--abandon")
    rig.answer(pod)

    overtaken = rig.new()
    later = ("later", overtaken[1], rig.new()[2])
    rig.fault(overtaken, Fault.RATE_LIMITED)
    assert (rig.send(pod, overtaken), rig.send(pod, later)) == (503, 424)
    assert rig.status(overtaken) == "held"
    rig.decide(overtaken, "--abandon")
    rig.round()
    assert rig.status(later) == "succeeded"

    released, endless = rig.new(), rig.new()
    rig.fault(released, Fault.RATE_LIMITED)
    rig.fault(endless, Script(Fault.ACCEPT, delay_s=LONG_S))
    assert (rig.send(pod, released), rig.send(pod, endless)) == (503, 200)
    rig.decide(released, "--abandon")
    # Only when the resolver has made it a person's case.
    rig.round()
    rig.decide(endless, "--abandon")


def play_late_evidence(
    rig: Rig, pod: FunctionProcess, slow: FunctionProcess, ledger: Link, api: Link
) -> None:
    """The API's answer was here, and could not be written until others took over."""
    pending = Script(Fault.ACCEPT, delay_s=LONG_S)
    parked, doubtful = rig.new(), rig.new()
    rig.fault(parked, pending)
    with late(rig, slow, ledger, api, parked) as answer:
        assert rig.send(pod, parked) == 424
    assert answer.result() == 200
    assert rig.status(parked) == "accepted"
    rig.fault(doubtful, pending)
    with late(rig, slow, ledger, api, doubtful) as answer:
        assert rig.send(pod, doubtful) == 424
        rig.leave_in_doubt(doubtful)
    assert answer.result() == 200
    assert rig.status(doubtful) == "accepted"

    # It failed at the API meanwhile: by the redelivery's look-up, by the resolver's.
    failed = Script(Fault.ACCEPT_THEN_FAIL, delay_s=0)
    at_once, by_resolver = rig.new(), rig.new()
    rig.fault(at_once, failed)
    with late(rig, slow, ledger, api, at_once):
        assert rig.send(pod, at_once) == 422
    rig.fault(by_resolver, failed, Script(Fault.ERROR_BEFORE, on="lookup"))
    with late(rig, slow, ledger, api, by_resolver):
        assert rig.send(pod, by_resolver) == 424
        rig.round()
        assert rig.status(by_resolver) == "rejected"

    # A person was wrong, and said "not executed"; the evidence comes in time.
    for found in (Fault.NONE, pending):
        for is_called_again in (False, True):
            rig.answer(pod)
            order = rig.new()
            unasked = Script(Fault.ERROR_BEFORE, on="lookup", times=None)
            rig.fault(order, found, unasked, Fault.RATE_LIMITED)
            with late(rig, slow, ledger, api, order) as answer:
                assert rig.send(pod, order) == 424
                rig.decide(order, "--not-executed")
                if is_called_again:
                    assert rig.send(pod, order) == 503
                status = "released" if is_called_again else "held"
                assert rig.status(order) == status
            assert answer.result() == 200
            expected = "succeeded" if found is Fault.NONE else "accepted"
            assert rig.status(order) == expected
            rig.api.clear_faults()
