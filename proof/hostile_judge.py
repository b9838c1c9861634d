"""Whether an order was settled by an answer that was not its own: by the API's book.

Pure: it is handed the ledger's rows and the book, and owns the rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from proof.hostile_answers import Meaning
from proof.hostile_api import Call


@dataclass(frozen=True, slots=True)
class Row:
    """What the ledger says of an order at the end."""

    status: str
    reference: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """What the last delivery of an order was answered."""

    status: int
    #: The completion event's, of a 200.
    reference: str | None


def faults_of(
    key: str, row: Row | None, told: Told | None, calls: list[Call]
) -> list[str]:
    """Every rule that an order's end breaks.

    Args:
        key: the idempotency key, for the words.
        row: None: the ledger does not know it.
        told: None: no delivery was answered.
        calls: what the API did and meant, in its order.

    """
    done = {call.reference for call in calls if call.is_executed}
    faults = []
    if len(done) > 1:
        faults.append(f"{key}: executed {len(done)} times")
    if row is None:
        if calls:
            faults.append(f"{key}: called, and not in the ledger")
        return faults
    if row.status in {"succeeded", "accepted"} and row.reference not in done:
        faults.append(
            f"{key}: {row.status} with {row.reference}, which is not its own: "
            f"{_words(calls)}"
        )
    if row.status == "rejected":
        if done:
            faults.append(f"{key}: rejected, and executed: {_words(calls)}")
        elif all(call.meaning is not Meaning.REFUSED for call in calls):
            faults.append(f"{key}: rejected, and never refused: {_words(calls)}")
    if told is not None and told.status == 200:  # noqa: PLR2004
        is_same = row.status == "succeeded" and told.reference == row.reference
        if not is_same:
            faults.append(f"{key}: 200 with {told.reference}, the row has {row}")
    return faults


def judge(
    rows: Mapping[str, Row],
    told: Mapping[str, Told],
    calls: Mapping[str, list[Call]],
    raced: set[str],
) -> list[str]:
    """Every fault of every order whose answer can be known."""
    keys = sorted({*rows, *told, *calls} - raced)
    return [
        fault
        for key in keys
        for fault in faults_of(key, rows.get(key), told.get(key), calls.get(key, []))
    ]


def _words(calls: list[Call]) -> str:
    return "; ".join(
        f"{call.meaning} as {call.dressing!r} ({call.reference})" for call in calls
    )
