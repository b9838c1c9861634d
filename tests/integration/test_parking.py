"""One stuck subscriber holds up nobody else; an outage parks nobody for good."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest

from function.api_profile import Kind
from function.errors import LedgerUnavailable
from function.model import Answer, AnswerClass, Finding, LookUp, Outcome, TopUp
from function.operations import Verdict
from function.resolver import Resolver
from tests.conftest import Database
from tests.integration.test_processing import (
    ABSENT,
    ACCEPTED,
    DONE,
    EXECUTED,
    NO,
    NOT_SENT,
    OURS,
    SAME_CONTENT,
    UNKNOWN,
    Pod,
)
from tests.orders import order

FAILED = Answer(AnswerClass.UNKNOWN, http_status=500, reason="internal")
LOST = LookUp(Finding.UNKNOWN, reason="http_500")
PENDING = LookUp(Finding.PENDING)
REVERSED = LookUp(Finding.REVERSED, "R-1")

A, B, C = "+393330000001", "+393330000002", "+393330000003"


def resolver_of(database: Database, kind: Kind, **more: object) -> tuple[Resolver, Pod]:
    pod = Pod(database, kind, is_resolver=True, **more)
    resolver = Resolver(
        pod.ledger,
        pod.processing,
        pod.api,
        pod.profile,
        given_up_s=900,
        again_s=0,
        watch_s=3600,
        accepted_max_s=600,
        alert=lambda action, key, *_, **_fields: pod.alerts.append((action, key)),
        monotonic=lambda: pod.now,
    )
    return resolver, pod


def first(pod: Pod, topup: TopUp, answer: Answer = FAILED) -> Outcome:
    """Deliver an order whose attempt, and the one try to find out, are of no use."""
    is_replay = pod.profile.kind is Kind.REPLAY
    pod.api.findings = [] if is_replay else [LOST]
    return pod.deliver(topup, answer, *([answer] if is_replay else []))


@pytest.fixture(params=[Kind.REPLAY, Kind.REFUSE, Kind.LOOKUP])
def pod(request: pytest.FixtureRequest, database: Database) -> Pod:
    return Pod(database, request.param)


def test_lost_answer_is_found_out_at_once(pod: Pod) -> None:
    """One look-up, or one repetition of the key, before anybody is held up."""
    is_replay = pod.profile.kind is Kind.REPLAY
    pod.api.findings = [] if is_replay else [EXECUTED]
    again = [DONE] if is_replay else []

    assert pod.deliver(order(), UNKNOWN, *again) is Outcome.SUCCEEDED

    assert len(pod.api.sent) == (2 if is_replay else 1)


def test_answer_that_took_long_is_not_asked_for_at_once(pod: Pod) -> None:
    """The subscriber's own first attempt has held the others up for long enough."""

    def take_long() -> None:
        pod.now += 10

    pod.api.meanwhile = take_long

    assert pod.deliver(order(), UNKNOWN) is Outcome.PARKED
    assert len(pod.api.sent) == 1
    assert pod.api.asked == []


def test_poisoned_order_is_parked_at_once_and_holds_only_its_own_line(
    pod: Pod,
) -> None:
    """Whether others succeed meanwhile or nothing else happens at all."""
    assert first(pod, order("a1", msisdn=A, offset=1)) is Outcome.PARKED
    assert first(pod, order("b1", msisdn=B, offset=2)) is Outcome.PARKED

    assert pod.deliver(order("a2", msisdn=A, offset=3)) is Outcome.HELD
    assert pod.deliver(order("c1", msisdn=C, offset=4), DONE) is Outcome.SUCCEEDED
    assert pod.alerts == []


def test_two_poisoned_heads_do_not_wait_for_each_other(pod: Pod) -> None:
    one = order("a1", msisdn=A, offset=1)
    other = order("b1", msisdn=B, offset=1, partition=1)

    assert [first(pod, topup) for topup in (one, other)] == [Outcome.PARKED] * 2


def test_outage_parks_a_few_and_lets_the_others_wait(pod: Pod) -> None:
    """An hour of it; each trial that fails is parked, and nobody is told of each."""
    waiting = iter(
        order(f"o{number}", msisdn=f"+39333000{number:04}", offset=number)
        for number in range(500)
    )
    current, outcomes = next(waiting), []
    for _ in range(3600):
        pod.now += 1
        is_replay = pod.profile.kind is Kind.REPLAY
        pod.api.answers = [FAILED] * (2 if is_replay else 1)
        pod.api.findings = [] if is_replay else [LOST]
        outcomes.append(pod.processing.process(current).outcome)
        if outcomes[-1] is Outcome.PARKED:
            current = next(waiting)

    assert set(outcomes) == {Outcome.PARKED, Outcome.CIRCUIT_OPEN}
    assert 60 <= outcomes.count(Outcome.PARKED) <= 3 + 66
    assert pod.status(current) == "released"
    assert pod.alerts == [("circuit_opened", "")]

    pod.now += 60
    pod.api.answers, pod.api.findings = [], []
    for _ in range(3):
        assert pod.deliver(current, DONE) is Outcome.SUCCEEDED
        current = next(waiting)
    assert pod.alerts == [("circuit_opened", ""), ("circuit_closed", "")]


def test_unreachable_api_parks_nobody(pod: Pod) -> None:
    """Provably nothing was executed: every order waits, released, at its place."""
    for _ in range(5):
        topup = order("a1", msisdn=A, offset=1)
        assert pod.deliver(topup, NOT_SENT) is Outcome.RELEASED
    assert pod.status(topup) == "released"


TOO_MANY = Answer(AnswerClass.RETRY, http_status=429, reason="status_429")


@pytest.mark.parametrize("answer", [TOO_MANY, SAME_CONTENT])
def test_third_answer_that_nothing_was_executed_postpones_the_order(
    pod: Pod, database: Database, answer: Answer
) -> None:
    """It alone is refused for now, for ever: nobody else waits for it."""
    poisoned = order("a1", msisdn=A, offset=1)
    for _ in range(2):
        assert pod.deliver(poisoned, answer) is Outcome.RELEASED
    assert pod.deliver(poisoned, answer) is Outcome.POSTPONED

    assert pod.status(poisoned) == "held"
    assert pod.deliver(poisoned) is Outcome.POSTPONED
    assert pod.deliver(order("a2", msisdn=A, offset=2)) is Outcome.HELD
    assert pod.deliver(order("b1", msisdn=B, offset=3), DONE) is Outcome.SUCCEEDED
    resolver, rpod = resolver_of(database, pod.profile.kind)
    assert not resolver.run_once()
    database.change("app:a1", not_before="2001-01-01 00:00:00")
    rpod.api.answers = [DONE, DONE]
    resolver.run_once()
    assert [key for key, _ in rpod.api.sent] == ["app:a1", "app:a2"]


def test_order_whose_wait_is_longer_than_the_longest_pause_is_postponed_at_once(
    pod: Pod,
) -> None:
    answer = replace(TOO_MANY, retry_after_s=3600.0)

    assert pod.deliver(order(), answer) is Outcome.POSTPONED

    entry, _ = pod.ledger.look(order())
    assert entry
    assert 3500 < entry.wait_s <= 3600


def test_wait_that_the_api_names_is_kept(pod: Pod) -> None:
    answer = replace(TOO_MANY, retry_after_s=30.0)

    assert pod.deliver(order(), answer) is Outcome.RELEASED
    assert pod.deliver(order()) is Outcome.RELEASED
    assert len(pod.api.sent) == 1


def test_storm_of_refusals_opens_the_breaker_and_parks_nobody(pod: Pod) -> None:
    for number in range(3):
        topup = order(f"o{number}", msisdn=f"+3933300000{number}")
        answer = replace(TOO_MANY, retry_after_s=20.0)
        assert pod.deliver(topup, answer) is Outcome.RELEASED

    pod.now += 19
    other = order("other", msisdn="+393330000009")
    assert pod.deliver(other) is Outcome.CIRCUIT_OPEN
    pod.now += 1
    assert pod.deliver(other, DONE) is Outcome.SUCCEEDED
    assert pod.alerts == [("circuit_opened", ""), ("circuit_closed", "")]


def test_api_that_refuses_us_is_told_once_until_it_answers_again(pod: Pod) -> None:
    for _ in range(2):
        assert pod.deliver(order(msisdn=A), OURS) is Outcome.REFUSED_US
    assert pod.alerts == [("refused_us", "app:r1")]

    assert pod.deliver(order("b", msisdn=B), DONE) is Outcome.SUCCEEDED
    assert pod.deliver(order("c", msisdn=C), OURS) is Outcome.REFUSED_US
    assert pod.alerts == [("refused_us", "app:r1"), ("refused_us", "app:c")]


@pytest.mark.parametrize("state", ["new", "released", "in_doubt"])
def test_paused_channel_holds_up_no_other(
    pod: Pod, database: Database, state: str
) -> None:
    """Its orders are kept in the ledger, and run in order when it is resumed."""
    topup = order("a1", msisdn=A, offset=1)
    if state == "released":
        assert pod.deliver(topup, NOT_SENT) is Outcome.RELEASED
    elif state == "in_doubt":
        pod.doubt(topup)
    database.pause("app")

    receipt = pod.processing.process(topup)

    is_doubt = state == "in_doubt"
    assert receipt.outcome is (Outcome.PARKED if is_doubt else Outcome.HELD)
    assert receipt.reason == "channel_paused"
    assert pod.status(topup) == ("parked" if is_doubt else "held")
    resolver, rpod = resolver_of(database, pod.profile.kind)
    assert not resolver.run_once()
    database.execute("DELETE FROM pause")
    rpod.api.findings, rpod.api.answers = [EXECUTED], [DONE]
    resolver.run_once()
    assert pod.status(topup) == "succeeded"


def test_what_an_outage_parked_is_taken_up_by_the_resolver(
    pod: Pod, database: Database
) -> None:
    kind = pod.profile.kind
    assert first(pod, order("a1", msisdn=A, offset=1)) is Outcome.PARKED
    assert pod.deliver(order("a2", msisdn=A, offset=2)) is Outcome.HELD
    resolver, rpod = resolver_of(database, kind)
    # The API is back: for `replay` it answers the key, else it is asked by it.
    rpod.api.answers = [DONE, DONE] if kind is Kind.REPLAY else [DONE]
    rpod.api.findings = [EXECUTED]

    counts = resolver.run_once()

    assert counts["succeeded"] == 2
    assert [row["status"] for row in database.rows("topup")] == ["succeeded"] * 2
    sent = [key for key, _ in rpod.api.sent]
    assert sent == (["app:a1", "app:a2"] if kind is Kind.REPLAY else ["app:a2"])


def test_absent_after_the_settling_time_is_called_by_the_resolver_in_order(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert first(pod, order("a1", msisdn=A, offset=1)) is Outcome.PARKED
    for number in (2, 3, 4):
        pod.deliver(order(f"a{number}", msisdn=A, offset=number))
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [ABSENT]
    assert resolver.run_once()["parked"] == 1
    assert rpod.api.sent == []

    pod.let_time_pass()
    rpod.api.findings, rpod.api.answers = [ABSENT], [DONE] * 4
    resolver.run_once()

    assert [key for key, _ in rpod.api.sent] == [f"app:a{n}" for n in (1, 2, 3, 4)]


def test_resolver_leaves_kind_none_to_a_person(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order(), UNKNOWN) is Outcome.PARKED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.NONE)

    assert not resolver.run_once()

    assert not rpod.api.sent
    assert not rpod.api.asked
    assert pod.status(order()) == "parked"


def test_resolver_never_sends_past_the_window(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order(offset=1)) is Outcome.PARKED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.REPLAY)

    resolver.run_once()
    assert rpod.api.sent == []

    asking, apod = resolver_of(database, Kind.REPLAY, kind_after_window=Kind.REFUSE)
    apod.api.findings = [ABSENT, EXECUTED]
    asking.run_once()
    assert pod.status(order()) == "parked"
    asking.run_once()
    assert pod.status(order()) == "succeeded"
    assert apod.api.sent == []


def test_resolver_takes_up_a_claim_whose_pod_died(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.ledger.claim(order())
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    assert not resolver.run_once()
    pod.let_lease_end()
    rpod.api.findings = [EXECUTED]

    assert resolver.run_once()["succeeded"] == 1


def age(database: Database) -> None:
    database.execute("UPDATE topup SET updated_at = '2001-01-01 00:00:00'")


def test_resolver_takes_up_what_the_source_gave_up_on(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order("a1", msisdn=A))
    assert pod.deliver(order("b1", msisdn=B), NOT_SENT) is Outcome.RELEASED
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    assert not resolver.run_once()

    age(database)
    rpod.api.findings, rpod.api.answers = [LOST], [DONE]
    resolver.run_once()

    # It is parked until it can be settled: later ones are held, not refused.
    assert pod.status(order("a1")) == "parked"
    assert pod.status(order("b1")) == "succeeded"


def test_held_order_that_was_not_sent_waits_in_line_again(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    claim = pod.ledger.claim(order("a1", msisdn=A))
    assert claim
    assert pod.deliver(order("a2", msisdn=A)) is Outcome.WAITING
    assert pod.ledger.settle("app:a1", claim.token, DONE)
    resolver, rpod = resolver_of(database, Kind.REPLAY)
    rpod.api.answers = [NOT_SENT]

    resolver.run_once()
    assert pod.status(order("a2")) == "held"

    rpod.api.answers = [DONE]
    resolver.run_once()
    assert pod.status(order("a2")) == "succeeded"


def test_parked_order_that_was_not_sent_stays_parked(database: Database) -> None:
    """Doubt is sticky, and no record comes again that would end it."""
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order(offset=1)) is Outcome.PARKED
    resolver, rpod = resolver_of(database, Kind.REPLAY)
    rpod.api.answers = [NOT_SENT, DONE]

    resolver.run_once()
    assert pod.status(order()) == "parked"

    resolver.run_once()
    assert pod.status(order()) == "succeeded"


def test_new_order_in_the_middle_of_a_release_runs_after_the_held_ones(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert first(pod, order("a1", msisdn=A, offset=1)) is Outcome.PARKED
    for number in (2, 3):
        pod.deliver(order(f"a{number}", msisdn=A, offset=number))
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    numbers = count(4)

    def new_one_arrives() -> None:
        if rpod.api.sent[-1][0] == "app:a2":
            newest = order(f"a{next(numbers)}", msisdn=A, offset=4)
            assert pod.deliver(newest) in {Outcome.HELD, Outcome.WAITING}

    rpod.api.meanwhile = lambda: new_one_arrives() if rpod.api.sent else None
    rpod.api.findings, rpod.api.answers = [EXECUTED], [DONE] * 3

    resolver.run_once()

    assert [key for key, _ in rpod.api.sent] == ["app:a2", "app:a3", "app:a4"]
    assert {row["status"] for row in database.rows("topup")} == {"succeeded"}


def test_pause_stops_the_resolver_too(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert first(pod, order(offset=1)) is Outcome.PARKED
    database.execute("INSERT INTO pause VALUES ('*', 'a', 'b', '2001-01-01')")
    resolver, rpod = resolver_of(database, Kind.REFUSE)

    assert not resolver.run_once()
    assert rpod.api.asked == []


@pytest.mark.parametrize(
    ("found", "status", "alert"),
    [
        (EXECUTED, "succeeded", None),
        (PENDING, "accepted", None),
        (LOST, "accepted", None),
        (ABSENT, "accepted", None),
        (LookUp(Finding.FAILED), "rejected", "rejected_after_accepted"),
        (REVERSED, "rejected", "rejected_after_accepted"),
        (LookUp(Finding.SEVERAL), "accepted", "executed_several_times"),
    ],
)
def test_accepted_recharge_is_followed_to_its_end(
    database: Database, found: LookUp, status: str, alert: str | None
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [found]

    resolver.run_once()

    assert pod.status(order()) == status
    assert rpod.alerts == ([(alert, "app:r1")] if alert else [])


@pytest.mark.parametrize("found", [PENDING, LOST, None])
def test_accepted_recharge_without_an_end_is_told_once(
    database: Database, found: LookUp | None
) -> None:
    """Pending for ever, a look-up that fails for ever, or no look-up at all."""
    pod = Pod(database, Kind.REPLAY)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    more = {} if found else {"look_up": None}
    resolver, rpod = resolver_of(database, Kind.REPLAY, **more)
    rpod.api.findings = [found] * 4 if found else []
    resolver.run_once()
    assert rpod.alerts == []

    pod.let_time_pass()
    for _ in range(3):
        resolver.run_once()

    assert rpod.alerts == [("accepted_overdue", "app:r1")]
    assert database.row("app:r1")["reason"] == "accepted_overdue"
    assert pod.status(order()) == "accepted"


def test_look_up_that_alternates_tells_a_person_once(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [ABSENT, LOST] * 3

    for _ in range(6):
        resolver.run_once()

    assert rpod.alerts == [("accepted_but_absent", "app:r1")]


@pytest.mark.parametrize("found", [LookUp(Finding.FAILED), REVERSED])
def test_end_of_an_earlier_attempt_does_not_end_an_accepted_order(
    database: Database, found: LookUp
) -> None:
    """Called again by a person's decision, and taken over; the list is of the first."""
    pod = Pod(database, Kind.LOOKUP)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    database.change(first_sent_at="2001-01-01 00:00:00")
    resolver, rpod = resolver_of(database, Kind.LOOKUP)
    rpod.api.findings = [found, found]

    resolver.run_once()
    assert pod.status(order()) == "accepted"
    assert rpod.alerts == []
    database.change(sent_at="2001-01-02 00:00:00")
    resolver.run_once()

    assert pod.status(order()) == "rejected"


def test_held_orders_that_fail_starve_no_others(database: Database) -> None:
    """They open the breaker, which ends a round, and they were there first."""
    pod = Pod(database, Kind.REFUSE)
    database.pause("*")
    for number in range(25):
        held = order(f"h{number}", msisdn=f"+3933355{number:05}")
        assert pod.deliver(held) is Outcome.PAUSED
    database.execute("DELETE FROM pause")
    lost = order("lost", msisdn=A)
    assert pod.ledger.claim(lost)
    pod.let_lease_end()
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.answers = [Answer(AnswerClass.RETRY, http_status=429)] * 100
    rpod.api.findings = [EXECUTED]

    for _ in range(2 * 25):
        rpod.now += 60
        resolver.run_once()

    assert pod.status(lost) == "succeeded"


def test_given_up_order_that_meets_an_open_breaker_is_found_again(
    database: Database,
) -> None:
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order(), NOT_SENT) is Outcome.RELEASED
    database.change(updated_at="2001-01-01 00:00:00")
    resolver, rpod = resolver_of(database, Kind.NONE)
    for subscriber in (A, B, C):
        with rpod.processing.breaker.permit(rpod.now) as permit:
            permit.failed(subscriber, "timeout", rpod.now, 0)

    assert not resolver.run_once()
    assert rpod.api.sent == []
    rpod.now += 60
    rpod.api.answers = [DONE]
    resolver.run_once()

    assert pod.status(order()) == "succeeded"


@pytest.mark.parametrize("status", ["released", "in_doubt"])
def test_order_that_was_given_up_is_found_again_after_a_blip(
    database: Database, status: str
) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order())
    database.change(
        status=status,
        doubts=int(status == "in_doubt"),
        updated_at="2001-01-01 00:00:00",
        sent_at="2001-01-01 00:00:00",
        first_sent_at="2001-01-01 00:00:00",
    )
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    look = rpod.ledger.look

    def away(_: TopUp) -> object:
        rpod.ledger.look = look  # type: ignore[method-assign]
        raise LedgerUnavailable("away")

    rpod.ledger.look = away  # type: ignore[method-assign,assignment]
    with pytest.raises(LedgerUnavailable):
        resolver.run_once()
    rpod.api.findings = [EXECUTED]
    rpod.api.answers = [Answer(AnswerClass.DONE, reference="R-1")]
    resolver.run_once()

    assert pod.status(order()) == "succeeded"


@pytest.mark.parametrize("status", ["parked", "accepted"])
def test_several_executions_are_told_once(database: Database, status: str) -> None:
    pod = Pod(database, Kind.REFUSE)
    first_answer = ACCEPTED if status == "accepted" else FAILED
    first(pod, order(), first_answer)
    assert pod.status(order()) == status
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [LookUp(Finding.SEVERAL)] * 3

    for _ in range(3):
        database.execute("UPDATE topup SET looked_at = NULL")
        resolver.run_once()

    several = ("executed_several_times", "app:r1")
    assert rpod.alerts.count(several) == 1
    assert database.row("app:r1")["reason"] == "executed_several_times"


def test_parked_order_that_became_a_persons_case_says_why_and_is_told_once(
    database: Database,
) -> None:
    """Past the window nothing automatic ends it: who was told before must hear it."""
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order()) is Outcome.PARKED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.REPLAY)

    for _ in range(3):
        database.execute("UPDATE topup SET looked_at = NULL")
        resolver.run_once()

    assert rpod.alerts == [("parked", "app:r1")]
    assert database.row("app:r1")["reason"] == "cannot_be_found_out"
    assert rpod.api.sent == []


def test_look_up_that_shows_only_others_is_told_once_and_sends_nothing(
    database: Database,
) -> None:
    """An unfiltered list, one page of it, a cached answer: ours may be elsewhere."""
    pod = Pod(database, Kind.LOOKUP)
    others = LookUp(Finding.UNKNOWN, reason="rows_of_other_keys")
    pod.api.findings = [others]
    assert pod.deliver(order(), UNKNOWN) is Outcome.PARKED
    assert pod.alerts == [("parked", "app:r1")]
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, Kind.LOOKUP)
    rpod.api.findings = [others] * 3

    for _ in range(3):
        database.execute("UPDATE topup SET looked_at = NULL")
        resolver.run_once()

    assert (rpod.api.sent, rpod.alerts) == ([], [])
    assert database.row("app:r1")["reason"] == "rows_of_other_keys"


@pytest.mark.parametrize(
    "reason", ["answer_contradicts_itself", "answer_of_another_key"]
)
def test_answer_that_was_not_believed_is_told(pod: Pod, reason: str) -> None:
    first(pod, order(), Answer(AnswerClass.UNKNOWN, reason=reason))

    assert (reason, "app:r1") in pod.alerts


def test_poisoned_orders_that_are_parked_starve_no_healthy_one(
    database: Database,
) -> None:
    """Each opens the breaker again, which ends a round, and they were there first."""
    pod = Pod(database, Kind.LOOKUP)
    for number in range(4):
        topup = order(f"p{number}", msisdn=f"+3933311{number:05}", offset=number)
        pod.now += 60
        assert first(pod, topup) is Outcome.PARKED
    pod.now += 60
    healthy = order("healthy", msisdn=A, offset=9)
    assert first(pod, healthy) is Outcome.PARKED
    pod.let_time_pass()
    age(database)
    resolver, rpod = resolver_of(database, Kind.LOOKUP)
    asked: list[str] = []

    def look_up(rendered_key: str) -> LookUp:
        asked.append(rendered_key)
        return EXECUTED if rendered_key == "app:healthy" else LOST

    rpod.api.look_up = look_up  # type: ignore[method-assign]
    for _ in range(10):
        rpod.now += 60
        resolver.run_once()

    assert pod.status(healthy) == "succeeded"
    assert {f"app:p{number}" for number in range(4)} < set(asked)


@pytest.mark.parametrize("now", [Kind.REPLAY, Kind.LOOKUP])
def test_what_was_sent_to_one_kind_of_api_is_not_repeated_to_another(
    database: Database, now: Kind
) -> None:
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order(), UNKNOWN) is Outcome.PARKED
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, now, settle_s=0.0, window_s=1e12)
    rpod.api.findings = [ABSENT]

    resolver.run_once()

    assert (rpod.api.sent, rpod.api.asked) == ([], [])
    assert database.row("app:r1")["reason"] == "api_kind_changed"


def test_late_reversal_is_recorded_and_the_terminal_status_stands(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [EXECUTED, EXECUTED, REVERSED]
    for _ in range(5):
        resolver.run_once()

    assert pod.status(order()) == "succeeded"
    assert rpod.alerts == [("reversed", "app:r1")]
    evidence = [row["classified"] for row in database.rows("attempt")]
    assert evidence[-1] == "reversed"
    assert rpod.api.findings == []


def test_repetition_of_a_parked_order_is_answered_as_the_first_time(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert first(pod, order(offset=1)) is Outcome.PARKED

    for _ in range(3):
        assert pod.deliver(order(offset=1)) is Outcome.PARKED
    assert len(pod.api.sent) == 1


def test_no_by_the_resolver_is_a_rejection(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    assert first(pod, order(offset=1)) is Outcome.PARKED
    resolver, rpod = resolver_of(database, Kind.REPLAY)
    rpod.api.answers = [NO]

    assert resolver.run_once()["rejected"] == 1


def test_resolver_asks_with_the_key_as_it_was_sent(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE, key_render="uuid4")
    assert first(pod, order(offset=1)) is Outcome.PARKED
    (_, rendered) = pod.api.sent[0]
    # The profile has changed since; the ledger remembers what was sent.
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.findings = [EXECUTED]

    resolver.run_once()

    assert rpod.api.asked == [rendered]
    assert rendered != "app:r1"


def test_outage_of_an_api_that_cannot_be_asked_is_not_tried_order_by_order(
    database: Database,
) -> None:
    """Kind `none`: each try would be a doubt for good."""
    pod = Pod(database, Kind.NONE)
    orders = [
        order(f"o{number}", msisdn=f"+39333000{number:04}") for number in range(500)
    ]
    waiting = iter(orders)
    current = next(waiting)
    for _ in range(500):
        # Seven minutes of outage, at a delivery a second.
        pod.now += 1
        pod.api.answers = [UNKNOWN]
        outcome = pod.processing.process(current).outcome
        if outcome is Outcome.PARKED:
            current = next(waiting)
        else:
            assert outcome is Outcome.CIRCUIT_OPEN
    # The one that waits is in the ledger, at its place: the source may give up on it.
    *parked, last = [row["status"] for row in database.rows("topup")]
    assert set(parked) == {"parked"}
    assert 3 < len(parked) < 20
    assert last == "released"

    # One goes first; when it succeeds, all go.
    pod.now += 60
    pod.api.answers = [DONE] * 10
    for _ in range(10):
        assert pod.processing.process(current).outcome is Outcome.SUCCEEDED
        current = next(waiting)


def test_poisoned_subscriber_does_not_open_the_breaker(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    for number in range(5):
        poisoned = order(f"p{number}", msisdn=f"+3933311{number:05}")
        assert pod.deliver(poisoned, UNKNOWN) is Outcome.PARKED
        other = order(f"o{number}", msisdn=f"+3933322{number:05}")
        assert pod.deliver(other, DONE) is Outcome.SUCCEEDED


def test_open_breaker_still_answers_repetitions(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    assert pod.deliver(order("ok", msisdn=B), DONE) is Outcome.SUCCEEDED
    for number in range(3):
        topup = order(f"p{number}", msisdn=f"+3933311{number:05}")
        assert pod.deliver(topup, UNKNOWN) is Outcome.PARKED

    assert pod.deliver(order("ok", msisdn=B)) is Outcome.SUCCEEDED
    assert pod.deliver(order("p0", msisdn="+393331100000")) is Outcome.PARKED
    assert pod.deliver(order("new", msisdn=C)) is Outcome.CIRCUIT_OPEN
    assert pod.status(order("new", msisdn=C)) == "released"
    # Whatever comes later, here or at a pod whose breaker is closed, waits behind it.
    other = Pod(database, Kind.NONE)
    assert other.deliver(order("newer", msisdn=C)) is Outcome.WAITING


def test_held_order_whose_claim_is_uncertain_is_taken_up_in_the_next_round(
    database: Database,
) -> None:
    """Else it waits for a record that will not come, and its subscriber with it."""
    pod = Pod(database, Kind.REFUSE)
    database.pause("*")
    assert pod.deliver(order("r1", offset=1)) is Outcome.PAUSED
    database.execute("DELETE FROM pause")
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.ledger.is_claim_answer_lost = True
    with pytest.raises(LedgerUnavailable):
        resolver.run_once()
    assert rpod.api.sent == []
    assert pod.status(order("r1")) == "held"

    rpod.api.answers = [DONE]
    resolver.run_once()

    assert pod.status(order("r1")) == "succeeded"
    assert pod.deliver(order("r2", offset=1, partition=1), DONE) is Outcome.SUCCEEDED


@pytest.mark.parametrize("kind", [Kind.REPLAY, Kind.REFUSE, Kind.LOOKUP])
def test_doubt_of_which_nobody_knows_the_kind_of_api_is_left_to_a_person(
    database: Database, kind: Kind
) -> None:
    """An early revision sent it, and did not note to what."""
    pod = Pod(database, kind)
    pod.doubt(order())
    sent = len(pod.api.sent)
    database.change("app:r1", api_kind=None)
    pod.let_time_pass()

    assert pod.deliver(order()) is Outcome.PARKED

    assert (len(pod.api.sent), pod.api.asked) == (sent, [])
    assert database.row("app:r1")["reason"] == "api_kind_unknown"
    assert pod.alerts == [("parked", "app:r1")]


def test_resolver_outlives_what_one_order_makes_it_raise(database: Database) -> None:
    """That order alone is put aside, and somebody is told."""
    pod = Pod(database, Kind.REFUSE)
    database.pause("*")
    for name, msisdn in (("a1", A), ("b1", B)):
        assert pod.deliver(order(name, msisdn=msisdn)) is Outcome.PAUSED
    database.execute("DELETE FROM pause")
    assert pod.deliver(order("c1", msisdn=C), ACCEPTED) is Outcome.ACCEPTED
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    rpod.api.answers, rpod.api.findings = [DONE], [EXECUTED]

    def raise_once() -> None:
        rpod.api.meanwhile = lambda: None
        raise ZeroDivisionError

    rpod.api.meanwhile = raise_once

    counts = resolver.run_once()

    assert counts["unforeseen"] == 1
    assert rpod.alerts == [("order_put_aside", "app:a1")]
    assert pod.status(order("b1", msisdn=B)) == "succeeded"
    assert pod.status(order("c1", msisdn=C)) == "succeeded"


@pytest.mark.parametrize("kind", [Kind.REPLAY, Kind.REFUSE, Kind.LOOKUP])
@pytest.mark.parametrize(
    ("identity", "reason"),
    [("old", "api_of_another_identity"), (None, "api_identity_unknown")],
)
def test_doubt_of_another_api_is_neither_asked_for_nor_sent_here(
    database: Database, kind: Kind, identity: str | None, reason: str
) -> None:
    """Absent here says nothing about there; the person is told once."""
    pod = Pod(database, kind)
    assert first(pod, order()) is Outcome.PARKED
    database.change("app:r1", api_identity=identity)
    pod.let_time_pass()
    resolver, rpod = resolver_of(database, kind, settle_s=0.0, window_s=1e12)
    rpod.api.findings = [ABSENT]

    for _ in range(3):
        resolver.run_once()

    assert (rpod.api.sent, rpod.api.asked) == ([], [])
    assert database.row("app:r1")["reason"] == reason
    assert rpod.alerts == [("parked", "app:r1")]


@pytest.mark.parametrize("identity", ["old", None])
@pytest.mark.parametrize("found", [ABSENT, EXECUTED, LookUp(Finding.FAILED)])
def test_order_that_another_api_accepted_is_not_followed_here(
    database: Database, identity: str | None, found: LookUp
) -> None:
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), ACCEPTED) is Outcome.ACCEPTED
    database.change("app:r1", api_identity=identity)
    resolver, rpod = resolver_of(database, Kind.REFUSE, settle_s=0.0)
    rpod.api.findings = [found]

    for _ in range(3):
        resolver.run_once()

    assert rpod.api.asked == []
    assert pod.status(order()) == "accepted"
    assert [key for _, key in rpod.alerts] == ["app:r1"]
    database.change("app:r1", lease_until="2000-01-01 00:00:00")
    verdict = database.decide(
        "app:r1", Verdict.EXECUTED, reason="their statement", reference="R-9"
    )
    assert verdict
    assert pod.status(order()) == "succeeded"


def test_what_another_api_did_not_execute_is_sent_to_this_one(
    database: Database,
) -> None:
    """Of a released or held order nothing was executed anywhere."""
    pod = Pod(database, Kind.REFUSE)
    assert pod.deliver(order(), NOT_SENT) is Outcome.RELEASED
    database.change("app:r1", api_identity="old")

    assert pod.deliver(order(), DONE) is Outcome.SUCCEEDED


def test_resolver_says_at_its_start_how_many_orders_are_of_another_api(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order())
    database.change("app:r1", api_identity="old")
    resolver, rpod = resolver_of(database, Kind.REFUSE)
    stop, rounds = threading.Event(), count(1)

    def run_once() -> Counter[str]:
        if next(rounds) == 3:
            stop.set()
        return Counter()

    resolver.run_once = run_once  # type: ignore[method-assign]
    resolver.run(stop, 0.0)

    assert rpod.alerts == [("orders_of_another_api", "")]
