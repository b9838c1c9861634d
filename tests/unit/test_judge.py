"""The judge, shown each wrong once: a judge that can't say no proves nothing."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

import pytest

from demo.book import BookEntry
from demo.judge import (
    Delivered,
    LedgerView,
    Sent,
    Verdict,
    judge,
    place_in_topic,
    place_of_bytes,
)

ALICE = "+447700900001"
BOB = "+447700900002"


def sent(
    key: str | None, offset: int, msisdn: str = ALICE, *, partition: int = 0
) -> Sent:
    return Sent("orders", partition, offset, key, msisdn, "plain")


def refused(offset: int, key: str | None = None) -> Sent:
    return replace(sent(key, offset), expected="refused")


def entry(
    key: str, what: Literal["called", "accepted", "executed", "rejected"] = "executed"
) -> BookEntry:
    return BookEntry(datetime(2026, 1, 1, tzinfo=UTC), what, key=key)


def assert_adds_up(verdict: Verdict) -> None:
    assert verdict.unique == (
        verdict.executed
        + verdict.rejected
        + (verdict.in_doubt - verdict.in_doubt_executed)
        + verdict.held
        + verdict.quarantined
        + verdict.missing
    )


def test_each_order_executed_once_and_in_order_is_green() -> None:
    records = [sent("a", 0), sent("b", 1), sent("a", 2), sent("c", 0, BOB, partition=1)]
    book = [entry("a", "called"), entry("a"), entry("c"), entry("b")]

    verdict = judge(records, book, LedgerView({}))

    assert verdict.is_green
    assert (verdict.sent, verdict.unique, verdict.executed) == (4, 3, 3)
    assert verdict.calls == 1
    assert_adds_up(verdict)


def test_nothing_sent_is_green() -> None:
    assert judge([], [], LedgerView({})).is_green


def test_second_execution_is_a_double() -> None:
    verdict = judge([sent("a", 0)], [entry("a")] * 3, LedgerView({"a": "succeeded"}))

    assert (verdict.double, verdict.double_keys) == (2, ("a",))
    assert not verdict.is_green
    assert_adds_up(verdict)


def test_order_called_under_two_keys_is_a_double() -> None:
    records = [sent("a", 0), sent("a", 7)]
    names = {"g#0": "a", "g#7": "a"}

    verdict = judge(records, [entry("g#0"), entry("g#7")], LedgerView({}), names=names)

    assert (verdict.double, verdict.executed) == (1, 1)


def test_order_that_is_nowhere_is_missing() -> None:
    verdict = judge([sent("a", 0), sent("b", 1)], [entry("a")], LedgerView({}))

    assert (verdict.missing, verdict.missing_keys) == (1, ("b",))
    assert not verdict.is_green
    assert_adds_up(verdict)


@pytest.mark.parametrize("status", ["succeeded", "accepted", "released", "in_flight"])
def test_ledger_alone_proves_no_execution(status: str) -> None:
    verdict = judge([sent("a", 0)], [], LedgerView({"a": status}))

    assert verdict.missing == 1
    assert not verdict.is_green


@pytest.mark.parametrize(
    ("status", "number"),
    [
        ("rejected", "rejected"),
        ("abandoned", "rejected"),
        ("in_doubt", "in_doubt"),
        ("parked", "in_doubt"),
        ("held", "held"),
    ],
)
def test_what_the_ledger_shows_is_not_missing(status: str, number: str) -> None:
    verdict = judge([sent("a", 0)], [], LedgerView({"a": status}))

    assert verdict.as_json()[number] == 1
    assert verdict.is_green
    assert_adds_up(verdict)


def test_order_in_doubt_that_was_executed_counts_once() -> None:
    verdict = judge([sent("a", 0)], [entry("a")], LedgerView({"a": "parked"}))

    assert (verdict.in_doubt, verdict.in_doubt_executed, verdict.executed) == (1, 1, 1)
    assert verdict.is_green
    assert_adds_up(verdict)


def test_later_order_of_a_subscriber_executed_first_is_out_of_order() -> None:
    records = [sent("a", 0), sent("b", 1), sent("c", 2)]

    verdict = judge(records, [entry("a"), entry("c"), entry("b")], LedgerView({}))

    assert (verdict.out_of_order, verdict.out_of_order_keys) == (1, ("b",))
    assert not verdict.is_green


def test_place_in_line_is_that_of_the_first_occurrence() -> None:
    records = [sent("a", 2), sent("b", 1), sent("a", 0)]

    assert judge(records, [entry("a"), entry("b")], LedgerView({})).is_green
    assert judge(records, [entry("b"), entry("a")], LedgerView({})).out_of_order == 1


def test_accepted_order_has_its_turn_where_the_api_took_it_over() -> None:
    records = [sent("a", 0), sent("b", 1)]
    in_order = [entry("a", "accepted"), entry("b"), entry("a")]
    out_of_order = [entry("b", "accepted"), entry("a"), entry("b")]

    assert judge(records, in_order, LedgerView({})).out_of_order == 0
    assert judge(records, out_of_order, LedgerView({})).out_of_order_keys == ("a",)


def test_order_that_was_accepted_and_failed_has_no_turn() -> None:
    records = [sent("a", 0), sent("b", 1)]
    book = [entry("b", "accepted"), entry("b", "rejected"), entry("a")]

    verdict = judge(records, book, LedgerView({"b": "rejected"}))

    assert (verdict.is_green, verdict.rejected) == (True, 1)


def test_subscribers_have_no_order_among_each_other() -> None:
    records = [sent("a", 0), sent("b", 1, BOB)]

    assert judge(records, [entry("b"), entry("a")], LedgerView({})).is_green


def test_poison_in_quarantine_is_green() -> None:
    ledger = LedgerView({}, frozenset({place_in_topic("orders", 0, 3)}))

    verdict = judge([refused(3)], [], ledger)

    assert verdict.is_green
    assert (verdict.unique, verdict.quarantined) == (1, 1)
    assert_adds_up(verdict)


def test_poison_that_is_not_in_quarantine_is_missing() -> None:
    ledger = LedgerView({}, frozenset({place_in_topic("orders", 0, 4)}))

    verdict = judge([refused(3)], [], ledger)

    assert verdict.missing_keys == ("orders[0]@3",)
    assert_adds_up(verdict)


def test_body_without_a_place_is_found_by_its_bytes() -> None:
    raw = b"x" * 20_000
    content = place_of_bytes(raw, len(raw))
    direct = replace(refused(0), partition=-1, content=content)
    kept = place_of_bytes(raw[: 16 * 1024], len(raw))

    assert judge([direct], [], LedgerView({}, frozenset({kept}))).quarantined == 1
    assert judge([direct], [], LedgerView({})).missing_keys == (content,)


def test_reused_key_in_quarantine_leaves_the_first_order_alone() -> None:
    records = [sent("a", 0), refused(1, "a")]
    ledger = LedgerView({"a": "succeeded"}, frozenset({"orders[0]@1"}))

    verdict = judge(records, [entry("a")], ledger)

    assert verdict.is_green
    assert (verdict.unique, verdict.executed, verdict.quarantined) == (2, 1, 1)


def test_execution_of_what_nobody_may_execute_is_misjudged() -> None:
    ledger = LedgerView({}, frozenset({"orders[0]@0"}))

    verdict = judge([refused(0, "a")], [entry("a")], ledger)

    assert verdict.misjudged_keys == ("a",)
    assert not verdict.is_green
    assert_adds_up(verdict)


def test_executed_poison_is_misjudged_not_missing() -> None:
    verdict = judge([refused(0, "a")], [entry("a")], LedgerView({}))

    assert (verdict.misjudged, verdict.missing, verdict.executed) == (1, 0, 1)
    assert_adds_up(verdict)


def test_execution_of_what_nobody_sent_is_misjudged() -> None:
    assert judge([], [entry("a")], LedgerView({})).misjudged == 1


def test_rejection_of_what_was_executed_is_misjudged() -> None:
    verdict = judge([sent("a", 0)], [entry("a")], LedgerView({"a": "rejected"}))

    assert verdict.misjudged_keys == ("a",)


def test_quarantine_of_a_good_order_is_misjudged_not_missing() -> None:
    verdict = judge([sent("a", 0)], [], LedgerView({}, frozenset({"orders[0]@0"})))

    assert (verdict.quarantined, verdict.missing, verdict.misjudged) == (1, 0, 1)
    assert_adds_up(verdict)


def test_what_the_source_did_is_passed_on() -> None:
    delivered = Delivered(redeliveries=3, dead_lettered=2)

    verdict = judge([], [], LedgerView({}), delivered=delivered, seconds=1.26)

    assert (verdict.redeliveries, verdict.dead_lettered) == (3, 2)
    assert verdict.seconds == 1.3
