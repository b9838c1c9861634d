"""The soak as CI runs it: it sees what is broken, and leaves nothing behind."""

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

from demo.kafka_broker import fetch_kafka
from demo.mariadb import find_mariadb
from tests.processes import processes_of
from tests.servers import require

ROOT: Final = Path(__file__).parents[2]
POLL_S: Final = 0.05
DEADLINE_S: Final = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.fixture(scope="module", autouse=True)
def _servers() -> None:
    require(find_mariadb)
    require(fetch_kafka)


@contextmanager
def soaking(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A soak that has begun; it is killed if it has not ended by itself."""
    command = [sys.executable, "-m", "proof.soak", "--directory", str(directory)]
    with subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def soak(directory: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what was told, and the report of a whole run."""
    with soaking(directory, *options) as process:
        text, _ = process.communicate()
    report = directory / "report.json"
    assert report.exists(), text
    assert processes_of(directory) == []
    return process.returncode, text, json.loads(report.read_text())


def wait_until(is_so: Any) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(POLL_S)


def test_naive_design_is_found_out(tmp_path: Path) -> None:
    """The soak that finds nothing in the function finds doubles where there are any."""
    directory = tmp_path / "soak"
    options = ("--naive", "--minutes", "0.5", "--seed", "1", "--drain", "20")
    status, text, report = soak(directory, *options)

    assert status == 1, text
    assert "RED: " in text
    assert "SEED=1 " in text
    # Plain text where there is no terminal.
    assert "\x1b" not in text
    assert not report["green"]
    assert report["double"] > 0
    # What it went through is written down, not only what it ended in.
    assert report["faults"] == sum(report["faults_by_kind"].values()) > 0
    assert report["calls_spoiled"] > 0
    assert len(report["timeline"]) == report["faults"]
    assert (directory / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "soak"
    with soaking(directory) as process:
        wait_until((directory / "book.jsonl").exists)
        process.send_signal(signal.SIGINT)

        assert process.wait(DEADLINE_S) == 130
        assert processes_of(directory) == []


def test_killed_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "soak"
    with soaking(directory) as process:
        wait_until((directory / "book.jsonl").exists)
        process.kill()
        process.wait()

        wait_until(lambda: processes_of(directory) == [])


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")

    with soaking(tmp_path) as process:
        text, _ = process.communicate()

    assert process.returncode == 2
    assert "not the soak's" in text
    assert precious.read_text() == "mine"
