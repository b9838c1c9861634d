"""What can't become an order now: waited for, kept, and brought again in its place."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import requests

from demo.processes import Part
from demo.recharge_api import Kind, SandboxRechargeApi
from tests.conftest import Database
from tests.e2e.test_resolver import env_of, executed, resolver, wait_until
from tests.orders import data
from tests.processes import FunctionProcess

OLD, NEW = "com.example.topup.requested.v1", "com.example.topup.requested.v2"
A, B = "+393331234567", "+393331234568"

#: function/main.py with a bug: it raises for whatever the file names.
BUGGY = """
from pathlib import Path
from function.processing import Processing

process = Processing.process
NAMES = Path({names!r})

def raise_or_process(self, order):
    if order.recharge_id in NAMES.read_text().split():
        raise RuntimeError(f"{{order.msisdn}} is nobody's to read")
    return process(self, order)

Processing.process = raise_or_process
MAIN = Path({main!r})
exec(compile(MAIN.read_text("utf-8"), str(MAIN), "exec"))
"""

_BECAUSE = ("--reason", "refunded by hand", "--yes")


def post(
    url: str, name: str, msisdn: str, offset: int, event_type: str
) -> tuple[int, str]:
    """Deliver a CloudEvent as a KafkaSource with `ceOverrides` does."""
    answer = requests.post(
        url,
        json=data(name, msisdn=msisdn),
        headers={
            "ce-specversion": "1.0",
            "ce-id": f"event-{name}",
            "ce-source": "/app",
            "ce-type": event_type,
            "ce-topic": "recharge.orders",
            "ce-partitionkey": msisdn,
            "ce-knativekafkapartition": "0",
            "ce-knativekafkaoffset": str(offset),
        },
        timeout=30,
    )
    outcome = (
        "" if answer.ok else answer.json().get("outcome") if answer.content else ""
    )
    return answer.status_code, outcome


def topup(env: Mapping[str, str], *words: str) -> str:
    """Run an operator's command; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "function.cli", *words],
        env={**env, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def test_event_of_a_newer_version_holds_its_subscriber_until_it_is_replayed(
    database: Database, tmp_path: Path
) -> None:
    """The record stands at the head for its time alone; the order of arrival holds."""
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = env_of(database, api) | {"EVENT_UNKNOWN_TYPE_WAIT_S": "1"}
        with FunctionProcess(tmp_path, env=env) as old:
            assert post(old.url, "n1", A, 1, NEW) == (503, "unknown_type")
            wait_until(lambda: post(old.url, "n1", A, 1, NEW) == (422, "quarantined"))
            # Of that type nothing waits at the head any more.
            assert post(old.url, "n2", A, 2, NEW) == (422, "quarantined")
            assert post(old.url, "o3", A, 3, OLD) == (424, "held")
            assert post(old.url, "o4", B, 4, OLD)[0] == 200
        with (
            FunctionProcess(tmp_path, env=env | {"EVENT_TYPE": NEW}) as new,
            resolver(tmp_path, env) as part,
        ):
            replay = ("replay", "--quarantine", "--yes", "--to", new.url)
            assert "succeeded" in topup(env, *replay)
            wait_until(lambda: len(executed(api.book)) == 4)
            # A second replay, or the record once more, changes nothing.
            topup(env, *replay)
            assert post(new.url, "n1", A, 1, NEW)[0] == 200
            part.stop()

    assert executed(api.book) == ["app:o4", "app:n1", "app:n2", "app:o3"]


def test_abandoned_record_is_not_replayed_and_lets_the_line_go_on(
    database: Database, tmp_path: Path
) -> None:
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = env_of(database, api) | {
            "EVENT_UNKNOWN_TYPE_WAIT_S": "0",
            "RESOLVE_SECOND_PERSON_ABOVE_MINOR": "10000",
        }
        topup(env, "migrate")
        with FunctionProcess(tmp_path, env=env) as old:
            assert post(old.url, "n1", A, 1, NEW) == (422, "quarantined")
            assert post(old.url, "o2", A, 2, OLD) == (424, "held")
        key = "!recharge.orders:0:1"
        assert "replay" in topup(env, "resolve", key, "--not-executed", *_BECAUSE)
        assert "abandoned" in topup(env, "resolve", key, "--abandon", *_BECAUSE)
        with (
            FunctionProcess(tmp_path, env=env | {"EVENT_TYPE": NEW}) as new,
            resolver(tmp_path, env) as part,
        ):
            wait_until(lambda: executed(api.book) == ["app:o2"])
            told = topup(env, "replay", "--quarantine", "--yes", "--to", new.url)
            assert "succeeded" not in told
            part.stop()

    assert executed(api.book) == ["app:o2"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_record_that_raises_each_time_waits_three_times_and_is_replayed_in_its_place(
    database: Database, tmp_path: Path, *, is_killed: bool
) -> None:
    """The count is the ledger's: another process, or one after SIGKILL, goes on."""
    names = tmp_path / "names"
    names.write_text("bad", "utf-8")
    main = str(Path.cwd() / "function" / "main.py")
    source = tmp_path / "buggy_main.py"
    source.write_text(BUGGY.format(names=str(names), main=main), "utf-8")
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=tmp_path / "book.jsonl") as api:
        env = env_of(database, api)
        pod = FunctionProcess(tmp_path, env=env, source=source)
        with pod:
            for _ in range(2):
                assert post(pod.url, "bad", A, 1, OLD) == (503, "")
                if is_killed:
                    pod.kill()
                    pod.start()
            assert post(pod.url, "bad", A, 1, OLD)[0] == 422
            assert post(pod.url, "bad", A, 1, OLD)[0] == 422
            assert post(pod.url, "next", A, 2, OLD) == (424, "held")
            assert post(pod.url, "other", B, 3, OLD)[0] == 200
            names.write_text("", "utf-8")
            told = topup(env, "replay", "--quarantine", "--yes", "--to", pod.url)
            assert "succeeded" in told
            assert "is nobody's to read" not in pod.log()
            with Part("resolver", tmp_path / "once.log") as once:
                once.run(
                    [sys.executable, "-m", "function.cli", "resolver", "run-once"], env
                )
                once.wait_until_dead(30)

    assert executed(api.book) == ["app:other", "app:bad", "app:next"]
    assert len(database.rows("quarantine")) == 1
