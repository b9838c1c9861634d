"""Every outcome has a status, and none that ends a record comes before its recording.

Knative's Kafka dispatcher delivers again after 404, 408, 409, 429, everything from 500,
and errors of the connection. After any other 3xx or 4xx it dead-letters the record, or
drops it when that fails: so the ledger must hold it by then.
"""

import ast
from pathlib import Path
from typing import Final

from function.model import Outcome

MAIN: Final = Path(__file__).parents[2] / "function" / "main.py"

#: Where the ledger holds an event that the source will not bring again: in the table
#: of top-ups, or in quarantine. A new outcome that ends a record must be added here,
#: by somebody who has made sure of it.
HELD_BY: Final = {
    Outcome.REJECTED: "topup",
    Outcome.ABANDONED: "topup",
    Outcome.PARKED: "topup",
    Outcome.POSTPONED: "topup",
    Outcome.HELD: "topup",
    Outcome.MALFORMED: "quarantine",
    Outcome.INVALID: "quarantine",
    Outcome.TOO_LARGE: "quarantine",
    Outcome.KEY_REUSED: "quarantine",
    Outcome.QUARANTINED: "quarantine",
}

#: README, What is guaranteed, row by row.
CONTRACT: Final = {
    Outcome.SUCCEEDED: 200,
    Outcome.ACCEPTED: 200,
    Outcome.REJECTED: 422,
    Outcome.ABANDONED: 422,
    Outcome.MALFORMED: 400,
    Outcome.INVALID: 400,
    Outcome.TOO_LARGE: 413,
    Outcome.KEY_REUSED: 422,
    Outcome.UNKNOWN_TYPE: 503,
    Outcome.QUARANTINED: 422,
    Outcome.NOT_ADMITTED: 503,
    Outcome.IN_FLIGHT: 409,
    Outcome.WAITING: 409,
    Outcome.RELEASED: 503,
    Outcome.PARKED: 424,
    Outcome.POSTPONED: 424,
    Outcome.HELD: 424,
    Outcome.REFUSED_US: 503,
    Outcome.PAUSED: 503,
    Outcome.CIRCUIT_OPEN: 503,
    Outcome.DRAINING: 503,
    Outcome.LEDGER_UNAVAILABLE: 503,
    Outcome.UNFORESEEN: 503,
}


def is_delivered_again(status: int) -> bool:
    return status in {404, 408, 409, 429} or status >= 500


def statuses() -> dict[Outcome, int]:
    """The table as it is written: main.py is never imported but by its server."""
    for node in ast.walk(ast.parse(MAIN.read_text("utf-8"))):
        match node:
            case ast.AnnAssign(target=ast.Name(id="STATUS"), value=ast.Dict() as table):
                return {
                    Outcome[key.attr]: int(value.value)
                    for key, value in zip(table.keys, table.values, strict=True)
                    if isinstance(key, ast.Attribute)
                    if isinstance(value, ast.Constant) and isinstance(value.value, int)
                }
    raise AssertionError("main.py has no table STATUS")


def test_every_outcome_has_the_status_of_the_contract() -> None:
    assert statuses() == CONTRACT
    assert set(CONTRACT) == set(Outcome)


def test_status_that_ends_a_record_belongs_to_an_outcome_that_is_recorded() -> None:
    ends = {
        outcome
        for outcome, status in statuses().items()
        if not 200 <= status <= 299 and not is_delivered_again(status)
    }

    assert ends == set(HELD_BY)


def test_only_a_recharge_that_the_api_has_taken_is_answered_with_2xx() -> None:
    good = {outcome for outcome, status in statuses().items() if status < 300}

    assert good == {Outcome.SUCCEEDED, Outcome.ACCEPTED}


def test_what_is_not_in_the_ledger_is_delivered_again() -> None:
    table = statuses()

    for outcome in set(Outcome) - set(HELD_BY) - {Outcome.SUCCEEDED, Outcome.ACCEPTED}:
        assert is_delivered_again(table[outcome]), outcome
