"""The story as a newcomer plays it: its exit status, its report, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.processes import processes_of

ROOT: Final = Path(__file__).parents[2]
POLL_S: Final = 0.05
#: For what must happen within a second or two.
DEADLINE_S: Final = 30.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "demo", *options]


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "DEMO_DIRECTORY": str(directory)}


def play(directory: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what was told, and the report of a whole run."""
    played = subprocess.run(
        command(*options),
        cwd=ROOT,
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    report = directory / "report.json"
    assert report.exists(), played.stdout
    assert processes_of(directory) == []
    return played.returncode, played.stdout, json.loads(report.read_text())


@contextmanager
def playing(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that is in the middle of the story."""
    with subprocess.Popen(
        command(),
        cwd=ROOT,
        env=environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        book = directory / "book.jsonl"
        wait_until(lambda: book.exists() and book.stat().st_size > 0)
        assert len(processes_of(directory)) > 1
        try:
            yield process
        finally:
            process.kill()


def wait_until(is_so: Any) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(POLL_S)


def assert_adds_up(report: dict[str, Any]) -> None:
    assert report["unique"] == (
        report["executed"]
        + report["rejected"]
        + report["in_doubt"]
        - report["in_doubt_executed"]
        + report["held"]
        + report["quarantined"]
        + report["missing"]
    )
    assert report["sent"] > report["unique"]
    assert report["redeliveries"] > 0
    assert report["calls"] > report["executed"]


def assert_green(status: int, text: str, report: dict[str, Any]) -> None:
    assert status == 0, text
    assert report["green"]
    for number in ("double", "missing", "out_of_order", "misjudged"):
        assert report[number] == 0, text
    # One parked order, the one behind it, and each thing that nobody should send.
    assert (report["in_doubt"], report["held"], report["quarantined"]) == (0, 0, 7)
    # Seven refused, and what was parked or held until a person settled it.
    assert report["dead_lettered"] >= 7 + 10
    assert_adds_up(report)


def steps(report: dict[str, Any], kind: str) -> list[tuple[str, int, int]]:
    """Ledger, calls and executions of the order killed after its execution."""
    told = report["scenes"]["shut_down_unexpectedly"][kind]
    return [(step["ledger"], step["calls"], step["executions"]) for step in told[:2]]


def test_embedded_story_ends_green(tmp_path: Path) -> None:
    status, text, report = play(tmp_path / "demo")

    assert_green(status, text, report)
    assert (report["naive"], report["services"]) == (False, "embedded")
    assert report["scenes"]["many_apps"]["orders"] >= 200
    assert steps(report, "replay") == [("in flight", 1, 1), ("succeeded", 2, 1)]
    assert steps(report, "refuse") == [("in flight", 1, 1), ("succeeded", 1, 1)]
    assert steps(report, "lookup") == [("in flight", 1, 1), ("succeeded", 1, 1)]
    assert steps(report, "none") == [("in flight", 1, 1), ("parked", 1, 1)]
    # Plain text where there is no terminal, and not too much of it.
    assert "\x1b" not in text
    assert "GREEN" in text
    assert len(text.splitlines()) < 180


def test_interrupted_story_leaves_nothing_behind(tmp_path: Path) -> None:
    with playing(tmp_path / "demo") as process:
        process.send_signal(signal.SIGINT)

        assert process.wait(DEADLINE_S) == 130
        assert processes_of(tmp_path / "demo") == []


def test_killed_story_leaves_nothing_behind(tmp_path: Path) -> None:
    with playing(tmp_path / "demo") as process:
        process.kill()
        process.wait()

        wait_until(lambda: processes_of(tmp_path / "demo") == [])


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")

    refused = subprocess.run(
        command(),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )

    assert refused.returncode == 2
    assert "not the demo's" in refused.stderr
    assert precious.read_text() == "mine"


def test_missing_java_is_said_in_one_line(tmp_path: Path) -> None:
    refused = subprocess.run(
        command("--services", "real"),
        cwd=ROOT,
        env={**environment(tmp_path / "demo"), "JAVA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert refused.returncode == 2
    assert "Java 17 or newer is missing" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
