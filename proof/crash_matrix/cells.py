"""The cells of the matrix: what dies where, under which behaviour of which API.

Owns the names of the boundaries and behaviours, which of them can meet, and how each
cell must end: pure functions, derived from the README's table and docs/ARCHITECTURE.md.
It must never import `function`: it is what the function is held against.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final, Literal

from demo.recharge_api import Kind

Victim = Literal["function", "resolver"]


class Moment(StrEnum):
    """What is seen on a wire of the victim, which dies there: the first order's."""

    #: The whole request has reached the pod; it has sent nothing to anybody.
    REQUEST_READ = "request_read"
    #: The claim has left the pod, and never reaches the server.
    CLAIM_UNSENT = "claim_unsent"
    #: The server has committed the claim; its answer never reaches the pod.
    CLAIM_SENT = "claim_sent"
    #: That answer has reached the pod.
    CLAIM_COMMITTED = "claim_committed"
    #: The API is connected to; no byte of the call reaches it.
    CALL_UNSENT = "call_unsent"
    #: The whole call is on its way; the API reads it when its caller is dead.
    CALL_SENT = "call_sent"
    #: The API has executed; nothing of its answer reaches the pod.
    API_EXECUTED = "api_executed"
    #: The API's whole answer has reached the pod.
    ANSWER_ARRIVED = "answer_arrived"
    #: What became of the call is about to be written; it never reaches the server.
    SETTLEMENT_UNSENT = "settlement_unsent"
    #: It is executed in a transaction that is never committed.
    SETTLEMENT_UNCOMMITTED = "settlement_uncommitted"
    #: It is committed; the server's answer never reaches the pod.
    SETTLEMENT_SENT = "settlement_sent"
    #: That answer has reached the pod.
    SETTLEMENT_COMMITTED = "settlement_committed"
    #: The response has left the pod, and never reaches the source.
    RESPONSE_LOST = "response_lost"
    #: The source has the response; only the process dies.
    RESPONSE_WRITTEN = "response_written"

    #: The question what became of a call never reaches the API.
    LOOK_UP_UNSENT = "look_up_unsent"
    #: The API has answered it; the answer never reaches the resolver.
    LOOK_UP_SENT = "look_up_sent"
    #: That answer has reached the resolver.
    LOOK_UP_ANSWERED = "look_up_answered"
    #: What was found is committed; the server's answer never reaches the resolver.
    VERDICT_SENT = "verdict_sent"
    #: The first held order is settled; the second one's claim never reaches the server.
    BETWEEN_HELD = "between_held"


@dataclass(frozen=True, slots=True)
class Boundary:
    """Who dies, and at which moment."""

    victim: Victim
    moment: Moment

    def __str__(self) -> str:
        """Its name on the command line and in the report."""
        is_own = self.victim == "function"
        return self.moment.value if is_own else f"resolver_{self.moment}"


_OF_FUNCTION: Final = tuple(Moment)[: tuple(Moment).index(Moment.LOOK_UP_UNSENT)]
#: Moments at which a doubt is looked up; to get there the function dies first.
OF_LOOK_UP: Final = (
    Moment.LOOK_UP_UNSENT,
    Moment.LOOK_UP_SENT,
    Moment.LOOK_UP_ANSWERED,
    Moment.VERDICT_SENT,
)
_OF_RESOLVER: Final = (
    Moment.CLAIM_SENT,
    Moment.CLAIM_COMMITTED,
    Moment.CALL_SENT,
    Moment.API_EXECUTED,
    Moment.ANSWER_ARRIVED,
    Moment.SETTLEMENT_UNSENT,
    Moment.SETTLEMENT_SENT,
    Moment.BETWEEN_HELD,
    *OF_LOOK_UP,
)
#: Every boundary, in the order in which one order passes them.
BOUNDARIES: Final = (
    *(Boundary("function", moment) for moment in _OF_FUNCTION),
    *(Boundary("resolver", moment) for moment in _OF_RESOLVER),
)


class Behaviour(StrEnum):
    """What the recharge API does with the order's first call."""

    ANSWERS = "answers"
    REJECTS = "rejects"
    #: 500 without executing.
    ERROR_BEFORE = "500_before"
    #: 500 after executing.
    ERROR_AFTER = "500_after"
    #: Executes, and closes the connection without a word.
    ANSWER_LOST = "answer_lost"
    #: Says nothing for longer than anybody waits, and executes nothing.
    HANGS = "hangs"
    #: Nobody listens.
    REFUSED = "refused"
    #: Executes, and closes the connection in the middle of the answer.
    HALF_BODY = "half_body"
    #: 429 without executing.
    TOO_MANY = "429"


_BEHAVIOURS_SHORT: Final = 2
#: The behaviours that execute the call.
EXECUTING: Final = frozenset(
    {
        Behaviour.ANSWERS,
        Behaviour.ERROR_AFTER,
        Behaviour.ANSWER_LOST,
        Behaviour.HALF_BODY,
    }
)
#: Those that send a whole answer while somebody waits for it.
_ANSWERING: Final = frozenset(
    {
        Behaviour.ANSWERS,
        Behaviour.REJECTS,
        Behaviour.ERROR_BEFORE,
        Behaviour.ERROR_AFTER,
        Behaviour.TOO_MANY,
    }
)
#: Those after which an attempt's outcome is known to the one who called.
_TELLING: Final = frozenset(
    {
        Behaviour.ANSWERS,
        Behaviour.REJECTS,
        # Provably not executed.
        Behaviour.REFUSED,
        Behaviour.TOO_MANY,
    }
)
#: Claimed, and the API never hears of the call.
_BEFORE_CALL: Final = (Moment.CLAIM_SENT, Moment.CLAIM_COMMITTED, Moment.CALL_UNSENT)
#: The API has heard of the call, and the ledger never hears what became of it.
_BEFORE_SETTLEMENT: Final = (
    Moment.CALL_SENT,
    Moment.API_EXECUTED,
    Moment.ANSWER_ARRIVED,
    Moment.SETTLEMENT_UNSENT,
    Moment.SETTLEMENT_UNCOMMITTED,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the matrix."""

    boundary: Boundary
    behaviour: Behaviour
    kind: Kind

    def __str__(self) -> str:
        """Its name in messages, and that of its folder."""
        return f"{self.boundary}-{self.behaviour}-{self.kind}"


@dataclass(frozen=True, slots=True)
class Expectation:
    """How a cell must end, whatever path it takes."""

    #: Why the boundary can't be reached; empty: it is, and the victim dies there.
    unreachable: str
    #: What the ledger says of the order in the end.
    status: Literal["succeeded", "rejected", "parked"]
    #: How often the API executed it, by the API's book.
    executions: int

    @property
    def next_status(self) -> Literal["succeeded", "held"]:
        """What the ledger says of the subscriber's next order in the end."""
        return "held" if self.status == "parked" else "succeeded"

    @property
    def next_executions(self) -> int:
        """How often the API executed that one."""
        return 0 if self.status == "parked" else 1


def expected(cell: Cell) -> Expectation:
    """How a cell must end, by what is promised alone.

    An API of kind `none` can't be asked, so every claim whose outcome nobody was told
    is parked for a person, executed or not. Of every other kind all doubt ends.
    """
    unreachable = why_unreachable(cell)
    if cell.behaviour is Behaviour.REJECTS and not _is_for_a_person(cell, unreachable):
        return Expectation(unreachable, "rejected", 0)
    if not _is_for_a_person(cell, unreachable):
        return Expectation(unreachable, "succeeded", 1)
    return Expectation(unreachable, "parked", _executions_by_first_call(cell))


def why_unreachable(cell: Cell) -> str:
    """Why nobody can die there under this behaviour; empty: somebody can."""
    behaviour, kind = cell.behaviour, cell.kind
    match cell.boundary.moment:
        case Moment.CALL_UNSENT | Moment.CALL_SENT if behaviour is Behaviour.REFUSED:
            return "there is no connection on which to call"
        case Moment.API_EXECUTED if behaviour not in EXECUTING:
            return "the API does not execute the call"
        case Moment.ANSWER_ARRIVED if behaviour not in _ANSWERING:
            return "no whole answer arrives"
        case Moment.SETTLEMENT_UNCOMMITTED if behaviour is Behaviour.ANSWERS:
            return "a plain success is settled by one statement that commits itself"
        case Moment.BETWEEN_HELD if kind is Kind.NONE and behaviour not in _TELLING:
            return "the first held order is parked, so the second is not claimed"
        case moment if moment in OF_LOOK_UP and kind is Kind.REPLAY:
            return "the call is repeated with its key, not looked up"
        case moment if moment in OF_LOOK_UP and kind is Kind.NONE:
            return "this API can't be asked"
        case Moment.VERDICT_SENT if not (
            behaviour in EXECUTING or behaviour is Behaviour.REJECTS
        ):
            return "the look-up finds nothing, so the order is sent again"
    return ""


def _is_for_a_person(cell: Cell, unreachable: str) -> bool:
    """Whether nobody was told what became of the call, and nobody can be asked."""
    if cell.kind is not Kind.NONE:
        return False
    moment = cell.boundary.moment
    if moment in OF_LOOK_UP:
        # The function died before it could settle, and that is how it stays.
        return True
    if not unreachable and moment in (*_BEFORE_CALL, *_BEFORE_SETTLEMENT):
        return True
    return cell.behaviour not in _TELLING


def _executions_by_first_call(cell: Cell) -> int:
    """How often the one call of an order that is parked was executed."""
    was_called = cell.boundary.moment not in _BEFORE_CALL or why_unreachable(cell)
    return int(bool(was_called) and cell.behaviour in EXECUTING)


def all_cells() -> list[Cell]:
    """Every cell."""
    return [Cell(*each) for each in product(BOUNDARIES, Behaviour, Kind)]


def short_cells() -> list[Cell]:
    """The short form: every boundary with every kind, two behaviours each, in turn.

    Behaviours under which the boundary can be reached go before others, so that it is
    really died at.
    """
    return [
        cell
        for row, boundary in enumerate(BOUNDARIES)
        for column, kind in enumerate(Kind)
        for cell in _in_turn(boundary, kind, row + 2 * column)[:_BEHAVIOURS_SHORT]
    ]


def _in_turn(boundary: Boundary, kind: Kind, turn: int) -> list[Cell]:
    """The cells of a boundary and a kind; each turn begins with others."""
    behaviours = list(Behaviour)
    start = turn * _BEHAVIOURS_SHORT % len(behaviours)
    turned = behaviours[start:] + behaviours[:start]
    cells = [Cell(boundary, behaviour, kind) for behaviour in turned]
    return sorted(cells, key=lambda cell: bool(why_unreachable(cell)))


def chosen(
    cells: Iterable[Cell],
    *,
    boundaries: Iterable[str] = (),
    behaviours: Iterable[str] = (),
    kinds: Iterable[str] = (),
) -> list[Cell]:
    """The cells that have one of the names of each sort; no name: all of that sort."""
    wanted = [frozenset(names) for names in (boundaries, behaviours, kinds)]
    return [
        cell
        for cell in cells
        if all(
            not names or str(part) in names
            for part, names in zip(
                (cell.boundary, cell.behaviour, cell.kind), wanted, strict=True
            )
        )
    ]
