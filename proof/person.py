"""The person who settles what only the API's owner can tell, from the API's own book.

Owns no rule: it decides by the very code of `topup resolve`, which refuses a decision
while something of the order could still land. Must never decide about an order whose
fate the book could not show yet.
"""

from typing import Final

from sqlalchemy import Engine

from demo.book import Book
from function.errors import LedgerUnavailable, OperationRefused
from function.model import Status
from function.operations import Filters, Operations, OrderRow, Verdict

_BATCH: Final = 200
_DOUBTFUL: Final = (Status.PARKED, Status.IN_DOUBT)


class Person:
    """Asks the API's owner about what is parked, and writes down the answer.

    Args:
        ledger: an engine with the account that signs.
        book: what the API's owner looks into.
        settle_s: the settling time, which is one of the ledger's own rules.

    """

    def __init__(self, ledger: Engine, book: Book, *, settle_s: float) -> None:
        self._operations = Operations(ledger)
        self._book = book
        self._settle_s = settle_s
        #: Orders settled so far.
        self.decisions = 0

    def decide(self) -> None:
        """Settle whatever can be settled by now; what can't waits for the next time."""
        filters = Filters(
            statuses=_DOUBTFUL,
            # So that the book, which is read after, knows all that can still land.
            older_than_s=self._settle_s,
            limit=_BATCH,
        )
        try:
            orders = self._operations.list_orders(filters).orders
            if not orders:
                return
            references = {
                entry.key: entry.reference
                for entry in self._book.stream()
                if entry.entry == "executed"
            }
            for order in orders:
                self._decide(order, references.get(order.idempotency_key))
        except LedgerUnavailable:
            return

    def _decide(self, order: OrderRow, reference: str | None) -> None:
        verdict = Verdict.NOT_EXECUTED if reference is None else Verdict.EXECUTED
        try:
            self._operations.decide(
                order.idempotency_key,
                verdict,
                reason="the recharge API's own book says so",
                reference=reference,
                attempt_token=order.token,
            )
        except OperationRefused:
            # Something of it could still land, or the resolver was faster.
            return
        self.decisions += 1
