"""What a cell showed, against what it promised: the judge is the API's own book.

Owns the comparison, purely; it must never import `function`, nor take the ledger's word
for an execution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from demo.delivery import is_retried
from proof.crash_matrix.cells import Behaviour, Cell, Moment, expected
from proof.crash_matrix.wires import FIRST, SECOND

#: Another subscriber's order, of another partition.
BYSTANDER: Final = "bystander"
#: README, What is guaranteed: what a delivery of an order in this status is answered.
_HTTP_OF_STATUS: Final = {
    "succeeded": 200,
    "accepted": 200,
    "rejected": 422,
    "parked": 424,
    "held": 424,
}


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one cell; orders by name."""

    #: Whether the boundary was met, and the victim killed there.
    was_killed: bool
    #: What the delivery that was under way was answered; None: its connection ended
    #: without a response. Of a resolver: None once its process has gone.
    answer_at_death: int | None
    #: The executions in the API's book, in its order, everything having ended.
    executed: Sequence[str]
    #: Calls to recharge the first order that the API has read, and look-ups.
    calls: int
    look_ups: int
    #: The ledger's last word.
    statuses: Mapping[str, str]
    #: The answer to one delivery more of each, in the end.
    answers: Mapping[str, int]
    #: How often each was delivered until its record was done with.
    deliveries: Mapping[str, int]
    #: How long it took.
    seconds: float

    @property
    def redeliveries(self) -> int:
        """Deliveries of the first order beyond the first."""
        return max(0, self.deliveries.get(FIRST, 0) - 1)


def findings(cell: Cell, seen: Observation) -> list[str]:
    """Everything that is not as it must be, in words; empty: the cell is green."""
    return [
        *_of_the_kill(cell, seen),
        *_of_the_book(cell, seen),
        *_of_the_ledger(cell, seen),
        *_of_the_answers(seen),
    ]


def _of_the_kill(cell: Cell, seen: Observation) -> Iterator[str]:
    why = expected(cell).unreachable
    if seen.was_killed and why:
        yield f"was killed at a boundary that can't be reached: {why}"
    if not seen.was_killed and not why:
        yield "never came to the boundary"
    has_response = cell.boundary.moment is Moment.RESPONSE_WRITTEN
    if seen.was_killed and (seen.answer_at_death is not None) is not has_response:
        yield f"the request that should have died was answered {seen.answer_at_death}"


def _of_the_book(cell: Cell, seen: Observation) -> Iterator[str]:
    promised = expected(cell)
    wanted = {
        FIRST: promised.executions,
        SECOND: promised.next_executions,
        BYSTANDER: 1,
    }
    for name, times in wanted.items():
        found = seen.executed.count(name)
        if found > 1:
            yield f"DOUBLE: {name} was executed {found} times"
        elif found != times:
            yield f"{name} was executed {found} times instead of {times}"
    line = [name for name in seen.executed if name != BYSTANDER]
    if line != sorted(line, key=[FIRST, SECOND].index):
        yield f"wrong order: {', '.join(line)}"


def _of_the_ledger(cell: Cell, seen: Observation) -> Iterator[str]:
    promised = expected(cell)
    wanted = {
        FIRST: promised.status,
        SECOND: promised.next_status,
        BYSTANDER: "succeeded",
    }
    for name, status in wanted.items():
        if (found := seen.statuses.get(name, "missing")) != status:
            yield f"the ledger says that {name} is {found} instead of {status}"
    for name, found in seen.statuses.items():
        times = seen.executed.count(name)
        if (found == "succeeded" and times != 1) or (found == "rejected" and times):
            yield f"the ledger says that {name} is {found}; the book: {times} times"


def _of_the_answers(seen: Observation) -> Iterator[str]:
    for name, status in seen.statuses.items():
        wanted, found = _HTTP_OF_STATUS.get(status), seen.answers.get(name)
        if found != wanted:
            yield f"{name} is {status}, and its delivery was answered {found}"


def bystander_findings(cell: Cell, seen: Observation) -> list[str]:
    """Whether somebody else had to wait, where the API was there all along."""
    if cell.behaviour is Behaviour.REFUSED or seen.deliveries.get(BYSTANDER) == 1:
        return []
    return [f"the bystander was delivered {seen.deliveries.get(BYSTANDER)} times"]


def is_done(answer: int | None) -> bool:
    """Whether a faithful source is done with the record after this answer."""
    return answer is not None and not is_retried(answer)
