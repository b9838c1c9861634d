"""The judge: what was sent, held against what the recharge API's book says was done.

Owns the verdict, purely: it reads no file, no clock and no database itself. It must
never believe the function's own ledger that something was executed, or in which order:
that is the book's alone. The ledger may only show that what was *not* executed is not
forgotten: rejected, in quarantine, in doubt or held, where a person finds it.

    every order sent   = executed + rejected + in doubt, not executed + held
    (`unique`)           + quarantined + missing
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Final, Literal

from demo.book import BookEntry

Expected = Literal["valid", "refused"]

#: Of an event that is too large, quarantine keeps so many bytes.
_KEPT_BYTES: Final = 16 * 1024
_IN_DOUBT: Final = frozenset({"in_doubt", "parked"})
_REJECTED: Final = frozenset({"rejected", "abandoned"})


def place_in_topic(topic: str, partition: int, offset: int) -> str:
    """Name where a record stands."""
    return f"{topic}[{partition}]@{offset}"


def place_of_bytes(raw: bytes, announced_bytes: int) -> str:
    """Name a body that was posted directly, and so stands nowhere, by its content."""
    digest = sha256(raw[:_KEPT_BYTES]).hexdigest()[:12]
    return f"a body of {announced_bytes} bytes ({digest})"


@dataclass(frozen=True, slots=True)
class Sent:
    """One record as it stands in the topic, or one body that was posted directly."""

    #: Where it stands; a directly posted body has no topic, and partition -1.
    topic: str
    partition: int
    offset: int
    #: The order's idempotency key; None if the record is unreadable.
    key: str | None
    #: The subscriber, as the producer keyed the record.
    msisdn: str
    #: How it was written: `binary`, `structured`, `plain`, or `direct`.
    kind: str
    #: What should become of it: an order, or something that nobody may execute.
    expected: Expected = "valid"
    #: Of a directly posted body: what `place_of_bytes` says.
    content: str = ""

    @property
    def place(self) -> str:
        """What names this record, and no other."""
        if self.content:
            return self.content
        return place_in_topic(self.topic, self.partition, self.offset)


@dataclass(frozen=True, slots=True)
class LedgerView:
    """What a person who opens the ledger sees."""

    #: Idempotency key -> status.
    statuses: Mapping[str, str]
    #: The places of what is in quarantine.
    quarantined: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the source did."""

    #: Requests to the function beyond the first for their record.
    redeliveries: int = 0
    #: Records that the dead letter sink has taken.
    dead_lettered: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The numbers, and behind those that are wrong the keys or places."""

    #: Records and bodies sent, duplicates included.
    sent: int
    #: Different orders among them; each refused record counts as one.
    unique: int
    #: Orders with at least one execution in the book, also such as nobody may execute.
    executed: int
    #: Executions too many: beyond the first of their order.
    double: int
    #: Neither executed nor to be seen anywhere.
    missing: int
    #: Orders executed after a later one of their subscriber.
    out_of_order: int
    #: Executed though nobody may, rejected though executed, refused though valid.
    misjudged: int
    #: In quarantine, for good.
    quarantined: int
    #: Refused by the API, says the ledger, and the book has no execution.
    rejected: int
    #: In doubt or parked in the ledger: a person asks the API's owner.
    in_doubt: int
    #: Of these: so many were executed, which the function can't know.
    in_doubt_executed: int
    #: Waiting in the ledger behind one that is in doubt.
    held: int
    #: Calls to recharge that the API has read.
    calls: int
    redeliveries: int
    dead_lettered: int
    #: How long the story took.
    seconds: float
    double_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    out_of_order_keys: tuple[str, ...] = ()
    misjudged_keys: tuple[str, ...] = ()

    @property
    def is_green(self) -> bool:
        """Nothing double, missing, out of order or misjudged."""
        return not (self.double or self.missing or self.out_of_order or self.misjudged)

    def as_json(self) -> dict[str, object]:
        """Every field by name, for report.json."""
        return asdict(self)


def judge(
    sent: Sequence[Sent],
    book: Iterable[BookEntry],
    ledger: LedgerView,
    *,
    names: Mapping[str, str] | None = None,
    delivered: Delivered | None = None,
    seconds: float = 0.0,
) -> Verdict:
    """Hold everything that was sent against the book.

    Args:
        sent: every record of the topic, and every body that was posted directly.
        book: the recharge API's entries, in its order; read once, none is kept.
        ledger: what can be seen of that which was not executed.
        names: the key that the API was given -> the order's idempotency key; what
            is not in it is the idempotency key itself.
        delivered: what the source did.
        seconds: how long it took.

    """
    case = _Case(sent, book, ledger, names or {})
    fates = {key: case.fate(key) for key in case.valid}
    refused = {record.place: case.fate_of_refused(record) for record in case.refused}
    all_fates = [*fates.items(), *refused.items()]
    missing = [name for name, fate in all_fates if fate == "missing"]
    doubles = [key for key, times in case.executions.items() if times > 1]
    in_doubt = [key for key in fates if ledger.statuses.get(key) in _IN_DOUBT]
    disorders = case.out_of_order()
    misjudged = case.misjudged()
    count = [fate for _, fate in all_fates]
    delivered = delivered or Delivered()
    return Verdict(
        sent=len(sent),
        unique=len(fates) + len(refused),
        executed=count.count("executed"),
        double=sum(case.executions[key] - 1 for key in doubles),
        missing=len(missing),
        out_of_order=len(disorders),
        misjudged=len(misjudged),
        quarantined=count.count("quarantined"),
        rejected=count.count("rejected"),
        in_doubt=len(in_doubt),
        in_doubt_executed=sum(fates[key] == "executed" for key in in_doubt),
        held=count.count("held"),
        calls=case.calls,
        redeliveries=delivered.redeliveries,
        dead_lettered=delivered.dead_lettered,
        seconds=round(seconds, 1),
        double_keys=tuple(doubles),
        missing_keys=tuple(missing),
        out_of_order_keys=tuple(disorders),
        misjudged_keys=tuple(misjudged),
    )


class _Case:
    """What was sent and what was executed, by order."""

    def __init__(
        self,
        sent: Sequence[Sent],
        book: Iterable[BookEntry],
        ledger: LedgerView,
        names: Mapping[str, str],
    ) -> None:
        self._ledger = ledger
        #: The first record of each order, in the order of the topic.
        self.valid: dict[str, Sent] = {}
        self._places: dict[str, list[str]] = {}
        self.refused: list[Sent] = []
        for record in sorted(sent, key=lambda each: (each.partition, each.offset)):
            if record.expected == "refused" or record.key is None:
                self.refused.append(record)
                continue
            self.valid.setdefault(record.key, record)
            self._places.setdefault(record.key, []).append(record.place)
        #: How often each order was executed.
        self.executions: dict[str, int] = {}
        #: In the order in which the API took each over; a later turn changes nothing.
        self._taken_over: dict[str, None] = {}
        self.calls = 0
        for entry in book:
            self.calls += entry.entry == "called"
            if entry.entry in {"accepted", "executed"}:
                self._taken_over.setdefault(names.get(entry.key, entry.key))
            if entry.entry == "executed":
                key = names.get(entry.key, entry.key)
                self.executions[key] = self.executions.get(key, 0) + 1

    def fate(self, key: str) -> str:
        """What became of an order that should be executed."""
        status = self._ledger.statuses.get(key)
        if key in self.executions:
            return "executed"
        if status in _REJECTED:
            return "rejected"
        if status in _IN_DOUBT:
            return "in_doubt"
        if status == "held":
            return "held"
        return "quarantined" if self._is_quarantined(key) else "missing"

    def fate_of_refused(self, record: Sent) -> str:
        """What became of something that nobody may execute."""
        if record.place in self._ledger.quarantined:
            return "quarantined"
        name = record.key or record.place
        is_executed = name in self.executions and name not in self.valid
        return "executed" if is_executed else "missing"

    def out_of_order(self) -> list[str]:
        """The orders that were executed after a later one of their subscriber.

        Later means: it first stood at a higher offset of the same partition. Between
        partitions there is no order. What the API accepted has its turn there: when it
        carries out what it has taken over is its own affair.
        """
        last: dict[tuple[str, int], int] = {}
        found = []
        for key in self._taken_over:
            record = self.valid.get(key)
            if record is None or key not in self.executions:
                continue
            line = (record.msisdn, record.partition)
            if record.offset < last.get(line, -1):
                found.append(key)
            last[line] = max(record.offset, last.get(line, -1))
        return found

    def misjudged(self) -> list[str]:
        """Executed though nobody may; or told otherwise than the book says."""
        unwarranted = [key for key in self.executions if key not in self.valid]
        false_no = [
            key
            for key in self.executions
            if self._ledger.statuses.get(key) in _REJECTED
        ]
        refused = [
            key
            for key in self.valid
            if self._is_quarantined(key) and key not in self.executions
        ]
        return [*unwarranted, *false_no, *refused]

    def _is_quarantined(self, key: str) -> bool:
        return any(place in self._ledger.quarantined for place in self._places[key])
