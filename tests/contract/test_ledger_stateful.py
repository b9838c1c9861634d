"""Any sequence of the ledger's operations, held against a small model of it."""

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from function.api_profile import load_profile
from function.model import (
    TERMINAL,
    TRANSITIONS,
    UNSETTLED,
    Answer,
    AnswerClass,
    Status,
    TopUp,
)
from tests.conftest import Database, settings_of
from tests.orders import order

DONE = Answer(AnswerClass.DONE, http_status=201, reference="R-1")
NO = Answer(AnswerClass.NO, http_status=422, reason="no")
ACCEPTED = Answer(AnswerClass.ACCEPTED, http_status=202, reference="R-1")
UNKNOWN = Answer(AnswerClass.UNKNOWN, reason="read_timeout")
NOT_SENT = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")

SUBSCRIBERS = ("+393330000001", "+393330000002")
#: Orders 0 to 5 in one partition, in order; two subscribers take turns.
ORDERS = tuple(
    order(f"r{number}", msisdn=SUBSCRIBERS[number % 2], offset=number)
    for number in range(6)
)
some_order = st.sampled_from(ORDERS)
NEXT_STATUS = {
    AnswerClass.DONE: Status.SUCCEEDED,
    AnswerClass.NO: Status.REJECTED,
    AnswerClass.ACCEPTED: Status.ACCEPTED,
}


class Row:
    """What the model knows of one order."""

    def __init__(self, status: Status, token: str | None) -> None:
        self.status = status
        self.token = token
        self.is_doubted = False
        self.is_lease_over = False
        #: Every token that this order ever had.
        self.tokens = [token] if token else []


class Machine(RuleBasedStateMachine):
    """The ledger beside a dict."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}
        self.line: list[TopUp] = []
        self.stray = "0" * 32

    @initialize()
    def empty(self) -> None:
        self.database.empty()
        profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
        self.ledger = self.database.make_ledger(profile, lease_s=300)

    def unsettled(self, topup: TopUp) -> list[TopUp]:
        return [
            each
            for each in self.line
            if each.msisdn == topup.msisdn
            and self.rows[each.idempotency_key].status in UNSETTLED
        ]

    def is_first(self, topup: TopUp) -> bool:
        line = self.unsettled(topup)
        return bool(line) and line[0] is topup

    def move(self, row: Row, status: Status) -> None:
        assert status in TRANSITIONS[row.status]
        row.status = status

    @rule(topup=some_order)
    def claim(self, topup: TopUp) -> None:
        claim = self.ledger.claim(topup)

        is_new = topup.idempotency_key not in self.rows
        assert bool(claim) == (is_new and not self.unsettled(topup))
        if claim:
            self.rows[topup.idempotency_key] = Row(Status.IN_FLIGHT, claim.token)
            self.line.append(topup)

    @rule(topup=some_order)
    def hold(self, topup: TopUp) -> None:
        is_new = topup.idempotency_key not in self.rows
        expected = is_new and bool(self.unsettled(topup))

        assert self.ledger.hold(topup) == expected

        if expected:
            self.rows[topup.idempotency_key] = Row(Status.HELD, None)
            later = [each for each in self.unsettled(topup) if is_later(each, topup)]
            place = min((self.line.index(each) for each in later), default=None)
            if place is None:
                self.line.append(topup)
            else:
                self.line.insert(place, topup)

    @rule(
        topup=some_order,
        is_owner=st.booleans(),
        answer=st.sampled_from([DONE, NO, ACCEPTED]),
    )
    def settle(self, topup: TopUp, *, is_owner: bool, answer: Answer) -> None:
        row, token, expected = self.attempt(topup, is_owner=is_owner)

        assert self.ledger.settle(topup.idempotency_key, token, answer) == expected

        if expected and row:
            self.move(row, NEXT_STATUS[answer.classified])

    @rule(topup=some_order, is_owner=st.booleans())
    def give_back(self, topup: TopUp, *, is_owner: bool) -> None:
        row, token, expected = self.attempt(topup, is_owner=is_owner)

        assert self.ledger.give_back(topup.idempotency_key, token, NOT_SENT) == expected

        if expected and row:
            self.move(row, Status.PARKED if row.is_doubted else Status.RELEASED)

    @rule(topup=some_order, is_owner=st.booleans(), is_parked=st.booleans())
    def doubt(self, topup: TopUp, *, is_owner: bool, is_parked: bool) -> None:
        row, token, expected = self.attempt(topup, is_owner=is_owner)
        key = topup.idempotency_key

        done = self.ledger.doubt(key, token, UNKNOWN, is_parked=is_parked)

        assert done == expected
        if expected and row:
            self.move(row, Status.PARKED if is_parked else Status.IN_DOUBT)
            row.is_doubted = True

    def attempt(self, topup: TopUp, *, is_owner: bool) -> tuple[Row | None, str, bool]:
        """A token to act with, and whether it holds the claim."""
        row = self.rows.get(topup.idempotency_key)
        token = row.token if row and is_owner and row.token else self.stray
        if row and not is_owner and len(row.tokens) > 1:
            token = row.tokens[0]
        is_held = bool(row and row.status is Status.IN_FLIGHT and row.token == token)
        return row, token, is_held

    @rule(topup=some_order)
    def lease_ends(self, topup: TopUp) -> None:
        row = self.rows.get(topup.idempotency_key)
        if row and row.status is Status.IN_FLIGHT:
            row.is_lease_over = True
            self.database.change(
                topup.idempotency_key, lease_until="2001-01-01 00:00:00"
            )

    @rule(topup=some_order)
    def expire(self, topup: TopUp) -> None:
        entry, _ = self.ledger.look(topup)
        if entry is None:
            return
        row = self.rows[topup.idempotency_key]
        expected = row.status is Status.IN_FLIGHT and row.is_lease_over

        assert self.ledger.expire(entry) == expected

        if expected:
            self.move(row, Status.IN_DOUBT)
            row.is_doubted = True

    @rule(topup=some_order, is_stale=st.booleans())
    def reclaim(self, topup: TopUp, *, is_stale: bool) -> None:
        entry, _ = self.ledger.look(topup)
        if entry is None or Status.IN_FLIGHT not in TRANSITIONS[entry.status]:
            return
        if is_stale:
            entry = type(entry)(
                **{name: getattr(entry, name) for name in entry.__slots__}
                | {"token": self.stray}
            )
        row = self.rows[topup.idempotency_key]

        claim = self.ledger.reclaim(entry)

        # A later one may be in flight already: two never are.
        is_free = self.is_first(topup) and not any(
            self.rows[each.idempotency_key].status is Status.IN_FLIGHT
            for each in self.unsettled(topup)
        )
        assert bool(claim) == (not is_stale and is_free)
        if claim:
            assert claim.token not in row.tokens
            assert claim.is_doubted == row.is_doubted
            self.move(row, Status.IN_FLIGHT)
            row.token, row.is_lease_over = claim.token, False
            row.tokens.append(claim.token)

    @rule(topup=some_order, answer=st.sampled_from([DONE, NO]))
    def end_doubt(self, topup: TopUp, answer: Answer) -> None:
        entry, _ = self.ledger.look(topup)
        if entry is None or entry.status is not Status.IN_DOUBT:
            return

        assert self.ledger.end_doubt(entry, answer)

        row = self.rows[topup.idempotency_key]
        self.move(row, NEXT_STATUS[answer.classified])

    @rule(topup=some_order, answer=st.sampled_from([DONE, NO, UNKNOWN]))
    def keep_evidence(self, topup: TopUp, answer: Answer) -> None:
        row = self.rows.get(topup.idempotency_key)
        if row is None:
            return
        unheld = {Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED}
        expected = answer is DONE and row.status in unheld
        key = topup.idempotency_key

        assert self.ledger.keep_evidence(key, self.stray, answer) == expected

        if expected:
            self.move(row, Status.SUCCEEDED)

    @rule(topup=some_order)
    def overtake(self, topup: TopUp) -> None:
        changes = 0
        for each in ORDERS:
            row = self.rows.get(each.idempotency_key)
            is_earlier = each.msisdn == topup.msisdn and is_later(topup, each)
            if row is None or not is_earlier:
                continue
            is_expired = row.status is Status.IN_FLIGHT and row.is_lease_over
            if row.status is Status.IN_DOUBT or is_expired:
                self.move(row, Status.PARKED)
                row.is_doubted = True
                changes += 1
            elif row.status is Status.RELEASED:
                self.move(row, Status.HELD)
                changes += 1

        assert len(self.ledger.overtake(topup)) == changes

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def ledger_says_what_the_model_says(self) -> None:
        found = {
            str(row["idempotency_key"]): (row["status"], row["token"])
            for row in self.database.rows("topup")
        }
        assert found == {
            key: (row.status.value, row.token) for key, row in self.rows.items()
        }

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def at_most_one_in_flight_a_subscriber(self) -> None:
        for msisdn in SUBSCRIBERS:
            in_flight = [
                row
                for row in self.database.rows("topup")
                if row["msisdn"] == msisdn and row["status"] == "in_flight"
            ]
            assert len(in_flight) <= 1

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def lines_are_as_the_model_says(self) -> None:
        for topup in ORDERS:
            row = self.rows.get(topup.idempotency_key)
            if row is None or row.status in TERMINAL or row.status not in UNSETTLED:
                continue
            before = self.unsettled(topup)
            first = before[0]
            _, line = self.ledger.look(topup)
            if first is topup:
                assert line.blocker is None
            else:
                assert line.blocker is self.rows[first.idempotency_key].status


def is_later(one: TopUp, other: TopUp) -> bool:
    assert one.position
    assert other.position
    return one.position.offset > other.position.offset


def run(
    database: Database, examples: int, phases: Collection[Phase] = tuple(Phase)
) -> None:
    machine: Any = type("Bound", (Machine,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=phases,
        ),
    )


def test_ledger_in_memory_behaves_as_the_model(memory_database: Database) -> None:
    run(memory_database, examples=200)


def test_ledger_on_sqlite_behaves_as_the_model(sqlite_database: Database) -> None:
    run(sqlite_database, examples=30)


@pytest.mark.slow
def test_ledger_on_mariadb_behaves_as_the_model(mariadb_database: Database) -> None:
    # Without shrinking, which takes minutes here: SQLite shrinks the same failure.
    run(mariadb_database, examples=40, phases=[Phase.generate])
