"""The simulation sees: each deliberate breakage of a guard turns it red."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from function.api_profile import Kind
from function.circuit_breaker import Permit
from function.errors import LedgerUnavailable
from function.ledger import Ledger
from function.model import (
    Answer,
    AnswerClass,
    Claim,
    Entry,
    Outcome,
    Receipt,
    Status,
    TopUp,
)
from function.processing import Processing
from proof.explore import Code, again, exhaust, first_deviations, search, shrink
from proof.judge import WatchedLedger
from proof.memory_ledger import MemoryLedger, Row
from proof.setups import small_setups
from proof.simulate import REPORT, main

ROOT: Final = Path(__file__).parents[2]


class NoFence(WatchedLedger):
    """Any attempt may write into any claim of its order."""

    def _claimed(self, key: str, token: str) -> Row | None:  # noqa: ARG002
        row = self.orders.get(key)
        return row if row and row.status is Status.IN_FLIGHT else None


class ReclaimsBlindly(WatchedLedger):
    """Takes an order back in flight whoever has tried it since it was read."""

    def reclaim(self, entry: Entry) -> Claim | None:
        row = self.orders[entry.idempotency_key]
        is_open = row.status in {Status.IN_DOUBT, Status.RELEASED, Status.PARKED}
        if is_open:
            entry = self._entry(row)
        return super().reclaim(entry)


class ReleasesDoubted(WatchedLedger):
    """Forgets a doubt when a later attempt was provably not executed."""

    def give_back(self, key: str, token: str, answer: Answer, **options: Any) -> bool:
        row = self._claimed(key, token)
        if row is not None:
            row.doubts = 0
        return super().give_back(key, token, answer, **options)


class CountsNoRefusals(WatchedLedger):
    """Never knows that the API has refused an order for now before."""

    def give_back(self, key: str, token: str, answer: Answer, **options: Any) -> bool:
        is_written = super().give_back(key, token, answer, **options)
        self.orders[key].not_executed = 0
        return is_written


class GateForgetsHeld(WatchedLedger):
    """Lets a new order pass those that wait."""

    def claim(self, order: TopUp) -> Claim | None:
        hidden = [
            row
            for row in self._line_of(order.msisdn)
            if row.status in {Status.HELD, Status.PARKED}
            and row.idempotency_key != order.idempotency_key
        ]
        for row in hidden:
            del self.orders[row.idempotency_key]
        claim = super().claim(order)
        for row in hidden:
            self.orders[row.idempotency_key] = row
        return claim


class SettlesLate(WatchedLedger):
    """A late answer overwrites whatever stands there."""

    def keep_evidence(self, key: str, token: str, answer: Answer) -> bool:
        if answer.classified is AnswerClass.DONE:
            self._change(self.orders[key], Status.SUCCEEDED)
            return True
        return super().keep_evidence(key, token, answer)


class ForgetsLostClaims(WatchedLedger):
    """The resolver leaves claims alone whose lease is over."""

    def due(self, **options: Any) -> list[Any]:
        found = super().due(**options)
        return [each for each in found if each.status is not Status.IN_FLIGHT]


class HoldsNothing(WatchedLedger):
    """An order that must wait is sent away unrecorded."""

    def hold(self, order: TopUp) -> bool:  # noqa: ARG002
        return False


class AnswersFirst(Processing):
    """Answers before the settlement is committed."""

    def _finish(
        self,
        order: TopUp,
        claim: Claim,
        answer: Answer,
        give_up_at: float,
        **options: Any,
    ) -> Receipt | None:
        try:
            return super()._finish(order, claim, answer, give_up_at, **options)
        except LedgerUnavailable:
            if answer.classified is AnswerClass.DONE:
                return Receipt(Outcome.SUCCEEDED, answer.reference)
            raise


class ForgetsTheWindow(Processing):
    """Sends the same key again for ever."""

    def _settle_doubt(
        self, order: TopUp, entry: Entry, looked: float, permit: Permit
    ) -> Any:
        if self._profile.kind is Kind.REPLAY:
            return self._send_again(order, entry, looked, permit)
        return super()._settle_doubt(order, entry, looked, permit)


class TakesAbsentForProof(Processing):
    """Does not wait for the settling time."""

    def _absent(self, order: TopUp, entry: Entry, permit: Permit) -> Receipt | None:
        return self._send_again(order, entry, self._monotonic(), permit)


class TakesUnknownForNotExecuted(Processing):
    """Takes a 500 for a proof that nothing was executed."""

    def _write(
        self, order: TopUp, claim: Claim, answer: Answer, **options: Any
    ) -> Receipt | None:
        if answer.http_status == 500:
            answer = replace(answer, classified=AnswerClass.RETRY)
        return super()._write(order, claim, answer, **options)


class SendsUncertainClaims(Processing):
    """Sends although it does not know whether it holds the claim."""

    def _claim(self, key: str, attempt: Callable[[], Claim | None]) -> Claim | None:
        try:
            return attempt()
        except LedgerUnavailable as error:
            token = getattr(error, "token", None)
            if token is None:
                raise
            return Claim(token, key, is_doubted=False)


class SleepsPastTheWindow(Processing):
    """Begins the deadline of a repeated key only after the window was checked."""

    def _send_again(
        self,
        order: TopUp,
        entry: Entry,
        started: float,  # noqa: ARG002
        permit: Permit,
    ) -> Receipt | None:
        return super()._send_again(order, entry, self._monotonic(), permit)


BROKEN: Final = {
    "no fence": Code(make_ledger=NoFence),
    "blind reclaim": Code(make_ledger=ReclaimsBlindly),
    "released although doubted": Code(make_ledger=ReleasesDoubted),
    "refusals are not counted": Code(make_ledger=CountsNoRefusals),
    "gate forgets held": Code(make_ledger=GateForgetsHeld),
    "late settlement overwrites": Code(make_ledger=SettlesLate),
    "lost claims forgotten": Code(make_ledger=ForgetsLostClaims),
    "unrecorded before 409": Code(make_ledger=HoldsNothing),
    "answer before settlement": Code(make_processing=AnswersFirst),
    "retry past the window": Code(make_processing=ForgetsTheWindow),
    "absent at once": Code(make_processing=TakesAbsentForProof),
    "500 taken for not executed": Code(make_processing=TakesUnknownForNotExecuted),
    "uncertain claim sent": Code(make_processing=SendsUncertainClaims),
    "slept past the window": Code(make_processing=SleepsPastTheWindow),
}
#: Breakage -> the kind of API, the run at which it was found when this was written,
#: and of what sort the find was.
FOUND: Final[dict[str, tuple[str, int, str | tuple[str, ...]]]] = {
    "no fence": ("none", 431, "double"),
    "blind reclaim": ("none", 13908, "double"),
    "released although doubted": ("replay", 711, "double"),
    "refusals are not counted": ("none", 3, ("waits", "stuck")),
    "gate forgets held": ("replay", 16, "out of order"),
    "late settlement overwrites": ("replay", 2859, ("reference", "not terminal")),
    "lost claims forgotten": ("none", 1279, "stuck"),
    "unrecorded before 409": ("replay", 3, "stuck"),
    "answer before settlement": ("replay", 958, "unsettled"),
    "retry past the window": ("replay", 30, "double"),
    "absent at once": ("lookup", 26, ("out of order", "double")),
    "500 taken for not executed": ("replay", 45, ("stuck", "double")),
    "uncertain claim sent": ("replay", 12, ("unrecorded", "double")),
    "slept past the window": ("replay", 711, ("double", "misjudged")),
}


def test_the_code_as_it_is_breaks_no_guarantee() -> None:
    assert search(0, 1_500).found is None


@pytest.mark.parametrize("name", BROKEN)
def test_broken_guard_is_found_by_a_seed(name: str) -> None:
    kind, run, sort = FOUND[name]

    # Another version of the setups or of the code may take longer.
    first = max(0, run - 500)
    found = search(first, 3_000 + run, kind=kind, code=BROKEN[name]).found

    assert found is not None
    assert found.violation.startswith(sort)


def test_two_deviations_are_enough_to_find_an_answer_before_its_settlement() -> None:
    code = Code(make_processing=AnswersFirst)
    setup = {each: setup for each, setup, _ in small_setups()}["replay-one"]

    tally = exhaust("replay-one", first_deviations(setup, code), 2, code=code)

    assert tally.found is not None
    assert tally.found.name.startswith("replay-one:")


def test_find_is_played_again_and_made_smaller() -> None:
    code = BROKEN["no fence"]
    kind, run, _ = FOUND["no fence"]
    found = search(0, 3 * run + 500, kind=kind, code=code).found
    assert found is not None

    _, violation = again(found.name, code)
    smaller = shrink(found, code)
    world, same = again(smaller.name, code)

    assert violation == found.violation
    assert same == smaller.violation
    assert same is not None
    assert same.partition(":")[0] == violation.partition(":")[0]
    assert len(world.chosen) <= len(again(found.name, code)[0].chosen)
    assert again(smaller.name)[1] is None
    # Everything that a person needs to follow it.
    assert any("is executed" in line for line in world.scheduler.trace or [])


@pytest.mark.parametrize("seed", range(5))
def test_seed_gives_the_same_run_each_time(seed: int) -> None:
    one, _ = again(f"lookup:{seed}")
    two, _ = again(f"lookup:{seed}")

    assert one.scheduler.trace == two.scheduler.trace


def test_run_that_nobody_has_named_is_refused() -> None:
    for name in ("replay", "replay:x", "nothing:1", "none-line:x"):
        with pytest.raises(ValueError, match="no run is called so"):
            again(name)
    assert main(["--replay", "nothing:1"]) == 2


def test_command_ends_green_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["--runs", "200", "--processes", "1"]) == 0

    report = json.loads((tmp_path / REPORT).read_text("utf-8"))
    assert report["verdict"] == "green"
    assert report["seeded_runs"] == 200
    assert report["found"] is None


def test_command_sees_a_broken_copy_of_the_function(tmp_path: Path) -> None:
    """As the mutants do: the copy stands where Python looks first."""
    for name in ("function", "proof"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    path = tmp_path / "function" / "attempt_end.py"
    text = path.read_text("utf-8")
    old = "if age_s < profile.window_s:"
    assert text.count(old) == 1
    path.write_text(text.replace(old, "if age_s >= 0:"), "utf-8")
    command = [sys.executable, "-m", "proof.simulate", "--processes", "1"]

    done = subprocess.run(
        [*command, "--runs", "1500", "--seed", "0", "--kind", "replay"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "RED: double" in done.stdout
    assert "--replay replay:" in done.stdout


def test_every_promise_of_the_ledger_is_kept_in_memory() -> None:
    promised = {name for name in vars(Ledger) if not name.startswith("_")}

    assert promised <= set(vars(MemoryLedger))
