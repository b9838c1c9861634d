"""Every way a delivery can end: a real ledger, and an API that follows a script."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from function.api_profile import ApiProfile, Kind, load_profile
from function.errors import ClaimUncertain, LedgerUnavailable
from function.ledger import Ledger
from function.model import (
    Answer,
    AnswerClass,
    Claim,
    Entry,
    Finding,
    Line,
    LookUp,
    Outcome,
    TopUp,
)
from function.processing import Processing
from tests.conftest import Database, settings_of
from tests.orders import order

DONE = Answer(AnswerClass.DONE, http_status=201, reference="R-1")
ACCEPTED = Answer(AnswerClass.ACCEPTED, http_status=202, reference="R-1")
NO = Answer(AnswerClass.NO, http_status=422, reason="invalid_number")
UNKNOWN = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
NOT_SENT = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")
LIMITED = Answer(AnswerClass.RETRY, http_status=429, reason="rate_limited")
OURS = Answer(AnswerClass.OURS, http_status=401, reason="unauthorized")
SAME_REFERENCE = Answer(AnswerClass.SAME_REFERENCE, http_status=409)
SAME_CONTENT = Answer(AnswerClass.SAME_CONTENT, http_status=409)
EXECUTED = LookUp(Finding.EXECUTED, "R-1")
ABSENT = LookUp(Finding.ABSENT)
A = "+393330000001"
FAILED = LookUp(Finding.FAILED)

Action = Callable[[], None]


@dataclass
class ScriptedApi:
    """Says what the test wrote, in that order, and counts."""

    answers: list[Answer] = field(default_factory=list)
    findings: list[LookUp] = field(default_factory=list)
    #: What happens elsewhere while the call runs.
    meanwhile: Action = lambda: None
    sent: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    #: Of each call: moment after which the real client sends nothing.
    deadlines: list[float] = field(default_factory=list)

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer:
        self.sent.append((order.idempotency_key, rendered_key))
        self.deadlines.append(deadline)
        self.meanwhile()
        return self.answers.pop(0)

    def look_up(self, rendered_key: str) -> LookUp:
        self.asked.append(rendered_key)
        self.meanwhile()
        return self.findings.pop(0)


class Pod:
    """One process of the function: its ledger, its memory, its API."""

    def __init__(
        self,
        database: Database,
        kind: Kind,
        *,
        is_resolver: bool = False,
        **more: object,
    ) -> None:
        profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
        changes = {"kind": kind, "settle_s": 60.0, "window_s": 3600.0, **more}
        self.profile: ApiProfile = replace(profile, **changes)  # type: ignore[arg-type]
        self.database = database
        self.api = ScriptedApi()
        self.ledger = FailingLedger(database.engine, self.profile, lease_s=30)
        self.alerts: list[tuple[str, str]] = []
        self.is_draining = False
        self.now = 1000.0
        self.processing = Processing(
            self.ledger,
            self.api,
            self.profile,
            deadline_s=15,
            lease_s=30,
            is_resolver=is_resolver,
            is_draining=lambda: self.is_draining,
            alert=lambda action, key, *_, **_fields: self.alerts.append((action, key)),
            monotonic=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def deliver(self, topup: TopUp, *answers: Answer) -> Outcome:
        self.api.answers += answers
        outcome = self.processing.process(topup).outcome
        assert not self.api.answers, "the API was not called as often as it should"
        return outcome

    def doubt(self, topup: TopUp, answer: Answer = UNKNOWN) -> None:
        """Leave the order in doubt, as an attempt in an outage does."""
        claim = self.ledger.claim(topup)
        assert claim
        key = topup.idempotency_key
        assert self.ledger.doubt(key, claim.token, answer, is_parked=False)
        self.api.sent.append((key, claim.rendered_key))

    def take_up(self, topup: TopUp, *answers: Answer) -> Outcome:
        """Go on with a recorded order, as the resolver does."""
        self.api.answers += answers
        with self.processing.breaker.permit(self.now) as permit:
            outcome = self.processing.resume(topup, permit).outcome
        assert not self.api.answers, "the API was not called as often as it should"
        return outcome

    def status(self, topup: TopUp) -> object:
        return self.database.row(topup.idempotency_key)["status"]

    def let_time_pass(self) -> None:
        """Leases end, and settling times and windows are long over."""
        for column in ("lease_until", "sent_at", "first_sent_at"):
            self.database.execute(f"UPDATE topup SET {column} = '2001-01-01 00:00:00'")  # noqa: S608

    def let_lease_end(self) -> None:
        self.database.execute("UPDATE topup SET lease_until = '2001-01-01 00:00:00'")


class FailingLedger(Ledger):
    """The real ledger, behind a connection that breaks when a test says so."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        #: How often the next settlements find no database.
        self.outages = 0
        #: The next claim is committed, but the answer to it is lost.
        self.is_claim_answer_lost = False

    def settle(self, key: str, token: str, answer: Answer) -> bool:
        self._break()
        return super().settle(key, token, answer)

    def give_back(self, key: str, token: str, answer: Answer, **options: Any) -> bool:
        self._break()
        return super().give_back(key, token, answer, **options)

    def reclaim(self, entry: Entry) -> Claim | None:
        claim = super().reclaim(entry)
        if claim is not None and self.is_claim_answer_lost:
            self.is_claim_answer_lost = False
            raise ClaimUncertain(claim.token, "OperationalError 2013")
        return claim

    def claim(self, order: TopUp) -> Claim | None:
        claim = super().claim(order)
        if claim is not None and self.is_claim_answer_lost:
            self.is_claim_answer_lost = False
            raise ClaimUncertain(claim.token, "OperationalError 2013")
        return claim

    def _break(self) -> None:
        if self.outages:
            self.outages -= 1
            raise LedgerUnavailable("OperationalError 2003")


@pytest.fixture(params=list(Kind))
def any_kind(request: pytest.FixtureRequest, database: Database) -> Pod:
    return Pod(database, request.param)


@pytest.mark.parametrize(
    ("answer", "outcome", "status"),
    [
        (DONE, Outcome.SUCCEEDED, "succeeded"),
        (ACCEPTED, Outcome.ACCEPTED, "accepted"),
        (NO, Outcome.REJECTED, "rejected"),
        (NOT_SENT, Outcome.RELEASED, "released"),
        (LIMITED, Outcome.RELEASED, "released"),
        (SAME_CONTENT, Outcome.RELEASED, "released"),
        (OURS, Outcome.REFUSED_US, "released"),
    ],
)
def test_first_answer_ends_as_the_table_says(
    any_kind: Pod, answer: Answer, outcome: Outcome, status: str
) -> None:
    assert any_kind.deliver(order(), answer) is outcome
    assert any_kind.status(order()) == status


@pytest.mark.parametrize("answer", [UNKNOWN, SAME_REFERENCE])
def test_unknown_outcome_is_parked_and_told_where_nothing_automatic_ends_it(
    any_kind: Pod, answer: Answer
) -> None:
    is_none = any_kind.profile.kind is Kind.NONE

    is_sent_again = any_kind.profile.kind is Kind.REPLAY and answer is UNKNOWN
    again = [answer] if is_sent_again else []
    any_kind.api.findings = [LookUp(Finding.UNKNOWN)]

    outcome = any_kind.deliver(order(), answer, *again)

    assert outcome is Outcome.PARKED
    assert any_kind.status(order()) == "parked"
    assert bool(any_kind.alerts) is is_none


@pytest.mark.parametrize("answer", [DONE, ACCEPTED, NO])
def test_repetition_is_answered_as_the_first_time_without_a_call(
    any_kind: Pod, answer: Answer
) -> None:
    any_kind.api.answers.append(answer)
    first = any_kind.processing.process(order())

    second = any_kind.processing.process(order())

    assert second.outcome is first.outcome
    assert second.reference == answer.reference
    assert second.is_repetition
    assert len(any_kind.api.sent) == 1


def test_released_order_is_sent_again(any_kind: Pod) -> None:
    any_kind.deliver(order(), NOT_SENT)

    assert any_kind.deliver(order(), DONE) is Outcome.SUCCEEDED


def test_reused_key_is_quarantined_and_not_sent(
    any_kind: Pod, database: Database
) -> None:
    any_kind.deliver(order(), DONE)

    assert any_kind.deliver(order(amount_minor=5)) is Outcome.KEY_REUSED
    assert any_kind.deliver(order(amount_minor=5)) is Outcome.KEY_REUSED

    (row,) = database.rows("quarantine")
    assert row["idempotency_key"] == "app:r1"
    assert row["raw"] == order(amount_minor=5).payload
    assert len(any_kind.api.sent) == 1


def test_claim_that_another_holds_is_left_alone(any_kind: Pod) -> None:
    any_kind.ledger.claim(order())

    assert any_kind.deliver(order()) is Outcome.IN_FLIGHT


def test_replay_sends_again_with_the_same_key_within_the_window(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())

    assert pod.deliver(order(), DONE) is Outcome.SUCCEEDED

    assert pod.api.sent == [("app:r1", "app:r1")] * 2


def test_replay_never_sends_after_its_window(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())
    pod.let_time_pass()

    assert pod.deliver(order()) is Outcome.PARKED
    assert pod.deliver(order()) is Outcome.PARKED
    assert pod.alerts == [("parked", "app:r1")]


def test_process_that_sleeps_over_the_window_sends_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())
    look = pod.ledger.look

    def look_and_sleep(topup: TopUp) -> tuple[Entry | None, Line]:
        seen = look(topup)
        pod.now += 2 * 3600
        return seen

    monkeypatch.setattr(pod.ledger, "look", look_and_sleep)
    moments: list[float] = []
    pod.api.meanwhile = lambda: moments.append(pod.now)

    pod.deliver(order(), NOT_SENT)

    # The deadline is over before the request can leave.
    assert pod.api.deadlines[0] < moments[0]


def test_window_counts_from_the_first_send(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())
    database.execute("UPDATE topup SET first_sent_at = '2001-01-01 00:00:00'")

    assert pod.deliver(order()) is Outcome.PARKED


def test_replay_after_its_window_looks_up_but_never_sends(database: Database) -> None:
    pod = Pod(database, Kind.REPLAY, kind_after_window=Kind.REFUSE)
    for name, found, outcome in (
        ("r1", EXECUTED, Outcome.SUCCEEDED),
        ("r2", ABSENT, Outcome.PARKED),
    ):
        pod.doubt(order(name))
        pod.let_time_pass()
        pod.api.findings = [found]

        assert pod.deliver(order(name)) is outcome


def test_no_within_a_replay_window_is_final_also_after_doubt(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())

    assert pod.deliver(order(), NO) is Outcome.REJECTED


@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.LOOKUP])
@pytest.mark.parametrize(
    ("found", "outcome", "status"),
    [
        (EXECUTED, Outcome.SUCCEEDED, "succeeded"),
        (LookUp(Finding.FAILED), Outcome.REJECTED, "rejected"),
        (LookUp(Finding.PENDING), Outcome.PARKED, "parked"),
        (LookUp(Finding.UNKNOWN), Outcome.PARKED, "parked"),
        (LookUp(Finding.SEVERAL), Outcome.PARKED, "parked"),
        (ABSENT, Outcome.PARKED, "parked"),
    ],
)
def test_doubt_is_looked_up_and_not_sent(
    database: Database, kind: Kind, found: LookUp, outcome: Outcome, status: str
) -> None:
    pod = Pod(database, kind)
    pod.doubt(order())
    pod.api.findings = [found]

    assert pod.deliver(order()) is outcome

    assert pod.status(order()) == status
    assert pod.api.asked == ["app:r1"]
    assert len(pod.api.sent) == 1


@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.LOOKUP])
def test_absent_after_the_settling_time_is_sent_again_with_the_same_key(
    database: Database, kind: Kind
) -> None:
    pod = Pod(database, kind)
    pod.doubt(order())
    pod.let_time_pass()
    pod.api.findings = [ABSENT]

    assert pod.deliver(order(), DONE) is Outcome.SUCCEEDED

    assert pod.api.sent == [("app:r1", "app:r1")] * 2


@pytest.mark.parametrize("found", [FAILED, LookUp(Finding.REVERSED, "R-1")])
@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.LOOKUP])
def test_failure_of_an_earlier_attempt_does_not_reject_while_the_last_can_land(
    database: Database, kind: Kind, found: LookUp
) -> None:
    pod = Pod(database, kind, is_resolver=True)
    pod.doubt(order())
    database.change("app:r1", sent_at="2001-01-01", first_sent_at="2001-01-01")
    pod.api.findings = [ABSENT]
    assert pod.take_up(order(), UNKNOWN) is Outcome.PARKED

    # The list of the API has the first attempt, refused; the second is under way.
    pod.api.findings = [found]
    assert pod.take_up(order()) is Outcome.PARKED

    database.change("app:r1", sent_at="2001-01-02")
    pod.api.findings = [found]
    assert pod.take_up(order()) is Outcome.REJECTED


@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.LOOKUP])
def test_settling_time_counts_from_the_last_send(
    database: Database, kind: Kind
) -> None:
    pod = Pod(database, kind, is_resolver=True)
    pod.doubt(order())
    pod.let_time_pass()
    pod.api.findings = [ABSENT, ABSENT]
    assert pod.take_up(order(), UNKNOWN) is Outcome.PARKED

    assert pod.take_up(order()) is Outcome.PARKED
    assert len(pod.api.sent) == 2


def test_used_reference_that_is_absent_is_parked(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order(), SAME_REFERENCE)
    pod.let_time_pass()
    pod.api.findings = [ABSENT]

    assert pod.deliver(order()) is Outcome.PARKED


def test_used_reference_is_looked_up_and_never_a_no(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order(), SAME_REFERENCE)
    pod.api.findings = [EXECUTED]

    assert pod.deliver(order()) is Outcome.SUCCEEDED


@pytest.mark.parametrize("answer", [NOT_SENT, LIMITED, OURS, SAME_CONTENT])
def test_doubt_is_sticky(database: Database, answer: Answer) -> None:
    pod = Pod(database, Kind.REPLAY)
    pod.doubt(order())

    assert pod.deliver(order(), answer) is Outcome.PARKED

    assert pod.status(order()) == "parked"


def test_none_is_never_sent_again(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    pod.deliver(order(), UNKNOWN)
    pod.let_time_pass()

    assert pod.deliver(order()) is Outcome.PARKED
    assert len(pod.api.sent) == 1


def test_crashed_claim_is_in_doubt_once_its_lease_is_over(any_kind: Pod) -> None:
    """The pod died between claim and settlement."""
    any_kind.ledger.claim(order())
    assert any_kind.deliver(order()) is Outcome.IN_FLIGHT
    any_kind.let_lease_end()
    any_kind.api.findings = [EXECUTED]

    match any_kind.profile.kind:
        case Kind.REPLAY:
            assert any_kind.deliver(order(), DONE) is Outcome.SUCCEEDED
        case Kind.REFUSE | Kind.LOOKUP:
            assert any_kind.deliver(order()) is Outcome.SUCCEEDED
        case Kind.NONE:
            assert any_kind.deliver(order()) is Outcome.PARKED


def test_later_order_is_recorded_before_it_is_sent_away(
    any_kind: Pod, database: Database
) -> None:
    any_kind.ledger.claim(order("r1"))

    assert any_kind.deliver(order("r2")) is Outcome.WAITING
    assert any_kind.status(order("r2")) == "held"
    assert len(database.rows("topup")) == 2


def test_held_order_runs_when_it_is_first_in_line(any_kind: Pod) -> None:
    claim = any_kind.ledger.claim(order("r1"))
    assert claim
    any_kind.deliver(order("r2"))
    any_kind.ledger.settle("app:r1", claim.token, DONE)

    assert any_kind.deliver(order("r2"), DONE) is Outcome.SUCCEEDED


def test_orders_behind_a_parked_one_are_held_and_not_sent(database: Database) -> None:
    pod = Pod(database, Kind.NONE)
    pod.deliver(order("r1", offset=1), UNKNOWN)

    assert pod.deliver(order("r2", offset=2)) is Outcome.HELD
    assert pod.deliver(order("r3", offset=3)) is Outcome.HELD
    assert pod.deliver(order("r2", offset=2)) is Outcome.HELD
    assert pod.deliver(order("x", msisdn="+393330000000"), DONE) is Outcome.SUCCEEDED


def test_doubt_that_the_source_gave_up_on_is_parked_and_the_next_held(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order("r1", offset=1))

    assert pod.deliver(order("r2", offset=2)) is Outcome.HELD

    assert pod.status(order("r1")) == "parked"
    assert pod.alerts == [("earlier_overtaken", "app:r1")]
    assert database.row("app:r1")["reason"] == "source_gave_up"


def test_doubt_of_another_partition_is_waited_for(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order("r1", offset=1))

    assert pod.deliver(order("r2", offset=2, partition=1)) is Outcome.WAITING

    assert pod.status(order("r1")) == "in_doubt"


def test_pause_records_and_calls_nothing(any_kind: Pod, database: Database) -> None:
    any_kind.deliver(order("r0", msisdn="+393330000000"), NOT_SENT)
    database.execute("INSERT INTO pause VALUES ('*', 'a', 'b', '2001-01-01')")

    receipt = any_kind.processing.process(order("r1"))
    assert (receipt.outcome, receipt.reason) == (Outcome.PAUSED, "a: b")
    again = order("r0", msisdn="+393330000000")
    assert any_kind.deliver(again) is Outcome.PAUSED
    assert any_kind.status(order("r1")) == "held"

    database.execute("DELETE FROM pause")
    assert any_kind.deliver(order("r1"), DONE) is Outcome.SUCCEEDED
    assert any_kind.deliver(again, DONE) is Outcome.SUCCEEDED


@pytest.mark.parametrize("answer", [DONE, ACCEPTED])
def test_success_settles_an_order_that_was_parked_meanwhile(
    database: Database, answer: Answer
) -> None:
    """Others gave up on this very attempt, whose answer was on its way."""
    pod = Pod(database, Kind.REFUSE)
    claim = pod.ledger.claim(order())
    assert claim
    pod.let_lease_end()
    entry, _ = pod.ledger.look(order())
    assert entry
    assert pod.ledger.expire(entry)
    entry, _ = pod.ledger.look(order())
    assert entry
    assert pod.ledger.park(entry, "read_timeout")

    receipt = pod.processing._write(order(), claim, answer, may_find_out=False)

    assert receipt
    assert receipt.outcome.value == pod.status(order())
    assert receipt.reference == "R-1"


def test_second_success_under_another_reference_is_an_alert(
    database: Database,
) -> None:
    """We hold both references of a double: somebody must hear of it."""
    pod = Pod(database, Kind.LOOKUP)
    claim = pod.ledger.claim(order())
    assert claim
    pod.let_lease_end()
    pod.let_time_pass()
    pod.api.findings = [ABSENT]
    assert pod.deliver(order(), replace(DONE, reference="R-2")) is Outcome.SUCCEEDED

    pod.processing._write(order(), claim, DONE, may_find_out=False)

    assert ("evidence_contradicts", "app:r1") in pod.alerts


def test_one_order_alone_is_the_trial_of_an_open_breaker(database: Database) -> None:
    """Each that went at once would be a doubt for good, and a person's case."""
    pod = Pod(database, Kind.NONE)
    for number in range(3):
        topup = order(f"p{number}", msisdn=f"+3933311{number:05}")
        assert pod.deliver(topup, UNKNOWN) is Outcome.PARKED
    pod.now += 61
    claim = pod.ledger.claim
    others = [order(f"o{number}", msisdn=f"+3933322{number:05}") for number in range(3)]
    outcomes: list[Outcome] = []

    def claim_while_others_come(topup: TopUp) -> Claim | None:
        claimed = claim(topup)
        outcomes.extend(pod.processing.process(other).outcome for other in others)
        return claimed

    pod.ledger.claim = claim_while_others_come  # type: ignore[method-assign,assignment]
    last = order("last", msisdn=A)

    assert pod.deliver(last, UNKNOWN) is Outcome.PARKED
    assert outcomes == [Outcome.CIRCUIT_OPEN] * 3
    assert {pod.status(other) for other in others} == {"released"}


def test_breaker_that_opens_while_a_claim_is_written_stops_its_call(
    database: Database,
) -> None:
    pod = Pod(database, Kind.NONE)
    claim = pod.ledger.claim
    failing = [
        order(f"p{number}", msisdn=f"+3933311{number:05}") for number in range(3)
    ]

    def claim_while_others_fail(topup: TopUp) -> Claim | None:
        claimed = claim(topup)
        pod.ledger.claim = claim  # type: ignore[method-assign]
        pod.api.answers = [UNKNOWN] * 3
        for each in failing:
            pod.processing.process(each)
        return claimed

    pod.ledger.claim = claim_while_others_fail  # type: ignore[method-assign,assignment]
    last = order("last", msisdn=A)

    assert pod.processing.process(last).outcome is Outcome.CIRCUIT_OPEN
    assert pod.status(last) == "released"
    assert len(pod.api.sent) == 3


def test_others_wait_for_what_becomes_of_the_one_that_goes_first(
    database: Database,
) -> None:
    pod = Pod(database, Kind.NONE)
    for number in range(3):
        topup = order(f"p{number}", msisdn=f"+3933311{number:05}")
        assert pod.deliver(topup, UNKNOWN) is Outcome.PARKED
    pod.now += 61
    met: list[Outcome] = []

    def another_comes() -> None:
        pod.api.meanwhile = lambda: None
        met.append(pod.processing.process(order("second")).outcome)

    pod.api.meanwhile = another_comes
    pod.api.answers = [DONE, DONE]
    pod.processing.process(order("first", msisdn=A))

    assert met == [Outcome.CIRCUIT_OPEN]


def test_draining_pod_begins_no_call(any_kind: Pod, database: Database) -> None:
    any_kind.is_draining = True

    assert any_kind.deliver(order()) is Outcome.DRAINING
    assert database.rows("topup") == []


def test_draining_pod_does_not_send_again(database: Database) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.doubt(order())
    pod.let_time_pass()

    def drain() -> None:
        pod.is_draining = True

    pod.api.meanwhile, pod.api.findings = drain, [ABSENT]

    assert pod.deliver(order()) is Outcome.DRAINING
    assert pod.status(order()) == "in_doubt"


def test_settlement_is_tried_again_while_the_ledger_is_away(any_kind: Pod) -> None:
    any_kind.ledger.outages = 5

    assert any_kind.deliver(order(), DONE) is Outcome.SUCCEEDED
    assert any_kind.status(order()) == "succeeded"


def test_answer_is_owed_when_the_ledger_stays_away_and_settled_from_memory(
    any_kind: Pod,
) -> None:
    any_kind.ledger.outages = 10_000
    with pytest.raises(LedgerUnavailable):
        any_kind.deliver(order(), DONE)
    assert any_kind.status(order()) == "in_flight"
    assert ("answer_owed", "app:r1") in any_kind.alerts

    any_kind.ledger.outages = 0
    any_kind.let_lease_end()
    assert any_kind.deliver(order()) is Outcome.SUCCEEDED
    assert len(any_kind.api.sent) == 1


def test_settlement_tries_end_with_the_lease(any_kind: Pod) -> None:
    any_kind.ledger.outages = 10_000

    with pytest.raises(LedgerUnavailable):
        any_kind.deliver(order(), DONE)

    assert any_kind.now <= 1000 + 30


def test_uncertain_claim_is_given_back_and_never_sent(any_kind: Pod) -> None:
    any_kind.ledger.is_claim_answer_lost = True

    with pytest.raises(LedgerUnavailable):
        any_kind.deliver(order())

    assert any_kind.api.sent == []
    assert any_kind.status(order()) == "released"
    assert any_kind.deliver(order(), DONE) is Outcome.SUCCEEDED


def test_uncertain_claim_that_cannot_be_given_back_is_remembered(
    any_kind: Pod,
) -> None:
    any_kind.ledger.is_claim_answer_lost = True
    any_kind.ledger.outages = 1
    with pytest.raises(LedgerUnavailable):
        any_kind.deliver(order())
    assert any_kind.status(order()) == "in_flight"

    # This pod knows that nothing was sent under that claim.
    assert any_kind.deliver(order()) is Outcome.RELEASED
    assert any_kind.deliver(order(), DONE) is Outcome.SUCCEEDED


def test_fenced_success_settles_a_row_that_nobody_holds(database: Database) -> None:
    """The pod slept through its lease; another put the row in doubt."""
    pod = Pod(database, Kind.REFUSE)

    def expire() -> None:
        pod.let_lease_end()
        entry, _ = pod.ledger.look(order())
        assert isinstance(entry, Entry)
        assert pod.ledger.expire(entry)

    pod.api.meanwhile = expire

    assert pod.deliver(order(), DONE) is Outcome.SUCCEEDED
    assert pod.status(order()) == "succeeded"


def test_fenced_unknown_changes_nothing_and_keeps_its_evidence(
    database: Database,
) -> None:
    pod, other = Pod(database, Kind.REPLAY), Pod(database, Kind.REPLAY)
    retaken = replace(UNKNOWN, reason="first_attempt")

    def take_over() -> None:
        pod.let_lease_end()
        assert other.deliver(order(), DONE) is Outcome.SUCCEEDED

    pod.api.meanwhile = take_over

    # It answers what the row says, never its own word.
    assert pod.deliver(order(), retaken) is Outcome.SUCCEEDED
    assert "first_attempt" in [row["reason"] for row in database.rows("attempt")]


def test_fenced_success_never_answers_2xx_while_another_attempt_holds_the_row(
    database: Database,
) -> None:
    pod, other = Pod(database, Kind.REPLAY), Pod(database, Kind.REPLAY)

    def take_over() -> None:
        pod.let_lease_end()
        entry, _ = other.ledger.look(order())
        assert isinstance(entry, Entry)
        assert other.ledger.expire(entry)
        entry, _ = other.ledger.look(order())
        assert isinstance(entry, Entry)
        assert other.ledger.reclaim(entry)

    pod.api.meanwhile = take_over

    assert pod.deliver(order(), DONE) is Outcome.IN_FLIGHT
    assert pod.status(order()) == "in_flight"


def test_success_against_a_recorded_no_is_an_alert(database: Database) -> None:
    pod, other = Pod(database, Kind.REPLAY), Pod(database, Kind.REPLAY)

    def reject_elsewhere() -> None:
        pod.let_lease_end()
        assert other.deliver(order(), NO) is Outcome.REJECTED

    pod.api.meanwhile = reject_elsewhere

    assert pod.deliver(order(), DONE) is Outcome.REJECTED
    assert ("evidence_contradicts", "app:r1") in pod.alerts


@pytest.mark.parametrize("answer", [DONE, ACCEPTED])
def test_success_of_an_order_that_a_person_abandoned_meanwhile_is_kept_and_told(
    database: Database, answer: Answer
) -> None:
    """The pod froze with the success in hand; the decision keeps its token."""
    pod = Pod(database, Kind.REFUSE)
    pod.api.meanwhile = lambda: database.change("app:r1", status="abandoned")

    assert pod.deliver(order(), answer) is Outcome.ABANDONED

    assert ("evidence_contradicts", "app:r1") in pod.alerts
    assert "R-1" in [row["reference"] for row in database.rows("attempt")]


def test_success_of_an_order_that_a_look_up_found_failed_is_kept_and_told(
    database: Database,
) -> None:
    pod = Pod(database, Kind.REFUSE)
    pod.api.meanwhile = lambda: database.change("app:r1", status="rejected")

    assert pod.deliver(order(), DONE) is Outcome.REJECTED

    assert ("evidence_contradicts", "app:r1") in pod.alerts
    assert "R-1" in [row["reference"] for row in database.rows("attempt")]


@pytest.mark.parametrize("end", ["succeeded", "rejected", "abandoned"])
def test_accepted_order_that_came_to_its_end_is_no_contradiction(
    database: Database, end: str
) -> None:
    """Our settlement was committed, its answer lost, and the resolver was quick."""
    pod = Pod(database, Kind.REFUSE)
    claim = pod.ledger.claim(order())
    assert claim
    assert pod.ledger.settle("app:r1", claim.token, ACCEPTED)
    database.change("app:r1", status=end)

    assert pod.processing._fenced_off(order(), claim, ACCEPTED).outcome.value == end
    assert pod.alerts == []


def test_answer_that_is_still_owed_is_told_before_a_repetition(
    any_kind: Pod, database: Database
) -> None:
    """The ledger was away when the answer came; a person abandoned the order since."""
    any_kind.ledger.outages = 10_000
    with pytest.raises(LedgerUnavailable):
        any_kind.deliver(order(), DONE)
    any_kind.ledger.outages = 0
    database.change("app:r1", status="abandoned")

    assert any_kind.deliver(order()) is Outcome.ABANDONED

    assert ("evidence_contradicts", "app:r1") in any_kind.alerts
    assert "R-1" in [row["reference"] for row in database.rows("attempt")]


def test_answer_is_told_when_the_ledger_fails_in_a_way_nobody_foresaw(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(database, Kind.REFUSE)

    def raise_(*_: object) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(pod.ledger, "settle", raise_)

    with pytest.raises(ZeroDivisionError):
        pod.deliver(order(), DONE)
    assert ("answer_owed", "app:r1") in pod.alerts


def test_claim_that_lands_late_is_still_known_as_not_sent(database: Database) -> None:
    """The release by its token found no row: the INSERT was still on its way."""
    pod = Pod(database, Kind.NONE)
    landed: list[Claim] = []
    claim = pod.ledger.claim

    def land_late(topup: TopUp) -> Claim | None:
        late = Claim("f" * 32, topup.idempotency_key, is_doubted=False)
        landed.append(late)
        raise ClaimUncertain(late.token, "OperationalError 2013")

    pod.ledger.claim = land_late  # type: ignore[method-assign,assignment]
    with pytest.raises(LedgerUnavailable):
        pod.deliver(order())
    assert database.rows("topup") == []
    pod.ledger.claim = claim  # type: ignore[method-assign]
    assert pod.ledger.claim(order())
    database.change("app:r1", token=landed[0].token)

    # This pod knows that nothing was sent under that claim, whatever its kind.
    assert pod.deliver(order()) is Outcome.RELEASED
    assert pod.deliver(order(), DONE) is Outcome.SUCCEEDED
