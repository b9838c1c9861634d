"""Bring the ledger's schema up to date, once, however many try at the same time.

Owns the running of migrations/; must never be run by the function itself, whose
database user may not alter tables.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, text, update
from sqlalchemy.exc import SQLAlchemyError

from function.database import connected, describe
from function.errors import LedgerUnavailable, MigrationError
from function.model import ENDED_BY_THE_API
from function.rules import Rules, write_rules
from function.schema import topup

#: The newest revision of migrations/ that this version knows; a test compares them.
SCHEMA_REVISION: Final = "0004"

_LOCK_NAME: Final = "topup-migrate"
_LOCK_WAIT_S: Final = 60


def migrate(engine: Engine, rules: Rules | None = None) -> str:
    """Run every migration that is missing, and return the schema's revision.

    Safe to run twice, and at the same time: the second waits and finds nothing to do.

    Args:
        engine: with the migration's account.
        rules: what people's decisions must keep from now on; None leaves it.

    Raises:
        MigrationError: the database refused, or another migration holds the lock for
            longer than 60 s. Nothing is half-done on SQLite; on MySQL, whose DDL
            commits by itself, run it again.

    """
    # Imported here, because the function has no use for it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with engine.connect() as connection, _alone(connection):
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if rules is not None:
                write_rules(connection, rules)
            return _revision(connection)
    except SQLAlchemyError as error:
        raise MigrationError(
            f"the ledger can't be migrated: {describe(error)}"
        ) from None


def note_api(engine: Engine, api_identity: str) -> int:
    """Note to which API an earlier revision sent what is not ended; returns how many.

    Revision 0003's code noted none. Run it when that code no longer runs, with the
    settings that it had: nothing in the ledger could say that they were others.

    Args:
        engine: with the migration's account; migrated.
        api_identity: of the recharge API that they were sent to.

    Raises:
        LedgerUnavailable: nothing was written; run it again.

    """
    statement = (
        update(topup)
        .where(
            topup.c.status.in_([status.value for status in sorted(ENDED_BY_THE_API)]),
            topup.c.sent_at.is_not(None),
            topup.c.api_identity.is_(None),
        )
        .values(api_identity=api_identity)
    )
    with connected(engine) as connection:
        return connection.execute(statement).rowcount


def require_migrated(engine: Engine) -> None:
    """Raise unless the schema is at least what this version needs.

    A newer schema is fine: migrations are backwards compatible, so that two versions
    can run at once.

    Raises:
        LedgerUnavailable: not reachable, or `topup migrate` has not been run.

    """
    with connected(engine) as connection:
        revision = _revision(connection)
    if revision < SCHEMA_REVISION:
        raise LedgerUnavailable(f"schema {revision} is too old: run `topup migrate`")


def _revision(connection: Connection) -> str:
    return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Keep every other migration out until this one is done."""
    if connection.dialect.name == "sqlite":
        # SQLite's DDL is transactional: the write lock is the lock, all or nothing.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
        return
    lock = {"name": _LOCK_NAME, "wait_s": _LOCK_WAIT_S}
    if connection.scalar(text("SELECT GET_LOCK(:name, :wait_s)"), lock) != 1:
        raise MigrationError(
            f"another migration has held the lock for {_LOCK_WAIT_S} s: "
            "wait for it, then run this again"
        )
    try:
        yield
    finally:
        connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _LOCK_NAME})
