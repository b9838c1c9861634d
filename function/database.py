"""Connections to the ledger's database: TLS, session, pool, and what errors mean.

Owns the engine and the translation of every driver error; must never know what is
stored.
"""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from function.config import Settings
from function.errors import LedgerUnavailable, SettingsError

#: What the database, the network or the pool can do to a statement. Anything else is
#: a bug, and must not look like an outage.
UNAVAILABLE: Final = (DBAPIError, DisconnectionError, PoolTimeoutError, OSError)

#: Connections idle for longer are made anew: below what proxies keep.
_RECYCLE_S: Final = 300
#: MySQL answers these when a failover left us at a server that may not write.
#: The connection is dropped, so that the next one finds the new primary.
_READ_ONLY_ERRORS: Final = frozenset({1290, 1792, 1836})
_DUPLICATE_ERROR: Final = 1062
_DEADLOCK_ERROR: Final = 1213
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def make_engine(settings: Settings) -> Engine:
    """Build the engine; nothing connects before the first statement.

    Every statement commits by itself at READ COMMITTED: two statements are two
    round trips, and no ROLLBACK is sent when a connection goes back.

    Raises:
        SettingsError: the URL or the CA file can't be used; names the setting.

    """
    try:
        url = make_url(settings.ledger_database_url)
        dialect = url.get_dialect().name
    except (ArgumentError, SQLAlchemyError) as error:
        raise SettingsError(
            f"LEDGER_DATABASE_URL is no database URL ({type(error).__name__})"
        ) from None
    if dialect not in {"sqlite", "mysql", "mariadb"}:
        raise SettingsError(
            f"LEDGER_DATABASE_URL: {dialect} is not supported: use "
            "mysql+pymysql://… or sqlite:///…"
        )
    is_sqlite = dialect == "sqlite"
    if is_sqlite and not url.database:
        raise SettingsError(
            "LEDGER_DATABASE_URL names no file: a ledger in memory would forget"
        )
    if not (is_sqlite or settings.ledger_tls_ca_file or url.host in _LOOPBACK):
        raise SettingsError(
            "LEDGER_TLS_CA_FILE is missing: without it the driver takes any "
            "certificate, or none; for a public CA name the system's bundle"
        )
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        # Exceptions would print the row.
        hide_parameters=True,
        pool_size=settings.server_threads,
        # The CLI and the probes; a request thread never waits for a connection.
        max_overflow=settings.server_threads,
        pool_timeout=settings.ledger_timeout_s,
        pool_recycle=_RECYCLE_S,
        pool_use_lifo=True,
        connect_args=_sqlite_arguments(settings)
        if is_sqlite
        else _mysql_arguments(settings),
    )
    event.listen(engine, "connect", _prepare_sqlite if is_sqlite else _prepare_mysql)
    event.listen(engine, "handle_error", _drop_read_only)
    if settings.ledger_password_file:
        event.listen(engine, "do_connect", _password_reader(settings))
    return engine


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """A connection in which each statement commits by itself.

    IntegrityError for a duplicate key passes through: it is an answer.

    Raises:
        LedgerUnavailable: the database can't be used now. The message has the
            error's class and number, never its text, which quotes keys and rows.

    """
    try:
        with engine.connect() as connection:
            yield connection
    except IntegrityError as error:
        if not is_duplicate(error):
            raise LedgerUnavailable(describe(error)) from None
        raise
    except UNAVAILABLE as error:
        raise LedgerUnavailable(describe(error)) from None


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """A connection in which all statements commit together, or none does.

    Raises:
        LedgerUnavailable: nothing was committed, or the answer to the COMMIT was
            lost; the statements must bear being repeated.

    """
    is_sqlite = engine.dialect.name == "sqlite"
    with connected(engine) as connection:
        # A deferred transaction of SQLite would fail when it turns to writing.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_sqlite else "BEGIN")
        try:
            yield connection
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            # The connection is closed, not reused: closing is a rollback, also when
            # the server can't be asked for one any more.
            connection.invalidate()
            raise


def is_duplicate(error: IntegrityError) -> bool:
    """Whether a unique key refused the row."""
    return _number(error) == _DUPLICATE_ERROR or "UNIQUE" in str(error.orig)


def is_deadlock(error: BaseException) -> bool:
    """Whether the server rolled the statement back because two waited in a ring."""
    return _number(error) == _DEADLOCK_ERROR


def is_connection_lost(error: BaseException) -> bool:
    """Whether the statement may have been executed although it failed."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return isinstance(error, OSError)


def describe(error: BaseException) -> str:
    """Class and number of an error; its text would quote keys and rows."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    number = _number(error)
    return f"{type(cause).__name__} {number}" if number else type(cause).__name__


def _number(error: BaseException) -> int | None:
    cause = error.orig if isinstance(error, DBAPIError) else None
    first = cause.args[0] if cause is not None and cause.args else None
    return first if isinstance(first, int) else None


def _sqlite_arguments(settings: Settings) -> dict[str, Any]:
    return {"timeout": settings.ledger_timeout_s, "check_same_thread": False}


def _mysql_arguments(settings: Settings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "connect_timeout": max(1, round(settings.ledger_timeout_s)),
        "read_timeout": settings.ledger_timeout_s,
        "write_timeout": settings.ledger_timeout_s,
        "charset": "utf8mb4",
    }
    if settings.ledger_tls_ca_file:
        # The driver verifies name and chain only when it is handed a context.
        try:
            arguments["ssl"] = ssl.create_default_context(
                cafile=str(settings.ledger_tls_ca_file)
            )
        except (OSError, ValueError):
            raise SettingsError(
                "LEDGER_TLS_CA_FILE: no certificate can be read from it"
            ) from None
    return arguments


def _prepare_mysql(dbapi_connection: Any, _record: Any) -> None:
    with dbapi_connection.cursor() as cursor:
        # The variable's name differs between MySQL and MariaDB; this doesn't.
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        # Strict: a value that doesn't fit is an error, never cut. Locks are given
        # up before the driver gives up reading, so that the reason is known.
        cursor.execute(
            "SET SESSION sql_mode = 'TRADITIONAL', time_zone = '+00:00', "
            "innodb_lock_wait_timeout = 3"
        )


def _prepare_sqlite(dbapi_connection: Any, _record: Any) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _drop_read_only(context: ExceptionContext) -> None:
    cause = context.original_exception
    if cause.args and cause.args[0] in _READ_ONLY_ERRORS:
        context.is_disconnect = True


def _password_reader(settings: Settings) -> Callable[..., None]:
    path = settings.ledger_password_file

    def read_password(
        _dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]
    ) -> None:
        # At each connection, so that a rotated secret needs no restart.
        if path:
            try:
                parameters["password"] = path.read_text("utf-8").strip()
            except UnicodeDecodeError:
                raise OSError("the password file is not UTF-8") from None

    return read_password
