"""Schedules that a hostile reader found: lines, windows, outages, odd answers."""

from datetime import UTC, datetime, timedelta

import pytest

from function.api_profile import Kind
from function.model import Finding, LookUp, Outcome
from tests.conftest import Database
from tests.integration.test_parking import (
    FAILED,
    REVERSED,
    A,
    B,
    C,
    age,
    first,
    resolver_of,
)
from tests.integration.test_processing import (
    ACCEPTED,
    DONE,
    EXECUTED,
    LIMITED,
    SAME_REFERENCE,
    UNKNOWN,
    Pod,
)
from tests.orders import order


def moment(seconds: float) -> str:
    """So many seconds from now, as both databases read it."""
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return when.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def keys(database: Database) -> list[object]:
    return [row["idempotency_key"] for row in database.rows("topup")]


def test_replay_is_not_sent_so_late_that_it_may_land_after_the_window(
    database: Database,
) -> None:
    """Window 3,600 s, settling time 60 s: what is sent now may land a minute later."""
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())
    database.execute("UPDATE topup SET first_sent_at = :at", at=moment(-3590))

    assert pod.deliver(order()) is Outcome.PARKED
    assert len(pod.api.sent) == 1


def test_two_that_come_late_keep_their_order_before_a_later_one(
    database: Database,
) -> None:
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order("p", offset=1), UNKNOWN) is Outcome.PARKED
    for name, offset in (("r5", 5), ("z3", 3), ("a4", 4)):
        assert pod.deliver(order(name, offset=offset)) is Outcome.HELD
    ran = []
    for _ in range(4):
        due = pod.ledger.due(given_up_s=900, again_s=0, is_parked_due=True, limit=9)
        ran += [each.idempotency_key for each in due]
        database.execute(
            "UPDATE topup SET status = 'succeeded' WHERE idempotency_key = :key",
            key=ran[-1],
        )

    assert ran == ["app:p", "app:z3", "app:a4", "app:r5"]


def test_clock_that_steps_back_lets_nobody_overtake(database: Database) -> None:
    """The database that took over is half a second behind."""
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order("r1", offset=1), UNKNOWN) is Outcome.PARKED
    database.execute("UPDATE topup SET place = :at", at=moment(0.9))

    assert pod.deliver(order("r2", offset=2)) is Outcome.HELD
    assert pod.deliver(order("r3", offset=3)) is Outcome.HELD
    assert keys(database) == ["app:r1", "app:r2", "app:r3"]


def test_lost_claim_behind_an_earlier_place_is_taken_up(database: Database) -> None:
    """It keeps its whole line from moving, so it can't wait to be the first."""
    pod = Pod(database, Kind.REFUSE)
    assert pod.ledger.claim(order("r5", offset=5))
    pod.deliver(order("r3", offset=3))
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings, rpod.api.answers = [EXECUTED] * 9, [DONE] * 9
    for _ in range(5):
        age(database)
        database.execute("UPDATE topup SET looked_at = NULL")
        resolver.run_once()

    assert {row["status"] for row in database.rows("topup")} == {"succeeded"}


def test_held_orders_of_a_resting_api_are_not_tried_one_by_one(
    database: Database,
) -> None:
    """Kind `none` in an outage: each try would be a doubt for good."""
    pod = Pod(database, Kind.NONE)
    database.execute("INSERT INTO pause VALUES ('*', 'a', 'b', '2001-01-01')")
    for number in range(60):
        topup = order(f"o{number}", msisdn=f"+39333000{number:04}", offset=number)
        assert pod.deliver(topup) is Outcome.PAUSED
    database.execute("DELETE FROM pause")
    resolver, rpod = resolver_of(database, Kind.NONE)
    rpod.api.answers = [UNKNOWN] * 60
    for _ in range(3):
        resolver.run_once()

    parked = [row for row in database.rows("topup") if row["status"] == "parked"]
    assert len(parked) == 3


def test_emptied_payload_stops_nobody_from_being_followed(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    assert pod.deliver(order("a1", msisdn=A), ACCEPTED) is Outcome.ACCEPTED
    rpod.api.findings = [EXECUTED]
    resolver.run_once()
    database.execute("UPDATE topup SET payload = ''")
    assert pod.deliver(order("b1", msisdn=B), ACCEPTED) is Outcome.ACCEPTED

    rpod.api.findings = [EXECUTED]
    resolver.run_once()

    assert pod.status(order("b1")) == "succeeded"
    assert rpod.alerts == []


def test_unreadable_payloads_starve_nobody(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    database.execute("INSERT INTO pause VALUES ('*', 'a', 'b', '2001-01-01')")
    for number in range(25):
        pod.deliver(order(f"o{number:03}", msisdn=f"+39333000{number:04}"))
    database.execute("DELETE FROM pause")
    database.execute(
        "UPDATE topup SET payload = X'78' WHERE idempotency_key <> 'app:o024'"
    )
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.answers = [DONE]
    for _ in range(3):
        resolver.run_once()

    assert pod.status(order("o024")) == "succeeded"
    assert ("payload_unreadable", "app:o000") in rpod.alerts


def test_tries_of_the_resolver_do_not_make_the_next_subscriber_wait(
    database: Database,
) -> None:
    """What succeeded behind it has shown that it was that order, and no outage."""
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order("p", msisdn=A, offset=1)) is Outcome.PARKED
    assert pod.deliver(order("b", msisdn=B, offset=2), DONE) is Outcome.SUCCEEDED
    resolver, rpod = resolver_of(database, Kind.REPLAY)
    rpod.api.answers = [FAILED]
    resolver.run_once()

    assert first(pod, order("q", msisdn=C, offset=3)) is Outcome.PARKED


def test_useless_tries_of_the_resolver_grow_rare(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order("p", offset=1)) is Outcome.PARKED
    database.execute("UPDATE topup SET doubts = 20, looked_at = :at", at=moment(-600))

    def is_due(again_s: float) -> bool:
        return bool(
            pod.ledger.due(given_up_s=9, again_s=again_s, is_parked_due=True, limit=9)
        )

    assert not is_due(10)
    assert is_due(2)


def test_half_a_character_in_an_answer_is_made_whole(database: Database) -> None:
    """JSON can spell it, and no database takes it: it would never be settled."""
    profile = Pod(database, Kind.REPLAY).profile
    document = {"error": {"code": "no", "message": "bad \ud83d"}}

    answer = profile.classify(422, document, "K")
    found = profile.classify(
        201, {"status": "succeeded", "reference": "R\ud83d", "idempotencyKey": "K"}, "K"
    )

    assert answer.words == "bad ?"
    assert found.reference == "R?"


@pytest.mark.parametrize("found", [LookUp(Finding.FAILED), REVERSED])
def test_reference_of_an_accepted_order_stays(
    database: Database, found: LookUp
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [found]
    resolver.run_once()

    assert database.row("app:r1")["reference"] == "R-1"


def test_accepted_order_that_the_api_does_not_know_is_an_alert(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [LookUp(Finding.ABSENT)]
    resolver.run_once()

    assert rpod.alerts == [("accepted_but_absent", "app:r1")]


@pytest.mark.parametrize("state", ["held", "released"])
def test_breaker_closes_for_an_order_that_is_recorded(
    database: Database, state: str
) -> None:
    """The one that goes first may be any: else a partition would wait for ever."""
    pod = Pod(database, Kind.NONE)
    waiting = order("q", msisdn=C, offset=9)
    if state == "released":
        assert pod.deliver(waiting, LIMITED) is Outcome.RELEASED
    else:
        database.execute("INSERT INTO pause VALUES ('*', 'a', 'b', '2001-01-01')")
        assert pod.deliver(waiting) is Outcome.PAUSED
        database.execute("DELETE FROM pause")
    # A refusal for now is a failed call, too.
    for number in range(2 if state == "released" else 3):
        topup = order(f"p{number}", msisdn=f"+3933311{number:05}")
        assert pod.deliver(topup, UNKNOWN) is Outcome.PARKED
    assert pod.deliver(waiting) is Outcome.CIRCUIT_OPEN

    pod.now += 61
    assert pod.deliver(waiting, DONE) is Outcome.SUCCEEDED


def test_late_ones_never_stand_before_an_earlier_offset(database: Database) -> None:
    """Nor after a failover to a clock that is behind."""
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order("r1", offset=1), UNKNOWN) is Outcome.PARKED
    database.execute("UPDATE topup SET place = '2099-01-01 00:00:00.500'")
    for offset in (5, 4, 3):
        assert pod.deliver(order(f"r{offset}", offset=offset)) is Outcome.HELD


def test_used_reference_of_a_replay_api_is_looked_up(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order(), SAME_REFERENCE)
    pod.api.findings = [EXECUTED]

    assert pod.deliver(order()) is Outcome.SUCCEEDED
    assert len(pod.api.sent) == 1


def test_parking_whose_answer_is_lost_is_still_an_alert(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    claim = pod.ledger.claim(order())
    assert claim
    pod.ledger.doubt("app:r1", claim.token, UNKNOWN, is_parked=True)

    receipt = pod.processing._fenced_off(order(), claim, UNKNOWN)

    assert receipt.outcome is Outcome.PARKED
    assert pod.alerts == [("parked", "app:r1")]
