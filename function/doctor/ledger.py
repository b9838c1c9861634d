"""Whether the database is durable, migrated, encrypted, and our account weak enough.

Owns the questions to the server and what their answers mean; must never change
anything, or read an order.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from function.database import connected
from function.doctor.diagnosis import Diagnosis, error, ok, skipped, unknown, warning
from function.errors import LedgerUnavailable
from function.grants import grants_of
from function.ledger import COUNT_OF_OTHER_APIS
from function.migrate import SCHEMA_REVISION

_VARIABLES: Final = (
    "innodb_flush_log_at_trx_commit",
    "sync_binlog",
    "log_bin",
    "read_only",
    "super_read_only",
    "max_connections",
    # What makes a failover target hold every acknowledged commit.
    "wsrep_on",
    "group_replication_group_name",
    "group_replication_consistency",
    "rpl_semi_sync_master_enabled",
    "rpl_semi_sync_source_enabled",
    "rpl_semi_sync_master_wait_point",
    "rpl_semi_sync_source_wait_point",
    "rpl_semi_sync_master_timeout",
    "rpl_semi_sync_source_timeout",
)
#: A primary that waits for its replica for less than an hour goes on without it.
_SEMI_SYNC_WAIT_MS_MIN: Final = 3_600_000
_NUMBER: Final = re.compile(r"[0-9]+")
_GRANT: Final = re.compile(
    r"GRANT (?P<rights>.+?) ON (?P<scope>(?:`[^`]*`|\*)\.(?:`[^`]*`|\*)) TO .*"
)
_RIGHT: Final = re.compile(r"([A-Z][A-Z ]*[A-Z])\s*(?:\(([^)]*)\))?")
_ON: Final = frozenset({"ON", "1"})
_TODO_GRANTS: Final = "give it the rights that `topup grants` prints, and no more"


@dataclass(frozen=True, kw_only=True)
class LedgerFacts:
    """What the server answered."""

    database: str
    variables: Mapping[str, str]
    #: The cipher of our own connection; empty without TLS.
    cipher: str
    #: None: there is no such table.
    revision: str | None
    grants: Sequence[str]


def check_ledger(engine: Engine, connections: int | None = None) -> Iterator[Diagnosis]:
    """Ask the database, and judge its answers.

    Args:
        engine: with the function's own account, whose rights are judged.
        connections: what all pods together may open, where that is known.

    """
    is_sqlite = engine.dialect.name == "sqlite"
    try:
        with connected(engine) as connection:
            if is_sqlite:
                facts = LedgerFacts(
                    database="",
                    variables={},
                    cipher="",
                    revision=_revision(connection),
                    grants=(),
                )
            else:
                facts = _ask(connection)
    except LedgerUnavailable as problem:
        yield unknown(
            "ledger",
            f"the database can't be asked ({problem})",
            "check LEDGER_DATABASE_URL, LEDGER_PASSWORD_FILE and LEDGER_TLS_CA_FILE, "
            "and that this machine may reach it",
        )
        return
    yield from _migrated(facts)
    if is_sqlite:
        yield skipped(
            "ledger", "is SQLite, for a laptop: nothing else is asked about it"
        )
        return
    yield from judge(facts, connections)


def check_other_apis(engine: Engine, identity: str) -> Iterator[Diagnosis]:
    """Say how many orders that are not ended were sent to another recharge API.

    Args:
        engine: as `check_ledger`, which tells of a ledger that can't be asked.
        identity: of the API that the function calls now.

    """
    try:
        with connected(engine) as connection:
            orders = connection.scalar(COUNT_OF_OTHER_APIS, {"api_identity": identity})
    except LedgerUnavailable:
        return
    if orders:
        yield warning(
            "ledger",
            f"{orders} orders in flight, in doubt, parked or accepted were sent to "
            f"another recharge API than {identity}, or nobody knows to which: this one "
            "is never asked about them",
            "see `topup ledger stats`; if it is the same API, set "
            "RECHARGE_API_IDENTITY to its name there, else settle them with "
            "`topup resolve`",
        )
    else:
        yield ok("ledger", f"each open order was sent to {identity}")


def _ask(connection: Connection) -> LedgerFacts:
    names = ", ".join(f"'{name}'" for name in _VARIABLES)
    found = connection.execute(
        text(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})")
    )
    variables = {str(name): str(value) for name, value in found}
    cipher = connection.execute(text("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).first()
    return LedgerFacts(
        database=str(connection.scalar(text("SELECT DATABASE()")) or ""),
        variables=variables,
        cipher=str(cipher[1]) if cipher else "",
        revision=_revision(connection),
        grants=[str(row[0]) for row in connection.execute(text("SHOW GRANTS"))],
    )


def _revision(connection: Connection) -> str | None:
    try:
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    # Missing, or not ours to read: either way nobody can start.
    except SQLAlchemyError:
        return None
    return None if found is None else str(found)


def judge(facts: LedgerFacts, connections: int | None = None) -> Iterator[Diagnosis]:
    """What a server's answers mean; pure."""
    yield from _durable(facts.variables)
    yield from _failover(facts.variables)
    if facts.cipher:
        yield ok("ledger", f"our connection is encrypted ({facts.cipher})")
    else:
        yield error(
            "ledger",
            "our connection is not encrypted",
            "set LEDGER_TLS_CA_FILE, and REQUIRE SSL for the account",
        )
    if {facts.variables.get("read_only"), facts.variables.get("super_read_only")} & _ON:
        yield error(
            "ledger",
            "the server is read-only: a replica, or a failover under way",
            "let LEDGER_DATABASE_URL lead to the primary",
        )
    allowed = facts.variables.get("max_connections", "")
    if connections is not None and allowed.isdigit() and int(allowed) < connections:
        yield error(
            "ledger",
            f"max_connections is {allowed}, all pods together may open {connections}",
            "raise it, or lower max-scale; see `topup plan`",
        )
    yield from _rights(facts)


def _migrated(facts: LedgerFacts) -> Iterator[Diagnosis]:
    if facts.revision is None:
        yield error(
            "ledger",
            "there is no schema that this account can see",
            "run `topup migrate` with the migration's account",
        )
    elif facts.revision < SCHEMA_REVISION:
        yield error(
            "ledger",
            f"its schema is {facts.revision}, this version needs {SCHEMA_REVISION}",
            "run `topup migrate`",
        )
    else:
        yield ok("ledger", f"its schema is {facts.revision}")


def _durable(variables: Mapping[str, str]) -> Iterator[Diagnosis]:
    flush = variables.get("innodb_flush_log_at_trx_commit")
    if flush != "1":
        yield error(
            "ledger",
            f"innodb_flush_log_at_trx_commit is {flush or 'not known'}: a claim that "
            "was acknowledged may be lost, and its order is called twice",
            "set it to 1",
        )
    has_binlog = variables.get("log_bin") in _ON
    if has_binlog and variables.get("sync_binlog") != "1":
        yield error(
            "ledger",
            f"sync_binlog is {variables.get('sync_binlog')}: what a replica gets after "
            "a crash may lack an acknowledged claim",
            "set it to 1",
        )
    elif flush == "1":
        also = " and its binary log" if has_binlog else ""
        yield ok("ledger", f"each commit is on disk{also} when it is acknowledged")


def _failover(variables: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Whether anything shows that a failover target holds every commit."""
    if variables.get("wsrep_on") in _ON:
        # Jepsen, MariaDB Galera Cluster 12.1.2, 2026-03-15; MDEV-38974, -38976, -38977
        # and -38999. A claim that is lost is an order that is called twice.
        yield error(
            "ledger",
            "the server is a node of a Galera cluster, which can lose commits that it "
            "has acknowledged: a lost claim is an order that is called twice",
            "use a primary with a semi-synchronous replica, or Group Replication with "
            "one primary",
        )
        return
    semi = "rpl_semi_sync_{}_{}"
    for role in ("master", "source"):
        if variables.get(semi.format(role, "enabled")) not in _ON:
            continue
        point = variables.get(semi.format(role, "wait_point"))
        wait_ms = variables.get(semi.format(role, "timeout"), "")
        if point != "AFTER_SYNC" or not (
            wait_ms.isdigit() and int(wait_ms) >= _SEMI_SYNC_WAIT_MS_MIN
        ):
            yield warning(
                "ledger",
                f"semi-synchronous replication waits at {point} for {wait_ms} ms: "
                "after that it goes on without the replica",
                "set the wait point AFTER_SYNC and a timeout of hours",
            )
        else:
            yield ok("ledger", "a replica has each commit before it is acknowledged")
        return
    consistency = variables.get("group_replication_consistency")
    if variables.get("group_replication_group_name") and consistency == "EVENTUAL":
        yield warning(
            "ledger",
            "group_replication_consistency is EVENTUAL: a new primary may answer "
            "before it has applied every commit",
            "set it to BEFORE_ON_PRIMARY_FAILOVER",
        )
    elif variables.get("group_replication_group_name"):
        yield ok("ledger", "the members of its group have each commit")
    else:
        yield warning(
            "ledger",
            "nothing shows that a failover target holds each acknowledged commit",
            "replicate synchronously, or keep the data on replicated storage and "
            "fail over to that alone",
        )


# -- Rights -------------------------------------------------------------------------

#: (right, column or None, scope); a scope is `database`.`table`.
_Right = tuple[str, str | None, str]


def rights_of(grant: str) -> frozenset[_Right]:
    """What one line of SHOW GRANTS, or of `topup grants`, gives."""
    line = grant if grant.startswith("GRANT ") else f"GRANT {grant} TO x"
    parts = _GRANT.fullmatch(line)
    if parts is None:
        return frozenset()
    scope = parts["scope"]
    found: set[_Right] = set()
    for right, columns in _RIGHT.findall(parts["rights"]):
        names = [each.strip(" `") for each in columns.split(",")] if columns else [None]
        found |= {(right, name, scope) for name in names}
    if "WITH GRANT OPTION" in line:
        found.add(("GRANT OPTION", None, scope))
    return frozenset(found)


def _rights(facts: LedgerFacts) -> Iterator[Diagnosis]:
    """The account has what the function needs, and nothing beyond."""
    held: set[_Right] = set()
    for grant in facts.grants:
        found = rights_of(grant)
        if not found and grant.startswith("GRANT "):
            yield warning(
                "ledger",
                "our account has a role, whose rights are not looked at",
                "grant the rights to the account itself",
            )
        held |= found
    needed = _of_role("function", facts.database)
    beyond = sorted(
        {
            f"{right} on {scope.replace('`', '')}"
            for right, column, scope in held
            if right != "USAGE" and not _covers(needed, (right, column, scope))
        }
    )
    lacking = sorted(
        {
            f"{right} on {scope.replace('`', '')}"
            for right, column, scope in needed
            if not _covers(held, (right, column, scope))
        }
    )
    if beyond:
        yield error(
            "ledger",
            f"our account may do more than it needs: {'; '.join(beyond)}",
            _TODO_GRANTS,
        )
    if lacking:
        yield error("ledger", f"our account lacks {'; '.join(lacking)}", _TODO_GRANTS)
    if not beyond and not lacking:
        yield ok("ledger", "our account has the rights that it needs, and no more")


def _of_role(role: str, database: str) -> frozenset[_Right]:
    return frozenset().union(*map(rights_of, grants_of(role, database)))


def _covers(given: frozenset[_Right] | set[_Right], right: _Right) -> bool:
    """Whether a right is among the given ones, perhaps within a wider one."""
    name, column, scope = right
    database = scope.partition(".")[0]
    return any(
        (each, given_column, where) in given
        for each in (name, "ALL PRIVILEGES")
        for given_column in {column, None}
        for where in {scope, f"{database}.*", "*.*"}
    )
