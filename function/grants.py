"""The database users apart: what each role may do to the ledger's tables.

Owns the list of rights as text for an administrator; must never connect, and must
never hold a password.

    migrate    makes and alters tables, drops none; nothing else uses it
    function   records and settles: no delete, no alter, evidence is insert-only
    resolver   as function: any number run beside it
    operator   one account a person: decides, pauses, reads; the server signs the row
    purge      deletes and blanks; it can insert nothing

What the server can't express is kept by the code: that only settled rows are deleted,
and that a status changes by a decision. Who has these accounts is trusted that far.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from function.errors import SettingsError

#: What an order is never changes; what became of it does.
_PROGRESS: Final = (
    "status",
    "updated_at",
    "token",
    "lease_until",
    "first_sent_at",
    "sent_at",
    "attempts",
    "doubts",
    "not_executed",
    "not_before",
    "api_kind",
    "api_identity",
    "last_class",
    "reference",
    "reason",
    "looked_at",
)
#: Not decided_by and decided_at: the server fills them, nobody else can.
_DECISION: Final = (
    "idempotency_key",
    "token",
    "from_status",
    "verdict",
    "reference",
    "reason",
    "note",
)
#: Evidence goes in and is not read again, not even to repeat it.
_PROCESSING: Final = (
    (f"SELECT, INSERT, UPDATE ({', '.join(_PROGRESS)})", "topup"),
    ("INSERT", "attempt"),
    ("INSERT", "quarantine"),
    ("SELECT", "pause"),
)
#: Role -> (rights, table). All but migrate's, which are on the whole database.
_RIGHTS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    # Ready once the ledger is migrated; the others find out by themselves.
    "function": (
        ("SELECT", "alembic_version"),
        ("SELECT, INSERT, UPDATE (times)", "sighting"),
        *_PROCESSING,
    ),
    "resolver": _PROCESSING,
    "operator": (
        ("SELECT, UPDATE (status, updated_at, doubts, reference, reason)", "topup"),
        ("SELECT", "attempt"),
        ("SELECT", "quarantine"),
        (
            f"SELECT, INSERT ({', '.join(_DECISION)})",
            "decision",
        ),
        ("SELECT", "decision_rule"),
        ("SELECT, INSERT (scope, reason), DELETE", "pause"),
        ("INSERT (scope, action, reason)", "pause_log"),
    ),
    "purge": (
        ("SELECT, DELETE, UPDATE (msisdn, payload)", "topup"),
        ("SELECT, DELETE, UPDATE (words)", "attempt"),
        ("SELECT, DELETE, UPDATE (raw, attributes)", "quarantine"),
        ("SELECT, DELETE", "sighting"),
    ),
}
#: DELETE is for a rule that is set anew. No DROP: the migration that takes something
#: away asks for it.
_MIGRATE: Final = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX"
ROLES: Final = ("migrate", *_RIGHTS)

_DATABASE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ACCOUNT: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def grants_of(role: str, database: str) -> list[str]:
    """What stands between GRANT and TO for one of ROLES.

    Raises:
        SettingsError: the database's name is not plain.

    """
    if not _DATABASE.fullmatch(database):
        raise SettingsError("--database: only letters, digits, _ and - in a name")
    if role == "migrate":
        # For a whole database, MySQL reads `_` as a wildcard.
        return [f"{_MIGRATE} ON `{database.replace('_', chr(92) + '_')}`.*"]
    return [f"{rights} ON `{database}`.`{table}`" for rights, table in _RIGHTS[role]]


def script(database: str, accounts: Mapping[str, Iterable[str]]) -> str:
    """The SQL that an administrator runs: accounts, locked, and their rights.

    Args:
        database: the ledger's.
        accounts: role -> names; a role that is left out has `topup_<role>`.

    Raises:
        SettingsError: a name is not plain.

    """
    lines = [
        "-- Run as an administrator; safe to run again. The tables' grants need the",
        "-- tables: run the first block, then `topup migrate`, then the others.",
        "-- Accounts are made locked. For each, with a password of its own:",
        "--   ALTER USER `name`@`%` IDENTIFIED BY '...' ACCOUNT UNLOCK;",
        "-- An operator is one person: a shared account proves nobody.",
    ]
    for role in ROLES:
        lines += ["", f"-- {role}"]
        names = list(accounts.get(role) or [f"topup_{role}"])
        for name in names:
            if not _ACCOUNT.fullmatch(name):
                raise SettingsError(f"--{role}: only letters, digits, _ . - in a name")
            user = f"`{name}`@`%`"
            lines.append(f"CREATE USER IF NOT EXISTS {user} REQUIRE SSL ACCOUNT LOCK;")
            lines += [
                f"GRANT {grant} TO {user};" for grant in grants_of(role, database)
            ]
    return "\n".join(lines) + "\n"
