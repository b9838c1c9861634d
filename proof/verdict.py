"""The verdict of a soak: the judge's, and whether everything came to its end.

Owns what counts as a find, purely; must never read a file, a clock or a server.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from demo.book import BookEntry
from demo.judge import Verdict

GREEN: Final = 0
FOUND: Final = 1


@dataclass(frozen=True, slots=True)
class Found:
    """What a soak has found."""

    #: By the recharge API's book.
    verdict: Verdict
    #: Orders in the ledger that never ended, by status, though the faults did.
    unfinished: dict[str, int] = field(default_factory=dict)
    #: Records that were not consumed, though the faults had ended; None: unknown.
    lag: int | None = 0
    #: Whether primary and replica hold the same rows.
    are_replicas_equal: bool = True

    @property
    def problems(self) -> list[str]:
        """Everything that should not be, in words; empty: green."""
        verdict = self.verdict
        numbers = {
            "executions too many": verdict.double,
            "orders or records that are nowhere": verdict.missing,
            "orders executed out of order": verdict.out_of_order,
            "orders misjudged": verdict.misjudged,
            "orders without an end": sum(self.unfinished.values()),
        }
        found = [f"{number} {what}" for what, number in numbers.items() if number]
        if self.lag != 0:
            left = "an unknown number of" if self.lag is None else self.lag
            found.append(f"{left} records not consumed")
        if not self.are_replicas_equal:
            found.append("primary and replica differ")
        if not verdict.executed:
            found.append("nothing was executed, so nothing was shown")
        return found

    @property
    def is_green(self) -> bool:
        """Nothing was found."""
        return not self.problems

    @property
    def exit_status(self) -> int:
        """What the command ends with."""
        return GREEN if self.is_green else FOUND


def calls_spoiled(book: Iterable[BookEntry]) -> dict[str, int]:
    """How many calls the API has spoiled, by fault."""
    faults = Counter(
        entry.fault for entry in book if entry.entry == "called" and entry.fault
    )
    return dict(sorted(faults.items()))
