"""The sandbox recharge API over real sockets: it judges the rest, so it is judged here.

It must never import `function`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import trustme
import yaml
from openapi_spec_validator import validate as validate_openapi

from demo.book import Book
from demo.faults import Fault, Script
from demo.recharge_api import Kind, SandboxRechargeApi

ROOT = Path(__file__).parents[2]
MSISDN = "+41790000001"
KINDS_WITH_LOOK_UP = (Kind.REFUSE, Kind.LOOKUP)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "book.jsonl"


@pytest.fixture
def api(book: Path) -> Iterator[SandboxRechargeApi]:
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=book) as running:
        yield running


def order(**changes: object) -> dict[str, object]:
    document: dict[str, object] = {
        "msisdn": MSISDN,
        "amountMinor": 500,
        "currency": "CHF",
        "channel": "app",
        "rechargeId": "1",
        "requestedAt": "2026-01-02T03:04:05Z",
    }
    return document | changes


def post(
    api: SandboxRechargeApi, key: str = "app:1", timeout_s: float = 10, **changes: Any
) -> requests.Response:
    return requests.post(
        f"{api.url}/recharges",
        json=order(**changes),
        headers={"Idempotency-Key": key},
        timeout=timeout_s,
        allow_redirects=False,
    )


def look_up(api: SandboxRechargeApi, key: str = "app:1") -> requests.Response:
    return requests.get(
        f"{api.url}/recharges", params={"idempotencyKey": key}, timeout=10
    )


def statuses(api: SandboxRechargeApi, key: str = "app:1") -> list[str]:
    return [found["status"] for found in look_up(api, key).json()["recharges"]]


def code(answer: requests.Response) -> str:
    return str(answer.json()["error"]["code"])


def wait_until(condition: Callable[[], object], deadline_s: float = 10) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_refusing(api: SandboxRechargeApi) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex((api.host, api.port)) != 0


# ---- the kinds ----------------------------------------------------------------------


def test_repeated_key_in_kind_replay_gets_the_first_answer_again(book: Path) -> None:
    with SandboxRechargeApi(kind="replay", book=book) as api:
        first, second = post(api), post(api)

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert first.json()["idempotencyKey"] == "app:1"
    assert len(api.book.calls()) == 2
    assert len(api.book.executions()) == 1


def test_repeated_key_with_other_content_in_kind_replay_is_refused(book: Path) -> None:
    with SandboxRechargeApi(kind="replay", book=book) as api:
        post(api)
        answer = post(api, amountMinor=501)

    assert (answer.status_code, code(answer)) == (409, "key_reused")
    assert len(api.book.executions()) == 1


def test_repeated_key_after_the_replay_window_executes_again(book: Path) -> None:
    with SandboxRechargeApi(kind="replay", book=book, replay_window_s=0) as api:
        first, second = post(api), post(api)

    assert first.json()["reference"] != second.json()["reference"]
    assert len(api.book.executions_by_key()["app:1"]) == 2


def test_rejection_in_kind_replay_is_replayed(book: Path) -> None:
    with SandboxRechargeApi(kind="replay", book=book) as api:
        api.add_faults(Script(Fault.REJECT, status=402, code="insufficient_balance"))
        first, second = post(api), post(api)

    assert (first.status_code, code(first)) == (402, "insufficient_balance")
    assert (second.status_code, second.content) == (402, first.content)
    assert api.book.executions() == []


def test_repeated_key_in_kind_refuse_is_refused_and_found(book: Path) -> None:
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        first, second = post(api), post(api)
        found = look_up(api).json()["recharges"]

    assert (second.status_code, code(second)) == (409, "reference_used")
    assert found == [
        {
            "idempotencyKey": "app:1",
            "status": "succeeded",
            "reference": first.json()["reference"],
            "msisdn": MSISDN,
            "amountMinor": 500,
            "currency": "CHF",
        }
    ]
    assert len(api.book.executions()) == 1


def test_repeated_key_in_kind_lookup_executes_twice_and_lists_both(book: Path) -> None:
    with SandboxRechargeApi(kind="lookup", book=book) as api:
        references = [post(api).json()["reference"] for _ in range(2)]
        found = look_up(api).json()["recharges"]

    assert [f["reference"] for f in found] == references
    assert [e.reference for e in api.book.executions()] == references


def test_repeated_key_in_kind_none_executes_twice(book: Path) -> None:
    with SandboxRechargeApi(kind="none", book=book) as api:
        assert [post(api).status_code for _ in range(2)] == [201, 201]

    assert len(api.book.executions()) == 2


@pytest.mark.parametrize("kind", [Kind.REPLAY, Kind.NONE])
def test_look_up_in_a_kind_without_one_is_not_found(kind: Kind, book: Path) -> None:
    with SandboxRechargeApi(kind=kind, book=book) as api:
        post(api)
        answer = look_up(api)

    assert (answer.status_code, code(answer)) == (404, "not_found")


@pytest.mark.parametrize("kind", KINDS_WITH_LOOK_UP)
def test_look_up_of_an_unknown_key_is_empty(kind: Kind, book: Path) -> None:
    with SandboxRechargeApi(kind=kind, book=book) as api:
        post(api, key="app:1")
        assert look_up(api, "app:2").json() == {"recharges": []}
        assert look_up(api, "APP:1").json() == {"recharges": []}

    assert [e.key for e in api.book.entries() if e.entry == "looked_up"] == [
        "app:2",
        "APP:1",
    ]


def test_lagging_look_up_shows_an_execution_only_later(book: Path) -> None:
    with SandboxRechargeApi(kind="refuse", book=book, lookup_lag_s=0.5) as api:
        post(api)
        executed_at = time.monotonic()
        assert statuses(api) == []
        wait_until(lambda: statuses(api) == ["succeeded"])
        assert time.monotonic() - executed_at > 0.4


@pytest.mark.parametrize(
    ("kind", "executions"),
    [(Kind.REPLAY, 1), (Kind.REFUSE, 1), (Kind.LOOKUP, 16), (Kind.NONE, 16)],
)
def test_concurrent_identical_keys_execute_as_often_as_the_kind_says(
    kind: Kind, executions: int, book: Path
) -> None:
    start = threading.Barrier(16)

    def send(api: SandboxRechargeApi) -> int:
        start.wait()
        return post(api).status_code

    with (
        SandboxRechargeApi(kind=kind, book=book) as api,
        ThreadPoolExecutor(16) as pool,
    ):
        sent = [pool.submit(send, api) for _ in range(16)]
        answers = [future.result() for future in sent]

    assert len(api.book.calls()) == 16
    assert len(api.book.executions()) == executions
    refused = 15 if kind is Kind.REFUSE else 0
    assert sorted(answers) == [201] * (16 - refused) + [409] * refused


# ---- accepted, reversed -------------------------------------------------------------


def test_accepted_recharge_is_pending_and_executed_later(book: Path) -> None:
    with SandboxRechargeApi(
        kind="refuse", book=book, accept=True, finish_after_s=0.5
    ) as api:
        answer = post(api)
        assert (answer.status_code, answer.json()["status"]) == (202, "accepted")
        assert statuses(api) == ["pending"]
        assert api.book.executions() == []
        wait_until(lambda: statuses(api) == ["succeeded"])

    (execution,) = api.book.executions()
    assert execution.reference == answer.json()["reference"]
    assert execution.call == api.book.calls()[0].call


def test_accepted_recharge_in_kind_replay_answers_its_end(book: Path) -> None:
    with SandboxRechargeApi(kind="replay", book=book) as api:
        api.add_faults(
            Script(Fault.ACCEPT, key="a", delay_s=0.2),
            Script(Fault.ACCEPT_THEN_FAIL, key="b", delay_s=0.2),
        )
        assert [post(api, key=k).status_code for k in "ab"] == [202, 202]
        wait_until(lambda: post(api, key="a").status_code == 201)
        wait_until(lambda: post(api, key="b").status_code == 422)

    assert [e.key for e in api.book.executions()] == ["a"]


def test_accepted_recharge_that_fails_is_found_failed(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.ACCEPT_THEN_FAIL, delay_s=0.1))

    assert post(api).status_code == 202

    wait_until(lambda: statuses(api) == ["failed"])
    assert api.book.executions() == []


def test_late_reversal_is_written_after_the_execution(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.REVERSE_LATER, delay_s=0.2))

    assert post(api).status_code == 201
    assert statuses(api) == ["succeeded"]

    wait_until(lambda: statuses(api) == ["failed"])
    assert look_up(api).json()["recharges"][0]["reversed"] is True
    kinds = [e.entry for e in api.book.entries() if e.entry != "looked_up"]
    assert kinds == ["called", "executed", "reversed"]


# ---- the faults ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "executions"), [("drop_before", 0), ("execute_then_drop", 1)]
)
def test_dropped_connection_executes_as_the_fault_says(
    fault: str, executions: int, api: SandboxRechargeApi
) -> None:
    api.add_faults(Script(Fault(fault)))

    with pytest.raises(requests.ConnectionError):
        post(api)

    assert len(api.book.executions()) == executions
    assert [c.fault for c in api.book.calls()] == [fault]
    assert post(api, key="app:2").status_code == 201


@pytest.mark.parametrize(
    ("script", "status", "word"),
    [
        (Script(Fault.ERROR_BEFORE), 500, "internal"),
        (Script(Fault.ERROR_BEFORE, status=503), 503, "unavailable"),
        (Script(Fault.RATE_LIMITED, delay_s=7), 429, "rate_limited"),
        (Script(Fault.REJECT, code="unknown_subscriber"), 422, "unknown_subscriber"),
        (Script(Fault.SAME_CONTENT), 409, "similar_recently"),
        (Script(Fault.UNAUTHORIZED), 401, "unauthorized"),
    ],
    ids=str,
)
def test_error_answer_executes_nothing(
    script: Script, status: int, word: str, api: SandboxRechargeApi
) -> None:
    api.add_faults(script)

    answer = post(api)

    assert (answer.status_code, code(answer)) == (status, word)
    assert answer.headers.get("Retry-After", "7") in {"7", "1"}
    assert api.book.executions() == []


def test_redirect_leads_nowhere_and_executes_nothing(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.REDIRECT))

    answer = post(api)
    followed = requests.post(api.url + answer.headers["Location"], timeout=10)

    assert (answer.status_code, followed.status_code) == (307, 404)
    assert api.book.executions() == []


def test_error_after_is_executed_all_the_same(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.ERROR_AFTER, status=503))

    answer = post(api)

    assert (answer.status_code, code(answer)) == (503, "unavailable")
    assert len(api.book.executions()) == 1


def test_garbage_is_executed_and_no_json(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.GARBAGE))

    answer = post(api)

    assert answer.status_code == 200
    with pytest.raises(requests.JSONDecodeError):
        answer.json()
    assert len(api.book.executions()) == 1


def test_half_a_body_is_executed_and_breaks_the_answer(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.HALF_BODY))

    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        post(api)

    assert len(api.book.executions()) == 1


def test_drip_outlasts_the_callers_read_timeout(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.DRIP, delay_s=0.01))
    begin = time.monotonic()

    # Each byte comes in time, the answer doesn't: 300 bytes, 10 ms each.
    answer = post(api, timeout_s=1)

    assert answer.status_code == 201
    assert time.monotonic() - begin > 1


def test_late_answer_is_executed_at_once(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.EXECUTE_THEN_LATE, delay_s=60))

    with pytest.raises(requests.ReadTimeout):
        post(api, timeout_s=0.3)

    assert len(api.book.executions()) == 1


@pytest.mark.parametrize(
    ("kind", "word"), [("replay", "in_progress"), ("refuse", "reference_used")]
)
def test_late_execution_happens_though_the_caller_has_gone(
    kind: str, word: str, book: Path
) -> None:
    with SandboxRechargeApi(kind=kind, book=book) as api:
        api.add_faults(Script(Fault.LATE_EXECUTE, delay_s=1))
        with pytest.raises(requests.ReadTimeout):
            post(api, timeout_s=0.2)
        assert api.book.executions() == []
        again = post(api)
        assert (again.status_code, code(again)) == (409, word)
        wait_until(api.book.executions)

    (execution,) = api.book.executions()
    assert (execution.call, execution.fault) == (1, "late_execute")


def test_hang_ends_when_the_faults_are_cleared(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.HANG, times=None, delay_s=60))

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(post, api)
        wait_until(api.book.calls)
        assert not hanging.done()
        api.clear_faults()
        assert hanging.result().status_code == 503

    assert api.book.executions() == []
    assert post(api).status_code == 201


def test_stop_ends_every_fault_that_waits(book: Path) -> None:
    threads = threading.active_count()
    waiting = [Fault.HANG, Fault.LATE_EXECUTE, Fault.EXECUTE_THEN_LATE, Fault.DRIP]
    with ThreadPoolExecutor(len(waiting)) as pool:
        with SandboxRechargeApi(kind="none", book=book) as api:
            api.add_faults(*(Script(f, key=f, delay_s=60) for f in waiting))
            calls = [pool.submit(post, api, key=f, timeout_s=60) for f in waiting]
            wait_until(lambda: api.state()["calls"] == len(waiting))
            wait_until(lambda: api.state()["executions"] == 2)
            begin = time.monotonic()
        assert time.monotonic() - begin < 3
        for call in calls:
            assert isinstance(call.exception(), requests.ConnectionError)

    assert {e.key for e in api.book.executions()} == {"execute_then_late", "drip"}
    assert threading.active_count() == threads


def test_execute_then_kill_kills_the_group_after_the_execution(
    api: SandboxRechargeApi,
) -> None:
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as victim:
        api.add_faults(Script(Fault.EXECUTE_THEN_KILL, pgid=victim.pid))
        with pytest.raises(requests.ConnectionError):
            post(api)
        assert victim.wait(10) == -signal.SIGKILL

    assert len(api.book.executions()) == 1


@pytest.mark.parametrize("pgid", [0, 1, os.getpgrp()])
def test_execute_then_kill_of_ourselves_is_refused(pgid: int) -> None:
    with pytest.raises(ValueError, match="pgid"):
        Script(Fault.EXECUTE_THEN_KILL, pgid=pgid)


def test_scripts_are_used_up_in_order_by_what_they_match(
    api: SandboxRechargeApi,
) -> None:
    api.add_faults(
        Script(Fault.REJECT, key="b"),
        Script(Fault.NONE, msisdn=MSISDN),
        Script(Fault.ERROR_BEFORE, times=2),
    )

    answers = [post(api, key=k).status_code for k in "abbbb"]

    assert answers == [201, 422, 500, 500, 201]
    assert api.faults() == []


def test_look_up_can_be_spoiled_by_a_script(api: SandboxRechargeApi) -> None:
    api.add_faults(Script(Fault.ERROR_BEFORE, on="lookup", status=503))

    assert post(api).status_code == 201
    assert look_up(api).status_code == 503
    assert statuses(api) == ["succeeded"]


def test_random_faults_repeat_by_seed(tmp_path: Path) -> None:
    def faults(name: str, seed: int, keys: list[str]) -> dict[tuple[str, int], str]:
        api = SandboxRechargeApi(
            kind="none",
            book=tmp_path / name,
            seed=seed,
            fault_rate=0.5,
            faults=["error_before", "reject", "garbage"],
        )
        with api, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: post(api, key=key), keys))
        drawn: dict[tuple[str, int], str] = {}
        for call in api.book.calls():
            attempt = sum(key == call.key for key, _ in drawn) + 1
            drawn[call.key, attempt] = call.fault
        return drawn

    keys = [str(number % 20) for number in range(60)]
    first = faults("first", 1, keys)

    assert faults("again", 1, keys[::-1]) == first
    assert faults("other", 2, keys) != first
    assert {"", "error_before", "reject", "garbage"} == set(first.values())
    assert 15 <= sum(map(bool, first.values())) <= 45


# ---- outage, restart, kill ----------------------------------------------------------


def test_outage_refuses_connections_and_ends(api: SandboxRechargeApi) -> None:
    with requests.Session() as session:
        session.get(f"{api.url}/recharges?idempotencyKey=k", timeout=10)
        requests.post(f"{api.control_url}/outage", json={"seconds": 60}, timeout=10)
        with pytest.raises(requests.ConnectionError, match="refused"):
            session.get(f"{api.url}/recharges?idempotencyKey=k", timeout=10)
        with pytest.raises(requests.ConnectionError, match="refused"):
            post(api)
        assert requests.get(f"{api.control_url}/state", timeout=10).ok
        requests.post(f"{api.control_url}/outage", json={"seconds": 0}, timeout=10)
        wait_until(lambda: not is_refusing(api))
        assert post(api).status_code == 201

    assert len(api.book.calls()) == 1


def test_answer_under_way_survives_the_begin_of_an_outage(
    api: SandboxRechargeApi,
) -> None:
    api.add_faults(Script(Fault.EXECUTE_THEN_LATE, delay_s=0.5))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, api)
        wait_until(api.book.executions)
        api.outage(60)
        assert late.result().status_code == 201
    assert is_refusing(api)


@pytest.mark.parametrize(("kind", "again"), [("replay", 201), ("refuse", 409)])
def test_restart_on_the_same_port_and_book_keeps_the_memory(
    kind: str, again: int, book: Path
) -> None:
    with SandboxRechargeApi(kind=kind, book=book) as api:
        first = post(api)
    assert is_refusing(api)
    with SandboxRechargeApi(kind=kind, book=book, port=api.port) as restarted:
        second, other = post(restarted), post(restarted, key="app:2")

    assert restarted.port == api.port
    assert second.status_code == again
    assert (second.json() == first.json()) is (again == 201)
    assert other.json()["reference"] != first.json()["reference"]
    assert len(restarted.book.executions_by_key()["app:1"]) == 1


def test_same_object_started_again_keeps_its_ports(
    api: SandboxRechargeApi,
) -> None:
    addresses = api.url, api.control_url
    api.stop()
    api.start()

    assert (api.url, api.control_url) == addresses
    assert post(api).status_code == 201


def test_taken_port_leaves_nothing_running(api: SandboxRechargeApi, book: Path) -> None:
    threads = threading.active_count()

    with pytest.raises(OSError, match="in use"):
        SandboxRechargeApi(kind="none", book=book, port=api.port).start()

    assert threading.active_count() == threads


def test_accepted_recharge_is_ended_after_a_restart(book: Path) -> None:
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        api.add_faults(
            Script(Fault.ACCEPT, key="a", delay_s=1),
            Script(Fault.ACCEPT_THEN_FAIL, key="b", delay_s=1),
        )
        assert [post(api, key=k).status_code for k in "ab"] == [202, 202]
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        wait_until(lambda: statuses(api, "a") == ["succeeded"])
        wait_until(lambda: statuses(api, "b") == ["failed"])
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        assert statuses(api, "a") == ["succeeded"]

    assert [e.key for e in api.book.executions()] == ["a"]


@contextmanager
def sandbox_process(book: Path, *options: str) -> Iterator[tuple[int, str, str]]:
    """A sandbox in its own process group: pid, API's URL, control's URL."""
    port_file = book.with_name("port")
    command = [sys.executable, "-m", "demo.recharge_api", "--kind", "refuse"]
    command += ["--book", str(book), "--port-file", str(port_file), *options]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("recharge-api listening on http://127.0.0.1:"), line
            port, control_url = port_file.read_text().split()
            yield process.pid, f"http://127.0.0.1:{port}", control_url
        finally:
            process.terminate()
            process.wait(10)
        assert process.stderr.read() == ""


def test_book_survives_the_sigkill_of_the_sandbox(book: Path) -> None:
    answered: list[str] = []

    def send_for_ever(url: str, worker: int) -> None:
        with requests.Session() as session:
            for number in range(1_000_000):
                key = f"{worker}:{number}"
                try:
                    answer = session.post(
                        f"{url}/recharges",
                        json=order(),
                        headers={"Idempotency-Key": key},
                        timeout=10,
                    )
                except requests.ConnectionError:
                    return
                assert answer.status_code == 201
                answered.append(key)

    with sandbox_process(book) as (pid, url, _), ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(send_for_ever, url, worker) for worker in range(4)]
        wait_until(lambda: len(answered) > 200)
        os.killpg(pid, signal.SIGKILL)
        for worker in workers:
            worker.result()

    executed = Book(book).executions_by_key()
    assert set(answered) <= set(executed)
    assert {len(executions) for executions in executed.values()} == {1}
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        assert code(post(api, key=answered[-1])) == "reference_used"


def test_process_that_is_told_to_end_ends_quietly(book: Path) -> None:
    with sandbox_process(book, "--accept", "--seed", "1") as (_, url, control_url):
        answer = requests.post(
            f"{url}/recharges",
            json=order(),
            headers={"Idempotency-Key": "k"},
            timeout=10,
        )
        assert answer.status_code == 202
        state = requests.get(f"{control_url}/state", timeout=10).json()

    assert state["byKey"] == {"k": {"calls": 1, "executions": 0}}


def test_caller_that_goes_in_the_middle_leaves_no_traceback(
    book: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = b"POST /recharges HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
    with SandboxRechargeApi(kind="none", book=book) as api:
        for reset in (False, True):
            with closing(socket.create_connection((api.host, api.port))) as caller:
                caller.sendall(head)
                if reset:
                    linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert post(api).status_code == 201

    assert len(api.book.calls()) == 1
    assert capfd.readouterr().err == ""


# ---- the book -----------------------------------------------------------------------


def test_cut_last_line_of_the_book_is_not_there(book: Path) -> None:
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        post(api)
    whole = api.book.entries()
    with book.open("ab") as file:
        file.write(b'{"at":"2026-01-01T00:00:00+00:00","entry":"exec')

    assert Book(book).entries() == whole
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        post(api, key="app:2")
    assert [e.key for e in api.book.executions()] == ["app:1", "app:2"]


def test_unreadable_line_in_the_middle_of_the_book_is_an_error(book: Path) -> None:
    book.write_bytes(b'{"entry":"executed"}\n')

    with pytest.raises(ValueError, match="at"):
        Book(book).executions()


def test_book_that_is_not_there_is_empty(book: Path) -> None:
    assert Book(book).entries() == []


def test_entry_joins_call_and_execution_in_the_documented_json(
    api: SandboxRechargeApi, book: Path
) -> None:
    api.add_faults(Script(Fault.EXECUTE_THEN_LATE, delay_s=0))
    reference = post(api).json()["reference"]

    called, executed = [json.loads(line) for line in book.read_text().splitlines()]

    assert called["entry"], called["call"] == ("called", 1)
    assert executed.pop("at") > called["at"]
    assert executed == {
        "entry": "executed",
        "call": 1,
        "key": "app:1",
        "msisdn": MSISDN,
        "amountMinor": 500,
        "currency": "CHF",
        "reference": reference,
        "fault": "execute_then_late",
        "content": called["content"],
    }


# ---- requests, control, TLS ---------------------------------------------------------


@pytest.mark.parametrize("key", ["", "x" * 201, "é", "a\tb"])
def test_invalid_key_is_a_definite_no(key: str, api: SandboxRechargeApi) -> None:
    answer = post(api, key=key.encode("latin-1"))  # type: ignore[arg-type]

    assert (answer.status_code, code(answer)) == (400, "invalid_request")
    assert [e.entry for e in api.book.entries()] == ["called", "rejected"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"msisdn": "0790000001"}, "invalid_number"),
        ({"msisdn": None}, "invalid_number"),
        ({"msisdn": MSISDN + "\n"}, "invalid_number"),
        ({"donorMsisdn": "x"}, "invalid_number"),
        ({"amountMinor": 0}, "invalid_request"),
        ({"amountMinor": True}, "invalid_request"),
        ({"amountMinor": 1.0}, "invalid_request"),
        ({"currency": "chf"}, "invalid_request"),
        ({"channel": ""}, "invalid_request"),
        ({"rechargeId": 1}, "invalid_request"),
        ({"requestedAt": "2026-01-02T03:04:05"}, "invalid_request"),
    ],
    ids=str,
)
def test_invalid_body_is_a_definite_no_that_leaves_the_key_unused(
    changes: dict[str, Any], word: str, book: Path
) -> None:
    with SandboxRechargeApi(kind="refuse", book=book) as api:
        answer = post(api, **changes)
        assert (answer.status_code, code(answer)) == (400, word)
        assert post(api).status_code == 201


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 50_000])
def test_body_that_is_no_order_is_a_definite_no(
    body: bytes, api: SandboxRechargeApi
) -> None:
    answer = requests.post(
        f"{api.url}/recharges", body, headers={"Idempotency-Key": "k"}, timeout=10
    )

    assert (answer.status_code, code(answer)) == (400, "invalid_request")


def test_wrong_token_is_refused_and_a_rotated_one_counts_at_once(
    book: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    with SandboxRechargeApi(kind="lookup", book=book, bearer_token_file=token) as api:

        def status(bearer: str) -> int:
            return requests.post(
                f"{api.url}/recharges",
                json=order(),
                headers={"Idempotency-Key": "k", "Authorization": f"Bearer {bearer}"},
                timeout=10,
            ).status_code

        assert (post(api).status_code, look_up(api).status_code) == (401, 401)
        assert (status("first"), status("second")) == (201, 401)
        token.write_text("second\n")
        assert (status("first"), status("second")) == (401, 201)

    assert len(api.book.executions()) == 2


def test_control_scripts_faults_and_shows_book_and_state(
    api: SandboxRechargeApi,
) -> None:
    faults, document = f"{api.control_url}/faults", {"fault": "reject", "times": None}
    assert requests.post(faults, json=[document], timeout=10).status_code == 204
    assert [f["fault"] for f in requests.get(faults, timeout=10).json()] == ["reject"]
    assert [post(api).status_code for _ in range(2)] == [422, 422]
    assert requests.delete(faults, timeout=10).status_code == 204
    assert post(api).status_code == 201

    book = requests.get(f"{api.control_url}/book", timeout=10).json()
    state = requests.get(f"{api.control_url}/state", timeout=10).json()

    assert [e["entry"] for e in book] == ["called", "rejected"] * 2 + [
        "called",
        "executed",
    ]
    counts = {"calls": 3, "executions": 1}
    assert state == counts | {"byKey": {"app:1": counts}}


@pytest.mark.parametrize(
    "document",
    [
        {"fault": "drip"},
        [{"fault": "unheard_of"}],
        [{"fault": "drip", "tims": 1}],
        [{"fault": "drip", "times": 0}],
        [{"fault": "drip", "on": "always"}],
        [{"fault": "drip", "delay_s": -1}],
        [{"fault": "execute_then_kill"}],
        ["drip"],
    ],
    ids=str,
)
def test_control_refuses_what_is_no_script(
    document: object, api: SandboxRechargeApi
) -> None:
    answer = requests.post(f"{api.control_url}/faults", json=document, timeout=10)

    assert answer.status_code == 400
    assert api.faults() == []


def test_tls_port_is_verified_against_its_authority(book: Path, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    cert = authority.issue_cert("127.0.0.1")
    files = {name: tmp_path / name for name in ("cert", "key", "ca", "stranger")}
    files["cert"].write_bytes(cert.cert_chain_pems[0].bytes())
    files["key"].write_bytes(cert.private_key_pem.bytes())
    authority.cert_pem.write_to_path(files["ca"])
    stranger.cert_pem.write_to_path(files["stranger"])

    def status(api: SandboxRechargeApi, ca: str) -> int:
        return requests.post(
            f"{api.url}/recharges",
            json=order(),
            headers={"Idempotency-Key": ca},
            timeout=10,
            verify=str(files[ca]),
        ).status_code

    with SandboxRechargeApi(
        kind="none", book=book, tls_cert=files["cert"], tls_key=files["key"]
    ) as api:
        assert api.url.startswith("https://")
        assert status(api, "ca") == 201
        with pytest.raises(requests.exceptions.SSLError):
            status(api, "stranger")
        api.add_faults(Script(Fault.EXECUTE_THEN_DROP))
        with pytest.raises(requests.ConnectionError):
            status(api, "ca")

    assert len(api.book.calls()) == 2


# ---- the OpenAPI document -----------------------------------------------------------


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    text = (ROOT / "docs" / "recharge-api.openapi.yaml").read_text()
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def assert_documented(openapi: dict[str, Any], answer: requests.Response) -> None:
    method = str(answer.request.method).lower()
    responses = openapi["paths"]["/recharges"][method]["responses"]
    response = responses[str(answer.status_code)]
    if "$ref" in response:
        name = response["$ref"].rsplit("/", 1)[-1]
        response = openapi["components"]["responses"][name]
    schema = response["content"][answer.headers["Content-Type"]]["schema"]
    # The references of the schema point into the document around it.
    whole = schema | {"components": openapi["components"]}
    jsonschema_rs.validator_for(whole).validate(answer.json())


def test_openapi_document_is_valid(openapi: dict[str, Any]) -> None:
    validate_openapi(openapi)


@pytest.mark.parametrize("kind", list(Kind))
def test_answers_match_the_openapi_document(
    kind: Kind, book: Path, openapi: dict[str, Any]
) -> None:
    scripted = {
        Fault.ERROR_BEFORE: 500,
        Fault.ERROR_AFTER: 500,
        Fault.RATE_LIMITED: 429,
        Fault.REJECT: 422,
        Fault.SAME_CONTENT: 409,
        Fault.UNAUTHORIZED: 401,
        Fault.ACCEPT: 202,
        Fault.ACCEPT_THEN_FAIL: 202,
        Fault.REVERSE_LATER: 201,
        Fault.NONE: 201,
    }
    with SandboxRechargeApi(kind=kind, book=book, finish_after_s=0.1) as api:
        for fault, status in scripted.items():
            api.add_faults(Script(fault))
            answer = post(api, key=fault)
            assert answer.status_code == status
            assert_documented(openapi, answer)
        wait_until(lambda: api.book.entries()[-1].entry == "reversed")
        for key in [*scripted, "unknown", ""]:
            assert_documented(openapi, look_up(api, key))
            assert_documented(openapi, post(api, key=key))
        assert_documented(openapi, post(api, key=Fault.NONE, amountMinor=1))


def test_valid_order_matches_the_openapi_document(openapi: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/RechargeRequest"}
    validator = jsonschema_rs.validator_for(
        schema | {"components": openapi["components"]}
    )

    assert validator.is_valid(order(donorMsisdn="+41790000002"))
    assert not validator.is_valid(order(amountMinor=0))
