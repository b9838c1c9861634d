"""What the ledger promises, on SQLite, on MariaDB and in the simulation's memory."""

import time
from dataclasses import replace
from itertools import product

import pytest

from function.api_profile import ApiProfile, load_profile
from function.errors import IllegalTransition
from function.ledger import Ledger
from function.model import (
    TERMINAL,
    TRANSITIONS,
    Answer,
    AnswerClass,
    Claim,
    Entry,
    Outcome,
    Position,
    Refused,
    Status,
    TopUp,
    kept_place,
    key_of_place,
)
from tests.conftest import Database, settings_of
from tests.orders import order

DONE = Answer(AnswerClass.DONE, http_status=201, reference="R-1")
ACCEPTED = Answer(AnswerClass.ACCEPTED, http_status=202, reference="R-1")
NO = Answer(
    AnswerClass.NO, http_status=422, reason="invalid_number", words="No such number"
)
UNKNOWN = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
RETRY = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")


@pytest.fixture
def profile() -> ApiProfile:
    return load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))


@pytest.fixture
def ledger(database: Database, profile: ApiProfile) -> Ledger:
    return database.make_ledger(profile, lease_s=30)


def claimed(ledger: Ledger, topup: TopUp) -> Claim:
    claim = ledger.claim(topup)
    assert claim is not None
    return claim


def entry_of(ledger: Ledger, topup: TopUp) -> Entry:
    entry, _ = ledger.look(topup)
    assert entry is not None
    return entry


def in_doubt(ledger: Ledger, topup: TopUp) -> Entry:
    token = claimed(ledger, topup).token
    assert ledger.doubt(topup.idempotency_key, token, UNKNOWN, is_parked=False)
    return entry_of(ledger, topup)


def let_lease_end(database: Database, topup: TopUp) -> None:
    database.change(topup.idempotency_key, lease_until="2000-01-01 00:00:00")


def make(status: Status, ledger: Ledger, database: Database, topup: TopUp) -> Entry:
    """A row in any status, made by the ledger's own transitions."""
    key = topup.idempotency_key
    if status is Status.HELD:
        database.pause("*")
        assert ledger.hold(topup)
        database.resume()
        return entry_of(ledger, topup)
    token = claimed(ledger, topup).token
    if status is Status.SUCCEEDED:
        assert ledger.settle(key, token, DONE)
    elif status is Status.ACCEPTED:
        assert ledger.settle(key, token, ACCEPTED)
    elif status is Status.REJECTED:
        assert ledger.settle(key, token, NO)
    elif status is Status.RELEASED:
        assert ledger.give_back(key, token, RETRY)
    elif status in {Status.IN_DOUBT, Status.PARKED}:
        is_parked = status is Status.PARKED
        assert ledger.doubt(key, token, UNKNOWN, is_parked=is_parked)
    elif status is Status.ABANDONED:
        database.change(key, status="abandoned")
    entry = entry_of(ledger, topup)
    assert entry.status is status
    return entry


def test_new_order_is_claimed_and_committed_at_once(
    ledger: Ledger, database: Database
) -> None:
    topup = order(offset=7, partition=3)
    claim = claimed(ledger, topup)

    row = database.row(topup.idempotency_key)
    assert row["status"] == "in_flight"
    assert row["token"] == claim.token
    assert row["attempts"] == 1
    assert row["rendered_key"] == claim.rendered_key == topup.idempotency_key
    assert row["payload"] == topup.payload
    assert (row["topic"], row["kafka_partition"], row["kafka_offset"]) == (
        "recharge.orders",
        3,
        7,
    )
    assert (row["unsettled"], row["active"]) == (1, 1)


def test_same_key_is_claimed_once(ledger: Ledger) -> None:
    claimed(ledger, order())

    assert ledger.claim(order()) is None


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.IN_FLIGHT])
def test_known_key_is_never_claimed_as_new(
    ledger: Ledger, database: Database, status: Status
) -> None:
    make(status, ledger, database, order())

    assert ledger.claim(order()) is None
    assert entry_of(ledger, order()).status is status


def test_other_order_of_subscriber_waits_until_settled(ledger: Ledger) -> None:
    first, second = order("r1"), order("r2")
    token = claimed(ledger, first).token

    assert ledger.claim(second) is None
    entry, line = ledger.look(second)
    assert entry is None
    assert line.blocker is Status.IN_FLIGHT
    assert not line.is_stuck

    assert ledger.settle(first.idempotency_key, token, DONE)
    claimed(ledger, second)


@pytest.mark.parametrize(
    "status",
    [Status.IN_FLIGHT, Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED],
)
def test_unsettled_order_blocks_its_subscriber_alone(
    ledger: Ledger, database: Database, status: Status
) -> None:
    make(status, ledger, database, order("r1"))

    assert ledger.claim(order("r2")) is None
    claimed(ledger, order("r3", msisdn="+393330000000"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("abc", "ABC"), ("e", "%C3%A9"), ("x", "x%20"), ("a", "a.")],
)
def test_keys_that_differ_at_all_are_different_orders(
    ledger: Ledger, one: str, other: str
) -> None:
    token = claimed(ledger, order(one)).token
    assert ledger.settle(order(one).idempotency_key, token, DONE)

    claimed(ledger, order(other))


def test_same_name_in_another_channel_is_another_order(ledger: Ledger) -> None:
    token = claimed(ledger, order("r1", channel="app")).token
    assert ledger.settle("app:r1", token, DONE)

    claimed(ledger, order("r1", channel="shop"))


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (DONE, Status.SUCCEEDED),
        (ACCEPTED, Status.ACCEPTED),
        (NO, Status.REJECTED),
    ],
)
def test_settlement_is_written_with_its_answer(
    ledger: Ledger, database: Database, answer: Answer, status: Status
) -> None:
    token = claimed(ledger, order()).token

    assert ledger.settle("app:r1", token, answer)

    row = database.row("app:r1")
    assert row["status"] == status
    assert row["reference"] == answer.reference
    assert row["reason"] == (answer.reason if status is Status.REJECTED else "")
    assert row["active"] is None
    assert row["unsettled"] is None


def test_plain_success_leaves_no_attempt_and_a_rejection_keeps_the_words(
    ledger: Ledger, database: Database
) -> None:
    token = claimed(ledger, order("r1")).token
    assert ledger.settle("app:r1", token, DONE)
    assert database.rows("attempt") == []

    token = claimed(ledger, order("r2")).token
    assert ledger.settle("app:r2", token, NO)
    (evidence,) = database.rows("attempt")
    assert evidence["token"] == token
    assert evidence["words"] == "No such number"
    assert evidence["http_status"] == 422


def test_wrong_token_changes_nothing(ledger: Ledger, database: Database) -> None:
    claimed(ledger, order())
    before = database.row("app:r1")

    assert not ledger.settle("app:r1", "0" * 32, DONE)
    assert not ledger.settle("app:r1", "0" * 32, NO)
    assert not ledger.give_back("app:r1", "0" * 32, RETRY)
    assert not ledger.doubt("app:r1", "0" * 32, UNKNOWN, is_parked=False)

    assert database.row("app:r1") == before
    assert database.rows("attempt") == []


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_terminal_status_never_changes(
    ledger: Ledger, database: Database, status: Status
) -> None:
    entry = make(status, ledger, database, order(offset=1))
    let_lease_end(database, order())
    before = database.row("app:r1")
    token = entry.token or ""

    assert not ledger.settle("app:r1", token, DONE)
    assert not ledger.give_back("app:r1", token, RETRY)
    assert not ledger.doubt("app:r1", token, UNKNOWN, is_parked=True)
    assert not ledger.expire(entry)
    assert not ledger.keep_evidence("app:r1", token, DONE)
    assert not ledger.hold(order())
    assert ledger.overtake(order("r2", offset=2)) == []
    for seen in (Status.IN_DOUBT, Status.HELD, Status.RELEASED):
        assert ledger.reclaim(replace(entry, status=seen)) is None
    assert not ledger.end_doubt(replace(entry, status=Status.IN_DOUBT), DONE)
    assert not ledger.park(replace(entry, status=Status.IN_DOUBT), "why")

    assert database.row("app:r1") == before


@pytest.mark.parametrize("status", Status)
def test_illegal_transition_is_refused(
    ledger: Ledger, database: Database, status: Status
) -> None:
    entry = make(status, ledger, database, order())
    if Status.IN_FLIGHT not in TRANSITIONS[status]:
        with pytest.raises(IllegalTransition):
            ledger.reclaim(entry)
    if Status.SUCCEEDED not in TRANSITIONS[status]:
        with pytest.raises(IllegalTransition):
            ledger.end_doubt(entry, DONE)
    if Status.PARKED not in TRANSITIONS[status]:
        with pytest.raises(IllegalTransition):
            ledger.park(entry, "why")
    assert entry_of(ledger, order()).status is status


def test_released_order_is_claimed_again_under_a_new_token(ledger: Ledger) -> None:
    first = claimed(ledger, order())
    assert ledger.give_back("app:r1", first.token, RETRY)
    entry = entry_of(ledger, order())
    assert entry.status is Status.RELEASED

    second = ledger.reclaim(entry)

    assert second is not None
    assert second.token != first.token
    assert not second.is_doubted
    assert not ledger.settle("app:r1", first.token, DONE)
    assert ledger.settle("app:r1", second.token, DONE)


def test_doubt_is_sticky_when_a_later_attempt_was_not_sent(ledger: Ledger) -> None:
    entry = in_doubt(ledger, order())
    assert entry.doubts == 1
    claim = ledger.reclaim(entry)
    assert claim is not None
    assert claim.is_doubted

    assert ledger.give_back("app:r1", claim.token, RETRY)

    entry = entry_of(ledger, order())
    assert (entry.status, entry.reason) == (Status.PARKED, "connection_error")


def test_reclaim_is_only_for_the_very_attempt_that_was_read(ledger: Ledger) -> None:
    stale = in_doubt(ledger, order())
    claim = ledger.reclaim(stale)
    assert claim is not None
    assert ledger.doubt("app:r1", claim.token, UNKNOWN, is_parked=False)

    assert ledger.reclaim(stale) is None
    assert not ledger.end_doubt(stale, DONE)
    assert not ledger.park(stale, "why")
    assert ledger.reclaim(entry_of(ledger, order())) is not None


def test_first_send_is_remembered_over_later_ones(
    ledger: Ledger, database: Database
) -> None:
    entry = in_doubt(ledger, order())
    database.change(first_sent_at="2001-01-01 00:00:00", sent_at="2001-01-01 00:00:00")
    assert ledger.reclaim(entry) is not None

    entry = entry_of(ledger, order())
    assert entry.first_sent_age_s is not None
    assert entry.first_sent_age_s > 86400
    assert entry.sent_age_s is not None
    assert entry.sent_age_s < 60


def test_lease_runs_by_the_databases_clock(ledger: Ledger, database: Database) -> None:
    claimed(ledger, order())
    entry = entry_of(ledger, order())
    assert not entry.is_lease_over
    assert not ledger.expire(entry)

    let_lease_end(database, order())
    entry = entry_of(ledger, order())
    assert entry.is_lease_over
    assert ledger.expire(entry)

    entry = entry_of(ledger, order())
    assert entry.status is Status.IN_DOUBT
    assert entry.doubts == 1
    (evidence,) = database.rows("attempt")
    assert evidence["reason"] == "lease_over"


@pytest.mark.parametrize("wrong_s", [-3600, 3600])
def test_pods_wrong_clock_moves_no_lease(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, wrong_s: float
) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + wrong_s)
    claimed(ledger, order())
    monkeypatch.undo()

    entry = entry_of(ledger, order())
    assert not entry.is_lease_over
    assert entry.sent_age_s is not None
    assert abs(entry.sent_age_s) < 60


def test_expired_lease_fences_the_attempt_that_lost_it(
    ledger: Ledger, database: Database
) -> None:
    claim = claimed(ledger, order())
    let_lease_end(database, order())
    assert ledger.expire(entry_of(ledger, order()))

    assert not ledger.settle("app:r1", claim.token, DONE)
    assert not ledger.give_back("app:r1", claim.token, RETRY)


def test_look_up_ends_a_doubt(ledger: Ledger, database: Database) -> None:
    entry = in_doubt(ledger, order())

    assert ledger.end_doubt(entry, DONE)

    assert database.row("app:r1")["status"] == "succeeded"
    assert [row["classified"] for row in database.rows("attempt")] == [
        "unknown",
        "done",
    ]


@pytest.mark.parametrize(
    "status", [Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED]
)
def test_late_success_settles_a_row_that_nobody_holds(
    ledger: Ledger, database: Database, status: Status
) -> None:
    make(status, ledger, database, order())

    assert ledger.keep_evidence("app:r1", "f" * 32, DONE)

    row = database.row("app:r1")
    assert (row["status"], row["reference"]) == ("succeeded", "R-1")


def test_late_success_is_kept_but_changes_nothing_while_another_holds_the_row(
    ledger: Ledger, database: Database
) -> None:
    claim = claimed(ledger, order())

    assert not ledger.keep_evidence("app:r1", "f" * 32, DONE)

    assert database.row("app:r1")["status"] == "in_flight"
    assert database.rows("attempt")[0]["token"] == "f" * 32
    assert ledger.settle("app:r1", claim.token, DONE)


def test_late_no_is_kept_and_settles_nothing(
    ledger: Ledger, database: Database
) -> None:
    in_doubt(ledger, order())

    assert not ledger.keep_evidence("app:r1", "f" * 32, NO)

    assert database.row("app:r1")["status"] == "in_doubt"
    assert len(database.rows("attempt")) == 2


def test_nothing_is_held_behind_nothing(ledger: Ledger, database: Database) -> None:
    assert not ledger.hold(order())
    assert database.rows("topup") == []


def test_order_is_held_behind_an_unsettled_one_and_runs_when_first(
    ledger: Ledger,
) -> None:
    first, second, third = order("r1"), order("r2"), order("r3")
    token = claimed(ledger, first).token
    assert ledger.hold(second)
    assert ledger.hold(third)
    assert not ledger.hold(second)

    assert ledger.reclaim(entry_of(ledger, second)) is None
    assert ledger.settle("app:r1", token, DONE)
    assert ledger.reclaim(entry_of(ledger, third)) is None
    claim = ledger.reclaim(entry_of(ledger, second))
    assert claim is not None
    assert not claim.is_doubted
    assert ledger.reclaim(entry_of(ledger, third)) is None
    assert ledger.settle("app:r2", claim.token, DONE)
    assert ledger.reclaim(entry_of(ledger, third)) is not None


def test_earlier_offset_that_comes_later_takes_its_place_before(
    ledger: Ledger,
) -> None:
    blocker = order("r0", offset=1, partition=9)
    token = claimed(ledger, blocker).token
    later, earlier = order("r2", offset=12), order("r1", offset=11)
    assert ledger.hold(later)
    assert ledger.hold(earlier)
    assert ledger.settle("app:r0", token, DONE)

    assert ledger.look(earlier)[1].blocker is None
    assert ledger.look(later)[1].blocker is Status.HELD
    assert ledger.reclaim(entry_of(ledger, later)) is None
    assert ledger.reclaim(entry_of(ledger, earlier)) is not None


def test_order_that_is_not_recorded_stands_before_later_offsets_of_its_partition(
    ledger: Ledger, database: Database
) -> None:
    make(Status.PARKED, ledger, database, order("r2", offset=12))

    assert ledger.look(order("r1", offset=11))[1].blocker is None
    assert ledger.look(order("r3", offset=13))[1].blocker is Status.PARKED
    assert ledger.look(order("r4", offset=1, partition=1))[1].is_stuck


def test_order_that_is_put_off_is_released_and_keeps_its_place(
    ledger: Ledger, database: Database
) -> None:
    assert ledger.put_off(order("r1"))
    assert not ledger.put_off(order("r1"))

    entry = entry_of(ledger, order("r1"))
    assert (entry.status, entry.token, entry.api_kind) == (Status.RELEASED, None, None)
    assert ledger.claim(order("r2")) is None
    assert ledger.hold(order("r2"))
    claim = ledger.reclaim(entry)
    assert claim
    assert entry_of(ledger, order("r1")).api_kind == "none"
    assert ledger.settle("app:r1", claim.token, DONE)
    assert database.row("app:r1")["attempts"] == 1


def test_pause_says_who_and_why(ledger: Ledger, database: Database) -> None:
    assert ledger.look(order())[1].pause == ""
    database.pause("app", by="ann", why="fraud")

    line = ledger.look(order())[1]

    assert (line.is_channel_paused, line.pause) == (True, "ann: fraud")


def test_reason_of_a_parked_order_is_in_its_row_until_it_is_called_again(
    ledger: Ledger, database: Database
) -> None:
    entry = in_doubt(ledger, order())
    assert ledger.park(entry, "one")
    assert not ledger.note(entry, "stale")
    parked = entry_of(ledger, order())
    assert parked.reason == "one"
    before = database.row("app:r1")

    assert ledger.note(parked, "two")

    assert database.row("app:r1") == before | {"reason": "two"}
    claim = ledger.reclaim(entry_of(ledger, order()))
    assert claim
    assert entry_of(ledger, order()).reason == ""
    assert ledger.doubt("app:r1", claim.token, UNKNOWN, is_parked=True)
    assert entry_of(ledger, order()).reason == UNKNOWN.reason


@pytest.mark.parametrize(
    ("status", "is_stuck"),
    [
        (Status.IN_FLIGHT, False),
        (Status.IN_DOUBT, False),
        (Status.RELEASED, False),
        (Status.PARKED, True),
        (Status.HELD, True),
    ],
)
def test_line_is_stuck_behind_what_will_not_come_again(
    ledger: Ledger, database: Database, status: Status, *, is_stuck: bool
) -> None:
    make(status, ledger, database, order("r1"))

    line = ledger.look(order("r2"))[1]

    assert line.blocker is status
    assert line.is_stuck is is_stuck


@pytest.mark.parametrize(
    ("status", "becomes"),
    [
        (Status.IN_DOUBT, Status.PARKED),
        (Status.RELEASED, Status.HELD),
        (Status.HELD, Status.HELD),
        (Status.PARKED, Status.PARKED),
        (Status.IN_FLIGHT, Status.IN_FLIGHT),
    ],
)
def test_later_record_shows_that_the_source_gave_up_on_the_earlier(
    ledger: Ledger, database: Database, status: Status, becomes: Status
) -> None:
    make(status, ledger, database, order("r1", offset=1))

    changed = ["app:r1"] if status is not becomes else []
    assert ledger.overtake(order("r2", offset=2)) == changed

    assert entry_of(ledger, order("r1")).status is becomes


def test_expired_claim_is_parked_when_overtaken(
    ledger: Ledger, database: Database
) -> None:
    claimed(ledger, order("r1", offset=1))
    let_lease_end(database, order("r1"))

    assert ledger.overtake(order("r2", offset=2)) == ["app:r1"]

    entry = entry_of(ledger, order("r1"))
    assert entry.status is Status.PARKED
    assert entry.doubts == 1


@pytest.mark.parametrize(
    "later",
    [
        order("r2", offset=2, partition=1),
        order("r2", offset=2, topic="other"),
        order("r2", offset=0),
        order("r2", offset=2, msisdn="+393330000000"),
        order("r2"),
    ],
)
def test_other_record_overtakes_nothing(
    ledger: Ledger, database: Database, later: TopUp
) -> None:
    make(Status.IN_DOUBT, ledger, database, order("r1", offset=1))

    assert ledger.overtake(later) == []


@pytest.mark.parametrize("scope", ["*", "app"])
def test_pause_stops_every_claim_and_lets_orders_be_recorded(
    ledger: Ledger, database: Database, scope: str
) -> None:
    entry = make(Status.RELEASED, ledger, database, order("r1"))
    database.pause(scope)
    other = order("r2", msisdn="+393330000000")

    assert ledger.claim(other) is None
    assert ledger.reclaim(entry) is None
    line = ledger.look(other)[1]
    assert line.is_paused == (scope == "*")
    assert line.is_channel_paused == (scope == "app")
    assert ledger.hold(other)

    database.resume()
    assert ledger.reclaim(entry_of(ledger, other)) is not None


def test_pause_of_another_channel_stops_nothing(
    ledger: Ledger, database: Database
) -> None:
    database.pause("shop")

    claimed(ledger, order())


TOO_MANY = Answer(AnswerClass.RETRY, http_status=429, reason="status_429")


def test_answers_that_nothing_was_executed_are_counted(ledger: Ledger) -> None:
    claim = claimed(ledger, order())
    assert ledger.give_back("app:r1", claim.token, TOO_MANY)
    again = ledger.reclaim(entry_of(ledger, order()))
    assert again is not None
    assert again.not_executed == 1

    assert ledger.give_back("app:r1", again.token, TOO_MANY)

    assert entry_of(ledger, order()).not_executed == 2


def test_what_was_never_sent_is_no_answer(ledger: Ledger) -> None:
    claim = claimed(ledger, order())

    assert ledger.give_back("app:r1", claim.token, RETRY)

    assert entry_of(ledger, order()).not_executed == 0


@pytest.mark.parametrize("is_held", [False, True])
def test_order_waits_for_as_long_as_it_is_told(
    ledger: Ledger, database: Database, *, is_held: bool
) -> None:
    claim = claimed(ledger, order())

    assert ledger.give_back("app:r1", claim.token, TOO_MANY, is_held=is_held, wait_s=60)

    entry = entry_of(ledger, order())
    assert 50 < entry.wait_s <= 60
    assert due(ledger) == []

    database.change(not_before="2001-01-01 00:00:00")
    entry = entry_of(ledger, order())
    assert entry.wait_s < 0
    assert due(ledger) == ([("app:r1", False)] if is_held else [])
    assert ledger.reclaim(entry) is not None
    assert database.row("app:r1")["not_before"] is None


def test_order_that_may_be_tried_at_once_waits_for_nothing(ledger: Ledger) -> None:
    claim = claimed(ledger, order())

    assert ledger.give_back("app:r1", claim.token, TOO_MANY)

    assert entry_of(ledger, order()).wait_s == 0


def due(ledger: Ledger, **changes: object) -> list[tuple[str, bool]]:
    options = {"given_up_s": 900.0, "again_s": 10.0, "is_parked_due": True, "limit": 9}
    found = ledger.due(**(options | changes))  # type: ignore[arg-type]
    return [(each.idempotency_key, each.is_given_up) for each in found]


@pytest.mark.parametrize(
    ("status", "is_due"),
    [
        (Status.HELD, True),
        (Status.PARKED, True),
        (Status.IN_FLIGHT, False),
        (Status.IN_DOUBT, False),
        (Status.RELEASED, False),
        (Status.ACCEPTED, False),
        (Status.SUCCEEDED, False),
    ],
)
def test_what_its_record_will_bring_on_is_not_due(
    ledger: Ledger, database: Database, status: Status, *, is_due: bool
) -> None:
    make(status, ledger, database, order())

    assert due(ledger) == ([("app:r1", False)] if is_due else [])


@pytest.mark.parametrize("status", [Status.IN_DOUBT, Status.RELEASED])
def test_what_the_source_gave_up_on_is_due(
    ledger: Ledger, database: Database, status: Status
) -> None:
    make(status, ledger, database, order())
    database.change(updated_at="2001-01-01 00:00:00")

    assert due(ledger) == [("app:r1", True)]


def test_claim_whose_lease_is_over_is_due(ledger: Ledger, database: Database) -> None:
    claimed(ledger, order())
    let_lease_end(database, order())

    assert due(ledger) == [("app:r1", False)]


def test_only_the_first_in_line_is_due(ledger: Ledger, database: Database) -> None:
    make(Status.PARKED, ledger, database, order("r1"))
    assert ledger.hold(order("r2"))
    assert ledger.hold(order("r3"))

    assert due(ledger) == [("app:r1", False)]
    assert due(ledger, is_parked_due=False) == []
    database.change("app:r1", status="succeeded")
    assert due(ledger) == [("app:r2", False)]
    assert due(ledger, msisdn="+393330000009") == []


def test_parked_order_is_due_again_only_after_a_while(
    ledger: Ledger, database: Database
) -> None:
    make(Status.PARKED, ledger, database, order())
    ledger.looked("app:r1")
    assert due(ledger) == []

    database.change(looked_at="2001-01-01 00:00:00")
    assert due(ledger) == [("app:r1", False)]


def test_nothing_is_due_while_paused(ledger: Ledger, database: Database) -> None:
    make(Status.HELD, ledger, database, order())
    database.pause("app")

    assert due(ledger) == []


def accepted(ledger: Ledger, watch_s: float = 60) -> list[str]:
    found = ledger.accepted(again_s=10, watch_s=watch_s, limit=9)
    return [each.idempotency_key for each in found]


def test_accepted_order_is_followed_and_then_watched_for_a_reversal(
    ledger: Ledger, database: Database
) -> None:
    entry = make(Status.ACCEPTED, ledger, database, order())
    make(Status.SUCCEEDED, ledger, database, order("plain"))
    assert accepted(ledger) == ["app:r1"]

    assert ledger.end_doubt(entry, DONE)
    assert database.row("app:r1")["status"] == "succeeded"
    assert accepted(ledger) == ["app:r1"]
    assert accepted(ledger, watch_s=0) == []

    ledger.record_reversal("app:r1", entry.token or "", "R-1")
    assert accepted(ledger) == []
    assert database.row("app:r1")["status"] == "succeeded"
    assert database.rows("attempt")[-1]["classified"] == "reversed"


def refused(raw: bytes = b"{", position: Position | None = None) -> Refused:
    return Refused(
        Outcome.MALFORMED, "body: is not JSON", raw, len(raw), {"id": "1"}, position
    )


def test_redelivery_adds_nothing_to_quarantine(
    ledger: Ledger, database: Database
) -> None:
    at = Position("recharge.orders", 0, 4)

    assert ledger.put_in_quarantine(refused(position=at))
    assert not ledger.put_in_quarantine(refused(position=at))
    assert ledger.put_in_quarantine(refused())
    assert not ledger.put_in_quarantine(refused())

    rows = database.rows("quarantine")
    assert len(rows) == 2
    assert rows[0]["raw"] == b"{"


def test_other_bytes_at_the_place_of_a_recreated_topic_are_recorded_too(
    ledger: Ledger, database: Database
) -> None:
    at = Position("recharge.orders", 0, 4)
    assert ledger.put_in_quarantine(refused(b"{", at))

    assert ledger.put_in_quarantine(refused(b"[", at))

    assert [row["raw"] for row in database.rows("quarantine")] == [b"{", b"["]


def test_two_large_records_are_two_although_their_numbers_run_together(
    ledger: Ledger, database: Database
) -> None:
    """Offset 1 with 23456 bytes, and offset 12 with 3456; their beginnings agree."""
    for offset, announced in ((1, 23_456), (12, 3_456)):
        at = Position("recharge.orders", 0, offset)
        large = replace(refused(b"x" * 100, at), announced_bytes=announced)
        assert ledger.put_in_quarantine(large)
        assert not ledger.put_in_quarantine(large)

    assert len(database.rows("quarantine")) == 2


def test_large_payloads_are_kept_whole(ledger: Ledger, database: Database) -> None:
    large = b"x" * 256 * 1024
    claimed(ledger, replace(order(), payload=large))
    ledger.put_in_quarantine(refused(large))

    assert database.row("app:r1")["payload"] == large
    assert database.rows("quarantine")[0]["raw"] == large


def test_each_claim_notes_the_api_and_those_of_another_are_counted(
    database: Database, profile: ApiProfile
) -> None:
    ours = database.make_ledger(profile, lease_s=30)
    there = (Status.IN_FLIGHT, Status.IN_DOUBT, Status.PARKED, Status.ACCEPTED)
    for number, status in enumerate(Status):
        topup = order(f"r{number}", msisdn=f"+39333000000{number}")
        make(status, ours, database, topup)
        entry = entry_of(ours, topup)
        expected = None if status is Status.HELD else profile.identity
        assert entry.api_identity == expected
    assert ours.count_of_other_apis() == 0

    for number, (status, identity) in enumerate(
        product(there, ("generic@old", None, profile.identity))
    ):
        topup = order(f"s{number}", msisdn=f"+3933300001{number:02}")
        make(status, ours, database, topup)
        database.change(topup.idempotency_key, api_identity=identity)
    assert ours.count_of_other_apis() == 2 * len(there)


def test_reclaim_notes_the_api_that_is_called_now(
    ledger: Ledger, database: Database, profile: ApiProfile
) -> None:
    entry = make(Status.RELEASED, ledger, database, order())
    database.change("app:r1", api_identity="generic@old")

    assert ledger.reclaim(entry) is not None

    assert entry_of(ledger, order()).api_identity == profile.identity


def test_sightings_are_counted_from_the_first(ledger: Ledger) -> None:
    seen = [ledger.see("a" * 64) for _ in range(3)]

    assert [each.times for each in seen] == [1, 2, 3]
    assert 0 <= seen[0].age_s <= seen[2].age_s < 60
    assert ledger.see("b" * 64).times == 1


def place_of(topup: TopUp) -> TopUp:
    assert topup.position
    key = key_of_place(topup.position)
    refused = Refused(Outcome.UNKNOWN_TYPE, "", b"x", 1, {}, topup.position, key)
    return kept_place(refused, topup.msisdn)


def test_kept_place_holds_what_comes_later_and_is_never_due(
    ledger: Ledger, database: Database
) -> None:
    first = order("r1", offset=5)
    assert ledger.keep_place(place_of(first), "unknown_type")
    assert not ledger.keep_place(place_of(first), "unknown_type")

    assert ledger.claim(order("r2", offset=6)) is None
    assert ledger.hold(order("r2", offset=6))
    line = ledger.look(order("r2", offset=6))[1]
    assert (line.blocker, line.is_stuck, line.is_place_kept) == (
        Status.PARKED,
        True,
        False,
    )
    # An earlier one of the partition, and whoever else, does not wait.
    assert ledger.look(order("r0", offset=4))[1].blocker is None
    other = order("s1", msisdn="+393330000009", offset=7)
    assert ledger.claim(other) is not None
    assert ledger.due(given_up_s=0, again_s=0, is_parked_due=True, limit=9) == []
    assert ledger.count_of_other_apis() == 0
    row = database.row(place_of(first).idempotency_key)
    assert (row["status"], row["reason"]) == ("parked", "unknown_type")


def test_order_takes_the_place_that_was_kept_for_it(
    ledger: Ledger, database: Database
) -> None:
    first, later = order("r1", offset=5), order("r2", offset=6)
    assert ledger.keep_place(place_of(first), "unknown_type")
    assert ledger.hold(later)
    assert ledger.claim(first) is None
    assert ledger.hold(first)
    assert ledger.look(first)[1].is_place_kept

    assert ledger.end_place(first)
    assert not ledger.end_place(first)

    row = database.row(place_of(first).idempotency_key)
    assert (row["status"], row["reason"]) == ("abandoned", "replayed")
    assert ledger.look(first)[1].blocker is None
    assert ledger.look(later)[1].blocker is Status.HELD
    assert ledger.reclaim(entry_of(ledger, later)) is None
    assert ledger.reclaim(entry_of(ledger, first)) is not None


@pytest.mark.parametrize("status", [*Status])
def test_place_of_a_record_that_has_a_row_is_not_kept_twice(
    ledger: Ledger, database: Database, status: Status
) -> None:
    first = order("r1", offset=5)
    make(status, ledger, database, first)

    assert not ledger.keep_place(place_of(first), "unforeseen")
    assert ledger.keep_place(place_of(order("r2", offset=6)), "unforeseen")
