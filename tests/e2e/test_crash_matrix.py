"""The crash matrix as its command is called: cells that hold, and guards that don't."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.mariadb import find_mariadb
from tests.processes import ROOT
from tests.servers import require

#: What a run of the matrix needs of the project.
PARTS = ("certs", "demo", "function", "proof")


def crash(project: Path, directory: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run `python -m proof.crash_matrix` in a project; its status and its report."""
    require(find_mariadb)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "proof.crash_matrix", "--directory", directory),
            *options,
        ],
        cwd=project,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ("GREEN" if ended.returncode == 0 else "RED") in ended.stdout, ended
    return ended.returncode, json.loads((directory / "report.json").read_text())


def broken(directory: Path, old: str, new: str) -> Path:
    """A copy of the project whose processing.py lacks a guard."""
    for part in PARTS:
        shutil.copytree(ROOT / part, directory / part)
    path = directory / "function" / "processing.py"
    text = path.read_text("utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf-8")
    return directory


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_a_few_boundaries_every_order_ends_once(tmp_path: Path) -> None:
    boundaries = (
        "claim_sent",
        "call_sent",
        "settlement_sent",
        "resolver_between_held",
        "resolver_look_up_sent",
    )
    options = [word for name in boundaries for word in ("--boundary", name)]
    page = tmp_path / "page.md"

    status, report = crash(
        ROOT,
        tmp_path / "crash",
        *options,
        *("--behaviour", "answer_lost", "--kind", "refuse", "--kind", "none"),
        *("--page", str(page)),
    )

    assert status == 0
    assert report["cells"] == 10
    # An API of kind `none` is not looked up, and parks what would be the first held.
    assert report["kills"] == 8
    assert report["doubles"] == 0
    by_kind = {
        (each["kind"], each["boundary"]): (each["final_state"], each["executions"])
        for each in report["matrix"]
    }
    assert by_kind["refuse", "call_sent"] == ("succeeded", 1)
    assert by_kind["none", "claim_sent"] == ("parked", 0)
    assert by_kind["none", "call_sent"] == ("parked", 1)
    assert "| `call_sent` |" in page.read_text()
    # Green cells leave no traces.
    assert list((tmp_path / "crash" / "cells").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        pytest.param(
            "        if not isinstance(way, Way):\n"
            "            return self._park(entry, way)",
            "        if not isinstance(way, Way):\n"
            "            return self._send_again(order, entry, looked, permit)",
            "DOUBLE",
            id="sent again without knowing",
        ),
        pytest.param(
            "        answer = self._api.recharge(\n",
            '        early = Answer(AnswerClass.DONE, reference="early")\n'
            "        self._ledger.settle(order.idempotency_key, claim.token, early)\n"
            "        answer = self._api.recharge(\n",
            "the book: 0 times",
            id="settled before the call",
        ),
    ],
)
def test_missing_guard_turns_the_matrix_red(
    tmp_path: Path, old: str, new: str, finding: str
) -> None:
    project = broken(tmp_path / "project", old, new)
    options = ("--boundary", "api_executed", "--boundary", "call_unsent")

    status, report = crash(
        project,
        tmp_path / "crash",
        *options,
        *("--behaviour", "answers", "--kind", "none"),
    )

    assert status == 1
    found = [word for each in report["matrix"] for word in each["findings"]]
    assert any(finding in word for word in found), found
