"""The ledger's tables and the few SQL words that differ between databases.

Owns the schema as SQLAlchemy tables (migrations/ builds the same, a test compares
them); must never execute anything.
"""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    DateTime,
    Double,
    FetchedValue,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    UniqueConstraint,
    and_,
    func,
    literal,
    or_,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.expression import FunctionElement

from function.model import UNSETTLED, Status

metadata: Final = MetaData()


def ascii_text(length: int) -> String:
    """Text that compares byte by byte: never equal by case or accent.

    MySQL and MariaDB pad it with blanks when they compare (PAD SPACE): `x` equals `x `.
    That makes no two orders one, because no key can end in a blank: `channel` and
    `rechargeId` are percent-encoded, and a blank is `%20`.
    """
    return String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"),
        "mysql",
        "mariadb",
    )


def unicode_text(length: int) -> String:
    """Text of others, such as the recharge API's words."""
    return String(length).with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"),
        "mysql",
        "mariadb",
    )


#: MySQL's DATETIME has no fractions unless asked.
_MOMENT: Final = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
#: MySQL's BLOB ends at 64 KiB; an event may have 256 KiB.
_BYTES: Final = LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
#: SQLite numbers rows by itself only in a column of type INTEGER.
_ROW_NUMBER: Final = BigInteger().with_variant(Integer(), "sqlite")

_UNSETTLED_SQL: Final = ", ".join(f"'{status}'" for status in sorted(UNSETTLED))

#: One row an idempotency key.
topup: Final = Table(
    "topup",
    metadata,
    #: channel and rechargeId, percent-encoded.
    Column("idempotency_key", ascii_text(200), primary_key=True),
    #: Tells a redelivery from a reused key.
    Column("fingerprint", ascii_text(64), nullable=False),
    Column("status", ascii_text(16), nullable=False),
    #: Personal: whose order it is.
    Column("msisdn", ascii_text(16), nullable=False),
    #: The key's first part: what `pause` can name.
    Column("channel", ascii_text(200), nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", ascii_text(3), nullable=False),
    #: Personal: the event's data, from which a held top-up is run.
    Column("payload", _BYTES, nullable=False),
    Column("topic", unicode_text(249)),
    Column("kafka_partition", Integer),
    Column("kafka_offset", BigInteger),
    #: Its place among its subscriber's: arrival, or that of a later offset of its own
    #: partition that came first, where the offsets then decide. Never changes.
    Column("place", _MOMENT, nullable=False),
    Column("created_at", _MOMENT, nullable=False),
    #: Last change of status.
    Column("updated_at", _MOMENT, nullable=False),
    #: The last attempt's fence.
    Column("token", ascii_text(32)),
    Column("lease_until", _MOMENT),
    #: What the recharge API could do about a repeated key when this one was last sent;
    #: NULL before that, and in rows that revision 0002 sent.
    Column("api_kind", ascii_text(16)),
    #: Which API it was last sent to (`RECHARGE_API_IDENTITY`); NULL before that, and in
    #: rows that revision 0003 sent.
    Column("api_identity", ascii_text(200)),
    #: What the recharge API is given as the key.
    Column("rendered_key", ascii_text(200), nullable=False),
    #: When the first and the last attempt were claimed, so never after their send.
    Column("first_sent_at", _MOMENT),
    Column("sent_at", _MOMENT),
    #: Claims so far, and how many of them ended without a known outcome.
    Column("attempts", Integer, nullable=False),
    Column("doubts", Integer, nullable=False),
    #: How often the API has answered that it did not execute this order. The default is
    #: for the revision before, which does not know the column.
    Column("not_executed", Integer, nullable=False, server_default="0"),
    #: Not to be tried before; NULL: at once.
    Column("not_before", _MOMENT),
    #: Class of the last answer that was not a plain success.
    Column("last_class", ascii_text(16)),
    #: The recharge API's own.
    Column("reference", unicode_text(200)),
    #: Why it was refused, parked or needs a person, as a short constant.
    Column("reason", ascii_text(64), nullable=False),
    #: When the resolver last looked it up at the API.
    Column("looked_at", _MOMENT),
    #: 1 while a later top-up of the subscriber must wait, else NULL.
    Column(
        "unsettled",
        Integer,
        Computed(f"CASE WHEN status IN ({_UNSETTLED_SQL}) THEN 1 END", persisted=True),
    ),
    #: 1 while in flight, else NULL: the database refuses two in one subscriber.
    Column(
        "active",
        Integer,
        Computed(f"CASE WHEN status = '{Status.IN_FLIGHT}' THEN 1 END", persisted=True),
    ),
    UniqueConstraint("msisdn", "active", name="one_in_flight_a_subscriber"),
    Index("line", "msisdn", "unsettled", "place"),
    Index("by_status", "status", "updated_at"),
)

#: Append-only: how each attempt ended that was no plain success.
attempt: Final = Table(
    "attempt",
    metadata,
    Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
    Column("idempotency_key", ascii_text(200), nullable=False),
    Column("token", ascii_text(32), nullable=False),
    Column("recorded_at", _MOMENT, nullable=False),
    Column("classified", ascii_text(16), nullable=False),
    #: 0 only if it is proven that nothing left us.
    Column("is_sent", Integer, nullable=False),
    Column("http_status", Integer),
    Column("reference", unicode_text(200)),
    Column("reason", ascii_text(64), nullable=False),
    #: The API's own words; foreign text, never logged.
    Column("words", unicode_text(500), nullable=False),
    Index("attempts_of", "idempotency_key", "id"),
)

#: What was recorded and can never be executed as it is.
quarantine: Final = Table(
    "quarantine",
    metadata,
    Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
    #: SHA-256 of topic, partition and offset (where known), announced length and
    #: bytes: a redelivery adds nothing, a recreated topic's other record does.
    Column("identity", ascii_text(64), nullable=False, unique=True),
    Column("outcome", ascii_text(16), nullable=False),
    Column("detail", unicode_text(500), nullable=False),
    Column("idempotency_key", ascii_text(200)),
    Column("topic", unicode_text(249)),
    Column("kafka_partition", Integer),
    Column("kafka_offset", BigInteger),
    #: Personal, perhaps: the bytes as they came, 16 KiB of them if too large.
    Column("raw", _BYTES, nullable=False),
    Column("announced_bytes", BigInteger, nullable=False),
    #: The request's attributes as JSON.
    Column("attributes", _BYTES, nullable=False),
    Column("recorded_at", _MOMENT, nullable=False),
    Index("quarantined_by_key", "idempotency_key"),
    Index("quarantined_at", "recorded_at"),
)

#: What came and could not be recorded yet: how often, and since when.
sighting: Final = Table(
    "sighting",
    metadata,
    #: SHA-256 of an event type, or of a record as in quarantine's `identity`.
    Column("name", ascii_text(64), primary_key=True),
    Column("first_seen_at", _MOMENT, nullable=False),
    Column("times", Integer, nullable=False),
    Index("sighted_at", "first_seen_at"),
)

# Who did it: the database fills in the account that is logged on, and operators have
# no right to write the column. On SQLite, which knows no accounts, it is UNPROVEN.
UNPROVEN: Final = "unproven"

#: Append-only: what a person decided about an order in doubt.
decision: Final = Table(
    "decision",
    metadata,
    Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
    Column("idempotency_key", ascii_text(200), nullable=False),
    #: The attempt that it is about; empty if there was none.
    Column("token", ascii_text(32), nullable=False),
    Column("from_status", ascii_text(16), nullable=False),
    #: `executed`, `not_executed` or `abandon`.
    Column("verdict", ascii_text(16), nullable=False),
    #: The recharge API's, for `executed`.
    Column("reference", unicode_text(200)),
    Column("reason", unicode_text(500), nullable=False),
    #: A typed name or a ticket; it proves nothing.
    Column("note", unicode_text(200), nullable=False),
    Column("decided_by", unicode_text(200), FetchedValue(), nullable=False),
    Column("decided_at", _MOMENT, FetchedValue(), nullable=False),
    Index("decisions_of", "idempotency_key", "id"),
)

#: A row stops new calls: scope `*`, or one channel.
pause: Final = Table(
    "pause",
    metadata,
    Column("scope", ascii_text(200), primary_key=True),
    Column("paused_by", unicode_text(200), FetchedValue(), nullable=False),
    Column("reason", unicode_text(500), nullable=False),
    Column("paused_at", _MOMENT, FetchedValue(), nullable=False),
)

#: Append-only: who paused and resumed what, and why.
pause_log: Final = Table(
    "pause_log",
    metadata,
    Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
    Column("scope", ascii_text(200), nullable=False),
    #: `pause` or `resume`.
    Column("action", ascii_text(16), nullable=False),
    Column("reason", unicode_text(500), nullable=False),
    Column("switched_by", unicode_text(200), FetchedValue(), nullable=False),
    Column("switched_at", _MOMENT, FetchedValue(), nullable=False),
)


#: What the migration's account has set for people's decisions, and they can't change.
decision_rule: Final = Table(
    "decision_rule",
    metadata,
    #: A field of `rules.Rules`.
    Column("name", ascii_text(64), primary_key=True),
    Column("value", Double, nullable=False),
    Column("set_by", unicode_text(200), FetchedValue(), nullable=False),
    Column("set_at", _MOMENT, FetchedValue(), nullable=False),
)


class Now(FunctionElement[Any]):
    """The database's clock, in UTC: the only one that leases know."""

    type = DateTime()
    inherit_cache = True


class After(FunctionElement[Any]):
    """The database's clock plus some microseconds."""

    type = DateTime()
    inherit_cache = True


class JustAfter(FunctionElement[Any]):
    """The least moment after another that the database can tell apart."""

    type = DateTime()
    inherit_cache = True


class AgeS(FunctionElement[Any]):
    """Seconds between a moment and the database's now."""

    type = Float()
    inherit_cache = True


_MICROS: Final = 1_000_000
_SQLITE_FORMAT: Final = "'%Y-%m-%d %H:%M:%f'"


def _arguments(element: FunctionElement[Any], compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.clauses, **kw))


@compiles(Now)
def _now(_element: Now, _compiler: Any, **_: Any) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(Now, "sqlite")
def _now_sqlite(_element: Now, _compiler: Any, **_: Any) -> str:
    return f"strftime({_SQLITE_FORMAT}, 'now')"


@compiles(After)
def _after(element: After, compiler: Any, **kw: Any) -> str:
    micros = _arguments(element, compiler, **kw)
    return f"TIMESTAMPADD(MICROSECOND, {micros}, UTC_TIMESTAMP(6))"


@compiles(After, "sqlite")
def _after_sqlite(element: After, compiler: Any, **kw: Any) -> str:
    micros = _arguments(element, compiler, **kw)
    return f"strftime({_SQLITE_FORMAT}, 'now', ({micros} / 1e6) || ' seconds')"


@compiles(JustAfter)
def _just_after(element: JustAfter, compiler: Any, **kw: Any) -> str:
    moment = _arguments(element, compiler, **kw)
    return f"TIMESTAMPADD(MICROSECOND, 1, {moment})"


@compiles(JustAfter, "sqlite")
def _just_after_sqlite(element: JustAfter, compiler: Any, **kw: Any) -> str:
    moment = _arguments(element, compiler, **kw)
    return f"strftime({_SQLITE_FORMAT}, {moment}, '+0.001 seconds')"


@compiles(AgeS)
def _age(element: AgeS, compiler: Any, **kw: Any) -> str:
    moment = _arguments(element, compiler, **kw)
    return f"(TIMESTAMPDIFF(MICROSECOND, {moment}, UTC_TIMESTAMP(6)) / 1e6)"


@compiles(AgeS, "sqlite")
def _age_sqlite(element: AgeS, compiler: Any, **kw: Any) -> str:
    moment = _arguments(element, compiler, **kw)
    return f"((julianday('now') - julianday({moment})) * 86400.0)"


def is_before(one: Any, other: Any) -> ColumnElement[bool]:
    """Whether one row stands before the other in their subscriber's line.

    By place; two that came late before the same later one share it, and then their
    offsets decide.
    """
    one_offset = func.coalesce(one.kafka_offset, -1)
    other_offset = func.coalesce(other.kafka_offset, -1)
    is_same = one.place == other.place
    is_first_by_key = one.idempotency_key < other.idempotency_key
    return or_(
        one.place < other.place,
        and_(is_same, one_offset < other_offset),
        and_(is_same, one_offset == other_offset, is_first_by_key),
    )


def is_behind(column: Any, moment: str, key: str) -> ColumnElement[bool]:
    """Behind a place in (column, key); the first condition is the index's range."""
    at = literal(moment, String)
    return and_(column >= at, or_(column > at, topup.c.idempotency_key > key))


def hinted(query: Select[Any], index: str, table: Any = topup) -> Select[Any]:
    """Name the index: a plan that changes with the statistics pages somebody."""
    for dialect in ("mysql", "mariadb"):
        query = query.with_hint(table, f"FORCE INDEX ({index})", dialect)
    return query


def ago(seconds: float) -> After:
    """The database's clock minus some seconds."""
    return After(literal(-round(seconds * _MICROS)))


def moment_text(moment: datetime | str, *, is_sqlite: bool) -> str:
    """A moment as the database writes it, so that it compares as it should."""
    if isinstance(moment, str):
        return moment
    timespec = "milliseconds" if is_sqlite else "microseconds"
    return moment.isoformat(" ", timespec)
