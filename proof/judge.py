"""What must hold in every simulated run, checked at the moment it could break.

Owns the guarantees as code; must never ask the function what it thinks.

The book of the simulated recharge API decides, the ledger only shows what is not
forgotten.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import function
from function.model import Answer, Outcome, Receipt, Status, TopUp
from proof.memory_ledger import MemoryLedger, Row
from proof.scheduler import Violation
from proof.simulated_api import Execution, SimulatedApi

#: By name: what is promised must not follow what the model says. Tuples: an Enum's
#: hash is slow.
TERMINAL: Final = (Status.SUCCEEDED, Status.REJECTED, Status.ABANDONED)
SETTLED: Final = (*TERMINAL, Status.ACCEPTED)
#: After these answers the source may give up, so the order must be recorded.
_RECORDED: Final = (
    Outcome.WAITING,
    Outcome.HELD,
    Outcome.PAUSED,
    Outcome.RELEASED,
    Outcome.REFUSED_US,
    Outcome.CIRCUIT_OPEN,
    Outcome.POSTPONED,
    Outcome.PARKED,
)
#: Knative's dispatcher brings these again (besides errors of the connection).
_BROUGHT_AGAIN: Final = frozenset({404, 408, 409, 429})


def read_status_table() -> dict[Outcome, int]:
    """The HTTP status of each outcome, as main.py writes it.

    main.py is a composition root that nobody may import, so its text is read.
    """
    path = Path(next(iter(function.__path__))) / "main.py"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == "STATUS"
            and isinstance(node.value, ast.Dict)
        ):
            return {
                Outcome[key.attr]: ast.literal_eval(value)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Attribute)
            }
    raise LookupError(f"{path}: no table STATUS")


def is_brought_again(status: int) -> bool:
    """Whether the source delivers again after this status."""
    return status in _BROUGHT_AGAIN or status >= 500  # noqa: PLR2004


class WatchedLedger(MemoryLedger):
    """Tells the judge of each row that is made or moved."""

    judge: "Judge"

    def _insert(self, row: Row) -> None:
        super()._insert(row)
        self.judge.made(row)

    def _move(self, row: Row, status: Status) -> None:
        self.judge.moves(row, status)
        super()._move(row, status)


class Judge:
    """Holds one run to the guarantees; raises Violation at the first breach."""

    def __init__(
        self, records: Iterable[TopUp], api: SimulatedApi, ledger: WatchedLedger
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._first: dict[str, TopUp] = {}
        for record in records:
            self._first.setdefault(record.idempotency_key, record)
        #: Keys on which the source gave up before the ledger knew them.
        self._excused: set[str] = set()
        self._accepted: set[str] = set()
        #: Successes that a process heard of: the process, the key, the reference.
        self._heard: list[tuple[str, str, str | None]] = []
        self._told: set[str] = set()
        self.transitions: set[tuple[str, str]] = set()
        #: Counts every change, so that others see whether there was any.
        self.changes = 0
        api.on_execution = self.executed  # type: ignore[method-assign]
        ledger.judge = self

    # -- Told while it runs --------------------------------------------------------

    def executed(self, execution: Execution) -> None:
        """One execution: never of what was refused, never after a later one."""
        key = execution.key
        row = self._ledger.orders.get(key)
        if row is None:
            raise Violation(f"unrecorded: {key} was executed without a row")
        if row.status in {"rejected", "abandoned"}:
            raise Violation(f"misjudged: {key} was executed after it was {row.status}")
        mine = self._first[key]
        for other in self._api.executed[:-1]:
            theirs = self._first[other]
            if other == key or theirs.msisdn != mine.msisdn or key in self._excused:
                continue
            other_row = self._ledger.orders[other]
            if _is_later(theirs, mine) or other_row.place > row.place:
                raise Violation(f"out of order: {key} was executed after {other}")

    def made(self, row: Row) -> None:
        """A new row."""
        self.changes += 1
        self.transitions.add(("", row.status))

    def moves(self, row: Row, status: Status) -> None:
        """A change of status: never from a terminal one, never against the book."""
        self.changes += 1
        self.transitions.add((row.status.value, status.value))
        key = row.idempotency_key
        if row.status in TERMINAL:
            raise Violation(f"not terminal: {key} went {row.status} -> {status}")
        executions = self._api.executions(key)
        if status == "succeeded" and not executions:
            raise Violation(f"misjudged: {key} succeeded, and the book has nothing")
        if status in {"rejected", "abandoned"} and executions:
            raise Violation(f"misjudged: {key} was {status} although it was executed")
        if status is Status.ACCEPTED:
            self._accepted.add(key)
        if status is Status.ACCEPTED and key not in self._api.book:
            raise Violation(f"misjudged: {key} was accepted, and the book has nothing")

    def answered(self, order: TopUp, receipt: Receipt, http_status: int) -> None:
        """An answer to the source: nothing final without a durable row."""
        key = order.idempotency_key
        row = self._ledger.orders.get(key)
        if 200 <= http_status < 300:  # noqa: PLR2004
            # An accepted one may have come to its end before the answer leaves.
            is_settled = row is not None and (
                row.status is Status.SUCCEEDED or key in self._accepted
            )
            if not is_settled:
                found = row.status if row else "no row"
                raise Violation(f"unsettled: {key} was answered {http_status}: {found}")
            references = {each.reference for each in self._api.executions(key)}
            if references and receipt.reference not in references:
                raise Violation(f"reference: {key} was given {receipt.reference}")
        elif receipt.outcome in _RECORDED and row is None:
            raise Violation(f"lost: {key} was answered {receipt.outcome}, unrecorded")
        elif not is_brought_again(http_status):
            quarantined = self._ledger.quarantined.values()
            if row is None and key not in {
                each.idempotency_key for each in quarantined
            }:
                raise Violation(f"lost: {key} was answered {http_status} unrecorded")

    def heard(self, process: str, order: TopUp, answer: Answer) -> None:
        """The API has told a process of a success."""
        self._heard.append((process, order.idempotency_key, answer.reference))

    def killed(self, process: str) -> None:
        """What it had in memory is gone; what it had written is not."""
        self._heard = [each for each in self._heard if each[0] != process]

    def told(self, key: str) -> None:
        """An alert about an order."""
        self._told.add(key)

    def gave_up(self, order: TopUp) -> None:
        """The source gave up: what the ledger does not know is in the dead letters."""
        if order.idempotency_key not in self._ledger.orders:
            self._excused.add(order.idempotency_key)

    # -- Asked when everything has come to rest ------------------------------------

    def unsettled(self) -> list[Row]:
        """The orders that somebody still must bring on."""
        rows = self._ledger.orders.values()
        return [row for row in rows if row.status not in SETTLED]

    def at_rest(self, *, is_asked: bool, poisoned: frozenset[str]) -> None:
        """Faults are over, nobody has decided anything yet.

        Args:
            is_asked: the API can tell what became of an order, so nothing healthy
                waits for a person.
            poisoned: subscribers for whom the API still fails.

        """
        self._nothing_missing()
        rows = self.unsettled()
        for row in rows:
            line = [each for each in rows if each.msisdn == row.msisdn]
            first = min(line, key=lambda each: each.place_in_line)
            is_kept = first.status is Status.PARKED or (
                # Postponed: the resolver tries it again and again.
                first.status is Status.HELD and row.msisdn in poisoned
            )
            # What stands behind such a one waits for it, in whatever state.
            if not is_kept or row.status is Status.IN_FLIGHT:
                raise Violation(
                    f"stuck: nobody brings on {row.idempotency_key} ({row.status})"
                )
            if is_asked and row.msisdn not in poisoned:
                raise Violation(
                    f"stuck: {row.idempotency_key} is {row.status}, yet the API knows"
                )

    def at_end(self) -> None:
        """Everyone has recovered and a person has decided: all is terminal."""
        self._nothing_missing()
        self._nothing_unheard()
        left = [f"{row.idempotency_key} ({row.status})" for row in self.unsettled()]
        if left:
            raise Violation(f"stuck: at the end {', '.join(left)}")
        for row in self._ledger.orders.values():
            executions = len(self._api.executions(row.idempotency_key))
            if executions != (row.status is Status.SUCCEEDED):
                raise Violation(
                    f"misjudged: {row.idempotency_key} is {row.status}, "
                    f"and the book has {executions}"
                )

    def _nothing_unheard(self) -> None:
        """Every success that a process received is in a row, an attempt or an alert."""
        kept = {
            (str(each["idempotency_key"]), each["reference"])
            for each in self._ledger.attempts
        }
        for _, key, reference in self._heard:
            is_in_row = self._ledger.orders[key].reference == reference
            if not (is_in_row or (key, reference) in kept or key in self._told):
                raise Violation(f"dropped: nobody knows of {reference} for {key}")

    def _nothing_missing(self) -> None:
        for key in self._first:
            if key not in self._ledger.orders and key not in self._excused:
                raise Violation(f"lost: {key} is nowhere")


def _is_later(one: TopUp, other: TopUp) -> bool:
    """Whether one stands behind the other in the same partition."""
    a, b = one.position, other.position
    return (
        a is not None
        and b is not None
        and (a.partition == b.partition and a.offset > b.offset)
    )
