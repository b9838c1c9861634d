"""What the crash matrix expects of a cell, and what its judge sees."""

from collections import defaultdict
from dataclasses import replace

import pytest

from demo.recharge_api import Kind
from proof.crash_matrix.cells import (
    BOUNDARIES,
    Behaviour,
    Boundary,
    Cell,
    Moment,
    all_cells,
    chosen,
    expected,
    short_cells,
    why_unreachable,
)
from proof.crash_matrix.judging import (
    BYSTANDER,
    Observation,
    bystander_findings,
    findings,
)
from proof.crash_matrix.report import Figures, Result, markdown
from proof.crash_matrix.wires import FIRST, SECOND, DatabaseWire, Trigger

ASKABLE = [kind for kind in Kind if kind is not Kind.NONE]


def cell(
    moment: Moment, behaviour: Behaviour, kind: Kind, *, by_resolver: bool = False
) -> Cell:
    return Cell(
        Boundary("resolver" if by_resolver else "function", moment), behaviour, kind
    )


def test_every_boundary_meets_every_behaviour_of_every_kind() -> None:
    cells = all_cells()

    assert len(cells) == len(set(cells)) == len(BOUNDARIES) * 9 * 4
    assert len({str(boundary) for boundary in BOUNDARIES}) == len(BOUNDARIES) == 26


@pytest.mark.parametrize("kind", ASKABLE)
def test_api_that_can_be_asked_ends_every_order_wherever_somebody_dies(
    kind: Kind,
) -> None:
    for each in all_cells():
        if each.kind is kind:
            is_no = each.behaviour is Behaviour.REJECTS
            end = ("rejected", 0) if is_no else ("succeeded", 1)
            promised = expected(each)
            assert (promised.status, promised.executions) == end, each
            assert (promised.next_status, promised.next_executions) == ("succeeded", 1)


@pytest.mark.parametrize(
    ("moment", "behaviour", "status", "executions"),
    [
        # Nothing is in the ledger: as if nobody had died.
        (Moment.REQUEST_READ, Behaviour.ANSWERS, "succeeded", 1),
        (Moment.CLAIM_UNSENT, Behaviour.ANSWER_LOST, "parked", 1),
        # Claimed and never called: nobody can know that.
        (Moment.CLAIM_SENT, Behaviour.ANSWERS, "parked", 0),
        (Moment.CALL_UNSENT, Behaviour.REJECTS, "parked", 0),
        # Called, and nobody was told what became of it.
        (Moment.CALL_SENT, Behaviour.ANSWERS, "parked", 1),
        (Moment.CALL_SENT, Behaviour.TOO_MANY, "parked", 0),
        (Moment.API_EXECUTED, Behaviour.ERROR_AFTER, "parked", 1),
        (Moment.ANSWER_ARRIVED, Behaviour.REJECTS, "parked", 0),
        (Moment.SETTLEMENT_UNSENT, Behaviour.REFUSED, "parked", 0),
        (Moment.SETTLEMENT_UNCOMMITTED, Behaviour.REJECTS, "parked", 0),
        # Written: what the answer said holds.
        (Moment.SETTLEMENT_SENT, Behaviour.ANSWERS, "succeeded", 1),
        (Moment.SETTLEMENT_SENT, Behaviour.REJECTS, "rejected", 0),
        (Moment.SETTLEMENT_SENT, Behaviour.TOO_MANY, "succeeded", 1),
        (Moment.RESPONSE_LOST, Behaviour.HANGS, "parked", 0),
        (Moment.RESPONSE_WRITTEN, Behaviour.HALF_BODY, "parked", 1),
        # Nobody can die there, so nobody does.
        (Moment.CALL_SENT, Behaviour.REFUSED, "succeeded", 1),
        (Moment.API_EXECUTED, Behaviour.REJECTS, "rejected", 0),
        (Moment.ANSWER_ARRIVED, Behaviour.ANSWER_LOST, "parked", 1),
    ],
)
def test_api_that_cannot_be_asked_leaves_to_a_person_what_nobody_was_told(
    moment: Moment, behaviour: Behaviour, status: str, executions: int
) -> None:
    promised = expected(cell(moment, behaviour, Kind.NONE))

    assert (promised.status, promised.executions) == (status, executions)
    is_parked = status == "parked"
    assert promised.next_status == ("held" if is_parked else "succeeded")
    assert promised.next_executions == (0 if is_parked else 1)


def test_boundary_that_cannot_be_reached_says_why() -> None:
    unreachable = {
        (str(each.boundary), each.behaviour) for each in all_cells() if why_of(each)
    }

    assert ("answer_arrived", Behaviour.REFUSED) in unreachable
    assert ("answer_arrived", Behaviour.HALF_BODY) in unreachable
    assert ("api_executed", Behaviour.ERROR_BEFORE) in unreachable
    assert ("settlement_unsent", Behaviour.REFUSED) not in unreachable
    assert why_of(cell(Moment.LOOK_UP_SENT, Behaviour.ANSWERS, Kind.NONE))
    assert not why_of(cell(Moment.LOOK_UP_SENT, Behaviour.ANSWERS, Kind.REFUSE))


def why_of(each: Cell) -> str:
    return why_unreachable(each)


def test_short_form_dies_at_every_boundary_that_a_kind_has() -> None:
    short = short_cells()
    died_at = {(c.boundary, c.kind) for c in short if not why_unreachable(c)}
    could = {(c.boundary, c.kind) for c in all_cells() if not why_unreachable(c)}
    behaviours = defaultdict(set)
    for each in short:
        behaviours[each.kind].add(each.behaviour)

    assert died_at == could
    assert all(found == set(Behaviour) for found in behaviours.values())


def test_cells_are_chosen_by_name() -> None:
    found = chosen(all_cells(), boundaries=["call_sent"], kinds=["none"])

    assert len(found) == len(Behaviour)
    assert {str(each.boundary) for each in found} == {"call_sent"}


GREEN_CELL = cell(Moment.CALL_SENT, Behaviour.ANSWERS, Kind.REFUSE)
GREEN = Observation(
    was_killed=True,
    answer_at_death=None,
    executed=[BYSTANDER, FIRST, SECOND],
    calls=1,
    look_ups=1,
    statuses=dict.fromkeys([FIRST, SECOND, BYSTANDER], "succeeded"),
    answers=dict.fromkeys([FIRST, SECOND, BYSTANDER], 200),
    deliveries={FIRST: 9, SECOND: 1, BYSTANDER: 1},
    seconds=5.0,
)


def test_cell_that_is_as_promised_is_green() -> None:
    assert findings(GREEN_CELL, GREEN) == []
    assert bystander_findings(GREEN_CELL, GREEN) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"was_killed": False}, "never came"),
        ({"answer_at_death": 200}, "should have died"),
        ({"executed": [FIRST, FIRST, SECOND, BYSTANDER]}, "DOUBLE"),
        ({"executed": [SECOND, FIRST, BYSTANDER]}, "wrong order"),
        ({"executed": [FIRST, BYSTANDER]}, "second was executed 0 times"),
        ({"executed": [FIRST, SECOND]}, "bystander was executed 0 times"),
        ({"statuses": {**GREEN.statuses, FIRST: "rejected"}}, "the book: 1 times"),
        ({"statuses": {FIRST: "succeeded", BYSTANDER: "succeeded"}}, "missing"),
        ({"answers": {**GREEN.answers, SECOND: 503}}, "answered 503"),
    ],
)
def test_judge_sees(change: dict[str, object], word: str) -> None:
    seen = replace(GREEN, **change)  # type: ignore[arg-type]

    assert any(word in each for each in findings(GREEN_CELL, seen))


def test_judge_sees_a_kill_where_none_can_be() -> None:
    impossible = cell(Moment.API_EXECUTED, Behaviour.HANGS, Kind.REFUSE)

    assert any("can't be reached" in each for each in findings(impossible, GREEN))


def test_bystander_may_wait_only_while_nobody_listens_at_the_api() -> None:
    seen = replace(GREEN, deliveries={FIRST: 9, SECOND: 1, BYSTANDER: 3})
    outage = cell(Moment.CLAIM_SENT, Behaviour.REFUSED, Kind.REFUSE)

    assert bystander_findings(GREEN_CELL, seen) != []
    assert bystander_findings(outage, seen) == []


def test_page_shows_what_is_red_as_red() -> None:
    green, broken = Result(GREEN_CELL, GREEN, []), Result(GREEN_CELL, None, ["broke"])
    double = replace(GREEN, executed=[FIRST, FIRST, SECOND, BYSTANDER])
    red = Result(GREEN_CELL, double, findings(GREEN_CELL, double))

    assert Figures.of([green]).red == Figures.of([green]).doubles == 0
    assert Figures.of([red]).red == Figures.of([red]).doubles == 1
    assert "| **2!** |" not in markdown([green], {})
    assert "| **2!** |" in markdown([red], {})
    assert "DOUBLE" in markdown([red], {})
    assert "| **?** |" in markdown([broken], {})


def packet(statement: str) -> bytes:
    text = b"\x03" + statement.encode()
    return len(text).to_bytes(3, "little") + b"\x00" + text


CLAIM = (
    "INSERT INTO topup (idempotency_key, token, lease_until) SELECT 'app:first', 't', "
    "UTC_TIMESTAMP(6) FROM (SELECT 1 AS one) AS one WHERE NOT EXISTS (SELECT 1)"
)
SETTLE = (
    "UPDATE topup SET status='succeeded', reference='r' WHERE topup.idempotency_key = "
    "'app:first' AND topup.status = 'in_flight' AND topup.token = 't'"
)
EXPIRE = SETTLE + " AND topup.lease_until < UTC_TIMESTAMP(6)"


@pytest.mark.parametrize(
    ("statements", "moment"),
    [
        ([CLAIM], Moment.CLAIM_SENT),
        ([CLAIM.replace("first", "second")], Moment.BETWEEN_HELD),
        ([SETTLE], Moment.SETTLEMENT_SENT),
        (["BEGIN", SETTLE, "COMMIT"], Moment.SETTLEMENT_UNCOMMITTED),
        (["BEGIN", SETTLE, "COMMIT"], Moment.SETTLEMENT_SENT),
        (["BEGIN", SETTLE.replace("in_flight", "in_doubt"), "COMMIT"], "verdict_sent"),
    ],
)
def test_wire_springs_at_the_last_statement_and_not_before(
    statements: list[str], moment: str
) -> None:
    trigger = Trigger(Moment(moment))
    wire = DatabaseWire(trigger)

    for statement in statements:
        assert not trigger.is_sprung
        # A statement may come in two pieces.
        sent = packet(statement)
        wire.asked(sent[:7])
        wire.asked(sent[7:])
        wire.answered(b"ok")

    assert trigger.is_sprung


@pytest.mark.parametrize("statement", [EXPIRE, SETTLE.replace("first", "other")])
def test_wire_lets_pass_what_is_not_the_first_orders_settlement(statement: str) -> None:
    trigger = Trigger(Moment.SETTLEMENT_UNSENT)

    DatabaseWire(trigger).asked(packet(statement))

    assert not trigger.is_sprung


def test_trigger_that_springs_before_it_is_aimed_kills_all_the_same() -> None:
    kills: list[str] = []
    trigger = Trigger(Moment.CLAIM_SENT)

    trigger.kill()
    trigger.aim(lambda: kills.append("killed"))

    assert kills == ["killed"]
