"""The soak's verdict: green only for a book without fault, red for every other."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from demo.book import BookEntry
from demo.judge import LedgerView, Sent, judge
from proof.verdict import FOUND, GREEN, Found, calls_spoiled

TOPIC = "recharge.orders"
SUBSCRIBER = "+12015550100"


def sent(*keys: str) -> list[Sent]:
    return [
        Sent(TOPIC, 0, offset, key, SUBSCRIBER, "plain")
        for offset, key in enumerate(keys)
    ]


def book(*keys: str, fault: str = "") -> list[BookEntry]:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        BookEntry(at, entry, call=number, key=key, msisdn=SUBSCRIBER, fault=fault)
        for number, key in enumerate(keys)
        for entry in ("called", "executed")
    ]


def found_in(
    executed: Sequence[str],
    *,
    statuses: dict[str, str] | None = None,
    unfinished: dict[str, int] | None = None,
    lag: int | None = 0,
    are_replicas_equal: bool = True,
) -> Found:
    """The verdict about a, b, c of one subscriber, sent in this order."""
    view = LedgerView(statuses or dict.fromkeys("abc", "succeeded"))
    return Found(
        judge(sent("a", "b", "c"), iter(book(*executed)), view),
        unfinished=unfinished or {},
        lag=lag,
        are_replicas_equal=are_replicas_equal,
    )


def test_each_once_and_in_order_is_green() -> None:
    found = found_in("abc")

    assert (found.is_green, found.problems, found.exit_status) == (True, [], GREEN)


@pytest.mark.parametrize(
    ("executed", "problem"),
    [
        ("abbc", "1 executions too many"),
        ("abcabc", "3 executions too many"),
        # The ledger says succeeded, and the book has never heard of it.
        ("ac", "1 orders or records that are nowhere"),
        ("acb", "1 orders executed out of order"),
        ("abcx", "1 orders misjudged"),
    ],
)
def test_book_with_a_fault_is_red(executed: str, problem: str) -> None:
    found = found_in(executed)

    assert found.problems == [problem]
    assert (found.is_green, found.exit_status) == (False, FOUND)


def test_order_rejected_though_executed_is_red() -> None:
    found = found_in("abc", statuses={"a": "rejected"})

    assert found.problems == ["1 orders misjudged"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"unfinished": {"held": 2, "parked": 1}}, "3 orders without an end"),
        ({"lag": 4}, "4 records not consumed"),
        ({"lag": None}, "an unknown number of records not consumed"),
        ({"are_replicas_equal": False}, "primary and replica differ"),
    ],
)
def test_what_does_not_come_to_its_end_is_red(
    more: dict[str, object], problem: str
) -> None:
    found = found_in("abc", **more)  # type: ignore[arg-type]

    assert found.problems == [problem]
    assert found.exit_status == FOUND


def test_soak_in_which_nothing_happened_is_not_green() -> None:
    nothing = Found(judge([], [], LedgerView({})))

    assert nothing.exit_status == FOUND


def test_every_problem_is_named() -> None:
    found = found_in("acbb", lag=1)

    assert len(found.problems) == 3


def test_calls_are_counted_by_what_spoiled_them() -> None:
    entries = [*book("a", fault="hang"), *book("b", "c", fault="drip"), *book("d")]

    assert calls_spoiled(entries) == {"drip": 2, "hang": 1}
