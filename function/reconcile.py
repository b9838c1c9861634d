"""Reconcile: the API operator's statement against the ledger, both ways.

Owns the statement's format and what each kind of difference is called; must never
change a row of the ledger: it says what is to be decided, and a person decides.

The statement is spooled to a file of its own, so that a day of any size fits, and the
ledger is walked once along `by_status`.

    matched                  executed there, succeeded or accepted here, same amount
    unknown_to_us            executed there, not in the ledger
    missing_there            succeeded here, within the period, not in the statement
    amount_differs           amount or currency
    executed_but_open        executed there; in doubt, parked or waiting here
    executed_but_ended       executed there; rejected or abandoned here
    executed_several_times   more than one line there has the key
"""

import csv
import shlex
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum, unique
from pathlib import Path
from typing import Any, Final, NamedTuple

from iso4217 import Currency
from sqlalchemy import Engine, String, and_, literal, or_, select

from function.database import connected
from function.errors import TopupError
from function.model import Status
from function.schema import topup

#: Ours -> the statement's header, unless `--columns` says otherwise. The first three
#: must be there; a missing status counts as executed, a missing time needs a period.
COLUMNS: Final[Mapping[str, str]] = {
    "key": "key",
    "amount": "amount",
    "currency": "currency",
    "executed_at": "executed_at",
    "reference": "reference",
    "status": "status",
}
_REQUIRED: Final = ("key", "amount", "currency")
#: What a status column may say of an executed line, in lower case.
EXECUTED: Final = ("succeeded", "success", "executed", "completed", "done", "ok")
#: How far the API's clock and the ledger's may stand apart.
_CLOCKS_APART: Final = timedelta(seconds=60)
#: A row that was last changed so long before the period was not executed in it.
_SLACK: Final = timedelta(days=1)
_BATCH: Final = 500
_AMOUNT_MAX: Final = 2**63 - 1
_ENDED: Final = frozenset({Status.REJECTED, Status.ABANDONED})
_EXECUTED_HERE: Final = frozenset({Status.SUCCEEDED, Status.ACCEPTED})


class StatementUnreadable(TopupError):
    """The statement can't be read as described; names the line and what to do."""


@unique
class Kind(StrEnum):
    """What a difference is; the module's docstring says it in words."""

    UNKNOWN_TO_US = "unknown_to_us"
    MISSING_THERE = "missing_there"
    AMOUNT_DIFFERS = "amount_differs"
    EXECUTED_BUT_OPEN = "executed_but_open"
    EXECUTED_BUT_ENDED = "executed_but_ended"
    EXECUTED_SEVERAL_TIMES = "executed_several_times"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a statement reads."""

    columns: Mapping[str, str] = field(default_factory=lambda: dict(COLUMNS))
    #: `5.00` instead of `500`; the currency's own decimals count.
    is_major: bool = False
    delimiter: str = ","
    decimal: str = "."
    #: What the status column says of an executed line.
    executed: tuple[str, ...] = EXECUTED
    #: The period, if the file's own times don't tell it: from, until before.
    begin: datetime | None = None
    end: datetime | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One key about which the statement and the ledger disagree."""

    kind: Kind
    key: str
    #: What there says, and what here says.
    there: str
    here: str
    #: The command that a person may run, or empty.
    todo: str = ""


@dataclass(slots=True)
class Summary:
    """The counts of a whole run."""

    begin: datetime | None = None
    end: datetime | None = None
    matched: int = 0
    #: Lines of the statement that were not executed.
    not_executed: int = 0
    #: Succeeded here at the edge of the period: another day's statement may have it.
    not_judged: int = 0
    differences: dict[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Nothing differs."""
        return not self.differences


def reconcile(
    engine: Engine, statement: Path, format_: Format, summary: Summary
) -> Iterator[Difference]:
    """Compare, and yield each difference as it is found.

    A key in the statement is the one that the API was given (`rendered_key`).

    Args:
        engine: the ledger's; SELECT on `topup` is enough.
        statement: a CSV file with a header, UTF-8.
        format_: how it reads.
        summary: gets the counts; whole when the iterator has ended.

    Raises:
        StatementUnreadable: at the first line that can't be read, before anything
            is compared.
        LedgerUnavailable: it was compared in part.

    """
    with (
        tempfile.TemporaryDirectory(prefix="topup-reconcile-") as folder,
        closing(sqlite3.connect(Path(folder) / "statement.db")) as spool,
    ):
        period = _spool(spool, statement, format_, summary)
        for rows in _walk(engine, period):
            yield from _counted(_compare(spool, rows, period, summary), summary)
        # What the walk has not met: perhaps a row outside of it, by its own key.
        for keys in _unseen(spool):
            rows = _by_key(engine, keys)
            yield from _counted(_compare(spool, rows, period, summary), summary)
        for line in spool.execute("SELECT * FROM line WHERE is_seen = 0 ORDER BY key"):
            there = _Line(*line)
            difference = Difference(
                Kind.UNKNOWN_TO_US, there.key, there.words(), "not in the ledger"
            )
            yield from _counted([difference], summary)


class _Period(NamedTuple):
    """From, until before; aware."""

    begin: datetime
    end: datetime


@dataclass(slots=True)
class _Line:
    """A key of the statement, as it is spooled."""

    key: str
    amount_minor: int
    currency: str
    reference: str
    count: int
    is_seen: int

    def words(self) -> str:
        return f"{self.amount_minor} {self.currency}" + (
            f", reference {self.reference}" if self.reference else ""
        )


def _spool(
    spool: sqlite3.Connection, statement: Path, format_: Format, summary: Summary
) -> _Period:
    """Read the whole statement, or refuse it whole."""
    spool.execute(
        "CREATE TABLE line (key TEXT PRIMARY KEY, amount INTEGER, currency TEXT,"
        " reference TEXT, count INTEGER, is_seen INTEGER) WITHOUT ROWID"
    )
    insert = (
        "INSERT INTO line VALUES (?, ?, ?, ?, 1, 0)"
        " ON CONFLICT (key) DO UPDATE SET count = count + 1"
    )
    try:
        with statement.open(encoding="utf-8-sig", newline="") as file:
            lines = _lines(csv.reader(file, delimiter=format_.delimiter), format_)
            spool.executemany(insert, _executed(lines, format_, summary))
    except OSError as error:
        raise StatementUnreadable(f"{statement}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StatementUnreadable(f"{statement}: is not UTF-8") from None
    except csv.Error as error:
        raise StatementUnreadable(f"{statement}: is no CSV ({error})") from None
    spool.commit()
    if summary.begin is None or summary.end is None:
        raise StatementUnreadable(
            f"{statement}: no line tells a time: name the period with --from and --to"
        )
    if summary.begin >= summary.end:
        raise StatementUnreadable("--from must be before --to")
    return _Period(summary.begin, summary.end)


def _lines(rows: Iterator[list[str]], format_: Format) -> Iterator[tuple[int, Any]]:
    """Each line's number and its cells by our names."""
    header = next(rows, None)
    if not header:
        raise StatementUnreadable("the statement is empty: it needs a header")
    header = [name.strip() for name in header]
    unknown = set(format_.columns) - set(COLUMNS)
    if unknown:
        raise StatementUnreadable(
            f"--columns: {', '.join(sorted(unknown))}: only {', '.join(COLUMNS)}"
        )
    columns = {**COLUMNS, **format_.columns}
    # A column that somebody has named must be there; of the others only some.
    wanted = {*_REQUIRED, *format_.columns} if format_.columns != COLUMNS else _REQUIRED
    missing = [columns[name] for name in wanted if columns[name] not in header]
    if missing:
        raise StatementUnreadable(
            f"the statement has no column {', '.join(sorted(missing))}: it has "
            f"{', '.join(header)}; map them with --columns key=...,amount=..."
        )
    places = {
        name: header.index(column)
        for name, column in columns.items()
        if column in header
    }
    for number, cells in enumerate(rows, 2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise StatementUnreadable(
                f"line {number} has {len(cells)} cells, the header {len(header)}"
            )
        yield number, {name: cells[place].strip() for name, place in places.items()}


def _executed(
    lines: Iterable[tuple[int, dict[str, str]]], format_: Format, summary: Summary
) -> Iterator[tuple[str, int, str, str]]:
    """The executed lines as they are spooled; finds the period by the way."""
    summary.begin, summary.end = format_.begin, format_.end
    first: datetime | None = None
    last: datetime | None = None
    for number, cells in lines:
        if "status" in cells and cells["status"].lower() not in format_.executed:
            summary.not_executed += 1
            continue
        if cells.get("executed_at"):
            moment = _moment(number, cells["executed_at"])
            first = min(first or moment, moment)
            last = max(last or moment, moment)
        if not cells["key"]:
            raise StatementUnreadable(f"line {number} has no key")
        currency = cells["currency"].upper()
        amount_minor = _amount_minor(number, cells["amount"], currency, format_)
        yield cells["key"], amount_minor, currency, cells.get("reference", "")
    summary.begin = summary.begin or first
    # Until before: the last line itself belongs to the period.
    summary.end = summary.end or (last + timedelta(microseconds=1) if last else None)


def _moment(number: int, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise StatementUnreadable(f"line {number}: the time is not ISO 8601") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _amount_minor(number: int, text: str, currency: str, format_: Format) -> int:
    plain = text.replace(format_.decimal, ".") if format_.decimal != "." else text
    try:
        amount = Decimal(plain)
        if format_.is_major:
            amount = amount.scaleb(Currency(currency).exponent or 0)
    except (InvalidOperation, ValueError):
        raise StatementUnreadable(
            f"line {number}: no amount, or no ISO 4217 currency"
        ) from None
    if not amount.is_finite() or amount != amount.to_integral_value():
        raise StatementUnreadable(
            f"line {number}: the amount is no whole number of minor units"
            + ("" if format_.is_major else " (--amounts major reads 5.00)")
        )
    if not 0 <= amount <= _AMOUNT_MAX:
        raise StatementUnreadable(f"line {number}: the amount is out of bounds")
    return int(amount)


_COLUMNS: Final = tuple(
    topup.c[name]
    for name in (
        "idempotency_key",
        "rendered_key",
        "status",
        "amount_minor",
        "currency",
        "reference",
        "first_sent_at",
        "updated_at",
    )
)


def _walk(engine: Engine, period: _Period) -> Iterator[list[Any]]:
    """Every row that can have been executed in the period, in batches."""
    start = (period.begin - _SLACK).astimezone(UTC).replace(tzinfo=None)
    timespec = "milliseconds" if engine.dialect.name == "sqlite" else "microseconds"
    query = select(*_COLUMNS).order_by(topup.c.updated_at, topup.c.idempotency_key)
    for dialect in ("mysql", "mariadb"):
        query = query.with_hint(topup, "FORCE INDEX (by_status)", dialect)
    for status in Status:
        moment, key = start, ""
        while True:
            at = literal(moment.isoformat(" ", timespec), String)
            behind = and_(
                topup.c.updated_at >= at,
                or_(topup.c.updated_at > at, topup.c.idempotency_key > key),
            )
            page = query.where(topup.c.status == status, behind).limit(_BATCH)
            with connected(engine) as connection:
                rows = list(connection.execute(page))
            if rows:
                yield rows
                moment, key = rows[-1].updated_at, rows[-1].idempotency_key
            if len(rows) < _BATCH:
                break


def _by_key(engine: Engine, keys: list[str]) -> list[Any]:
    """Rows whose key the API was given as it is."""
    query = select(*_COLUMNS).where(topup.c.idempotency_key.in_(keys))
    with connected(engine) as connection:
        return [
            row
            for row in connection.execute(query)
            if row.rendered_key == row.idempotency_key
        ]


def _unseen(spool: sqlite3.Connection) -> Iterator[list[str]]:
    after = ""
    while True:
        keys = [
            key
            for (key,) in spool.execute(
                "SELECT key FROM line WHERE is_seen = 0 AND key > ?"
                " ORDER BY key LIMIT ?",
                (after, _BATCH),
            )
        ]
        if not keys:
            return
        after = keys[-1]
        # The ledger's keys are ASCII: what is not can't be one.
        yield [key for key in keys if key.isascii()]


def _compare(
    spool: sqlite3.Connection, rows: list[Any], period: _Period, summary: Summary
) -> Iterator[Difference]:
    """Each row against the statement; what it finds there is marked as seen."""
    if not rows:
        return
    keys = [row.rendered_key for row in rows]
    marks = ", ".join("?" * len(keys))
    found = {
        line[0]: _Line(*line)
        for line in spool.execute(f"SELECT * FROM line WHERE key IN ({marks})", keys)  # noqa: S608
    }
    spool.execute(f"UPDATE line SET is_seen = 1 WHERE key IN ({marks})", keys)  # noqa: S608
    for row in rows:
        there = found.get(row.rendered_key)
        if there is None:
            yield from _missing_there(row, period, summary)
        elif there.is_seen:
            # Its status changed while we walked, so we met it twice.
            continue
        else:
            difference = _difference(row, there)
            if difference is None:
                summary.matched += 1
            else:
                yield difference


def _difference(row: Any, there: _Line) -> Difference | None:
    """What the two say about one key (pure)."""
    key, status = row.idempotency_key, Status(row.status)
    here = f"{status}, {row.amount_minor} {row.currency}"
    if there.count > 1:
        words = f"{there.count} lines, {there.words()}"
        return Difference(Kind.EXECUTED_SEVERAL_TIMES, key, words, here)
    if status in _ENDED:
        return Difference(Kind.EXECUTED_BUT_ENDED, key, there.words(), here)
    if (there.amount_minor, there.currency) != (row.amount_minor, row.currency):
        return Difference(Kind.AMOUNT_DIFFERS, key, there.words(), here)
    if status in _EXECUTED_HERE:
        return None
    reference = there.reference or "REFERENCE"
    todo = (
        f"topup resolve {shlex.quote(key)} --executed "
        f"--reference {shlex.quote(reference)} --reason 'stands in the statement'"
    )
    return Difference(Kind.EXECUTED_BUT_OPEN, key, there.words(), here, todo)


def _missing_there(row: Any, period: _Period, summary: Summary) -> Iterator[Difference]:
    """A success that the statement doesn't have, if it must have stood in it.

    It was executed after the first claim and before the last change of status: only
    when all of that lies in the period is its absence a difference.
    """
    if Status(row.status) is not Status.SUCCEEDED:
        return
    begin, end = row.first_sent_at, row.updated_at
    begin = begin.replace(tzinfo=UTC) if begin else None
    end = end.replace(tzinfo=UTC)
    if end < period.begin - _CLOCKS_APART or (
        begin is not None and begin >= period.end + _CLOCKS_APART
    ):
        return
    is_inside = (
        begin is not None
        and begin >= period.begin + _CLOCKS_APART
        and end < period.end - _CLOCKS_APART
    )
    if not is_inside:
        summary.not_judged += 1
        return
    here = f"{row.status}, {row.amount_minor} {row.currency}"
    if row.reference:
        here += f", reference {row.reference}"
    yield Difference(
        Kind.MISSING_THERE, row.idempotency_key, "not in the statement", here
    )


def _counted(
    differences: Iterable[Difference], summary: Summary
) -> Iterator[Difference]:
    for difference in differences:
        name = difference.kind.value
        summary.differences[name] = summary.differences.get(name, 0) + 1
        yield difference
