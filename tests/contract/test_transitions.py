"""Each legal transition, made by the code that owns it, on each kind of ledger."""

from collections.abc import Callable

import pytest

from function.ledger import Ledger
from function.model import TRANSITIONS, Answer, Entry, Status
from function.operations import Verdict
from tests.conftest import Database
from tests.contract.test_ledger import ACCEPTED, DONE, NO, RETRY, UNKNOWN, make
from tests.contract.test_ledger import ledger as ledger  # noqa: PLC0414 # a fixture.
from tests.contract.test_ledger import profile as profile  # noqa: PLC0414 # a fixture.
from tests.orders import order

KEY = "app:r1"
TOPUP = order("r1", offset=1)
ANSWERS = {
    Status.SUCCEEDED: DONE,
    Status.ACCEPTED: ACCEPTED,
    Status.REJECTED: NO,
}
Act = Callable[[Ledger, Database, Entry], object]


def settle(answer: Answer) -> Act:
    return lambda ledger, _, entry: ledger.settle(KEY, entry.token or "", answer)


def look_up(answer: Answer) -> Act:
    return lambda ledger, _, entry: ledger.end_doubt(entry, answer)


def evidence(answer: Answer) -> Act:
    return lambda ledger, _, __: ledger.keep_evidence(KEY, "f" * 32, answer)


def doubt(*, is_parked: bool) -> Act:
    return lambda ledger, _, entry: ledger.doubt(
        KEY, entry.token or "", UNKNOWN, is_parked=is_parked
    )


def decide(verdict: Verdict) -> Act:
    return lambda _, database, __: database.decide(KEY, verdict, reason="asked")


def reclaim(ledger: Ledger, _: Database, entry: Entry) -> object:
    return ledger.reclaim(entry)


ACTS: dict[tuple[Status, Status], Act] = {
    **{(Status.IN_FLIGHT, to): settle(answer) for to, answer in ANSWERS.items()},
    (Status.IN_FLIGHT, Status.RELEASED): lambda ledger, _, entry: ledger.give_back(
        KEY, entry.token or "", RETRY
    ),
    (Status.IN_FLIGHT, Status.HELD): lambda ledger, _, entry: ledger.give_back(
        KEY, entry.token or "", RETRY, is_held=True
    ),
    (Status.IN_FLIGHT, Status.IN_DOUBT): doubt(is_parked=False),
    (Status.IN_FLIGHT, Status.PARKED): doubt(is_parked=True),
    **{(Status.IN_DOUBT, to): look_up(answer) for to, answer in ANSWERS.items()},
    (Status.IN_DOUBT, Status.IN_FLIGHT): reclaim,
    (Status.IN_DOUBT, Status.PARKED): lambda ledger, _, entry: ledger.park(
        entry, "why"
    ),
    (Status.IN_DOUBT, Status.ABANDONED): decide(Verdict.ABANDON),
    **{(Status.PARKED, to): look_up(answer) for to, answer in ANSWERS.items()},
    (Status.PARKED, Status.IN_FLIGHT): reclaim,
    (Status.PARKED, Status.HELD): decide(Verdict.NOT_EXECUTED),
    (Status.PARKED, Status.ABANDONED): decide(Verdict.ABANDON),
    (Status.HELD, Status.SUCCEEDED): evidence(DONE),
    (Status.HELD, Status.ACCEPTED): evidence(ACCEPTED),
    (Status.HELD, Status.IN_FLIGHT): reclaim,
    (Status.HELD, Status.ABANDONED): decide(Verdict.ABANDON),
    (Status.RELEASED, Status.SUCCEEDED): evidence(DONE),
    (Status.RELEASED, Status.ACCEPTED): evidence(ACCEPTED),
    (Status.RELEASED, Status.IN_FLIGHT): reclaim,
    (Status.RELEASED, Status.HELD): lambda ledger, _, __: ledger.overtake(
        order("r2", offset=2)
    ),
    (Status.RELEASED, Status.ABANDONED): decide(Verdict.ABANDON),
    (Status.ACCEPTED, Status.SUCCEEDED): look_up(DONE),
    (Status.ACCEPTED, Status.REJECTED): look_up(NO),
    (Status.ACCEPTED, Status.ABANDONED): decide(Verdict.ABANDON),
}


def test_every_legal_transition_is_made_by_somebody() -> None:
    legal = {(one, to) for one, many in TRANSITIONS.items() for to in many}

    assert set(ACTS) == legal


@pytest.mark.parametrize(
    ("one", "to"), ACTS, ids=lambda status: getattr(status, "value", str(status))
)
def test_legal_transition_is_made(
    ledger: Ledger, database: Database, one: Status, to: Status
) -> None:
    entry = make(one, ledger, database, TOPUP)
    if one is not Status.IN_FLIGHT:
        # Nothing of it can land any more, which a person's decision demands.
        database.change(
            lease_until="2001-01-01 00:00:00", sent_at="2001-01-01 00:00:00"
        )
    if one is Status.ACCEPTED:
        # A person's case, as the resolver notes it.
        assert ledger.note(entry, "accepted_overdue")

    ACTS[one, to](ledger, database, entry)

    assert database.row(KEY)["status"] == to.value
