"""The hostile API's judge: each rule, red and green."""

from random import Random
from typing import Any

import pytest

from proof.hostile_answers import DRESSINGS, Meaning, draw_meaning, dress, say
from proof.hostile_api import Call
from proof.hostile_judge import Row, Told, faults_of, judge

KEY = "app:r1"
DONE = Call(Meaning.EXECUTED, is_executed=True, reference="ref-1", dressing="plain")
REFUSED = Call(Meaning.REFUSED, is_executed=False, reference="ref-2", dressing="plain")
LOST = Call(Meaning.UNSAID, is_executed=True, reference="ref-3", dressing="cut")
OWN = Row("succeeded", "ref-1", "")


@pytest.mark.parametrize(
    ("row", "told", "calls"),
    [
        (OWN, Told(200, "ref-1"), [DONE]),
        (Row("rejected", None, "blocked"), Told(422, None), [REFUSED]),
        (Row("parked", None, "http_500"), Told(424, None), [LOST]),
        (Row("succeeded", "ref-3", ""), Told(424, None), [LOST]),
        (Row("released", None, ""), None, []),
        (None, None, []),
    ],
)
def test_own_end_is_no_fault(
    row: Row | None, told: Told | None, calls: list[Call]
) -> None:
    assert faults_of(KEY, row, told, calls) == []


@pytest.mark.parametrize(
    ("row", "told", "calls", "fault"),
    [
        (Row("succeeded", "ref-9", ""), None, [DONE], "not its own"),
        (OWN, None, [REFUSED], "not its own"),
        (Row("rejected", None, ""), None, [LOST], "rejected, and executed"),
        (Row("rejected", None, ""), None, [], "never refused"),
        (OWN, None, [DONE, LOST], "executed 2 times"),
        (OWN, Told(200, "ref-9"), [DONE], "200 with ref-9"),
        (Row("parked", None, ""), Told(200, "ref-1"), [DONE], "200 with ref-1"),
        (None, None, [DONE], "not in the ledger"),
    ],
)
def test_end_by_another_answer_is_a_fault(
    row: Row | None, told: Told | None, calls: list[Call], fault: str
) -> None:
    found = faults_of(KEY, row, told, calls)

    assert any(fault in each for each in found), found


def test_order_whose_request_crossed_late_bytes_is_not_judged() -> None:
    rows = {KEY: Row("succeeded", "ref-9", "")}

    assert judge(rows, {}, {KEY: [DONE]}, raced=set())
    assert judge(rows, {}, {KEY: [DONE]}, raced={KEY}) == []


def test_same_seed_draws_the_same_and_every_dressing_is_drawn() -> None:
    def draw(seed: int) -> list[Any]:
        random = Random(seed)  # noqa: S311 # answers, no secrets
        drawn = []
        for number in range(3_000):
            meaning, is_executed = draw_meaning(random)
            said = say(meaning, f"ref-{number}", b"foreign", random)
            drawn.append((meaning, is_executed, dress(said, random)))
        return drawn

    drawn = draw(1)
    assert drawn == draw(1)
    assert drawn != draw(2)
    assert {answer.name for _, _, answer in drawn} == set(DRESSINGS)
    # Honest: what it refuses or puts off it never executes.
    honest = {Meaning.REFUSED, Meaning.BUSY}
    assert not any(done for meaning, done, _ in drawn if meaning in honest)
