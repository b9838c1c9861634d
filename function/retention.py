"""What the ledger gives up: settled orders after a time, payloads, a person's number.

Owns those statements; must never touch an order that is not settled, delete one whose
record can come again, or insert anything. Clocks are the database's.
"""

import base64
import hmac
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    String,
    and_,
    delete,
    exists,
    func,
    literal,
    select,
    update,
)

from function.config import Settings
from function.database import connected, transaction
from function.errors import OperationRefused
from function.model import TERMINAL, Status
from function.schema import (
    ago,
    attempt,
    hinted,
    is_behind,
    moment_text,
    quarantine,
    sighting,
    topup,
)

_DAY_S: Final = 86_400
_KEYS_A_STATEMENT: Final = 500
#: HMAC-SHA256 wants a key as long as its hash.
_KEY_BYTES_MIN: Final = 32
_NUMBER: Final = re.compile(r"\+[0-9]{4,15}")
#: Settled for good, in the order in which `purge` takes them.
_SETTLED: Final = tuple(sorted(TERMINAL))


@dataclass(frozen=True, slots=True)
class Horizon:
    """For how long a record can still come (again)."""

    topic_retention_s: float
    dead_letter_retention_s: float
    replay_s: float

    @classmethod
    def of(cls, settings: Settings) -> "Horizon":
        """The horizon that the settings describe."""
        return cls(
            settings.topic_retention_s,
            settings.dead_letter_retention_s,
            settings.replay_horizon_s,
        )

    @property
    def total_s(self) -> float:
        """A settled row that is younger must stay."""
        return self.topic_retention_s + self.dead_letter_retention_s + self.replay_s

    def arithmetic(self) -> str:
        """The sum, as a message shows it."""
        parts = (self.topic_retention_s, self.dead_letter_retention_s, self.replay_s)
        shown = " + ".join(f"{each / _DAY_S:g}" for each in parts)
        return (
            f"TOPIC_RETENTION_S + DEAD_LETTER_RETENTION_S + REPLAY_HORIZON_S = "
            f"{shown} = {self.total_s / _DAY_S:g} days"
        )


@dataclass(slots=True)
class Purged:
    """How many rows a purge has taken, or would take."""

    orders: dict[str, int] = field(default_factory=dict)
    attempts: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` replaced; all 0 the second time."""

    pseudonym: str
    orders: int
    quarantined: int


class Retention:
    """The ledger as the jobs use it that keep it small and forgetful.

    Args:
        engine: from `database.make_engine`, with the account of the job.

    Every method may raise LedgerUnavailable; no batch is half-done then.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"

    def purge(
        self,
        older_than_s: float,
        horizon: Horizon,
        *,
        batch: int = 1000,
        is_dry_run: bool = False,
    ) -> Purged:
        """Delete settled orders with their attempts, and quarantine; in batches.

        Decisions stay. An order that isn't settled is never touched, however old, nor a
        record in quarantine whose place in its subscriber's line is kept; nor
        is one whose key stands in quarantine: a replay of that record would find the
        key unused, and execute it. Quarantine goes first, so that such an order goes in
        the purge that takes the record.

        Args:
            older_than_s: age of the last change of status, or of the recording.
            horizon: nothing younger may go: its record could come again.
            batch: rows a transaction.
            is_dry_run: only count.

        Raises:
            OperationRefused: younger than the horizon; shows the arithmetic.

        """
        if older_than_s < horizon.total_s:
            raise OperationRefused(
                f"{older_than_s / _DAY_S:g} days are less than "
                f"{horizon.arithmetic()}: a record can come again for so long, and "
                "without its row it would be recharged a second time"
            )
        cut = self._cut(older_than_s)
        purged = Purged()
        purged.quarantined = self._purge_quarantine(cut, batch, is_dry_run=is_dry_run)
        if not is_dry_run:
            self._purge_sightings(cut)
        for status in _SETTLED:
            purged.orders[status.value] = 0
            for keys in self._walk(status, cut, batch, _is_not_quarantined(cut)):
                if is_dry_run:
                    purged.orders[status.value] += len(keys)
                    continue
                orders, attempts = self._delete(status, keys, cut)
                purged.orders[status.value] += orders
                purged.attempts += attempts
        return purged

    def blank_payloads(
        self, older_than_s: float, *, batch: int = 1000, is_dry_run: bool = False
    ) -> int:
        """Empty the payloads of settled orders: personal, and not needed any more.

        The row stays, so a redelivery is still recognised: no horizon applies.

        Returns how many were emptied, or would be.
        """
        cut = self._cut(older_than_s)
        blanked = 0
        for status in _SETTLED:
            for keys in self._walk(status, cut, batch):
                these = and_(
                    topup.c.idempotency_key.in_(keys),
                    topup.c.status == status,
                    func.length(topup.c.payload) > 0,
                )
                with connected(self._engine) as connection:
                    if is_dry_run:
                        count = select(func.count()).select_from(topup).where(these)
                        blanked += connection.scalar(count) or 0
                    else:
                        blank = update(topup).where(these).values(payload=b"")
                        blanked += connection.execute(blank).rowcount
        return blanked

    def forget(self, msisdn: str, key_file: Path) -> Forgotten:
        """Replace a subscriber's number by a keyed hash wherever it is identifiable.

        That is the number and the payload of its orders, the API's words about them,
        and quarantine that belongs to one of them or quotes the number. Its orders
        stay recognised, by their keys. While the key file exists its owner can link
        a number to them, so it is made for one batch of requests and destroyed after
        it. The fingerprint stays: an unkeyed hash of number, amount, currency and
        donor, which whoever tries a range of numbers can undo until the row is purged.

        Args:
            msisdn: in E.164 with +.
            key_file: at least 32 random bytes.

        Raises:
            OperationRefused: something of the subscriber is open, or the key is too
                short.

        """
        if not _NUMBER.fullmatch(msisdn):
            raise OperationRefused("the subscriber must be a number in E.164, with +")
        pseudonym = _pseudonym(msisdn, key_file)
        mine = topup.c.msisdn == msisdn
        with transaction(self._engine) as connection:
            open_ = connection.execute(
                select(topup.c.idempotency_key, topup.c.status)
                .where(mine, topup.c.status.not_in(_SETTLED))
                .limit(1)
            ).first()
            if open_ is not None:
                raise OperationRefused(
                    f"{open_.idempotency_key} of this subscriber is {open_.status}: "
                    "settle it first"
                )
            keys = list(connection.scalars(select(topup.c.idempotency_key).where(mine)))
            quarantined = _blank_quarantine(
                connection, func.instr(quarantine.c.raw, msisdn.encode()) > 0
            )
            for some in _chunks(keys):
                connection.execute(
                    update(attempt)
                    .where(attempt.c.idempotency_key.in_(some))
                    .values(words="")
                )
                quarantined += _blank_quarantine(
                    connection, quarantine.c.idempotency_key.in_(some)
                )
                connection.execute(
                    update(topup)
                    .where(
                        topup.c.idempotency_key.in_(some), topup.c.status.in_(_SETTLED)
                    )
                    .values(msisdn=pseudonym, payload=b"")
                )
        return Forgotten(pseudonym, len(keys), quarantined)

    def _walk(
        self, status: Status, cut: str, batch: int, *also: ColumnElement[bool]
    ) -> Iterator[list[str]]:
        """Keys of a status up to a moment, oldest first; deletes meanwhile are fine."""
        query = hinted(
            select(topup.c.idempotency_key, topup.c.updated_at), "by_status"
        ).where(
            topup.c.status == status, topup.c.updated_at < literal(cut, String), *also
        )
        query = query.order_by(topup.c.updated_at, topup.c.idempotency_key)
        after: tuple[str, str] | None = None
        while True:
            page = (
                query.where(is_behind(topup.c.updated_at, *after)) if after else query
            )
            with connected(self._engine) as connection:
                rows = connection.execute(page.limit(batch)).all()
            if rows:
                yield [row.idempotency_key for row in rows]
                after = (
                    moment_text(rows[-1].updated_at, is_sqlite=self._is_sqlite),
                    rows[-1].idempotency_key,
                )
            if len(rows) < batch:
                return

    def _delete(self, status: Status, keys: Sequence[str], cut: str) -> tuple[int, int]:
        with transaction(self._engine) as connection:
            # Once more: one may have come into quarantine since the page was read.
            free = list(
                connection.scalars(
                    select(topup.c.idempotency_key).where(
                        topup.c.idempotency_key.in_(keys),
                        topup.c.status == status,
                        _is_not_quarantined(cut),
                    )
                )
            )
            attempts = connection.execute(
                delete(attempt).where(attempt.c.idempotency_key.in_(free))
            )
            orders = connection.execute(
                delete(topup).where(
                    topup.c.idempotency_key.in_(free), topup.c.status == status
                )
            )
            return orders.rowcount, attempts.rowcount

    def _purge_quarantine(self, cut: str, batch: int, *, is_dry_run: bool) -> int:
        # Whose place in a line is kept is not purged: it may be a good order.
        old = and_(
            quarantine.c.recorded_at < literal(cut, String),
            ~exists().where(
                topup.c.idempotency_key == quarantine.c.idempotency_key,
                topup.c.unsettled == 1,
            ),
        )
        with connected(self._engine) as connection:
            if is_dry_run:
                count = select(func.count()).select_from(quarantine).where(old)
                return connection.scalar(count) or 0
            purged = 0
            some = select(quarantine.c.id).where(old).limit(batch)
            while ids := list(connection.scalars(some)):
                gone = connection.execute(
                    delete(quarantine).where(quarantine.c.id.in_(ids))
                )
                purged += gone.rowcount
            return purged

    def _purge_sightings(self, cut: str) -> None:
        """A type that comes again later is waited for anew."""
        old = sighting.c.first_seen_at < literal(cut, String)
        with connected(self._engine) as connection:
            connection.execute(delete(sighting).where(old))

    def _cut(self, older_than_s: float) -> str:
        """One moment for the whole run, by the database's clock."""
        with connected(self._engine) as connection:
            moment = connection.scalar(select(ago(older_than_s)))
        return moment_text(moment, is_sqlite=self._is_sqlite)


def _is_not_quarantined(cut: str) -> ColumnElement[bool]:
    """No record that stays in quarantine has this order's key."""
    return ~exists().where(
        quarantine.c.idempotency_key == topup.c.idempotency_key,
        quarantine.c.recorded_at >= literal(cut, String),
    )


def _pseudonym(msisdn: str, key_file: Path) -> str:
    """Sixteen characters that no number has: 75 bits of HMAC-SHA256."""
    try:
        key = key_file.read_bytes().strip()
    except OSError as error:
        raise OperationRefused(f"--key-file: {error.strerror}") from None
    if len(key) < _KEY_BYTES_MIN:
        raise OperationRefused(
            f"--key-file: {len(key)} bytes are too few; make {_KEY_BYTES_MIN} random "
            "ones, for these requests alone"
        )
    digest = hmac.digest(key, msisdn.encode("ascii"), "sha256")
    return "~" + base64.b32encode(digest).decode("ascii")[:15]


def _blank_quarantine(connection: Connection, which: Any) -> int:
    statement = (
        update(quarantine)
        .where(which, func.length(quarantine.c.raw) > 0)
        .values(raw=b"", attributes=b"{}")
    )
    return connection.execute(statement).rowcount


def _chunks(keys: Sequence[str]) -> Iterable[Sequence[str]]:
    for start in range(0, len(keys), _KEYS_A_STATEMENT):
        yield keys[start : start + _KEYS_A_STATEMENT]
