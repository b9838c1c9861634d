"""What binds people's decisions: kept in the ledger, where operators can't change it.

Owns the rules' rows; must never take them from whoever decides. `topup migrate` writes
them from the deployment's settings, under the one account that may.
"""

from dataclasses import asdict, dataclass, fields

from sqlalchemy import Connection, delete, insert, select

from function.api_profile import load_profile
from function.config import Settings
from function.errors import OperationRefused
from function.schema import decision_rule


@dataclass(frozen=True, slots=True)
class Rules:
    """What a decision must keep."""

    #: Age of an attempt in seconds until which it could still be executed.
    settle_s: float
    #: More than this, in minor units, takes two persons.
    second_person_above_minor: int


def rules_of(settings: Settings) -> Rules:
    """The rules that a deployment's settings ask for.

    Raises:
        SettingsError: the API profile is missing or wrong.

    """
    return Rules(
        settle_s=load_profile(settings).settle_s,
        second_person_above_minor=settings.resolve_second_person_above_minor,
    )


def write_rules(connection: Connection, rules: Rules) -> None:
    """Set the rules; a row that says so already stays, with who set it and when."""
    known = _known(connection)
    # SQLite's migration is one transaction already.
    is_own = connection.dialect.name != "sqlite"
    if is_own:
        connection.exec_driver_sql("BEGIN")
    for name, value in asdict(rules).items():
        if known.get(name) == value:
            continue
        connection.execute(delete(decision_rule).where(decision_rule.c.name == name))
        connection.execute(insert(decision_rule).values(name=name, value=value))
    if is_own:
        connection.exec_driver_sql("COMMIT")


def read_rules(connection: Connection) -> Rules:
    """The rules as they stand.

    Raises:
        OperationRefused: nobody has set them.

    """
    known = _known(connection)
    missing = [each.name for each in fields(Rules) if each.name not in known]
    if missing:
        raise OperationRefused(
            f"the ledger has no rule {', '.join(missing)} for decisions: run "
            "`topup migrate` with the deployment's settings"
        )
    return Rules(known["settle_s"], int(known["second_person_above_minor"]))


def _known(connection: Connection) -> dict[str, float]:
    rows = connection.execute(select(decision_rule.c.name, decision_rule.c.value))
    return {row.name: row.value for row in rows}
